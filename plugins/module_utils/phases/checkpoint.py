# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Writes a guest's state to a file and ends its QEMU: the guest then waits to be restored.

Private to the collection.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import os
import shutil
import time
import typing as t

from ansible_collections.vmfleet.cpr.plugins.module_utils import (
    command_line,
    guests,
    handshake,
    journal,
    machine_view,
    network,
    new_command_line,
    page_cache,
    permissions,
    process,
    readiness,
    resources,
    surroundings,
    systemd,
)
from ansible_collections.vmfleet.cpr.plugins.module_utils.errors import CprError
from ansible_collections.vmfleet.cpr.plugins.module_utils.modes import CPR_REBOOT
from ansible_collections.vmfleet.cpr.plugins.module_utils.monitor import Event, Monitor
from ansible_collections.vmfleet.cpr.plugins.module_utils.phases import (
    failures,
    preflight,
    reach,
    rollback,
    setup,
    switch,
    transfer,
    verify,
    view,
)
from ansible_collections.vmfleet.cpr.plugins.module_utils.phases.successor import Successor, Successors
from ansible_collections.vmfleet.cpr.plugins.module_utils.process import Watch
from ansible_collections.vmfleet.cpr.plugins.module_utils.task import Outcome, Task

WAITS = "The guest's state is in a file, and waits to be restored."
# An attribute of RAM in a file.
_MARK = "user.vmfleet-cpr"
# The run state of a QEMU that has written all of the guest.
_COMPLETE = "postmigrate"
# What a reboot empties.
_VOLATILE = ("tmpfs", "ramfs", "hugetlbfs", "devtmpfs")
# Bytes of a guest's state beside its RAM; with a display some 20 MiB.
_STATE_SIZE = 64 << 20
# Seconds between two tries to reach a QEMU that was just started.
_POLL = 0.2
# Seconds that a QEMU gets to quit by itself.
_QUIT_TIMEOUT = 30.0


async def checkpoint_all(task: Task) -> list[Outcome]:
    """Check every guest, and only if all can be restored write each one's state and end its QEMU.

    Afterwards the guests are down and their checkpoints complete; a guest that fails runs on.
    What a run that died left behind is undone or finished first.

    :raises CprError: as `guests.select`.
    """
    found = guests.by_name(process.find(), task.journal)
    waiting = [name for name in task.guests if name not in found and _is_complete(task.journal.load(name))]
    wanted = [name for name in task.guests if name not in waiting]
    names, selected = guests.select(wanted, found) if wanted or not task.guests else ([], {})
    if not task.guests and None in found:
        pids = ", ".join(str(item.identity.pid) for item in found[None])
        raise CprError(
            "guest-unnamed",
            f"QEMUs without a -name run on this host (processes {pids}); nothing could say whose checkpoint that is.",
            "Name the guests to checkpoint, and take care of these by yourself.",
        )
    plans: dict[str, Successor] = {}
    written = 0

    async def check(name: str) -> Outcome:
        if task.check_mode:
            return await judge(name)
        with task.hold(name) as earlier:
            if earlier.phase in (journal.CHECKPOINTING, journal.CHECKPOINTED):
                ended = await _finish_or_undo(earlier, selected[name])
                if ended:
                    return ended
            elif earlier.is_under_way:
                raise _under_way(earlier)
            return await judge(name)

    async def judge(name: str) -> Outcome:
        nonlocal written
        inspection = await _inspect(task, selected[name])
        successor = await successors.of(inspection)
        written += _bytes_to_write(t.cast("t.Any", inspection.observation))
        for blocker in resources.disk_blockers(task.journal.directory, written):
            raise blocker  # for this one beside those before it
        plans[name] = successor
        message = "The guest's state would be written to a file, and its QEMU ended."
        return Outcome(name, True, message, warnings=successor.warnings)

    async def write(name: str) -> Outcome:
        if task.is_abandoned():
            raise CprError(
                "run-abandoned",
                "The guest was left alone: whoever waited for its checkpoint is gone, and might not restore it.",
                "Run again.",
            )
        with task.hold(name) as earlier:
            # The guests before it took their time: somebody may have changed it meanwhile, or have written it, too.
            if earlier.phase == journal.CHECKPOINTED or earlier.is_under_way:
                raise _under_way(earlier)
            qemu = guests.select([name], guests.by_name(process.find(), task.journal))[1][name]
            update = await _plan(task, name, await _inspect(task, qemu), plans[name])
            task.claim(update)
            await checkpoint(update, timeout=task.timeout, write_timeout=task.parameters["write_timeout"])
        return Outcome(name, True, str(update.message), update, warnings=plans[name].warnings)

    already = [Outcome(name, False, WAITS, task.journal.load(name)) for name in waiting]
    async with Successors(task) as successors:
        checked = await task.for_each(names, "preflight", check)
    if task.check_mode:
        return [*already, *checked]
    if any(outcome.error for outcome in checked):
        untouched = "Nothing was done."
        return [*already, *(Outcome(item.guest, False, untouched) if item.guest in plans else item for item in checked)]
    done = {item.guest: item for item in await task.for_each(plans, "checkpoint", write)}
    return [*already, *(done.get(item.guest, item) for item in checked)]


