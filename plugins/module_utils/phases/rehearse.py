# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Starts the new QEMU with a guest's machine, beside the guest, and asks what it would be.

Private to the collection.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import socket
import tempfile
import typing as t

from ansible_collections.vmfleet.cpr.plugins.module_utils import (
    command_line,
    descriptors,
    guests,
    launcher,
    machine_view,
    new_command_line,
    process,
    rehearsal,
    surroundings,
)
from ansible_collections.vmfleet.cpr.plugins.module_utils.command_line import Option
from ansible_collections.vmfleet.cpr.plugins.module_utils.errors import CprError
from ansible_collections.vmfleet.cpr.plugins.module_utils.monitor import Monitor
from ansible_collections.vmfleet.cpr.plugins.module_utils.phases import view
from ansible_collections.vmfleet.cpr.plugins.module_utils.process import QemuProcess
from ansible_collections.vmfleet.cpr.plugins.module_utils.taps import Tap

# Its monitor's number in the QEMU that rehearses; `new_command_line` counts from 10 on.
_MONITOR = 9


async def rehearse(
    qemu: QemuProcess, options: t.Sequence[Option], running: new_command_line.Running, binary: str, *, timeout: float
) -> list[CprError]:
    """What a new QEMU says that is started like it would be for the update. The guest is as before.

    It gets RAM of its own, which it never fills, and none of the guest's lines; it runs nothing
    and is ended.

    :param options: of the QEMU that would take the guest over.
    :param timeout: seconds until it must answer.
    :returns: what stands in the way: ``new-qemu-exited`` with its words, or the codes of
        `machine_view.differences`.
    """
    directory = tempfile.mkdtemp(prefix="vmfleet-cpr-")
    try:
        command = rehearsal.command_line(new_command_line.make(options, running, cpr_socket=None), _MONITOR)
        ours, theirs = socket.socketpair()
        with ours, theirs:
            return await _rehearse(qemu, running.taps, binary, command, directory, ours, theirs, timeout)
    except CprError as error:
        return [error]
    finally:
        shutil.rmtree(directory, ignore_errors=True)


async def _rehearse(
    qemu: QemuProcess,
    doubles: t.Sequence[Tap],
    binary: str,
    command: new_command_line.NewCommandLine,
    directory: str,
    ours: socket.socket,
    theirs: socket.socket,
    timeout: float,
) -> list[CprError]:
    pid = qemu.identity.pid
    around = dataclasses.replace(surroundings.read(pid), working_directory=qemu.working_directory)
    if new_command_line.changes_user(command.arguments):
        around = around.as_root()
    log = os.path.join(directory, "qemu.log")
    taps = [dataclasses.replace(tap, temporary=f"{tap.temporary}r") for tap in doubles]
    renamed = {tap.temporary: f"{tap.temporary}r" for tap in doubles}
    wanted = [
        dataclasses.replace(item, tap=renamed.get(item.tap or ""))
        for item in command.descriptors
        if item.number > 2  # the guest's console may be there
    ]
    with descriptors.opened(wanted, taps, qemu.identity) as held:
        held = {**held, _MONITOR: theirs.fileno()}
        words = command_line.write(command.arguments)
        with launcher.Prepared(binary, words, around, log, held, ends_with_us=True) as child:
            child.start(timeout)
    theirs.close()
    with process.Watch(child.identity) as watch:
        try:
            try:
                monitor = await Monitor.adopt(ours, "the rehearsal's monitor", timeout)
            except CprError as error:
                words_of_it = command_line.mask(launcher.last_words(log), command_line.secrets(qemu.options))
                raise CprError(
                    "new-qemu-exited",
                    f"{binary} does not start with the guest's command line: {words_of_it or error}.",
                    "Mend what it names, or choose another QEMU.",
                ) from error
            async with monitor, await guests.open_monitor(qemu) as of_guest:
                found = machine_view.differences(
                    await view.read(of_guest, pid), await view.read(monitor, child.identity.pid)
                )
        finally:
            await watch.kill()
    return [view.difference(code, sentences) for code, sentences in found.items()]
