# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Whether a guest is ready for a live update, and what stands in the way.

Pure functions over what the guest's monitor said. Private to the collection.
"""

from __future__ import annotations

import typing as t
from dataclasses import dataclass, field

from ansible_collections.vmfleet.cpr.plugins.module_utils.command_line import Option, read_properties
from ansible_collections.vmfleet.cpr.plugins.module_utils.errors import CprError
from ansible_collections.vmfleet.cpr.plugins.module_utils.offer import Binary, Offer

MODES = ("cpr-transfer", "cpr-exec", "cpr-reboot")

# What -device and -machine take beside properties of the device or machine itself.
_OF_OPTIONS = frozenset(
    ["", "driver", "id", "bus", "type", "accel", "kernel-irqchip", "kernel_irqchip", "kvm-shadow-mem", "kvm_shadow_mem"]
)

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
    :ivar block_jobs: the ids of jobs that run, on disks (``query-block-jobs``) or else (``query-jobs``).
    :ivar exports: the ids of ``query-block-exports``.
    :ivar blocked_reasons: for each mode that its QEMU has, QEMU's own reasons against it.
    :ivar device_types: of all its devices and of its processors, as QOM types.
    :ivar kvm: whether it runs under KVM.
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
    device_types: frozenset[str] = frozenset()
    kvm: bool = False


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


def binary_blockers(observation: Observation, binary: Binary, mode: str = "cpr-transfer") -> list[CprError]:
    """What stands between a guest and this new binary; nothing if it fits."""
    offer = binary.offer
    if offer.architecture != observation.offer.architecture:
        return [  # all else would be about the wrong machine
            CprError(
                "binary-wrong-architecture",
                f"{binary.path} emulates {offer.architecture}, and the guest is {observation.offer.architecture}.",
                f"Give the path of a qemu-system-{observation.offer.architecture}.",
            )
        ]
    found = []
    # QEMU refuses it late, with "vmstate_load_state error -2" (11.1 to 10.0); cpr-reboot went back too.
    if offer.version < observation.offer.version and mode != "cpr-reboot":
        found.append(
            CprError(
                "older-qemu",
                f"The guest runs on QEMU {observation.offer.version_text} and {binary.path} is older"
                f" ({offer.version_text}); {mode} does not go back.",
                "Choose a QEMU of the same or a later version.",
            )
        )
    if observation.machine_type not in binary.machine_types:
        found.append(
            CprError(
                "machine-type-missing",
                f"The guest's machine type {observation.machine_type} is no longer in QEMU {offer.version_text}.",
                "QEMU removes machine types after six years: restart the guest with a newer one,"
                " or choose a QEMU that still has it.",
            )
        )
    if mode not in offer.modes:
        found.append(
            CprError(
                "mode-missing",
                f"{binary.path} is QEMU {offer.version_text} and does not have the mode {mode}.",
                "Choose QEMU 10.0 or later for cpr-transfer, 10.2 for cpr-exec, 8.2 for cpr-reboot.",
            )
        )
    missing = sorted(observation.device_types - binary.device_types)
    if missing and binary.device_types:
        found.append(
            CprError(
                "device-missing",
                f"{binary.path} does not have what the guest has: {', '.join(missing)}.",
                "Install the packages that hold the rest of this build (modules in a package of their own?), or choose"
                " a QEMU that has them.",
            )
        )
    if observation.kvm and not binary.kvm:
        found.append(
            CprError(
                "accelerator-missing",
                f"The guest runs under KVM, and {binary.path} was built without it.",
                "Choose a QEMU with KVM.",
            )
        )
    return found


def sandbox_blockers(options: t.Iterable[Option], mode: str) -> list[CprError]:
    """What of ``-sandbox`` stands in a mode's way: cpr-exec is a call of exec."""
    if mode != "cpr-exec" or not any(
        option.name == "sandbox" and read_properties(option).get("spawn") == "deny" for option in options
    ):
        return []
    return [
        CprError(
            "sandbox-denies-exec",
            "The guest's QEMU may not start programs (-sandbox spawn=deny), so it can't become another by cpr-exec.",
            "Use cpr-transfer.",
        )
    ]


def warnings(observation: Observation, binary: Binary | None) -> list[CprError]:
    """What stands in no update's way and what its owner should know."""
    found = []
    if observation.run_state == "paused":
        found.append(
            CprError(
                "guest-paused",
                "The guest is paused, and will be afterwards: nobody will see before it goes on whether it is well.",
                "Let it go on first, if its pause is not wanted.",
            )
        )
    if binary and observation.machine_type in binary.deprecated:
        found.append(
            CprError(
                "machine-type-deprecated",
                f"QEMU {binary.offer.version_text} still has the guest's machine type {observation.machine_type}, and"
                " one of the next versions won't.",
                "Choose a newer one when the guest next starts.",
            )
        )
    return found


def unknown_properties(
    options: t.Iterable[Option], machine: str, properties: t.Mapping[str, t.Container[str]]
) -> list[CprError]:
    """What the guest's command line sets and the new binary does not know.

    :param machine: the QOM type of the guest's machine.
    :param properties: of the QOM types of ``-device`` and ``-machine``, as far as they are known.
    """
    found = []
    for option in options:
        if option.name not in ("device", "machine"):
            continue
        given = read_properties(option)
        kind = machine if option.name == "machine" else given.implied or given.get("driver") or ""
        known = properties.get(kind)
        if not known:
            continue
        names = {(key or "").split(".")[0] for key, dummy in given.pairs} - _OF_OPTIONS
        unknown = sorted(name for name in names if name not in known and name.replace("_", "-") not in known)
        if unknown:
            found.append(
                CprError(
                    "property-missing",
                    f"The new QEMU's {kind} does not have what the guest's command line sets: {', '.join(unknown)}.",
                    "Start the guest without it when it next starts, or choose a QEMU that has it.",
                )
            )
    return found
