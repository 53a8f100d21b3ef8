# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Guests whose state goes to a file, and that go on from it."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import pathlib
import random
import shutil
import signal
import time

import pytest

from ansible_collections.vmfleet.cpr.plugins.module_utils import journal, systemd
from ansible_collections.vmfleet.cpr.plugins.module_utils.phases import checkpoint
from tests.guests.ansible import HYPERVISOR_PYTHON, playbook
from tests.guests.guest import NEW_SUITE, OLD_SUITE, Guest, is_alive, qemu, wait_until


def goes_on(guest: Guest) -> None:
    """The guest counts on, in one process, and never noticed anything."""
    guest.wait_for_ticks()
    guest.check_continuity()
    guest.pid()


def done(outcomes):
    """The one outcome, which is no failure."""
    (outcome,) = outcomes
    assert outcome.error is None, str(outcome.error)
    return outcome


@pytest.mark.parametrize("suites", [(OLD_SUITE, None), (OLD_SUITE, NEW_SUITE), (NEW_SUITE, OLD_SUITE)], ids=str)
def test_a_guest_goes_on_from_its_file_in_any_qemu(start, host, suites):
    guest = start("away", suite=suites[0], machine="pc-q35-10.0", more=["-vnc", "unix:{dir}/vnc.sock"])
    os.chmod(guest.monitor, 0o660)
    outcome = done(host.checkpoint(guest))
    assert outcome.update.phase == "checkpointed" and outcome.update.checkpoint["size"] > 0
    assert guest.pids() == []
    assert done(host.checkpoint(guest)).changed is False
    outcome = done(host.restore(guest, qemu_binary=qemu(suites[1]) if suites[1] else None))
    assert outcome.update.phase == "restored" and outcome.update.pause_ms > 0
    goes_on(guest)
    assert not pathlib.Path(outcome.update.channels).exists()
    assert os.stat(guest.monitor).st_mode & 0o777 == 0o660


def test_a_linux_guest_with_plain_memory(start, host):
    guest = start("penguin", linux=True, shared=False)
    done(host.checkpoint(guest))
    done(host.restore(guest))
    goes_on(guest)


def started_at(guest):
    """When its process was started, in clock ticks."""
    stat = pathlib.Path(f"/proc/{guest.pid()}/stat").read_text(encoding="utf-8")
    return int(stat.rpartition(")")[2].split()[19])


def test_all_guests_are_restored_in_the_order_in_which_they_were_started(start, host):
    guests = [start(name) for name in ("zebra", "ant")]
    assert [item.error for item in host.checkpoint(*guests)] == [None, None]
    assert [item.error for item in host.restore(concurrency=1)] == [None, None]
    assert started_at(guests[0]) < started_at(guests[1])
    for guest in guests:
        goes_on(guest)


def test_a_paused_guest_stays_paused(start, host):
    guest = start("paused")
    with guest.qmp() as monitor:
        monitor.execute("stop")
    done(host.checkpoint(guest))
    done(host.restore(guest))
    assert guest.status() == "paused"
    with guest.qmp() as monitor:
        monitor.execute("cont")
    goes_on(guest)


def in_a_file(path):
    """For a Linux guest, which uses all of it: a boot sector would not notice what is missing."""
    backend = f"memory-backend-file,id=ram0,size=256M,mem-path={path},share=on"
    return ["-object", backend, "-machine", "memory-backend=ram0"]


def test_ram_in_a_file_on_a_disk_stays_there(start, host, tmp_path):
    guest = start("file", linux=True, shared=False, more=in_a_file(tmp_path / "ram"))
    outcome = done(host.checkpoint(guest))
    assert outcome.update.checkpoint["memory_files"] == [f"{tmp_path}/ram"]
    assert outcome.update.checkpoint["size"] < 2 << 20
    done(host.restore(guest))
    goes_on(guest)


