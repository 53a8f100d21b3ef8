# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What is found out before the guest stops, by asking both QEMUs."""

from __future__ import annotations

import json
import os
import socket
import threading

import pytest

from ansible_collections.vmfleet.cpr.plugins.module_utils import command_line, new_command_line
from tests.guests.ansible import live_update
from tests.guests.guest import NEW_SUITE, OLD_SUITE, Qmp, is_alive, qemu, wait_until

# Bytes. A QEMU's devices stand still while it writes an answer: its schema has 230 kB and
# costs them 60 ms, ``info qtree`` of a small guest has 15 kB and costs them 1 ms.
_LONG = 64 * 1024


def test_no_answer_of_the_running_guest_is_so_long_that_it_would_notice(start, host):
    """By what its QEMU writes to its monitor, which it can log."""
    monitor = ["-chardev", "socket,id=m,path={dir}/qmp.sock,server=on,wait=off,logfile={dir}/qmp.log,logappend=on"]
    guest = start("web1", monitor=[*monitor, "-mon", "chardev=m,mode=control"])
    host.until("setup", guest)
    answers = (guest.directory / "qmp.log").read_text().splitlines()
    assert any('"blocked' in answer or '"mode"' in answer for answer in answers), "nothing was logged"
    assert max(map(len, answers)) < _LONG


def test_a_mode_that_was_tried_is_put_back(start, host):
    guest = start("web1", suite=OLD_SUITE)
    with guest.qmp() as monitor:
        monitor.execute("migrate-set-parameters", mode="cpr-reboot")
    (outcome,) = host.launch(guest, check_mode=True, qemu_binary=qemu(NEW_SUITE))
    assert not outcome.error
    with guest.qmp() as monitor:
        assert monitor.execute("query-migrate-parameters")["mode"] == "cpr-reboot"


class Stops(threading.Thread):
    """Listens at a monitor of the guest's own for a STOP."""

    def __init__(self, path):
        super().__init__(daemon=True)
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(str(path))
        self._stream = self._socket.makefile("rw")
        self._stream.write('{"execute": "qmp_capabilities"}\n')
        self._stream.flush()
        self.heard = []
        self.start()

    def run(self):
        for line in self._stream:
            self.heard.append(json.loads(line).get("event"))

    def check(self):
        """No STOP so far; that the monitor speaks at all is seen by what it answers now."""
        before = len(self.heard)
        self._stream.write('{"execute": "query-status"}\n')
        self._stream.flush()
        wait_until(lambda: len(self.heard) > before, "the watching monitor answers")
        assert "STOP" not in self.heard


DISKS = [
    *("-blockdev", "driver=null-co,node-name=a,size=1048576,read-zeroes=on", "-blockdev"),
    *("driver=null-co,node-name=b,size=2097152,read-zeroes=on", "-device", "virtio-blk-pci,id=da,drive=a"),
    *("-device", "virtio-blk-pci,id=db,drive=b"),
]
CARD = ["-netdev", "user,id=n", "-device", "virtio-net-pci,id=card,netdev=n,addr=08.0,mac=52:54:00:00:00:01"]


def _replaced(before, after):
    return lambda words: [word.replace(before, after) for word in words]


def _without_device(words):
    index = next(index for index, word in enumerate(words) if word.startswith("virtio-rng-pci"))
    return words[: index - 1] + words[index + 1 :]


