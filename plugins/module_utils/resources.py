# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Whether a host has room for a second QEMU beside a guest's, and would start it right.

RAM that both share counts once. Private to the collection.
"""

from __future__ import annotations

import collections
import os
import typing as t

from ansible_collections.vmfleet.cpr.plugins.module_utils import process, surroundings
from ansible_collections.vmfleet.cpr.plugins.module_utils.errors import CprError
from ansible_collections.vmfleet.cpr.plugins.module_utils.memory import ORDINARY_PAGE, Block

_CGROUPS = "/sys/fs/cgroup"
_NODES = "/sys/devices/system/node"
_HUGE_PAGES = "/sys/kernel/mm/hugepages"
# Bytes that shall be left besides.
_MEMORY_MARGIN = 32 << 20
_DISK_MARGIN = 64 << 10


class Pool(t.NamedTuple):
    """Where memory comes from.

    :ivar cgroup: that has a limit, or empty.
    :ivar nodes: NUMA nodes that it must come from; all if empty.
    :ivar page_size: bytes.
    """

    cgroup: str = ""
    nodes: tuple[int, ...] = ()
    page_size: int = ORDINARY_PAGE

    def __str__(self) -> str:
        """As it stands in a sentence."""
        where = f"NUMA node {', '.join(map(str, self.nodes))}" if self.nodes else "the host"
        if self.page_size != ORDINARY_PAGE:
            return f"the pool of {self.page_size >> 10} KiB pages of {where}"
        return f"the cgroup {self.cgroup}" if self.cgroup else where

    def left(self) -> int | None:
        """How many bytes it has left; None where nothing limits it."""
        if self.page_size != ORDINARY_PAGE:
            return self._pages_left()
        if self.cgroup:
            return _left_in_cgroup(self.cgroup)
        if not self.nodes:
            return _field(_read(f"{process.PROC}/meminfo"), "MemAvailable")
        reclaimable = ("MemFree", "Active(file)", "Inactive(file)", "SReclaimable")
        tables = [_read(f"{_NODES}/node{node}/meminfo") for node in self.nodes]
        return sum(_field(table, name) for table in tables for name in reclaimable)

    def _pages_left(self) -> int:
        name = f"hugepages-{self.page_size >> 10}kB"
        if self.nodes:
            free = sum(int(_read(f"{_NODES}/node{node}/hugepages/{name}/free_hugepages")) for node in self.nodes)
        else:
            free = int(_read(f"{_HUGE_PAGES}/{name}/free_hugepages"))
        # What others were promised and have not touched yet counts as free there.
        return max(0, free - int(_read(f"{_HUGE_PAGES}/{name}/resv_hugepages"))) * self.page_size


Demand = t.Mapping[Pool, int]


def demand(pid: int, running: t.Iterable[Block], own: t.Iterable[Block] = ()) -> dict[Pool, int]:
    """How many bytes of what a second QEMU like this process takes.

    :param running: the RAM of the guest that it runs.
    :param own: the RAM that the second one has of its own.
    """
    needed: dict[Pool, int] = collections.defaultdict(int)
    # Of a guest whose RAM is private it is counted there.
    private = sum(block.size for block in running if not block.shared and block.page_size == ORDINARY_PAGE)
    anonymous = _field(process.read_file(pid, "status"), "RssAnon")
    everywhere = max(0, anonymous - private) + _MEMORY_MARGIN
    elsewhere = 0
    for block in own:
        if block.page_size == ORDINARY_PAGE:
            everywhere += block.size
        else:
            needed[Pool(page_size=block.page_size)] += block.size
        if block.nodes:
            elsewhere += block.size if block.page_size == ORDINARY_PAGE else 0
            needed[Pool(nodes=block.nodes, page_size=block.page_size)] += block.size
    for pool in (Pool(), *_cgroups(pid)):
        needed[pool] += everywhere
    # The second one is bound like the first: by its policy what has none of its own, by its cpuset all.
    bound, allowed = Pool(nodes=surroundings.bound_nodes(pid)), Pool(nodes=_cpuset_nodes(pid))
    if bound.nodes:
        needed[bound] += everywhere - elsewhere
    if allowed.nodes:
        needed[allowed] = max(needed[allowed], everywhere)
    return dict(needed)


class Room:
    """What the host has left for several QEMUs that are about to be started."""

    def __init__(self) -> None:
        self._taken: dict[Pool, int] = collections.defaultdict(int)

    def short(self, needed: Demand) -> tuple[Pool, int, int] | None:
        """The first pool that has too little, with what is needed of it and left in it; None if all have enough."""
        for pool, size in needed.items():
            left = pool.left()
            if left is not None and left - self._taken[pool] < size:
                return pool, size, max(0, left - self._taken[pool])
        return None

    def take(self, needed: Demand) -> None:
        """Keep this much from those who ask later."""
        for pool, size in needed.items():
            self._taken[pool] += size


def memory_blockers(needed: Demand) -> list[CprError]:
    """What of the host's memory is too little."""
    short = Room().short(needed)
    if short is None:
        return []
    pool, size, left = short
    return [
        CprError(
            "memory-short",
            f"The new QEMU needs {size >> 20} MiB of its own beside the running one, and {pool} has {left >> 20} MiB left.",
            "Make room, or raise the limit: the kernel might end the guest's QEMU for it.",
        )
    ]


