# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Takes a guest's images out of the host's page cache while the guest runs, so that no QEMU does it in the pause.

The old QEMU flushes all images when it stops the guest (do_vm_stop in system/cpus.c), and the new one drops what is
cached of them before the guest goes on (raw_co_invalidate_cache in block/file-posix.c). With ``cache=writeback``,
which is the default, both may be gigabytes. Private to the collection.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import stat
import threading
import time
import typing as t

from ansible_collections.vmfleet.cpr.plugins.module_utils import commands, process
from ansible_collections.vmfleet.cpr.plugins.module_utils.errors import CprError

# Seconds. What was written meanwhile is no more than what takes about as long.
_LITTLE = 0.05
_PASSES = 3
# An image that QEMU is not to drop, in both syntaxes.
_KEEPS_CACHE = re.compile(r'drop-cache"?\s*[=:]\s*(off|no|false)')


async def release(pid: int, timeout: float) -> None:
    """Write a QEMU's images out, until little is left of what its guest has written meanwhile, and drop them.

    What can't be done in time, or at all, is left to the QEMUs.

    :param timeout: seconds.
    """
    deadline = time.monotonic() + timeout
    with contextlib.suppress(OSError):  # it is gone
        found = _open_files(pid)
        written = [path for path, flags in found.items() if flags & os.O_ACCMODE != os.O_RDONLY]
        for dummy in range(_PASSES if written else 0):
            started = time.monotonic()
            with contextlib.suppress(CprError):  # one that can't be written out is no reason against the others
                await commands.run("sync", "-d", *written, timeout=max(deadline - started, 0))
            if time.monotonic() - started < _LITTLE:
                break
        if not _KEEPS_CACHE.search(process.read_file(pid, "cmdline")) and time.monotonic() < deadline:
            await _in_a_thread(lambda: _drop(found), deadline - time.monotonic())


async def _in_a_thread(work: t.Callable[[], None], timeout: float) -> None:
    """Wait for what may block, but not for ever: nobody waits for the thread at the end."""
    loop = asyncio.get_running_loop()
    done = asyncio.Event()

    def run() -> None:
        work()
        with contextlib.suppress(RuntimeError):  # nobody waits any more
            loop.call_soon_threadsafe(done.set)

    threading.Thread(target=run, daemon=True).start()
    with contextlib.suppress(asyncio.TimeoutError):
        await asyncio.wait_for(done.wait(), timeout)


def _open_files(pid: int) -> dict[str, int]:
    """The files and block devices that a process has open, and how; not those that it has mapped: the guest's RAM.

    :raises OSError: it is gone, or it belongs to another user.
    """
    lines = [line.split(maxsplit=5) for line in process.read_file(pid, "maps").splitlines()]
    mapped = {fields[5] for fields in lines if len(fields) == 6}
    found = {}
    for number, target in process.descriptors(pid).items():
        path = f"{process.PROC}/{pid}/fd/{number}"
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            mode = os.stat(path).st_mode
            if (stat.S_ISREG(mode) or stat.S_ISBLK(mode)) and target not in mapped:
                found[path] = process.flags_of(pid, number)
    return found


def _drop(paths: t.Iterable[str]) -> None:
    for path in paths:
        with contextlib.suppress(OSError):
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            try:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)
