# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The ways in which a guest can go from one QEMU to another, and which of them it takes.

Pure functions. Private to the collection.
"""

from __future__ import annotations

import typing as t
from dataclasses import dataclass

from ansible_collections.vmfleet.cpr.plugins.module_utils.errors import CprError

CPR_TRANSFER = "cpr-transfer"
CPR_EXEC = "cpr-exec"
CPR_REBOOT = "cpr-reboot"
# Not one of QEMU's MigMode: it calls it "normal" there, and before 8.2 nothing.
PRECOPY = "precopy"
MODES = (CPR_TRANSFER, CPR_EXEC, CPR_REBOOT, PRECOPY)
AUTO = "auto"
_SHORT = " Its pause is some milliseconds all the same."


def qemu_name(mode: str) -> str:
    """What QEMU's migration parameter ``mode`` calls it."""
    return "normal" if mode == PRECOPY else mode


@dataclass(frozen=True)
class Choice:
    """The mode that a guest takes.

    :ivar reason: why it is that one, as a sentence.
    """

    mode: str
    reason: str


def choose(
    wish: str, blockers: t.Mapping[str, t.Sequence[CprError]], *, adopt: bool, memory_in_place: bool
) -> Choice | list[CprError]:
    """Which mode a guest takes, or what stands in the way.

    ``auto`` takes none that could lose the guest, and none in which it would stand still for as
    long as it takes to write its RAM.

    :param wish: one of `MODES`, or `AUTO`.
    :param blockers: what stands in the way of each mode.
    :param adopt: whether ``precopy`` may be taken without having been named.
    :param memory_in_place: whether another QEMU can map the guest's RAM where it is.
    """
    if wish != AUTO:
        written = wish == CPR_REBOOT and not memory_in_place
        pause = " It stands still while its RAM is written to a file and read again." if written else ""
        return list(blockers[wish]) or Choice(wish, f"{wish} was asked for.{pause}")
    transfer = blockers[CPR_TRANSFER]
    if not transfer:
        return Choice(CPR_TRANSFER, "The new QEMU can take its RAM over, and nothing is copied.")
    why = f"It can't go by cpr-transfer ({', '.join(dict.fromkeys(item.code for item in transfer))})"
    if memory_in_place and not blockers[CPR_REBOOT]:
        return Choice(CPR_REBOOT, f"{why}, and its RAM is in a file that both QEMUs can map.{_SHORT}")
    if adopt and not blockers[PRECOPY]:
        return Choice(PRECOPY, f"{why}, and its RAM can be copied to a QEMU that shares it.{_SHORT}")
    return _against_all(transfer, blockers[PRECOPY] if adopt else [])


def _against_all(transfer: t.Sequence[CprError], precopy: t.Sequence[CprError]) -> list[CprError]:
    """What a user must mend: first whatever stands in the way of both, else the copy's, the lesser demand."""
    if not precopy:
        return list(transfer)
    shared = [item for item in precopy if item.code in {other.code for other in transfer}]
    if shared:
        return shared
    for item in precopy:
        item.message += f" Without a copy of its RAM: {transfer[0].message}"
    return list(precopy)
