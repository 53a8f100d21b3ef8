# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Asks a QEMU for the machine that it gives its guest. Changes nothing.

No command that holds the guest up (see `qemu_binary.ask_running`), and not
``x-query-virtio-status``: QEMU 11.1.3 crashes on it, with the guest in it.

Private to the collection.
"""

from __future__ import annotations

import typing as t

from ansible_collections.vmfleet.cpr.plugins.module_utils import device_tree, machine_view, process
from ansible_collections.vmfleet.cpr.plugins.module_utils.errors import CprError
from ansible_collections.vmfleet.cpr.plugins.module_utils.machine_view import MachineView
from ansible_collections.vmfleet.cpr.plugins.module_utils.monitor import Monitor

# What to do about each code of `machine_view.differences`.
_AGAIN = (
    "Was something plugged, or changed, at this moment? Then run again; else leave this guest out of"
    " live_update_guests, and report this."
)
HINTS = {
    "machine-differs": _AGAIN,
    "cpu-differs": "Name a versioned CPU model (-cpu MODEL-v1) at its next start: host, max and what KVM offers differ"
    " from QEMU to QEMU.",
    "memory-differs": _AGAIN,
    "disks-differ": _AGAIN,
    "devices-differ": _AGAIN,
    "queues-differ": "Take it to a QEMU that has room for them (Debian's 10.0.13 and 11.1 differ), or restart it.",
    "firmware-differs": "Give the new QEMU the firmware and option ROMs that the guest was started with (the old build's"
    " files, by -L or romfile=), or restart the guest.",
}


def difference(code: str, sentences: t.Iterable[str]) -> CprError:
    """What `machine_view.differences` says under one code, as an error; the guest runs as before."""
    return CprError(
        code,
        f"The new QEMU would not be the machine that the guest knows: {'; '.join(sentences)}. The guest runs on as before.",
        HINTS[code],
    )


async def machine_type(monitor: Monitor) -> str:
    """The versioned machine type, as it is named on a command line.

    :raises CprError: as `Monitor.execute`.
    """
    name: str = await monitor.execute("qom-get", {"path": "/machine", "property": "type"})
    return name[: -len("-machine")] if name.endswith("-machine") else name


async def read(monitor: Monitor, pid: int) -> MachineView:
    """What a QEMU gives its guest, or will give it once it has taken it over.

    :param pid: its process.
    :raises CprError: ``device-unreadable``, or as `Monitor.execute`.
    """
    try:
        return await _read(monitor, pid)
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise CprError(
            "device-unreadable",
            f"QEMU describes the guest in a way that is not understood ({type(error).__name__}: {error}).",
            "Leave this guest out of live_update_guests, and report this.",
        ) from error


async def _read(monitor: Monitor, pid: int) -> MachineView:
    processors = await monitor.execute("query-cpus-fast")
    return MachineView(
        machine_type=await machine_type(monitor),
        kvm=(await monitor.execute("query-kvm"))["enabled"],
        processors={item["cpu-index"]: item.get("props", {}) for item in processors},
        cpu=await _cpu(monitor, processors[0]["qom-path"]),
        memory=await monitor.execute("qom-get", {"path": "/machine", "property": "memory"}),
        memory_devices=[
            {
                "type": item["type"],
                **{key: item["data"][key] for key in ("id", "slot", "node", "addr", "memaddr") if key in item["data"]},
            }
            for item in await monitor.execute("query-memory-devices")
        ],
        memory_blocks=machine_view.read_memory_blocks(await monitor.human("info ramblock")),
        numa=machine_view.read_numa(await monitor.human("info numa")),
        parts=await _parts(monitor),
        devices=device_tree.parse(await monitor.human("info qtree")),
        queues=await _queues(monitor, pid),
        disks=machine_view.read_disks(await monitor.execute("query-block")),
    )


async def _parts(monitor: Monitor) -> list[str]:
    """Whatever options or ``device_add`` have made: not all of it is on a bus."""
    found = []
    for container in ("peripheral", "peripheral-anon"):
        for item in await monitor.execute("qom-list", {"path": f"/machine/{container}"}):
            if item["type"].startswith("child<"):
                name = f" ({item['name']})" if container == "peripheral" else ""
                found.append(f"{item['type'][len('child<') : -1]}{name}")
    return sorted(found)


async def _cpu(monitor: Monitor, path: str) -> dict[str, t.Any]:
    known = {item["name"] for item in await monitor.execute("qom-list", {"path": path})}
    cpu: dict[str, t.Any] = {}
    for name in ("type", *machine_view.CPU_PROPERTIES):
        if name in known:  # most are x86's
            cpu[name] = await monitor.execute("qom-get", {"path": path, "property": name})
    if "feature-words" in cpu:
        cpu["feature-words"] = machine_view.read_feature_words(cpu["feature-words"])
    return cpu


async def _queues(monitor: Monitor, pid: int) -> dict[str, list[tuple[int, int]]]:
    """The sizes of all virtio queues; none where the kernel serves some (vhost), whom that would ask too."""
    if any(target.startswith("/dev/vhost") for target in process.descriptors(pid).values()):
        return {}
    found = {}
    try:
        devices = await monitor.execute("x-query-virtio")
    except CprError as error:
        if error.code != "qmp-error":
            raise
        return {}  # 10.0 has an error for a guest without any
    for device in devices:
        name = f"{device['name']} ({device['path'].rpartition('/')[0].rpartition('/')[2]})"
        found[name] = [item async for item in _sizes(monitor, device["path"])]
    return found


async def _sizes(monitor: Monitor, path: str) -> t.AsyncIterator[tuple[int, int]]:
    number = 0
    while True:
        try:
            status = await monitor.execute("x-query-virtio-queue-status", {"path": path, "queue": number})
        except CprError as error:
            if error.code != "qmp-error":
                raise
            return  # there are no more
        yield status["vring-num"], status["vring-num-default"]
        number += 1
