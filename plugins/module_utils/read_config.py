# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The file of a ``-readconfig`` as options of the command line.

Pure functions. Private to the collection.
"""

from __future__ import annotations

import re
import typing as t

from ansible_collections.vmfleet.cpr.plugins.module_utils.command_line import Option, Properties
from ansible_collections.vmfleet.cpr.plugins.module_utils.errors import CprError

# Groups that have another name on the command line (QEMU's system/vl.c). The rest have the same.
_OPTIONS = {"memory": "m", "smp-opts": "smp", "boot-opts": "boot"}
_GROUP = re.compile(r'^\[\s*([\w-]+)(?:\s+"([^"]*)")?\s*\]$')
_VALUE = re.compile(r'^\s*([\w.-]+)\s*=\s*"(.*)"\s*$')
# The first key of these options on the command line has no name.
_IMPLIED = {"device": "driver", "netdev": "type", "chardev": "backend", "object": "qom-type", "vnc": "vnc"}


def options(text: str, known: t.Container[str]) -> list[Option]:
    """The options that QEMU makes of such a file (util/qemu-config.c).

    :param known: the names of all options of a command line.
    :raises CprError: ``unreadable-option`` for what is not known.
    """
    groups: list[tuple[str, list[tuple[str | None, str]]]] = []
    for number, line in enumerate(text.splitlines(), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        group, value = _GROUP.match(line), _VALUE.match(line)
        if group:
            name, identity = group.groups()
            groups.append((_OPTIONS.get(name, name), [("id", identity)] if identity else []))
        elif value and groups:
            groups[-1][1].append((value.group(1), value.group(2)))
        else:
            raise unreadable(f"line {number} is {line!r}")
    return [_option(name, pairs, known) for name, pairs in groups if pairs]


def _option(name: str, pairs: list[tuple[str | None, str]], known: t.Container[str]) -> Option:
    if name not in known:
        raise unreadable(f"it has the group {name}")
    implied = _IMPLIED.get(name)
    first = [(None, value) for key, value in pairs if key == implied]
    rest = [pair for pair in pairs if implied is None or pair[0] != implied]
    return Option(f"-{name}", str(Properties([*first, *rest])))


def unreadable(why: str) -> CprError:
    """The failure for a file that can't be read."""
    return CprError(
        "unreadable-option",
        f"The guest's command line has the option -readconfig, and its file can't be read: {why}.",
        "Leave this guest out of live_update_guests, and report this.",
    )
