# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What differs between two QEMUs and counts, on what Debian's 10.0.2 and 11.1.3 said of one guest."""

from __future__ import annotations

import dataclasses
import json
import pathlib

import pytest

from ansible_collections.vmfleet.cpr.plugins.module_utils import device_tree, guest_agent, machine_view
from ansible_collections.vmfleet.cpr.plugins.module_utils.machine_view import MachineView

RECORDED = json.loads((pathlib.Path(__file__).parent / "recorded" / "several_cards.json").read_text(encoding="utf-8"))


def view(end):
    said = RECORDED[end]
    return MachineView(
        machine_type="pc-q35-10.0",
        kvm=True,
        processors={0: {"socket-id": 0, "core-id": 0, "thread-id": 0}},
        cpu={"type": "qemu64-x86_64-cpu", "feature-words": machine_view.read_feature_words(said["feature-words"])},
        memory={"size": 64 << 20, "max-size": 64 << 20, "slots": 0},
        memory_devices=[],
        memory_blocks=machine_view.read_memory_blocks(said["info ramblock"]),
        numa={},
        parts=["ide-hd", "virtio-net-pci", "pvpanic (panic)"],
        devices=device_tree.parse(said["info qtree"]),
        queues={"virtio-net (device[1])": [(256, 256), (256, 256), (64, 64)]},
        disks=machine_view.read_disks(said["query-block"]),
    )


OLD, NEW = view("old"), view("new")


def test_what_two_versions_say_of_the_same_guest_does_not_differ():
    assert machine_view.differences(OLD, NEW) == {}
    assert machine_view.summary_differences(machine_view.summary(OLD), machine_view.summary(NEW)) == []


def test_nothing_is_left_out_when_it_is_read():
    assert len(OLD.devices) == RECORDED["old"]["info qtree"].count("dev: ") == 37
    card = next(device for device in OLD.devices if device.type == "virtio-net-pci")
    assert (card.bus, card.place) == ("pcie.0", "addr 01.0")
    assert card.properties["pci id"] == "1af4:1000 (sub 1af4:0001)"
    cards = machine_view.summary(OLD)["cards"]
    assert len(cards) == 3 and "52:54:00:01:02:03" in cards
    assert OLD.memory_blocks["ram0"] == 64 << 20 and OLD.memory_blocks["pc.bios"] == 256 << 10
    assert OLD.memory_blocks["0000:00:01.0/virtio-net-pci.rom"] == 256 << 10
    assert OLD.cpu["feature-words"]["CPUID 0x1 EDX"] and all(OLD.cpu["feature-words"].values())
    assert next(iter(OLD.disks.values()))["size"] == 1 << 20


def changed(**changes):
    return machine_view.differences(OLD, dataclasses.replace(NEW, **changes))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"kvm": False}, {"machine-differs": ["KVM is True in the old QEMU and False in the new"]}),
        (
            {"processors": {**NEW.processors, 1: {"socket-id": 1}}},
            {"cpu-differs": ["processor 1 is absent in the old QEMU and socket-id 1 in the new"]},
        ),
        (
            {"memory_blocks": {**NEW.memory_blocks, "pc.bios": 128 << 10}},
            {"firmware-differs": ["pc.bios (bytes of RAM or ROM) is 0x40000 in the old QEMU and 0x20000 in the new"]},
        ),
        (
            {"memory_devices": [{"type": "dimm", "id": "d", "slot": 0, "node": 0}]},
            {
                "memory-differs": [
                    "memory device 0 is absent in the old QEMU and id d, node 0, slot 0, type dimm in the new"
                ]
            },
        ),
        (
            {"queues": {"virtio-net (device[1])": [(256, 256), (128, 128), (64, 64)]}},
            {
                "queues-differ": [
                    "queue 1 of virtio-net (device[1]) has 256 entries in the old QEMU, and the new one has room for 128"
                ]
            },
        ),
    ],
)
def test_what_a_guest_would_see_is_named_with_both_values(changes, expected):
    assert changed(**changes) == expected


def test_parts_on_no_bus_count():
    assert changed(parts=["ide-hd", "virtio-net-pci"]) == {
        "devices-differ": ["pvpanic (panic) is missing in the new QEMU"]
    }


def test_what_virtio_mem_has_plugged_is_no_shape():
    text = "2 nodes\nnode 0 cpus: 0 1\nnode 0 size: {} MB\nnode 0 plugged: {} MB\nnode 1 cpus: 2\nnode 1 size: 32 MB\n"
    old, new = (machine_view.read_numa(text.format(*sizes)) for sizes in ((96, 64), (32, 0)))
    assert old == new == {
        "processors of node 0": "0 1", "MiB of node 0": 32, "processors of node 1": "2", "MiB of node 1": 32
    }  # fmt: skip


