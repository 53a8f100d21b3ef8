# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Sets both QEMUs up for the switch, in the window in which both answer.

Private to the collection.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import typing as t

from ansible_collections.vmfleet.cpr.plugins.module_utils import handshake, journal, machine_view, surroundings
from ansible_collections.vmfleet.cpr.plugins.module_utils.errors import CprError
from ansible_collections.vmfleet.cpr.plugins.module_utils.modes import CPR_EXEC
from ansible_collections.vmfleet.cpr.plugins.module_utils.monitor import Monitor
from ansible_collections.vmfleet.cpr.plugins.module_utils.phases import failures, reach, verify, view
from ansible_collections.vmfleet.cpr.plugins.module_utils.process import Watch
from ansible_collections.vmfleet.cpr.plugins.module_utils.task import Outcome

DONE = (journal.SET_UP, *journal.COMMITTED)


async def set_up(update: journal.Update, *, timeout: float, accept_differences: t.Container[str] = ()) -> Outcome:
    """Set capabilities and parameters on both ends and read them back; the guest runs on the old.

    The old QEMU's capabilities were set before it began (QEMU locks them from ``migrate``
    on), so here they are only compared.

    :param timeout: seconds for each connection.
    :param accept_differences: codes of `machine_view.differences` that shall not count.
    :raises CprError: ``capabilities-differ`` or ``parameters-differ`` if an end did not take
        what was agreed; a code of `machine_view.differences`.
    """
    if update.phase in DONE:
        return Outcome(
            update.guest, False, "Both QEMUs are set up already.", update, extra={"agreement": update.agreement}
        )
    if update.phase != journal.TRANSFERRED:
        raise failures.wrong_phase(update, journal.TRANSFERRED, "cpr_transfer")
    started = time.monotonic()
    old, new = failures.both(update)
    with Watch(old.identity) as old_watch, Watch(new.identity) as new_watch:
        async with await reach.old_qemu(update, old_watch, timeout) as old_monitor:
            await set_parameters("old", old_monitor, update)
            await _compare_capabilities("old", old_monitor, update)
            differences: dict[str, list[str]] = {}
            if update.mode == CPR_EXEC:
                machine = await view.read(old_monitor, old.pid)  # the rehearsal was compared with it
            else:
                async with await reach.new_qemu(update, new_watch, timeout) as new_monitor:
                    await _set_up_new(new_monitor, update)
                    machine, after = await asyncio.gather(
                        view.read(old_monitor, old.pid), view.read(new_monitor, new.pid)
                    )
                    await _place_threads(old_monitor, new_monitor)
                differences = machine_view.differences(machine, after)
            for code, sentences in differences.items():
                if code not in accept_differences:
                    raise view.difference(code, sentences)
            agreed = handshake.Agreement(update.capabilities, update.parameters, update.dropped)
            update.agreement = handshake.record(
                update.mode, agreed, machine_view.summary(machine), view.HINTS, differences
            )
            update.heartbeat = {"agent": await verify.agent_answers(old_monitor, machine, old.pid)}
    update.took("setup", started)
    update.enter(journal.SET_UP)
    names = [name for name, state in update.capabilities.items() if state]
    accepted = [sentence for sentences in differences.values() for sentence in sentences]
    message = f"Both QEMUs use the capabilities {', '.join(names)} and are the same machine"
    message += f" but for what was accepted: {'; '.join(accepted)}." if accepted else "."
    return Outcome(update.guest, True, message, update, extra={"agreement": update.agreement})


async def _set_up_new(monitor: Monitor, update: journal.Update) -> None:
    current = await monitor.execute("query-migrate-capabilities")
    await set_capabilities("new", monitor, handshake.capabilities_to_set(current, update.capabilities))
    await set_parameters("new", monitor, update)
    await _compare_capabilities("new", monitor, update)


async def set_capabilities(whose: str, monitor: Monitor, capabilities: list[dict[str, t.Any]]) -> None:
    """Set migration capabilities.

    :param whose: ``old`` or ``new``.
    :param capabilities: `handshake.capabilities_to_set`.
    :raises CprError: ``capability-refused`` with QEMU's reason: some exclude each other.
    """
    if capabilities:
        with _refusal("capability-refused", whose):
            await monitor.execute("migrate-set-capabilities", {"capabilities": capabilities})


@contextlib.contextmanager
def _refusal(code: str, whose: str) -> t.Iterator[None]:
    try:
        yield
    except CprError as error:
        if error.code != "qmp-error":
            raise
        raise CprError(
            code,
            f"The {whose} QEMU does not take what was wished for the migration: {error.qemu_description}.",
            "Mend live_update_capabilities and live_update_parameters.",
            qemu_class=error.qemu_class,
            qemu_description=error.qemu_description,
        ) from error


async def set_parameters(whose: str, monitor: Monitor, update: journal.Update) -> None:
    """Set the parameters that were agreed on, and see that they were taken.

    :param whose: ``old`` or ``new``.
    :raises CprError: ``parameter-refused``, ``parameters-differ``.
    """
    with _refusal("parameter-refused", whose):
        await monitor.execute("migrate-set-parameters", update.parameters)
    taken = await monitor.execute("query-migrate-parameters")
    for name, value in update.parameters.items():
        if taken.get(name) != value:
            raise CprError(
                "parameters-differ",
                f"The {whose} QEMU has {taken.get(name)!r} for the migration parameter {name}, not {value!r}.",
                "The guest runs on as before. Roll back; see whether another client changes it.",
            )


async def _compare_capabilities(whose: str, monitor: Monitor, update: journal.Update) -> None:
    current: list[dict[str, t.Any]] = await monitor.execute("query-migrate-capabilities")
    wrong = [item["capability"] for item in handshake.capabilities_to_set(current, update.capabilities)]
    if wrong:
        raise CprError(
            "capabilities-differ",
            f"The {whose} QEMU did not take what was agreed for the migration capability {', '.join(wrong)}.",
            "The guest runs on as before. Roll back; see whether another client changes it.",
        )


async def _place_threads(old: Monitor, new: Monitor) -> None:
    """Give the new QEMU's processors and I/O threads the host's processors that the old one's have."""
    ours = await _threads(new)
    for name, thread in (await _threads(old)).items():
        if name in ours:
            surroundings.place_like(ours[name], thread)


async def _threads(monitor: Monitor) -> dict[tuple[str, t.Any], int]:
    processors = await monitor.execute("query-cpus-fast")
    threads = await monitor.execute("query-iothreads")
    return {
        **{("cpu", item["cpu-index"]): item["thread-id"] for item in processors},
        **{("iothread", item["id"]): item["thread-id"] for item in threads},
    }


async def put_back(monitor: Monitor, settings: t.Mapping[str, t.Any]) -> None:
    """Give a QEMU the migration settings that the guest had before the update, as far as it has them.

    :param settings: what `Update.restore` holds.
    """
    if settings.get("capabilities"):
        known = {item["capability"] for item in await monitor.execute("query-migrate-capabilities")}
        capabilities = [item for item in settings["capabilities"] if item["capability"] in known]
        if capabilities:
            await monitor.execute("migrate-set-capabilities", {"capabilities": capabilities})
    if settings.get("parameters"):
        present = await monitor.execute("query-migrate-parameters")
        parameters = {name: value for name, value in settings["parameters"].items() if name in present}
        await monitor.execute("migrate-set-parameters", parameters)