def test_ram_in_a_file_that_nobody_could_open_again_is_written(start, host, tmp_path):
    guest = start("nameless", linux=True, shared=False, more=in_a_file(tmp_path))  # QEMU makes one without a name there
    outcome = done(host.checkpoint(guest))
    assert outcome.update.checkpoint["memory_files"] == [] and outcome.update.checkpoint["size"] > 16 << 20
    done(host.restore(guest))
    goes_on(guest)


def test_a_port_and_a_forwarded_port_that_were_handed_over_before_are_there_again(
    start, host, rebuilt_qemu, free_ports
):
    console, forward = free_ports
    more = [
        "-chardev",
        f"socket,id=c,host=127.0.0.1,port={console},server=on,wait=off",
        "-device",
        "isa-serial,chardev=c",
    ]
    more += ["-netdev", f"user,id=n,hostfwd=tcp:127.0.0.1:{forward}-:22", "-device", "e1000,netdev=n"]
    guest = start("ports", suite=NEW_SUITE, more=more)
    host.until("resume", guest, qemu_binary=rebuilt_qemu)
    done(host.checkpoint(guest))
    done(host.restore(guest))
    goes_on(guest)
    for port in free_ports:
        assert any(f":{port:04X} " in line for line in listening(guest.pid()))


def listening(pid):
    return pathlib.Path(f"/proc/{pid}/net/tcp").read_text(encoding="ascii").splitlines()


def test_nothing_is_written_where_there_is_no_room(start, host, small_place):
    guest = start("big")
    (outcome,) = host.checkpoint(guest, state_directory=str(small_place))
    assert outcome.error.code == "disk-short"
    goes_on(guest)


def test_a_disk_that_fills_up_leaves_the_guest_running(start, host, small_place, monkeypatch):
    from ansible_collections.vmfleet.cpr.plugins.module_utils import resources

    monkeypatch.setattr(resources, "disk_blockers", lambda *dummy: [])
    guest = start("full", linux=True)
    (outcome,) = host.checkpoint(guest, state_directory=str(small_place))
    assert outcome.error.code == "write-failed" and "runs on" in outcome.error.message
    goes_on(guest)
    assert not (small_place / "full" / "0").exists()


def test_a_damaged_checkpoint_is_not_loaded(start, host):
    guest = start("damaged")
    update = done(host.checkpoint(guest)).update
    state = pathlib.Path(update.state_file)
    whole = state.read_bytes()
    state.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    (outcome,) = host.restore(guest)
    assert outcome.error.code == "checkpoint-damaged" and guest.pids() == []
    state.write_bytes(whole)
    done(host.restore(guest))
    goes_on(guest)


def test_a_guest_that_was_started_anew_is_not_overrun(start, host):
    guest = start("anew")
    done(host.checkpoint(guest))
    guest.start(qemu(OLD_SUITE))
    (outcome,) = host.restore(guest)
    assert outcome.error.code == "guest-running"
    (outcome,) = host.checkpoint(guest)
    assert outcome.error.code == "checkpoint-exists"
    assert is_alive(guest.pid())


def test_a_qemu_that_can_not_load_it_leaves_the_checkpoint(start, host, tmp_path):
    guest = start("wrong", suite=NEW_SUITE, machine="pc-q35-11.1")
    done(host.checkpoint(guest))
    (outcome,) = host.restore(guest, qemu_binary=qemu(OLD_SUITE))
    assert outcome.error.code == "machine-type-missing"
    broken = tmp_path / "qemu-system-x86_64"
    broken.write_text(
        f'#!/bin/sh\ncase "$*" in *none,accel*) exec {qemu(NEW_SUITE)} "$@";; esac\necho no such thing >&2; exit 1\n'
    )
    broken.chmod(0o755)
    (outcome,) = host.restore(guest, qemu_binary=str(broken))
    assert outcome.error.code == "new-qemu-exited" and guest.pids() == []
    assert host.record(guest)["phase"] == "checkpointed"
    done(host.restore(guest))
    goes_on(guest)


