# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What runs on a host: the facts of its guests. Changes nothing.

Private to the collection.
"""

from __future__ import annotations

import contextlib
import json
import typing as t

from ansible_collections.vmfleet.cpr.plugins.module_utils import guests, journal, modes, offer, process, qemu_binary
from ansible_collections.vmfleet.cpr.plugins.module_utils.errors import CprError
from ansible_collections.vmfleet.cpr.plugins.module_utils.phases import preflight
from ansible_collections.vmfleet.cpr.plugins.module_utils.task import Outcome, Task


async def inspect_all(task: Task) -> list[Outcome]:
    """Look at the guests that were named, or at all that run here.

    One that is named and does not run fails alone, with ``guest-not-found``.

    :raises CprError: as `qemu_binary.probe` where a binary was given, and as `guests.select` where none is named.
    """
    path = task.parameters["qemu_binary"]
    binary = await qemu_binary.probe(path) if path else None
    found = guests.by_name(process.find(), task.journal)
    names = task.guests or guests.select([], found)[0]

    async def one(name: str) -> Outcome:
        qemu = guests.select([name], found)[1][name]
        inspection = await preflight.inspect(qemu, task.journal.directory)
        update = task.journal.load(name)
        facts = {**_facts(inspection, binary), "copy": _copy(update), "unnamed": False}
        return Outcome(name, False, _sentence(inspection), update, extra=facts)

    unnamed = [] if task.guests else found.get(None, [])
    return [*await task.for_each(names, "preflight", one), *(_unnamed(qemu, binary) for qemu in unnamed)]


def _unnamed(qemu: process.QemuProcess, binary: offer.Binary | None) -> Outcome:
    inspection = preflight.Inspection(qemu, blockers=[guests.unnamed(qemu)])
    facts = {**_facts(inspection, binary), "copy": None, "unnamed": True}
    return Outcome(f"process {qemu.identity.pid}", False, _sentence(inspection), extra=facts)


def _copy(update: journal.Update | None) -> dict[str, t.Any] | None:
    """How far the copy of a guest's RAM is that goes on now."""
    if update is None or update.phase != journal.SWITCHING:
        return None
    with contextlib.suppress(OSError, ValueError), open(update.progress, encoding="ascii") as stream:
        return json.load(stream)
    return None


def _facts(inspection: preflight.Inspection, binary: offer.Binary | None) -> dict[str, t.Any]:
    def as_dicts(blockers: t.Iterable[CprError]) -> list[dict[str, str]]:
        return [{"code": item.code, "message": item.message, "hint": item.hint} for item in blockers]

    ready = {}
    for mode in modes.MODES:
        blockers = inspection.blockers_of(mode)
        ready[mode] = {"ready": not blockers, "blockers": as_dicts(blockers)}
    facts: dict[str, t.Any] = {**inspection.facts(), "modes": ready}
    if binary:
        by_mode = {mode: inspection.blockers_for(binary, mode) for mode in modes.MODES}
        choice = modes.choose(modes.AUTO, by_mode, adopt=True, memory_in_place=inspection.memory_in_place)
        up_to_date = inspection.process.executable_id == binary.executable_id
        facts["up_to_date"] = up_to_date
        facts["wanted_version"] = binary.offer.version_text
        facts["update_mode"] = None if up_to_date or isinstance(choice, list) else choice.mode
        facts["update_blockers"] = as_dicts(choice) if isinstance(choice, list) and not up_to_date else []
    return facts


def _sentence(inspection: preflight.Inspection) -> str:
    seen = inspection.observation
    if seen is None:
        return str(inspection.blockers[-1])
    ready = [mode for mode in modes.MODES if not inspection.blockers_of(mode)]
    return (
        f"The guest is {seen.run_state} on QEMU {seen.offer.version_text}, ready for {', '.join(ready) or 'no mode'}."
    )
