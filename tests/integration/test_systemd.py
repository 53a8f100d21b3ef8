# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Guests in systemd units, on a machine with a real systemd: the units never notice."""

from __future__ import annotations

import os
import pathlib
import shlex
import signal

import pytest

from tests.guests.ansible import live_update, module
from tests.guests.guest import NEW_SUITE, boot_sector_guest, qemu, wait_until
from tests.guests.machine import Machine

NOTIFYING = """\
import os, socket, sys
with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as connection:
    connection.connect(os.environ["NOTIFY_SOCKET"])
    connection.send(b"READY=1")
os.execv(sys.argv[1], sys.argv[1:])
"""
# The Type= and what else stands in the unit; {start} is QEMU's command line.
UNITS = {
    "simple": "Type=simple\nExecStart={start}",
    "exec-as-nobody": "Type=exec\nUser=nobody\nProtectHome=yes\nExecStart={start}",
    "forking": "Type=forking\nPIDFile={dir}/pid\nExecStart={start} -daemonize -pidfile {dir}/pid",
    "notify": "Type=notify\nExecStart=/usr/bin/python3 {dir}/notifying {start}",
}


@pytest.fixture(name="machine", scope="module")
def fixture_machine(tmp_path_factory):
    shared = tmp_path_factory.mktemp("machine")
    for parent in (shared, *shared.parents[:2]):
        parent.chmod(0o711)
    machine = Machine("systemd", shared)
    try:
        yield machine.start()
    finally:
        machine.stop()


def started(machine, name, text, binary=None):
    """A guest in a unit of its own."""
    guest = boot_sector_guest(name, machine.shared / name, machine="pc-q35-10.0", accelerator="tcg")
    (guest.directory / "notifying").write_text(NOTIFYING)
    for path in (guest.directory, guest.directory / "disk.img"):
        os.chown(path, 65534, 65534)
    # The QEMU of bookworm-backports does not run in a machine of another Debian.
    text = text.format(start=shlex.join([binary or qemu("trixie"), *guest.words]), dir=guest.directory)
    unit = f"[Service]\nRestart=always\nRestartSec=1\n{text}\n"
    path = pathlib.Path(f"/proc/{machine.leader}/root/run/systemd/system/{name}.service")
    path.write_text(unit)
    machine.run("systemctl", "daemon-reload")
    machine.run("systemctl", "start", f"{name}.service")
    wait_until(guest.monitor.exists, f"{name} has its monitor")
    guest.wait_for_ticks(3)
    return guest


def test_units_stay_active_and_follow_the_new_qemu(machine):
    state = machine.shared / "state"
    guests = {name: started(machine, name, text) for name, text in UNITS.items()}
    before = {name: machine.show(name) for name in guests}
    old = {name: guest.pid() for name, guest in guests.items()}

    for dummy in range(2):  # the second time everything is up to date
        run = live_update(qemu(NEW_SUITE), state, list(guests), python=machine.python())
        assert run.returncode == 0, run.stdout + run.stderr

    for name, guest in guests.items():
        guest.wait_for_ticks()
        guest.check_continuity()
        after = machine.show(name)
        assert (after["ActiveState"], after["SubState"], after["NRestarts"]) == ("active", "running", "0"), name
        assert after["MainPID"] != before[name]["MainPID"]
        assert machine.process(int(after["MainPID"])) == guest.pid() != old[name]
        assert after["ActiveEnterTimestamp"] == before[name]["ActiveEnterTimestamp"]
        cgroup = pathlib.Path(f"/proc/{guest.pid()}/cgroup").read_text()
        assert f"/{name}.service" in cgroup
        assert os.readlink(f"/proc/{guest.pid()}/exe") == qemu(NEW_SUITE)
    assert (guests["forking"].directory / "pid").read_text().strip() == machine.show("forking")["MainPID"]

    # systemd acts on the new QEMU: it sees it fail, restarts it, and stops it.
    os.kill(guests["simple"].pid(), signal.SIGKILL)
    wait_until(lambda: machine.show("simple")["NRestarts"] == "1", "systemd has restarted it")
    machine.run("systemctl", "restart", "notify.service")
    assert machine.show("notify")["ActiveState"] == "active"
    for name, guest in guests.items():
        machine.run("systemctl", "stop", f"{name}.service")
        wait_until(lambda guest=guest: not guest.pids(), f"{name} is gone")
        assert machine.show(name)["Result"] == "success"


