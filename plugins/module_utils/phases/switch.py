# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The blackout: one function, one commit point.

Private to the collection.
"""

from __future__ import annotations

import asyncio
import contextlib
import typing as t
from dataclasses import dataclass, field

from ansible_collections.vmfleet.cpr.plugins.module_utils import journal
from ansible_collections.vmfleet.cpr.plugins.module_utils.errors import CprError
from ansible_collections.vmfleet.cpr.plugins.module_utils.monitor import Event, Monitor
from ansible_collections.vmfleet.cpr.plugins.module_utils.phases import failures, rollback
from ansible_collections.vmfleet.cpr.plugins.module_utils.process import Watch

# Seconds that the guest may stand still before the switch is undone; it takes milliseconds.
PAUSE_LIMIT = 2.0


@dataclass
class Ends:
    """Both ends of a switch: connected and watched before it begins."""

    old: Monitor
    new: Monitor
    old_watch: Watch
    new_watch: Watch


@dataclass
class _Progress:
    """What the events have said so far."""

    stopped: asyncio.Event = field(default_factory=asyncio.Event)
    stop: Event | None = None


@contextlib.asynccontextmanager
async def open_ends(update: journal.Update, timeout: float) -> t.AsyncIterator[Ends]:
    """Connect to both monitors and watch both processes; the guest runs on the old QEMU.

    :param timeout: seconds for each connection.
    :raises CprError: ``old-qemu-gone``, ``new-qemu-exited``, or as `Monitor.connect`.
    """
    old, new = failures.both(update)
    with Watch(old.identity) as old_watch, Watch(new.identity) as new_watch:
        if old_watch.ended.is_set():
            raise failures.old_qemu_gone(update)
        if new_watch.ended.is_set():
            raise failures.new_qemu_exited(update)
        async with await Monitor.connect(old.monitor, timeout) as old_monitor:
            async with await Monitor.connect(new.monitor, timeout) as new_monitor:
                yield Ends(old_monitor, new_monitor, old_watch, new_watch)


async def switch(update: journal.Update, ends: Ends, *, timeout: float) -> None:
    """Move the guest from the old QEMU to the new one.

    Between STOP and RESUME stand only QMP messages over open connections. ``cont`` on the
    new QEMU is the commit: it was started with ``-S`` and has not run an instruction before.
    Whatever fails before it is undone here, since the guest is down.

    :param timeout: seconds until the old QEMU must have stopped the guest.
    :raises CprError: the guest then runs on the old QEMU, unless the code is
        ``state-unclear`` or ``old-qemu-gone``.
    """
    update.enter(journal.SWITCHING)
    wanted = update.run_state == "running"
    with ends.old.events("STOP", "MIGRATION") as old_events, ends.new.events("MIGRATION", "RESUME") as new_events:
        progress = _Progress()
        try:
            await ends.new.execute("migrate-incoming", _incoming(update))
            await _until_completed(update, ends, old_events, new_events, progress, timeout)
        except BaseException as error:
            raise await _undo(update, ends, error) from error
        if wanted:
            resume = await _commit(update, ends, new_events)
            if progress.stop:
                update.pause_ms = round((_microseconds(resume) - _microseconds(progress.stop)) / 1000, 2)
    update.enter(journal.SWITCHED)


def _incoming(update: journal.Update) -> dict[str, t.Any]:
    address = {"transport": "socket", "type": "unix", "path": update.main_socket}
    # Without exit-on-error a load error would end the new QEMU before it can say why (QEMU 9.1).
    return {"channels": [{"channel-type": "main", "addr": address}], "exit-on-error": False}


async def _until_completed(
    update: journal.Update, ends: Ends, old_events: t.Any, new_events: t.Any, progress: _Progress, timeout: float
) -> None:
    """Wait until both ends have completed.

    The old one's ``completed`` alone proves nothing. The new one's alone does not either:
    before its own the old QEMU may still fail and resume the guest by itself.
    """

    async def completed(monitor: Monitor, events: t.Any) -> None:
        while True:
            event = await monitor.next_event(events)
            if event["event"] == "STOP":
                progress.stop = event
                progress.stopped.set()
            elif event["event"] == "MIGRATION" and event["data"]["status"] == "completed":
                return
            elif event["event"] == "MIGRATION" and event["data"]["status"] in ("failed", "cancelled"):
                raise CprError("migration-failed", "The new QEMU did not take the guest over.")

    async def too_long() -> None:
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(progress.stopped.wait(), timeout)
            await asyncio.sleep(PAUSE_LIMIT)

    done = asyncio.gather(completed(ends.old, old_events), completed(ends.new, new_events))
    alarms = [
        asyncio.ensure_future(item) for item in (ends.new_watch.ended.wait(), ends.old_watch.ended.wait(), too_long())
    ]
    try:
        await asyncio.wait({done, *alarms}, return_when=asyncio.FIRST_COMPLETED)
        if done.done() and not done.exception() and not ends.new_watch.ended.is_set():
            return  # also where the old QEMU is gone by now: the new one has all of the guest
        if ends.old_watch.ended.is_set():
            raise failures.old_qemu_gone(update)
        if ends.new_watch.ended.is_set():
            raise failures.new_qemu_exited(update)
        if not done.done():
            raise CprError(
                "pause-limit",
                f"The new QEMU did not take the guest over within {PAUSE_LIMIT:g} s from its stop.",
                "The host may be overloaded: try again when it is calmer.",
            )
        done.result()
    finally:
        for task in (done, *alarms):
            task.cancel()
        await asyncio.gather(done, *alarms, return_exceptions=True)


async def _commit(update: journal.Update, ends: Ends, new_events: t.Any) -> Event:
    """Let the guest run on the new QEMU, and wait until it does."""
    try:
        await ends.new.execute("cont", timeout=PAUSE_LIMIT)
    except CprError as error:
        if error.code == "qmp-error":
            # Refused (an image that somebody locked, say): no instruction was run.
            raise await _undo(update, ends, error) from error
        raise _unclear(update, error) from error
    try:

        async def resumed() -> Event:
            while True:
                event = await ends.new.next_event(new_events)
                if event["event"] == "RESUME":
                    return event

        return await asyncio.wait_for(resumed(), PAUSE_LIMIT)
    except (CprError, asyncio.TimeoutError) as error:
        raise _unclear(update, error) from error


async def _undo(update: journal.Update, ends: Ends, error: BaseException) -> BaseException:
    """Bring the guest back on the old QEMU; the failure to raise, said in full."""
    if ends.old_watch.ended.is_set():
        await ends.new_watch.kill()
        return failures.old_qemu_gone(update)
    try:
        state = await _bring_back(update, ends)
    except CprError as failure:
        failure.message = (
            f"{error} Bringing the guest back on the old QEMU (process {failures.both(update)[0].pid}) failed too, and"
            f" it may be down: {failure.message}"
        )
        failure.hint = f"{failure.hint} Running again tries once more to bring it back.".strip()
        return failure
    if isinstance(error, CprError):
        words = failures.last_words(update)
        details = "; ".join(text for text in (state.get("error-desc"), words) if text)
        error.message += f" The guest is back on the old QEMU, as before.{f' QEMU says: {details}' if details else ''}"
        error.qemu_description = error.qemu_description or details or None
    return error


async def _bring_back(update: journal.Update, ends: Ends) -> dict[str, t.Any]:
    try:
        return await rollback.bring_back(update, ends.old, ends.new_watch)
    except CprError as failure:
        if failure.code != "monitor-lost":
            raise
    # Somebody cut the connection; the old QEMU itself is there.
    async with await Monitor.connect(failures.both(update)[0].monitor) as monitor:
        return await rollback.bring_back(update, monitor, ends.new_watch)


def _unclear(update: journal.Update, error: BaseException) -> CprError:
    old, new = failures.both(update)
    return CprError(
        "state-unclear",
        f"The guest was told to go on in the new QEMU (process {new.pid}), and it is not known whether it did: {error}",
        f"Nothing else was done. Ask the new QEMU's monitor {new.monitor} for query-status. If it is running, run"
        f" again; if it is gone, the old QEMU (process {old.pid}) must not be continued: end it and start the guest anew.",
    )


def _microseconds(event: Event) -> int:
    return event["timestamp"]["seconds"] * 1_000_000 + event["timestamp"]["microseconds"]
