# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A guest's tap interfaces and their doubles for the new QEMU.

Two QEMUs can't use one tap: with one queue the second is refused, with several the packets
are shared out between both. So the new QEMU gets a second tap in the same bridge, set up like
the first, and QEMU's announcement after the switch sends the bridge's traffic there. Once the
old QEMU is gone the second takes the first one's name.

Pure functions. Private to the collection.
"""

from __future__ import annotations

import dataclasses
import typing as t
from dataclasses import dataclass

from ansible_collections.vmfleet.cpr.plugins.module_utils.command_line import Option, Properties, read_properties
from ansible_collections.vmfleet.cpr.plugins.module_utils.errors import CprError

# Of QEMU's tap and bridge backends: what a tap that is opened already must not be given (net/tap.c).
_OPENING_KEYS = frozenset(
    "ifname script downscript br helper queues vnet_hdr fd fds vhostfd vhostfds".split(),
)
# What `bridge link` shows of a port and can be set by the same word. The rest is computed.
_PORT_SETTINGS = (
    "hairpin guard root_block fastleave learning flood mcast_flood bcast_flood mcast_router mcast_to_unicast"
    " neigh_suppress vlan_tunnel isolated locked priority cost"
).split()
# Queue disciplines without classes, whose whole state is their parameters.
_QUEUE_DISCIPLINES = frozenset("tbf pfifo bfifo pfifo_fast fq fq_codel codel sfq red netem cake pie".split())


@dataclass(frozen=True)
class Tap:
    """A tap and its double.

    :ivar name: the interface that the guest has now, and will have.
    :ivar temporary: the double's name during the update.
    :ivar queues: how many descriptors the guest has of it.
    :ivar persistent: whether it stays when no process has it open.
    :ivar owner: the user who may open it, where one was set.
    :ivar addresses: MAC addresses that somebody has bound to it in the bridge, each with its VLAN;
        they are the double's from the switch on.
    """

    name: str
    temporary: str
    queues: int
    multi_queue: bool
    vnet_header: bool
    persistent: bool
    owner: int | None = None
    group: int | None = None
    addresses: t.Sequence[tuple[str, int | None]] = ()


@dataclass(frozen=True)
class Settings:
    """What two taps must have alike.

    :ivar link: words of ``ip link set``.
    :ivar port: settings of its place in the bridge.
    :ivar vlans: pairs of a VLAN, or a range, and its flags.
    :ivar queue_discipline: words of ``tc qdisc``, empty for the kernel's own choice.
    """

    bridge: str
    link: tuple[tuple[str, str], ...]
    port: dict[str, t.Any]
    vlans: tuple[tuple[str, tuple[str, ...]], ...]
    queue_discipline: tuple[str, ...]
    up: bool


def settings_of(data: t.Mapping[str, t.Any]) -> Settings:
    """Settings that were written as JSON, which has lists only."""
    return Settings(
        bridge=data["bridge"],
        link=tuple((key, value) for key, value in data["link"]),
        port=dict(data["port"]),
        vlans=tuple((vlan, tuple(flags)) for vlan, flags in data["vlans"]),
        queue_discipline=tuple(data["queue_discipline"]),
        up=data["up"],
    )


def named(tap: Tap) -> Tap:
    """A tap that is no double: it has its own name from the start."""
    return dataclasses.replace(tap, temporary=tap.name)


def is_tap(option: Option) -> bool:
    """Whether the option makes a network backend that is a tap."""
    return option.name in ("netdev", "nic", "net") and _kind(read_properties(option)) in ("tap", "bridge")


def _kind(properties: Properties) -> str | None:
    return properties.implied or properties.get("type")


def interfaces(options: t.Sequence[Option], open_taps: t.Mapping[int, str]) -> list[str]:
    """The interface of each tap backend of a command line, in order.

    :param open_taps: the interface names by the old QEMU's descriptors.
    :raises CprError: ``tap-unknown`` where it can't be told.
    """
    found: list[str | None] = []
    for option in filter(is_tap, options):
        properties = read_properties(option)
        first = (properties.get("fd") or properties.get("fds") or "").split(":")[0]
        name = open_taps.get(int(first)) if first.isdigit() else properties.get("ifname")
        found.append(name if name in open_taps.values() else None)
    # Those that QEMU or its helper named: it opens them in the order of the command line.
    unnamed = [name for dummy, name in sorted(open_taps.items()) if name not in found]
    unnamed = list(dict.fromkeys(unnamed))
    if len(unnamed) != found.count(None):
        raise CprError(
            "tap-unknown",
            f"It can't be told which of the network interfaces {', '.join(unnamed) or '(none)'} belongs to which of"
            " the guest's tap backends.",
            "Leave this guest out of live_update_guests.",
        )
    return [name if name is not None else unnamed.pop(0) for name in found]


def describe(
    link: t.Mapping[str, t.Any], addresses: t.Sequence[t.Mapping[str, t.Any]], queues: int, temporary: str
) -> Tap:
    """A tap from what ``ip -json -details link`` says of it.

    :param addresses: ``bridge -json fdb show dev``.
    :raises CprError: ``tap-unsupported`` for an interface of another kind, or outside of a bridge.
    """
    name = link["ifname"]
    details = link.get("linkinfo", {})
    data = details.get("info_data", {})
    if details.get("info_kind") != "tun" or data.get("type") != "tap":
        kind = details.get("info_kind", "of an unknown kind")
        raise _unsupported(name, f"it is {kind}, and only a tap can be doubled")
    if details.get("info_slave_kind") != "bridge":
        master = f"belongs to {link['master']}, which is no Linux bridge" if "master" in link else "is in no bridge"
        raise _unsupported(name, f"it {master}, so that a second one would not get its packets")
    return Tap(
        name=name,
        temporary=temporary,
        queues=queues,
        multi_queue=bool(data.get("multi_queue")),
        vnet_header=bool(data.get("vnet_hdr")),
        persistent=bool(data.get("persist")),
        owner=_number(data.get("user")),
        group=_number(data.get("group")),
        addresses=[
            (item["mac"], item.get("vlan"))
            for item in addresses
            if item.get("state") in ("static", "permanent") and "master" in item and item["mac"] != link["address"]
        ],
    )


def _number(value: t.Any) -> int | None:
    return int(value) if str(value).isdigit() else None


def _unsupported(name: str, why: str) -> CprError:
    return CprError(
        "tap-unsupported",
        f"The guest's network interface {name} can't be handed over: {why}.",
        "Put it into a bridge, or leave this guest out of live_update_guests.",
    )


def read_settings(
    link: t.Mapping[str, t.Any],
    ports: t.Sequence[t.Mapping[str, t.Any]],
    vlans: t.Sequence[t.Mapping[str, t.Any]],
    queue_disciplines: str,
) -> Settings:
    """What one tap has, from the answers of ip, bridge and tc.

    :param ports: ``bridge -json -details link show dev``.
    :param vlans: ``bridge -json vlan show dev``.
    :param queue_disciplines: ``tc qdisc show dev``.
    :raises CprError: ``tap-unsupported`` for a queue discipline with classes or filters.
    """
    words = {"address": link["address"], "mtu": str(link["mtu"]), "txqueuelen": str(link.get("txqlen", 1000))}
    if link.get("ifalias"):
        words["alias"] = link["ifalias"]
    if link.get("group", "default") != "default":
        words["group"] = str(link["group"])
    port = {key: value for item in ports[:1] for key, value in item.items() if key in _PORT_SETTINGS}
    return Settings(
        bridge=link.get("master", ""),
        link=tuple(words.items()),
        port=port,
        vlans=tuple(_vlan(item) for entry in vlans[:1] for item in entry.get("vlans", ())),
        queue_discipline=_queue_discipline(link["ifname"], queue_disciplines),
        up="UP" in link["flags"],
    )


def _vlan(item: t.Mapping[str, t.Any]) -> tuple[str, tuple[str, ...]]:
    vlan = str(item["vlan"]) + (f"-{item['vlanEnd']}" if "vlanEnd" in item else "")
    names = {"PVID": "pvid", "Egress Untagged": "untagged"}
    return vlan, tuple(names[flag] for flag in item.get("flags", ()) if flag in names)


def _queue_discipline(name: str, text: str) -> tuple[str, ...]:
    """What follows ``root`` in ``tc qdisc add``, from what ``tc qdisc show`` prints."""
    result: tuple[str, ...] = ()
    for line in text.splitlines():
        dummy, kind, handle, place, *words = line.split()
        if handle == "0:":
            continue  # the kernel's own choice has no handle
        if place != "root" or kind not in _QUEUE_DISCIPLINES:
            raise _unsupported(name, f"its queue discipline {kind} has classes or filters, which are not copied")
        if words[:1] == ["refcnt"]:
            words = words[2:]
        result = (kind, *_settable(words))
    return result


def _settable(words: t.Sequence[str]) -> t.Iterator[str]:
    """The words as tc takes them, which prints some in another form."""
    for previous, word in zip(("", *words), words):
        if word == "lat":
            yield "latency"
        elif previous == "limit" and word[-1:] in "pb":
            yield word[:-1]
        else:
            yield word


def create_commands(settings: Settings, temporary: str) -> list[list[str]]:
    """What makes a new tap, which is in no bridge yet, like the first one; run in this order."""
    commands = [["ip", "link", "set", "dev", temporary, key, value] for key, value in settings.link]
    commands.append(["ip", "link", "set", "dev", temporary, "master", settings.bridge])
    if settings.queue_discipline:
        commands.append(["tc", "qdisc", "add", "dev", temporary, "root", *settings.queue_discipline])
    return commands


def adapt_commands(wanted: Settings, present: Settings, temporary: str) -> list[list[str]]:
    """What is left to do once it is in the bridge, and has what the bridge gives every port."""
    commands = []
    for key, value in wanted.port.items():
        if present.port.get(key) != value:
            word = ("on" if value else "off") if isinstance(value, bool) else str(value)
            commands.append(["bridge", "link", "set", "dev", temporary, key, word])
    for vlan, dummy in present.vlans:
        if vlan not in dict(wanted.vlans):
            commands.append(["bridge", "vlan", "del", "dev", temporary, "vid", vlan])
    for vlan, flags in wanted.vlans:
        if (vlan, flags) not in present.vlans:
            commands.append(["bridge", "vlan", "add", "dev", temporary, "vid", vlan, *flags])
    if wanted.up:
        commands.append(["ip", "link", "set", "dev", temporary, "up"])
    return commands


def differences(wanted: Settings, present: Settings) -> list[str]:
    """What the second tap has otherwise than the first, each with both values."""
    return [
        f"{key} is {getattr(present, key)!r} and not {value!r}"
        for key, value in vars(wanted).items()
        if getattr(present, key) != value
    ]


def with_descriptors(option: Option, numbers: t.Sequence[int], vhost_numbers: t.Sequence[int]) -> Option:
    """A tap backend that uses opened descriptors.

    :param vhost_numbers: descriptors of ``/dev/vhost-net``, where it had such before.
    """
    properties = read_properties(option)
    pairs: list[tuple[str | None, str]] = [(None, "tap")]
    rest = properties.pairs[1:] if properties.implied else properties.pairs
    pairs += [pair for pair in rest if pair[0] not in ("type", *_OPENING_KEYS)]
    plural = "s" if len(numbers) > 1 else ""
    pairs.append((f"fd{plural}", ":".join(map(str, numbers))))
    if vhost_numbers:
        pairs.append((f"vhostfd{plural}", ":".join(map(str, vhost_numbers))))
    return Option(option.flag, str(Properties(pairs)))


def with_interface(option: Option, tap: Tap) -> Option:
    """A tap backend that opens an interface which is there already, by its name."""
    properties = read_properties(option)
    rest = properties.pairs[1:] if properties.implied else properties.pairs
    pairs: list[tuple[str | None, str]] = [(None, "tap")]
    pairs += [pair for pair in rest if pair[0] not in ("type", *_OPENING_KEYS)]
    pairs += [("ifname", tap.name), ("script", "no"), ("downscript", "no")]
    if tap.queues > 1:
        pairs.append(("queues", str(tap.queues)))
    return Option(option.flag, str(Properties(pairs)))


def queues(option: Option) -> int:
    """How many queues a tap backend has."""
    properties = read_properties(option)
    descriptors = properties.get("fds")
    return descriptors.count(":") + 1 if descriptors else int(properties.get("queues") or 1)


def has_vhost_descriptors(option: Option) -> bool:
    """Whether a tap backend was given vhost descriptors, which serve one process only."""
    properties = read_properties(option)
    return bool(properties.get("vhostfd") or properties.get("vhostfds"))