# What the new QEMU is told, the guest's own options, and what the user is told of it.
DIFFERENT = {
    "an extra device": (
        lambda words: [*words, "-device", "usb-ehci,id=extra"], [],
        "devices-differ", ["usb-ehci (extra) on pcie.0, addr 01.0 is in the new QEMU only"],
    ),
    "a missing device": (
        _without_device, ["-device", "virtio-rng-pci,id=gone"],
        "devices-differ", ["virtio-rng-pci (gone) on pcie.0, addr 01.0 is missing in the new QEMU"],
    ),
    "another PCI address": (
        _replaced("addr=08.0", "addr=09.0"), CARD,
        "devices-differ", ["virtio-net-pci (card) on pcie.0, addr 08.0 is at another place", "addr 09.0"],
    ),
    "another MAC address": (
        _replaced("00:00:01", "00:00:02"), CARD,
        "devices-differ", ['mac "52:54:00:00:00:01" in the old QEMU and "52:54:00:00:00:02" in the new'],
    ),
    "another CPU model": (
        _replaced("qemu64", "qemu64,stepping=7,model-id=Other"), [],
        "cpu-differs", ["model-id is QEMU Virtual CPU version 2.5+ in the old QEMU and Other in the new", "stepping is"],
    ),
    "more memory": (
        _replaced("64M", "128M"), [],
        "new-qemu-exited", ["ram0 backing store size 0x4000000 is too small for 'size' option 0x8000000"],
    ),
    "less memory": (
        _replaced("64M", "32M"), [],
        "memory-differs", ["size of memory is 0x4000000 in the old QEMU and 0x2000000 in the new"],
    ),
    "two disks swapped": (
        lambda words: [word[:-1] + {"a": "b", "b": "a"}[word[-1]] if word.startswith("virtio-blk") else word for word in words],
        DISKS, "disks-differ", ["disk /machine/peripheral/da/virtio-backend has the size 1048576", "2097152 in the new"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DIFFERENT)
def test_a_new_qemu_that_differs_is_refused_and_the_guest_never_stops(start, host, monkeypatch, name):
    change, more, code, told = DIFFERENT[name]
    make = new_command_line.make

    def changed(*arguments, **keywords):
        result = make(*arguments, **keywords)
        result.arguments = command_line.parse(change(command_line.write(result.arguments)))
        return result

    guest = start("web1", more=["-qmp", "unix:{dir}/watch.sock,server=on,wait=off", *more])
    stops = Stops(guest.directory / "watch.sock")
    (outcome,) = host.preflight(guest)
    assert outcome.extra["modes"]["cpr-transfer"]["verdict"] == "ready"
    monkeypatch.setattr(new_command_line, "make", changed)
    for phase in (host.launch, host.transfer, host.setup):
        (outcome,) = phase(guest)
        if outcome.error:
            break
    assert outcome.error and outcome.error.code == code
    assert [words for words in told if words not in str(outcome.error)] == []
    monkeypatch.undo()
    host.rollback(guest)
    stops.check()
    host.until("resume", guest)
    guest.wait_for_ticks()
    guest.check_continuity()


def test_a_difference_that_is_accepted_passes_and_is_reported(start, host):
    guest = start("web1", suite="trixie", more=["-device", "virtio-rng-pci,id=rng"])
    old = guest.pid()
    host.until("transfer", guest)
    (outcome,) = host.setup(guest, accept_differences=["queues-differ"])
    assert not outcome.error and "queue 0 of virtio-rng (rng) has 1024 entries" in outcome.message
    assert "queue 0 of virtio-rng" in outcome.extra["agreement"]["accepted"]["queues-differ"][0]
    # QEMU does not take it, as was foretold; the guest goes on.
    (outcome,) = host.resume(guest)
    assert outcome.error.code == "migration-failed" and "vring.num 1024" in outcome.error.message
    assert guest.pid() == old and guest.status() == "running"
    guest.wait_for_ticks()
    guest.check_continuity()


@pytest.mark.parametrize(
    ("options", "parameters", "code"),
    [
        ({}, {"capabilities": {"zero-blocks": True}}, "capability-missing"),
        ({"machine": "pc-q35-3.1"}, {}, "machine-type-missing"),
        (
            {"suite": NEW_SUITE, "machine": "pc-q35-10.0"},
            {"qemu_binary": qemu(OLD_SUITE), "adopt": False},
            "older-qemu",
        ),
        ({"memory": ()}, {"adopt": False}, "memory-not-shared"),
    ],
    ids=["a capability on one end only", "a removed machine type", "an older QEMU", "RAM that is not shared"],
)
def test_what_would_fail_is_refused_before_anything_is_started(start, host, options, parameters, code):
    guest = start("web1", **{"more": ["-qmp", "unix:{dir}/watch.sock,server=on,wait=off"], **options})
    stops = Stops(guest.directory / "watch.sock")
    verdicts = host.preflight(guest, **parameters)[0].extra["modes"]["cpr-transfer"]
    assert verdicts["verdict"] == "blocked" and code in [reason["code"] for reason in verdicts["reasons"]]
    (outcome,) = host.launch(guest, **parameters)
    assert outcome.error.code == code and outcome.error.hint
    assert len(guest.pids()) == 1
    stops.check()


def test_a_running_block_job_is_refused_before_anything_is_started(start, host):
    guest = start("web1", more=[*DISKS, "-qmp", "unix:{dir}/watch.sock,server=on,wait=off"])
    stops = Stops(guest.directory / "watch.sock")
    with guest.qmp() as monitor:
        monitor.execute("blockdev-add", **{"driver": "null-co", "node-name": "copy", "size": 1 << 20})
        monitor.execute("blockdev-mirror", **{"job-id": "mirror0", "device": "a", "target": "copy", "sync": "full"})
    (outcome,) = host.launch(guest)
    assert outcome.error.code == "block-job-running" and "mirror0" in outcome.error.message
    stops.check()
    with guest.qmp() as monitor:
        monitor.execute("block-job-cancel", device="mirror0", force=True)
        wait_until(lambda: not monitor.execute("query-block-jobs"), "the job ends")
    host.until("resume", guest)
    guest.check_continuity()


def test_virtio_queues_of_10_0_13_are_refused_by_name_before_the_stop(start, host):
    """Debian's 10.0.13 gives every virtio queue 1024 entries, 11.1 does not (10.0.2: see test_healthy)."""
    more = [*CARD, "-device", "virtio-rng-pci,id=rng", *DISKS[:2], "-device", "virtio-blk-pci,id=da,drive=a"]
    guest = start("web1", suite="trixie", more=[*more, "-qmp", "unix:{dir}/watch.sock,server=on,wait=off"])
    old = guest.pid()
    stops = Stops(guest.directory / "watch.sock")
    # A rehearsal knows it too, days before.
    (outcome,) = host.preflight(guest, rehearse=True)
    (reason,) = outcome.extra["modes"]["cpr-transfer"]["reasons"]
    assert reason["code"] == "queues-differ"
    host.until("transfer", guest)
    (outcome,) = host.setup(guest)
    assert outcome.error.code == "queues-differ"
    for words in (
        "queue 0 of virtio-net (card) has 1024 entries in the old QEMU, and the new one has room for 256",
        "queue 2 of virtio-net (card) has 1024 entries in the old QEMU, and the new one has room for 64",
        "queue 0 of virtio-rng (rng) has 1024 entries in the old QEMU, and the new one has room for 8",
    ):
        assert words in outcome.error.message and words in reason["message"]
    host.rollback(guest)
    stops.check()
    assert guest.pid() == old and guest.status() == "running"
    guest.wait_for_ticks()
    guest.check_continuity()


def test_wishes_are_set_on_both_ends_and_put_back(start, host, rebuilt_qemu):
    guest = start("web1", suite=NEW_SUITE)
    wishes = {"capabilities": {"xbzrle": True}, "parameters": {"announce-rounds": 3, "downtime-limit": 77}}
    with guest.qmp() as monitor:
        monitor.execute("migrate-set-parameters", **{"announce-rounds": 9})
    outcome = host.until("setup", guest, qemu_binary=rebuilt_qemu, **wishes)
    for path in (guest.monitor, f"{guest.monitor}.cpr1"):
        with Qmp(path) as monitor:
            present = monitor.execute("query-migrate-capabilities")
            assert {"capability": "xbzrle", "state": True} in present
            parameters = monitor.execute("query-migrate-parameters")
            assert (parameters["announce-rounds"], parameters["downtime-limit"]) == (3, 77)
    agreement = outcome.extra["agreement"]
    assert agreement["version"] == 1 and agreement == host.record(guest)["agreement"]
    assert agreement["capabilities"]["xbzrle"] and agreement["parameters"]["downtime-limit"] == 77
    assert agreement["machine"]["processors"] == 1 and "devices-differ" in agreement["compared"]
    host.rollback(guest)
    with guest.qmp() as monitor:
        assert monitor.execute("query-migrate-parameters")["announce-rounds"] == 9
        assert {"capability": "xbzrle", "state": False} in monitor.execute("query-migrate-capabilities")


def test_a_wish_that_an_end_lacks_is_dropped_with_a_warning(start, tmp_path):
    start("web1")
    wishes = {"capabilities": {"zero-blocks": True}, "when_missing": "drop"}
    run = live_update(qemu(NEW_SUITE), tmp_path / "state", ["web1"], **wishes)
    assert run.returncode == 0, run.stdout
    assert "lacks the migration capability zero-blocks" in run.stderr.replace("\n", " ")


def test_a_wish_that_qemu_refuses_is_told_in_its_words(start, host):
    guest = start("web1", more=["-qmp", "unix:{dir}/watch.sock,server=on,wait=off"])
    stops = Stops(guest.directory / "watch.sock")
    host.until("transfer", guest, parameters={"announce-rounds": "many"})
    (outcome,) = host.setup(guest)
    assert outcome.error.code == "parameter-refused" and "announce-rounds" in outcome.error.message
    host.rollback(guest)
    host.launch(guest, capabilities={"xbzrle": True, "mapped-ram": True})
    (outcome,) = host.transfer(guest)
    assert outcome.error.code == "capability-refused" and outcome.error.qemu_description
    host.rollback(guest)
    stops.check()
    assert guest.status() == "running"


def test_a_rehearsal_says_what_the_new_qemu_says(start, host, tmp_path):
    """A firmware file that was removed since the guest's start."""
    firmware = tmp_path / "bios.bin"
    source = os.path.join(os.path.dirname(qemu(OLD_SUITE)), "../share/seabios/bios-256k.bin")
    firmware.write_bytes(open(source, "rb").read())
    guest = start("web1", more=["-bios", str(firmware), "-qmp", "unix:{dir}/watch.sock,server=on,wait=off"])
    stops = Stops(guest.directory / "watch.sock")
    assert host.preflight(guest, rehearse=True)[0].extra["modes"]["cpr-transfer"]["verdict"] == "ready"
    firmware.unlink()
    assert host.preflight(guest)[0].extra["modes"]["cpr-transfer"]["verdict"] == "ready"
    (outcome,) = host.preflight(guest, rehearse=True)
    (reason,) = outcome.extra["modes"]["cpr-transfer"]["reasons"]
    assert reason["code"] == "new-qemu-exited" and "bios.bin" in reason["message"]
    assert len(guest.pids()) == 1
    stops.check()


def test_a_disk_that_is_changed_between_setup_and_switch_is_noticed(start, host, tmp_path):
    guest = start(
        "web1", more=["-device", "ide-cd,bus=ide.1,id=cd0", "-qmp", "unix:{dir}/watch.sock,server=on,wait=off"]
    )
    stops = Stops(guest.directory / "watch.sock")
    medium = tmp_path / "medium.iso"
    medium.write_bytes(bytes(1 << 20))
    host.until("setup", guest)
    with guest.qmp() as monitor:
        monitor.execute("blockdev-change-medium", id="cd0", filename=str(medium))
    (outcome,) = host.resume(guest)
    assert outcome.error.code == "disks-differ" and "medium.iso" in outcome.error.message
    host.rollback(guest)
    stops.check()
    host.until("resume", guest)
    guest.wait_for_ticks()
    guest.check_continuity()


def test_a_guest_keeps_its_generation_id(start, host):
    """A new one would tell it that it is a copy of itself."""
    guest = start("web1", more=["-device", "vmgenid,guid=auto,id=gen"])

    def generation():
        with guest.qmp() as monitor:
            return monitor.execute("query-vm-generation-id")["guid"]

    before = generation()
    host.until("resume", guest)
    assert generation() == before


def test_a_guest_that_is_not_what_was_agreed_is_noticed_and_its_old_qemu_kept(start, host):
    guest = start("web1")
    old = guest.pid()
    host.until("setup", guest)
    with host.changed_record(guest) as record:
        record["agreement"]["machine"]["processors"] = 4096
    (outcome,) = host.resume(guest)
    assert outcome.error.code == "guest-differs" and "4096" in outcome.error.message
    assert is_alive(old) and host.record(guest)["phase"] == "switched"
    os.kill(old, 9)
    wait_until(lambda: not is_alive(old), "it ends")
    (outcome,) = host.resume(guest)
    assert not outcome.error and guest.status() == "running"
    guest.wait_for_ticks()
    guest.check_continuity()


def test_the_old_qemu_goes_only_after_the_heartbeat(start, host, tmp_path):
    guest = start("web1", more=["-qmp", "unix:{dir}/watch.sock,server=on,wait=off"])
    stops = Stops(guest.directory / "watch.sock")
    old = guest.pid()
    host.until("setup", guest)
    command = f"rm {tmp_path}/$1.well"  # succeeds once
    (outcome,) = host.resume(guest, heartbeat_command=command, heartbeat_timeout=0.5)
    assert outcome.error.code == "heartbeat-missing" and "before the switch" in outcome.error.message
    assert guest.status() == "running" and host.record(guest)["phase"] == "set-up"
    stops.check()
    (tmp_path / "web1.well").write_text("")
    (outcome,) = host.resume(guest, heartbeat_command=command, heartbeat_timeout=0.5)
    assert outcome.error.code == "heartbeat-missing" and command in outcome.error.message
    assert is_alive(old) and host.record(guest)["phase"] == "switched"
    (tmp_path / "web1.well").write_text("")
    (outcome,) = host.resume(guest, heartbeat_command=command)
    assert not outcome.error and guest.pid() != old
    guest.check_continuity()


def test_an_agent_that_answered_must_answer_again(start, host, tmp_path):
    socket_path = tmp_path / "agent.sock"
    guest = start(
        "agent", linux=True,
        more=["-device", "virtio-serial-pci", "-chardev", f"socket,id=agent,path={socket_path},server=on,wait=off",
              "-device", "virtserialport,chardev=agent,name=org.qemu.guest_agent.0"],
    )  # fmt: skip

    def is_open():
        with guest.qmp() as monitor:
            return any(item["label"] == "agent" and item["frontend-open"] for item in monitor.execute("query-chardev"))

    wait_until(is_open, "the guest has opened its port")
    host.until("setup", guest)
    assert host.record(guest)["heartbeat"] == {"agent": True}
    # Another client holds the new socket: the agent can't be asked.
    with socket.socket(socket.AF_UNIX) as other:
        other.connect(f"{socket_path}.cpr1")
        (outcome,) = host.resume(guest, heartbeat_timeout=0.5)
        assert outcome.error.code == "heartbeat-missing" and "agent" in outcome.error.message
    (outcome,) = host.resume(guest)
    assert not outcome.error
    guest.wait_for_ticks()
    guest.check_continuity()
