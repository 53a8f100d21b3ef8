# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The yardstick: the QMP sequence of a cpr-transfer and nothing else.

No checks, no records, no undo; a load error here would leave the guest down.
"""

from __future__ import annotations

import asyncio
import json
import pathlib
import subprocess

from qemu.qmp import ConnectError, EventListener, QMPClient

from tests.guests.guest import Guest


def _channel(kind: str, path: pathlib.Path) -> dict[str, object]:
    return {"channel-type": kind, "addr": {"transport": "socket", "type": "unix", "path": str(path)}}


async def _connect(path: pathlib.Path) -> QMPClient:
    while not path.exists():
        await asyncio.sleep(0.005)
    client = QMPClient()
    while True:
        try:
            await client.connect(str(path))
            break
        except ConnectError:  # bound, and not listening yet
            await asyncio.sleep(0.001)
    capabilities = [{"capability": name, "state": True} for name in ("events", "return-path")]
    await client.execute("migrate-set-capabilities", {"capabilities": capabilities})
    return client


async def _event(listener: EventListener, name: str, status: str | None = None) -> float:
    while True:
        event = await listener.get()
        if event["event"] == name and status in (None, event.get("data", {}).get("status")):
            return event["timestamp"]["seconds"] * 1000 + event["timestamp"]["microseconds"] / 1000


async def update(guest: Guest, binary: str, slots: asyncio.Semaphore, turn: asyncio.Semaphore) -> float:
    """Take one guest to another QEMU; its pause in milliseconds."""
    cpr, main, monitor = (guest.directory / f"bare-{name}.sock" for name in ("cpr", "main", "qmp"))
    changes = {str(guest.monitor): str(monitor), "console.log": "console.log,append=on"}
    words = guest.words
    for before, after in changes.items():
        words = [word.replace(before, after) for word in words]
    async with slots:
        subprocess.Popen(
            [binary, *words, "-S", "-incoming", "defer", "-incoming", json.dumps(_channel("cpr", cpr))],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True, cwd=guest.directory,
        )  # fmt: skip
        while not cpr.exists():
            await asyncio.sleep(0.005)
        await asyncio.sleep(0.005)  # it is bound a moment before it listens
        old = await _connect(guest.monitor)
        await old.execute("migrate-set-parameters", {"mode": "cpr-transfer"})
        await old.execute("migrate", {"channels": [_channel("main", main), _channel("cpr", cpr)]})
        new = await _connect(monitor)
        with old.listener(("STOP", "MIGRATION")) as old_events, new.listener(("RESUME", "MIGRATION")) as new_events:
            async with turn:
                await new.execute("migrate-incoming", {"channels": [_channel("main", main)]})
                stop = await _event(old_events, "STOP")
                await asyncio.gather(
                    _event(old_events, "MIGRATION", "completed"), _event(new_events, "MIGRATION", "completed")
                )
                await new.execute("cont")
                resume = await _event(new_events, "RESUME")
        await old.execute("quit")
        await new.disconnect()
        try:
            await old.disconnect()
        except EOFError:
            pass  # it has quit
        monitor.rename(guest.monitor)
    return resume - stop


async def update_all(guests: list[Guest], binary: str, concurrency: int) -> list[float]:
    """Take guests to another QEMU, switching one at a time; their pauses in milliseconds."""
    slots, turn = asyncio.Semaphore(concurrency), asyncio.Semaphore(1)
    updates = asyncio.gather(*(update(guest, binary, slots, turn) for guest in guests))
    return await asyncio.wait_for(updates, 60)
