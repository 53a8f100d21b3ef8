# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Guests that go to another QEMU by other ways than cpr-transfer, and back."""

from __future__ import annotations

import os
import pathlib
import shutil
import signal

import pytest

from ansible_collections.vmfleet.cpr.plugins.module_utils.phases import preflight
from tests.guests import healthy
from tests.guests.ansible import live_update
from tests.guests.guest import NEW_SUITE, OLD_SUITE, Guest, qemu
from tests.guests.network import Bridge

OLDEST_SUITE = "bookworm"  # QEMU 7.2


def goes_on(guest: Guest) -> None:
    """The guest counts on, in one process, and never noticed anything."""
    guest.wait_for_ticks()
    guest.check_continuity()
    guest.pid()


def goes_by_transfer(host, guest: Guest, binary: str) -> None:
    """Whatever its RAM was, from now on nothing of it is copied."""
    outcome = host.until("resume", guest, qemu_binary=binary)
    assert outcome.update.mode == "cpr-transfer" and outcome.update.copied == {}
    goes_on(guest)


def test_a_guest_of_72_with_plain_memory_is_adopted_and_then_goes_by_cpr_transfer(start, host, rebuilt_qemu):
    guest = start("adopted", suite=OLDEST_SUITE, memory=None)
    first = host.until("resume", guest)
    assert first.update.mode == "precopy" and "memory-not-shared" in first.update.mode_reason
    assert first.update.copied["mib_total"] >= 64 and "64 MiB of RAM were copied" in first.message
    goes_on(guest)
    goes_by_transfer(host, guest, rebuilt_qemu)


def test_a_linux_guest_of_72_is_adopted_and_keeps_its_boot_id(start, host, rebuilt_qemu):
    guest = start("penguin", suite=OLDEST_SUITE, linux=True, shared=False)
    # Under TCG; tests/integration/test_host_reboot.py has one under KVM.
    assert host.until("resume", guest, accept_differences=["tcg-precopy"]).update.mode == "precopy"
    goes_on(guest)
    goes_by_transfer(host, guest, rebuilt_qemu)


# Of 7.2: everything that people run, and none of it ready.
PRIVATE = {
    name: options
    for name, (suite, options) in healthy.COMMAND_LINES.items()
    # 7.2 gives the panic device other events than 11.1, which is told, and has no such machine properties.
    if suite == OLD_SUITE and name != "watchdog, panic device, identity"
}


def as_of_72(options):
    """The arguments of a guest on QEMU 7.2 whose RAM nobody can share."""

    def private(word):
        return word.replace(",share=on", "").replace("memory-backend-memfd", "memory-backend-ram")

    machine = "pc-i440fx-7.2" if "i440fx" in options.get("machine", "") else "q35"
    more = [private(word) for word in options.get("more", ())]
    return {**options, "memory": None, "machine": machine, "more": more}


@pytest.mark.parametrize("name", PRIVATE)
def test_a_healthy_guest_of_72_is_adopted(start, host, rebuilt_qemu, tmp_path, name):
    healthy.prepare(tmp_path / "healthy")
    guest = start("healthy", suite=OLDEST_SUITE, **as_of_72(PRIVATE[name]))
    assert host.until("resume", guest, accept_differences=["tcg-precopy"]).update.mode == "precopy"
    goes_on(guest)
    goes_by_transfer(host, guest, rebuilt_qemu)


def test_a_hot_plugged_memory_module_is_copied_too(start, host, rebuilt_qemu):
    guest = start("dimm", suite=OLDEST_SUITE, memory=None, more=["-m", "64M,slots=2,maxmem=1G"])
    with guest.qmp() as monitor:
        monitor.execute("object-add", **{"qom-type": "memory-backend-ram", "id": "mem1", "size": 128 << 20})
        monitor.execute("device_add", driver="pc-dimm", id="dimm1", memdev="mem1")
    outcome = host.until("resume", guest)
    assert outcome.update.copied["mib_total"] >= 192
    goes_on(guest)
    with guest.qmp() as monitor:
        backends = {item["id"]: (item["share"], item["size"]) for item in monitor.execute("query-memdev")}
    assert backends == {"pc.ram": (True, 64 << 20), "mem1": (True, 128 << 20)}
    goes_by_transfer(host, guest, rebuilt_qemu)


