# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Finds out what a running guest has, so that the new QEMU can have the same. Changes nothing.

Private to the collection.
"""

from __future__ import annotations

import os
import typing as t
from dataclasses import dataclass, field

from ansible_collections.vmfleet.cpr.plugins.module_utils import (
    descriptors,
    hotplug,
    network,
    new_command_line,
    process,
    surroundings,
    taps,
    user_network,
)
from ansible_collections.vmfleet.cpr.plugins.module_utils.command_line import Option
from ansible_collections.vmfleet.cpr.plugins.module_utils.errors import CprError
from ansible_collections.vmfleet.cpr.plugins.module_utils.monitor import Monitor
from ansible_collections.vmfleet.cpr.plugins.module_utils.process import QemuProcess

_CONTAINERS = ("/machine/peripheral", "/machine/peripheral-anon")
# What an object says of itself that is no argument.
_NOT_ARGUMENTS = frozenset("type opened thread-id".split())
_LOST = "Connections through its user network will be lost."


@dataclass
class Description:
    """What a guest has now.

    :ivar options: the command line that would start a guest with the same devices.
    :ivar notes: what people should know beforehand, as sentences.
    :ivar images: the files of its disks that it may write to.
    """

    options: list[Option]
    running: new_command_line.Running
    notes: list[str] = field(default_factory=list)
    images: list[str] = field(default_factory=list)


async def describe(monitor: Monitor, qemu: QemuProcess, machine_type: str) -> Description:
    """Look at a guest's process and ask its monitor what it has now.

    :raises CprError: ``tap-unknown``, ``tap-unsupported``, ``device-unreadable``, or as
        `Monitor.execute`.
    """
    pid = qemu.identity.pid
    plugged = await _plugged(monitor, qemu)
    images = _check_images(qemu, plugged.nodes)
    options, notes = hotplug.applied(qemu.options, plugged)
    doubles = []
    backends = list(filter(taps.is_tap, options))
    for number, (name, option) in enumerate(zip(taps.interfaces(options, network.open_taps(pid)), backends)):
        link, dummy = await network.inspect(pid, name)
        addresses = await network.addresses(pid, name)
        doubles.append(taps.describe(link, addresses, taps.queues(option), f"cpr{pid}n{number}"))
    user_networks = await monitor.human("info usernet")
    if user_network.has_networks(user_networks):
        notes.append(_LOST)
    running = new_command_line.Running(
        machine_type=machine_type,
        listeners=descriptors.listeners(pid),
        taps=doubles,
        fd_sets=await monitor.execute("query-fdsets"),
        displays=await _optional(monitor, "query-vnc-servers", []),
        user_networks=user_networks,
        generation_id=(await _optional(monitor, "query-vm-generation-id", {})).get("guid"),
    )
    return Description(options, running, notes, images)


def _check_images(qemu: QemuProcess, nodes: t.Iterable[t.Mapping[str, t.Any]]) -> list[str]:
    """The images that the guest may write to.

    The files of the guest's disks must be those that it has open, and open again for whom it is by now.

    QEMU opens a disk again when it takes a guest over, and also when it goes on with one that
    it did not get rid of. Where it can't, the guest is down.
    """
    pid = qemu.identity.pid
    is_open = process.open_files(pid)
    around, root = surroundings.read(pid), f"{process.PROC}/{pid}/root"
    changes_user = new_command_line.changes_user(qemu.options)
    written = []
    for node in nodes:
        name = node["image"]["filename"]
        if node["drv"] not in ("file", "host_device", "host_cdrom") or name.startswith(("/dev/fdset/", "json:")):
            continue
        path = qemu.path(name)
        if process.file_id(f"{root}{path}") not in is_open:
            raise CprError(
                "image-replaced",
                f"The guest's disk {path} is another file by now than the one that it runs with: it was replaced,"
                " renamed or removed.",
                "Put the file back to its place. `ls -l /proc/PID/fd` shows what the QEMU has open.",
            )
        # Any other user's new QEMU shows it by itself when it starts, which costs the guest nothing.
        flags = os.O_RDONLY if node["ro"] else os.O_RDWR
        if changes_user and not surroundings.can_open(path, flags, around, root):
            raise CprError(
                "image-not-accessible",
                f"The guest's disk {path} can't be opened by the user that its QEMU has become (uid {around.user}).",
                "Give that user, or one of its groups, access to it: chown or chmod.",
            )
        if not node["ro"]:
            written.append(path)
    return written


async def _optional(monitor: Monitor, command: str, otherwise: t.Any) -> t.Any:
    """What a command returns, or something else where this QEMU, or this guest, has no such thing."""
    try:
        return await monitor.execute(command)
    except CprError as error:
        if error.code != "qmp-error":
            raise
        return otherwise


async def _plugged(monitor: Monitor, qemu: QemuProcess) -> hotplug.Plugged:
    usb = await _optional(monitor, "x-query-usb", {"human-readable-text": ""})
    memory = await monitor.execute("qom-get", {"path": "/machine", "property": "memory-backend"})
    return hotplug.Plugged(
        devices=await _devices(monitor),
        objects=await _objects(monitor),
        memory=memory.rpartition("/")[2],
        networks=await monitor.human("info network"),
        usb=usb["human-readable-text"],
        blocks=await monitor.execute("query-block"),
        nodes=await monitor.execute("query-named-block-nodes", {"flat": True}),
        graph=await monitor.execute("x-debug-query-block-graph"),
        chardevs=await monitor.execute("query-chardev"),
        working_directory=qemu.working_directory,
    )


async def _devices(monitor: Monitor) -> list[hotplug.Device]:
    """All devices that options or ``device_add`` have made."""
    found = []
    for container in _CONTAINERS:
        children = await monitor.execute("qom-list", {"path": container})
        types = {item["name"]: item["type"] for item in children if item["type"].startswith("child<")}
        for name in sorted(types, key=_creation):
            found.append(await _device(monitor, f"{container}/{name}", types[name][len("child<") : -1]))
    return found


def _creation(name: str) -> tuple[int, str]:
    """Sorts ``device[10]`` after ``device[9]``: the order in which those without an id were made."""
    number = name.partition("[")[2].rstrip("]")
    return (int(number) if number.isdigit() else 0, name)


async def _device(monitor: Monitor, path: str, kind: str) -> hotplug.Device:
    listed = {item["name"] for item in await monitor.execute("qom-list", {"path": path})}

    async def get(name: str) -> t.Any:
        return await monitor.execute("qom-get", {"path": path, "property": name})

    hotplugged = await get("hotplugged")
    properties = []
    if hotplugged:
        for item in await monitor.execute("device-list-properties", {"typename": kind}):
            try:
                properties.append((item["name"], item, await get(item["name"])))
            except CprError as error:
                if error.code != "qmp-error":  # one that can only be set
                    raise
    return hotplug.Device(
        path=path,
        type=kind,
        parent_bus=(await get("parent_bus") or None) if "parent_bus" in listed else None,
        hotplugged=hotplugged,
        properties=properties,
        place={key: await get(key) for key in hotplug.PLACE_KEYS if key in listed},
    )


async def _objects(monitor: Monitor) -> dict[str, dict[str, t.Any]]:
    found = {}
    for item in await monitor.execute("qom-list", {"path": "/objects"}):
        if item["type"].startswith("child<"):
            path = f"/objects/{item['name']}"
            found[item["name"]] = {"qom-type": item["type"][len("child<") : -1], **await _values(monitor, path)}
    return found


async def _values(monitor: Monitor, path: str) -> dict[str, t.Any]:
    values = {}
    for item in await monitor.execute("qom-list", {"path": path}):
        if item["name"] in _NOT_ARGUMENTS or item["type"].startswith(("child<", "link<")):
            continue
        try:
            value = await monitor.execute("qom-get", {"path": path, "property": item["name"]})
        except CprError as error:
            if error.code != "qmp-error":
                raise
            continue
        if value not in ("", None, []) and (item["name"], value) != ("hugetlbsize", 0):
            values[item["name"]] = value
    return values
