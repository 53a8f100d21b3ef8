# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The machine that a QEMU gives its guest, and what differs between two.

QEMU's two ends compare next to nothing before a switch: the rest shows as a failed load in the
pause, or not at all. Pure functions. Private to the collection.
"""

from __future__ import annotations

import collections
import re
import typing as t
from dataclasses import dataclass

from ansible_collections.vmfleet.cpr.plugins.module_utils import device_tree
from ansible_collections.vmfleet.cpr.plugins.module_utils.device_tree import Device

# What a guest sees of its CPU beside the features. A CPU model stands for all of these.
CPU_PROPERTIES = ("family", "model", "stepping", "level", "xlevel", "vendor", "model-id", "phys-bits", "feature-words")

# `  pc.ram    4 KiB  0x0000000000000000 0x0000000004000000 0x0000000004000000 0x00007f971bfff000  rw`, and
# before QEMU 8.0 without the last two.
_MEMORY_BLOCK = re.compile(r"\s*(?P<name>\S.*?)\s+(?P<page>\d+) (?P<unit>[KMG])iB\s+0x\w+ 0x\w+ 0x(?P<size>\w+).*")


@dataclass(frozen=True)
class MachineView:
    """What a QEMU's monitor says of the machine that it gives its guest.

    :ivar machine_type: versioned.
    :ivar kvm: whether KVM runs it, as against TCG.
    :ivar processors: the topology of each present one, by index (``props`` of ``query-cpus-fast``).
    :ivar cpu: the type of the first one and its `CPU_PROPERTIES`; all are alike.
    :ivar memory: ``size``, ``max-size`` and ``slots``.
    :ivar memory_devices: type, id, slot and node of each (``query-memory-devices``).
    :ivar memory_blocks: the bytes of each RAM block, also of firmware and option ROMs.
    :ivar numa: the processors of each node, and its MiB without what memory devices add.
    :ivar parts: type and id of whatever options or ``device_add`` have made, on a bus or not.
    :ivar queues: of each virtio device and queue how many entries it has and how many it may have.
    :ivar disks: of each its image, the image's backing file and its size in bytes.
    """

    machine_type: str
    kvm: bool
    processors: t.Mapping[int, t.Mapping[str, int]]
    cpu: t.Mapping[str, t.Any]
    memory: t.Mapping[str, int]
    memory_devices: t.Sequence[t.Mapping[str, t.Any]]
    memory_blocks: t.Mapping[str, int]
    numa: t.Mapping[str, t.Any]
    parts: t.Sequence[str]
    devices: t.Sequence[Device]
    queues: t.Mapping[str, t.Sequence[tuple[int, int]]]
    disks: t.Mapping[str, t.Mapping[str, t.Any]]


def read_memory_blocks(text: str) -> dict[str, int]:
    """The size of each RAM block in bytes, from ``info ramblock``.

    It is the size that it may have: what is used of a block that can grow (ACPI tables) goes
    with the migration stream.
    """
    found = filter(None, map(_MEMORY_BLOCK.fullmatch, text.splitlines()[1:]))
    return {match["name"]: int(match["size"], 16) for match in found}


def read_page_sizes(text: str) -> dict[str, int]:
    """The size in bytes of the host's pages behind each RAM block, from ``info ramblock``."""
    found = filter(None, map(_MEMORY_BLOCK.fullmatch, text.splitlines()[1:]))
    return {match["name"]: int(match["page"]) << {"K": 10, "M": 20, "G": 30}[match["unit"]] for match in found}


def read_numa(text: str) -> dict[str, t.Any]:
    """The nodes of ``info numa``, their sizes less what is plugged: of virtio-mem that is the guest's state."""
    found: dict[str, t.Any] = {}
    for node, what, value in re.findall(r"^node (\d+) (\w+): *(.*)$", text, re.MULTILINE):
        if what == "cpus":
            found[f"processors of node {node}"] = value
        elif what in ("size", "plugged"):
            name = f"MiB of node {node}"
            found[name] = found.get(name, 0) + (1 if what == "size" else -1) * int(value.split()[0])
    return found


def read_feature_words(words: t.Iterable[t.Mapping[str, t.Any]]) -> dict[str, int]:
    """An x86 CPU's features by leaf; those without any are left out, since a newer QEMU knows more leaves.

    That it has several threads is left out too (HT, and CMP_LEGACY of AMD's): it follows from the topology,
    and QEMU 7.2 says so to the guest but not here.
    """
    return {
        f"CPUID {item['cpuid-input-eax']:#x}"
        + (f",{item['cpuid-input-ecx']:#x}" if "cpuid-input-ecx" in item else "")
        + f" {item['cpuid-register']}": item["features"]
        & ~_threads_bits(item)
        for item in words
        if item["features"]
    }


def _threads_bits(word: t.Mapping[str, t.Any]) -> int:
    leaf = word["cpuid-input-eax"], word["cpuid-register"]
    return {(1, "EDX"): 1 << 28, (0x80000001, "ECX"): 1 << 1}.get(leaf, 0)


def read_disks(answer: t.Iterable[t.Mapping[str, t.Any]]) -> dict[str, dict[str, t.Any]]:
    """The disks of ``query-block``. The size is that of the medium, None where there is none."""
    found = {}
    for item in answer:
        inserted = item.get("inserted", {})
        found[item.get("qdev") or item["device"]] = {
            "image": inserted.get("file"),
            "backing file": inserted.get("backing_file"),
            "size": inserted.get("image", {}).get("virtual-size"),
        }
    return found


