# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""QEMU processes as ``/proc`` shows them: who runs, what surrounds it, has it ended.

Private to the collection.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import resource
import signal
import typing as t
from dataclasses import dataclass

from ansible_collections.vmfleet.cpr.plugins.module_utils import command_line
from ansible_collections.vmfleet.cpr.plugins.module_utils.errors import CprError

PROC = "/proc"
# Distributions and people decorate the name: qemu-system-x86_64-11.1, .qemu-kvm-wrapped.
_QEMU = re.compile(r"qemu-system-|qemu-kvm")
_DELETED = " (deleted)"
# Seconds that systemd gets to answer.
_SYSTEMD_TIMEOUT = 10.0

# The rows of /proc/PID/limits, by what the kernel calls them (fs/proc/base.c).
_LIMITS = {
    "Max cpu time": resource.RLIMIT_CPU,
    "Max file size": resource.RLIMIT_FSIZE,
    "Max data size": resource.RLIMIT_DATA,
    "Max stack size": resource.RLIMIT_STACK,
    "Max core file size": resource.RLIMIT_CORE,
    "Max processes": resource.RLIMIT_NPROC,
    "Max open files": resource.RLIMIT_NOFILE,
    "Max locked memory": resource.RLIMIT_MEMLOCK,
    "Max address space": resource.RLIMIT_AS,
    "Max pending signals": resource.RLIMIT_SIGPENDING,
    "Max msgqueue size": resource.RLIMIT_MSGQUEUE,
    "Max nice priority": resource.RLIMIT_NICE,
    "Max realtime priority": resource.RLIMIT_RTPRIO,
    "Max realtime timeout": resource.RLIMIT_RTTIME,
}


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
        """The command line, read.

        :raises CprError: as `command_line.parse`.
        """
        return command_line.parse(self.arguments)

    def path(self, path: str) -> str:
        """A path from its command line as seen from outside its working directory."""
        return os.path.join(self.working_directory, path)


@dataclass(frozen=True)
class Surroundings:
    """What a process inherits and a new QEMU for the same guest must get alike.

    :ivar groups: the supplementary groups.
    :ivar limits: pairs of soft and hard limit by ``resource.RLIMIT_*``.
    :ivar cgroups: for each cgroup hierarchy the ``cgroup.procs`` file that puts a process there.
    """

    working_directory: str
    environment: dict[str, str]
    user: int
    group: int
    groups: tuple[int, ...]
    umask: int
    nice: int
    out_of_memory_score: int
    limits: dict[int, tuple[int, int]]
    cgroups: tuple[str, ...]


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
    words = _read(pid, "cmdline").split("\0")[:-1]
    return QemuProcess(
        identity=identity,
        arguments=tuple(words[1:]),
        executable=executable,
        executable_id=(status.st_dev, status.st_ino),
        on_disk=on_disk,
        working_directory=os.readlink(f"{PROC}/{pid}/cwd"),
    )


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


def surroundings(pid: int) -> Surroundings:
    """What surrounds a running process.

    :raises OSError: it is gone, or it belongs to another user.
    """
    status = dict(line.split(":\t", 1) for line in _read(pid, "status").splitlines() if ":\t" in line)
    environment = dict(word.split("=", 1) for word in _read(pid, "environ").split("\0") if "=" in word)
    return Surroundings(
        working_directory=os.readlink(f"{PROC}/{pid}/cwd"),
        environment=environment,
        user=int(status["Uid"].split()[1]),
        group=int(status["Gid"].split()[1]),
        groups=tuple(int(word) for word in status["Groups"].split()),
        umask=int(status["Umask"], 8),
        nice=os.getpriority(os.PRIO_PROCESS, pid),
        out_of_memory_score=int(_read(pid, "oom_score_adj")),
        limits=parse_limits(_read(pid, "limits")),
        cgroups=tuple(_cgroup_files(_read(pid, "cgroup"), _read("self", "cgroup"), _read("self", "mountinfo"))),
    )


