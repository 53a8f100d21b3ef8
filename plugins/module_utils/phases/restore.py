# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Lets guests go on whose state is in a file.

Private to the collection.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import time
import typing as t

from ansible_collections.vmfleet.cpr.plugins.module_utils import (
    command_line,
    descriptors,
    guests,
    handshake,
    journal,
    launcher,
    network,
    permissions,
    process,
    qemu_binary,
    surroundings,
    systemd,
    taps,
    verdict,
)
from ansible_collections.vmfleet.cpr.plugins.module_utils.errors import CprError
from ansible_collections.vmfleet.cpr.plugins.module_utils.monitor import Monitor
from ansible_collections.vmfleet.cpr.plugins.module_utils.offer import Binary
from ansible_collections.vmfleet.cpr.plugins.module_utils.phases import (
    checkpoint,
    reach,
    retire,
    setup,
    switch,
    verify,
)
from ansible_collections.vmfleet.cpr.plugins.module_utils.process import Watch
from ansible_collections.vmfleet.cpr.plugins.module_utils.task import Outcome, Task

_RESTORABLE = (journal.CHECKPOINTED, journal.RESTORING, journal.RESUMING)


async def restore_all(task: Task) -> list[Outcome]:
    """Let the guests go on that were named, or all that have a checkpoint, in the order in which they were started once.

    A guest that fails leaves its checkpoint behind, complete.

    :raises CprError: as `qemu_binary.probe` where a binary was given; ``checkpoint-missing``; ``host-stopping``.
    """
    if await systemd.is_stopping():
        raise CprError(
            "host-stopping",
            "The host is about to go down, and a guest that went on now would end with it.",
            "Run again when it is back.",
        )
    path = task.parameters["qemu_binary"]
    binary = await qemu_binary.probe(path) if path else None
    names = _in_order(task)
    options = {
        "limit": task.parameters["restore_timeout"],
        "binary": binary,
        "accepted": task.parameters["accept_differences"],
    }

    async def one(name: str) -> Outcome:
        if task.check_mode:
            update = t.cast(journal.Update, task.journal.load(name))
            return Outcome(name, True, "The guest would be restored.", update, extra=_since(update))
        with task.hold(name) as update:
            # Only what is seen under the lock counts: another task may have restored it meanwhile.
            if update.phase not in (*_RESTORABLE, journal.CHECKPOINTING):
                return Outcome(name, False, "The guest was restored already.", update, extra={"host_rebooted": False})
            since = _since(update)
            running = guests.by_name(process.find(), task.journal).get(name, [])
            task.claim(update)
            outcome = await restore(update, running, timeout=task.timeout, **options)
            outcome.extra.update(since)
            return outcome

    return await task.for_each(names, "restore", one)


def _since(update: journal.Update) -> dict[str, t.Any]:
    """What has happened since the checkpoint."""
    return {"host_rebooted": update.checkpoint.get("boot_id") != process.boot_id()}


def _in_order(task: Task) -> list[str]:
    found: dict[str, journal.Update | None] = {}
    for name in task.journal.guests():
        try:
            update = task.journal.load(name)
        except CprError:
            found[name] = None  # it will say so itself, and keep no other guest down
        else:
            if update and update.phase in (*_RESTORABLE, journal.CHECKPOINTING):
                found[name] = update
    names = list(found)
    missing = sorted(set(task.guests) - set(names))
    if missing:
        raise CprError(
            "checkpoint-missing",
            f"There is no checkpoint of {', '.join(missing)} in {task.journal.directory}.",
            f"Those that are there: {', '.join(sorted(names)) or 'none'}.",
        )
    wanted = task.guests or names

    def started_at(name: str) -> float:
        update = found[name]
        return update.checkpoint.get("started_at", 0) if update else 0

    return sorted(wanted, key=lambda name: (started_at(name), name))