def test_a_unit_whose_main_process_is_a_script_is_refused(machine):
    guest = started(machine, "scripted", 'Type=simple\nExecStart=/bin/sh -c "{start}; echo done"')
    before = guest.pids()
    run = live_update(qemu(NEW_SUITE), machine.shared / "state", ["scripted"], python=machine.python())
    assert run.returncode != 0
    assert "[systemd-unit]" in run.stdout
    assert "which may wait for it" in run.stdout
    assert guest.pids() == before
    guest.wait_for_ticks()
    machine.run("systemctl", "stop", "scripted.service")


def test_an_update_that_is_undone_leaves_the_unit_alone(machine):
    guest = started(machine, "undone", UNITS["simple"])
    before = machine.show("undone")
    run = live_update(
        qemu(NEW_SUITE), machine.shared / "state", ["undone"], "--check", "--diff", python=machine.python()
    )
    assert run.returncode == 0, run.stdout
    assert "+-incoming" in run.stdout
    assert "gets a drop-in" in run.stdout
    assert machine.show("undone")["NotifyAccess"] == "none"  # nothing was touched
    # No switch is that fast, so it is undone.
    run = live_update(
        qemu(NEW_SUITE), machine.shared / "state", ["undone"], python=machine.python(), pause_limit=0.0001
    )
    assert run.returncode != 0
    assert "[pause-limit]" in run.stdout
    after = machine.show("undone")
    for key in ("ActiveState", "MainPID", "NRestarts", "ActiveEnterTimestamp"):
        assert after[key] == before[key]
    guest.wait_for_ticks()
    guest.check_continuity()
    machine.run("systemctl", "stop", "undone.service")


def test_a_unit_keeps_its_main_process_where_that_becomes_the_new_qemu(machine, rebuilt_qemu):
    guest = started(machine, "same", UNITS["exec-as-nobody"], qemu(NEW_SUITE))
    before = machine.show("same")
    run = live_update(rebuilt_qemu, machine.shared / "state", ["same"], python=machine.python(), mode="cpr-exec")
    assert run.returncode == 0, run.stdout + run.stderr
    after = machine.show("same")
    for key in ("ActiveState", "MainPID", "NRestarts", "ActiveEnterTimestamp", "NotifyAccess"):
        assert after[key] == before[key]
    assert os.readlink(f"/proc/{guest.pid()}/exe") == rebuilt_qemu
    guest.wait_for_ticks()
    guest.check_continuity()
    machine.run("systemctl", "stop", "same.service")
    wait_until(lambda: not guest.pids(), "it is gone")


@pytest.mark.parametrize("kind", ["exec-as-nobody", "forking"])
def test_a_unit_with_a_checkpoint_starts_a_qemu_that_waits(machine, kind):
    """Whoever starts it, as the host's next boot does: the guest must not boot from its disk."""
    name = f"held-{kind}"
    guest = started(machine, name, UNITS[kind])
    arguments = {"guests": [name], "state_directory": str(machine.shared / "checkpoints")}
    heartbeat = {"heartbeat_command": f"test -e {guest.directory}/well", "heartbeat_timeout": 1}
    answer = module("guest_checkpoint", {**arguments, **heartbeat}, python=machine.python())
    assert answer["changed"], answer
    before = guest.ticks()
    machine.run("systemctl", "restart", f"{name}.service")  # Restart=always has done so too, maybe
    wait_until(guest.monitor.exists, "the QEMU that waits has its monitor")
    assert guest.status() == "inmigrate"
    machine.run("systemctl", "stop", f"{name}.service")
    answer = module("guest_restore", arguments, python=machine.python())
    assert answer["guests"][0]["error"]["code"] == "heartbeat-missing", answer
    # It runs, so what its service starts from now on is what its owner wrote.
    assert "vmfleet-cpr-held" not in machine.run("systemctl", "cat", f"{name}.service")
    (guest.directory / "well").touch()
    answer = module("guest_restore", arguments, python=machine.python())
    assert answer["guests"][0]["phase"] == "restored", answer
    guest.wait_for_ticks()
    guest.check_continuity()
    assert guest.ticks()[: len(before)] == before
    after = machine.show(name)
    assert after["ActiveState"] == "active" and machine.process(int(after["MainPID"])) == guest.pid()
    machine.run("systemctl", "stop", f"{name}.service")
    wait_until(lambda: not guest.pids(), "it is gone")