def test_without_a_checkpoint_there_is_nothing_to_restore(start, host):
    assert host.restore() == []
    with pytest.raises(Exception) as error:
        host.restore("nobody")
    assert error.value.code == "checkpoint-missing"


@pytest.fixture(name="occupied")
def fixture_occupied(start):
    """Another guest takes a disk as soon as nobody has it locked, and gives it back."""

    def occupy(guest):
        disk = f"file={guest.directory}/disk.img,format=raw,if=none,id=theirs"
        return start("occupant", more=["-drive", disk, "-device", "ide-hd,drive=theirs,bus=ide.1"])

    return occupy


def test_a_guest_that_is_not_let_go_on_keeps_its_checkpoint(start, host, occupied):
    guest = start("waiting")
    done(host.checkpoint(guest))
    occupant = occupied(guest)
    (outcome,) = host.restore(guest)
    assert outcome.error.code == "qmp-error" and "lock" in outcome.error.message
    assert host.record(guest)["phase"] == "checkpointed" and guest.pids() == []
    occupant.kill()
    done(host.restore(guest))
    goes_on(guest)


def test_disks_that_were_written_to_meanwhile_are_not_put_under_an_old_state(start, host):
    """Its owner started it from its disk, and shut it down again."""
    guest = start("moved")
    done(host.checkpoint(guest))
    os.utime(guest.directory / "disk.img", (time.time() + 60,) * 2)
    (outcome,) = host.restore(guest)
    assert outcome.error.code == "disks-changed" and str(guest.directory / "disk.img") in outcome.error.message
    assert guest.pids() == [] and host.record(guest)["phase"] == "checkpointed"
    done(host.restore(guest, accept_differences=["disks-changed"]))
    goes_on(guest)


def test_ram_in_another_file_of_that_name_is_not_taken_for_the_guests(start, host, tmp_path):
    """As where its place is emptied at boot, and a service's QEMU makes the file anew."""
    guest = start("emptied", linux=True, shared=False, more=in_a_file(tmp_path / "ram"))
    done(host.checkpoint(guest))
    os.rename(tmp_path / "ram", tmp_path / "away")
    with open(tmp_path / "ram", "wb") as stream:
        stream.truncate(256 << 20)
    (outcome,) = host.restore(guest)
    assert outcome.error.code == "checkpoint-damaged" and guest.pids() == []
    os.rename(tmp_path / "away", tmp_path / "ram")
    done(host.restore(guest))
    goes_on(guest)


def test_a_record_that_can_not_be_read_keeps_no_other_guest_down(start, host):
    guest = start("well")
    done(host.checkpoint(guest))
    (host.state / "torn").mkdir()
    (host.state / "torn" / "update.json").write_text("{", encoding="utf-8")
    by_name = {outcome.guest: outcome for outcome in host.restore()}
    assert by_name["torn"].error.code == "record-unreadable" and by_name["well"].error is None
    goes_on(guest)


def test_nobody_is_restored_on_a_host_that_goes_down(start, host, monkeypatch):
    async def stopping():
        return True

    guest = start("late")
    done(host.checkpoint(guest))
    with monkeypatch.context() as patch:
        patch.setattr(systemd, "is_stopping", stopping)
        with pytest.raises(Exception) as error:
            host.restore()
        assert error.value.code == "host-stopping"
    done(host.restore(guest))
    goes_on(guest)


def test_another_task_s_checkpoint_is_not_written_over(start, host, monkeypatch):
    """It was checked long before its turn came, and another task was faster."""
    guests = [start("first"), start("second")]
    real = checkpoint.checkpoint

    async def meanwhile(update, timeout, write_timeout):
        monkeypatch.setattr(checkpoint, "checkpoint", real)
        done(await asyncio.to_thread(host.checkpoint, "second"))
        await real(update, timeout=timeout, write_timeout=write_timeout)

    monkeypatch.setattr(checkpoint, "checkpoint", meanwhile)
    outcomes = host.checkpoint("first", "second", concurrency=1)
    assert [outcome.error and outcome.error.code for outcome in outcomes] == [None, "update-under-way"]
    assert [outcome.error for outcome in host.restore()] == [None, None]
    for guest in guests:
        goes_on(guest)


