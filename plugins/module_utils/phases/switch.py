# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The blackout: one function, one commit point.

Private to the collection.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
import typing as t
from dataclasses import dataclass

from ansible_collections.vmfleet.cpr.plugins.module_utils import journal
from ansible_collections.vmfleet.cpr.plugins.module_utils.errors import CprError
from ansible_collections.vmfleet.cpr.plugins.module_utils.modes import CPR_REBOOT, PRECOPY
from ansible_collections.vmfleet.cpr.plugins.module_utils.monitor import COMMAND_TIMEOUT, Event, Monitor
from ansible_collections.vmfleet.cpr.plugins.module_utils.phases import failures, reach, rollback
from ansible_collections.vmfleet.cpr.plugins.module_utils.process import Watch

# Seconds between two looks at how far a copy is.
_COPY_POLL = 1.0
# Milliseconds; some 20 MiB can be copied in them.
_FIRST_DOWNTIME = 10
# Seconds in which the end of a QEMU follows the end of its connection.
_LAST_BREATH = 0.1


@dataclass
class Ends:
    """Both ends of a switch: connected and watched before it begins."""

    old: Monitor
    new: Monitor
    old_watch: Watch
    new_watch: Watch


@contextlib.asynccontextmanager
async def open_ends(update: journal.Update, timeout: float) -> t.AsyncIterator[Ends]:
    """Connect to both monitors and watch both processes; the guest runs on the old QEMU.

    :param timeout: seconds for each connection.
    :raises CprError: as `reach.old_qemu` and `reach.new_qemu`.
    """
    old, new = failures.both(update)
    with Watch(old.identity) as old_watch, Watch(new.identity) as new_watch:
        async with await reach.old_qemu(update, old_watch, timeout) as old_monitor:
            ends = Ends(old_monitor, await reach.new_qemu(update, new_watch, timeout), old_watch, new_watch)
            try:
                yield ends
            finally:
                await ends.new.close()  # it may be another one by now


@dataclass
class Limits:
    """How long it may take, in seconds.

    :ivar timeout: until the old QEMU must have stopped the guest.
    :ivar copy: the same where RAM is copied first.
    :ivar pause: from then on, until the new QEMU must have taken it over.
    """

    timeout: float
    copy: float
    pause: float


async def switch(update: journal.Update, ends: Ends, limits: Limits) -> None:
    """Move the guest from the old QEMU to the new one.

    Between STOP and RESUME stand only QMP messages over open connections, and one byte that
    marks the commit. ``cont`` on the new QEMU is the commit: it was started with ``-S`` and has
    not run an instruction before. Whatever fails before it is undone here, since the guest is
    down.

    :raises CprError: the guest then runs on the old QEMU, unless the code is
        ``state-unclear``, ``new-qemu-gone`` or ``old-qemu-gone``.
    """
    with update.commit_mark() as mark:
        update.enter(journal.SWITCHING)
        with ends.old.events("STOP", "MIGRATION") as old_events, ends.new.events("MIGRATION", "RESUME") as new_events:
            takeover = _Takeover(update, ends, old_events, new_events, limits)
            try:
                await takeover.take_over()
            except BaseException as error:
                raise await _undo(update, ends, error) from error
            if update.run_state == "running":
                resumed_at = await _commit(update, ends, mark, new_events, limits.pause)
                if takeover.stop:
                    update.pause_ms = round((resumed_at - microseconds(takeover.stop)) / 1000, 2)
    with contextlib.suppress(CprError):  # unrecorded, the next run finds it out
        update.enter(journal.SWITCHED)


