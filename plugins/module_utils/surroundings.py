# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What surrounds a process: its user, limits, cgroup, namespaces, processors.

Private to the collection.
"""

from __future__ import annotations

import ctypes
import dataclasses
import os
import resource
import typing as t

from ansible_collections.vmfleet.cpr.plugins.module_utils import namespaces, process

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


# In this order: a mount namespace is entered last, paths mean something else in it.
_NAMESPACES = ("uts", "ipc", "net", "mnt")
# include/uapi/linux/mempolicy.h
_MEMORY_POLICIES = {
    "default": 0, "prefer": 1, "bind": 2, "interleave": 3, "local": 4, "prefer (many)": 5, "weighted interleave": 6,
}  # fmt: skip
_MEMORY_POLICY_FLAGS = {"static": 1 << 15, "relative": 1 << 14, "balancing": 1 << 13}
_NUMA_MAPS_PART = 64
_SYS_SET_MEMPOLICY = {"x86_64": 238, "aarch64": 237}

_libc = ctypes.CDLL(None, use_errno=True)


@dataclasses.dataclass(frozen=True)
class Surroundings:
    """What a process inherits and a new QEMU for the same guest must get alike.

    :ivar groups: the supplementary groups.
    :ivar limits: pairs of soft and hard limit by ``resource.RLIMIT_*``.
    :ivar cgroups: for each cgroup hierarchy the ``cgroup.procs`` file that puts a process there.
    :ivar namespaces: the files of the namespaces that it is in and we are not.
    :ivar scheduling: policy and priority (sched(7)).
    :ivar processors: the host's processors that it may run on.
    :ivar memory_policy: its NUMA policy, as in ``/proc/PID/numa_maps``.
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
    namespaces: tuple[str, ...]
    scheduling: tuple[int, int]
    processors: frozenset[int]
    memory_policy: str

    def as_root(self) -> Surroundings:
        """The same for a process that begins as root and gives that up by itself."""
        return dataclasses.replace(self, user=0, group=0, groups=(0,))

    def enter(self) -> None:
        """Be surrounded by this; for a child that is about to become something else.

        :raises OSError: the kernel does not permit it.
        :raises ValueError: a limit of ours is lower than one of these.
        """
        # All but the last lines needs the privileges that those give up.
        os.setsid()
        for path in self.cgroups:
            with open(path, "w", encoding="ascii") as stream:
                stream.write("0")
        for number, pair in self.limits.items():
            resource.setrlimit(number, pair)
        os.setpriority(os.PRIO_PROCESS, 0, self.nice)
        policy, priority = self.scheduling
        if (policy, priority) != (os.sched_getscheduler(0), os.sched_getparam(0).sched_priority):
            os.sched_setscheduler(0, policy, os.sched_param(priority))
        os.sched_setaffinity(0, self.processors)
        if self.memory_policy != "default":
            _set_memory_policy(self.memory_policy)
        with open(f"{process.PROC}/self/oom_score_adj", "w", encoding="ascii") as stream:
            stream.write(str(self.out_of_memory_score))
        os.umask(self.umask)
        for path in self.namespaces:
            namespaces.enter(path)
        os.chdir(self.working_directory)
        if os.geteuid() == 0:
            self.become_user()

    def become_user(self) -> None:
        """Give up root for this user and these groups."""
        os.setgroups(self.groups)
        os.setresgid(self.group, self.group, self.group)
        os.setresuid(self.user, self.user, self.user)


def read(pid: int) -> Surroundings:
    """What surrounds a running process.

    :raises OSError: it is gone, or it belongs to another user.
    """
    status = dict(line.split(":\t", 1) for line in process.read_file(pid, "status").splitlines() if ":\t" in line)
    environment = dict(word.split("=", 1) for word in process.read_file(pid, "environ").split("\0") if "=" in word)
    # Of a QEMU that came by cpr-exec: another one would wait for the CPR state in this descriptor (QEMU 11.1).
    environment.pop("QEMU_CPR_EXEC_STATE", None)
    return Surroundings(
        working_directory=os.readlink(f"{process.PROC}/{pid}/cwd"),
        environment=environment,
        user=int(status["Uid"].split()[1]),
        group=int(status["Gid"].split()[1]),
        groups=tuple(int(word) for word in status["Groups"].split()),
        umask=int(status["Umask"], 8),
        nice=os.getpriority(os.PRIO_PROCESS, pid),
        out_of_memory_score=int(process.read_file(pid, "oom_score_adj")),
        limits=parse_limits(process.read_file(pid, "limits")),
        cgroups=tuple(
            _cgroup_files(
                process.read_file(pid, "cgroup"),
                process.read_file("self", "cgroup"),
                process.read_file("self", "mountinfo"),
            )
        ),
        namespaces=tuple(f"{process.PROC}/{pid}/ns/{name}" for name in _NAMESPACES if not namespaces.shares(pid, name)),
        scheduling=(os.sched_getscheduler(pid), os.sched_getparam(pid).sched_priority),
        processors=frozenset(os.sched_getaffinity(pid)),
        memory_policy=_memory_policy(pid),
    )