def disk_blockers(directory: str, size: int = 0) -> list[CprError]:
    """What of the disk is too little.

    :param size: bytes that are to be written there.
    """
    directory = os.path.abspath(directory)
    while not os.path.exists(directory):
        directory = os.path.dirname(directory)
    disk = os.statvfs(directory)
    left = disk.f_bavail * disk.f_frsize
    if left >= size + _DISK_MARGIN:
        return []
    return [
        CprError(
            "disk-short",
            f"The file system of {directory} has {left >> 10} KiB left, and {(size + _DISK_MARGIN) >> 10} KiB are needed.",
            "Make room there, or choose another directory.",
        )
    ]


def file_system(path: str) -> str:
    """The kind of the file system that a file is on (``ext4``, ``tmpfs``)."""
    path = os.path.realpath(path)
    found = ("", "")
    for line in process.read_file("self", "mountinfo").splitlines():
        words = line.split()
        place = words[4].encode().decode("unicode_escape")  # a space is \040
        if path == place or path.startswith(place.rstrip("/") + "/"):
            found = max(found, (place, words[words.index("-") + 1]), key=lambda item: len(item[0]))
    return found[1]


def warnings(pid: int) -> list[CprError]:
    """What in a QEMU's environment would mislead a new one."""
    directory = next(
        (word[len("QEMU_MODULE_DIR=") :] for word in process.read_file(pid, "environ").split("\0")
         if word.startswith("QEMU_MODULE_DIR=")), None,
    )  # fmt: skip
    if not directory:
        return []
    return [
        CprError(
            "module-directory",
            f"The guest's environment has QEMU_MODULE_DIR={directory}, where the new QEMU will look for modules too;"
            " only those of its own build load.",
            "See that the new build's modules are there, or start the guest without it when it next starts.",
        )
    ]


def _cgroups(pid: int) -> t.Iterator[Pool]:
    """The cgroup of a process, and all above it."""
    for line in process.read_file(pid, "cgroup").splitlines():
        number, dummy, path = line.split(":", 2)
        while number == "0" and path.strip("/"):
            yield Pool(cgroup=path)
            path = os.path.dirname(path)


def _cpuset_nodes(pid: int) -> tuple[int, ...]:
    """The NUMA nodes that a process may have memory from, or none if it may from all."""
    lines = [line.split() for line in process.read_file(pid, "status").splitlines()]
    allowed = next((words[1] for words in lines if words[:1] == ["Mems_allowed_list:"]), "")
    ranges = [part.partition("-") for part in allowed.split(",") if part]
    nodes = tuple(node for first, dummy, last in ranges for node in range(int(first), int(last or first) + 1))
    there = [name for name in os.listdir(_NODES) if name[4:].isdigit()] if os.path.isdir(_NODES) else []
    return nodes if len(nodes) < len(there) else ()


def _left_in_cgroup(path: str) -> int | None:
    try:
        limit, used, stat = (
            _read(f"{_CGROUPS}{path}/{name}") for name in ("memory.max", "memory.current", "memory.stat")
        )
    except OSError:
        return None  # no such controller, or another mount of it
    if limit.strip() == "max":
        return None
    droppable = ("inactive_file ", "active_file ", "slab_reclaimable ")
    return (
        int(limit) - int(used) + sum(int(line.split()[1]) for line in stat.splitlines() if line.startswith(droppable))
    )


def _read(path: str) -> str:
    with open(path, encoding="ascii") as stream:
        return stream.read()


def _field(text: str, name: str) -> int:
    """A field of a table of the kernel that counts in kB, in bytes; 0 of a process that ends just now."""
    for line in text.splitlines():
        head, dummy, rest = line.partition(":")
        if head.split()[-1:] == [name]:  # those of a NUMA node have "Node 0" before it
            return int(rest.split()[0]) << 10
    return 0
