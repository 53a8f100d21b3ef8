# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The switch where a QEMU becomes another one in its own process: there is no way back.

The old QEMU stops the guest, writes its state to a file and calls execvp; whatever the new one does
not take after that ends the guest. So everything that can be found out is found out before.

Private to the collection.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import typing as t

from ansible_collections.vmfleet.cpr.plugins.module_utils import journal
from ansible_collections.vmfleet.cpr.plugins.module_utils.errors import CprError
from ansible_collections.vmfleet.cpr.plugins.module_utils.monitor import Monitor
from ansible_collections.vmfleet.cpr.plugins.module_utils.phases import failures, reach, rollback
from ansible_collections.vmfleet.cpr.plugins.module_utils.phases.switch import Ends, Limits, microseconds
from ansible_collections.vmfleet.cpr.plugins.module_utils.process import Watch

# Seconds between two tries to reach the QEMU that the process has become.
_POLL = 0.001


@contextlib.asynccontextmanager
async def open_ends(update: journal.Update, timeout: float) -> t.AsyncIterator[Ends]:
    """Connect to the monitor and watch the process; the guest runs on the old QEMU.

    :param timeout: seconds for the connection.
    :raises CprError: as `reach.old_qemu`.
    """
    with Watch(failures.both(update)[0].identity) as watch:
        monitor = await reach.old_qemu(update, watch, timeout)
        ends = Ends(monitor, monitor, watch, watch)
        try:
            yield ends
        finally:
            await ends.old.close()
            if ends.new is not ends.old:
                await ends.new.close()


async def switch(update: journal.Update, ends: Ends, limits: Limits) -> None:
    """Let the QEMU become the new one, and reach it there: ``ends.new`` is then its monitor.

    The new QEMU lets the guest go on by itself, so that nobody's end can leave it stopped. Its pause
    is from the STOP event until it is seen running, at most some milliseconds too much.

    :raises CprError: ``exec-failed`` and what QEMU refuses: the guest then runs on the old QEMU;
        ``new-qemu-gone``: it is down; ``state-unclear``.
    """
    with update.commit_mark() as mark:
        update.enter(journal.SWITCHING)
        with ends.old.events("STOP", "MIGRATION") as events:
            stop = None
            mark.set(True)
            try:
                await ends.old.execute("migrate", {"uri": f"file:{update.state_file}"})
                stop = await _until_it_has_become(update, ends, events, limits)
            except CprError as error:
                ended = await ends.old_watch.wait(reach.LAST_BREATH if error.code == "monitor-lost" else 0)
                if ended:
                    raise await rollback.give_up(update, ends.old_watch) from error
                failure: CprError | None = error
            else:
                failure = None
            if failure and not await _becomes_after_all(update, ends):
                mark.set(False)
                async with await reach.old_qemu(update, ends.old_watch) as monitor:
                    await rollback.bring_back(update, monitor, ends.new_watch)
                failure.message += " The guest is back on the old QEMU, as before."
                raise failure
        ends.new, running_at = await reach_running(update, ends.new_watch, limits.pause)
        if stop and running_at:
            update.pause_ms = round(running_at / 1000 - microseconds(stop) / 1000, 2)
    with contextlib.suppress(CprError):  # unrecorded, the next run finds it out
        update.enter(journal.SWITCHED)


async def _becomes_after_all(update: journal.Update, ends: Ends) -> bool:
    """Whether an old QEMU that took too long, or does not answer, becomes the new one all the same.

    One that has written all of the guest, and is about to, must not let the guest go on: the new one would read
    what is out of date by then. Only one that says that its migration has failed stays what it is.
    """
    if reach.has_become(update):
        return True
    with contextlib.suppress(CprError):
        await ends.old.execute("migrate_cancel")  # does nothing to one that has completed
    await ends.old.close()
    return await reach.becomes(update, ends.old_watch)


async def _until_it_has_become(update: journal.Update, ends: Ends, events: t.Any, limits: Limits) -> t.Any:
    """Wait until the old QEMU is no more; the event with which the guest's pause began.

    :raises CprError: ``exec-failed`` if it still is there.
    """
    stop = None
    due = time.monotonic() + limits.timeout
    while not reach.has_become(update) and not ends.old_watch.ended.is_set():
        if time.monotonic() > due:
            raise CprError(
                "exec-failed",
                f"The old QEMU did not become the new one within {limits.timeout:g} s.",
                "Was the host overloaded? Run again.",
            )
        if events.empty():
            await asyncio.sleep(_POLL)
            continue
        event = await events.get()
        if event["event"] == "STOP":
            stop = event
            due = time.monotonic() + limits.pause
        elif event["data"]["status"] in ("failed", "cancelled"):
            state = await ends.old.execute("query-migrate")
            raise CprError(
                "exec-failed",
                f"The old QEMU did not become the new one: {state.get('error-desc') or state.get('status')}.",
                "Mend what it names, and run again.",
                qemu_description=state.get("error-desc"),
            )
    while stop is None and not events.empty():  # both came at once
        event = await events.get()
        stop = event if event["event"] == "STOP" else None
    return stop


async def reach_running(update: journal.Update, watch: Watch, timeout: float) -> tuple[Monitor, int | None]:
    """Connect to the QEMU that the process has become, once it runs the guest.

    :param timeout: seconds until it must.
    :returns: its monitor, and when it was first seen running, in microseconds; None for a paused guest.
    :raises CprError: ``new-qemu-gone`` or ``state-unclear``.
    """
    dummy, new = failures.both(update)
    deadline = time.monotonic() + timeout
    last: CprError | None = None
    while time.monotonic() < deadline and not watch.ended.is_set():
        try:
            monitor = await Monitor.connect(new.monitor, max(0.1, deadline - time.monotonic()), pid=new.pid)
        except CprError as error:
            last = error
            await asyncio.sleep(_POLL)
            continue
        try:
            while time.monotonic() < deadline:
                status = (await monitor.execute("query-status"))["status"]
                if status == update.run_state:
                    return monitor, time.time_ns() // 1000 if status == "running" else None
                await asyncio.sleep(_POLL)
            last = CprError("run-state", f"its run state is {status}")
        except CprError as error:
            last = error
        await monitor.close()
    if watch.ended.is_set():
        raise _lost(update, watch)
    raise CprError(
        "state-unclear",
        f"The guest's QEMU (process {new.pid}) became the new one and was not seen running the guest within {timeout:g} s:"
        f" {last}.",
        f"Ask its monitor {new.monitor} for query-status; once it is running, run again.",
    )


def _lost(update: journal.Update, watch: Watch) -> CprError:
    failure = failures.new_qemu_gone(update)
    if watch.ended.is_set():
        failure.hint = "Start the guest anew; its disks are as after a power cut."
        rollback.write_off(update, failure)
    return failure
