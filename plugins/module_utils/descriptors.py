# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""File descriptors that a new QEMU is born with.

What is open in the old QEMU and has no path (a listening port, a file of an ``-add-fd``) is
duplicated from there; a tap is opened anew, by whoever may. Private to the collection.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import socket
import struct
import typing as t

from ansible_collections.vmfleet.cpr.plugins.module_utils import namespaces, process
from ansible_collections.vmfleet.cpr.plugins.module_utils.character_devices import Listener
from ansible_collections.vmfleet.cpr.plugins.module_utils.errors import CprError
from ansible_collections.vmfleet.cpr.plugins.module_utils.new_command_line import Descriptor
from ansible_collections.vmfleet.cpr.plugins.module_utils.taps import Tap

# linux/if_tun.h
_TUNSETIFF, _TUNSETPERSIST, _TUNSETOWNER, _TUNSETGROUP = 0x400454CA, 0x400454CB, 0x400454CC, 0x400454CE
_IFF_TAP, _IFF_MULTI_QUEUE, _IFF_NO_PI, _IFF_VNET_HDR, _IFF_TUN_EXCL = 0x0002, 0x0100, 0x1000, 0x4000, 0x8000
# The same number on every architecture (asm-generic/unistd.h); Linux 5.6.
_SYS_PIDFD_GETFD = 438

_LISTENING = "0A"  # TCP_LISTEN (net/tcp_states.h)

_libc = ctypes.CDLL(None, use_errno=True)


@contextlib.contextmanager
def opened(wanted: t.Iterable[Descriptor], taps: t.Iterable[Tap], old: process.Identity) -> t.Iterator[dict[int, int]]:
    """Our descriptors by the numbers that the new QEMU must have them at, while it is born.

    The taps of this update are created, in the old QEMU's network namespace.

    :raises CprError: ``descriptor-not-duplicated`` or ``tap-not-created``.
    """
    by_name = {tap.temporary: tap for tap in taps}
    with contextlib.ExitStack() as stack:
        held = {}
        for item in wanted:
            if item.tap:
                number = create_tap(by_name[item.tap], old.pid)
            elif item.path:
                number = os.open(item.path, os.O_RDWR | os.O_CLOEXEC)
            else:
                number = (_open_anew if item.opened_anew else duplicate)(old.pid, t.cast(int, item.of_old))
            stack.callback(os.close, number)
            held[item.number] = number
        yield held


def listeners(pid: int) -> list[Listener]:
    """The sockets at which a process listens, but for UNIX sockets with a path.

    :raises OSError: it is gone, or it belongs to another user.
    """
    sockets: dict[str, dict[str, t.Any]] = {}
    for table in ("tcp", "tcp6"):
        for words in map(str.split, process.read_file(pid, f"net/{table}").splitlines()[1:]):
            if words[3] == _LISTENING:
                address, dummy, port = words[1].rpartition(":")
                sockets[words[9]] = {"port": int(port, 16), "host": _host(address)}
    for words in map(str.split, process.read_file(pid, "net/unix").splitlines()[1:]):
        # Flags 00010000 is __SO_ACCEPTCON (proc_net_unix in net/unix/af_unix.c).
        if words[3] == "00010000" and words[-1].startswith("@") and len(words) > 7:
            sockets[words[6]] = {"name": words[-1][1:]}
    found = []
    for number, target in sorted(process.descriptors(pid).items()):
        inode = target[len("socket:[") : -1] if target.startswith("socket:[") else ""
        if inode in sockets:
            found.append(Listener(number, **sockets.pop(inode)))
    return found


def _host(text: str) -> str:
    """An address of ``/proc/net/tcp``, whose words have the host's order of bytes."""
    number = b"".join(struct.pack("=I", int(text[index : index + 8], 16)) for index in range(0, len(text), 8))
    return socket.inet_ntop(socket.AF_INET if len(number) == 4 else socket.AF_INET6, number)


def has_terminal(pid: int) -> bool:
    """Whether a process's standard input is one that somebody types at, or feeds."""
    target = process.descriptors(pid).get(0, "")
    return target.startswith(("/dev/pts/", "/dev/tty", "/dev/console", "pipe:", "socket:"))


def duplicate(pid: int, number: int) -> int:
    """A duplicate of another process's descriptor.

    :raises CprError: ``descriptor-not-duplicated``.
    """
    pidfd = os.pidfd_open(pid)
    try:
        ours = _libc.syscall(_SYS_PIDFD_GETFD, pidfd, number, 0)
    finally:
        os.close(pidfd)
    if ours < 0:
        raise _not_duplicated(pid, number, os.strerror(ctypes.get_errno()))
    return ours


def _not_duplicated(pid: int, number: int, why: str) -> CprError:
    return CprError(
        "descriptor-not-duplicated",
        f"The file descriptor {number} of the QEMU process {pid} could not be duplicated: {why}.",
        "It needs Linux 5.6 or later, and root (become).",
    )


def _open_anew(pid: int, number: int) -> int:
    """The file behind another process's descriptor, opened in the same way once more.

    :raises CprError: ``descriptor-not-duplicated``.
    """
    flags = process.flags_of(pid, number) & (os.O_ACCMODE | os.O_DIRECT | os.O_NONBLOCK | os.O_APPEND)
    try:
        return os.open(f"{process.PROC}/{pid}/fd/{number}", flags | os.O_CLOEXEC)
    except OSError as error:
        raise _not_duplicated(pid, number, error.strerror) from error


def create_tap(tap: Tap, pid: int) -> int:
    """A descriptor of a tap's temporary interface, which it creates if it isn't there yet.

    :param pid: the process in whose network namespace it shall be.
    :raises CprError: ``tap-not-created``.
    """
    try:
        with namespaces.network_of(pid):
            number = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
            flags = _IFF_TAP | _IFF_NO_PI
            flags |= _IFF_MULTI_QUEUE if tap.multi_queue else 0
            flags |= _IFF_VNET_HDR if tap.vnet_header else 0
            try:
                fcntl.ioctl(number, _TUNSETIFF, struct.pack("16sH22x", tap.temporary.encode(), flags))
            except OSError:
                os.close(number)
                raise
            return number
    except OSError as error:
        raise CprError(
            "tap-not-created",
            f"A second tap beside {tap.name} could not be created: {error.strerror}.",
            "Run the task as root (become); see whether /dev/net/tun is there.",
        ) from error


def make_persistent(tap: Tap, pid: int, number: int) -> None:
    """Let a tap stay when the process that has it open ends, as the one before did.

    :param number: the process's descriptor of it.
    :raises CprError: ``descriptor-not-duplicated``.
    :raises OSError: the kernel does not permit it.
    """
    ours = duplicate(pid, number)
    try:
        keep_tap(ours, tap.owner, tap.group)
    finally:
        os.close(ours)


def keep_tap(number: int, owner: int | None, group: int | None) -> None:
    """Let the tap of a descriptor stay when nobody has it open, for this user and group to open it again.

    :raises OSError: the kernel does not permit it.
    """
    if owner is not None:
        fcntl.ioctl(number, _TUNSETOWNER, owner)
    if group is not None:
        fcntl.ioctl(number, _TUNSETGROUP, group)
    fcntl.ioctl(number, _TUNSETPERSIST, 1)


def let_tap_go(pid: int, number: int) -> None:
    """Let a tap go with the process that has it open.

    :raises CprError: ``descriptor-not-duplicated``.
    :raises OSError: the kernel does not permit it.
    """
    ours = duplicate(pid, number)
    try:
        fcntl.ioctl(ours, _TUNSETPERSIST, 0)
    finally:
        os.close(ours)
