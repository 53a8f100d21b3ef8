# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The blackout itself: one QEMU at most runs the guest, and what breaks in it takes nothing with it."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import mmap
import os
import signal
import threading
import time

import pytest

from ansible_collections.vmfleet.cpr.plugins.module_utils import journal
from ansible_collections.vmfleet.cpr.plugins.module_utils.errors import CprError
from ansible_collections.vmfleet.cpr.plugins.module_utils.phases import switch
from tests.guests.guest import Qmp, is_alive, wait_until


class Watcher(threading.Thread):
    """Asks both QEMUs for their run states, the old one always after the new one, every millisecond."""

    def __init__(self, old: str, new: str) -> None:
        super().__init__(daemon=True)
        self._monitors = {"new": Qmp(new), "old": Qmp(old)}
        self._over = threading.Event()
        self.seen: list[tuple[str, str]] = []

    def run(self) -> None:
        while not self._over.wait(0.001):
            states = {}
            for name in ("new", "old"):
                states[name] = "gone"
                with contextlib.suppress(OSError, ValueError):
                    states[name] = self._monitors[name].execute("query-status")["status"]
            self.seen.append((states["old"], states["new"]))

    def stop(self) -> list[tuple[str, str]]:
        """Pairs of the old and the new one's run state, in order."""
        self._over.set()
        self.join()
        return self.seen


@pytest.mark.parametrize("fails", [False, True])
def test_at_most_one_qemu_runs_the_guest_at_any_instant(start, host, fails):
    guest = start("web1", more=["-qmp", "unix:{dir}/watch.sock,server=on,wait=off"])
    old = guest.pid()
    host.until("setup", guest)
    if fails:
        with Qmp(str(guest.monitor) + ".cpr1") as monitor:
            monitor.execute("migrate-set-capabilities", capabilities=[{"capability": "multifd", "state": True}])
    watcher = Watcher(str(guest.directory / "watch.sock"), str(guest.directory / "watch.sock.cpr1"))
    watcher.start()
    time.sleep(0.1)
    (outcome,) = host.resume(guest)
    time.sleep(0.1)
    seen = watcher.stop()
    assert (outcome.error is not None) == fails
    # A QEMU that said "running" before another one that says so was asked: both ran the guest.
    assert ("running", "running") not in seen
    assert seen[0] == ("running", "inmigrate")
    assert seen[-1] == (("running", "gone") if fails else ("gone", "running"))
    assert any(pair[0] not in ("running", "gone") and pair[1] != "running" for pair in seen), "the pause was not seen"
    first = next((number for number, pair in enumerate(seen) if pair[1] == "running"), len(seen))
    assert all(pair[0] != "running" for pair in seen[first:])
    guest.wait_for_ticks()
    guest.check_continuity()
    assert guest.pid() == old or not fails


def before_commit(monkeypatch, act):
    """Do something when both ends have completed, right before the new QEMU is told to run the guest."""
    real = switch._commit

    async def commit(update, ends, *rest):
        await act(update, ends)
        return await real(update, ends, *rest)

    monkeypatch.setattr(switch, "_commit", commit)


def check_on_new(guest, host, outcome, old):
    """The update came to its end."""
    assert outcome.error is None, str(outcome.error)
    assert guest.pid() != old and guest.version().startswith("11.1.") and guest.status() == "running"
    assert host.record(guest)["phase"] == "finished"
    guest.wait_for_ticks()
    guest.check_continuity()


@pytest.fixture(name="ready")
def fixture_ready(start, host):
    """A guest right before its switch, and its old pid."""
    guest = start("web1")
    old = guest.pid()
    host.until("setup", guest)
    return guest, old


def test_a_guest_goes_on_in_the_new_qemu_when_the_old_one_dies_after_it_gave_it_away(ready, host, monkeypatch):
    guest, old = ready

    async def kill_old(dummy, ends):
        await ends.old_watch.kill()

    before_commit(monkeypatch, kill_old)
    (outcome,) = host.resume(guest)
    check_on_new(guest, host, outcome, old)


def test_a_new_qemu_that_somebody_stopped_at_the_commit_is_let_go_on(ready, host, monkeypatch):
    guest, old = ready

    async def freeze_new(update, dummy):
        os.kill(update.new.pid, signal.SIGSTOP)

    before_commit(monkeypatch, freeze_new)
    (outcome,) = host.resume(guest, pause_limit=0.3)
    check_on_new(guest, host, outcome, old)
    assert outcome.update.pause_ms > 300


def test_a_connection_that_is_cut_at_the_commit_is_opened_again(ready, host, monkeypatch):
    guest, old = ready

    async def cut(dummy, ends):
        await ends.new.close()

    before_commit(monkeypatch, cut)
    (outcome,) = host.resume(guest)
    check_on_new(guest, host, outcome, old)