@pytest.fixture(name="huge_pages")
def fixture_huge_pages(tmp_path):
    """64 huge pages of 2 MiB and a place for files of them; as many as there were, afterwards."""
    pool = pathlib.Path("/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages")
    before = pool.read_text(encoding="ascii")
    pool.write_text("80\n", encoding="ascii")
    if int(pool.read_text(encoding="ascii")) < 80:
        pool.write_text(before, encoding="ascii")
        pytest.skip("this machine's kernel gives no 160 MiB of huge pages")
    place = tmp_path / "pages"
    place.mkdir()
    assert os.system(f"mount -t hugetlbfs none {place}") == 0
    yield place
    os.system(f"umount -l {place}")
    pool.write_text(before, encoding="ascii")


def test_huge_pages_stay_huge_pages_and_must_be_free(start, host, rebuilt_qemu, huge_pages):
    backend = ("-object", f"memory-backend-file,id=ram0,size=64M,mem-path={huge_pages},prealloc=on")
    guest = start("huge", suite=OLDEST_SUITE, memory=None, machine="q35,memory-backend=ram0", more=backend)
    pool = pathlib.Path("/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages")
    pool.write_text("60\n", encoding="ascii")  # 28 are left
    (refused,) = host.launch(guest)
    assert refused.error.code == "memory-short" and "pool of 2048 KiB pages" in refused.error.message
    goes_on(guest)
    pool.write_text("80\n", encoding="ascii")
    host.until("resume", guest)
    goes_on(guest)
    with guest.qmp() as monitor:
        pages = monitor.execute("human-monitor-command", **{"command-line": "info ramblock"})
        (backend,) = monitor.execute("query-memdev")
    assert "ram0    2 MiB" in pages and backend["share"] and backend["prealloc"]
    goes_by_transfer(host, guest, rebuilt_qemu)


def test_where_memory_is_short_one_guest_goes_after_another(start, host, huge_pages):
    pool = pathlib.Path("/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages")
    pool.write_text("104\n", encoding="ascii")  # for three guests, where there are two
    guests = []
    for name in ("first", "second"):
        backend = f"memory-backend-file,id=ram0,size=64M,mem-path={huge_pages},prealloc=on"
        guests.append(start(name, memory=None, machine="q35,memory-backend=ram0", more=["-object", backend]))
    run = live_update(qemu(NEW_SUITE), host.state, ["first", "second"])
    assert run.returncode == 0, run.stdout
    assert "The guest waits until others are done: its new QEMU needs 64 MiB" in run.stdout
    for guest in guests:
        assert host.record(guest)["mode"] == "precopy" and guest.version().startswith("11.1.")
        goes_on(guest)


def test_a_guest_that_changes_its_memory_too_fast_stays_where_it_is(start, host):
    guest = start("busy", suite=OLDEST_SUITE, memory=None, busy=True)
    slow = {"max-bandwidth": 1 << 20, "downtime-limit": 1}
    host.until("setup", guest, parameters=slow)
    (outcome,) = host.resume(guest, copy_timeout=5.0)
    assert outcome.error.code == "not-converging"
    assert "MiB were left" in outcome.error.message and "auto-converge" in outcome.error.hint
    assert host.record(guest)["phase"] == "rolled-back" and host.record(guest)["copied"]["passes"] > 1
    goes_on(guest)
    assert guest.version() == "7.2.22"
    with guest.qmp() as monitor:
        assert monitor.execute("query-migrate-parameters")["downtime-limit"] == 300


def pages_of_busy(guest):
    """What stands in each page that busy_sector.S changes."""
    image = guest.directory / "memory"
    with guest.qmp() as monitor:
        monitor.execute("stop")
        monitor.execute("pmemsave", val=0x10000, size=0x80000, filename=str(image))
        monitor.execute("cont")
    return [int.from_bytes(image.read_bytes()[page : page + 4], "little") for page in range(0, 0x80000, 0x1000)]


def test_a_busy_guest_is_copied_and_slowed_down_where_its_owner_allows_it(start, host, rebuilt_qemu):
    guest = start("busy", suite=OLDEST_SUITE, memory=None, busy=True)
    outcome = host.until("resume", guest, capabilities={"auto-converge": True})
    assert outcome.update.capabilities["auto-converge"] and outcome.update.copied["passes"] > 1
    goes_on(guest)
    # It counts in one page after the other: one that was copied too early would lag behind.
    counters = pages_of_busy(guest)
    assert max(counters) - min(counters) <= 1 and counters[0] > 0
    with guest.qmp() as monitor:
        assert monitor.execute("query-migrate-parameters")["downtime-limit"] == 300
    goes_by_transfer(host, guest, rebuilt_qemu)


