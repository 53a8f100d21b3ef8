# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Character devices of a command line: their short forms written out, their ports handed over.

A port can't be bound twice. The new QEMU gets the old one's listening socket itself: whoever
connects is served by one of the two, and by the new one alone once the old one is gone.

Pure functions. Private to the collection.
"""

from __future__ import annotations

import dataclasses
import re
import typing as t

from ansible_collections.vmfleet.cpr.plugins.module_utils.command_line import Option, Properties, read_properties
from ansible_collections.vmfleet.cpr.plugins.module_utils.errors import CprError

# Options whose argument describes a character device in QEMU's short form.
SHORT_FORMS = ("qmp", "qmp-pretty", "monitor", "serial", "parallel", "debugcon", "gdb")
_MONITOR_MODES = {"monitor": "readline", "qmp": "control", "qmp-pretty": "control"}
_NETWORK = re.compile(r"^(mon:)?(tcp|telnet|tn3270|websocket):([^,]*):([^,:]*)(?:,(.*))?$", re.DOTALL)
_UNIX = re.compile(r"^mon:unix:([^,]*)(?:,(.*))?$", re.DOTALL)
# Where a socket listens: what a descriptor stands for instead.
_ADDRESS_KEYS = ("host", "port", "to", "ipv4", "ipv6", "path", "abstract", "tight", "fd", "reuseaddr", "mptcp")


@dataclasses.dataclass(frozen=True)
class Listener:
    """A listening socket of a process.

    :ivar descriptor: its number there.
    :ivar port: of TCP, or None.
    :ivar host: the address of that port.
    :ivar name: of an abstract UNIX socket, or None.
    """

    descriptor: int
    port: int | None = None
    name: str | None = None
    host: str | None = None


def write_out(options: t.Sequence[Option]) -> list[Option]:
    """The options with every short form that opens a port, or shares a socket, as a ``-chardev`` of its own."""
    result: list[Option] = []
    numbers: dict[str, int] = {}
    for option in options:
        name = option.name
        if name == "s":
            name, option = "gdb", Option("-gdb", "tcp::1234")
        kind = "cpr_monitor" if name in _MONITOR_MODES else name
        number = numbers.get(kind, 0)
        numbers[kind] = number + 1
        socket = _socket(option.value or "") if name in SHORT_FORMS else None
        if socket is None:
            result.append(option)
            continue
        # As QEMU itself calls them (chardev/char.c), but for monitors: those it counts anew without this one.
        identity = kind if kind in ("gdb", "debugcon") else f"{kind}{number}"
        properties, is_mux = socket
        pairs: list[tuple[str | None, str]] = [(None, "socket"), ("id", identity), *properties]
        if name == "gdb" and ("server", "on") not in pairs:  # QEMU adds it there (gdbstub/system.c)
            pairs += [("server", "on"), ("wait", "off")]
        result.append(Option("-chardev", str(Properties([*pairs, ("mux", "on")] if is_mux else pairs))))
        if name in _MONITOR_MODES or is_mux:
            monitor: list[tuple[str | None, str]] = [
                ("chardev", identity),
                ("mode", _MONITOR_MODES.get(name, "readline")),
            ]
            result.append(
                Option("-mon", str(Properties([*monitor, ("pretty", "on")] if name == "qmp-pretty" else monitor)))
            )
        if name not in _MONITOR_MODES:
            result.append(Option(option.flag, f"chardev:{identity}"))
    return result


def _socket(value: str) -> tuple[list[tuple[str | None, str]], bool] | None:
    """The properties of the socket that a short form describes, and whether a monitor shares it."""
    network, unix = _NETWORK.match(value), _UNIX.match(value)
    if network:
        mux, kind, host, port, rest = network.groups()
        pairs: list[tuple[str | None, str]] = [("host", host), ("port", port)]
        if kind != "tcp":
            pairs.append((kind, "on"))
    elif unix:
        mux, pairs, rest = "mon:", [("path", unix.group(1))], unix.group(2)
    else:
        return None
    return pairs + _long_forms(Properties.read(rest or "")), bool(mux)


def _long_forms(properties: Properties) -> list[tuple[str | None, str]]:
    """``server,nowait`` as ``server=on,wait=off``."""
    pairs: list[tuple[str | None, str]] = []
    for key, text in properties.pairs:
        if key is None:
            key, text = (text[2:], "off") if text.startswith("no") and text != "nodelay" else (text, "on")
        pairs.append((key, text))
    return pairs


def with_listener(option: Option, listeners: t.Sequence[Listener], descriptor: t.Callable[[int], int]) -> Option:
    """A ``-chardev`` that listens at a port, or has none to show, with the old QEMU's own socket.

    :param descriptor: gives the number that a descriptor of the old QEMU has in the new one.
    :raises CprError: ``unsupported-option`` where there is not one such socket.
    """
    properties = read_properties(option) if option.name == "chardev" else Properties([])
    if (properties.implied or properties.get("backend")) != "socket" or not properties.is_on("server"):
        return option
    if properties.get("path") and not properties.is_on("abstract"):
        return option
    found = _listeners_of(properties, listeners)
    if len(found) != 1:
        raise CprError(
            "unsupported-option",
            f"The guest's command line has the option {option.flag} {option.value}, and the running QEMU has"
            f" {len(found)} listening sockets for it; one can be handed over.",
            "Give it one address (host=127.0.0.1) when the guest next starts, or leave this guest out of"
            " live_update_guests.",
        )
    pairs = [pair for pair in properties.pairs if pair[0] not in _ADDRESS_KEYS]
    pairs.append(("fd", str(descriptor(found[0].descriptor))))
    return Option(option.flag, str(without_wait(Properties(pairs))))


def with_address(option: Option, listeners: t.Sequence[Listener]) -> Option:
    """A ``-chardev`` that an earlier update gave a listening socket, with that socket's address instead."""
    properties = read_properties(option) if option.name == "chardev" else Properties([])
    if properties.get("fd") is None or not properties.is_on("server"):
        return option
    found = [item for item in listeners if str(item.descriptor) == properties.get("fd")]
    pairs = [pair for pair in properties.pairs if pair[0] != "fd"]
    for item in found:
        if item.name is not None:
            pairs += [("path", item.name), ("abstract", "on")]
        else:
            pairs += [("host", str(item.host)), ("port", str(item.port))]
    return Option(option.flag, str(Properties(pairs))) if found else option


