# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Whether a host has room for a second QEMU beside a guest's, and would start it right.

The guest's RAM is shared by both and counts once. Private to the collection.
"""

from __future__ import annotations

import os
import typing as t

from ansible_collections.vmfleet.cpr.plugins.module_utils import process
from ansible_collections.vmfleet.cpr.plugins.module_utils.errors import CprError

_CGROUPS = "/sys/fs/cgroup"
# Bytes that shall be left besides.
_MEMORY_MARGIN = 32 << 20
_DISK_MARGIN = 64 << 10


def blockers(pid: int, state_directory: str) -> list[CprError]:
    """What of memory and disk is too little for a second QEMU like this process."""
    found = []
    needed = _field(process.read_file(pid, "status"), "RssAnon") + _MEMORY_MARGIN
    for where, left in _memory_left(pid):
        if left < needed:
            found.append(
                CprError(
                    "memory-short",
                    f"The new QEMU needs some {needed >> 20} MiB beside the guest's shared RAM, and {where} has"
                    f" {max(0, left) >> 20} MiB left.",
                    "Make room, or raise the limit: the kernel might end the guest's QEMU for it.",
                )
            )
    state_directory = os.path.abspath(state_directory)
    while not os.path.exists(state_directory):
        state_directory = os.path.dirname(state_directory)
    disk = os.statvfs(state_directory)
    if disk.f_bavail * disk.f_frsize < _DISK_MARGIN:
        found.append(
            CprError(
                "disk-short",
                f"The file system of {state_directory} has less than {_DISK_MARGIN >> 10} KiB left.",
                "Make room there, or choose another state_directory.",
            )
        )
    return found


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


def _memory_left(pid: int) -> t.Iterator[tuple[str, int]]:
    """The host, and every cgroup above the process that has a limit, with the bytes that they have left."""
    with open(f"{process.PROC}/meminfo", encoding="ascii") as stream:
        yield "the host", _field(stream.read(), "MemAvailable")
    for line in process.read_file(pid, "cgroup").splitlines():
        number, dummy, path = line.split(":", 2)
        while number == "0" and path.strip("/"):
            try:
                limit, used, stat = (_read(path, name) for name in ("memory.max", "memory.current", "memory.stat"))
            except OSError:
                break  # no such controller, or another mount of it
            if limit.strip() != "max":
                droppable = sum(
                    int(item.split()[1])
                    for item in stat.splitlines()
                    if item.startswith(("inactive_file ", "active_file ", "slab_reclaimable "))
                )
                yield f"the cgroup {path}", int(limit) - int(used) + droppable
            path = os.path.dirname(path)


def _read(path: str, name: str) -> str:
    with open(f"{_CGROUPS}{path}/{name}", encoding="ascii") as stream:
        return stream.read()


def _field(text: str, name: str) -> int:
    """A field of a table of the kernel that counts in kB, in bytes; 0 of a process that ends just now."""
    return next((int(line.split()[1]) << 10 for line in text.splitlines() if line.startswith(f"{name}:")), 0)
