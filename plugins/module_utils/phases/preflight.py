# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Looks at guests and judges them. Touches none.

Private to the collection.
"""

from __future__ import annotations

import contextlib
import typing as t
from dataclasses import dataclass, field

from ansible_collections.vmfleet.cpr.plugins.module_utils import (
    character_devices,
    command_line,
    descriptors,
    device_tree,
    guests,
    managers,
    namespaces,
    new_command_line,
    process,
    qemu_binary,
    readiness,
    resources,
    systemd,
)
from ansible_collections.vmfleet.cpr.plugins.module_utils.errors import CprError
from ansible_collections.vmfleet.cpr.plugins.module_utils.monitor import Monitor
from ansible_collections.vmfleet.cpr.plugins.module_utils.offer import Binary
from ansible_collections.vmfleet.cpr.plugins.module_utils.phases import view
from ansible_collections.vmfleet.cpr.plugins.module_utils.phases.describe import Description, describe
from ansible_collections.vmfleet.cpr.plugins.module_utils.process import QemuProcess
from ansible_collections.vmfleet.cpr.plugins.module_utils.qemu_binary import Probe


@dataclass
class Inspection:
    """A guest as it was found.

    :ivar monitor: the path at which its monitor answered, or None.
    :ivar observation: what the monitor said, or None where it didn't answer.
    :ivar blockers: what stands in the way, whatever the mode.
    :ivar room: what the host lacks for a second QEMU beside it.
    :ivar unit: the systemd service that it is the main process of, or None.
    :ivar description: what the new QEMU must have like it, or None where it can't be told.
    """

    process: QemuProcess
    monitor: str | None = None
    observation: readiness.Observation | None = None
    blockers: list[CprError] = field(default_factory=list)
    room: list[CprError] = field(default_factory=list)
    description: t.Optional[Description] = None
    unit: t.Optional[dict[str, str]] = None

    def blockers_of(self, mode: str) -> list[CprError]:
        """All that stands between the guest and a mode."""
        judged = readiness.blockers(self.observation, mode) if self.observation else []
        room = self.room if mode == "cpr-transfer" else []  # the others have one QEMU after the other
        sandbox = readiness.sandbox_blockers(self.description.options, mode) if self.description else []
        return [*self.blockers, *room, *sandbox, *judged]

    def blockers_for(self, binary: Binary, mode: str = "cpr-transfer") -> list[CprError]:
        """All that stands between the guest and this binary, but for `unknown_to`."""
        fitting = readiness.binary_blockers(self.observation, binary, mode) if self.observation else []
        return [*self.blockers_of(mode), *fitting]

    async def unknown_to(self, probe: Probe) -> list[CprError]:
        """What the guest's command line sets and a binary does not know."""
        if not self.observation or not self.description:
            return []
        options = self.description.options
        machine = f"{self.observation.machine_type}-machine"
        drivers = [command_line.read_properties(option) for option in options if option.name == "device"]
        kinds = {machine, *(driver.implied or driver.get("driver") or "" for driver in drivers)}
        known = probe.binary.device_types | {machine}
        properties = {kind: await probe.properties(kind) for kind in sorted(kinds & known)}
        return readiness.unknown_properties(options, machine, properties)

    def warnings_for(self, binary: Binary) -> list[CprError]:
        """What does not stand in the way and should be known."""
        observed = readiness.warnings(self.observation, binary) if self.observation else []
        try:
            return [*observed, *resources.warnings(self.process.identity.pid)]
        except OSError:
            return observed  # it is gone, or another user's


