# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A hypervisor that is rebooted under its guests: a virtual machine with a KVM of its own."""

from __future__ import annotations

import json
import shlex

import pytest

from tests.guests.ansible import playbook
from tests.guests.guest import NEW_SUITE, boot_sector_guest, linux_guest, qemu, wait_until
from tests.guests.virtual_machine import VirtualMachine

PLACE = "/var/lib/guests"
UNIT = "[Service]\nExecStart={start}\n[Install]\nWantedBy=multi-user.target\n"


@pytest.fixture(name="hypervisor")
def fixture_hypervisor(tmp_path):
    machine = VirtualMachine("hypervisor", tmp_path / "hypervisor")
    try:
        yield machine.start()
    finally:
        machine.kill()


class Remote:
    """A guest on that machine."""

    def __init__(self, machine, guest, directory):
        self.machine = machine
        self.name = guest.name
        self.directory = f"{PLACE}/{guest.name}"
        machine.run("mkdir", "-p", PLACE)
        machine.copy(directory, PLACE)
        self.words = [word.replace(str(directory), self.directory) for word in guest.words]

    def lines(self):
        """What it has said, whole lines only."""
        text = self.machine.run("cat", f"{self.directory}/console.log", check=False)
        return [line.strip("\r") for line in text.split("\n")[:-1]]

    def counts(self, more=5):
        """Wait until it has counted so much further."""
        before = len(self.lines())
        wait_until(lambda: len(self.lines()) >= before + more, f"{self.name} counts on", patience=240)

    def pids(self):
        """Its QEMUs."""
        return self.machine.run("pgrep", "-f", f"guest={self.name},", check=False).split()


@pytest.mark.timeout(2400)  # two boots of a machine whose KVM is emulated, and every task takes seconds
def test_a_guest_of_72_is_adopted_and_keeps_its_boot_id_over_the_reboot_of_its_host(hypervisor, tmp_path):
    """It is a service that is started at boot, with plain memory; another one was started by hand on 11.1, its RAM in a file."""
    linux = linux_guest("penguin", tmp_path / "penguin", shared=False)
    linux.words = [word.replace("accel=tcg", "accel=kvm") for word in linux.words]
    # Not under KVM: on an emulated SVM a guest in real mode was reset once while nobody touched it.
    in_a_file = ("-object", "memory-backend-file,id=ram0,size=64M,mem-path={dir}/ram,share=on")
    sector = boot_sector_guest("counter", tmp_path / "counter", accelerator="tcg", memory=in_a_file)
    penguin, counter = (Remote(hypervisor, guest, tmp_path / guest.name) for guest in (linux, sector))
    oldest, binary = qemu("bookworm"), qemu(NEW_SUITE)
    unit = tmp_path / "penguin.service"
    unit.write_text(UNIT.format(start=shlex.join([oldest, *penguin.words])), encoding="utf-8")
    hypervisor.copy(unit, "/etc/systemd/system/")
    hypervisor.run("systemctl", "daemon-reload")
    hypervisor.run("systemctl", "enable", "--now", "penguin.service")
    started = shlex.join([binary, *counter.words])
    hypervisor.run("sh", "-c", f"cd {counter.directory}; setsid {started} >/dev/null 2>log </dev/null &")
    for guest in (penguin, counter):
        guest.counts()
    inventory = {"hypervisor": hypervisor.inventory()}
    run = playbook("live_update", inventory, {"live_update_qemu_binary": binary})
    assert run.returncode == 0, run.stdout
    assert "by precopy" in run.stdout
    print(run.stdout)
    for guest in (penguin, counter):
        guest.counts()

    before = {guest.name: len(guest.lines()) for guest in (penguin, counter)}
    boot_id = hypervisor.boot_id()

    run = playbook("host_reboot", inventory, {})
    assert run.returncode == 0, run.stdout
    print(run.stdout)

    assert hypervisor.boot_id() != boot_id
    for guest in (penguin, counter):
        guest.counts()
        assert len(guest.pids()) == 1
    ticks = [line.split() for line in penguin.lines() if line.startswith("tick ") and line.count(" ") == 2]
    assert len({words[2] for words in ticks}) == 1  # the guest's own boot id
    numbers = [int(words[1]) for words in ticks]
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers))) and len(numbers) > before["penguin"]
    lines = counter.lines()
    numbers = [int(line, 16) for line in lines if line not in ("", "boot")]
    assert lines.count("boot") == 1
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers))) and len(numbers) > before["counter"]
    record = json.loads(hypervisor.run("cat", "/var/lib/vmfleet-cpr/counter/update.json"))
    assert record["checkpoint"]["memory_files"] == record["checkpoint"]["marked"] == [f"{counter.directory}/ram"]
    unit = hypervisor.run("systemctl", "cat", "penguin.service")
    assert "held" not in unit
    assert hypervisor.run("systemctl", "show", "-P", "MainPID", "penguin.service").split() == penguin.pids()
