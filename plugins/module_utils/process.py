# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""QEMU processes as ``/proc`` shows them: who runs, what is open, has it ended.

Private to the collection.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import re
import signal
import time
import typing as t
from dataclasses import dataclass

from ansible_collections.vmfleet.cpr.plugins.module_utils import command_line, read_config
from ansible_collections.vmfleet.cpr.plugins.module_utils.errors import CprError

PROC = "/proc"
_PR_SET_PDEATHSIG = 1
# Distributions and people decorate the name: qemu-system-x86_64-11.1, .qemu-kvm-wrapped.
_QEMU = re.compile(r"qemu-system-|qemu-kvm")
_DELETED = " (deleted)"


@dataclass(frozen=True)
class Identity:
    """One process for all time: a pid alone is used again.

    :ivar pid: the process id.
    :ivar start_time: clock ticks from the host's boot to the process's start.
    """

    pid: int
    start_time: int

    def is_alive(self) -> bool:
        """Whether this very process still runs; one that only waits to be reaped does not."""
        return self._letter() not in "ZX"

    def is_stopped(self) -> bool:
        """Whether a signal (SIGSTOP) or a debugger has stopped it."""
        return self._letter() in "Tt"

    def _letter(self) -> str:
        """Its state as in ``/proc/PID/stat``; ``X``, which is dead, where the pid is another's by now."""
        state = _state(self.pid)
        return state[1] if state and state[0] == self.start_time else "X"


@dataclass(frozen=True)
class QemuProcess:
    """A running QEMU.

    :ivar arguments: the words of its command line, ``argv[0]`` left out.
    :ivar executable: the path of its binary as the kernel knows it.
    :ivar executable_id: device and inode of that binary: what really runs, whatever lies at
        the path by now.
    :ivar on_disk: ``same``, ``replaced`` (another file lies at the path) or ``deleted``.
    """

    identity: Identity
    arguments: tuple[str, ...]
    executable: str
    executable_id: tuple[int, int]
    on_disk: str
    working_directory: str

    @property
    def options(self) -> list[command_line.Option]:
        """The command line, read, and what a ``-readconfig`` adds to it.

        :raises CprError: as `command_line.parse` and `read_config.options`; ``config-changed``.
        """
        found = []
        for option in command_line.parse(self.arguments):
            found += self._configured(option) if option.name == "readconfig" else [option]
        return found

    def _configured(self, option: command_line.Option) -> list[command_line.Option]:
        path = self.path(option.value or "")
        try:
            with open(path, encoding="utf-8") as stream:
                changed, text = os.fstat(stream.fileno()).st_mtime, stream.read()
        except (OSError, UnicodeDecodeError) as error:
            raise read_config.unreadable(str(error)) from error
        if changed > started_at(self.identity) + 1:
            raise CprError(
                "config-changed",
                f"The guest's -readconfig {path} was changed after its start: what it runs with can't be told.",
                "Put the file back as it was (and its time of change), or leave this guest out of live_update_guests.",
            )
        return read_config.options(text, command_line.OPTIONS_WITH_ARGUMENT)

    def path(self, path: str) -> str:
        """A path from its command line as seen from outside its working directory."""
        return os.path.join(self.working_directory, path)


def started_at(identity: Identity) -> float:
    """When a process was started, in seconds since 1970."""
    since_boot = identity.start_time / os.sysconf("SC_CLK_TCK")
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + since_boot


def identify(pid: int) -> Identity | None:
    """The process that has this pid now, or None."""
    state = _state(pid)
    return Identity(pid, state[0]) if state and state[1] not in "ZX" else None


def read(pid: int) -> QemuProcess:
    """Look at one process.

    :raises ProcessLookupError, FileNotFoundError: it is gone.
    :raises PermissionError: it belongs to another user.
    """
    identity = identify(pid)
    if identity is None:
        raise ProcessLookupError(pid)
    link = os.readlink(f"{PROC}/{pid}/exe")
    status = os.stat(f"{PROC}/{pid}/exe")
    executable = link[: -len(_DELETED)] if link.endswith(_DELETED) else link
    on_disk = "same"
    try:
        if not os.path.samestat(os.stat(executable), status):
            on_disk = "replaced"
    except OSError:
        on_disk = "deleted"
    words = read_file(pid, "cmdline").split("\0")[:-1]
    return QemuProcess(
        identity=identity,
        arguments=tuple(words[1:]),
        executable=executable,
        executable_id=(status.st_dev, status.st_ino),
        on_disk=on_disk,
        working_directory=_working_directory(pid, words),
    )


def _working_directory(pid: int, words: t.Sequence[str]) -> str:
    """The directory to which the relative paths of a command line belong."""
    present = os.readlink(f"{PROC}/{pid}/cwd")
    if {"-daemonize", "--daemonize"}.intersection(words):  # QEMU goes to / then (os-posix.c)
        started = dict(word.partition("=")[::2] for word in read_file(pid, "environ").split("\0")).get("PWD")
        return started or present
    return present


