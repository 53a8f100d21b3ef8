# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Back to the old QEMU alone, from any point before the commit.

Private to the collection.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import time
import typing as t

from ansible_collections.vmfleet.cpr.plugins.module_utils import journal
from ansible_collections.vmfleet.cpr.plugins.module_utils.errors import CprError
from ansible_collections.vmfleet.cpr.plugins.module_utils.monitor import Monitor
from ansible_collections.vmfleet.cpr.plugins.module_utils.phases import failures, reach, setup
from ansible_collections.vmfleet.cpr.plugins.module_utils.process import Watch
from ansible_collections.vmfleet.cpr.plugins.module_utils.task import Outcome
from ansible_collections.vmfleet.cpr.plugins.module_utils.verdict import Verdict

DONE = journal.ENDED
BACK = "The guest runs on the old QEMU, as before."

# Seconds that the old QEMU gets to end its migration once the new one is dead.
CANCEL_TIMEOUT = 30.0
_POLL = 0.002
_ENDED = (None, "none", "completed", "failed", "cancelled")


async def roll_back(update: journal.Update, *, timeout: float) -> Outcome:
    """Undo an update that is not committed: afterwards only the old QEMU is there, and runs.

    Nothing is done to a guest without an update under way.

    :param timeout: seconds for the connection to the old QEMU.
    :raises CprError: ``already-committed`` if the guest is on the new QEMU;
        ``state-unclear`` if it can't be told; ``old-qemu-gone``.
    """
    if update.phase in DONE:
        return Outcome(update.guest, False, "There is no update to undo.", update)
    if update.phase in journal.OF_A_CHECKPOINT:
        raise CprError(
            "update-under-way",
            f"There is a checkpoint of the guest in {update.directory} ({update.phase}).",
            "Finish that with vmfleet.cpr.guest_restore.",
        )
    old, new = failures.both(update)
    with Watch(old.identity) as old_watch, Watch(new.identity) as new_watch:
        # Before anything is killed: a task that died between the commit and its record leaves
        # "switching" behind, and the guest on the new QEMU.
        judged = await reach.judge(update, old_watch, new_watch)
        if judged == Verdict.FORWARD:
            raise _already_committed()
        if judged == Verdict.UNCLEAR:
            raise _state_unclear(update)
        if old_watch.ended.is_set():
            raise await give_up(update, new_watch)
        async with await reach.old_qemu(update, old_watch, timeout) as monitor:
            await bring_back(update, monitor, new_watch)
    return Outcome(update.guest, True, BACK, update)


async def give_up(update: journal.Update, new_watch: Watch) -> CprError:
    """Clear up after an old QEMU that ended with the guest on it; the failure to raise."""
    await _end_new(update, new_watch)
    return write_off(update, failures.old_qemu_gone(update))


def write_off(update: journal.Update, failure: CprError) -> CprError:
    """End the update of a guest that is down, and clear up after it; the failure to raise."""
    remove_traces(update)
    with contextlib.suppress(CprError):  # the failure itself says more
        update.enter(journal.ROLLED_BACK, str(failure))
    return failure


async def bring_back(update: journal.Update, monitor: Monitor, new_watch: Watch) -> dict[str, t.Any]:
    """Kill the new QEMU, see it dead, then let the old one go on.

    :param monitor: the old QEMU's.
    :returns: what the old QEMU's ``query-migrate`` said at the end.
    :raises CprError: ``process-not-dying``, ``qmp-timeout`` and the like: the guest is then
        where the message says.
    """
    await _end_new(update, new_watch)
    return await resume_old(update, monitor)


async def resume_old(update: journal.Update, monitor: Monitor) -> dict[str, t.Any]:
    """Let the guest go on in the old QEMU; no other one may have it.

    :returns: what its ``query-migrate`` said at the end.
    :raises CprError: ``migration-not-ending``, ``qmp-timeout`` and the like.
    """
    state = await _end_migration(monitor)
    run_state = (await monitor.execute("query-status"))["status"]
    # A failed or cancelled migration resumes the guest by itself, unless it was paused on
    # purpose; a completed one does not.
    if update.run_state == "running" and run_state == "postmigrate":
        await monitor.execute("cont")
    await setup.put_back(monitor, update.restore)
    remove_traces(update)
    with contextlib.suppress(CprError):  # unrecorded it is undone once more by the next run, which does no harm
        update.enter(journal.ROLLED_BACK, BACK)
    return state


async def _end_new(update: journal.Update, new_watch: Watch) -> None:
    old, new = failures.both(update)
    if new.identity != old.identity:  # with cpr-exec it is the old one still
        await new_watch.kill()


def remove_traces(update: journal.Update) -> None:
    """Remove what a killed new QEMU leaves: its sockets, its pid file, its channels. What can't be stays."""
    shutil.rmtree(update.channels, ignore_errors=True)
    update.remove_mark()
    for temporary, dummy in update.renames:
        with contextlib.suppress(OSError):
            os.unlink(temporary)


async def _end_migration(monitor: Monitor) -> dict[str, t.Any]:
    """Wait until the old QEMU's migration has ended, cancelling it where it doesn't by itself."""
    deadline = time.monotonic() + CANCEL_TIMEOUT
    cancelled = False
    while True:
        state: dict[str, t.Any] = await monitor.execute("query-migrate")
        if state.get("status") in _ENDED:
            # "completed" and "failed" come a moment before the run state that follows them.
            if (await monitor.execute("query-status"))["status"] != "finish-migrate":
                return state
        elif not cancelled:
            await monitor.execute("migrate_cancel")
            cancelled = True
        if time.monotonic() > deadline:
            raise CprError(
                "migration-not-ending",
                f"The old QEMU's migration did not end within {CANCEL_TIMEOUT:g} s (status {state.get('status')}).",
                "The new QEMU is gone. Send migrate_cancel and cont to the old one's monitor, and report this.",
            )
        await asyncio.sleep(_POLL)


def _state_unclear(update: journal.Update) -> CprError:
    old, new = failures.both(update)
    return CprError(
        "state-unclear",
        f"The task that switched the guest died, the new QEMU (process {new.pid}) is gone or silent, and it can't be"
        " told whether the guest has run on it.",
        f"Nothing was done. If the new QEMU still is there, see why it does not answer. If it is gone, the guest's"
        f" disks and RAM may have moved on, and the old QEMU (process {old.pid}) must not be continued: end it and"
        " start the guest anew.",
    )


def _already_committed() -> CprError:
    return CprError(
        "already-committed",
        "The guest runs on the new QEMU already; there is no way back by rolling back.",
        "Finish the update with vmfleet.cpr.guest_resume.",
    )
