# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A guest's user networks, whose forwarded ports are handed over once the old QEMU is gone.

Pure functions. Private to the collection.
"""

from __future__ import annotations

import re
import typing as t

from ansible_collections.vmfleet.cpr.plugins.module_utils.command_line import Option, read_properties, with_property
from ansible_collections.vmfleet.cpr.plugins.module_utils.errors import CprError

_NETWORK = re.compile(r"^(?:Hub|VLAN) -?\d+ \((?P<id>[^)]*)\):")
_FORWARD = re.compile(r"^\s*(TCP|UDP)\[HOST_FORWARD\]\s+\d+\s+(\S+)\s+(\d+)\s+(\S+)\s+(\d+)\s")


def forwards(text: str) -> list[tuple[str, str]]:
    """Pairs of a user network's id and a port that is forwarded to it, in the form of ``hostfwd_add``.

    :param text: what ``info usernet`` prints: what is forwarded now, whatever the command line
        says.
    :raises CprError: ``unsupported-option`` for a line of another form.
    """
    found = []
    network = ""
    for line in text.splitlines():
        header, forward = _NETWORK.match(line), _FORWARD.match(line)
        if header:
            network = header.group("id")
        elif forward:
            protocol, host, port, guest, guest_port = forward.groups()
            rule = f"{protocol.lower()}:{'' if host == '*' else host}:{port}-{guest}:{guest_port}"
            found.append((network, rule))
        elif "HOST_FORWARD" in line:
            raise _unsupported("its user network", f"the line {line.strip()!r} of `info usernet` is not understood")
    return found


def has_networks(text: str) -> bool:
    """Whether the guest has a user network.

    :param text: what ``info usernet`` prints.
    """
    return any(map(_NETWORK.match, text.splitlines()))


def _unsupported(what: str, why: str) -> CprError:
    return CprError(
        "unsupported-option",
        f"The guest has a port forwarded to {what}, which can't be handed over: {why}.",
        "Remove that forwarding (hostfwd_remove), or leave this guest out of live_update_guests.",
    )


def without_ports(options: t.Sequence[Option], text: str) -> tuple[list[Option], list[tuple[str, str]]]:
    """The options without forwarded ports, and what ``hostfwd_add`` must be told later.

    :param text: what ``info usernet`` prints.
    """
    present = forwards(text)
    names = [match.group("id") for match in map(_NETWORK.match, text.splitlines()) if match]
    result = []
    for option in options:
        if is_user_network(option):
            properties = read_properties(option)
            identity = properties.get("id")
            # One without an id has a name that changes with every start; they come in order.
            name = identity or next((item for item in names if item.startswith("#")), None)
            if properties.get("hostfwd") is not None:
                option = with_property(option, "hostfwd", None)
            if name in names:
                names.remove(name)
            if identity is None and any(network == name for network, dummy in present):
                identity = f"cpruser{len(result)}"
                option = with_property(option, "id", identity)
                present = [(identity if network == name else network, rule) for network, rule in present]
        result.append(option)
    if any(network.startswith("#") for network, dummy in present):
        raise _unsupported("its default network", "a network that no option names can't be given it")
    return result, present


def is_user_network(option: Option) -> bool:
    """Whether the option makes a user network."""
    if option.name not in ("netdev", "nic", "net"):
        return False
    properties = read_properties(option)
    return "user" in (properties.implied, properties.get("type"))