async def inspect(qemu: QemuProcess, state_directory: str) -> Inspection:
    """Look at a guest's process and ask its monitor. The guest is as before.

    What can't be found out is a blocker, not an exception.

    :param state_directory: where the update's records and sockets would be.
    """
    inspection = Inspection(qemu)
    try:
        _refuse_foreign(qemu)
    except CprError as error:
        inspection.blockers.append(error)
        return inspection  # its monitor is not ours to open
    with contextlib.suppress(OSError):  # it is gone, or another user's: others will say so
        inspection.room = resources.blockers(qemu.identity.pid, state_directory)
    for check in (_refuse_unsupported, _find_unit):
        try:
            await check(inspection)
        except CprError as error:
            inspection.blockers.append(error)
    try:
        async with await guests.open_monitor(qemu) as monitor:
            inspection.monitor = monitor.where
            inspection.observation = await observe(monitor)
            description = await describe(monitor, qemu, inspection.observation.machine_type)
            # What can't be handed over is found out by trying.
            new_command_line.make(description.options, description.running, cpr_socket="/")
            inspection.description = description
    except (KeyError, IndexError, TypeError, ValueError) as error:
        inspection.blockers.append(
            CprError(
                "device-unreadable",
                f"QEMU describes the guest in a way that is not understood ({type(error).__name__}: {error}).",
                "Leave this guest out of live_update_guests, and report this.",
            )
        )
    except CprError as error:
        # What can't be read of the command line was said already.
        if str(error) not in map(str, inspection.blockers):
            inspection.blockers.append(error)
    return inspection


def _refuse_foreign(qemu: QemuProcess) -> None:
    pid = qemu.identity.pid
    manager = managers.manager_of(qemu.arguments, process.read_file(pid, "cgroup"))
    if manager:
        raise managers.managed(manager)
    inside = [name for name in ("pid", "user") if not namespaces.shares(pid, name)]
    if inside:
        raise CprError(
            "in-container",
            f"The guest's QEMU runs in a container (other {' and '.join(inside)} namespaces than ours).",
            "Run the playbook inside that container, or leave this guest out of live_update_guests.",
        )


async def _find_unit(inspection: Inspection) -> None:
    inspection.unit = await systemd.service_of(inspection.process.identity.pid)


async def _refuse_unsupported(inspection: Inspection) -> None:
    qemu = inspection.process
    new_command_line.refuse_unsupported(qemu.options)
    if character_devices.uses_standard_streams(qemu.options) and descriptors.has_terminal(qemu.identity.pid):
        raise CprError(
            "terminal-in-use",
            "The guest's console is the terminal, or the pipe, that its QEMU was started from.",
            "Start it with a socket (-serial unix:…,server=on,wait=off) or with </dev/null when it next starts.",
        )


async def observe(monitor: Monitor) -> readiness.Observation:
    """Ask a guest's monitor what readiness depends on; no command that would hold the guest up.

    :raises CprError: as `Monitor.execute`.
    """
    properties = await monitor.execute("qom-list", {"path": "/machine"})
    aux_ram_share: t.Optional[bool] = None
    if any(item["name"] == "aux-ram-share" for item in properties):
        aux_ram_share = await monitor.execute("qom-get", {"path": "/machine", "property": "aux-ram-share"})
    run_state = (await monitor.execute("query-status"))["status"]
    migration = (await monitor.execute("query-migrate")).get("status")
    modes = readiness.MODES if readiness.may_try_modes(run_state, migration) else ()
    offer, blocked_reasons = await qemu_binary.ask_running(monitor, modes)
    return readiness.Observation(
        machine_type=await view.machine_type(monitor),
        run_state=run_state,
        migration=migration,
        memory_backends=await monitor.execute("query-memdev"),
        aux_ram_share=aux_ram_share,
        block_jobs=sorted(await _jobs(monitor)),
        exports=[export["id"] for export in await monitor.execute("query-block-exports")],
        offer=offer,
        blocked_reasons=blocked_reasons,
        device_types=await _device_types(monitor),
        kvm=(await monitor.execute("query-kvm"))["enabled"],
    )


async def _device_types(monitor: Monitor) -> frozenset[str]:
    """Of all devices that are on a bus, and of the first processor."""
    processor = (await monitor.execute("query-cpus-fast"))[0]["qom-path"]
    kind = await monitor.execute("qom-get", {"path": processor, "property": "type"})
    return frozenset({kind, *(device.type for device in device_tree.parse(await monitor.human("info qtree")))})


async def _jobs(monitor: Monitor) -> set[str]:
    """The jobs that run: those of disks, and others like a snapshot of the whole guest."""
    running = {job["device"] for job in await monitor.execute("query-block-jobs")}
    others = await monitor.execute("query-jobs")
    return running | {job["id"] for job in others if job["status"] not in ("concluded", "null")}
