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
    process,
    qemu_binary,
    readiness,
    rehearsal,
)
from ansible_collections.vmfleet.cpr.plugins.module_utils.errors import CprError
from ansible_collections.vmfleet.cpr.plugins.module_utils.offer import Binary
from ansible_collections.vmfleet.cpr.plugins.module_utils.phases import preflight, rehearse
from ansible_collections.vmfleet.cpr.plugins.module_utils.task import Outcome, Task


async def assess_all(task: Task) -> list[Outcome]:
    """Judge the guests that were named, or all that run here, for a new binary.

    :raises CprError: as `qemu_binary.opened` and `guests.select`.
    """
    async with qemu_binary.opened(task.parameters["qemu_binary"]) as probe:
        names, selected = guests.select(task.guests, guests.by_name(process.find(), task.journal))
        wishes = handshake.Wishes.of(task.parameters)

        async def one(name: str) -> Outcome:
            inspection = await preflight.inspect(selected[name], task.journal.directory)
            blockers = await _whatever_the_mode(inspection, probe, wishes)
            warnings = inspection.warnings_for(probe.binary)
            # Not where it would take the last memory, nor where nothing is to be learnt.
            useful = not inspection.room and not _is_up_to_date(inspection, probe.binary)
            if task.parameters["rehearse"] and inspection.description and useful:
                for item in await rehearse.rehearse(
                    selected[name], inspection.description, probe.binary.path, timeout=task.timeout
                ):
                    (warnings if item.code == rehearsal.NOT_REHEARSED else blockers).append(item)
            return _outcome(name, inspection, probe.binary, blockers, warnings)

        return await task.for_each(names, "preflight", one)


def _is_up_to_date(inspection: preflight.Inspection, binary: Binary) -> bool:
    return inspection.process.executable_id == binary.executable_id


async def _whatever_the_mode(
    inspection: preflight.Inspection, probe: qemu_binary.Probe, wishes: handshake.Wishes
) -> list[CprError]:
    found = await inspection.unknown_to(probe)
    if inspection.observation:
        try:
            handshake.agree(inspection.observation.offer, probe.binary.offer, wishes)
        except CprError as error:
            found.append(error)
    return found


def _outcome(
    name: str,
    inspection: preflight.Inspection,
    binary: Binary,
    everywhere: list[CprError],
    warnings: list[CprError],
) -> Outcome:
    """Both sides of the judgement.

    :param everywhere: what stands in the way, whatever the mode.
    :param warnings: what does not, and should be known.
    """
    up_to_date = _is_up_to_date(inspection, binary)
    warnings = [] if up_to_date else warnings
    modes = {}
    for mode in readiness.MODES:
        blockers = [] if up_to_date else [*inspection.blockers_for(binary, mode), *everywhere]
        modes[mode] = {
            "verdict": "blocked" if blockers else "warning" if warnings else "ready",
            "reasons": [
                *({"severity": "blocker", **_as_dict(item)} for item in blockers),
                *({"severity": "warning", **_as_dict(item)} for item in warnings),
            ],
        }
    return Outcome(
        name,
        False,
        _sentence(inspection, binary, modes["cpr-transfer"], up_to_date),
        extra={
            "up_to_date": up_to_date,
            "modes": modes,
            "notes": inspection.description.notes if inspection.description else [],
        },
    )


def _as_dict(item: CprError) -> dict[str, str]:
    return {"code": item.code, "message": item.message, "hint": item.hint}


def _sentence(
    inspection: preflight.Inspection, binary: Binary, verdict: t.Mapping[str, t.Any], up_to_date: bool
) -> str:
    if up_to_date:
        return f"The guest runs on {binary.path} already."
    seen = inspection.observation
    versions = f" from QEMU {seen.offer.version_text}" if seen else ""
    said = {
        "ready": "The guest can go",
        "warning": "The guest can go, with a warning,",
        "blocked": "The guest can't go",
    }[verdict["verdict"]]
    reasons = [f"{item['message']} {item['hint']} [{item['code']}]" for item in verdict["reasons"]]
    notes = inspection.description.notes if inspection.description else []
    sentences = [f"{said}{versions} to {binary.offer.version_text} by cpr-transfer.", *reasons, *notes]
    return " ".join(sentences)