async def restore(
    update: journal.Update,
    running: t.Sequence[process.QemuProcess],
    *,
    timeout: float,
    limit: float,
    binary: Binary | None,
    accepted: t.Container[str],
) -> Outcome:
    """Start a QEMU for the guest, give it the guest's state, and let the guest run.

    Only once it runs its checkpoint goes. From the moment in which it may have run, that is out of date
    and is never used again: its disks have moved on.

    :param running: the processes that have the guest's name.
    :param timeout: seconds for the start.
    :param limit: seconds that loading the state may take.
    :param binary: the QEMU to take instead of the one that was to have the guest when the checkpoint was written.
    :param accepted: what is not asked for: ``disks-changed``.
    :raises CprError: ``guest-running``, ``checkpoint-damaged``, ``disk-missing``, ``disks-changed``,
        ``checkpoint-incomplete``, ``state-unclear``, ``restore-failed``; the checkpoint is complete and nothing runs
        the guest, but for the two before the last.
    """
    started = time.monotonic()
    if update.checkpoint.get("pids_of", update.checkpoint["boot_id"]) != process.boot_id():
        # Whoever has these pids by now is somebody else.
        for qemu in filter(None, (update.old, update.new)):
            qemu.start_time = -1
        update.checkpoint["pids_of"] = process.boot_id()
    finished = await _take_up(update, running, timeout)
    if finished:
        return finished
    await _check(update, accepted)
    if binary:
        _check_binary(update, binary)
    old, known = t.cast(journal.Qemu, update.old), update.checkpoint
    executable, version = known.get("binary", old.executable), known.get("version", old.version)
    if binary:
        executable, version = binary.path, binary.offer.version_text
    update.new = journal.Qemu(0, 0, executable, version, old.monitor)
    await _start(update, timeout)
    with Watch(update.new.identity) as watch:
        try:
            if not await reach.answers(update, watch, time.monotonic() + timeout):
                raise _exited(update) if watch.ended.is_set() else _silent(update, timeout)
            async with await reach.new_qemu(update, watch) as monitor:
                await _load(update, monitor, watch, limit)
                await _resume(update, monitor, watch)
                return await _finish(update, monitor, started)
        except BaseException as error:
            if update.phase == journal.RESTORING:  # it has not run
                await _end(update, watch)
                with contextlib.suppress(CprError):
                    update.enter(journal.CHECKPOINTED, checkpoint.WAITS)
                if isinstance(error, CprError):
                    error.hint = f"The checkpoint is as it was, in {update.directory}. {error.hint}".strip()
            raise


async def _take_up(update: journal.Update, running: t.Sequence[process.QemuProcess], timeout: float) -> Outcome | None:
    """What a run that died left behind, brought to where restoring can begin; an outcome if there is nothing left."""
    new, old = update.new, update.old
    for qemu in running:
        if new and qemu.identity == new.identity:
            continue
        if old and qemu.identity == old.identity:
            outcome = await _still_in_its_qemu(update, old, timeout)
            if outcome:
                return outcome
            continue
        if update.unit and await checkpoint.is_waiting(qemu, timeout):
            continue  # systemd has started it for us
        raise CprError(
            "guest-running",
            f"A QEMU runs a guest of this name already (process {qemu.identity.pid}).",
            f"Was it started anew? Then its checkpoint is out of date: remove {_leftovers(update)}.",
        )
    if update.phase == journal.CHECKPOINTING:
        await _release_unit(update)
        raise CprError(
            "checkpoint-incomplete",
            "The host or the guest's QEMU ended while the guest's state was being written: the guest is down.",
            f"Remove {update.directory}, then (re)start the guest anew; its disks are as after a power cut.",
        )
    if new is None:
        return None
    with Watch(new.identity) as watch:
        if update.phase == journal.RESUMING or not watch.ended.is_set() and await _runs(update, watch, timeout):
            try:
                connected = await reach.new_qemu(update, watch, timeout)
            except CprError as error:
                if error.code != "new-qemu-exited":
                    raise
                await _release_unit(update)
                raise CprError(
                    "state-unclear",
                    f"The guest was told to go on in process {new.pid}, which is gone: it may have run, and its checkpoint"
                    " is out of date then.",
                    f"Nothing was done. Remove {update.directory}, then (re)start the guest anew.",
                ) from error
            async with connected as monitor:
                await _resume(update, monitor, watch)
                return await _finish(update, monitor, time.monotonic())
        if not watch.ended.is_set():
            await _end(update, watch)
    return None


async def _end(update: journal.Update, watch: Watch) -> None:
    """End a QEMU that has not run the guest, and note how it left the guest's disks: it may have opened them."""
    await watch.kill()
    with contextlib.suppress(OSError):
        checkpoint.look_at_images(update)


async def _release_unit(update: journal.Update) -> None:
    """Let the service start the guest anew: nothing of its state is of use any more."""
    if update.unit:
        await systemd.let_go(update.unit)


async def _still_in_its_qemu(update: journal.Update, old: journal.Qemu, timeout: float) -> Outcome | None:
    """The QEMU that wrote the state is there, and has all of the guest; None if it was just ending."""
    with Watch(old.identity) as watch:
        try:
            connected = await reach.old_qemu(update, watch)
        except CprError:
            if update.phase == journal.CHECKPOINTED and await watch.wait(timeout):
                return None
            raise
        async with connected as monitor:
            await checkpoint.undo(update, monitor)
    return Outcome(update.guest, True, "The guest goes on in the QEMU that it was in.", update)


