# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Looks at guests and judges them. Touches none.

Private to the collection.
"""

from __future__ import annotations

import contextlib
import os
import typing as t
from dataclasses import dataclass, field

from ansible_collections.vmfleet.cpr.plugins.module_utils import (
    character_devices,
    command_line,
    descriptors,
    device_tree,
    guests,
    journal,
    machine_view,
    managers,
    memory,
    modes,
    namespaces,
    new_command_line,
    process,
    qemu_binary,
    readiness,
    resources,
    systemd,
)
from ansible_collections.vmfleet.cpr.plugins.module_utils.errors import CprError
from ansible_collections.vmfleet.cpr.plugins.module_utils.modes import CPR_EXEC, CPR_REBOOT, MODES, PRECOPY
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
    :ivar beside: what stands in the way of a second QEMU beside this one.
    :ivar in_exec: what stands in the way of this process becoming another QEMU.
    :ivar room: what the host lacks, by mode.
    :ivar unit: the systemd service that it is the main process of, or None.
    :ivar state_in_memory: whether what is written to the state directory takes memory.
    :ivar description: what the new QEMU must have like it, or None where it can't be told.
    """

    process: QemuProcess
    monitor: str | None = None
    observation: readiness.Observation | None = None
    blockers: list[CprError] = field(default_factory=list)
    beside: list[CprError] = field(default_factory=list)
    in_exec: list[CprError] = field(default_factory=list)
    room: dict[str, list[CprError]] = field(default_factory=dict)
    description: t.Optional[Description] = None
    unit: t.Optional[dict[str, str]] = None
    state_in_memory: bool = False

    def facts(self) -> dict[str, t.Any]:
        """What it is, as modules return it."""
        qemu, seen = self.process, self.observation
        return {
            "pid": qemu.identity.pid,
            "binary": qemu.executable,
            "binary_on_disk": qemu.on_disk,
            "monitor": self.monitor,
            "version": seen.offer.version_text if seen else None,
            "architecture": seen.offer.architecture if seen else None,
            "machine_type": seen.machine_type if seen else None,
            "run_state": seen.run_state if seen else None,
            "notes": self.description.notes if self.description else [],
            "systemd_unit": self.unit["Id"] if self.unit else None,
        }

    @property
    def memory_in_place(self) -> bool:
        """Whether another QEMU can map the guest's RAM where it is."""
        return self.observation is not None and self.observation.memory_in_place

    def blockers_of(self, mode: str) -> list[CprError]:
        """All that stands between the guest and a mode."""
        return [*self.blockers_but_room(mode), *self.room.get(mode, ())]

    def blockers_but_room(self, mode: str) -> list[CprError]:
        """The same whatever room the host has."""
        judged = readiness.blockers(self.observation, mode) if self.observation else []
        special = memory.special_backends(self.description.options) if self.description and mode == PRECOPY else []
        one_or_two = self.in_exec if mode == CPR_EXEC else self.beside
        return [*self.blockers, *one_or_two, *special, *judged]

    def blockers_for(self, binary: Binary, mode: str) -> list[CprError]:
        """All that stands between the guest and this binary, but for `unknown_to`."""
        fitting = readiness.binary_blockers(self.observation, binary, mode) if self.observation else []
        if mode == PRECOPY and self.observation and self.description:
            default_ram = binary.default_ram.get(self.observation.machine_type)
            fitting += memory.default_ram_blockers(self.description.options, self.observation.memory, default_ram)
        return [*self.blockers_of(mode), *fitting]

    async def choose(
        self, probe: Probe, parameters: t.Mapping[str, t.Any], more: t.Mapping[str, t.Sequence[CprError]] | None = None
    ) -> tuple[modes.Choice | list[CprError], dict[str, list[CprError]]]:
        """Which mode the guest takes to a binary, or what stands in the way; as `modes.choose`.

        :param parameters: ``mode``, ``adopt`` and ``accept_differences`` of the user's.
        :param more: what else stands in the way of each mode.
        :returns: that, and what stands in the way of each mode.
        """
        accepted = {readiness.TCG_PRECOPY}.intersection(parameters["accept_differences"])
        found = {}
        for mode in MODES:
            items = [
                *self.blockers_for(probe.binary, mode),
                *await self.unknown_to(probe, mode),
                *(more or {}).get(mode, ()),
            ]
            found[mode] = [item for item in items if item.code not in accepted]
        choice = modes.choose(
            parameters["mode"], found, adopt=parameters["adopt"], memory_in_place=self.memory_in_place
        )
        return choice, found

    def options_for(self, binary: Binary, mode: str) -> list[command_line.Option]:
        """The options of the QEMU that takes over a guest without blockers, before paths and descriptors are its own."""
        observation, description = t.cast("t.Any", self.observation), t.cast("t.Any", self.description)
        if mode != PRECOPY:
            return description.options
        return memory.adopted(
            description.options,
            observation.memory,
            default_ram=binary.default_ram.get(observation.machine_type),
            aux_ram_share=binary.has_aux_ram_share,
        )

    def demand(self, mode: str) -> resources.Demand:
        """What of the host's memory the update takes."""
        ram = self.observation.memory if self.observation else ()
        own = list(ram) if mode == PRECOPY else []
        if mode == CPR_REBOOT and not self.memory_in_place:
            # The new QEMU's, and where the state directory is in memory the file's.
            own = [*ram, *(ram if self.state_in_memory else ())]
        return resources.demand(self.process.identity.pid, ram, own)

    async def unknown_to(self, probe: Probe, mode: str) -> list[CprError]:
        """What the guest's command line sets and a binary does not know."""
        if not self.observation or not self.description:
            return []
        if mode == PRECOPY and self.blockers_for(probe.binary, mode):
            return []  # there is no command line to judge
        options = self.options_for(probe.binary, mode)
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
    for check, where in ((_refuse_unsupported, inspection.blockers), (_find_unit, inspection.beside)):
        try:
            await check(inspection)
        except CprError as error:
            where.append(error)
    try:
        async with await guests.open_monitor(qemu) as monitor:
            inspection.monitor = monitor.where
            inspection.observation = await observe(monitor, qemu)
            description = await describe(monitor, qemu, inspection.observation.machine_type)
            # What can't be handed over is found out by trying.
            new_command_line.make(description.options, description.running, cpr_socket="/")
            inspection.description = description
            inspection.in_exec = _against_exec(qemu, description)
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
    with contextlib.suppress(OSError):  # it is gone, or another user's: others will say so
        _look_for_room(inspection, state_directory)
    return inspection


