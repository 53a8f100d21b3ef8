# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The QEMU that a guest whose state goes to a file will go on in.

Private to the collection.
"""

from __future__ import annotations

import contextlib
import dataclasses
import typing as t

from ansible_collections.vmfleet.cpr.plugins.module_utils import (
    offer,
    process,
    qemu_binary,
    readiness,
    rehearsal,
)
from ansible_collections.vmfleet.cpr.plugins.module_utils.modes import CPR_REBOOT
from ansible_collections.vmfleet.cpr.plugins.module_utils.phases import preflight, rehearse
from ansible_collections.vmfleet.cpr.plugins.module_utils.task import Task


@dataclasses.dataclass
class Successor:
    """The binary that a guest will be restored with.

    :ivar warnings: what could not be tried of it, as sentences.
    """

    path: str
    offer: offer.Offer
    warnings: list[str] = dataclasses.field(default_factory=list)


class Successors:
    """Finds each guest's, and tries it where the guest runs another one: once its QEMU has ended it is too late."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._stack = contextlib.AsyncExitStack()
        self._probes: dict[str, qemu_binary.Probe] = {}

    async def __aenter__(self) -> Successors:
        return self

    async def __aexit__(self, *dummy: object) -> None:
        await self._stack.aclose()

    async def of(self, inspection: preflight.Inspection) -> Successor:
        """The binary that was given, or else what lies at the path of the guest's own by now.

        :raises CprError: as `qemu_binary.opened`, or what stands between the guest and that binary.
        """
        qemu, observation = inspection.process, t.cast("t.Any", inspection.observation)
        path = self._task.parameters["qemu_binary"] or qemu.executable
        if process.file_id(path) == qemu.executable_id:
            return Successor(path, observation.offer)
        if path not in self._probes:
            self._probes[path] = await self._stack.enter_async_context(qemu_binary.opened(path))
        probe = self._probes[path]
        if probe.binary.executable_id == qemu.executable_id:
            return Successor(path, observation.offer)
        options = inspection.options_for(probe.binary, CPR_REBOOT)
        running = t.cast("t.Any", inspection.description).running
        successor = Successor(path, probe.binary.offer)
        for blocker in readiness.binary_blockers(observation, probe.binary, CPR_REBOOT):
            raise blocker
        for blocker in await inspection.unknown_to(probe, CPR_REBOOT):
            raise blocker
        for item in await rehearse.rehearse(qemu, options, running, path, timeout=self._task.timeout):
            if item.code == rehearsal.NOT_REHEARSED:
                successor.warnings.append(str(item))
            elif item.code not in self._task.parameters["accept_differences"]:
                raise item
        return successor