async def _runs(update: journal.Update, watch: Watch, timeout: float) -> bool:
    """Whether a QEMU that was only to load the guest's state runs it: somebody may have told it to."""
    deadline = time.monotonic() + timeout
    while True:
        try:
            async with await reach.new_qemu(update, watch, timeout) as monitor:
                return (await monitor.execute("query-status"))["status"] not in (verdict.WAITING, verdict.COMPLETE)
        except CprError as error:
            if watch.ended.is_set():
                return False
            if error.code != "monitor-unreachable" or time.monotonic() > deadline:
                raise  # else it has just been started


def _leftovers(update: journal.Update) -> str:
    """What of a checkpoint must be removed by hand, as part of a sentence."""
    return f"{update.directory} and {systemd.held(update.unit)}" if update.unit else update.directory


async def _check(update: journal.Update, accepted: t.Container[str]) -> None:
    """See that all of the guest is as it was left."""
    try:
        size = os.path.getsize(update.state_file)
        same = size == update.checkpoint["size"]
        same = same and await asyncio.to_thread(checkpoint.digest, update.state_file) == update.checkpoint["sha256"]
        looks = update.checkpoint.get("looks", {})  # records of earlier versions have none
        gone = [path for path in looks if not os.path.exists(path)]
        changed = [path for path, look in looks.items() if path not in gone and checkpoint.look_of(path) != look]
    except OSError as error:
        raise _damaged(update, f"{update.state_file}: {error.strerror}") from error
    if not same:
        raise _damaged(update, f"{update.state_file} is not what was written")
    ram = [path for path in update.checkpoint["memory_files"] if not checkpoint.is_marked(update, path)]
    if ram:
        raise _damaged(update, f"the guest's RAM {', '.join(ram)} is gone, or another file by now")
    if gone:
        raise CprError(
            "disk-missing",
            f"The guest's disks {', '.join(gone)} are not there. Its checkpoint is as it was.",
            "Mount what they are on, or put them back, and run again.",
        )
    if changed and "disks-changed" not in accepted:
        raise CprError(
            "disks-changed",
            f"Somebody has written to the guest's disks since its state was written ({', '.join(changed)}). If the guest"
            " was started from them meanwhile, they would be damaged if it went on from that state.",
            f"If it was: remove {_leftovers(update)}, and start it from its disks. If you know that they hold what they"
            " did (a copy put back): accept_differences with disks-changed.",
        )


def _damaged(update: journal.Update, why: str) -> CprError:
    return CprError(
        "checkpoint-damaged",
        f"The guest's checkpoint can't be used: {why}.",
        "Put it back from a copy (of RAM one with extended attributes: cp -a, rsync -X); or remove"
        f" {_leftovers(update)} and start the guest anew, as after a power cut.",
    )


def _check_binary(update: journal.Update, binary: Binary) -> None:
    if update.machine_type not in binary.machine_types:
        raise CprError(
            "machine-type-missing",
            f"The guest's machine type {update.machine_type} is not in QEMU {binary.offer.version_text}.",
            "Choose a QEMU that has it.",
        )


async def _start(update: journal.Update, timeout: float) -> None:
    """Start a QEMU that waits for the guest, in the guest's service where it has one."""
    new = t.cast(journal.Qemu, update.new)
    update.generation = 0
    await _make_taps(update)
    arguments = update.checkpoint["arguments"]
    _make_directories(update)
    if update.unit:
        await systemd.hold_back(update.unit, new.executable, arguments)  # somebody may have removed it
        identity = process.identify(await systemd.restart(update.unit, timeout))
        if identity is None:
            raise _exited(update)
        new.pid, new.start_time = identity.pid, identity.start_time
        update.enter(journal.RESTORING)
    else:
        around = surroundings.from_dict(update.checkpoint["surroundings"])
        with launcher.Prepared(new.executable, arguments, around, update.log) as child:
            new.pid, new.start_time = child.identity.pid, child.identity.start_time
            update.enter(journal.RESTORING)
            child.start(timeout)


def _make_directories(update: journal.Update) -> None:
    """Make the directories of the guest's sockets again, which a reboot may have emptied (/run)."""
    for path, owner, group, mode in update.checkpoint["directories"]:
        if not os.path.isdir(path):
            os.makedirs(path)
            permissions.put_back([(path, owner, group, mode)])


async def _make_taps(update: journal.Update) -> None:
    """Make the guest's interfaces anew, where nobody has, to stay until the QEMU has them open."""
    for tap, settings in zip(update.taps, update.checkpoint["taps"]):
        pid = os.getpid()
        if not os.path.exists(f"/sys/class/net/{tap.name}"):
            number = descriptors.create_tap(taps.named(tap), pid)
            try:
                descriptors.keep_tap(number, update.checkpoint["user"], None)
            finally:
                os.close(number)
        wanted = taps.settings_of(settings)
        if taps.differences(wanted, (await network.inspect(pid, tap.name))[1]):
            await network.set_up(pid, tap.name, wanted)


