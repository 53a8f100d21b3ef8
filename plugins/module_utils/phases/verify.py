# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Looks at a guest that was just switched, once more, before the old QEMU goes.

Private to the collection.
"""

from __future__ import annotations

import asyncio
import os
import time
import typing as t

from ansible_collections.vmfleet.cpr.plugins.module_utils import commands, guest_agent, journal, machine_view, process
from ansible_collections.vmfleet.cpr.plugins.module_utils.errors import CprError
from ansible_collections.vmfleet.cpr.plugins.module_utils.machine_view import MachineView
from ansible_collections.vmfleet.cpr.plugins.module_utils.modes import CPR_EXEC
from ansible_collections.vmfleet.cpr.plugins.module_utils.monitor import Monitor
from ansible_collections.vmfleet.cpr.plugins.module_utils.phases import failures, view

# Seconds that an agent gets before the switch: one that is there answers in milliseconds.
_AGENT_TIMEOUT = 1.0
# Seconds between two tries of a heartbeat.
_POLL = 0.2


async def agent_answers(monitor: Monitor, machine: MachineView, pid: int, timeout: float = _AGENT_TIMEOUT) -> bool:
    """Whether the guest has an agent that answers us.

    :param machine: the guest's, from the same QEMU.
    :param pid: the QEMU's.
    """
    directory = os.readlink(f"{process.PROC}/{pid}/cwd")
    path = guest_agent.socket_of(machine.devices, await monitor.execute("query-chardev"), directory)
    return path is not None and await guest_agent.answers(path, timeout)


async def check_unchanged(update: journal.Update, monitor: Monitor) -> None:
    """See that nobody changed the guest's disks on the old QEMU since both were compared.

    :param monitor: the old QEMU's.
    :raises CprError: ``disks-differ``, ``block-job-running``.
    """
    if update.agreement is None:
        return
    agreed = update.agreement["machine"]["disks"]
    disks = machine_view.read_disks(await monitor.execute("query-block"))
    wrong = machine_view.summary_differences({"disk": agreed}, {"disk": disks})
    if wrong:
        raise CprError(
            "disks-differ",
            f"A disk of the guest was changed since both QEMUs were compared: {'; '.join(wrong)}. The guest runs on as"
            " before.",
            "Roll back, and run again.",
        )
    jobs = [job["device"] for job in await monitor.execute("query-block-jobs")]
    if jobs:
        raise CprError(
            "block-job-running",
            f"A block job was started since both QEMUs were compared ({', '.join(jobs)}). The guest runs on as before.",
            "Roll back, wait for it to end, and run again.",
        )


async def check_heartbeat_command(update: journal.Update) -> None:
    """See that the user's command succeeds while the guest still runs on the old QEMU.

    :raises CprError: ``heartbeat-missing``.
    """
    if update.run_state == "running" and update.heartbeat.get("command") and not await _succeeds(update):
        raise CprError(
            "heartbeat-missing",
            f"`{update.heartbeat['command']}` fails already before the switch. The guest runs on the old QEMU, as before.",
            "Is the command right, and the guest well? Mend that, and run again.",
        )


async def verify(update: journal.Update, monitor: Monitor) -> None:
    """Compare the guest with what was agreed on, and wait for its heartbeat.

    :param monitor: the new QEMU's, which runs the guest.
    :raises CprError: ``guest-differs``, ``heartbeat-missing``. The guest is on the new QEMU and
        the old one still there, stopped.
    """
    dummy, new = failures.both(update)
    if update.agreement is None:
        return  # a record of an earlier version
    machine = await view.read(monitor, new.pid)
    wrong = machine_view.summary_differences(update.agreement["machine"], machine_view.summary(machine))
    if wrong:
        raise CprError(
            "guest-differs",
            f"The guest runs on the new QEMU, and is not what it was: {'; '.join(wrong)}.",
            _way_on(update),
        )
    if update.run_state != "running":
        return  # a paused guest has no heart that beats
    heartbeat = update.heartbeat
    if heartbeat.get("agent"):
        await _wait_for(update, "its agent does not answer", lambda: agent_answers(monitor, machine, new.pid))
    if heartbeat.get("command"):
        await _wait_for(update, f"`{heartbeat['command']}` fails", lambda: _succeeds(update))


async def _succeeds(update: journal.Update) -> bool:
    try:
        await commands.run(
            "/bin/sh", "-c", update.heartbeat["command"], "heartbeat", update.guest,
            timeout=update.heartbeat["timeout"], of_user=True,
        )  # fmt: skip
    except CprError:
        return False
    return True


async def _wait_for(update: journal.Update, failure: str, beats: t.Callable[[], t.Awaitable[bool]]) -> None:
    timeout = update.heartbeat["timeout"]
    deadline = time.monotonic() + timeout
    while not await beats():
        if time.monotonic() > deadline:
            raise CprError(
                "heartbeat-missing",
                f"The guest runs on the new QEMU, and {failure} since {timeout:g} s.",
                _way_on(update),
            )
        await asyncio.sleep(_POLL)


def _way_on(update: journal.Update) -> str:
    old, dummy = failures.both(update)
    if update.mode == CPR_EXEC or update.phase == journal.RESUMING:
        return "Look at the guest. There is no old QEMU any more. Running again looks once more."
    return (
        f"Look at the guest. The old QEMU (process {old.pid}) is left stopped and must not be continued. Running again"
        " looks once more; after you have ended that process it finishes without looking."
    )
