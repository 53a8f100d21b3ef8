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
import typing as t

from ansible_collections.vmfleet.cpr.plugins.module_utils import process
from ansible_collections.vmfleet.cpr.plugins.module_utils.errors import CprError
from ansible_collections.vmfleet.cpr.plugins.module_utils.monitor import Monitor
from ansible_collections.vmfleet.cpr.plugins.module_utils.offer import Binary, Offer, read_schema

# Seconds that a binary gets to start without a machine; it takes some 100 ms.
START_TIMEOUT = 20.0


async def _identity(monitor: Monitor) -> tuple[tuple[int, int, int], str]:
    """Version and architecture."""
    version = (await monitor.execute("query-version"))["qemu"]
    return (version["major"], version["minor"], version["micro"]), (await monitor.execute("query-target"))["arch"]


async def ask_running(monitor: Monitor, modes: t.Iterable[str]) -> tuple[Offer, dict[str, list[str]]]:
    """What the QEMU of a running guest offers, and why it would refuse each mode that it has.

    Its schema would tell too, and the guest would pay for it: QEMU holds its global lock while
    it writes one, 50 to 90 ms in which no device of the guest answers (10.0, 11.1). So a mode
    is set, which a QEMU that lacks it refuses, and then put back; only with a mode set does
    ``query-migrate`` know its ``blocked-reasons``.

    :param modes: those to try; none while a migration is under way.
    :returns: the offer, and for each mode that it has QEMU's reasons.
    :raises CprError: as `Monitor.execute`.
    """
    version, architecture = await _identity(monitor)
    capabilities = await monitor.execute("query-migrate-capabilities")
    parameters = await monitor.execute("query-migrate-parameters")
    reasons: dict[str, list[str]] = {}
    if "mode" in parameters:  # since QEMU 8.2
        try:
            for mode in modes:
                try:
                    await monitor.execute("migrate-set-parameters", {"mode": mode})
                except CprError as error:
                    if error.code != "qmp-error":
                        raise
                    continue
                reasons[mode] = (await monitor.execute("query-migrate")).get("blocked-reasons", [])
        finally:
            await monitor.execute("migrate-set-parameters", {"mode": parameters["mode"]})
    offer = Offer(
        version=version,
        architecture=architecture,
        modes=frozenset(reasons),
        capabilities=frozenset(item["capability"] for item in capabilities),
        parameters=frozenset(parameters),
    )
    return offer, reasons


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
        version, architecture = await _identity(monitor)
        offer = read_schema(version, architecture, await monitor.execute("query-qmp-schema"))
        machines = await monitor.execute("query-machines")
    status = os.stat(f"{process.PROC}/{child.pid}/exe")
    names = {machine["name"] for machine in machines} | {machine.get("alias", "") for machine in machines}
    return Binary(path, (status.st_dev, status.st_ino), offer, frozenset(names - {""}))
