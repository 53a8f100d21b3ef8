# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""One task on one host: its guests, what is done to each, and what became of each.

Private to the collection.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import typing as t
from dataclasses import dataclass, field

from ansible_collections.vmfleet.cpr.plugins.module_utils.errors import CprError
from ansible_collections.vmfleet.cpr.plugins.module_utils.journal import SILENCE, Journal, Update, local_time


@dataclass
class Outcome:
    """What a phase did to one guest.

    :ivar message: what was done, or would be done, as a sentence.
    :ivar update: the guest's update record, where there is one.
    :ivar extra: what only this module returns of a guest.
    :ivar warnings: what Ansible shall show to whoever watches the run, as sentences.
    :ivar diff: ``before`` and ``after`` for diff mode.
    """

    guest: str
    changed: bool
    message: str
    update: Update | None = None
    error: CprError | None = None
    extra: dict[str, t.Any] = field(default_factory=dict)
    diff: dict[str, str] | None = None
    warnings: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, t.Any]:
        """The same shape from every module, for one guest or many."""
        update = self.update

        def qemu(which: t.Any) -> dict[str, t.Any] | None:
            return which and {
                "pid": which.pid,
                "binary": which.executable,
                "version": which.version,
                "monitor": which.monitor,
            }

        return {
            "name": self.guest,
            "changed": self.changed,
            "failed": self.error is not None,
            "message": self.message,
            "error": self.error.as_dict() if self.error else None,
            "phase": update.phase if update else None,
            "old": qemu(update.old) if update else None,
            "new": qemu(update.new) if update else None,
            "mode": update.mode if update else None,
            "mode_reason": update.mode_reason if update else None,
            "pause_ms": update.pause_ms if update else None,
            "durations_ms": dict(update.durations_ms) if update else {},
            **self.extra,
        }


Phase = t.Callable[..., t.Awaitable[Outcome]]


@dataclass
class Task:
    """One Ansible task on one host.

    :ivar guests: the names it was given.
    :ivar concurrency: how many guests are worked on side by side.
    :ivar timeout: seconds for each guest.
    :ivar run: the run of Ansible that this task belongs to, ``key`` and ``who``; None outside of one.
    :ivar ended_runs: the keys of runs that are known to have ended.
    :ivar warnings: what Ansible shall show of the host as a whole, as sentences.
    :ivar is_abandoned: whether whoever waits for this task is gone.
    """

    parameters: dict[str, t.Any]
    check_mode: bool
    is_abandoned: t.Callable[[], bool] = lambda: False

    def __post_init__(self) -> None:
        self.guests: list[str] = list(dict.fromkeys(self.parameters["guests"] or []))
        self.warnings: list[str] = []
        self.timeout: float = self.parameters["timeout"]
        self.concurrency: int = self.parameters["concurrency"]
        self.journal = Journal(self.parameters["state_directory"])
        self.run: dict[str, str] | None = self.parameters.get("run")
        self.ended_runs: t.Container[str] = self.parameters.get("ended_runs") or ()

    def other_runs(self) -> list[str]:
        """The keys of other runs that have updates of these guests under way."""
        records = map(self._record, self.guests or self.journal.guests())
        return sorted({record.run["key"] for record in records if record and record.run and self._is_others(record)})

    def _is_others(self, update: Update) -> bool:
        return update.is_under_way and None not in (self.run, update.run) and update.run["key"] != self.run["key"]

    @contextlib.contextmanager
    def hold(self, guest: str) -> t.Iterator[Update]:
        """A guest's record, empty if it has none, kept from every other task and run.

        :raises CprError: ``guest-locked``, ``guest-held`` with who holds it and since when;
            ``state-directory``.
        """
        with self.journal.lock(guest):
            update = self.journal.load(guest) or self.journal.create(guest)
            if self._is_others(update) and update.run["key"] not in self.ended_runs:
                self._refuse_unless_silent(update)
            yield update

    def claim(self, update: Update) -> None:
        """Make an update this run's own."""
        if self.run and (update.run or {}).get("key") != self.run["key"]:
            update.run = {**self.run, "since": local_time(time.time())}

    def _refuse_unless_silent(self, update: Update) -> None:
        free_at = update.changed_at + SILENCE
        if time.time() < free_at:
            raise CprError(
                "guest-held",
                f"Another run works on this guest: {update.run['who']}, since {update.run['since']}; it is {update.phase}"
                f" since {local_time(update.changed_at)}.",
                "Let it end, then run again. If it died: run again from its control node, which can tell, or after"
                f" {local_time(free_at)}.",
            )

    async def for_each(
        self, names: t.Iterable[str], phase: str, work: t.Callable[[str], t.Awaitable[Outcome]]
    ) -> list[Outcome]:
        """Do something to every guest, side by side, and say of each how it went.

        One guest's failure stops no other. An unexpected exception is raised only when all
        have ended: nothing is torn out of the middle of a switch.

        :param phase: what a failure calls the phase.
        """
        slots = asyncio.Semaphore(self.concurrency)

        async def one(name: str) -> Outcome:
            async with slots:
                try:
                    return await work(name)
                except CprError as error:
                    failure = error
                except OSError as error:
                    failure = CprError("host-error", f"The host refused an operation: {error}.")
                failure.guest = failure.guest or name
                failure.phase = failure.phase or phase
                return Outcome(name, False, str(failure), self._record(name), failure)

        results = await asyncio.gather(*(one(name) for name in names), return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result
        return t.cast("list[Outcome]", results)

    async def for_each_update(
        self, phase: Phase, *, done: t.Container[str | None], would: str, **options: t.Any
    ) -> list[Outcome]:
        """Run a phase on every guest's update record, under the guest's lock.

        :param phase: ``async (update, *, timeout, **options) -> Outcome``.
        :param done: the phases of a record in which there is nothing left to do.
        :param would: what check mode says that it would do, as a sentence.
        """

        async def one(guest: str) -> Outcome:
            if self.check_mode:
                record = self.journal.load(guest)
                nothing = record is not None and record.phase in done
                return Outcome(guest, not nothing, "Nothing would be done." if nothing else would, record)
            with self.hold(guest) as update:
                self.claim(update)
                under_way = update.is_under_way
                try:
                    return await phase(update, timeout=self.timeout, **options)
                except CprError as error:
                    if under_way:
                        with contextlib.suppress(CprError):  # the failure itself says more
                            update.enter(update.phase, str(error))
                    raise

        return await self.for_each(self.guests, phase.__name__.replace("_", "-"), one)

    def _record(self, name: str) -> Update | None:
        try:
            return self.journal.load(name)
        except CprError:
            return None