async def _load(update: journal.Update, monitor: Monitor, watch: Watch, limit: float) -> None:
    """Give the QEMU the guest's state."""
    current = await monitor.execute("query-migrate-capabilities")
    await setup.set_capabilities("new", monitor, handshake.capabilities_to_set(current, update.capabilities))
    with monitor.events("MIGRATION") as events:
        await switch.listen(monitor, {"uri": f"file:{update.state_file}"})
        deadline = time.monotonic() + limit
        while True:
            try:
                event = await asyncio.wait_for(monitor.next_event(events), max(0.0, deadline - time.monotonic()))
            except asyncio.TimeoutError:
                raise _failed(f"it was not read within {limit:g} s", "Give it more time (restore_timeout).") from None
            except CprError as error:
                if await watch.wait(reach.LAST_BREATH):
                    raise _exited(update) from error
                raise
            if event["data"]["status"] == "completed":
                return
            if event["data"]["status"] in ("failed", "cancelled"):
                state = await monitor.execute("query-migrate")
                raise _failed(
                    str(state.get("error-desc") or state["status"]), "Restore it with the QEMU that wrote it."
                )


def _failed(why: str, hint: str) -> CprError:
    return CprError("restore-failed", f"The QEMU could not load the guest's state: {why}.", hint, qemu_description=why)


def _exited(update: journal.Update) -> CprError:
    secrets = command_line.secrets(command_line.parse(update.checkpoint["arguments"]))
    words = command_line.mask(launcher.last_words(update.log), secrets)
    if update.unit:
        words = f"see journalctl -u {update.unit}"
    return CprError(
        "new-qemu-exited",
        f"The QEMU that was started for the guest exited. Its last words: {words or '(none)'}",
        "Make it accept the guest's devices and files, then run again.",
        qemu_description=words or None,
    )


def _silent(update: journal.Update, timeout: float) -> CprError:
    return CprError(
        "new-qemu-silent",
        f"The QEMU (process {t.cast(journal.Qemu, update.new).pid}) did not wait for the guest within {timeout:g} s.",
        "Give it more time (timeout), or see why the host is slow.",
    )


async def _resume(update: journal.Update, monitor: Monitor, watch: Watch) -> None:
    """Let the guest run; from here on its checkpoint is out of date."""
    before = update.phase
    update.enter(journal.RESUMING)
    if update.run_state != "running" or update.checkpoint.get("ran"):
        return  # a pause that somebody has made since is theirs
    try:
        await monitor.execute("cont")
    except CprError as error:
        # Refused, for an image that somebody has locked, say: if nobody ever told it before, it has not run.
        if before == journal.RESTORING and error.code == "qmp-error":
            if (await monitor.execute("query-status"))["status"] == verdict.COMPLETE:
                update.phase = journal.RESTORING
        raise
    stopped_at = update.checkpoint.get("stopped_at")
    if (await monitor.execute("query-status"))["status"] != "running":
        raise CprError(
            "guest-not-running",
            "The guest was told to go on, and does not run.",
            f"Look at it in process {watch.identity.pid}; running again tries once more.",
        )
    update.checkpoint["ran"] = True
    if stopped_at:
        update.pause_ms = round((time.time_ns() // 1000 - stopped_at) / 1000, 2)


async def _finish(update: journal.Update, monitor: Monitor, started: float) -> Outcome:
    """Put right what goes beyond the guest itself, and remove its checkpoint."""
    new = t.cast(journal.Qemu, update.new)
    update.enter(journal.RESUMING)
    if update.unit:
        await systemd.let_go(update.unit)  # whatever fails from here on, its service starts the guest from its disk
    checkpoint.unmark(update)
    permissions.put_back(update.permissions)
    for tap in update.taps:
        with contextlib.suppress(CprError, OSError):
            if not tap.persistent:
                for number, name in network.open_taps(new.pid).items():
                    if name == tap.name:
                        descriptors.let_tap_go(new.pid, number)
    await retire.restore_ports(update, monitor)
    await verify.verify(update, monitor)
    await setup.put_back(monitor, update.restore)
    update.took("restore", started)
    pause = f" after {update.pause_ms / 1000:.1f} s" if update.pause_ms else ""
    message = f"The guest goes on in QEMU {new.version}{pause}."
    update.enter(journal.RESTORED, message)
    await asyncio.to_thread(shutil.rmtree, update.channels, ignore_errors=True)
    return Outcome(update.guest, True, message, update)
