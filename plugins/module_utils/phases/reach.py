# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Connects to the two QEMUs of an update, and tells why where that fails.

Private to the collection.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
import typing as t

from ansible_collections.vmfleet.cpr.plugins.module_utils import journal, process, verdict
from ansible_collections.vmfleet.cpr.plugins.module_utils.errors import CprError
from ansible_collections.vmfleet.cpr.plugins.module_utils.modes import CPR_EXEC
from ansible_collections.vmfleet.cpr.plugins.module_utils.monitor import CONNECT_TIMEOUT, Monitor
from ansible_collections.vmfleet.cpr.plugins.module_utils.phases import failures
from ansible_collections.vmfleet.cpr.plugins.module_utils.process import Watch

# Seconds between two looks for the new QEMU's monitor.
_POLL = 0.005
# Seconds in which a QEMU that has written a guest's state becomes another one, or says why not.
_EXEC_TIMEOUT = 10.0
# Seconds in which a QEMU that cuts a connection also ends.
LAST_BREATH = 0.5


async def old_qemu(update: journal.Update, watch: Watch, timeout: float = CONNECT_TIMEOUT) -> Monitor:
    """Connect to the old QEMU.

    :param timeout: seconds.
    :raises CprError: ``old-qemu-gone``, ``qemu-stopped``, or as `Monitor.connect`.
    """
    old = update.old or failures.both(update)[0]
    return await _connect(old.monitor, watch, timeout, lambda: failures.old_qemu_gone(update))


async def new_qemu(update: journal.Update, watch: Watch, timeout: float = CONNECT_TIMEOUT) -> Monitor:
    """Connect to the new QEMU, whether its path was restored already or not.

    :param timeout: seconds.
    :raises CprError: ``new-qemu-exited``, or ``new-qemu-gone`` if it ran the guest;
        ``qemu-stopped``; or as `Monitor.connect`.
    """
    path = failures.both(update)[1].monitor
    if not os.path.exists(path):
        path = dict(update.renames).get(path, path)

    def gone() -> CprError:
        if update.phase in journal.OF_A_CHECKPOINT:
            return CprError(
                "new-qemu-exited",
                "The QEMU that was started for the guest exited.",
                "Its standard error says why. Run vmfleet.cpr.guest_restore again.",
            )
        committed = update.phase in journal.COMMITTED
        return failures.new_qemu_gone(update) if committed else failures.new_qemu_exited(update)

    return await _connect(path, watch, timeout, gone)


async def _connect(path: str, watch: Watch, timeout: float, gone: t.Callable[[], CprError]) -> Monitor:
    if watch.ended.is_set():
        raise gone()
    try:
        return await Monitor.connect(path, timeout, pid=watch.identity.pid)
    except CprError as error:
        if error.code == "monitor-unreachable" and await watch.wait(LAST_BREATH):
            raise gone() from error
        if error.code == "monitor-busy" and watch.identity.is_stopped():
            raise CprError(
                "qemu-stopped",
                f"The QEMU process {watch.identity.pid} is stopped by a signal or a debugger and can't answer.",
                f"Let it go on (kill -CONT {watch.identity.pid}), then run again.",
            ) from error
        raise


async def judge(update: journal.Update, old_watch: Watch, new_watch: Watch) -> verdict.Verdict:
    """Where the guest of an update may go on, by its record and by what both QEMUs say now."""
    if update.phase != journal.SWITCHING:
        return verdict.Verdict.FORWARD if update.phase in journal.COMMITTED else verdict.Verdict.BACK
    if update.mode == CPR_EXEC:
        return verdict.Verdict.FORWARD if await becomes(update, old_watch) else verdict.Verdict.BACK
    old = await _run_state(old_qemu(update, old_watch), old_watch)
    new = await _run_state(new_qemu(update, new_watch), new_watch)
    return verdict.decide(old, new, update.may_have_run)


async def becomes(update: journal.Update, watch: Watch) -> bool:
    """With cpr-exec, whether the process is the new QEMU, or just about to become it.

    A QEMU that failed to become another one resumes the guest by itself.
    """
    deadline = time.monotonic() + _EXEC_TIMEOUT
    while time.monotonic() < deadline:
        if has_become(update) or watch.ended.is_set():
            return True
        with contextlib.suppress(CprError):
            async with await old_qemu(update, watch, max(deadline - time.monotonic(), _POLL)) as monitor:
                status = (await monitor.execute("query-migrate")).get("status")
                if status in (None, "none", "failed", "cancelled"):
                    return has_become(update)
        await asyncio.sleep(_POLL)
    return has_become(update)


def has_become(update: journal.Update) -> bool:
    """With cpr-exec, whether the process is the new QEMU by now; False also where it is gone."""
    old, dummy = failures.both(update)
    present = process.file_id(f"{process.PROC}/{old.pid}/exe")
    return present is not None and present == tuple(update.executable_id)


async def _run_state(connecting: t.Awaitable[Monitor], watch: Watch) -> str:
    try:
        async with await connecting as monitor:
            return (await monitor.execute("query-status"))["status"]
    except CprError:
        return verdict.GONE if watch.ended.is_set() else verdict.SILENT


async def answers(update: journal.Update, new_watch: Watch, deadline: float) -> bool:
    """Whether the new QEMU's monitor answers, and it waits for the guest, before the deadline.

    It ends by itself in every case: a connection that fails just when its task is cancelled
    swallows the cancellation.
    """
    dummy, new = failures.both(update)
    while time.monotonic() < deadline and not new_watch.ended.is_set():
        if os.path.exists(new.monitor):
            # It is bound a moment before it listens, and silent until QEMU has started.
            with contextlib.suppress(CprError):
                async with await Monitor.connect(new.monitor, deadline - time.monotonic(), pid=new.pid) as monitor:
                    if (await monitor.execute("query-status"))["status"] == verdict.WAITING:
                        return True
        await asyncio.sleep(_POLL)
    return False
