# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What fails before the commit leaves the guest on its old QEMU, and says why."""

from __future__ import annotations

import os
import signal

import pytest

from ansible_collections.vmfleet.cpr.plugins.module_utils import launcher
from ansible_collections.vmfleet.cpr.plugins.module_utils.errors import CprError
from ansible_collections.vmfleet.cpr.plugins.module_utils.phases import retire, rollback, switch
from tests.guests.guest import OLD_SUITE, Qmp, is_alive, qemu, wait_until


def new_pid(guest, old):
    """The other process of the guest."""
    return next(pid for pid in guest.pids() if pid != old)


def check_back_and_able_to_go(guest, host, old):
    """The old QEMU alone runs the guest, with its settings, and another try works."""
    assert guest.pid() == old
    assert guest.status() == "running"
    guest.wait_for_ticks()
    with guest.qmp() as monitor:
        assert monitor.execute("query-migrate-parameters")["mode"] == "normal"
        assert not any(item["state"] for item in monitor.execute("query-migrate-capabilities"))
    assert host.record(guest)["phase"] == "rolled-back"
    host.until("resume", guest)
    assert guest.version().startswith("11.1.") and guest.pid() != old
    guest.wait_for_ticks()
    guest.check_continuity()


@pytest.mark.parametrize("last", ["launch", "transfer", "setup"])
def test_rollback_from_every_phase(start, host, last):
    guest = start("web1")
    old = guest.pid()
    host.until(last, guest)
    assert len(guest.pids()) == 2
    (outcome,) = host.rollback(guest)
    assert outcome.changed and outcome.error is None
    (again,) = host.rollback(guest)
    assert not again.changed
    check_back_and_able_to_go(guest, host, old)


def test_rollback_leaves_alone_who_has_no_update_or_a_finished_one(start, host):
    guest = start("web1")
    (outcome,) = host.rollback(guest)
    assert not outcome.changed and outcome.error is None
    host.until("resume", guest)
    (outcome,) = host.rollback(guest)
    assert not outcome.changed and guest.version().startswith("11.1.")


@pytest.mark.parametrize(("last", "following"), [("launch", "transfer"), ("transfer", "setup"), ("setup", "resume")])
def test_old_qemu_runs_on_when_the_new_one_dies_between_two_phases(start, host, last, following):
    guest = start("web1")
    old = guest.pid()
    host.until(last, guest)
    os.kill(new_pid(guest, old), signal.SIGKILL)
    wait_until(lambda: guest.pids() == [old], "the new QEMU is dead")
    (outcome,) = getattr(host, following)(guest)
    assert outcome.error is not None and outcome.error.code in ("new-qemu-exited", "monitor-unreachable")
    assert guest.status() == "running"
    host.rollback(guest)
    check_back_and_able_to_go(guest, host, old)


def test_a_new_qemu_that_cant_open_a_file_says_so_in_its_own_words(start, host, tmp_path):
    notes = tmp_path / "notes"
    notes.write_text("for the guest")
    more = ["-object", "secret,id=key,data=hunter2", "-fw_cfg", f"name=opt/org.example,file={notes}"]
    guest = start("web1", more=more)
    old = guest.pid()
    notes.rename(tmp_path / "away")
    host.until("launch", guest)
    (outcome,) = host.transfer(guest)
    assert outcome.error.code == "new-qemu-exited"
    assert str(notes) in outcome.error.message
    assert "hunter2" not in str(outcome.error)
    assert guest.status() == "running"
    (tmp_path / "away").rename(notes)
    host.rollback(guest)
    check_back_and_able_to_go(guest, host, old)


def test_a_capability_on_one_end_only_is_undone_within_the_pause_limit(start, host):
    guest = start("web1")
    old = guest.pid()
    host.until("setup", guest)
    with Qmp(str(guest.monitor) + ".cpr1") as monitor:
        monitor.execute("migrate-set-capabilities", capabilities=[{"capability": "multifd", "state": True}])
    (outcome,) = host.resume(guest)
    assert outcome.error.code in ("pause-limit", "migration-failed")
    assert "back on the old QEMU" in outcome.error.message
    check_back_and_able_to_go(guest, host, old)