def test_the_ram_of_a_guest_without_kvm_is_copied_only_if_its_owner_says_so(start, host):
    """QEMU's own copy loses some of what a busy guest under TCG writes meanwhile."""
    guest = start("emulated", suite=OLDEST_SUITE, memory=None, accelerator="tcg")
    for mode in ("auto", "precopy"):
        (outcome,) = host.launch(guest, mode=mode)
        assert outcome.error.code == "tcg-precopy"
    run = live_update(qemu(NEW_SUITE), host.state, ["emulated"], accept_differences=["tcg-precopy"])
    assert run.returncode == 0, run.stdout
    assert host.record(guest)["mode"] == "precopy"
    goes_on(guest)


def test_who_does_not_want_a_copy_gets_none(start, host):
    guest = start("private", memory=None)
    (outcome,) = host.launch(guest, adopt=False)
    assert outcome.error.code == "memory-not-shared"
    goes_on(guest)


@pytest.mark.parametrize("mode", ["cpr-reboot", "precopy"])
@pytest.mark.parametrize("suites", [(OLD_SUITE, NEW_SUITE), (NEW_SUITE, OLD_SUITE)], ids=["forth", "back"])
def test_there_and_back_again(start, host, mode, suites):
    guest = start("there", suite=suites[0], machine="pc-q35-10.0")
    outcome = host.until("resume", guest, qemu_binary=qemu(suites[1]), mode=mode)
    assert outcome.update.mode == mode and outcome.update.pause_ms > 0
    goes_on(guest)
    host.until("resume", guest, qemu_binary=qemu(suites[0]), mode=mode)
    goes_on(guest)


def test_the_way_back_is_found_by_itself(start, host):
    guest = start("back", suite=NEW_SUITE, machine="pc-q35-7.2")
    (refused,) = host.launch(guest, qemu_binary=qemu(OLDEST_SUITE), mode="cpr-transfer")
    assert refused.error.code == "older-qemu" and "precopy" in refused.error.hint
    outcome = host.until("resume", guest, qemu_binary=qemu(OLDEST_SUITE))
    assert outcome.update.mode == "precopy" and "older-qemu" in outcome.update.mode_reason
    goes_on(guest)
    assert guest.version() == "7.2.22"


def in_a_file(directory):
    return ("-object", f"memory-backend-file,id=ram0,size=64M,mem-path={directory}/ram,share=on")


def test_ram_in_a_file_stays_there_on_the_way_back(start, host, tmp_path):
    guest = start("file", suite=NEW_SUITE, machine="pc-q35-10.0", memory=in_a_file(tmp_path))
    outcome = host.until("resume", guest, qemu_binary=qemu(OLD_SUITE))
    assert outcome.update.mode == "cpr-reboot" and "file" in outcome.update.mode_reason
    assert outcome.update.capabilities["x-ignore-shared"]
    goes_on(guest)


def test_ram_that_qemu_would_empty_is_copied_instead(start, host, tmp_path):
    """With cpr-transfer the old QEMU wiped the guest's RAM when it ended: the guest was lost."""
    backend = in_a_file(tmp_path)
    guest = start("emptied", memory=(backend[0], f"{backend[1]},discard-data=on"))
    (refused,) = host.launch(guest, mode="cpr-transfer")
    assert refused.error.code == "memory-discarded"
    assert host.until("resume", guest).update.mode == "precopy"
    goes_on(guest)


@pytest.mark.parametrize(("how", "mode"), [("directory", "auto"), ("removed", "cpr-reboot"), ("replaced", "auto")])
def test_ram_in_a_file_that_another_qemu_would_not_find_goes_along(start, host, tmp_path, how, mode):
    """QEMU counts it as RAM that stays in place: the guest went on with empty RAM."""
    place = tmp_path if how == "directory" else tmp_path / "ram"
    backend = f"memory-backend-file,id=ram0,size=256M,mem-path={place},share=on"
    more = ["-object", backend, "-machine", "memory-backend=ram0"]
    guest = start("nameless", linux=True, shared=False, more=more)
    if how != "directory":
        place.unlink()
    if how == "replaced":
        place.write_bytes(b"")
    outcome = host.until("resume", guest, mode=mode)
    assert outcome.update.mode == ("precopy" if mode == "auto" else mode)
    assert not outcome.update.capabilities.get("x-ignore-shared")
    goes_on(guest)


