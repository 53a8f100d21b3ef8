# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Puts the guest on the new QEMU and the old one out of the way.

Private to the collection.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time

from ansible_collections.vmfleet.cpr.plugins.module_utils import journal
from ansible_collections.vmfleet.cpr.plugins.module_utils.errors import CprError
from ansible_collections.vmfleet.cpr.plugins.module_utils.monitor import Monitor
from ansible_collections.vmfleet.cpr.plugins.module_utils.phases import failures, setup, switch
from ansible_collections.vmfleet.cpr.plugins.module_utils.process import Watch
from ansible_collections.vmfleet.cpr.plugins.module_utils.quiet import Quiet
from ansible_collections.vmfleet.cpr.plugins.module_utils.task import Outcome, Task

DONE = (journal.FINISHED,)

# Seconds that the old QEMU gets to quit by itself before it is killed.
QUIT_TIMEOUT = 10.0


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
    :raises CprError: as `switch.switch` and `retire`.
    """
    if update.phase in DONE:
        return Outcome(update.guest, False, "The guest is on the new QEMU already.", update)
    if update.phase == journal.SWITCHED:
        async with quiet.work(), await Monitor.connect(_new_monitor(update), timeout) as monitor:
            await retire(update, monitor, None)
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
            await retire(update, ends.new, ends.old)
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


async def retire(update: journal.Update, monitor: Monitor, old_monitor: Monitor | None) -> None:
    """Once the guest is seen on the new QEMU, end the old one and hand its paths over.

    :param monitor: the new QEMU's.
    :param old_monitor: the old QEMU's, where it is open.
    :raises CprError: ``guest-not-running`` if the new QEMU doesn't run the guest: the old one
        is then left as it is, stopped; ``path-not-restored``.
    """
    started = time.monotonic()
    old, new = failures.both(update)
    status = (await monitor.execute("query-status"))["status"]
    if status != update.run_state:
        raise CprError(
            "guest-not-running",
            f"After the switch the guest's run state is {status}, not {update.run_state}.",
            f"The old QEMU (process {old.pid}) was left stopped and must not be continued. Look at the guest.",
        )
    with Watch(old.identity) as watch:
        if not watch.ended.is_set():
            with contextlib.suppress(CprError):  # it may exit before it answers
                old_monitor = old_monitor or await Monitor.connect(old.monitor)
                await old_monitor.execute("quit")
            if not await watch.wait(QUIT_TIMEOUT):
                await watch.kill()
    _restore_paths(update)
    await setup.put_back(monitor, update.restore)
    shutil.rmtree(update.channels, ignore_errors=True)
    update.took("retire", started)
    update.enter(journal.FINISHED)


def _restore_paths(update: journal.Update) -> None:
    """Rename the generation's sockets and pid file over the stable paths.

    Only now: the old QEMU removes the stable paths when it exits.
    """
    dummy, new = failures.both(update)
    for temporary, stable in update.renames:
        try:
            os.rename(temporary, stable)
        except FileNotFoundError:
            if not os.path.exists(stable):
                raise _path_not_restored(stable, "it is gone") from None
        except OSError as error:
            raise _path_not_restored(stable, error.strerror) from error
        if new.monitor == temporary:
            new.monitor = stable


def _new_monitor(update: journal.Update) -> str:
    """Where the new QEMU's monitor answers, whether its path was restored already or not."""
    dummy, new = failures.both(update)
    return new.monitor if os.path.exists(new.monitor) else dict(update.renames).get(new.monitor, new.monitor)


def _path_not_restored(path: str, why: str) -> CprError:
    return CprError(
        "path-not-restored",
        f"The guest runs on the new QEMU, but {path} could not be given to it: {why}.",
        "Mend the directory and run again.",
    )