def test_a_state_that_does_not_load_brings_the_guest_back_with_qemus_reason(start, host):
    guest = start("web1", more=["-device", "qemu-xhci,id=usb", "-device", "usb-mouse,bus=usb.0,id=mouse"])
    old = guest.pid()
    host.until("setup", guest)
    with Qmp(str(guest.monitor) + ".cpr1") as monitor:
        monitor.execute("device_del", id="mouse")
    (outcome,) = host.resume(guest)
    assert outcome.error.code == "migration-failed"
    assert "QEMU says: " in outcome.error.message  # that its sibling failed, or that the connection ended
    assert guest.pid() == old and guest.status() == "running"
    guest.wait_for_ticks()
    guest.check_continuity()


def test_a_new_qemu_that_freezes_is_killed_and_the_old_one_goes_on(start, host):
    guest = start("web1")
    old = guest.pid()
    host.until("setup", guest)
    os.kill(new_pid(guest, old), signal.SIGSTOP)
    (outcome,) = host.resume(guest, timeout=2.0)
    assert outcome.error is not None
    if host.record(guest)["phase"] != "rolled-back":  # it froze before the switch began
        host.rollback(guest)
    check_back_and_able_to_go(guest, host, old)


def test_a_switch_that_fails_unexpectedly_still_brings_the_guest_back(start, host, monkeypatch):
    guest = start("web1")
    old = guest.pid()
    host.until("setup", guest)

    real = switch._Takeover.take_over

    async def surprise(takeover):
        await real(takeover)
        # Both ends are through, and nobody has committed: the worst moment.
        raise RuntimeError("a mistake in the program")

    monkeypatch.setattr(switch._Takeover, "take_over", surprise)
    with pytest.raises(RuntimeError):
        host.resume(guest)
    monkeypatch.undo()
    check_back_and_able_to_go(guest, host, old)


def test_the_old_qemu_never_runs_again_after_the_commit(start, host):
    guest = start("web1")
    old = guest.pid()
    host.until("resume", guest)
    assert not is_alive(old)
    for phase in ("transfer", "setup", "resume", "rollback"):
        (outcome,) = getattr(host, phase)(guest)
        assert outcome.error is None and not outcome.changed
    guest.wait_for_ticks()
    guest.check_continuity()


def test_a_guest_that_is_paused_during_its_update_stays_paused(start, host):
    guest = start("web1")
    old = guest.pid()
    host.until("setup", guest)
    with guest.qmp() as monitor:
        monitor.execute("stop")
    host.rollback(guest)
    assert guest.pid() == old and guest.status() == "paused"
    with guest.qmp() as monitor:
        monitor.execute("cont")
    host.until("setup", guest)
    with guest.qmp() as monitor:
        monitor.execute("stop")
    (outcome,) = host.resume(guest)
    assert outcome.error is None and outcome.update.pause_ms is None
    assert guest.pid() != old and guest.status() == "paused"
    with guest.qmp() as monitor:
        monitor.execute("cont")
    guest.wait_for_ticks()
    guest.check_continuity()


def test_a_phase_out_of_turn_is_refused(start, host):
    guest = start("web1")
    for phase in ("transfer", "setup", "resume"):
        (outcome,) = getattr(host, phase)(guest)
        assert outcome.error.code == "wrong-phase"
    host.until("launch", guest)
    (outcome,) = host.resume(guest)
    assert outcome.error.code == "wrong-phase" and "migration_setup" in outcome.error.hint
    host.rollback(guest)


@pytest.mark.parametrize("last", ["launch", "transfer", "setup"])
def test_what_a_dead_run_left_before_the_switch_is_undone_by_the_next(start, host, last):
    guest = start("web1")
    old = guest.pid()
    host.until(last, guest)
    leftover = new_pid(guest, old)
    (shown,) = host.launch(guest, check_mode=True)
    assert shown.changed and is_alive(leftover)
    host.until("resume", guest)
    assert not is_alive(leftover) and guest.pid() not in (old, leftover)
    guest.wait_for_ticks()
    guest.check_continuity()


def test_a_disk_that_is_snapshotted_during_the_update_is_refused_before_the_switch(start, host):
    guest = start("web1")
    old = guest.pid()
    host.launch(guest)
    with guest.qmp() as monitor:
        monitor.execute(
            "blockdev-snapshot-sync", device="disk", **{"snapshot-file": str(guest.directory / "over.qcow2")}
        )
    host.transfer(guest)
    (outcome,) = host.setup(guest)
    assert outcome.error.code == "disks-differ"
    assert "over.qcow2" in outcome.error.message and "disk.img" in outcome.error.message
    host.rollback(guest)
    assert guest.pid() == old and guest.status() == "running"
    guest.wait_for_ticks()
    guest.check_continuity()


