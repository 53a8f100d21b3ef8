# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The systemd unit that a guest's QEMU belongs to.

Private to the collection.
"""

from __future__ import annotations

import os
import typing as t

from ansible_collections.vmfleet.cpr.plugins.module_utils import commands, process
from ansible_collections.vmfleet.cpr.plugins.module_utils.errors import CprError


async def refuse_unsupported(qemu: process.QemuProcess) -> None:
    """Placeholder."""
    unit = await is_owned_by_unit(qemu.identity.pid)
    if unit:
        raise CprError(
            "systemd-unit",
            f"The guest is the main process of the systemd unit {unit}, and systemd would end the new QEMU"
            " together with the old one.",
            "Units can't be handed over yet: run the guest in a scope (systemd-run --scope),"
            " or leave it out of live_update_guests.",
        )


def systemd_unit(cgroup: str) -> str | None:
    """The service unit in whose cgroup, or below it, a process is; None without one.

    A service of a user's own manager is given with that manager before it.

    :param cgroup: its ``/proc/PID/cgroup``.
    """
    for line in cgroup.splitlines():
        if line.startswith("0::") or ":name=systemd:" in line:
            services = [name for name in line.split("/") if name.endswith(".service")]
            if services and not services[-1].startswith("user@"):
                return "/".join(services[-2:]) if services[0].startswith("user@") else services[-1]
    return None


async def is_owned_by_unit(pid: int) -> str | None:
    """The systemd service whose main or control process this is or comes from, or None.

    :raises CprError: ``systemd-silent`` if systemd doesn't answer.
    """
    unit = systemd_unit(process.read_file(pid, "cgroup"))
    if unit is None or not os.path.isdir("/run/systemd/system"):
        return None
    if "/" in unit:
        return unit  # of a user's own manager, which can't be asked from here
    answer = await commands.run("systemctl", "show", "--property=MainPID,ControlPID", "--value", unit)
    return unit if set(answer.split()).intersection(map(str, _lineage(pid))) else None


def _lineage(pid: int) -> t.Iterator[int]:
    """A process and all that it comes from, but for the first process of all."""
    while pid > 1:
        yield pid
        pid = int(process.read_file(pid, "stat").rpartition(")")[2].split()[1])