def differences(old: MachineView, new: MachineView) -> dict[str, list[str]]:
    """What differs and matters, as sentences by error code; empty if the new QEMU can take the guest over.

    Whatever a guest sees of its machine counts, unless `device_tree` says otherwise: it would
    change under a running system that has looked once, at its boot.
    """
    found = {
        "machine-differs": [
            *_differing({"machine type": old.machine_type}, {"machine type": new.machine_type}),
            *_differing({"KVM": old.kvm}, {"KVM": new.kvm}),
        ],
        "cpu-differs": [
            *_differing(_flat(old.cpu), _flat(new.cpu)),
            *_differing(_numbered("processor", old.processors), _numbered("processor", new.processors)),
        ],
        "memory-differs": [
            *_differing(old.memory, new.memory, "of memory"),
            *_differing(_numbered("memory device", dict(enumerate(old.memory_devices))),
                        _numbered("memory device", dict(enumerate(new.memory_devices)))),
            *_differing(old.numa, new.numa),
        ],
        "disks-differ": [
            sentence
            for name in sorted({*old.disks, *new.disks})
            for sentence in _differing_disk(name, old.disks.get(name), new.disks.get(name))
        ],
        "devices-differ": device_tree.differences(old.devices, new.devices) or list(_differing_parts(old.parts, new.parts)),
        "queues-differ": list(_differing_queues(old.queues, new.queues)),
        "firmware-differs": list(_differing(old.memory_blocks, new.memory_blocks, "(bytes of RAM or ROM)")),
    }  # fmt: skip
    return {code: sentences for code, sentences in found.items() if sentences}


def _differing_parts(old: t.Iterable[str], new: t.Iterable[str]) -> t.Iterator[str]:
    before, after = collections.Counter(old), collections.Counter(new)
    yield from (f"{name} is missing in the new QEMU" for name in (before - after).elements())
    yield from (f"{name} is in the new QEMU only" for name in (after - before).elements())


def summary(view: MachineView) -> dict[str, t.Any]:
    """What of a guest is looked at again after the switch, and what the record keeps."""
    return {
        "machine_type": view.machine_type,
        "processors": len(view.processors),
        "memory": dict(view.memory),
        "disks": {name: dict(disk) for name, disk in view.disks.items()},
        "cards": sorted(device.properties["mac"].strip('"') for device in view.devices if "mac" in device.properties),
        "devices": len(view.devices),
    }


def summary_differences(before: t.Mapping[str, t.Any], after: t.Mapping[str, t.Any]) -> list[str]:
    """What differs between two summaries, as sentences."""
    return list(_differing(_flat(before), _flat(after)))


def _flat(value: t.Mapping[str, t.Any], prefix: str = "") -> dict[str, t.Any]:
    """Nested mappings as one, with the names joined."""
    found: dict[str, t.Any] = {}
    for name, item in value.items():
        if isinstance(item, dict):
            found.update(_flat(item, f"{prefix}{name} "))
        else:
            found[f"{prefix}{name}"] = item
    return found


def _numbered(name: str, items: t.Mapping[int, t.Mapping[str, t.Any]]) -> dict[str, t.Any]:
    return {
        f"{name} {number}": ", ".join(f"{key} {item[key]}" for key in sorted(item)) for number, item in items.items()
    }


def _differing(old: t.Mapping[str, t.Any], new: t.Mapping[str, t.Any], what: str = "") -> t.Iterator[str]:
    for name in sorted({*old, *new}):
        before, after = old.get(name), new.get(name)
        if before != after:
            label = f"{name} {what}".strip()
            yield f"{label} is {_said(before)} in the old QEMU and {_said(after)} in the new"


def _said(value: t.Any) -> str:
    if value is None:
        return "absent"
    return hex(value) if isinstance(value, int) and value > 0xFFFF else str(value)


def _differing_queues(
    old: t.Mapping[str, t.Sequence[tuple[int, int]]], new: t.Mapping[str, t.Sequence[tuple[int, int]]]
) -> t.Iterator[str]:
    """Queues that have more entries than the new QEMU has room for.

    Debian's 10.0.13 gives every queue 1024 entries, whatever the device says; 10.0.2 and 11.1
    do not, and 11.1 then refuses the guest in the pause.
    """
    for device, queues in old.items():
        if device not in new:
            continue  # one without an id may have another number there; a missing one is told elsewhere
        others = new[device]
        for number, (entries, dummy) in enumerate(queues):
            room = _room(number, len(queues), others)
            if entries > room:
                yield (
                    f"queue {number} of {device} has {entries} entries in the old QEMU, and the new one has room"
                    f" for {room}"
                )


def _room(number: int, count: int, others: t.Sequence[tuple[int, int]]) -> int:
    """How many entries the new QEMU has for a queue.

    A card with several pairs of queues has one pair, and the one for control, until it knows
    what the guest agreed to: that goes with the stream.
    """
    if len(others) == 3 < count:
        return others[2 if number == count - 1 else number % 2][1]
    return others[number][1] if number < len(others) else 0


def _differing_disk(name: str, old: t.Mapping[str, t.Any] | None, new: t.Mapping[str, t.Any] | None) -> t.Iterator[str]:
    if old is None or new is None:
        yield f"disk {name} is in the {'new' if old is None else 'old'} QEMU only"
        return
    for what, before in old.items():
        if before != new[what]:
            yield f"disk {name} has the {what} {before or 'none'} in the old QEMU and {new[what] or 'none'} in the new"