@pytest.mark.parametrize("victim", ["old", "new"])
def test_a_switch_by_file_that_loses_an_end_leaves_the_guest_or_says_that_it_is_down(start, host, victim):
    guest = start("hurt", machine="pc-q35-10.0")
    host.until("setup", guest, mode="cpr-reboot")
    os.kill(host.record(guest)[victim]["pid"], signal.SIGKILL)
    (outcome,) = host.resume(guest)
    if victim == "new":
        assert outcome.error.code == "new-qemu-exited"
        goes_on(guest)
    else:
        assert outcome.error.code == "old-qemu-gone"
        (rolled_back,) = host.rollback(guest)
        assert guest.pids() == [] and rolled_back.error.code == "old-qemu-gone"


def test_the_process_becomes_the_new_qemu(start, host, rebuilt_qemu):
    guest = start("same", suite=NEW_SUITE, more=["-pidfile", "{dir}/pid", "-vnc", "unix:{dir}/vnc.sock"])
    pid = guest.pid()
    os.chmod(guest.monitor, 0o660)
    os.chown(guest.monitor, 0, 4)
    outcome = host.until("resume", guest, qemu_binary=rebuilt_qemu, mode="cpr-exec")
    assert outcome.update.mode == "cpr-exec" and outcome.update.pause_ms > 0
    assert guest.pid() == pid and os.readlink(f"/proc/{pid}/exe") == rebuilt_qemu
    goes_on(guest)
    status = os.stat(guest.monitor)
    assert (status.st_mode & 0o777, status.st_gid) == (0o660, 4)
    assert (guest.directory / "pid").read_text(encoding="ascii").strip() == str(pid)
    # And once more, back to the first one: nothing of the first time is in the way.
    host.until("resume", guest, qemu_binary=qemu(NEW_SUITE), mode="cpr-exec")
    assert guest.pid() == pid
    goes_on(guest)


def test_a_guest_that_went_down_after_exec_is_told_of_once(start, host, rebuilt_qemu):
    guest = start("down", suite=NEW_SUITE)
    host.until("resume", guest, qemu_binary=rebuilt_qemu, mode="cpr-exec")
    with host.changed_record(guest) as record:
        record["phase"] = "switched"  # the run died before it had looked at the guest
    guest.kill()
    guest.start(qemu(NEW_SUITE))
    (outcome,) = host.launch(guest, qemu_binary=rebuilt_qemu)
    assert outcome.error.code == "new-qemu-gone"
    outcome = host.until("resume", guest, qemu_binary=rebuilt_qemu)
    assert outcome.update.phase == "finished"
    guest.wait_for_ticks()


@pytest.mark.parametrize("change", ["memory", "binary"])
def test_what_is_looked_at_once_more_before_exec(start, host, rebuilt_qemu, change):
    guest = start("changed", suite=NEW_SUITE, more=["-m", "64M,slots=1,maxmem=1G"])
    host.until("setup", guest, qemu_binary=rebuilt_qemu, mode="cpr-exec")
    if change == "memory":
        with guest.qmp() as monitor:
            monitor.execute("object-add", **{"qom-type": "memory-backend-ram", "id": "more", "size": 64 << 20})
    else:
        copy = shutil.copy2(rebuilt_qemu, f"{rebuilt_qemu}.new")
        os.rename(copy, rebuilt_qemu)
    (outcome,) = host.resume(guest)
    assert outcome.error.code == "guest-changed", str(outcome.error)
    assert {"memory": "its memory", "binary": rebuilt_qemu}[change] in outcome.error.message
    goes_on(guest)


def test_a_paused_guest_stays_paused_when_its_process_becomes_the_new_qemu(start, host, rebuilt_qemu):
    guest = start("paused", suite=NEW_SUITE)
    with guest.qmp() as monitor:
        monitor.execute("stop")
    outcome = host.until("resume", guest, qemu_binary=rebuilt_qemu, mode="cpr-exec")
    assert outcome.update.pause_ms is None and guest.status() == "paused"
    with guest.qmp() as monitor:
        monitor.execute("cont")
    goes_on(guest)


def test_what_the_new_qemu_does_not_take_is_known_before_exec(start, host, rebuilt_qemu, tmp_path):
    firmware = tmp_path / "bios.bin"
    firmware.write_bytes((pathlib.Path(qemu(NEW_SUITE)).parent / "../share/seabios/bios-256k.bin").read_bytes())
    guest = start("refused", suite=NEW_SUITE, more=["-bios", str(firmware)])
    firmware.unlink()
    (outcome,) = host.launch(guest, qemu_binary=rebuilt_qemu, mode="cpr-exec")
    assert outcome.error.code == "new-qemu-exited" and "bios.bin" in outcome.error.message
    goes_on(guest)