def _listeners_of(properties: Properties, listeners: t.Sequence[Listener]) -> list[Listener]:
    number, port = properties.get("fd"), properties.get("port")
    if number:
        return [item for item in listeners if str(item.descriptor) == number]
    if port:
        return [item for item in listeners if str(item.port) == port]
    path = properties.get("path")
    return [item for item in listeners if path is not None and item.name == path]


def without_wait(properties: Properties) -> Properties:
    """A server socket that does not wait for a client, as QEMU by default does.

    The client that the old QEMU waited for is connected to that one; the new one would never
    start.
    """
    pairs = [pair for pair in properties.pairs if pair not in ((None, "wait"), (None, "nowait"))]
    return Properties(pairs).with_value("wait", "off")


def uses_standard_streams(options: t.Iterable[Option]) -> bool:
    """Whether a character device reads and writes the process's own standard input and output."""
    listed = list(options)
    for option in listed:
        value = option.value or ""
        if option.name in SHORT_FORMS and value in ("stdio", "mon:stdio"):
            return True
        if option.name == "chardev" and read_properties(option).implied == "stdio":
            return True
    names = {option.name for option in listed}
    # -nographic puts there what is not put elsewhere (system/vl.c, qemu_create_default_devices).
    has_serial, has_monitor = "serial" in names, bool(names & {"monitor", "mon", *_MONITOR_MODES})
    return "nographic" in names and "nodefaults" not in names and not (has_serial and has_monitor)