def test_what_was_plugged_in_while_others_were_written_goes_along(start, host, monkeypatch):
    guest = start("plugged", more=["-device", "qemu-xhci,id=usb"])
    start("before")
    real = checkpoint.checkpoint

    async def meanwhile(update, timeout, write_timeout):
        if update.guest == "before":
            with guest.qmp() as monitor:
                monitor.execute("device_add", driver="usb-mouse", id="mouse", bus="usb.0")
        await real(update, timeout=timeout, write_timeout=write_timeout)

    monkeypatch.setattr(checkpoint, "checkpoint", meanwhile)
    assert [outcome.error for outcome in host.checkpoint("before", "plugged", concurrency=1)] == [None, None]
    assert [outcome.error for outcome in host.restore()] == [None, None]
    goes_on(guest)


@pytest.mark.parametrize(
    ("suite", "binary", "code"),
    [
        (OLD_SUITE, qemu("bookworm"), "machine-type-missing"),
        ("trixie", qemu(NEW_SUITE), "queues-differ"),
        (OLD_SUITE, "/bin/true", "binary-not-qemu"),
    ],
    ids=["oldest", "other-queues", "no-qemu"],
)
def test_the_qemu_that_is_to_have_a_guest_is_tried_before_it_stops(start, host, suite, binary, code):
    guest = start("tried", suite=suite, machine="pc-q35-10.0", more=["-device", "virtio-rng-pci"])
    (outcome,) = host.checkpoint(guest, qemu_binary=binary)
    assert outcome.error.code == code
    goes_on(guest)


def test_a_qemu_whose_file_was_replaced_under_it_is_known_by_what_lies_there_now(start, host, tmp_path):
    """As after an upgrade of its package: the guest would go on in that."""
    directory = pathlib.Path(qemu(OLD_SUITE)).parent
    copy = directory / f"qemu-system-x86_64-{tmp_path.name}-rebuilt"
    shutil.copy2(qemu(OLD_SUITE), copy)
    try:
        guest = start("upgraded", binary=str(copy), machine="pc-q35-10.0")
        copy.unlink()
        (outcome,) = host.checkpoint(guest)
        assert outcome.error.code == "binary-missing"
        goes_on(guest)
        copy.symlink_to(qemu(NEW_SUITE))
        assert done(host.checkpoint(guest)).update.checkpoint["version"].startswith("11.1.")
        assert done(host.restore(guest)).update.new.version.startswith("11.1.")
        goes_on(guest)
        assert guest.version().startswith("11.1.")
    finally:
        copy.unlink(missing_ok=True)


# A run that dies at each step of a checkpoint, and of its restoration.


def is_free(lock):
    """Whether nobody holds this lock."""
    with open(lock, encoding="utf-8") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def dies_at(host, monkeypatch, phase, work):
    """Run it in a child that is killed when it has recorded this phase; the record is then on disk."""
    child = os.fork()
    if child == 0:
        enter = journal.Update.enter

        def enter_and_die(update, name, message=None):
            enter(update, name, message)
            if name == phase:
                os.kill(os.getpid(), signal.SIGKILL)

        journal.Update.enter = enter_and_die
        try:
            work()
        finally:
            os._exit(1)
    dummy, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), "it ended before that phase"
    # A QEMU that it was about to start has its locks until it notices that nobody starts it any more.
    for lock in host.state.glob("*/lock"):
        wait_until(lambda lock=lock: is_free(lock), "the lock is free")
    time.sleep(0.1)