def test_a_program_that_starts_the_new_qemu_is_no_binary_for_exec(start, host, rebuilt_qemu, tmp_path):
    guest = start("wrapped", suite=NEW_SUITE)
    wrapper = tmp_path / "qemu-system-x86_64"
    wrapper.write_text(f'#!/bin/sh\nexec {rebuilt_qemu} "$@"\n')
    wrapper.chmod(0o755)
    (outcome,) = host.launch(guest, qemu_binary=str(wrapper), mode="cpr-exec")
    assert outcome.error.code == "exec-wrapper"
    goes_on(guest)


def test_a_guest_that_was_changed_since_its_rehearsal_does_not_go_by_exec(start, host, rebuilt_qemu):
    guest = start("changed", suite=NEW_SUITE, more=["-device", "qemu-xhci,id=usb"])
    host.until("setup", guest, qemu_binary=rebuilt_qemu, mode="cpr-exec")
    with guest.qmp() as monitor:
        monitor.execute("device_add", driver="usb-mouse", id="mouse", bus="usb.0")
    (outcome,) = host.resume(guest)
    assert outcome.error.code == "guest-changed" and "its devices" in outcome.error.message
    goes_on(guest)
    host.rollback(guest)
    host.until("resume", guest, qemu_binary=rebuilt_qemu, mode="cpr-exec")
    goes_on(guest)


SHARED = ("-object", "memory-backend-memfd,id=ram0,size=64M,share=on")


@pytest.fixture(name="tap")
def fixture_tap():
    """A tap in a bridge, as a guest has it that is taken over otherwise."""
    bridge = Bridge()
    yield bridge.tap("cprexec0")
    bridge.delete()


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"more": ["-sandbox", "on,spawn=deny"]}, "sandbox-denies-exec"),
        ({"memory": None}, "memory-not-shared"),
        ({"suite": OLD_SUITE}, "mode-missing"),
        ({"memory": None, "more": [*SHARED, "-machine", "memory-backend=ram0"]}, "aux-ram-not-shared"),
        (
            {"more": ["-netdev", "tap,id=t,ifname=cprexec0,script=no,downscript=no", "-device", "e1000,netdev=t"]},
            "exec-keeps-descriptors",
        ),
    ],
    ids=lambda item: str(item)[:40],
)
def test_a_guest_that_would_be_lost_by_exec_is_refused(start, host, rebuilt_qemu, tap, options, code):
    guest = start("trap", **{"suite": NEW_SUITE, **options})
    (outcome,) = host.launch(guest, qemu_binary=rebuilt_qemu, mode="cpr-exec")
    assert outcome.error.code == code
    goes_on(guest)


def test_an_exec_that_fails_leaves_the_guest_where_it_is(start, host, rebuilt_qemu, monkeypatch):
    guest = start("failing", suite=NEW_SUITE)
    host.until("setup", guest, qemu_binary=rebuilt_qemu, mode="cpr-exec")

    async def looks_away(*dummy):
        """Else it would be noticed before: the file goes in the very last moment."""

    monkeypatch.setattr(preflight, "check_rehearsed", looks_away)
    os.rename(rebuilt_qemu, f"{rebuilt_qemu}.away")
    try:
        (outcome,) = host.resume(guest)
    finally:
        os.rename(f"{rebuilt_qemu}.away", rebuilt_qemu)
    assert outcome.error.code == "exec-failed" and "back on the old QEMU" in outcome.error.message
    goes_on(guest)
    assert host.record(guest)["phase"] == "rolled-back"
    with guest.qmp() as monitor:
        assert monitor.execute("query-migrate-parameters")["mode"] == "normal"


def test_an_exec_whose_task_dies_is_finished_by_the_next_run(start, host, rebuilt_qemu):
    guest = start("died", suite=NEW_SUITE)
    host.until("setup", guest, qemu_binary=rebuilt_qemu, mode="cpr-exec")
    with host.changed_record(guest) as record:
        record["phase"] = "switching"
    with guest.qmp() as monitor:
        monitor.execute("migrate", uri=f"file:{host.state}/{guest.name}/{record['generation']}/state")
    (outcome,) = host.resume(guest)
    assert outcome.error is None and outcome.update.phase == "finished"
    goes_on(guest)
