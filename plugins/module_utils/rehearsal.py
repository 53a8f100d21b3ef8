# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The command line of a new QEMU that only rehearses: all of the guest's machine, none of its lines out.

Pure functions. Private to the collection.
"""

from __future__ import annotations

import dataclasses

from ansible_collections.vmfleet.cpr.plugins.module_utils import memory, taps
from ansible_collections.vmfleet.cpr.plugins.module_utils.command_line import (
    Option,
    Properties,
    read_properties,
    with_property,
)
from ansible_collections.vmfleet.cpr.plugins.module_utils.errors import CprError
from ansible_collections.vmfleet.cpr.plugins.module_utils.new_command_line import NewCommandLine

# What would take a line that the guest's clients use, or write where the guest's QEMU does.
# The name too: nobody shall take it for the guest. -overcommit mem-lock=on would fill its RAM at once.
_LEFT_OUT = frozenset(
    "name overcommit monitor qmp qmp-pretty mon pidfile gdb s mem-path mem-prealloc spice vnc display".split()
)
_OF_MEMORY = ("id", "size", "host-nodes", "policy", "x-use-canonical-path-for-ramblock-id")
_LINES = ("serial", "parallel", "debugcon")
_OWN_NETWORKS = ("user", "tap", "hubport")
# What stands in nobody's way.
NOT_REHEARSED = "not-rehearsed"
_OUTSIDE = ("vfio-pci", "vfio-pci-nohotplug")


def command_line(new: NewCommandLine, monitor: int) -> NewCommandLine:
    """What to start so that nothing of the guest is touched.

    RAM is private and not allocated before it is used; character devices lead nowhere; taps are in no
    bridge. Images are opened as for an incoming migration, which takes no lock.

    :param new: what would be started for the update.
    :param monitor: the number of the descriptor that will be its monitor.
    :raises CprError: ``not-rehearsed`` for what serves one QEMU at a time.
    """
    arguments = [Option("-display", "none")]
    for option in new.arguments:
        given = read_properties(option) if option.value else Properties([])
        kind = given.implied or given.get("driver") or given.get("qom-type") or given.get("type") or ""
        if option.name in _LEFT_OUT:
            continue
        if option.name == "device" and kind in _OUTSIDE:
            raise CprError(
                NOT_REHEARSED,
                f"The guest's {kind} serves one QEMU at a time, so the new one can't be tried beside it.",
                "Everything else of the verdict holds.",
            )
        if option.name == "object" and kind.startswith(("monitor-", "filter-")):
            continue  # filters write and read files and lines
        if option.name == "chardev":
            mux = [("mux", "on")] if given.is_on("mux") else []
            option = Option("-chardev", str(Properties([(None, "null"), ("id", given.get("id") or ""), *mux])))
        elif option.name in _LINES and not (option.value or "").startswith(("chardev:", "none")):
            option = Option(option.flag, "null")
        elif option.name == "audiodev":
            option = Option("-audiodev", str(Properties([(None, "none"), ("id", given.get("id") or "")])))
        elif option.name == "netdev" and kind not in _OWN_NETWORKS:
            # At the other end of its line another client might not be welcome.
            option = Option(
                "-netdev", str(Properties([(None, "hubport"), ("id", given.get("id") or ""), ("hubid", "99")]))
            )
        elif memory.is_backend(option):
            option = memory.with_backend(option, "memory-backend-ram", _OF_MEMORY)  # that nobody else has
        elif taps.is_tap(option) and given.is_on("vhost"):
            for key in ("vhostfd", "vhostfds"):
                option = with_property(option, key, None)
            option = with_property(option, "vhost", "off")
        arguments.append(option)
    arguments += [
        Option("-chardev", f"socket,id=cpr_rehearsal,fd={monitor}"),
        Option("-mon", "chardev=cpr_rehearsal,mode=control"),
    ]
    return dataclasses.replace(new, arguments=arguments)