def find() -> list[QemuProcess]:
    """Every QEMU system emulator that runs on this host, by pid.

    A process that belongs to another user and can't be looked at is passed over, and so is
    one that runs no machine (``-machine none``: somebody asks the binary what it can do).
    """
    found = []
    for pid in sorted(int(name) for name in os.listdir(PROC) if name.isdigit()):
        try:
            name = os.path.basename(os.readlink(f"{PROC}/{pid}/exe"))
            if _QEMU.search(name):
                process = read(pid)
                if process.arguments and not _runs_no_machine(process):
                    found.append(process)
        except OSError:
            continue  # it ended, or it is not ours to look at
    return found


def _runs_no_machine(process: QemuProcess) -> bool:
    try:
        machine = command_line.machine_properties(process.options).get("type")
    except CprError:
        return False
    return machine == "none"


def parent(pid: int) -> int:
    """The process that is told when this one ends.

    :raises OSError: it is gone.
    """
    return int(read_file(pid, "stat").rpartition(")")[2].split()[1])


def ancestors(pid: int) -> t.Iterator[int]:
    """The processes that a process comes from, but for the first process of all.

    :raises OSError: one is gone.
    """
    while (pid := parent(pid)) > 1:
        yield pid


def descriptors(pid: int) -> dict[int, str]:
    """What a process has open, by its descriptors.

    :raises OSError: it is gone, or it belongs to another user.
    """
    found = {}
    for number in map(int, os.listdir(f"{PROC}/{pid}/fd")):
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            found[number] = os.readlink(f"{PROC}/{pid}/fd/{number}")
    return found


def open_files(pid: int) -> set[tuple[int, int] | None]:
    """Device and inode of all that a process has open, also of what has another name or none by now.

    :raises OSError: as `descriptors`.
    """
    return {file_id(f"{PROC}/{pid}/fd/{number}") for number in descriptors(pid)}


def boot_id() -> str:
    """What is another one after each boot of the host: a pid with its start time means nothing beyond."""
    with open(f"{PROC}/sys/kernel/random/boot_id", encoding="ascii") as stream:
        return stream.read().strip()


def flags_of(pid: int, number: int) -> int:
    """How a process has opened a descriptor: the flags of open(2).

    :raises OSError: it is gone, or it belongs to another user.
    """
    lines = read_file(pid, f"fdinfo/{number}").splitlines()
    return next((int(line.split()[1], 8) for line in lines if line.startswith("flags:")), 0)


def kept_by_exec(pid: int) -> dict[int, str]:
    """What of a process's descriptors stays open when it becomes another program, but for the first three.

    :raises OSError: it is gone, or it belongs to another user.
    """
    found = {}
    for number, target in descriptors(pid).items():
        with contextlib.suppress(FileNotFoundError):
            if number > 2 and not flags_of(pid, number) & os.O_CLOEXEC:
                found[number] = target
    return found


def file_id(path: str) -> tuple[int, int] | None:
    """Device and inode of the file at a path, or None without one."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


class Watch:
    """Notices the end of a process at once, by a pidfd.

    Usable for processes that are nobody's children. A process that is gone already counts as
    ended.
    """

    def __init__(self, identity: Identity) -> None:
        self.identity = identity
        self.ended: asyncio.Event = asyncio.Event()
        self._descriptor: int | None = None
        if identity.pid > 0:
            with contextlib.suppress(ProcessLookupError):
                self._descriptor = os.pidfd_open(identity.pid)
        if self._descriptor is None or not identity.is_alive():
            self.close()
            self.ended.set()
        else:
            asyncio.get_running_loop().add_reader(self._descriptor, self._on_end)

    def _on_end(self) -> None:
        self.close()
        self.ended.set()

    def close(self) -> None:
        """Stop watching."""
        if self._descriptor is not None:
            asyncio.get_running_loop().remove_reader(self._descriptor)
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *dummy: object) -> None:
        self.close()

    async def wait(self, timeout: float) -> bool:
        """Whether the process ended within so many seconds."""
        try:
            await asyncio.wait_for(self.ended.wait(), timeout)
        except asyncio.TimeoutError:
            return False
        return True

    def send(self, number: signal.Signals) -> None:
        """Send the process a signal, by the descriptor and not by the pid: that can't hit anybody else."""
        if self._descriptor is not None and not self.ended.is_set():
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._descriptor, number)

    async def kill(self, timeout: float = 10) -> None:
        """Kill the process and see it dead.

        :raises CprError: ``process-not-dying`` if it still is there after so many seconds.
        """
        self.send(signal.SIGKILL)
        if not await self.wait(timeout):
            raise CprError(
                "process-not-dying",
                f"The QEMU process {self.identity.pid} was killed and is still there after {timeout:g} s.",
                "It hangs in the kernel, most likely on storage; `cat /proc/PID/stack` says where."
                " Do not continue the guest elsewhere before it is gone.",
            )


def _state(pid: int) -> tuple[int, str] | None:
    """Start time of the process with this pid and the letter of its state, or None without one."""
    try:
        text = read_file(pid, "stat")
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()  # the name before it may hold anything
    return int(fields[19]), fields[0]


def end_with_parent() -> None:
    """Let the kernel kill this process when the thread that forked it ends; one that changes its user forgets it."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def read_file(pid: int | str, name: str) -> str:
    """A file of a process's directory in ``/proc``."""
    with open(f"{PROC}/{pid}/{name}", encoding="utf-8", errors="surrogateescape") as stream:
        return stream.read()