def as_dict(around: Surroundings) -> dict[str, t.Any]:
    """What JSON can hold of it, for a process that is started after this one has ended."""
    return {**dataclasses.asdict(around), "processors": sorted(around.processors), "namespaces": ()}


def from_dict(data: t.Mapping[str, t.Any]) -> Surroundings:
    """What `as_dict` kept, as far as this host still has it: its cgroup may be gone, or some processors."""
    there = os.sched_getaffinity(0)
    return Surroundings(
        **{
            **data,
            "groups": tuple(data["groups"]),
            "limits": {int(number): tuple(pair) for number, pair in data["limits"].items()},
            "cgroups": tuple(path for path in data["cgroups"] if os.path.exists(path)),
            "namespaces": (),
            "scheduling": tuple(data["scheduling"]),
            "processors": frozenset(data["processors"]) & there or frozenset(there),
        }
    )


def can_open(path: str, flags: int, around: Surroundings, root: str = "/") -> bool:
    """Whether a process with this user and these groups can open a file.

    :param path: absolute, as seen below ``root``.
    """
    directory = os.open(root, os.O_PATH | os.O_CLOEXEC)
    child = os.fork()
    if child == 0:
        try:
            if os.geteuid() == 0:
                around.become_user()
            os.open(path.lstrip("/"), flags | os.O_NONBLOCK, dir_fd=directory)
            os._exit(0)
        finally:
            os._exit(1)
    os.close(directory)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def place_like(thread: int, other: int) -> None:
    """Schedule a thread like another one, on the same of the host's processors.

    :raises OSError: one of them is gone, or belongs to another user.
    """
    os.sched_setaffinity(thread, os.sched_getaffinity(other))
    policy, priority = os.sched_getscheduler(other), os.sched_getparam(other).sched_priority
    if (policy, priority) != (os.sched_getscheduler(thread), os.sched_getparam(thread).sched_priority):
        os.sched_setscheduler(thread, policy, os.sched_param(priority))
    os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, other))


def _memory_policy(pid: int) -> str:
    """A process's own NUMA policy, as the kernel prints it for memory that has none of its own (its heap)."""
    text = ""
    try:
        # A line at a time: for each the kernel counts its pages, and those of the guest's RAM come after the heap.
        with open(f"{process.PROC}/{pid}/numa_maps", "rb", buffering=0) as stream:
            while " heap" not in text:
                part = stream.read(_NUMA_MAPS_PART).decode()
                if not part:
                    return "default"
                text = text.rpartition("\n")[2] + part
    except OSError:  # a kernel without NUMA
        return "default"
    line = next(line for line in text.splitlines() if " heap" in line)
    return line.partition(" heap")[0].partition(" ")[2]


def bound_nodes(pid: int) -> tuple[int, ...]:
    """The NUMA nodes that a process's memory must come from by its policy (numactl --membind); none where it need not."""
    text = _memory_policy(pid)
    if not text.startswith("bind"):
        return ()
    mask = parse_memory_policy(text)[1]
    return tuple(node for node in range(mask.bit_length()) if mask >> node & 1)


def parse_memory_policy(text: str) -> tuple[int, int]:
    """Mode and mask of nodes for set_mempolicy(2), from the kernel's words (mm/mempolicy.c, mpol_to_str).

    :raises ValueError: for one that is not known.
    """
    name, dummy, rest = text.partition(":")
    name, dummy, flags = name.partition("=")
    if name not in _MEMORY_POLICIES:
        raise ValueError(f"the memory policy {text} is not known")
    mode = _MEMORY_POLICIES[name]
    for flag in filter(None, flags.split("|")):
        mode |= _MEMORY_POLICY_FLAGS[flag]
    mask = 0
    for part in filter(None, rest.split(",")):
        first, dummy, last = part.partition("-")
        for node in range(int(first), int(last or first) + 1):
            mask |= 1 << node
    return mode, mask


def _set_memory_policy(text: str) -> None:
    mode, mask = parse_memory_policy(text)
    number = _SYS_SET_MEMPOLICY.get(os.uname().machine)
    if number is None:
        raise ValueError(f"the memory policy {text} can't be set on {os.uname().machine}")
    words = max(1, -(-mask.bit_length() // 64))
    nodes = (ctypes.c_ulong * words)(*(mask >> 64 * index & (1 << 64) - 1 for index in range(words)))
    # The kernel counts the bits one too low (get_nodes in mm/mempolicy.c).
    if _libc.syscall(number, mode, nodes, ctypes.c_ulong(64 * words + 1)):
        raise OSError(ctypes.get_errno(), f"memory policy {text}: {os.strerror(ctypes.get_errno())}")


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
