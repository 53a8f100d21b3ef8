# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Starts the new QEMU, which then waits for the CPR state.

Private to the collection.
"""

from __future__ import annotations

import contextlib
import dataclasses
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
    modes,
    namespaces,
    network,
    new_command_line,
    process,
    offer,
    permissions,
    qemu_binary,
    resources,
    surroundings,
    systemd,
)
from ansible_collections.vmfleet.cpr.plugins.module_utils.errors import CprError
from ansible_collections.vmfleet.cpr.plugins.module_utils.modes import CPR_EXEC, CPR_TRANSFER
from ansible_collections.vmfleet.cpr.plugins.module_utils.phases import (
    failures,
    preflight,
    reach,
    recover,
    rehearse,
    rollback,
)
from ansible_collections.vmfleet.cpr.plugins.module_utils.task import Outcome, Task

# Seconds between two looks for the socket: it is there some 50 ms after the start.
_POLL = 0.005


@dataclasses.dataclass
class Plan:
    """A launch that nothing stands in the way of.

    :ivar news: what the user is to hear of an earlier run.
    """

    inspection: preflight.Inspection
    binary: offer.Binary
    update: journal.Update
    command: new_command_line.NewCommandLine
    news: str | None = None

    @property
    def notes(self) -> list[str]:
        """What people should know beforehand, as sentences."""
        description = self.inspection.description
        notes = list(description.notes) if description else []
        if self.update.unit and self.inspection.unit and systemd.needs_drop_in(self.inspection.unit):
            notes.append(f"The unit {self.update.unit} gets a drop-in until the next reboot (NotifyAccess=main).")
        return notes

    @property
    def warnings(self) -> list[str]:
        """What of the user's wishes was dropped, and what of the guest may be unwanted, as sentences."""
        return [*self.update.dropped, *map(str, self.inspection.warnings_for(self.binary))]

    @property
    def arguments(self) -> list[str]:
        """The new QEMU's command line, its ``argv[0]`` left out."""
        return command_line.write(self.command.arguments)

    def diff(self) -> dict[str, str]:
        """Both command lines, secrets hidden, a word a line."""
        old = self.inspection.process
        before = [old.executable, *command_line.masked_words(old.options)]
        after = [self.binary.path, *command_line.masked_words(self.command.arguments)]
        return {
            "before_header": f"{self.update.guest} (running)",
            "after_header": f"{self.update.guest} (new)",
            "before": "\n".join(before) + "\n",
            "after": "\n".join(after) + "\n",
        }


async def launch_all(task: Task) -> list[Outcome]:
    """Check every guest, and only if all can be updated start a new QEMU for each.

    With ``when_refused`` of ``go-on`` those that can't are left out, and the others started.

    The guests run on their old QEMUs, before and after. A guest that runs this very binary
    already is left alone. What a run that died left behind is cleared first.

    :raises CprError: for what concerns all: the binary (`qemu_binary.probe`) or the names
        (`guests.select`).
    """
    async with qemu_binary.opened(task.parameters["qemu_binary"]) as probe:
        return await _launch_all(task, probe)


