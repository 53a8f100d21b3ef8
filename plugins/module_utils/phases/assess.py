# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What an update of each guest would meet, by each mode. Changes nothing.

Private to the collection.
"""

from __future__ import annotations

import typing as t

from ansible_collections.vmfleet.cpr.plugins.module_utils import (
    guests,
    handshake,
    modes,
    process,
    qemu_binary,
    rehearsal,
)
from ansible_collections.vmfleet.cpr.plugins.module_utils.errors import CprError
from ansible_collections.vmfleet.cpr.plugins.module_utils.offer import Binary
from ansible_collections.vmfleet.cpr.plugins.module_utils.phases import preflight, rehearse
from ansible_collections.vmfleet.cpr.plugins.module_utils.task import Outcome, Task


async def assess_all(task: Task) -> list[Outcome]:
    """Judge the guests that were named, or all that run here, for a new binary.

    One that is named and does not run fails alone, and so does one whose update was begun and that runs no more.

    :raises CprError: as `qemu_binary.opened`, and as `guests.select` where none is named.
    """
    async with qemu_binary.opened(task.parameters["qemu_binary"]) as probe:
        everyone = guests.by_name(process.find(), task.journal)
        names = task.guests or sorted({*guests.select([], everyone)[0], *task.journal.guests_under_way()})
        wishes = handshake.Wishes.of(task.parameters)

        async def one(name: str) -> Outcome:
            qemu = guests.select([name], everyone)[1][name]
            inspection = await preflight.inspect(qemu, task.journal.directory)
            disagreements = _disagreements(inspection, probe.binary, wishes)
            choice, blockers = await inspection.choose(probe, task.parameters, disagreements)
            warnings = inspection.warnings_for(probe.binary)
            # Not where nothing is to be learnt.
            useful = isinstance(choice, modes.Choice) and not _is_up_to_date(inspection, probe.binary)
            if task.parameters["rehearse"] and inspection.description and useful:
                options = inspection.options_for(probe.binary, choice.mode)
                running = inspection.description.running
                for item in await rehearse.rehearse(qemu, options, running, probe.binary.path, timeout=task.timeout):
                    if item.code == rehearsal.NOT_REHEARSED:
                        warnings.append(item)
                    else:
                        choice = [*choice, item] if isinstance(choice, list) else [item]
                        for found in blockers.values():
                            found.append(item)
            outcome = _outcome(name, inspection, probe.binary, blockers, choice, warnings)
            outcome.update = task.journal.load(name)
            return outcome

        unnamed = [] if task.guests else everyone.get(None, [])
        return [*await task.for_each(names, "preflight", one), *map(_unnamed, unnamed)]


def _unnamed(qemu: process.QemuProcess) -> Outcome:
    pid = qemu.identity.pid
    reason = guests.unnamed(qemu)
    judged = {"up_to_date": False, "mode": None, **_verdict([reason], [])}
    return Outcome(f"process {pid}", False, str(reason), extra={"pid": pid, "unnamed": True, **judged})


def _is_up_to_date(inspection: preflight.Inspection, binary: Binary) -> bool:
    return inspection.process.executable_id == binary.executable_id


def _disagreements(
    inspection: preflight.Inspection, binary: Binary, wishes: handshake.Wishes
) -> dict[str, list[CprError]]:
    """What both QEMUs could not agree on in each mode."""
    found: dict[str, list[CprError]] = {mode: [] for mode in modes.MODES}
    for mode in modes.MODES if inspection.observation else ():
        try:
            offer = t.cast("t.Any", inspection.observation).offer
            handshake.agree(offer, binary.offer, wishes, mode, in_place=inspection.memory_in_place)
        except CprError as error:
            found[mode].append(error)
    return found


def _outcome(
    name: str,
    inspection: preflight.Inspection,
    binary: Binary,
    of_each: t.Mapping[str, list[CprError]],
    choice: modes.Choice | list[CprError],
    warnings: list[CprError],
) -> Outcome:
    """Both sides of the judgement.

    :param of_each: what stands in the way of each mode, a rehearsal counted for all.
    :param choice: the mode that the guest would take, or what stands in the way of that.
    :param warnings: what does not, and should be known.
    """
    up_to_date = _is_up_to_date(inspection, binary)
    warnings = [] if up_to_date else warnings
    verdicts = {mode: _verdict([] if up_to_date else blockers, warnings) for mode, blockers in of_each.items()}
    chosen = choice if isinstance(choice, modes.Choice) else None
    overall = _verdict([] if up_to_date or chosen else t.cast("list[CprError]", choice), warnings)
    return Outcome(
        name,
        False,
        _sentence(inspection, binary, chosen, overall, up_to_date),
        extra={
            **inspection.facts(),
            "wanted_version": binary.offer.version_text,
            "up_to_date": up_to_date,
            "mode": chosen.mode if chosen and not up_to_date else None,
            **overall,
            "modes": verdicts,
        },
    )


def _verdict(blockers: list[CprError], warnings: list[CprError]) -> dict[str, t.Any]:
    return {
        "verdict": "blocked" if blockers else "warning" if warnings else "ready",
        "reasons": [
            *({"severity": "blocker", **_as_dict(item)} for item in blockers),
            *({"severity": "warning", **_as_dict(item)} for item in warnings),
        ],
    }


def _as_dict(item: CprError) -> dict[str, str]:
    return {"code": item.code, "message": item.message, "hint": item.hint}


def _sentence(
    inspection: preflight.Inspection,
    binary: Binary,
    chosen: modes.Choice | None,
    overall: t.Mapping[str, t.Any],
    up_to_date: bool,
) -> str:
    if up_to_date:
        return f"The guest runs on {binary.path} already."
    seen = inspection.observation
    versions = f" from QEMU {seen.offer.version_text}" if seen else ""
    said = {
        "ready": "The guest can go",
        "warning": "The guest can go, with a warning,",
        "blocked": "The guest can't go",
    }[overall["verdict"]]
    way = f" by {chosen.mode}" if chosen else ""
    reasons = [f"{item['message']} {item['hint']} [{item['code']}]" for item in overall["reasons"]]
    notes = inspection.description.notes if inspection.description else []
    why = [chosen.reason] if chosen else []
    return " ".join([f"{said}{versions} to {binary.offer.version_text}{way}.", *why, *reasons, *notes])
