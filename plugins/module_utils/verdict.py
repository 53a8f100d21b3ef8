# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Where a guest may go on whose switch was cut off: pure decisions.

Private to the collection.
"""

from __future__ import annotations

import enum

# What stands for a run state where there is none.
GONE = "gone"
SILENT = "silent"  # the process is there and its monitor does not answer

# The run states of a new QEMU that has not run the guest: it waits for it, or has all of it.
WAITING = "inmigrate"
COMPLETE = "paused"


class Verdict(enum.Enum):
    """Where the guest may go on."""

    BACK = "on the old QEMU only"
    EITHER = "on either"
    FORWARD = "on the new QEMU only"
    UNCLEAR = "not known"


def decide(old: str, new: str, may_have_run: bool) -> Verdict:
    """Where a guest may go on, by what both QEMUs say and what the switch left behind.

    An old QEMU in ``postmigrate`` has given the guest away and holds it still. In any other
    state it never stopped it, or resumed it by itself after a failed migration.

    :param old: the old QEMU's run state, `GONE` or `SILENT`.
    :param new: the new QEMU's.
    :param may_have_run: whether the new QEMU may have been told to run the guest.
    """
    if new not in (GONE, SILENT, WAITING, COMPLETE):
        return Verdict.FORWARD  # what comes after "paused" only a guest that ran gets into
    if may_have_run:
        if new == COMPLETE:
            return Verdict.FORWARD
        # It was told only once it was complete: whatever it is now, it may have run.
        return Verdict.BACK if new == GONE and old not in ("postmigrate", SILENT) else Verdict.UNCLEAR
    if new == COMPLETE and old == GONE:
        return Verdict.FORWARD
    if new == COMPLETE and old == "postmigrate":
        return Verdict.EITHER
    return Verdict.UNCLEAR if new == SILENT and old == GONE else Verdict.BACK