async def _launch_all(task: Task, probe: qemu_binary.Probe) -> list[Outcome]:
    binary = probe.binary
    everyone = guests.by_name(process.find(), task.journal)
    go_on = task.parameters["when_refused"] == "go-on"
    under_way = task.journal.guests_under_way()
    names = task.guests or sorted({*guests.select([], everyone)[0], *under_way})
    found: dict[str, process.QemuProcess] = {}
    if not task.guests:
        task.warnings += [str(guests.unnamed(qemu)) for qemu in everyone.get(None, ())]
    misspelt = [name for name in names if name not in everyone and name not in under_way]
    if misspelt and not go_on:
        guests.select(misspelt, everyone)
    wishes = handshake.Wishes.of(task.parameters)
    plans: dict[str, Plan] = {}

    async def check(name: str) -> Outcome:
        if task.check_mode:
            return await judge(name, task.journal.load(name))
        with task.hold(name) as earlier:  # it also shows that records can be written here
            return await judge(name, earlier)

    async def judge(name: str, earlier: journal.Update | None) -> Outcome:
        if earlier and earlier.phase in journal.OF_A_CHECKPOINT:
            raise CprError(
                "update-under-way",
                f"There is a checkpoint of the guest in {earlier.directory} ({earlier.phase}).",
                "Finish that with vmfleet.cpr.guest_restore.",
            )
        news = _news(earlier, task.run)
        unfinished = earlier is not None and earlier.is_under_way
        if unfinished and task.check_mode:
            return _outcome(
                name, True, "What an earlier run left behind would be finished or undone, and the guest updated.", news
            )
        if earlier and unfinished:
            task.claim(earlier)
            await recover.recover(earlier, timeout=task.timeout)
            news = f"An earlier run had left its update unfinished. {earlier.message}"
            found.update(guests.select([name], guests.by_name(process.find(), task.journal))[1])
        if name not in found:
            found.update(guests.select([name], everyone)[1])
        if found[name].executable_id == binary.executable_id:
            return _outcome(name, unfinished, f"The guest runs on {binary.path} already.", news, update=earlier)
        inspection = await preflight.inspect(found[name], task.journal.directory)
        choice, dummy = await inspection.choose(probe, task.parameters)
        if isinstance(choice, list):
            raise choice[0]
        if choice.mode == CPR_EXEC and process.file_id(binary.path) != binary.executable_id:
            raise CprError(
                "exec-wrapper",
                f"{binary.path} starts another program, so it could not be told whether cpr-exec has worked.",
                "Give the path of the QEMU binary itself.",
            )
        plans[name] = _plan(task.journal, name, inspection, binary, wishes, choice)
        plans[name].news = news
        if choice.mode == CPR_EXEC and not task.check_mode:
            # What the new QEMU does not take must be known now: there is no old one afterwards.
            running = t.cast("t.Any", inspection.description).running
            for blocker in await rehearse.rehearse(
                found[name], inspection.options_for(binary, choice.mode), running, binary.path, timeout=task.timeout
            ):
                raise blocker
        message = " ".join([f"The guest would go by {choice.mode}. {choice.reason}", *plans[name].notes])
        return _outcome(name, True, message, news, plan=plans[name])

    async def start(name: str) -> Outcome:
        plan = plans[name]
        with task.hold(name) as earlier:
            if earlier.is_under_way:
                raise CprError(
                    "update-under-way",
                    "Another run began to update this guest at the same moment.",
                    "Let one of the two runs end, then run again.",
                )
            task.claim(plan.update)
            await launch(plan, timeout=task.timeout)
        waits = f"QEMU {binary.offer.version_text} waits for the guest, which goes by {plan.update.mode}."
        if plan.update.mode == CPR_EXEC:
            waits = f"QEMU {binary.offer.version_text} was rehearsed; the guest goes by cpr-exec."
        message = " ".join([waits, plan.update.mode_reason, *plan.notes])
        return _outcome(name, True, message, plan.news, plan=plan)

    checked = await task.for_each(names, "preflight", check)
    if task.check_mode:
        return checked
    if any(outcome.error for outcome in checked) and not go_on:
        # Nothing was started, for nobody.
        return [item if item.error else _outcome(item.guest, False, "Nothing was started.") for item in checked]
    waiting = _those_without_room(plans)
    await _let_units_speak(plans.values())
    done = [*waiting, *await task.for_each(plans, "launch", start)]
    by_name = {item.guest: item for item in done}
    return [by_name.get(item.guest, item) for item in checked]


def _those_without_room(plans: dict[str, Plan]) -> list[Outcome]:
    """Take out the guests that have room for a second QEMU only after others are done."""
    room = resources.Room()
    found = []
    for name, plan in list(plans.items()):
        try:
            needed = plan.inspection.demand(plan.update.mode)
            short = room.short(needed) if plan.update.mode != CPR_EXEC else None
        except OSError:
            continue  # the guest has just ended, which its launch will say
        if short is None:
            room.take(needed)
            continue
        pool, size, left = short
        found.append(
            _outcome(
                name,
                False,
                f"The guest waits until others are done: its new QEMU needs {size >> 20} MiB, and {pool} has"
                f" {left >> 20} MiB left beside theirs.",
                plan.news,
                deferred=True,
            )
        )
        del plans[name]
    return found