def _under_way(earlier: journal.Update) -> CprError:
    return CprError(
        "update-under-way",
        f"What another run began with this guest is not finished ({earlier.phase}).",
        "Run vmfleet.cpr.live_update, or vmfleet.cpr.guest_restore, once more first.",
    )


async def _inspect(task: Task, qemu: process.QemuProcess) -> preflight.Inspection:
    """A guest that can be checkpointed.

    :raises CprError: what stands in the way of that.
    """
    inspection = await preflight.inspect(qemu, task.journal.directory)
    for blocker in blockers(inspection):
        raise blocker
    for blocker in resources.disk_blockers(task.journal.directory, _bytes_to_write(t.cast("t.Any", inspection.observation))):
        raise blocker
    return inspection


def _is_complete(update: journal.Update | None) -> bool:
    return update is not None and update.phase == journal.CHECKPOINTED


def blockers(inspection: preflight.Inspection) -> list[CprError]:
    """What stands between a guest and its checkpoint, but for the room for it."""
    found = inspection.blockers_but_room(CPR_REBOOT)
    if inspection.observation is None or inspection.description is None:
        return found
    pid = inspection.process.identity.pid
    try:
        new_command_line.make_in_place(inspection.description.options, inspection.description.running, state="")
    except CprError as error:
        found.append(error)
    if surroundings.read(pid).namespaces and not inspection.unit:
        found.append(
            CprError(
                "checkpoint-namespace",
                "The guest's QEMU is in a namespace of its own, which will be gone with it.",
                "Run it in a service that makes that namespace, or leave this guest out.",
            )
        )
    return found


def _survives(observation: readiness.Observation) -> bool:
    """Whether the guest's RAM is in files that outlive the host's reboot."""
    files = [block.path for block in observation.memory if block.path]
    return observation.memory_in_place and not any(resources.file_system(path) in _VOLATILE for path in files)


def _bytes_to_write(observation: readiness.Observation) -> int:
    ram = 0 if _survives(observation) else sum(block.size for block in observation.memory)
    return ram + _STATE_SIZE


