# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A guest's VNC display, whose port is handed over once the old QEMU is gone.

Pure functions. Private to the collection.
"""

from __future__ import annotations

import typing as t

from ansible_collections.vmfleet.cpr.plugins.module_utils.command_line import Option, Properties, read_properties
from ansible_collections.vmfleet.cpr.plugins.module_utils.errors import CprError

_ADDRESS_KEYS = ("to", "ipv4", "ipv6", "reverse", "websocket")


def without_port(
    options: t.Sequence[Option], displays: t.Sequence[t.Mapping[str, t.Any]]
) -> tuple[list[Option], dict[str, t.Any] | None]:
    """The options with a VNC display that listens nowhere, and what ``display-update`` must be told later.

    :param displays: what ``query-vnc-servers`` returned: where it listens now, whatever the
        command line says. Without any display option QEMU has one at localhost:5900.
    :returns: as a second value None where no port is to be handed over.
    :raises CprError: ``unsupported-option`` for what ``display-update`` can't do.
    """
    written = [_written_out(option) for option in options]
    given = [option for option in written if option.name == "vnc"]
    by_path = any((option.value or "").startswith("unix:") for option in given)
    listening = [display for display in displays if display.get("server")]
    if not listening or by_path and all(_is_unix(server) for item in listening for server in item["server"]):
        return written, None
    if len(displays) > 1:
        raise _unsupported("has several VNC displays, and QEMU can give a port to the first only")
    servers = listening[0]["server"]
    if any(server.get("websocket") for server in servers):
        raise _unsupported("has a VNC display with a websocket port, which can't be given to a running QEMU")
    properties = Properties.read(given[0].value or "") if given else Properties([(None, "none")])
    if listening[0].get("auth") == "vnc" and properties.get("password-secret") is None:
        raise _unsupported("has a VNC password that was set at run time, and QEMU does not tell it")
    rest = [pair for pair in properties.pairs[1:] if pair[0] not in _ADDRESS_KEYS and pair[1] not in _ADDRESS_KEYS]
    quiet = Option(given[0].flag if given else "-vnc", str(Properties([(None, "none"), *rest])))
    result = [quiet if option.name == "vnc" else option for option in written]
    addresses = [_address(server) for server in servers]
    return result if given else [*result, quiet], {"type": "vnc", "addresses": addresses}


def _written_out(option: Option) -> Option:
    """``-display vnc=…`` as ``-vnc …``, which means the same."""
    if option.name != "display":
        return option
    properties = read_properties(option)
    address = properties.pairs[0][1] if properties.pairs and properties.pairs[0][0] == "vnc" else None
    return option if address is None else Option("-vnc", str(Properties([(None, address), *properties.pairs[1:]])))


def _is_unix(server: t.Mapping[str, t.Any]) -> bool:
    return server["family"] == "unix"


def _address(server: t.Mapping[str, t.Any]) -> dict[str, str]:
    if _is_unix(server):
        return {"type": "unix", "path": server["service"]}
    return {"type": "inet", "host": server["host"], "port": server["service"]}


def _unsupported(why: str) -> CprError:
    return CprError(
        "unsupported-option",
        f"The guest {why}.",
        "Start it without that when it next starts, or leave this guest out of live_update_guests.",
    )