def _news(earlier: journal.Update | None, run: dict[str, str] | None) -> str | None:
    """What another run did to the guest last, since who started that one may never have heard of it."""
    if earlier is None or earlier.message is None or (earlier.run and run and earlier.run["key"] == run["key"]):
        return None
    return f"The run before ({journal.local_time(earlier.changed_at)}): {earlier.message}"


def _outcome(
    guest: str,
    changed: bool,
    message: str,
    news: str | None = None,
    *,
    update: journal.Update | None = None,
    plan: Plan | None = None,
    deferred: bool = False,
) -> Outcome:
    """:param plan: of a guest whose new QEMU waits, or would in check mode."""
    return Outcome(
        guest,
        changed,
        message,
        plan.update if plan else update,
        extra={"launched": plan is not None, "deferred": deferred, "earlier_run": news},
        diff=plan.diff() if plan else None,
        warnings=plan.warnings if plan else [],
    )


def _plan(
    records: journal.Journal,
    name: str,
    inspection: preflight.Inspection,
    binary: offer.Binary,
    wishes: handshake.Wishes,
    choice: modes.Choice,
) -> Plan:
    old = inspection.process
    observation = t.cast("t.Any", inspection.observation)
    running = t.cast("t.Any", inspection.description).running
    update = journal.Update(guest=name, directory=records.path(name), mode=choice.mode, mode_reason=choice.reason)
    update.generation = new_command_line.generation_of(old.options) + 1
    options = inspection.options_for(binary, choice.mode)
    in_place = choice.mode == CPR_EXEC
    if in_place:
        command = new_command_line.make_in_place(options, running, state=update.state_file)
        update.executable_id = list(binary.executable_id)
        update.exec_command = [binary.path, *command_line.write(command.arguments)]
        update.permissions = permissions.read(map(old.path, new_command_line.bound_paths(command.arguments)))
    else:
        cpr_socket = update.cpr_socket if choice.mode == CPR_TRANSFER else None
        command = new_command_line.make(options, running, cpr_socket=cpr_socket)
    if len(update.main_socket.encode()) > new_command_line.SOCKET_PATH_LIMIT:
        raise CprError(
            "socket-path-too-long",
            f"The migration sockets in {update.channels} would have too long a path for a UNIX socket.",
            "Give the collection a shorter state_directory.",
        )
    update.machine_type = observation.machine_type
    update.run_state = observation.run_state
    update.taps = [] if in_place else list(running.taps)
    update.unit = inspection.unit["Id"] if inspection.unit and not in_place else None
    update.display, update.forwards = command.display, command.forwards
    update.renames = [(old.path(temporary), old.path(stable)) for temporary, stable in command.renames]
    agreement = handshake.agree(
        observation.offer, binary.offer, wishes, choice.mode, in_place=observation.memory_in_place
    )
    update.capabilities, update.parameters = agreement.capabilities, agreement.parameters
    update.dropped = agreement.dropped
    monitor = t.cast(str, inspection.monitor)
    update.old = journal.Qemu(
        pid=old.identity.pid,
        start_time=old.identity.start_time,
        executable=old.executable,
        version=observation.offer.version_text,
        monitor=monitor,
    )
    update.new = journal.Qemu(
        pid=old.identity.pid if in_place else 0,
        start_time=old.identity.start_time if in_place else 0,
        executable=binary.path,
        version=binary.offer.version_text,
        monitor=monitor if in_place else next(path for path, stable in update.renames if stable == monitor),
    )
    _check_visible(old, [binary.path, records.directory, *(os.path.dirname(path) for path, dummy in update.renames)])
    return Plan(inspection, binary, update, command)


async def _let_units_speak(plans: t.Iterable[Plan]) -> None:
    """All at once: systemd reads all its units anew for it."""
    units = [plan.inspection.unit for plan in plans if plan.update.unit]
    silent = [unit["Id"] for unit in units if unit and systemd.needs_drop_in(unit)]
    if silent:
        await systemd.let_speak(silent)