def test_a_launch_that_failed_leaves_nothing_behind(start, host, monkeypatch):
    guest = start("web1")
    old = guest.pid()

    def refuse(*dummy):
        raise CprError("launch-failed", "The host refused.")

    monkeypatch.setattr(launcher.Prepared, "start", refuse)
    (outcome,) = host.launch(guest)
    assert outcome.error.code == "launch-failed"
    monkeypatch.undo()
    (outcome,) = host.rollback(guest)
    assert outcome.error is None and not outcome.changed
    check_back_and_able_to_go(guest, host, old)


def test_an_undo_that_died_is_finished_by_the_next_run(start, host, monkeypatch):
    guest = start("web1")
    old = guest.pid()
    host.until("setup", guest)
    with Qmp(str(guest.monitor) + ".cpr1") as monitor:
        monitor.execute("migrate-set-capabilities", capabilities=[{"capability": "multifd", "state": True}])
    _die_in(monkeypatch, rollback, "_end_migration", host, guest)
    assert guest.pids() == [old] and host.record(guest)["phase"] == "switching"
    (outcome,) = host.rollback(guest)
    assert outcome.error is None
    check_back_and_able_to_go(guest, host, old)


def test_a_new_qemu_that_ends_after_the_commit_is_told_from_one_that_can_be_undone(switched, host):
    guest, old, new = switched
    os.kill(new, signal.SIGKILL)
    wait_until(lambda: guest.pids() == [old], "the new QEMU is dead")
    (outcome,) = host.resume(guest)
    assert outcome.error.code == "new-qemu-gone" and str(old) in outcome.error.hint
    assert guest.status() == "postmigrate"


def test_a_guest_that_went_down_on_the_new_qemu_is_free_for_the_next_update_once_it_was_started_anew(switched, host):
    guest = switched[0]
    guest.kill()
    guest.start(qemu(OLD_SUITE))
    (outcome,) = host.launch(guest)
    assert outcome.error.code == "new-qemu-gone"
    host.until("resume", guest)
    assert guest.version().startswith("11.1.")


def test_an_update_whose_guest_is_gone_is_ended_by_the_next_run(start, host):
    guest, other = start("gone"), start("other")
    host.until("setup", guest)
    guest.kill()
    judged = {item.guest: item for item in host.preflight(guest, other)}
    assert judged["gone"].error.code == "guest-not-found" and judged["other"].error is None
    started = {item.guest: item for item in host.launch(guest, other)}
    assert started["gone"].error.code == "old-qemu-gone" and not started["other"].changed
    assert host.record(guest)["phase"] == "rolled-back"
    host.until("resume", other)


@pytest.fixture(name="stranded")
def fixture_stranded(start, host, monkeypatch):
    """A guest whose run died within the pause, before the commit; both pids."""
    guest = start("web1")
    old = guest.pid()
    host.until("setup", guest)
    _die_in(monkeypatch, switch, "_commit", host, guest)
    assert guest.status() == "postmigrate" and host.record(guest)["phase"] == "switching"
    return guest, old, new_pid(guest, old)


def _die_in(monkeypatch, module, function, host, guest):
    def died(*dummy):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, function, died)
    with pytest.raises(KeyboardInterrupt):
        host.resume(guest)
    monkeypatch.undo()


def test_a_guest_whose_run_died_within_the_pause_is_brought_back_by_rollback(stranded, host):
    guest, old, new = stranded
    (outcome,) = host.rollback(guest)
    assert outcome.error is None and not is_alive(new)
    check_back_and_able_to_go(guest, host, old)


def test_a_guest_whose_run_died_within_the_pause_goes_on_where_it_is_complete(stranded, host):
    guest, old, new = stranded
    host.until("resume", guest)
    assert guest.pid() == new and not is_alive(old) and guest.version().startswith("11.1.")
    guest.wait_for_ticks()
    guest.check_continuity()