class _Takeover:
    """The new QEMU takes the guest's state over: what the events have said so far, and when it takes too long.

    A timer, not a task with wait_for in it: that one swallows a cancellation that comes at the
    moment in which it would have ended (Python before 3.12), and the guest would wait for it.

    :ivar stop: the event with which the guest's pause began.
    """

    def __init__(
        self, update: journal.Update, ends: Ends, old_events: t.Any, new_events: t.Any, limits: Limits
    ) -> None:
        self.stop: Event | None = None
        self._update = update
        self._ends = ends
        self._limits = limits
        self._sides = {"old": (ends.old, old_events, ends.old_watch), "new": (ends.new, new_events, ends.new_watch)}
        self._overdue = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._due = 0.0
        self._downtime: _Downtime | None = None

    async def take_over(self) -> None:
        """Start what the mode needs, and wait until the new QEMU has all of the guest.

        :raises CprError: it has not, and the old QEMU is as it happens to be.
        """
        update, old, new = self._update, self._ends.old, self._ends.new
        if update.mode == CPR_REBOOT:
            await old.execute("migrate", {"uri": f"file:{update.state_file}"})
            await self._until_completed("old")
            await self._listen({"uri": f"file:{update.state_file}"})
            await self._until_completed("new")
            return
        if update.mode == PRECOPY:
            address = {"uri": f"unix:{update.main_socket}"}  # before QEMU 8.2 there are no channels
            await listen(new, address)
            limit = (await old.execute("query-migrate-parameters"))["downtime-limit"]
            self._downtime = _Downtime(limit)
            await old.execute("migrate-set-parameters", self._downtime.next())
            await old.execute("migrate", address)
        else:
            # It ends the CPR channel, which the old QEMU takes for the word to go on.
            await self._listen({"channels": [_main_channel(update)]})
        await self._until_completed("old", "new")

    async def _listen(self, arguments: dict[str, t.Any]) -> None:
        """Let the new QEMU take the state, where the guest stands still by the time of its answer."""
        try:
            await listen(self._ends.new, arguments, self._limits.pause)
        except CprError as error:
            raise self._took_too_long() if error.code == "qmp-timeout" else error

    async def _until_completed(self, *whose: str) -> None:
        """Wait until these ends have completed, or the new one alone where the old one is gone.

        The old one's ``completed`` alone proves nothing. The new one's alone does not either:
        before its own the old QEMU may still fail and resume the guest by itself, if it lives.
        """
        ends, limits = self._ends, self._limits
        if self.stop is None:
            copies = self._update.mode == PRECOPY
            self._must_end_within((limits.copy if copies else limits.timeout) + limits.pause)
        else:
            self._set_timer()
        waiting = {name: asyncio.ensure_future(self._completed(name)) for name in whose}
        both = asyncio.gather(*waiting.values())
        old_end, new_end, limit = alarms = [
            asyncio.ensure_future(item)
            for item in (ends.old_watch.ended.wait(), ends.new_watch.ended.wait(), self._overdue.wait())
        ]
        if "old" not in whose:
            alarms.remove(old_end)  # it has given all that it had
        try:
            await self._wait({both, *alarms})
            new = waiting.get("new")
            if ends.old_watch.ended.is_set() and "old" in whose:
                if new:
                    self._must_end_within(limits.pause)  # the guest stands still, whether its STOP was heard or not
                    await asyncio.wait({new, new_end, limit}, return_when=asyncio.FIRST_COMPLETED)
                    if new.done() and not new.exception():
                        return  # the new QEMU has all of the guest, and nobody else has
                raise failures.old_qemu_gone(self._update)
            if ends.new_watch.ended.is_set():
                raise failures.new_qemu_exited(self._update)
            if not both.done():
                raise self._took_too_long()
            both.result()
        finally:
            self._cancel_timer()
            for task in (both, old_end, *alarms):
                task.cancel()
            await asyncio.gather(both, old_end, *alarms, return_exceptions=True)

    async def _wait(self, first_of: set[t.Any]) -> None:
        """Wait for one of these, and note now and then how far a copy is.

        That asks the old QEMU here, in nobody's cancelled task, and no more once the guest has stopped.
        """
        while True:
            done, dummy = await asyncio.wait(
                first_of,
                timeout=_COPY_POLL if self._update.mode == PRECOPY and self.stop is None else None,
                return_when=asyncio.FIRST_COMPLETED,
            )
            if done:
                return
            if self.stop is None:
                with contextlib.suppress(CprError):  # the alarms know better what has happened
                    self._update.note_copy(await self._ends.old.execute("query-migrate"))
                    if self._downtime and self._update.copied.get("passes", 0) > 1:
                        await self._ends.old.execute("migrate-set-parameters", self._downtime.next())

    async def _completed(self, whose: str) -> None:
        monitor, events, watch = self._sides[whose]
        while True:
            try:
                event = await monitor.next_event(events)
            except CprError:
                await watch.wait(_LAST_BREATH)  # so that it is told from a connection that somebody cut
                raise
            if event["event"] == "STOP":
                self.stop = event
                self._must_end_within(self._limits.pause)
            elif event["event"] == "MIGRATION" and event["data"]["status"] == "completed":
                return
            elif event["event"] == "MIGRATION" and event["data"]["status"] in ("failed", "cancelled"):
                raise CprError("migration-failed", "The new QEMU did not take the guest over.")

    def _must_end_within(self, seconds: float) -> None:
        """Let it be overdue after so many seconds, unless this is called again."""
        self._due = asyncio.get_running_loop().time() + seconds
        self._set_timer()

    def _set_timer(self) -> None:
        self._cancel_timer()
        self._timer = asyncio.get_running_loop().call_at(self._due, self._overdue.set)

    def _cancel_timer(self) -> None:
        if self._timer:
            self._timer.cancel()

    def _took_too_long(self) -> CprError:
        update, limits = self._update, self._limits
        if update.mode == PRECOPY and self.stop is None:
            return CprError(
                "not-converging",
                f"The guest's RAM was not copied within {limits.copy:g} s: {update.copy_text()}.",
                "Let QEMU slow the guest down for it (live_update_capabilities: auto-converge), allow a longer pause"
                " (live_update_parameters: downtime-limit, in milliseconds), give it more time"
                " (live_update_copy_timeout), or try when the guest is calmer.",
            )
        hint = "The host or its disks may be overloaded: try again when they are calmer."
        if update.mode == CPR_REBOOT:
            hint = "Its RAM is written to a file while it stands still: allow it more (live_update_pause_limit)."
        return CprError(
            "pause-limit", f"The new QEMU did not take the guest over within {limits.pause:g} s from its stop.", hint
        )