# Bytes of the file of ``cpr-reboot`` beside the guest's RAM: some 300 KB, and the memory of a display, mostly 16 MiB.
_DEVICES_STATE = 20 << 20


def _look_for_room(inspection: Inspection, state_directory: str) -> None:
    inspection.state_in_memory = resources.file_system(state_directory) in ("tmpfs", "ramfs")
    for mode in MODES:
        written = 0
        if inspection.observation and mode == CPR_REBOOT:
            written = inspection.observation.writes_its_memory + _DEVICES_STATE
        disk = resources.disk_blockers(state_directory, written)
        # cpr-exec has one QEMU after the other.
        ram = [] if mode == CPR_EXEC else resources.memory_blockers(inspection.demand(mode))
        inspection.room[mode] = [*ram, *disk]


def _against_exec(qemu: QemuProcess, description: Description) -> list[CprError]:
    pid = qemu.identity.pid
    moved = os.path.realpath(f"{process.PROC}/{pid}/cwd") != os.path.realpath(qemu.working_directory)
    return readiness.exec_blockers(description.options, process.kept_by_exec(pid), moved=moved)


async def check_rehearsed(update: journal.Update, monitor: Monitor) -> None:
    """See that neither the guest nor the new binary was changed since the rehearsal before a cpr-exec.

    :param monitor: the guest's.
    :raises CprError: ``guest-changed``. The guest runs on.
    """
    old, new = update.old, update.new
    if old is None or new is None:
        return
    qemu = process.read(old.pid)
    description = await describe(monitor, qemu, update.machine_type or "")
    command = new_command_line.make_in_place(description.options, description.running, state=update.state_file)
    changed = {
        "its devices": [new.executable, *command_line.write(command.arguments)] != update.exec_command,
        "its memory": not all(block.shared for block in await _memory(monitor, qemu)),
        "what its QEMU has open": bool(_against_exec(qemu, description)),
        new.executable: process.file_id(new.executable) != tuple(update.executable_id),
    }
    if any(changed.values()):
        raise CprError(
            "guest-changed",
            f"Since the rehearsal {', '.join(name for name, state in changed.items() if state)} changed, and after cpr-exec"
            " there is no way back. The guest runs on as before.",
            "Roll back, and run again.",
        )


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


