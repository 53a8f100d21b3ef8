# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Undoes or finishes what a run that died left behind.

Private to the collection.
"""

from __future__ import annotations

from ansible_collections.vmfleet.cpr.plugins.module_utils import journal
from ansible_collections.vmfleet.cpr.plugins.module_utils.phases import resume, rollback
from ansible_collections.vmfleet.cpr.plugins.module_utils.quiet import Quiet


def is_unfinished(update: journal.Update | None) -> bool:
    """Whether an earlier run began an update and neither finished nor undid it."""
    return update is not None and update.phase not in (None, journal.FINISHED, journal.ROLLED_BACK)


async def recover(update: journal.Update, *, timeout: float) -> None:
    """Bring an unfinished update to an end: forward where it was committed, else back.

    :param timeout: seconds for each connection.
    :raises CprError: as `rollback.roll_back` and `resume.resume`.
    """
    if update.phase == journal.SWITCHING and await rollback.runs_on_new(update):
        update.enter(journal.SWITCHED)
    if update.phase == journal.SWITCHED:
        await resume.resume(update, timeout=timeout, quiet=Quiet(1))
    else:
        await rollback.roll_back(update, timeout=timeout)
