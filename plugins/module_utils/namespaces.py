# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The kernel's namespaces in which a process is (namespaces(7)).

Private to the collection.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import typing as t

from ansible_collections.vmfleet.cpr.plugins.module_utils.process import PROC

_libc = ctypes.CDLL(None, use_errno=True)


def shares(pid: int, name: str) -> bool:
    """Whether a process is in our own namespace of this name (``net``, ``mnt``, ``pid`` …).

    :raises OSError: it is gone, or it belongs to another user.
    """
    return os.readlink(f"{PROC}/{pid}/ns/{name}") == os.readlink(f"{PROC}/self/ns/{name}")


def enter(path: str) -> None:
    """Put this thread into the namespace that a file of ``/proc/PID/ns`` stands for.

    :raises OSError: not permitted.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _enter(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def network_of(pid: int) -> t.Iterator[None]:
    """Be in a process's network namespace for a while, with this thread."""
    ours = os.open(f"{PROC}/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        enter(f"{PROC}/{pid}/ns/net")
        try:
            yield
        finally:
            _enter(ours)
    finally:
        os.close(ours)


def _enter(descriptor: int) -> None:
    if _libc.setns(descriptor, 0):  # os.setns came with Python 3.12
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