def _check_visible(old: process.QemuProcess, paths: t.Iterable[str]) -> None:
    """In a mount namespace of its own a QEMU may see something else at a path than we do."""
    if namespaces.shares(old.identity.pid, "mnt"):
        return
    for path in paths:
        while not os.path.exists(path):
            path = os.path.dirname(path)
        try:
            same = os.path.samefile(path, f"{process.PROC}/{old.identity.pid}/root{path}")
        except FileNotFoundError:
            same = False
        if not same:
            raise CprError(
                "path-not-visible",
                f"The guest's QEMU is in a mount namespace of its own and does not see {path} as this host does.",
                "Choose a state_directory and a place for the new QEMU that both see, or leave this guest out of"
                " live_update_guests.",
            )


async def launch(plan: Plan, *, timeout: float) -> None:
    """Start the new QEMU and wait until it waits for the guest, which runs on.

    With cpr-transfer it creates no device and answers no monitor before it has the CPR state, so
    its socket is all that can be waited for. With cpr-exec nothing is started.

    :param timeout: seconds until it must wait.
    :raises CprError: ``new-qemu-exited`` with the end of its standard error;
        ``new-qemu-silent``. The new QEMU is then gone.
    """
    update = plan.update
    started = time.monotonic()
    old, new = failures.both(update)
    around = dataclasses.replace(
        surroundings.read(old.pid), working_directory=plan.inspection.process.working_directory
    )
    _make_channels(update, around)
    if update.mode == CPR_EXEC:
        update.enter(journal.LAUNCHED)
        return
    owner = around.user
    if new_command_line.changes_user(plan.command.arguments):
        around = around.as_root()
    try:
        with descriptors.opened(plan.command.descriptors, update.taps, old.identity) as held:
            for tap in update.taps:
                await network.make_alike(old.pid, tap, timeout=timeout)
            with launcher.Prepared(plan.binary.path, plan.arguments, around, update.log, held) as child:
                new.pid, new.start_time = child.identity.pid, child.identity.start_time
                update.enter(journal.LAUNCHING)
                child.start(timeout)
        with process.Watch(child.identity) as watch:
            try:
                await _wait_until_waiting(update, watch, timeout)
                if (
                    os.geteuid() == 0 and update.mode == CPR_TRANSFER
                ):  # the old QEMU may be another user by now than the new one still is
                    os.chown(update.cpr_socket, owner, -1)
            except BaseException:
                await watch.kill()
                raise
    except BaseException as error:
        rollback.remove_traces(update)
        with contextlib.suppress(CprError):  # unrecorded, the next run clears it
            update.enter(journal.ROLLED_BACK, str(error))
        raise
    update.took("launch", started)
    update.enter(journal.LAUNCHED)


def _make_channels(update: journal.Update, around: surroundings.Surroundings) -> None:
    """An empty directory that only the new QEMU's user can enter."""
    os.makedirs(update.directory, mode=0o711, exist_ok=True)
    shutil.rmtree(update.channels, ignore_errors=True)
    os.mkdir(update.channels, mode=0o700)
    if os.geteuid() == 0:
        os.chown(update.channels, around.user, around.group)
    for leftover in [update.log, *(temporary for temporary, dummy in update.renames)]:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(leftover)


async def _wait_until_waiting(update: journal.Update, watch: process.Watch, timeout: float) -> None:
    path = update.cpr_socket
    deadline = time.monotonic() + timeout
    if update.mode != CPR_TRANSFER:
        if await reach.answers(update, watch, deadline):
            return
        raise failures.new_qemu_exited(update) if watch.ended.is_set() else _silent(timeout)
    while not _is_listening(path, watch.identity.pid):
        if time.monotonic() > deadline:
            raise _silent(timeout)
        if await watch.wait(_POLL):
            raise failures.new_qemu_exited(update)


def _silent(timeout: float) -> CprError:
    return CprError(
        "new-qemu-silent",
        f"The new QEMU did not wait for the guest within {timeout:g} s.",
        "Give it more time (timeout), or see why the host is slow.",
    )


def _is_listening(path: str, pid: int) -> bool:
    """Whether a process listens at this path; the file alone is there a moment earlier."""
    if not os.path.exists(path):
        return False
    try:
        table = process.read_file(pid, "net/unix")  # of its own network namespace
    except OSError:
        return False
    # Flags 00010000 is __SO_ACCEPTCON (proc_net_unix in net/unix/af_unix.c).
    return any(line.endswith(" " + path) and line.split()[3] == "00010000" for line in table.splitlines())