async def _plan(task: Task, name: str, inspection: preflight.Inspection, successor: Successor) -> journal.Update:
    records, parameters = task.journal, task.parameters
    old = inspection.process
    pid = old.identity.pid
    observation = t.cast("t.Any", inspection.observation)
    description = t.cast("t.Any", inspection.description)
    command = new_command_line.make_in_place(description.options, description.running, state="")
    if inspection.unit and any(option.name == "daemonize" for option in old.options):
        command.arguments.append(command_line.Option("-daemonize"))  # its service may wait for that (Type=forking)
    update = journal.Update(guest=name, directory=records.path(name), mode=CPR_REBOOT)
    update.machine_type, update.run_state = observation.machine_type, observation.run_state
    update.unit = inspection.unit["Id"] if inspection.unit else None
    update.taps = list(description.running.taps)
    update.display, update.forwards = command.display, command.forwards
    in_place = _survives(observation)
    is_open = process.open_files(pid)
    agreement = handshake.agree(observation.offer, successor.offer, mode=CPR_REBOOT, in_place=in_place)
    update.capabilities, update.parameters = agreement.capabilities, agreement.parameters
    update.old = journal.Qemu(
        pid, old.identity.start_time, old.executable, observation.offer.version_text, t.cast(str, inspection.monitor)
    )
    bound = [old.path(path) for path in new_command_line.bound_paths(command.arguments)]
    update.permissions = permissions.read(bound)
    update.heartbeat = {"command": parameters.get("heartbeat_command"), "timeout": parameters["heartbeat_timeout"]}
    around = dataclasses.replace(surroundings.read(pid), working_directory=old.working_directory)
    if new_command_line.changes_user(command.arguments):
        around = around.as_root()
    update.checkpoint = {
        "arguments": command_line.write(command.arguments),
        "surroundings": surroundings.as_dict(around),
        "user": surroundings.read(pid).user,
        "started_at": process.started_at(old.identity),
        "taps": [dataclasses.asdict((await network.inspect(pid, tap.name))[1]) for tap in update.taps],
        "directories": permissions.read(sorted({os.path.dirname(path) for path in bound})),
        "boot_id": process.boot_id(),
        "memory_files": [block.path for block in observation.memory] if in_place else [],
        # In a mount namespace of its service's another file may have that path.
        "images": [path for path in description.images if os.path.isfile(path) and process.file_id(path) in is_open],
        "mark": os.urandom(8).hex(),
        "marked": [],
        "binary": successor.path,
        "version": successor.offer.version_text,
    }
    return update


async def checkpoint(update: journal.Update, *, timeout: float, write_timeout: float) -> None:
    """Write a guest's state to its file, and end its QEMU; the guest is then down, and its checkpoint complete.

    :param timeout: seconds for the connection.
    :param write_timeout: seconds that the guest's state may take.
    :raises CprError: the guest runs on in its QEMU, as before, unless the code is ``old-qemu-gone``.
    """
    started = time.monotonic()
    old = t.cast(journal.Qemu, update.old)
    with Watch(old.identity) as watch:
        async with await reach.old_qemu(update, watch, timeout) as monitor:
            _make_room(update)
            await page_cache.release(old.pid, timeout)
            try:
                before = await view.read(monitor, old.pid)
                agreed = handshake.Agreement(update.capabilities, update.parameters, [])
                update.agreement = handshake.record(CPR_REBOOT, agreed, machine_view.summary(before), view.HINTS, {})
                update.heartbeat["agent"] = await verify.agent_answers(monitor, before, old.pid)
                await transfer.prepare_old(monitor, update, journal.CHECKPOINTING)
                await setup.set_parameters("old", monitor, update)
                if update.unit:
                    await systemd.hold_back(update.unit, update.checkpoint["binary"], update.checkpoint["arguments"])
                await _write(update, monitor, watch, write_timeout)
                await _keep(update)
                update.took("checkpoint", started)
                update.run = None  # from here on anybody may restore it
                update.enter(journal.CHECKPOINTED, _message(update))
            except BaseException as error:
                if await watch.wait(reach.LAST_BREATH if _is_lost(error) else 0):
                    await _forget(update)
                    raise failures.old_qemu_gone(update) from error
                if _is_lost(error):
                    async with await reach.old_qemu(update, watch) as again:
                        await undo(update, again)
                else:
                    await undo(update, monitor)
                if isinstance(error, CprError):
                    error.message += " The guest runs on, as before."
                raise
            await _end(monitor, watch)


def _is_lost(error: BaseException) -> bool:
    return isinstance(error, CprError) and error.code in ("monitor-lost", "qmp-timeout")


