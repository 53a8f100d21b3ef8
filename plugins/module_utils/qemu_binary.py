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

from ansible_collections.vmfleet.cpr.plugins.module_utils import modes, process
from ansible_collections.vmfleet.cpr.plugins.module_utils.errors import CprError
from ansible_collections.vmfleet.cpr.plugins.module_utils.monitor import Monitor
from ansible_collections.vmfleet.cpr.plugins.module_utils.offer import Binary, Offer, read_schema

# Seconds that a binary gets to start without a machine; it takes some 100 ms.
START_TIMEOUT = 20.0


async def _identity(monitor: Monitor) -> tuple[tuple[int, int, int], str]:
    """Version and architecture."""
    version = (await monitor.execute("query-version"))["qemu"]
    return (version["major"], version["minor"], version["micro"]), (await monitor.execute("query-target"))["arch"]


async def ask_running(monitor: Monitor, wanted: t.Sequence[str]) -> tuple[Offer, dict[str, list[str]]]:
    """What the QEMU of a running guest offers, and why it would refuse each mode that it has.

    Its schema would tell too, and the guest would pay for it: QEMU holds its global lock while
    it writes one, 50 to 90 ms in which no device of the guest answers (10.0, 11.1). So a mode
    is set, which a QEMU that lacks it refuses, and then put back; only with a mode set does
    ``query-migrate`` know its ``blocked-reasons``.

    :param wanted: those of `modes.MODES` to try; none while a migration is under way.
    :returns: the offer, and for each mode that it has QEMU's reasons.
    :raises CprError: as `Monitor.execute`.
    """
    version, architecture = await _identity(monitor)
    capabilities = await monitor.execute("query-migrate-capabilities")
    parameters = await monitor.execute("query-migrate-parameters")
    reasons: dict[str, list[str]] = {}
    if "mode" in parameters:  # since QEMU 8.2
        try:
            for mode in wanted:
                try:
                    await monitor.execute("migrate-set-parameters", {"mode": modes.qemu_name(mode)})
                except CprError as error:
                    if error.code != "qmp-error":
                        raise
                    continue
                reasons[mode] = (await monitor.execute("query-migrate")).get("blocked-reasons", [])
        finally:
            await monitor.execute("migrate-set-parameters", {"mode": parameters["mode"]})
    elif modes.PRECOPY in wanted:
        reasons[modes.PRECOPY] = (await monitor.execute("query-migrate")).get("blocked-reasons", [])
    offer = Offer(
        version=version,
        architecture=architecture,
        modes=frozenset(reasons),
        capabilities=frozenset(item["capability"] for item in capabilities),
        parameters=frozenset(parameters),
    )
    return offer, reasons


class Probe:
    """A QEMU without a machine, which can be asked what its binary has. Touches no guest.

    :ivar binary: what is asked of every one.
    """

    def __init__(self, binary: Binary, monitor: Monitor) -> None:
        self.binary = binary
        self._monitor = monitor
        self._properties: dict[str, frozenset[str]] = {}
        self._asking = asyncio.Lock()

    async def properties(self, kind: str) -> frozenset[str]:
        """The properties of a QOM type; none for one that can't be asked."""
        async with self._asking:
            if kind not in self._properties:
                try:
                    answer = await self._monitor.execute("qom-list-properties", {"typename": kind})
                except CprError as error:
                    if error.code != "qmp-error":
                        raise
                    answer = []
                self._properties[kind] = frozenset(item["name"] for item in answer)
            return self._properties[kind]


async def probe(path: str) -> Binary:
    """What a binary can do; as `opened`."""
    async with opened(path) as qemu:
        return qemu.binary


@contextlib.asynccontextmanager
async def opened(path: str) -> t.AsyncIterator[Probe]:
    """Start a binary without a machine, to be asked what it can do.

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
                path,
                *words,
                stdin=nothing,
                stdout=nothing,
                stderr=pipe,
                pass_fds=[descriptor],
                preexec_fn=process.end_with_parent,
            )
        except OSError as error:
            raise CprError(
                "binary-wrong-architecture",
                f"This host can't run {path}: {error.strerror}.",
                "Give a QEMU that is built for this host's processor.",
            ) from error
        theirs.close()
        try:
            async with await _connect(path, child, ours) as monitor:
                yield Probe(await _ask(path, child, monitor), monitor)
        finally:
            with contextlib.suppress(ProcessLookupError):
                child.kill()
            await child.communicate()


async def _connect(path: str, child: asyncio.subprocess.Process, connection: socket.socket) -> Monitor:
    try:
        return await Monitor.adopt(connection, path, START_TIMEOUT)
    except CprError:
        with contextlib.suppress(ProcessLookupError):
            child.kill()
        words = (await child.communicate())[1].decode(errors="replace").strip().splitlines()
        raise CprError(
            "binary-not-qemu",
            f"{path} does not start as a QEMU system emulator: {words[-1] if words else 'it says nothing'}.",
            "Give the path of a qemu-system binary; `BINARY -version` shows whether it starts at all.",
        ) from None


async def _ask(path: str, child: asyncio.subprocess.Process, monitor: Monitor) -> Binary:
    version, architecture = await _identity(monitor)
    machines = await monitor.execute("query-machines")
    status = os.stat(f"{process.PROC}/{child.pid}/exe")
    names = {machine["name"] for machine in machines} | {machine.get("alias", "") for machine in machines}
    devices = await monitor.execute("qom-list-types", {"implements": "device", "abstract": False})
    return Binary(
        path=path,
        executable_id=(status.st_dev, status.st_ino),
        offer=read_schema(version, architecture, await monitor.execute("query-qmp-schema")),
        machine_types=frozenset(names - {""}),
        deprecated=frozenset(machine["name"] for machine in machines if machine.get("deprecated")),
        device_types=frozenset(item["name"] for item in devices),
        kvm=(await monitor.execute("query-kvm"))["present"],
        default_ram={item["name"]: item["default-ram-id"] for item in machines if "default-ram-id" in item},
    )