def killed_after(seconds, work):
    """Run it in a child that is killed by then, wherever it is."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


@pytest.mark.parametrize("seed", range(2))
def test_a_run_that_is_killed_at_any_instant_leaves_all_of_the_guest(start, host, seed):
    guest = start("any")
    chance = random.Random(seed)
    phases = set()

    def there_and_back():
        host.checkpoint(guest)
        host.restore(guest)

    for dummy in range(12):
        killed_after(chance.uniform(0, 1.0), there_and_back)
        for lock in host.state.glob("*/lock"):
            wait_until(lambda lock=lock: is_free(lock), "the lock is free")
        record = host.state / "any" / "update.json"
        phases.add(json.loads(record.read_text())["phase"] if record.exists() else None)
        for outcome in host.restore():
            assert outcome.error is None, str(outcome.error)
        goes_on(guest)
    assert len(phases) > 2, phases  # else it was killed at the same instant again and again


@pytest.mark.parametrize("phase", ["checkpointing", "checkpointed"])
def test_a_checkpoint_whose_run_dies_is_undone_by_the_next(start, host, monkeypatch, phase):
    guest = start("died")
    dies_at(host, monkeypatch, phase, lambda: host.checkpoint(guest))
    assert len(guest.pids()) == 1
    done(host.restore(guest))
    goes_on(guest)
    done(host.checkpoint(guest))
    done(host.restore(guest))
    goes_on(guest)


@pytest.mark.parametrize("phase", ["checkpointing", "checkpointed"])
def test_a_checkpoint_whose_run_dies_is_completed_by_the_same_again(start, host, monkeypatch, phase):
    guest = start("died")
    dies_at(host, monkeypatch, phase, lambda: host.checkpoint(guest))
    done(host.checkpoint(guest))
    assert guest.pids() == []
    done(host.restore(guest))
    goes_on(guest)


def test_a_qemu_is_not_ended_for_a_checkpoint_without_a_file(start, host, monkeypatch):
    """A run died while it undid the checkpoint: that QEMU is all that there is of the guest."""
    guest = start("died")
    dies_at(host, monkeypatch, "checkpointed", lambda: host.checkpoint(guest))
    pathlib.Path(host.state / "died" / "0" / "state").unlink()
    assert done(host.checkpoint(guest)).update.checkpoint["size"] > 0
    done(host.restore(guest))
    goes_on(guest)


def test_a_checkpoint_that_can_not_be_undone_stays_complete(start, host, monkeypatch, occupied):
    guest = start("died")
    dies_at(host, monkeypatch, "checkpointed", lambda: host.checkpoint(guest))
    occupant = occupied(guest)
    (outcome,) = host.restore(guest)
    assert outcome.error.code == "qmp-error" and host.record(guest)["phase"] == "checkpointed"
    occupant.kill()
    guest.kill()  # all that there is of it is in its file now
    done(host.restore(guest))
    goes_on(guest)


def test_what_was_finished_is_not_said_to_be_untouched(start, host, monkeypatch):
    died, blocked = start("died"), start("blocked", more=["-snapshot"])
    dies_at(host, monkeypatch, "checkpointed", lambda: host.checkpoint(died))
    by_name = {outcome.guest: outcome for outcome in host.checkpoint(died, blocked)}
    assert by_name["blocked"].error.code == "unsupported-option"
    assert by_name["died"].changed and by_name["died"].message == checkpoint.WAITS
    done(host.restore(died))
    goes_on(died)


def test_a_guest_that_somebody_let_go_on_is_written_anew(start, host, monkeypatch):
    guest = start("continued")
    dies_at(host, monkeypatch, "checkpointed", lambda: host.checkpoint(guest))
    first = host.record(guest)["checkpoint"]["sha256"]
    with guest.qmp() as monitor:
        monitor.execute("cont")
    guest.wait_for_ticks(20)
    assert done(host.checkpoint(guest)).update.checkpoint["sha256"] != first
    done(host.restore(guest))
    goes_on(guest)


@pytest.mark.parametrize("phase", ["restoring", "resuming", "restored"])
def test_a_restoration_whose_run_dies_is_finished_by_the_next(start, host, monkeypatch, phase):
    guest = start("died")
    done(host.checkpoint(guest))
    dies_at(host, monkeypatch, phase, lambda: host.restore(guest))
    if phase != "restored":  # it goes only once the guest is seen to run
        assert (host.state / "died" / "0" / "state").exists()
    if phase != "restored":
        done(host.restore(guest))
    goes_on(guest)
    assert host.record(guest)["phase"] == "restored"


def test_a_guest_that_may_have_run_is_never_restored_from_the_same_file_again(start, host, monkeypatch):
    guest = start("ran")
    done(host.checkpoint(guest))
    dies_at(host, monkeypatch, "resuming", lambda: host.restore(guest))
    guest.kill()
    (outcome,) = host.restore(guest)
    assert outcome.error.code == "state-unclear" and guest.pids() == []


def test_a_qemu_that_is_killed_while_it_writes_is_told(start, host, monkeypatch):
    guest = start("killed")
    dies_at(host, monkeypatch, "checkpointing", lambda: host.checkpoint(guest))
    guest.kill()
    (outcome,) = host.restore(guest)
    assert outcome.error.code == "checkpoint-incomplete"


@pytest.fixture(name="rebooted")
def fixture_rebooted(start, host):
    """A guest in files since before a reboot of the host, as its record says."""
    guest = start("rebooted")
    done(host.checkpoint(guest))
    with host.changed_record(guest) as record:
        record["checkpoint"]["boot_id"] = "of the boot before"
    return guest


def test_after_a_reboot_nobody_is_taken_for_the_guests_qemu(start, host, rebooted):
    """A pid with its start time may be somebody else's after a reboot, however unlikely."""
    bystander = start("bystander")
    fields = pathlib.Path(f"/proc/{bystander.pid()}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    with host.changed_record(rebooted) as record:
        record["phase"] = "restoring"
        record["new"] = {**record["old"], "pid": bystander.pid(), "start_time": int(fields[19])}
    (outcome,) = host.restore(rebooted)
    assert outcome.error is None and outcome.as_dict()["host_rebooted"]
    goes_on(rebooted)
    goes_on(bystander)


def test_a_host_that_has_rebooted_already_is_not_rebooted_again(host, rebooted):
    """Whoever began it died while the host was down. Here it could not be: its connection is local."""
    local = {"hypervisor": {"ansible_connection": "local", "ansible_python_interpreter": HYPERVISOR_PYTHON}}
    variables = {"host_reboot_checkpoint_directory": str(host.state), "host_reboot_guests": ["rebooted"]}
    run = playbook("host_reboot", local, variables)
    assert run.returncode == 0, run.stdout
    assert "rebooted. It is not rebooted again." in run.stdout
    goes_on(rebooted)
    run = playbook("host_reboot", local, variables)
    assert run.returncode != 0 and "The guests whose states were written go on." in run.stdout
    goes_on(rebooted)


def test_what_the_reboot_would_end_is_asked_for_before_anything_stops(start, host):
    local = {"hypervisor": {"ansible_connection": "local", "ansible_python_interpreter": HYPERVISOR_PYTHON}}
    variables = {"host_reboot_checkpoint_directory": str(host.state), "host_reboot_guests": ["named"]}
    named, other = start("named"), start("other")
    pid = named.pid()
    for words in (["--check"], ["-e", "host_reboot_end_others=false"]):
        run = playbook("host_reboot", local, variables, *words)
        assert run.returncode != 0 and "[guests-running]" in run.stdout and "written: other." in run.stdout
        assert named.pid() == pid
    run = playbook("host_reboot", local, variables, "-e", "host_reboot_end_others=true")
    # Then it is written, and goes on, since this machine can't be rebooted.
    assert run.returncode != 0 and "The guests whose states were written go on." in run.stdout
    assert named.pid() != pid
    for guest in (named, other):
        goes_on(guest)