class _Downtime:
    """How long a pause QEMU may aim at, in milliseconds: short at first, and longer where that does not do.

    It stops the guest as soon as what is left takes no longer, which with its default of 300 ms is long
    before there is little left.

    :param limit: the longest.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._next = _FIRST_DOWNTIME

    def next(self) -> dict[str, int]:
        """The arguments of ``migrate-set-parameters`` for the next try."""
        present = min(self._next, self._limit)
        self._next *= 2
        return {"downtime-limit": present}


def _main_channel(update: journal.Update) -> dict[str, t.Any]:
    address = {"transport": "socket", "type": "unix", "path": update.main_socket}
    return {"channel-type": "main", "addr": address}


async def listen(new: Monitor, arguments: dict[str, t.Any], timeout: float = COMMAND_TIMEOUT) -> None:
    """Let the new QEMU take the guest's state.

    Without exit-on-error a load error would end it before it can say why (QEMU 9.1).

    :param timeout: seconds for its answer; the guest may stand still by then.
    """
    try:
        await new.execute("migrate-incoming", {**arguments, "exit-on-error": False}, timeout)
    except CprError as error:
        if error.code != "qmp-error" or "exit-on-error" not in str(error.qemu_description):
            raise
        await new.execute("migrate-incoming", arguments, timeout)


async def _commit(
    update: journal.Update, ends: Ends, mark: journal.CommitMark, new_events: t.Any, pause_limit: float
) -> int:
    """Let the guest run on the new QEMU, and wait until it does; since when, in microseconds."""
    try:
        mark.set(True)
    except OSError as error:
        raise await _undo(update, ends, error) from error
    try:
        await ends.new.execute("cont", timeout=pause_limit)
        return microseconds(await asyncio.wait_for(_resumed(ends.new, new_events), pause_limit))
    except (CprError, asyncio.TimeoutError) as error:
        if isinstance(error, CprError) and error.code == "qmp-error":
            # Refused (an image that somebody locked, say): no instruction was run.
            mark.set(False)
            raise await _undo(update, ends, error) from error
        await _insist(update, ends, error)
        return time.time_ns() // 1000


async def _resumed(monitor: Monitor, events: t.Any) -> Event:
    while True:
        event = await monitor.next_event(events)
        if event["event"] == "RESUME":
            return event


async def _insist(update: journal.Update, ends: Ends, error: BaseException) -> None:
    """Go on with a new QEMU that was told to run the guest and has not said that it does.

    There is no way back any more, and telling it twice does no harm.
    """
    if ends.new_watch.identity.is_stopped():
        ends.new_watch.send(signal.SIGCONT)
    try:
        await ends.new.close()
        ends.new = await reach.new_qemu(update, ends.new_watch)
        await ends.new.execute("cont")
        status = (await ends.new.execute("query-status"))["status"]
    except CprError as failure:
        if ends.new_watch.ended.is_set():
            raise failures.new_qemu_gone(update) from error
        raise _unclear(update, failure) from error
    if status != "running":
        raise _unclear(update, error) from error


async def _undo(update: journal.Update, ends: Ends, error: BaseException) -> BaseException:
    """Bring the guest back on the old QEMU; the failure to raise, said in full."""
    if ends.old_watch.ended.is_set():
        return await rollback.give_up(update, ends.new_watch)
    try:
        state = await _bring_back(update, ends)
    except CprError as failure:
        if await ends.old_watch.wait(_LAST_BREATH):
            return await rollback.give_up(update, ends.new_watch)
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
    async with await reach.old_qemu(update, ends.old_watch) as monitor:
        return await rollback.bring_back(update, monitor, ends.new_watch)


def _unclear(update: journal.Update, error: BaseException) -> CprError:
    old, new = failures.both(update)
    return CprError(
        "state-unclear",
        f"The guest was told to go on in the new QEMU (process {new.pid}), and it is not known whether it did: {error}",
        f"Nothing else was done. Ask the new QEMU's monitor {new.monitor} for query-status. If it is running, run"
        f" again; if it is gone, the old QEMU (process {old.pid}) must not be continued: end it and start the guest anew.",
    )


def microseconds(event: Event) -> int:
    """When an event came, in microseconds since 1970."""
    return event["timestamp"]["seconds"] * 1_000_000 + event["timestamp"]["microseconds"]