def parse_limits(text: str) -> dict[int, tuple[int, int]]:
    """``/proc/PID/limits`` as pairs of soft and hard limit by ``resource.RLIMIT_*``."""
    limits = {}
    for line in text.splitlines():
        for title, number in _LIMITS.items():
            if line.startswith(title + " "):
                soft, hard = (
                    resource.RLIM_INFINITY if word == "unlimited" else int(word)
                    for word in line[len(title) :].split()[:2]
                )
                limits[number] = (soft, hard)
    return limits


def _cgroup_files(theirs: str, ours: str, mounts: str) -> t.Iterator[str]:
    """The ``cgroup.procs`` files of the hierarchies in which a process isn't where we are.

    :param theirs: its ``/proc/PID/cgroup``.
    :param ours: our own.
    :param mounts: our ``/proc/self/mountinfo``, which says where each hierarchy is mounted.
    """
    for line in set(theirs.splitlines()) - set(ours.splitlines()):
        dummy, controllers, path = line.split(":", 2)
        for mount in mounts.splitlines():
            left, dummy, right = mount.partition(" - ")
            root, point = left.split()[3:5]
            kind, dummy, options = right.split()[:3]
            is_this = (
                kind == "cgroup2"
                if not controllers
                else (kind == "cgroup" and set(controllers.split(",")) <= set(options.split(",")))
            )
            if is_this and (path + "/").startswith(root.rstrip("/") + "/"):
                yield os.path.join(point, path[len(root.rstrip("/")) :].lstrip("/"), "cgroup.procs")
                break


def systemd_unit(cgroup: str) -> str | None:
    """The service unit in whose cgroup, or below it, a process is; None without one.

    A service of a user's own manager is given with that manager before it.

    :param cgroup: its ``/proc/PID/cgroup``.
    """
    for line in cgroup.splitlines():
        if line.startswith("0::") or ":name=systemd:" in line:
            services = [name for name in line.split("/") if name.endswith(".service")]
            if services and not services[-1].startswith("user@"):
                return "/".join(services[-2:]) if services[0].startswith("user@") else services[-1]
    return None


async def is_owned_by_unit(pid: int) -> str | None:
    """The systemd service whose main or control process this is or comes from, or None.

    :raises CprError: ``systemd-silent`` if systemd doesn't answer.
    """
    unit = systemd_unit(_read(pid, "cgroup"))
    if unit is None or not os.path.isdir("/run/systemd/system"):
        return None
    if "/" in unit:
        return unit  # of a user's own manager, which can't be asked from here
    command = ["systemctl", "show", "--property=MainPID,ControlPID", "--value", unit]
    child = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    try:
        answer, dummy = await asyncio.wait_for(child.communicate(), _SYSTEMD_TIMEOUT)
    except asyncio.TimeoutError:
        child.kill()
        raise CprError(
            "systemd-silent",
            f"systemd did not say within {_SYSTEMD_TIMEOUT:g} s what the unit {unit} consists of.",
            "See whether `systemctl status` works on this host.",
        ) from None
    return unit if set(answer.decode().split()).intersection(map(str, _lineage(pid))) else None


def _lineage(pid: int) -> t.Iterator[int]:
    """A process and all that it comes from, but for the first process of all."""
    while pid > 1:
        yield pid
        pid = int(_read(pid, "stat").rpartition(")")[2].split()[1])


class Watch:
    """Notices the end of a process at once, by a pidfd.

    Usable for processes that are nobody's children. A process that is gone already counts as
    ended.
    """

    def __init__(self, identity: Identity) -> None:
        self.identity = identity
        self.ended: asyncio.Event = asyncio.Event()
        self._descriptor: int | None = None
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
        text = _read(pid, "stat")
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()  # the name before it may hold anything
    return int(fields[19]), fields[0]


def _read(pid: int | str, name: str) -> str:
    with open(f"{PROC}/{pid}/{name}", encoding="utf-8", errors="surrogateescape") as stream:
        return stream.read()
