# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Puts the guest on the new QEMU and the old one out of the way.

Private to the collection.
"""

from __future__ import annotations

import contextlib
import os
import time

from ansible_collections.vmfleet.cpr.plugins.module_utils import journal
from ansible_collections.vmfleet.cpr.plugins.module_utils.errors import CprError
from ansible_collections.vmfleet.cpr.plugins.module_utils.monitor import Monitor
from ansible_collections.vmfleet.cpr.plugins.module_utils.phases import failures, retire, switch
from ansible_collections.vmfleet.cpr.plugins.module_utils.quiet import Quiet
from ansible_collections.vmfleet.cpr.plugins.module_utils.task import Outcome, Task

DONE = (journal.FINISHED,)


async def resume_all(task: Task) -> list[Outcome]:
    """Switch the guests of a task, a bounded number at a time; see `resume`."""
    quiet = Quiet(task.parameters["switch_concurrency"])
    return await task.for_each_update(
        resume, done=DONE, would="The guest would be switched to the new QEMU.", quiet=quiet
    )


async def resume(update: journal.Update, *, timeout: float, quiet: Quiet) -> Outcome:
    """Switch the guest to the new QEMU, retire the old one, restore the stable paths.

    :param timeout: seconds for each connection, and until the old QEMU stops the guest.
    :param quiet: shared by all guests of a task; bounds how many are switched at a time.
    :raises CprError: as `switch.switch` and `retire.retire`.
    """
    if update.phase in DONE:
        return Outcome(update.guest, False, "The guest is on the new QEMU already.", update)
    if update.phase == journal.SWITCHED:
        if not failures.both(update)[1].identity.is_alive():
            raise failures.new_qemu_gone(update)
        async with quiet.work(), await Monitor.connect(_new_monitor(update), timeout) as monitor:
            await retire.retire(update, monitor, None)
        return Outcome(update.guest, True, "An earlier switch was finished.", update)
    if update.phase != journal.SET_UP:
        raise failures.wrong_phase(update, journal.SET_UP, "migration_setup")
    async with contextlib.AsyncExitStack() as stack:
        async with quiet.work():
            ends = await stack.enter_async_context(switch.open_ends(update, timeout))
            await _note_run_state(update, ends.old)
        async with quiet.switch():
            started = time.monotonic()
            await switch.switch(update, ends, timeout=timeout)
            update.took("switch", started)
        async with quiet.work():
            await retire.retire(update, ends.new, ends.old)
    pause = f" after a pause of {update.pause_ms:g} ms" if update.pause_ms is not None else ""
    old, new = failures.both(update)
    message = f"The guest went from QEMU {old.version} to {new.version}{pause}."
    return Outcome(update.guest, True, message, update)


async def _note_run_state(update: journal.Update, monitor: Monitor) -> None:
    """Note whether the guest runs or is paused now; somebody may have changed it since the launch."""
    run_state = (await monitor.execute("query-status"))["status"]
    if run_state not in ("running", "paused"):
        raise CprError(
            "run-state",
            f"The guest's run state is {run_state} by now; only a running or paused one can be switched.",
            "Roll back, bring the guest back to running, and run again.",
        )
    update.run_state = run_state


def _new_monitor(update: journal.Update) -> str:
    """Where the new QEMU's monitor answers, whether its path was restored already or not."""
    dummy, new = failures.both(update)
    return new.monitor if os.path.exists(new.monitor) else dict(update.renames).get(new.monitor, new.monitor)
