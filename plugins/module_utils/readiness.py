# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Whether a guest is ready for a live update, and what stands in the way.

Pure functions over what the guest's monitor said. Private to the collection.
"""

from __future__ import annotations

import typing as t
from dataclasses import dataclass, field

from ansible_collections.vmfleet.cpr.plugins.module_utils.errors import CprError
from ansible_collections.vmfleet.cpr.plugins.module_utils.offer import Binary, Offer

MODES = ("cpr-transfer", "cpr-exec", "cpr-reboot")

# "setup" to "device" and the like: something is on its way. The rest have ended.
_MIGRATION_ENDED = (None, "none", "completed", "failed", "cancelled")


def may_try_modes(run_state: str, migration: str | None) -> bool:
    """Whether a guest's migration mode may be set for a moment: nobody else may be about to use it."""
    return migration in _MIGRATION_ENDED and run_state != "inmigrate"


@dataclass(frozen=True)
class Observation:
    """What a guest's monitor says about it.

    :ivar machine_type: versioned, as QEMU resolved it.
    :ivar run_state: of ``query-status``.
    :ivar migration: the status of ``query-migrate``, None where there never was one.
    :ivar memory_backends: what ``query-memdev`` returned.
    :ivar block_jobs: the devices or ids of ``query-block-jobs``.
    :ivar exports: the ids of ``query-block-exports``.
    :ivar blocked_reasons: for each mode that its QEMU has, QEMU's own reasons against it.
    :ivar aux_ram_share: the machine's property, None before QEMU 10.0, which lacks it.
    """

    machine_type: str
    run_state: str
    migration: str | None
    memory_backends: t.Sequence[t.Mapping[str, t.Any]]
    aux_ram_share: bool | None
    offer: Offer
    blocked_reasons: t.Mapping[str, t.Sequence[str]] = field(default_factory=dict)
    block_jobs: t.Sequence[str] = ()
    exports: t.Sequence[str] = ()


def blockers(observation: Observation, mode: str) -> list[CprError]:
    """What stands between a guest and a mode of live update; nothing if it is ready.

    :param mode: one of `MODES`.
    """
    found = []
    if observation.migration not in _MIGRATION_ENDED:
        found.append(
            CprError(
                "already-migrating",
                f"The guest is already migrating (status: {observation.migration}).",
                "Wait for that migration to end, or cancel it with migrate_cancel.",
            )
        )
    elif mode not in observation.offer.modes and may_try_modes(observation.run_state, observation.migration):
        found.append(
            CprError(
                "mode-missing",
                f"QEMU {observation.offer.version_text}, which runs the guest, does not have the mode {mode}.",
                "The guest must once be started, or migrated, into a QEMU that has it"
                " (cpr-transfer: 10.0, cpr-exec: 10.2).",
            )
        )
    if observation.block_jobs:
        found.append(
            CprError(
                "block-job-running",
                f"The guest has a block job running ({', '.join(observation.block_jobs)}), which the new QEMU would"
                " not have.",
                "Wait for it to end, or cancel it.",
            )
        )
    if observation.exports:
        found.append(
            CprError(
                "block-export-running",
                f"Other programs use the guest's disks through QEMU ({', '.join(observation.exports)}), and would be cut"
                " off.",
                "Let them end (a backup, say), or remove the exports (block-export-del, nbd-server-stop).",
            )
        )
    if observation.run_state not in ("running", "paused"):
        found.append(
            CprError(
                "run-state",
                f"The guest's run state is {observation.run_state}; only a running or paused one can be updated.",
                "Bring the guest back to running, or leave it out of live_update_guests.",
            )
        )
    # cpr-reboot writes to the file what isn't shared. The others need every block of RAM to
    # be shared: QEMU itself does not check it for cpr-exec, and the guest would be lost.
    if mode != "cpr-reboot":
        found.extend(_memory_blockers(observation))
    found.extend(
        CprError(
            "migration-blocked",
            f"QEMU refuses {mode} for this guest: {reason}",
            "Take away what QEMU names, or leave this guest out of live_update_guests.",
            qemu_description=reason,
        )
        for reason in observation.blocked_reasons.get(mode, ())
    )
    return found


def _memory_blockers(observation: Observation) -> t.Iterator[CprError]:
    private = [item.get("id") or "(unnamed)" for item in observation.memory_backends if not item.get("share")]
    if private:
        size = sum(item["size"] for item in observation.memory_backends if not item.get("share")) >> 20
        yield CprError(
            "memory-not-shared",
            f"The guest's RAM is not shared (memory backend {', '.join(private)}), so another QEMU can't take it over.",
            f"Its command line would need: -object memory-backend-memfd,id=ram0,size={size}M,share=on"
            " -machine memory-backend=ram0,aux-ram-share=on. This can't be changed while it runs.",
        )
    elif not observation.aux_ram_share:
        yield CprError(
            "aux-ram-not-shared",
            "The guest's auxiliary RAM (video memory, ROMs) is not shared, so another QEMU can't take it over.",
            "Its command line would need: -machine aux-ram-share=on. This can't be changed while it runs.",
        )


def binary_blockers(observation: Observation, binary: Binary) -> list[CprError]:
    """What stands between a guest and this new binary; nothing if it fits."""
    found = []
    if binary.offer.architecture != observation.offer.architecture:
        found.append(
            CprError(
                "binary-wrong-architecture",
                f"{binary.path} emulates {binary.offer.architecture}, and the guest is"
                f" {observation.offer.architecture}.",
                f"Give the path of a qemu-system-{observation.offer.architecture}.",
            )
        )
        return found  # all else would be about the wrong machine
    if binary.offer.version < observation.offer.version:
        # QEMU refuses it late, with "vmstate_load_state error -2" (11.1 to 10.0).
        found.append(
            CprError(
                "older-qemu",
                f"The guest runs on QEMU {observation.offer.version_text} and {binary.path} is older"
                f" ({binary.offer.version_text}); cpr-transfer does not go back.",
                "Choose a QEMU of the same or a later version.",
            )
        )
    if observation.machine_type not in binary.machine_types:
        found.append(
            CprError(
                "machine-type-missing",
                f"The guest's machine type {observation.machine_type} is no longer in QEMU {binary.offer.version_text}.",
                "QEMU removes machine types after six years: restart the guest with a newer one,"
                " or choose a QEMU that still has it.",
            )
        )
    if "cpr-transfer" not in binary.offer.modes:
        found.append(
            CprError(
                "mode-missing",
                f"{binary.path} is QEMU {binary.offer.version_text} and does not have the mode cpr-transfer.",
                "Choose QEMU 10.0 or later.",
            )
        )
    return found
