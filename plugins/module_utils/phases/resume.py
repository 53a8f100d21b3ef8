# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Puts the guest on the new QEMU and the old one out of the way.

Private to the collection.
"""

from __future__ import annotations

import contextlib
import time
import typing as t

from ansible_collections.vmfleet.cpr.plugins.module_utils import journal, page_cache
from ansible_collections.vmfleet.cpr.plugins.module_utils.errors import CprError
from ansible_collections.vmfleet.cpr.plugins.module_utils.modes import CPR_EXEC, PRECOPY
from ansible_collections.vmfleet.cpr.plugins.module_utils.monitor import Monitor
from ansible_collections.vmfleet.cpr.plugins.module_utils.phases import (
    cpr_exec,
    failures,
    preflight,
    recover,
    retire,
    switch,
    verify,
)
from ansible_collections.vmfleet.cpr.plugins.module_utils.quiet import Quiet
from ansible_collections.vmfleet.cpr.plugins.module_utils.task import Outcome, Task

DONE = (journal.FINISHED,)
# Seconds for what a guest has written to its disks while others were switched.
_REST = 1.0


async def resume_all(task: Task) -> list[Outcome]:
    """Switch the guests of a task, a bounded number at a time; see `resume`.

    Once nobody waits for the task any more, no further switch begins.
    """
    quiet = Quiet(task.parameters["switch_concurrency"])
    return await task.for_each_update(
        resume,
        done=DONE,
        would="The guest would be switched to the new QEMU.",
        quiet=quiet,
        pause_limit=task.parameters["pause_limit"],
        copy_timeout=task.parameters["copy_timeout"],
        heartbeat={"command": task.parameters["heartbeat_command"], "timeout": task.parameters["heartbeat_timeout"]},
        is_abandoned=task.is_abandoned,
    )


async def resume(
    update: journal.Update,
    *,
    timeout: float,
    quiet: Quiet,
    pause_limit: float,
    copy_timeout: float,
    heartbeat: t.Mapping[str, t.Any],
    is_abandoned: t.Callable[[], bool],
) -> Outcome:
    """Switch the guest to the new QEMU, retire the old one, restore the stable paths.

    A switch whose process died is brought to its end instead.

    :param timeout: seconds for each connection, for writing its images out, and until the old QEMU stops the guest.
    :param quiet: shared by all guests of a task; bounds how many are switched at a time.
    :param pause_limit: seconds that the guest may stand still before the switch is undone.
    :param copy_timeout: seconds that the copy of a guest's RAM may take, while it runs.
    :param heartbeat: ``command`` and ``timeout`` of `Update.heartbeat`.
    :param is_abandoned: whether whoever waits for the task is gone.
    :raises CprError: ``switch-undone``, ``run-abandoned``, or as `switch.switch` and
        `retire.retire`.
    """
    if update.phase in DONE:
        return Outcome(update.guest, False, "The guest is on the new QEMU already.", update)
    update.heartbeat.update(heartbeat)
    if update.phase in (journal.SWITCHING, journal.SWITCHED):
        async with quiet.work():
            on_new = await recover.recover(update, timeout=timeout)
        if not on_new:
            raise CprError(
                "switch-undone",
                "The process that switched the guest died before the guest ran on the new QEMU. The guest is back on"
                " the old QEMU, as before.",
                "Run again.",
            )
        return Outcome(update.guest, True, "An earlier switch was finished.", update)
    if update.phase != journal.SET_UP:
        raise failures.wrong_phase(update, journal.SET_UP, "migration_setup")
    in_place = update.mode == CPR_EXEC
    async with contextlib.AsyncExitStack() as stack:
        async with quiet.work():
            started = time.monotonic()
            await page_cache.release(failures.both(update)[0].pid, timeout)
            update.took("page_cache", started)
            ends = await stack.enter_async_context((cpr_exec if in_place else switch).open_ends(update, timeout))
            await _note_run_state(update, ends.old)
            await verify.check_heartbeat_command(update)
            if in_place:
                await preflight.check_rehearsed(update, ends.old)
        async with quiet.switch():
            await page_cache.release(ends.old_watch.identity.pid, _REST)
            if is_abandoned():
                raise CprError(
                    "run-abandoned",
                    "The guest was not switched: whoever waited for that is gone. It runs on the old QEMU.",
                    "Run again.",
                )
            await verify.check_unchanged(update, ends.old)
            started = time.monotonic()
            limits = switch.Limits(timeout, copy_timeout, pause_limit)
            await (cpr_exec if in_place else switch).switch(update, ends, limits)
            update.took("switch", started)
            if update.mode == PRECOPY:
                # The next copy may take minutes, and the memory of this guest's first RAM: it ends before.
                with contextlib.suppress(CprError):  # it is told for information only
                    update.note_copy(await ends.old.execute("query-migrate"))
                await retire.retire(update, ends.new, ends.old)
        if update.mode != PRECOPY:
            async with quiet.work():
                await retire.retire(update, ends.new, None if in_place else ends.old)
    return Outcome(update.guest, True, str(update.message), update)


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
