# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The devices of a QEMU, their places and their properties, and what differs between two.

From ``info qtree`` of the human monitor: it holds all of it in one answer, for which the guest's
devices stand still for 1 ms. QMP would take thousands of messages (``qom-list-get`` came with
QEMU 10.1 only), each with its turn in QEMU's main loop. Pure functions. Private to the collection.
"""

from __future__ import annotations

import re
import typing as t
from dataclasses import dataclass, field

# `dev: virtio-net-pci, id "net0"`
_DEVICE = re.compile(r'dev: (?P<type>.+), id "(?P<id>.*)"')
_BUS = "bus: "
# `class Ethernet controller, addr 00:02.0, pci id 1af4:1000 (sub 1af4:0001)`
_PCI = re.compile(r"class .*, pci id (?P<identity>.*)")
# `addr 0.0, port 2, speed 480, name QEMU USB Keyboard, attached`; the property says what was asked for.
_USB = re.compile(r"addr [\d.]+, port (?P<port>[\d.]+), speed .*")

# Where a device is on its bus, by the kinds of buses (PCI, USB, SCSI, virtio-serial, IDE, memory).
_PLACES = ("addr", "port", "channel", "scsi-id", "lun", "nr", "unit", "iobase", "slot")

# What differs between two QEMUs with the same guest, and why it may. All else counts.
_UNSEEN = frozenset(
    (
        *("MCFG", "smb_io_base", "busnr"),  # registers that the guest's firmware sets: state, not shape
        *("cyls", "heads", "secs"),  # guessed from the disk's partitions when its QEMU starts, for a BIOS
        "drive",  # the name of a block node, which a snapshot changes; the images are compared by themselves
        "chardev",  # the host's end of a line, which is named anew where the command line gave no name
    )
)

# Different words for the same: a value, and "as QEMU chooses" where it chooses that value.
_ALIKE = {
    "rombar": {"1 (0x1)", "-1 (0xffffffffffffffff)"},  # QEMU 9.2
    "logical_block_size": {"512 (512 B)", "0 (0 B)"},
    "physical_block_size": {"512 (512 B)", "0 (0 B)"},
}


@dataclass(frozen=True)
class Device:
    """One device.

    :ivar bus: the name of the bus that it is on.
    :ivar path: of the places from the root on: every virtio device is alone on a ``virtio-bus``.
    :ivar properties: as ``info qtree`` prints them.
    """

    type: str
    id: str
    bus: str
    path: tuple[str, ...] = ()
    properties: dict[str, str] = field(default_factory=dict)

    @property
    def place(self) -> str:
        """Where it is on its bus, as ``key value`` pairs."""
        return ", ".join(f"{key} {self.properties[key]}" for key in _PLACES if key in self.properties)

    @property
    def name(self) -> str:
        """As a person would call it."""
        where = self.path[-1] if self.bus == "virtio-bus" and self.path else self.bus
        return f"{self.type}{f' ({self.id})' if self.id else ''} on {where}{f', {self.place}' if self.place else ''}"


def parse(text: str) -> list[Device]:
    """The devices of ``info qtree``."""
    found: list[Device] = []
    # What encloses the present line, each with its indentation: a bus's name, or a device.
    around: list[tuple[int, t.Union[str, Device]]] = []
    for line in text.splitlines():
        words = line.strip()
        indentation = len(line) - len(line.lstrip())
        while around and around[-1][0] >= indentation:
            around.pop()
        device = _DEVICE.fullmatch(words)
        if words.startswith(_BUS):
            around.append((indentation, words[len(_BUS) :]))
        elif device:
            parent = around[-2][1] if len(around) > 1 else None
            bus = str(around[-1][1]) if around else ""
            path = (*parent.path, f"{parent.bus} {parent.place}") if isinstance(parent, Device) else ()
            found.append(Device(device["type"], device["id"], bus, path=path))
            around.append((indentation, found[-1]))
        elif around and isinstance(around[-1][1], Device):
            _read_property(words, around[-1][1].properties)
    return found


def _read_property(words: str, properties: dict[str, str]) -> None:
    name, equals, value = words.partition(" = ")
    pci = _PCI.fullmatch(words)
    usb = _USB.fullmatch(words)
    if pci:
        properties["pci id"] = pci["identity"]
    elif usb:
        properties["port"] = usb["port"]
    elif equals and " " not in name:
        properties[name] = value


def differences(old: t.Iterable[Device], new: t.Iterable[Device]) -> list[str]:
    """What differs between both trees and a guest could see, as sentences.

    Of the properties those that both QEMUs know: what one of them lacks is a default of the
    other, which the versioned machine type keeps as the guest has it.
    """
    groups: dict[tuple[str, str], tuple[list[Device], list[Device]]] = {}
    for end, devices in enumerate((old, new)):
        for device in devices:
            groups.setdefault((device.type, device.id), ([], []))[end].append(device)
    return [sentence for before, after in groups.values() for sentence in _compare_alike(before, after)]


def _place(device: Device) -> tuple[str, ...]:
    return (*device.path, f"{device.bus} {device.place}")


def _compare_alike(before: list[Device], after: list[Device]) -> t.Iterator[str]:
    """Compare devices of one type and id: first those at the same place, then the others."""
    after = list(after)
    moved = []
    for device in before:
        same = next((item for item in after if _place(item) == _place(device)), None)
        if same is None:
            moved.append(device)
        else:
            after.remove(same)
            yield from _compare_properties(device, same)
    for device, other in zip(moved, after):
        yield f"{device.name} is at another place in the new QEMU: on {other.bus}, {other.place}"
    yield from (f"{device.name} is missing in the new QEMU" for device in moved[len(after) :])
    yield from (f"{device.name} is in the new QEMU only" for device in after[len(moved) :])


def _compare_properties(old: Device, new: Device) -> t.Iterator[str]:
    for name, value in old.properties.items():
        other = new.properties.get(name, value)
        # QEMU makes up names that begin with a # for what has none.
        if value.startswith('"#') or name in _UNSEEN or {value, other} == _ALIKE.get(name):
            continue
        if other != value:
            yield f"{old.name} has {name} {value} in the old QEMU and {other} in the new"