def test_a_guest_whose_old_qemu_died_within_the_pause_too_goes_on_in_the_new_one(stranded, host):
    guest, old, new = stranded
    os.kill(old, signal.SIGKILL)
    wait_until(lambda: guest.pids() == [new], "the old QEMU is dead")
    (outcome,) = host.rollback(guest)
    assert outcome.error.code == "already-committed" and is_alive(new)
    host.until("resume", guest)
    assert guest.pid() == new
    guest.wait_for_ticks()
    guest.check_continuity()


def test_a_guest_that_was_never_told_to_run_on_a_new_qemu_that_died_is_brought_back(stranded, host):
    guest, old, new = stranded
    os.kill(new, signal.SIGKILL)
    wait_until(lambda: guest.pids() == [old], "the new QEMU is dead")
    host.rollback(guest)
    check_back_and_able_to_go(guest, host, old)


def _mark_as_told(host, guest):
    (host.state / guest.name / "commit").write_bytes(b"1")


def test_nothing_is_done_where_it_cant_be_told_whether_the_guest_ran_on_the_new_qemu(stranded, host):
    guest, old, new = stranded
    _mark_as_told(host, guest)
    os.kill(new, signal.SIGKILL)
    wait_until(lambda: guest.pids() == [old], "the new QEMU is dead")
    for module in (host.rollback, host.launch, host.resume):
        (outcome,) = module(guest)
        assert outcome.error.code == "state-unclear"
        assert guest.pids() == [old] and guest.status() == "postmigrate"


def test_a_guest_that_may_have_run_on_the_new_qemu_never_goes_back(stranded, host):
    guest, old, new = stranded
    _mark_as_told(host, guest)
    (outcome,) = host.rollback(guest)
    assert outcome.error.code == "already-committed" and is_alive(new) and guest.status() == "postmigrate"
    (outcome,) = host.resume(guest)
    assert outcome.error is None and outcome.changed and guest.pid() == new
    guest.wait_for_ticks()
    guest.check_continuity()


@pytest.fixture(name="switched")
def fixture_switched(start, host, monkeypatch):
    """A guest on its new QEMU whose run died before it retired the old one; both pids."""
    guest = start("web1")
    old = guest.pid()
    host.until("setup", guest)

    _die_in(monkeypatch, retire, "retire", host, guest)
    assert is_alive(old) and host.record(guest)["phase"] == "switched"
    return guest, old, new_pid(guest, old)


@pytest.mark.parametrize("old_is_there", [True, False])
def test_a_guest_whose_switch_died_right_after_the_commit_is_not_touched_but_finished(switched, host, old_is_there):
    guest, old, new = switched
    with host.changed_record(guest) as record:
        record["phase"] = "switching"
    if not old_is_there:
        os.kill(old, signal.SIGKILL)
        wait_until(lambda: guest.pids() == [new], "the old QEMU is gone")
    (outcome,) = host.rollback(guest)
    assert outcome.error.code == "already-committed" and is_alive(new)
    (outcome,) = host.launch(guest)
    assert outcome.error is None and outcome.changed
    assert guest.pid() == new and host.record(guest)["phase"] == "finished"
    guest.wait_for_ticks()
    guest.check_continuity()


@pytest.mark.parametrize("step", ["_copy_permissions", "_restore_paths"])
def test_paths_that_were_not_renamed_yet_are_by_the_next_run(start, host, monkeypatch, step):
    guest = start("web1")
    old = guest.pid()
    host.until("setup", guest)
    _die_in(monkeypatch, retire, step, host, guest)
    assert host.record(guest)["phase"] == "switched" and (guest.directory / "qmp.sock.cpr1").exists()
    host.until("resume", guest)
    assert guest.pid() != old and guest.version().startswith("11.1.") and guest.status() == "running"
    assert not list(guest.directory.glob("*.cpr*"))
    guest.wait_for_ticks()
    guest.check_continuity()


@pytest.mark.parametrize("module", ["resume", "launch"])
def test_a_retirement_that_was_interrupted_is_finished_by_the_next_run(switched, host, module):
    guest, old, new = switched
    (outcome,) = host.rollback(guest)
    assert outcome.error.code == "already-committed"
    (outcome,) = getattr(host, module)(guest)
    assert outcome.error is None and outcome.changed
    assert not is_alive(old) and guest.pid() == new
    assert guest.version().startswith("11.1.")
    guest.wait_for_ticks()
    guest.check_continuity()