def test_a_guest_that_went_on_unheard_stays_on_the_new_qemu(ready, host, monkeypatch):
    guest, old = ready

    async def deaf(*dummy):
        await asyncio.sleep(60)

    monkeypatch.setattr(switch, "_resumed", deaf)
    (outcome,) = host.resume(guest, pause_limit=0.3)
    check_on_new(guest, host, outcome, old)


def test_a_new_qemu_that_dies_at_the_commit_is_not_followed_by_the_old_one(ready, host, monkeypatch):
    guest, old = ready

    async def kill_new(dummy, ends):
        await ends.new_watch.kill()

    before_commit(monkeypatch, kill_new)
    (outcome,) = host.resume(guest)
    assert outcome.error.code == "new-qemu-gone"
    assert guest.pids() == [old] and guest.status() == "postmigrate"


def test_a_commit_that_cant_be_marked_is_undone(ready, host, monkeypatch):
    guest, old = ready
    real = journal.CommitMark.set

    def refuse(self, told):
        if told:
            raise OSError(28, "No space left on device")
        real(self, told)

    monkeypatch.setattr(journal.CommitMark, "set", refuse)
    (outcome,) = host.resume(guest)
    assert "No space left" in str(outcome.error)
    assert guest.pid() == old and guest.status() == "running"
    guest.wait_for_ticks()
    guest.check_continuity()


def test_an_update_whose_record_cant_be_written_after_the_commit_goes_on_and_says_so(ready, host, monkeypatch):
    guest, old = ready
    real = journal.Update.enter

    def refuse(self, phase, message=None):
        if phase in journal.COMMITTED:
            raise CprError("state-directory", "The state directory is full.")
        real(self, phase, message)

    monkeypatch.setattr(journal.Update, "enter", refuse)
    (outcome,) = host.resume(guest)
    assert outcome.error.code == "state-directory" and "went from QEMU 10.0" in outcome.error.message
    assert not is_alive(old) and guest.status() == "running"
    monkeypatch.undo()
    (outcome,) = host.launch(guest)
    check_on_new(guest, host, outcome, old)


def test_a_switch_that_nobody_waits_for_any_more_does_not_begin(ready, host):
    guest, old = ready
    (outcome,) = host.resume(guest, is_abandoned=lambda: True)
    assert outcome.error.code == "run-abandoned"
    assert guest.status() == "running" and len(guest.pids()) == 2
    host.until("resume", guest)
    guest.wait_for_ticks()
    guest.check_continuity()


@pytest.mark.parametrize("limit", [0.2, 1.0])
def test_the_pause_ends_at_its_limit(ready, host, limit):
    guest, old = ready
    wait_until(lambda: is_alive(old), "the guest is there")
    with Qmp(str(guest.monitor) + ".cpr1") as monitor:
        monitor.execute("migrate-set-capabilities", capabilities=[{"capability": "multifd", "state": True}])
    (outcome,) = host.resume(guest, pause_limit=limit)
    assert outcome.error.code == "pause-limit" and f"within {limit:g} s" in outcome.error.message
    assert guest.pid() == old and guest.status() == "running"


def _is_cached(path):
    """Whether the start of a file is in the host's page cache: mincore(2)."""
    with open(path, "r+b") as stream, mmap.mmap(stream.fileno(), mmap.PAGESIZE) as view:
        found = ctypes.c_ubyte()
        start = ctypes.c_char.from_buffer(view)
        assert ctypes.CDLL(None).mincore(ctypes.byref(start), ctypes.c_size_t(mmap.PAGESIZE), ctypes.byref(found)) == 0
        del start
        return bool(found.value & 1)


@pytest.mark.parametrize("option", ["", ",drop-cache=off"])
def test_the_images_are_out_of_the_page_cache_before_the_guest_stops(start, host, monkeypatch, tmp_path, option):
    """What is dirty can't be dropped, so what is not there any more was written too."""
    seen = {}
    real = switch.switch

    async def look(*arguments):
        seen.update({name: _is_cached(tmp_path / name) for name in ("disk.img", "ram")})
        await real(*arguments)

    monkeypatch.setattr(switch, "switch", look)
    (tmp_path / "disk.img").write_bytes(bytes(1 << 20))
    memory = ("-object", f"memory-backend-file,id=ram0,size=64M,mem-path={tmp_path}/ram,share=on")
    disk = ("-blockdev", f"driver=file,filename={tmp_path}/disk.img,node-name=more{option}")
    guest = start("web1", memory=memory, more=[*disk, "-device", "virtio-blk-pci,drive=more"])
    with open(tmp_path / "disk.img", "r+b") as stream:
        stream.write(os.urandom(1 << 20))
    host.until("resume", guest)
    assert seen == {"disk.img": bool(option), "ram": True}
    guest.wait_for_ticks()
    guest.check_continuity()
