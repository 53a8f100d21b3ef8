# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a QEMU can do: a binary on disk, asked by starting it without a machine, or a running one.

Private to the collection.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket

from ansible_collections.vmfleet.cpr.plugins.module_utils import process
from ansible_collections.vmfleet.cpr.plugins.module_utils.errors import CprError
from ansible_collections.vmfleet.cpr.plugins.module_utils.monitor import Monitor
from ansible_collections.vmfleet.cpr.plugins.module_utils.offer import Binary, Offer, read_schema

# Seconds that a binary gets to start without a machine; it takes some 100 ms.
START_TIMEOUT = 20.0


async def ask(monitor: Monitor) -> Offer:
    """What the QEMU behind this monitor offers, from its QMP schema and never by version.

    :raises CprError: as `Monitor.execute`.
    """
    version = (await monitor.execute("query-version"))["qemu"]
    target = await monitor.execute("query-target")
    schema = await monitor.execute("query-qmp-schema")
    return read_schema((version["major"], version["minor"], version["micro"]), target["arch"], schema)


async def probe(path: str) -> Binary:
    """Start a binary without a machine and ask it what it can do. Touches no guest.

    :raises CprError: ``binary-missing``, ``binary-not-executable``,
        ``binary-wrong-architecture`` if it isn't for this host's processor, ``binary-not-qemu``
        if it starts and isn't a QEMU system emulator.
    """
    if not os.path.isabs(path):
        raise CprError("binary-missing", f"The QEMU binary {path} is no absolute path.", "Give its whole path.")
    if not os.path.isfile(path):
        raise CprError(
            "binary-missing",
            f"There is no QEMU binary at {path} on this host.",
            "Install the new QEMU beside the old one first, then give the path of its qemu-system binary.",
        )
    if not os.access(path, os.X_OK):
        raise CprError("binary-not-executable", f"{path} is not executable.", f"Run chmod +x {path}.")
    ours, theirs = socket.socketpair()
    with ours, theirs:
        descriptor = theirs.fileno()
        words = [
            *("-S", "-no-user-config", "-nodefaults", "-display", "none", "-machine", "none,accel=kvm:tcg"),
            *("-chardev", f"socket,id=monitor,fd={descriptor}", "-mon", "chardev=monitor,mode=control"),
        ]
        pipe, nothing = asyncio.subprocess.PIPE, asyncio.subprocess.DEVNULL
        try:
            child = await asyncio.create_subprocess_exec(
                path, *words, stdin=nothing, stdout=nothing, stderr=pipe, pass_fds=[descriptor]
            )
        except OSError as error:
            raise CprError(
                "binary-wrong-architecture",
                f"This host can't run {path}: {error.strerror}.",
                "Give a QEMU that is built for this host's processor.",
            ) from error
        theirs.close()
        try:
            return await _ask_child(path, child, ours)
        finally:
            with contextlib.suppress(ProcessLookupError):
                child.kill()
            await child.communicate()


async def _ask_child(path: str, child: asyncio.subprocess.Process, connection: socket.socket) -> Binary:
    try:
        monitor = await Monitor.adopt(connection, path, START_TIMEOUT)
    except CprError:
        with contextlib.suppress(ProcessLookupError):
            child.kill()
        words = (await child.communicate())[1].decode(errors="replace").strip().splitlines()
        raise CprError(
            "binary-not-qemu",
            f"{path} does not start as a QEMU system emulator: {words[-1] if words else 'it says nothing'}.",
            "Give the path of a qemu-system binary; `BINARY -version` shows whether it starts at all.",
        ) from None
    async with monitor:
        offer = await ask(monitor)
        machines = await monitor.execute("query-machines")
    status = os.stat(f"{process.PROC}/{child.pid}/exe")
    names = {machine["name"] for machine in machines} | {machine.get("alias", "") for machine in machines}
    return Binary(path, (status.st_dev, status.st_ino), offer, frozenset(names - {""}))


class Offers:
    """What running QEMUs offer, asked once per binary: a schema costs some 100 ms."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, int], Offer] = {}
        self._asking = asyncio.Lock()

    async def of(self, executable_id: tuple[int, int], monitor: Monitor) -> Offer:
        """What the QEMU behind this monitor offers.

        :param executable_id: of the binary that it runs.
        """
        async with self._asking:
            if executable_id not in self._known:
                self._known[executable_id] = await ask(monitor)
            return self._known[executable_id]