def _make_room(update: journal.Update) -> None:
    """An empty directory that only the QEMU's user can enter."""
    try:
        os.makedirs(update.directory, mode=0o711, exist_ok=True)
        shutil.rmtree(update.channels, ignore_errors=True)
        os.mkdir(update.channels, mode=0o700)
        if os.geteuid() == 0:
            os.chown(update.channels, update.checkpoint["user"], -1)
    except OSError as error:
        raise CprError(
            "state-directory",
            f"The directory {update.directory} can't be made: {error.strerror}.",
            "Give the collection a directory that has room and that it may write.",
        ) from error


async def _write(update: journal.Update, monitor: Monitor, watch: Watch, timeout: float) -> None:
    """Let QEMU stop the guest and write all of it."""
    stop: Event | None = None
    with monitor.events("STOP", "MIGRATION") as events:
        await monitor.execute("migrate", {"uri": f"file:{update.state_file}"})
        deadline = time.monotonic() + timeout
        while True:
            try:
                event = await asyncio.wait_for(monitor.next_event(events), max(0.0, deadline - time.monotonic()))
            except asyncio.TimeoutError:
                raise CprError(
                    "write-timeout",
                    f"The guest's state was not written within {timeout:g} s.",
                    "Give it more time (write_timeout), or a faster directory.",
                ) from None
            if event["event"] == "STOP":
                stop = event
            elif event["data"]["status"] == "completed":
                break
            elif event["data"]["status"] in ("failed", "cancelled"):
                state = await monitor.execute("query-migrate")
                raise CprError(
                    "write-failed",
                    f"QEMU could not write the guest's state: {state.get('error-desc') or state['status']}.",
                    "Is there room in that directory, and may the guest's user write there?",
                    qemu_description=state.get("error-desc"),
                )
    update.checkpoint["stopped_at"] = switch.microseconds(stop) if stop else None


async def _keep(update: journal.Update) -> None:
    """See that what was written is on the disk, and note what it must be like when it is read."""
    for path in update.checkpoint["memory_files"]:
        _mark(update, path)
        await asyncio.to_thread(_sync, path)
    for path in update.checkpoint["images"]:
        with contextlib.suppress(FileNotFoundError):
            await asyncio.to_thread(_sync, path)  # for the times; QEMU has written the rest
    await asyncio.to_thread(_sync, update.state_file)
    look_at_images(update)
    update.checkpoint["size"] = os.path.getsize(update.state_file)
    update.checkpoint["sha256"] = await asyncio.to_thread(digest, update.state_file)


def _mark(update: journal.Update, path: str) -> None:
    """Mark RAM in a file: where there is none by that name any more, a QEMU makes another one, which is empty."""
    with contextlib.suppress(OSError):  # its file system has no such attributes
        os.setxattr(path, _MARK, update.checkpoint["mark"].encode())
        update.checkpoint["marked"].append(path)


def unmark(update: journal.Update) -> None:
    """Take the marks away again."""
    for path in update.checkpoint.get("marked", ()):
        with contextlib.suppress(OSError):
            os.removexattr(path, _MARK)


def is_marked(update: journal.Update, path: str) -> bool:
    """Whether that RAM still is the guest's; also where it could not be marked."""
    if path not in update.checkpoint.get("marked", ()):
        return os.path.exists(path)
    try:
        return os.getxattr(path, _MARK) == update.checkpoint["mark"].encode()
    except OSError:
        return False


def look_at_images(update: journal.Update) -> None:
    """Note what the images are like, to which nobody may write until the guest goes on."""
    update.checkpoint["looks"] = {}
    for path in update.checkpoint.get("images", ()):  # records of earlier versions have none
        with contextlib.suppress(FileNotFoundError):  # seen by its service only
            update.checkpoint["looks"][path] = look_of(path)


def look_of(path: str) -> list[int]:
    """A file's size and time, by which it shows that somebody has written to it; in seconds, since a reboot may round it."""
    status = os.stat(path)
    return [status.st_size, int(status.st_mtime)]