def test_a_disk_with_another_image_is_named_with_both():
    name = next(iter(NEW.disks))
    disks = {name: {**NEW.disks[name], "image": "other.img"}, "cd0": {"image": None}}
    one, other = sorted(changed(disks=disks)["disks-differ"], key=len)
    assert one == "disk cd0 is in the new QEMU only"
    assert other.endswith("/disk.img in the old QEMU and other.img in the new")


def test_queues_that_come_with_what_the_guest_agreed_to_are_no_difference():
    old = dataclasses.replace(OLD, queues={"virtio-net (n)": [(256, 256)] * 4 + [(64, 64)]})
    new = dataclasses.replace(NEW, queues={"virtio-net (n)": [(256, 256), (256, 256), (64, 64)]})
    assert machine_view.differences(old, new) == {}
    small = dataclasses.replace(NEW, queues={"virtio-net (n)": [(256, 256), (64, 64), (64, 64)]})
    assert len(machine_view.differences(old, small)["queues-differ"]) == 2


TREE = """\
bus: main-system-bus
  type System
  dev: q35-pcihost, id ""
    MCFG = {mcfg}
    bus: pcie.0
      type PCIE
      dev: qemu-xhci, id "usb"
        addr = 02.0
        busnr = {bus} (0x0)
        bus: usb.0
          type usb-bus
          dev: usb-kbd, id "keys"
            port = ""
            addr 0.0, port {port}, speed 480, name QEMU USB Keyboard, attached
      dev: e1000, id "nic"
        netdev = "{netdev}"
        addr = {addr}
"""
SAME = {"mcfg": 1, "bus": 0, "port": 1, "netdev": "n", "addr": "03.0"}


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ({}, {"mcfg": 2, "bus": 1}, None),
        ({"netdev": "#net0"}, {"netdev": "cpruser0"}, None),
        ({}, {"netdev": "m"}, 'e1000 (nic) on pcie.0, addr 03.0 has netdev "n" in the old QEMU and "m" in the new'),
        ({}, {"addr": "04.0"}, "e1000 (nic) on pcie.0, addr 03.0 is at another place in the new QEMU: on pcie.0, addr 04.0"),
        ({}, {"port": 2}, "usb-kbd (keys) on usb.0, port 1 is at another place in the new QEMU: on usb.0, port 2"),
    ],
)  # fmt: skip
def test_state_and_made_up_names_do_not_count_and_wires_and_places_do(old, new, told):
    trees = [device_tree.parse(TREE.format(**{**SAME, **values})) for values in (old, new)]
    assert device_tree.differences(*trees) == ([told] if told else [])


def test_devices_without_an_id_are_told_by_their_places():
    text = 'bus: b\n  dev: eeprom, id ""\n    addr = {}\n  dev: eeprom, id ""\n    addr = {}\n'
    one, same, other = (device_tree.parse(text.format(*places)) for places in ((1, 2), (2, 1), (2, 3)))
    assert device_tree.differences(one, same) == []
    assert len(device_tree.differences(one, other)) == 1
    assert device_tree.differences(one, one[:1]) == ["eeprom on b, addr 2 is missing in the new QEMU"]


def test_virtio_devices_are_told_by_the_devices_that_they_are_in():
    card = '  dev: virtio-net-pci, id ""\n    addr = {0}\n    bus: virtio-bus\n      dev: v, id ""\n        mac = {1}\n'
    one = device_tree.parse("bus: pci.0\n" + card.format("01.0", "a") + card.format("02.0", "b"))
    other = device_tree.parse("bus: pci.0\n" + card.format("02.0", "b") + card.format("01.0", "a"))
    assert len(one) == 4 and device_tree.differences(one, other) == []
    swapped = device_tree.parse("bus: pci.0\n" + card.format("02.0", "a") + card.format("01.0", "b"))
    assert len(device_tree.differences(one, swapped)) == 2


def test_the_agents_socket_is_where_a_program_in_the_guest_listens_and_nobody_else_does():
    devices = device_tree.parse(
        'bus: b\n  dev: virtserialport, id ""\n    chardev = "a"\n    name = "org.qemu.guest_agent.0"\n'
    )
    free = {"label": "a", "frontend-open": True, "filename": "disconnected:unix:/run/a.sock,server=on"}
    for chardev, expected in (
        (free, "/run/a.sock"),
        ({**free, "filename": "disconnected:unix:a.sock,server=on"}, "/there/a.sock"),
        ({**free, "frontend-open": False}, None),
        ({**free, "filename": "unix:/run/a.sock,server=on"}, None),
        ({**free, "label": "b"}, None),
    ):
        assert guest_agent.socket_of(devices, [chardev], "/there") == expected
