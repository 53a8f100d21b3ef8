# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""One task on one host: its guests, what is done to each, and what became of each.

Private to the collection.
"""

from __future__ import annotations

import asyncio
import typing as t
from dataclasses import dataclass, field

from ansible_collections.vmfleet.cpr.plugins.module_utils.errors import CprError
from ansible_collections.vmfleet.cpr.plugins.module_utils.journal import Journal, Update


@dataclass
class Outcome:
    """What a phase did to one guest.

    :ivar message: what was done, or would be done, as a sentence.
    :ivar update: the guest's update record, where there is one.
    :ivar extra: what only this module returns of a guest.
    :ivar diff: ``before`` and ``after`` for diff mode.
    """

    guest: str
    changed: bool
    message: str
    update: Update | None = None
    error: CprError | None = None
    extra: dict[str, t.Any] = field(default_factory=dict)
    diff: dict[str, str] | None = None

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
    """

    parameters: dict[str, t.Any]
    check_mode: bool

    def __post_init__(self) -> None:
        self.guests: list[str] = list(dict.fromkeys(self.parameters["guests"] or []))
        self.timeout: float = self.parameters["timeout"]
        self.concurrency: int = self.parameters["concurrency"]
        self.journal = Journal(self.parameters["state_directory"])

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
            with self.journal.lock(guest):
                update = self.journal.load(guest) or self.journal.create(guest)
                return await phase(update, timeout=self.timeout, **options)

        return await self.for_each(self.guests, phase.__name__.replace("_", "-"), one)

    def _record(self, name: str) -> Update | None:
        try:
            return self.journal.load(name)
        except CprError:
            return None
