# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What was plugged in or out since a guest's start, put into its command line.

QEMU tells most of what its devices are by QOM, its disks by the block graph, and of its
networks and character devices only a line of text. What can't be told is refused.

Pure functions. Private to the collection.
"""

from __future__ import annotations

import json
import os
import re
import typing as t
from dataclasses import dataclass, field

from ansible_collections.vmfleet.cpr.plugins.module_utils.command_line import (
    Option,
    Properties,
    read_properties,
    with_property,
)
from ansible_collections.vmfleet.cpr.plugins.module_utils.errors import CprError

# Named by device-list-properties, and refused as arguments (QEMU 10.0, 11.1).
_NOT_SETTABLE = frozenset("busnr attached guest-stats".split())
# Of a processor: its place is all that is its own, the rest is the -cpu of all.
_PROCESSOR_KEYS = frozenset("socket-id die-id cluster-id module-id core-id thread-id node-id".split())
_NOT_LISTED = ""
# Where a device is on its bus: chosen by QEMU in the order of creation where nobody says it.
PLACE_KEYS = ("addr", "slot", "scsi-id", "lun", "nr", "unit")
_NETWORK = re.compile(r"(?P<id>[^\s:]+): index=\d+,type=(?P<type>[\w-]+),(?P<rest>.*)$")
_USB = re.compile(r"^\s*Device [\d.]+, Port (?P<port>[\d.]+), .*, ID: (?P<id>\S+)\s*$")


@dataclass(frozen=True)
class Device:
    """A device that a ``-device`` or ``device_add`` has made.

    :ivar path: in QOM, below ``/machine/peripheral`` or ``/machine/peripheral-anon``.
    :ivar parent_bus: the path of its bus, or None for what is on none (memory, processors).
    :ivar hotplugged: whether it came after the guest's start.
    :ivar properties: what ``device-list-properties`` and ``qom-get`` say of one that is
        hotplugged: triples of name, description and value.
    :ivar place: the values of `PLACE_KEYS`, as far as it has them.
    """

    path: str
    type: str
    parent_bus: str | None
    hotplugged: bool
    properties: t.Sequence[tuple[str, t.Mapping[str, t.Any], t.Any]] = ()
    place: t.Mapping[str, t.Any] = field(default_factory=dict)

    @property
    def id(self) -> str | None:
        """Its id, or None without one."""
        directory, dummy, name = self.path.rpartition("/")
        return name if directory == "/machine/peripheral" else None

    @property
    def bus(self) -> str | None:
        """The name of its bus."""
        return self.parent_bus.rpartition("/")[2] if self.parent_bus else None


@dataclass(frozen=True)
class Plugged:
    """What a guest has now.

    :ivar objects: of ``/objects``, by id: the type and properties.
    :ivar memory: the object that is the guest's RAM; QEMU makes one itself where no option names one.
    :ivar networks: what ``info network`` prints.
    :ivar usb: what ``x-query-usb`` prints.
    :ivar blocks: what ``query-block`` returned.
    :ivar nodes: what ``query-named-block-nodes`` returned.
    :ivar graph: what ``x-debug-query-block-graph`` returned.
    :ivar chardevs: what ``query-chardev`` returned.
    :ivar working_directory: to which relative paths of the command line belong.
    """

    devices: t.Sequence[Device] = ()
    objects: t.Mapping[str, t.Mapping[str, t.Any]] = field(default_factory=dict)
    memory: str = ""
    networks: str = ""
    usb: str = ""
    blocks: t.Sequence[t.Mapping[str, t.Any]] = ()
    nodes: t.Sequence[t.Mapping[str, t.Any]] = ()
    graph: t.Mapping[str, t.Any] = field(default_factory=dict)
    chardevs: t.Sequence[t.Mapping[str, t.Any]] = ()
    working_directory: str = "/"


def applied(options: t.Sequence[Option], now: Plugged) -> tuple[list[Option], list[str]]:
    """The options of a QEMU that has from its start what the running one has now.

    :returns: also notes for people: what could not be read and has QEMU's default.
    :raises CprError: ``device-unreadable`` for what can't be carried over.
    """
    return _Change(options, now).result()


class _Change:
    """The work of `applied`, a step a method."""

    def __init__(self, options: t.Sequence[Option], now: Plugged) -> None:
        self.options = list(options)
        self.now = now
        self.notes: list[str] = []
        self.added: list[Option] = []
        self.by_id = {device.id: device for device in now.devices if device.id}
        self.drives = _drives(now.blocks)
        self.renamed: dict[str, str] = {}

    def result(self) -> tuple[list[Option], list[str]]:
        self._drop_what_is_gone()
        self._change_media()
        self._add_objects()
        self._follow_drives()
        self._add_devices()
        return [*self.options, *self.added], self.notes

    # What is gone

    def _drop_what_is_gone(self) -> None:
        devices = [option for option in self.options if option.name == "device"]
        anonymous = [option for option in devices if not read_properties(option).get("id")]
        present = [device for device in self.now.devices if not device.id and not device.hotplugged]
        if len(present) < len(anonymous):
            raise _unreadable("a device without an id was unplugged, and it can't be told which")
        gone = [option for option in devices if self._is_gone(option)]
        kept = []
        for option in self.options:
            identity = read_properties(option).get("id") if option.value else None
            if option.name == "device" and option in gone:
                continue
            if option.name == "netdev" and not re.search(rf"(^|[\s\\]){re.escape(str(identity))}:", self.now.networks):
                continue
            if option.name == "object" and identity not in self.now.objects:
                continue
            kept.append(option)
        self.options = kept
        if gone:
            self.options = [self._pinned(option) if option.name == "device" else option for option in kept]

    def _is_gone(self, option: Option) -> bool:
        """Unplugged, or unplugged and another one plugged in with its id."""
        identity = read_properties(option).get("id")
        return bool(identity) and (identity not in self.by_id or self.by_id[identity].hotplugged)

    def _pinned(self, option: Option) -> Option:
        """The device at its present place: without the one that is gone QEMU would move it up."""
        device = self._device_of(option)
        if device is None:
            raise _unreadable(f"it can't be told which of its devices is {option.value}")
        given = read_properties(option)
        for key, value in self._place(device).items():
            if given.get(key) is None:
                option = with_property(option, key, value)
        return option

    def _device_of(self, option: Option) -> Device | None:
        identity = read_properties(option).get("id")
        if identity:
            return self.by_id.get(identity)
        anonymous = [item for item in self.options if item.name == "device" and not read_properties(item).get("id")]
        # QEMU makes those in key=value syntax first (system/vl.c, qemu_create_cli_devices).
        anonymous.sort(key=lambda item: (item.value or "").startswith("{"))
        present = [device for device in self.now.devices if not device.id and not device.hotplugged]
        if len(present) != len(anonymous):
            return None  # QEMU's own for a -drive if=virtio and the like are among them
        number = next(index for index, item in enumerate(anonymous) if item is option)
        driver = read_properties(option).implied or read_properties(option).get("driver")
        return present[number] if present[number].type in (driver, f"{driver}-pci") else None

    def _place(self, device: Device) -> dict[str, t.Any]:
        place = {key: value for key, value in device.place.items() if value is not None}
        if "addr" in place and device.parent_bus:  # of PCI: slot and function in one number
            place["addr"] = f"{place['addr'] >> 3:x}.{place['addr'] & 7:x}" if place["addr"] >= 0 else None
        port = _usb_ports(self.now.usb).get(device.id or "")
        if port:
            place["port"] = port
        return {key: value for key, value in place.items() if value is not None and value != -1}

    # Disks

    def _change_media(self) -> None:
        """Give ``-drive`` and its short forms the image that is there now."""
        present = {block["device"]: block for block in self.now.blocks if block["device"]}
        nodes = {node["node-name"] for node in self.now.nodes}
        kept = []
        for number, option in enumerate(self.options):
            if option.name == "blockdev" and read_properties(option).get("node-name") not in nodes:
                continue  # removed since
            if option.name == "drive":
                identity = read_properties(option).get("id")
                if identity and identity not in present:
                    continue
                block = present.get(identity) if identity else None
                option = self._with_medium(option, block) if block else option
            elif option.name == "cdrom":
                option = self._with_cdrom(option, present.get("ide2-cd0") or present.get("ide1-cd0"))
            kept.append(option)
        self.options = kept

    def _with_medium(self, option: Option, block: t.Mapping[str, t.Any]) -> Option:
        given = read_properties(option)
        medium = block.get("inserted")
        if medium is None:
            return with_property(with_property(option, "file", None), "format", None)
        if given.get("file") is None or self._is_same(str(given.get("file")), medium["file"]):
            return option
        if medium["file"].startswith("json:"):
            return option  # the comparison of both QEMUs' disks says it if that is wrong
        option = with_property(with_property(option, "driver", None), "file", medium["file"])
        return with_property(option, "format", medium["drv"])

    def _with_cdrom(self, option: Option, block: t.Mapping[str, t.Any] | None) -> Option:
        if block is None:
            return option
        medium = block.get("inserted")
        if medium is None:
            return Option("-drive", "media=cdrom,index=2")
        return option if self._is_same(option.value or "", medium["file"]) else Option(option.flag, medium["file"])

    def _is_same(self, given: str, present: str) -> bool:
        def whole(path: str) -> str:
            return os.path.normpath(os.path.join(self.now.working_directory, path))

        return given == present or whole(given) == whole(present)

    def _follow_drives(self) -> None:
        """Give the devices of the command line the disks that they have now."""
        for index, option in enumerate(self.options):
            device = self._device_of(option) if option.name == "device" else None
            if device is None:
                continue
            given, present = read_properties(option).get("drive"), self._drive_of(device)
            if present in (given, _NOT_LISTED) or present is None and given is None:
                continue
            self.options[index] = with_property(option, "drive", present and self._need_drive(present))

    def _drive_of(self, device: Device) -> str | None:
        """Its disk, None for a drive without a medium, or `_NOT_LISTED` for what is no drive."""
        for path, name in self.drives.items():
            if path in (device.path, device.id) or path.startswith(f"{device.path}/"):
                return name
        return _NOT_LISTED

    def _need_drive(self, name: str) -> str:
        """Make sure that the command line has this disk; the name that it has there."""
        given = {read_properties(option).get("id") for option in self.options + self.added if option.name == "drive"}
        nodes = self._given_nodes()
        if name in given or name in nodes:
            return name
        block = next((item for item in self.now.blocks if item["device"] == name), None)
        if block:
            self.added.append(_drive(name, block))
        else:
            name = self.renamed.setdefault(name, f"cpr-{name[1:]}" if name.startswith("#") else name)
            if name not in self._given_nodes():
                original = next(old for old, new in self.renamed.items() if new == name)
                tree = {**self._node(original), "node-name": name}
                self.added.append(Option("-blockdev", json.dumps(tree, separators=(",", ":"))))
        self.notes.append(
            f"Of its disk {name}, which came after the start, discard, aio and locking can't be read: it has QEMU's"
            " defaults."
        )
        return name

    def _given_nodes(self) -> set[str | None]:
        return {read_properties(item).get("node-name") for item in self.options + self.added if item.name == "blockdev"}

    def _node(self, name: str) -> dict[str, t.Any]:
        """A block node as the argument of ``-blockdev``, with all below it."""
        node = next((item for item in self.now.nodes if item["node-name"] == name), None)
        if node is None:
            raise _unreadable(f"the block node {name} is not described by QEMU")
        names = {item["id"]: item["name"] for item in self.now.graph["nodes"] if item["type"] == "block-driver"}
        children = {
            edge["name"]: names[edge["child"]]
            for edge in self.now.graph["edges"]
            if names.get(edge["parent"]) == name and edge["child"] in names
        }
        filename = node["image"]["filename"]
        tree: dict[str, t.Any] = {"driver": node["drv"]}
        if filename.startswith("json:"):
            tree.update((k, v) for k, v in json.loads(filename[5:]).items() if k != "driver" and k not in children)
        elif not children:
            tree["filename"] = filename
        for role, child in children.items():
            tree[role] = child if child in self._given_nodes() else self._node(child)
        if "backing_file_depth" in node and "backing" not in tree and node["drv"] in ("qcow2", "qed", "vmdk"):
            tree["backing"] = None
        if node["ro"]:
            tree["read-only"] = True
        if node["detect_zeroes"] != "off":
            tree["detect-zeroes"] = node["detect_zeroes"]
        cache = {key: True for key in ("direct", "no-flush") if node["cache"][key]}
        return {**tree, "cache": cache} if cache else tree

    # What is new

    def _add_objects(self) -> None:
        given = {read_properties(option).get("id") for option in self.options if option.name == "object"}
        for identity, values in self.now.objects.items():
            if identity in (*given, self.now.memory) or str(values["qom-type"]).startswith("monitor-"):
                continue
            if "secret" in str(values["qom-type"]):
                raise _unreadable(f"the secret {identity} was added, and its data would stand in the command line")
            self.added.append(Option("-object", json.dumps({**values, "id": identity}, separators=(",", ":"))))

    def _add_devices(self) -> None:
        waiting = [device for device in self.now.devices if device.hotplugged]
        while waiting:
            # A bus before what is on it.
            paths = [device.path for device in waiting]
            device = next(
                item
                for item in waiting
                if not any((item.parent_bus or "").startswith(f"{path}/") for path in paths if path != item.path)
            )
            waiting.remove(device)
            arguments = self._arguments(device)
            self.added.append(Option("-device", json.dumps(arguments, separators=(",", ":"))))

    def _arguments(self, device: Device) -> dict[str, t.Any]:
        arguments: dict[str, t.Any] = {"driver": device.type}
        if device.id:
            arguments["id"] = device.id
        if device.bus:
            arguments["bus"] = device.bus
        names = {name for name, dummy, dummy in device.properties}
        for name, description, value in device.properties:
            if _is_given(device, name, description, value):
                arguments[name] = value
        arguments.update(self._place(device) if "addr" in names or device.bus else {})
        if "drive" in names:
            drive = self._drive_of(device)
            arguments.pop("drive", None)
            if drive not in (None, _NOT_LISTED):
                arguments["drive"] = self._need_drive(drive)
        if arguments.get("netdev"):
            self._need_network(arguments["netdev"])
        if arguments.get("chardev"):
            self._need_chardev(arguments["chardev"])
        if {"port", "msos-desc"} <= names and "port" not in arguments:
            raise _unreadable(f"the USB device {device.path} has no id, and its port can't be told")
        return arguments

    def _need_network(self, name: str) -> None:
        given = {read_properties(option).get("id") for option in self.options + self.added if option.name == "netdev"}
        if name in given:
            return
        kind, rest = _networks(self.now.networks).get(name, ("", ""))
        details = Properties.read(rest)
        if kind in ("tap", "bridge"):
            properties = [(None, "tap"), ("id", name)]
            properties += [(key, text) for key in ("ifname", "fd") for text in [details.get(key)] if text]
        elif kind == "user" and details.get("net") == "10.0.2.0":
            properties = [(None, "user"), ("id", name), ("restrict", details.get("restrict") or "off")]
        else:
            raise _unreadable(f"the network {name} was added, and QEMU does not tell how it is set up ({kind} {rest})")
        self.added.append(Option("-netdev", str(Properties(properties))))
        self.notes.append(f"Of its network {name}, which came after the start, only what QEMU tells was carried over.")

    def _need_chardev(self, name: str) -> None:
        given = {read_properties(option).get("id") for option in self.options + self.added if option.name == "chardev"}
        if name in given:
            return
        found = next((item["filename"] for item in self.now.chardevs if item["label"] == name), "")
        match = re.match(r"(?:disconnected:)?unix:(?P<path>/.*),server=on$", found)
        if not match:
            raise _unreadable(f"the character device {name} was added, and QEMU does not tell how it is set up")
        pairs = [(None, "socket"), ("id", name), ("path", match.group("path")), ("server", "on"), ("wait", "off")]
        self.added.append(Option("-chardev", str(Properties(pairs))))


def _is_given(device: Device, name: str, description: t.Mapping[str, t.Any], value: t.Any) -> bool:
    """Whether a property of a device must stand among its arguments."""
    kind = description["type"]
    if device.type.endswith("-cpu"):
        return name in _PROCESSOR_KEYS and value not in (None, -1)
    if kind.startswith("child<") or name in _NOT_SETTABLE or name in PLACE_KEYS and device.bus:
        return False
    if device.type in ("pc-dimm", "nvdimm") and name == "size":
        return False
    if kind.startswith("link<"):
        return isinstance(value, str) and value.startswith(("/objects/", "/machine/peripheral/"))
    if "default-value" in description and description["default-value"] == value:
        return False
    # An empty romfile must be said: without it the class's own comes back.
    return name == "romfile" or value not in ("", None, [])


def _drives(blocks: t.Iterable[t.Mapping[str, t.Any]]) -> dict[str, str | None]:
    """Device paths, or ids, and the disk that each has: a drive's id, a node's name, or None for no medium."""
    return {
        block["qdev"]: block["device"] or (block.get("inserted") or {}).get("node-name")
        for block in blocks
        if block.get("qdev")
    }


def _drive(name: str, block: t.Mapping[str, t.Any]) -> Option:
    medium = block.get("inserted")
    if medium is None:
        return Option("-drive", str(Properties([("if", "none"), ("id", name), ("media", "cdrom")])))
    pairs: list[tuple[str | None, str]] = [
        ("if", "none"),
        ("id", name),
        ("file", medium["file"]),
        ("format", medium["drv"]),
        ("readonly", "on" if medium["ro"] else "off"),
    ]
    pairs += [(f"cache.{key}", "on") for key in ("direct", "no-flush") if medium["cache"][key]]
    return Option("-drive", str(Properties(pairs)))


def _networks(text: str) -> dict[str, tuple[str, str]]:
    """The type and the details of each network backend, by its id."""
    found = {}
    for line in text.splitlines():
        match = _NETWORK.search(line.strip())
        if match and match.group("type") != "nic":
            found[match.group("id")] = match.group("type"), match.group("rest")
    return found


def _usb_ports(text: str) -> dict[str, str]:
    """The port of each USB device that has an id."""
    matches = [match for match in map(_USB.match, text.splitlines()) if match]
    return {match.group("id"): match.group("port") for match in matches}


def _unreadable(why: str) -> CprError:
    return CprError(
        "device-unreadable",
        f"The guest's devices were changed since its start, and {why}.",
        "Unplug it, or leave this guest out of live_update_guests until it is next started.",
    )
