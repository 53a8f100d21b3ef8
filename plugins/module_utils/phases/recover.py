# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Undoes or finishes what a run that died left behind.

Private to the collection.
"""

from __future__ import annotations

import contextlib

from ansible_collections.vmfleet.cpr.plugins.module_utils import journal
from ansible_collections.vmfleet.cpr.plugins.module_utils.errors import CprError
from ansible_collections.vmfleet.cpr.plugins.module_utils.modes import CPR_EXEC
from ansible_collections.vmfleet.cpr.plugins.module_utils.monitor import Monitor
from ansible_collections.vmfleet.cpr.plugins.module_utils.phases import cpr_exec, failures, reach, retire, rollback
from ansible_collections.vmfleet.cpr.plugins.module_utils.process import Watch
from ansible_collections.vmfleet.cpr.plugins.module_utils.verdict import COMPLETE, Verdict


async def recover(update: journal.Update, *, timeout: float) -> bool:
    """Bring an unfinished update to an end: forward where the guest can run on new, else back.

    :param timeout: seconds for each connection.
    :returns: whether the guest is on the new QEMU.
    :raises CprError: as `rollback.roll_back` and `retire.retire`. ``old-qemu-gone``, and ``new-qemu-gone`` where the
        old one is gone too, end the update: a guest that was started anew since is free for the next one.
    """
    old, new = failures.both(update)
    with Watch(old.identity) as old_watch, Watch(new.identity) as new_watch:
        verdict = await reach.judge(update, old_watch, new_watch)
        forward = verdict in (Verdict.FORWARD, Verdict.EITHER)
        if forward and old_watch.ended.is_set() and new_watch.ended.is_set():
            raise rollback.write_off(update, failures.new_qemu_gone(update))
        if forward:
            async with await _new_monitor(update, new_watch, timeout) as monitor:
                if update.phase == journal.SWITCHING:
                    status = (await monitor.execute("query-status"))["status"]
                    if status == COMPLETE and update.run_state == "running":
                        await monitor.execute("cont")
                    with contextlib.suppress(CprError):  # the next run would find out once more
                        update.enter(journal.SWITCHED)
                await retire.retire(update, monitor, None)
    if not forward:
        await rollback.roll_back(update, timeout=timeout)
    return forward


async def _new_monitor(update: journal.Update, watch: Watch, timeout: float) -> Monitor:
    if update.mode == CPR_EXEC and update.phase == journal.SWITCHING:
        return (await cpr_exec.reach_running(update, watch, timeout))[0]  # it may have just begun
    return await reach.new_qemu(update, watch, timeout)