def _sync(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def digest(path: str) -> str:
    """The SHA-256 of a file."""
    found = hashlib.sha256()
    with open(path, "rb", buffering=0) as stream:
        for part in iter(lambda: stream.read(1 << 20), b""):
            found.update(part)
    return found.hexdigest()


def _message(update: journal.Update) -> str:
    size = update.checkpoint["size"] >> 20
    where = "its RAM left in its file" if update.checkpoint["memory_files"] else "its RAM among it"
    return f"{WAITS} It has {size} MiB, {where}."


async def undo(update: journal.Update, monitor: Monitor) -> None:
    """Let the guest go on in its QEMU, and remove what there is of its checkpoint.

    :raises CprError: as `rollback.resume_old`, or ``state-directory``.
    """
    complete = update.phase == journal.CHECKPOINTED
    if complete:
        # On disk before the guest goes on: from then on what was written is out of date.
        try:
            update.enter(journal.CHECKPOINTING)
        except CprError:
            shutil.rmtree(update.channels, ignore_errors=True)  # no room for that word: without a file it is not needed
            if os.path.exists(update.state_file):
                raise
    try:
        await rollback.resume_old(update, monitor)
    except CprError:
        with contextlib.suppress(CprError):
            if complete and (await monitor.execute("query-status"))["status"] == _COMPLETE:
                look_at_images(update)
                update.enter(journal.CHECKPOINTED, WAITS)  # it refused: what was written still is all of the guest
        raise
    await _forget(update)


async def _forget(update: journal.Update) -> None:
    unmark(update)
    shutil.rmtree(update.channels, ignore_errors=True)
    with contextlib.suppress(CprError):
        if update.unit:
            await systemd.let_go(update.unit)
    with contextlib.suppress(CprError):
        update.enter(journal.ROLLED_BACK, "The guest was not checkpointed.")


async def _end(monitor: Monitor, watch: Watch) -> None:
    """End the QEMU of a complete checkpoint."""
    with contextlib.suppress(CprError):  # it may exit before it answers
        await monitor.execute("quit")
    if not await watch.wait(_QUIT_TIMEOUT):
        await watch.kill()


async def _finish_or_undo(earlier: journal.Update, found: process.QemuProcess) -> Outcome | None:
    """What a run that died left of a guest's checkpoint: finished, or undone; None if it is to be made anew."""
    old = t.cast(journal.Qemu, earlier.old)
    if found.identity != old.identity:
        if earlier.phase == journal.CHECKPOINTED:
            if earlier.unit and await is_waiting(found):
                return Outcome(earlier.guest, False, WAITS, earlier)
            raise CprError(
                "checkpoint-exists",
                f"The guest runs, and there is a checkpoint of it that was not restored: {earlier.directory}.",
                "Was it started anew? Then the checkpoint is out of date: remove that directory.",
            )
        return None
    with Watch(old.identity) as watch:
        async with await reach.old_qemu(earlier, watch) as monitor:
            # Somebody may have let the guest go on: what was written is out of date then.
            stopped = (await monitor.execute("query-status"))["status"] == _COMPLETE
            if earlier.phase == journal.CHECKPOINTED and stopped and _has_its_file(earlier):
                await _end(monitor, watch)
                return Outcome(earlier.guest, True, WAITS, earlier)
            await undo(earlier, monitor)
    return None


def _has_its_file(update: journal.Update) -> bool:
    with contextlib.suppress(OSError):
        return os.path.getsize(update.state_file) == update.checkpoint["size"]
    return False


async def is_waiting(qemu: process.QemuProcess, timeout: float = 0) -> bool:
    """Whether a QEMU waits for a guest's state.

    :param timeout: seconds until its monitor must answer; it may have just been started.
    :raises CprError: as `guests.open_monitor`.
    """
    deadline = time.monotonic() + timeout
    while True:
        try:
            async with await guests.open_monitor(qemu) as monitor:
                return (await monitor.execute("query-status"))["status"] == "inmigrate"
        except CprError:
            if time.monotonic() > deadline:
                raise
            await asyncio.sleep(_POLL)
