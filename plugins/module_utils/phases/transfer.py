# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Hands the CPR state over to the new QEMU.

Private to the collection.
"""

from __future__ import annotations

import asyncio
import time

from ansible_collections.vmfleet.cpr.plugins.module_utils import handshake, journal, modes
from ansible_collections.vmfleet.cpr.plugins.module_utils.errors import CprError
from ansible_collections.vmfleet.cpr.plugins.module_utils.modes import CPR_TRANSFER, PRECOPY
from ansible_collections.vmfleet.cpr.plugins.module_utils.monitor import Monitor
from ansible_collections.vmfleet.cpr.plugins.module_utils.phases import failures, reach, setup
from ansible_collections.vmfleet.cpr.plugins.module_utils.process import Watch
from ansible_collections.vmfleet.cpr.plugins.module_utils.task import Outcome

DONE = (journal.TRANSFERRED, journal.SET_UP, *journal.COMMITTED)


async def transfer(update: journal.Update, *, timeout: float) -> Outcome:
    """Send the CPR state to the new QEMU; the guest keeps running on the old.

    In another mode than cpr-transfer there is none to send, and the old QEMU is only told what
    it will do. The old QEMU's migration stays in ``setup`` from here on, and the guest runs, for as long
    as nobody goes on (QEMU's docs/devel/migration/CPR).

    :param timeout: seconds until the new QEMU's monitor must answer.
    :raises CprError: ``new-qemu-exited`` with the end of its standard error;
        ``migration-blocked`` with QEMU's reasons; ``migration-failed``;
        ``new-qemu-silent``. The old QEMU then runs the guest as before.
    """
    if update.phase in DONE:
        return Outcome(update.guest, False, "The CPR state was handed over already.", update)
    if update.phase != journal.LAUNCHED:
        raise failures.wrong_phase(update, journal.LAUNCHED, "dest_launch")
    started = time.monotonic()
    old, new = failures.both(update)
    with Watch(old.identity) as old_watch, Watch(new.identity) as new_watch:
        if new_watch.ended.is_set():
            raise failures.new_qemu_exited(update)
        async with await reach.old_qemu(update, old_watch) as monitor:
            await prepare_old(monitor, update)
            if update.mode == CPR_TRANSFER:
                await _migrate(monitor, update, new_watch)
                await _wait_for_new_monitor(monitor, update, old_watch, new_watch, timeout)
    update.took("transfer", started)
    update.enter(journal.TRANSFERRED)
    message = "The new QEMU has the CPR state and answers; the guest runs on the old."
    if update.mode != CPR_TRANSFER:
        message = f"The old QEMU is ready for {update.mode}; the guest runs on it."
    return Outcome(update.guest, True, message, update)


async def prepare_old(monitor: Monitor, update: journal.Update, phase: str = journal.TRANSFERRING) -> None:
    """Set what ``migrate`` needs on the old QEMU, its former settings recorded first.

    :param phase: what the record is in from then on.
    :raises CprError: ``migration-blocked``, ``capability-refused``.
    """
    current = await monitor.execute("query-migrate-capabilities")
    parameters = await monitor.execute("query-migrate-parameters")
    capabilities = handshake.capabilities_to_set(current, update.capabilities)
    wanted: dict[str, object] = {"mode": modes.qemu_name(update.mode)} if "mode" in parameters else {}  # since QEMU 8.2
    if update.exec_command:
        wanted["cpr-exec-command"] = update.exec_command
    kept = [*wanted, *update.parameters]
    if update.mode == PRECOPY:
        kept.append("downtime-limit")  # which the copy begins below
    update.restore = {
        "capabilities": handshake.capabilities_to_restore(current, capabilities),
        "parameters": {name: parameters[name] for name in kept if name in parameters},
    }
    update.enter(phase)
    await setup.set_capabilities("old", monitor, capabilities)
    await monitor.execute("migrate-set-parameters", wanted)
    # QEMU computes the reasons for the mode that is set now.
    reasons = (await monitor.execute("query-migrate")).get("blocked-reasons")
    if reasons:
        raise _blocked(update, "; ".join(reasons))


def _blocked(update: journal.Update, why: str) -> CprError:
    return CprError(
        "migration-blocked",
        f"QEMU does not allow {update.mode} for this guest: {why}.",
        "Remove what it names from the guest, or leave the guest out of live_update_guests.",
        qemu_description=why,
    )


async def _migrate(monitor: Monitor, update: journal.Update, new_watch: Watch) -> None:
    def channel(kind: str, path: str) -> dict[str, object]:
        return {"channel-type": kind, "addr": {"transport": "socket", "type": "unix", "path": path}}

    channels = [channel("main", update.main_socket), channel("cpr", update.cpr_socket)]
    try:
        await monitor.execute("migrate", {"channels": channels})
    except CprError as error:
        if error.code != "qmp-error":
            raise
        if await new_watch.wait(reach.LAST_BREATH):
            raise failures.new_qemu_exited(update) from error
        # A device that can't be migrated is no blocked-reason.
        raise _blocked(update, str(error.qemu_description)) from error


async def _wait_for_new_monitor(
    monitor: Monitor, update: journal.Update, old_watch: Watch, new_watch: Watch, timeout: float
) -> None:
    """Wait until the new QEMU waits for its incoming migration; notice at once what fails."""
    deadline = time.monotonic() + timeout
    answering = asyncio.ensure_future(reach.answers(update, new_watch, deadline))
    ends = [asyncio.ensure_future(watch.ended.wait()) for watch in (new_watch, old_watch)]
    try:
        while not answering.done():
            await asyncio.wait({answering, *ends}, timeout=0.1, return_when=asyncio.FIRST_COMPLETED)
            if old_watch.ended.is_set():
                raise failures.old_qemu_gone(update)
            if new_watch.ended.is_set():
                raise failures.new_qemu_exited(update)
            if answering.done():
                break
            state = await monitor.execute("query-migrate")
            if state.get("status") in ("failed", "cancelled"):
                if await new_watch.wait(reach.LAST_BREATH):
                    raise failures.new_qemu_exited(update)
                raise CprError(
                    "migration-failed",
                    f"The old QEMU could not hand the CPR state over: {state.get('error-desc') or state['status']}.",
                    "The guest runs on as before. Roll back, mend what it names, and run again.",
                    qemu_description=state.get("error-desc"),
                )
        if not answering.result():
            raise CprError(
                "new-qemu-silent",
                f"The new QEMU has the CPR state and its monitor did not answer within {timeout:g} s.",
                f"See its standard error in {update.log}, or give it more time (timeout).",
            )
    finally:
        for task in (answering, *ends):
            task.cancel()
        await asyncio.gather(answering, *ends, return_exceptions=True)
