# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Whether a guest is ready for a live update, and what stands in the way.

Pure functions over what the guest's monitor said. Private to the collection.
"""

from __future__ import annotations

import typing as t
from dataclasses import dataclass, field

from ansible_collections.vmfleet.cpr.plugins.module_utils import new_command_line
from ansible_collections.vmfleet.cpr.plugins.module_utils.command_line import Option, Properties, read_properties
from ansible_collections.vmfleet.cpr.plugins.module_utils.errors import CprError
from ansible_collections.vmfleet.cpr.plugins.module_utils.memory import Block
from ansible_collections.vmfleet.cpr.plugins.module_utils.modes import CPR_EXEC, CPR_TRANSFER, PRECOPY
from ansible_collections.vmfleet.cpr.plugins.module_utils.offer import Binary, Offer

# Seen with bare migrations from 7.2, without this collection; not from 10.0 and 11.1: see docs/modes.md.
TCG_PRECOPY = "tcg-precopy"
_TCG_COPIES = (10, 0, 0)
# The first whose monitor tells all that is asked here (x-query-usb).
_OLDEST = (6, 2, 0)
# Of what a rehearsal replaces the kinds that every build of QEMU has.
_REHEARSED = {
    "display": ("none",),
    "audiodev": ("none",),
    "chardev": ("socket", "file", "null", "stdio", "ringbuf"),
    "netdev": ("user", "hubport"),
    "nic": ("user", "none"),
    "net": ("user", "none", "nic"),
}
# These go to the same or a later version only.
_FORWARD_ONLY = (CPR_TRANSFER, CPR_EXEC)

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
    :ivar memory: the guest's RAM, by its backends.
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
    memory: t.Sequence[Block]
    aux_ram_share: bool | None
    offer: Offer
    blocked_reasons: t.Mapping[str, t.Sequence[str]] = field(default_factory=dict)
    block_jobs: t.Sequence[str] = ()
    exports: t.Sequence[str] = ()
    device_types: frozenset[str] = frozenset()
    kvm: bool = False

    @property
    def memory_in_place(self) -> bool:
        """Whether another QEMU can map all of the RAM where it is, and still can once this one has ended."""
        return bool(self.memory) and all(block.is_in_place and not block.discarded for block in self.memory)

    @property
    def writes_its_memory(self) -> int:
        """How many bytes of RAM ``cpr-reboot`` writes to a file."""
        return 0 if self.memory_in_place else sum(block.size for block in self.memory)


def blockers(observation: Observation, mode: str) -> list[CprError]:
    """What stands between a guest and a mode of live update; nothing if it is ready.

    :param mode: one of `modes.MODES`.
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
    elif mode == PRECOPY:
        if not observation.kvm and observation.offer.version < _TCG_COPIES:
            found.append(
                CprError(
                    TCG_PRECOPY,
                    f"The guest does not run under KVM, and QEMU {observation.offer.version_text} may lose some of what a busy"
                    " guest under TCG writes while its RAM is copied.",
                    "Restart the guest instead. One that hardly writes may do: live_update_accept_differences with"
                    f" {TCG_PRECOPY} goes on at your risk.",
                )
            )
        if observation.offer.version < _OLDEST:
            found.append(
                CprError(
                    "mode-missing",
                    f"QEMU {observation.offer.version_text}, which runs the guest, is older than 6.2 and can't be asked"
                    " all that its RAM's copy needs.",
                    "Restart the guest.",
                )
            )
    elif mode not in observation.offer.modes and may_try_modes(observation.run_state, observation.migration):
        found.append(
            CprError(
                "mode-missing",
                f"QEMU {observation.offer.version_text}, which runs the guest, does not have the mode {mode}.",
                "The guest must once be started, or migrated, into a QEMU that has it"
                " (cpr-transfer: 10.0, cpr-exec: 10.2, cpr-reboot: 8.2).",
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
    # The two that keep the RAM where it is need every block of it to be shared: QEMU itself does
    # not check it for cpr-exec, and the guest would be lost.
    if mode in (CPR_TRANSFER, CPR_EXEC):
        found.extend(_memory_blockers(observation))
    if mode == CPR_TRANSFER:
        found.extend(_discarded(observation))
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
    private = [block for block in observation.memory if not block.shared]
    if private:
        size = sum(block.size for block in private) >> 20
        yield CprError(
            "memory-not-shared",
            f"The guest's RAM is not shared (memory backend {', '.join(block.name for block in private)}), so another QEMU"
            " can't take it over.",
            "Let it be copied once into a QEMU that shares it (live_update_mode precopy, or auto). Or give it, when it next"
            f" starts: -object memory-backend-memfd,id=ram0,size={size}M,share=on"
            " -machine memory-backend=ram0,aux-ram-share=on.",
        )
    elif not observation.aux_ram_share:
        yield CprError(
            "aux-ram-not-shared",
            "The guest's auxiliary RAM (video memory, ROMs) is not shared, so another QEMU can't take it over.",
            "Let its RAM be copied once into a QEMU that shares it (live_update_mode precopy, or auto). Or give it, when it"
            " next starts: -machine aux-ram-share=on.",
        )


def _discarded(observation: Observation) -> t.Iterator[CprError]:
    """RAM that the old QEMU would wipe when it ends, with the guest in the new one (seen with 10.0)."""
    for block in observation.memory:
        if block.shared and block.discarded:
            yield CprError(
                "memory-discarded",
                f"The guest's memory backend {block.name} has discard-data=on: the old QEMU would empty the guest's RAM"
                " when it ends.",
                f"Switch that off at the guest's monitor: qom-set with path /objects/{block.name}, property discard-data"
                " and value false (vmfleet.cpr.qmp_command does it).",
            )


def binary_blockers(observation: Observation, binary: Binary, mode: str = CPR_TRANSFER) -> list[CprError]:
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
    # QEMU refuses it late, with "vmstate_load_state error -2" (11.1 to 10.0).
    if offer.version < observation.offer.version and mode in _FORWARD_ONLY:
        found.append(
            CprError(
                "older-qemu",
                f"The guest runs on QEMU {observation.offer.version_text} and {binary.path} is older"
                f" ({offer.version_text}); {mode} does not go back.",
                "Choose a QEMU of the same or a later version, or go back by precopy or cpr-reboot (live_update_mode).",
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
    if mode != PRECOPY and mode not in offer.modes:
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


def exec_blockers(options: t.Sequence[Option], kept: t.Mapping[int, str], *, moved: bool) -> list[CprError]:
    """What would make the new QEMU fail after cpr-exec, when there is no old one any more.

    :param options: the guest's.
    :param kept: what of its QEMU's descriptors stays open in the program that it becomes.
    :param moved: whether the process left the directory that its relative paths belong to.
    """
    sandbox = [read_properties(option) for option in options if option.name == "sandbox"]
    found = []
    if any(item.get("spawn") == "deny" for item in sandbox):
        found.append(
            _exec_refused("sandbox-denies-exec", "The guest's QEMU may not start programs (-sandbox spawn=deny)")
        )
    if new_command_line.changes_user(options):
        found.append(
            _exec_refused("exec-changes-user", "The guest's QEMU has given up the rights to become its user (-runas)")
        )
    # Seen with 11.1: QEMU does not close a tap when it becomes another program, which then finds it busy.
    lines = sorted({target for target in kept.values() if not target.startswith(("/memfd:", "anon_inode:"))})
    if lines:
        found.append(
            _exec_refused(
                "exec-keeps-descriptors", f"The guest's QEMU would take along what is open ({', '.join(lines)})"
            )
        )
    unknown = sorted({option.flag for option in options if not _is_rehearsed(option)})
    if unknown:
        found.append(
            _exec_refused(
                "exec-not-rehearsed", f"The guest has {', '.join(unknown)} of a kind that a rehearsal leaves out"
            )
        )
    if moved:
        found.append(
            _exec_refused("exec-relative-paths", "The guest's QEMU has left the directory that its paths start from")
        )
    return found


def _is_rehearsed(option: Option) -> bool:
    """Whether a new QEMU that was rehearsed has what an option needs: `rehearsal` replaces the ends of lines."""
    given = read_properties(option) if option.value else Properties([])
    kind = given.implied or given.get("type") or given.get("driver") or given.get("backend") or ""
    return option.name != "spice" and kind in _REHEARSED.get(option.name, (kind,))


def _exec_refused(code: str, why: str) -> CprError:
    return CprError(code, f"{why}, so it can't become another by cpr-exec.", "Use cpr-transfer, or precopy.")


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