async def observe(monitor: Monitor, qemu: QemuProcess) -> readiness.Observation:
    """Ask a guest's monitor what readiness depends on; no command that would hold the guest up.

    :param qemu: the process behind it.
    :raises CprError: as `Monitor.execute`.
    """
    properties = await monitor.execute("qom-list", {"path": "/machine"})
    aux_ram_share: t.Optional[bool] = None
    if any(item["name"] == "aux-ram-share" for item in properties):
        aux_ram_share = await monitor.execute("qom-get", {"path": "/machine", "property": "aux-ram-share"})
    run_state = (await monitor.execute("query-status"))["status"]
    migration = (await monitor.execute("query-migrate")).get("status")
    wanted = MODES if readiness.may_try_modes(run_state, migration) else ()
    offer, blocked_reasons = await qemu_binary.ask_running(monitor, wanted)
    return readiness.Observation(
        machine_type=await view.machine_type(monitor),
        run_state=run_state,
        migration=migration,
        memory=await _memory(monitor, qemu),
        aux_ram_share=aux_ram_share,
        block_jobs=sorted(await _jobs(monitor)),
        exports=[export["id"] for export in await monitor.execute("query-block-exports")],
        offer=offer,
        blocked_reasons=blocked_reasons,
        device_types=await _device_types(monitor),
        kvm=(await monitor.execute("query-kvm"))["enabled"],
    )


async def _memory(monitor: Monitor, qemu: QemuProcess) -> list[memory.Block]:
    pages = machine_view.read_page_sizes(await monitor.human("info ramblock"))
    pages = {name.rpartition("/")[2]: size for name, size in pages.items()}
    kinds = {item["name"]: item["type"] for item in await monitor.execute("qom-list", {"path": "/objects"})}
    found = []
    for item in await monitor.execute("query-memdev"):
        name = item.get("id", "")
        is_file = kinds.get(name) == "child<memory-backend-file>"

        async def get(what: str, path: str = f"/objects/{name}", asked: bool = is_file) -> t.Any:
            return await monitor.execute("qom-get", {"path": path, "property": what}) if asked else None

        found.append(
            memory.Block(
                name=name,
                size=item["size"],
                page_size=pages.get(name, memory.ORDINARY_PAGE),
                nodes=tuple(item["host-nodes"]) if item["policy"] == "bind" else (),
                shared=bool(item.get("share")),
                path=_own_file(qemu, await get("mem-path")),
                discarded=bool(await get("discard-data")),
            )
        )
    return found


def _own_file(qemu: QemuProcess, path: str | None) -> str | None:
    """The file that a guest's RAM is, or None where another QEMU would not find it at this path.

    In a directory QEMU makes a file without a name (file_ram_open in system/physmem.c), and a file may have been
    removed or replaced since. QEMU itself takes each of them for one that the next QEMU can map, with
    ``x-ignore-shared``, and the guest would go on with empty RAM.
    """
    if not path or os.path.isdir(qemu.path(path)):
        return None
    path, pid = qemu.path(path), qemu.identity.pid
    seen = {process.file_id(path), process.file_id(f"{process.PROC}/{pid}/root{path}")}
    return path if len(seen) == 1 and seen <= process.open_files(pid) - {None} else None


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
