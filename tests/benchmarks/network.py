# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a ping every 10 ms notices of an update, beside the bare QMP sequence.

    .venv/bin/python -m tests.benchmarks.network [--runs 5]

The guest is tests/guests/echo_sector.S with a tap in a bridge, under KVM where that works: of a
Linux guest under TCG one would measure how long the new QEMU takes to translate its code
anew. Needs root.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import pathlib
import shutil
import statistics
import tempfile
import time
import typing as t

from tests.benchmarks import bare_sequence
from tests.guests.ansible import live_update
from tests.guests.guest import CACHE, NEW_SUITE, OLD_SUITE, Guest, boot_sector_guest, qemu, wait_until
from tests.guests.network import Bridge, Ping, ip

_MAC = "52:54:00:12:34:56"


def _ping(address: str, going: t.Any, answer: t.Any) -> None:
    ping = Ping(address)
    ping.start()
    going.wait()
    lost, gap = ping.finish()
    answer.put((len(ping.sent), lost, gap))


def while_pinging(address: str, update: t.Callable[[], float]) -> tuple[float, int, int, float]:
    """The update's pause, pings sent, lost, and the longest time between two answers in milliseconds.

    The pings come from a process of their own, as they would from another machine.
    """
    ended: t.Any = multiprocessing.Event()
    answer: t.Any = multiprocessing.Queue()
    child = multiprocessing.Process(target=_ping, args=(address, ended, answer))
    child.start()
    time.sleep(1.5)
    pause = update()
    time.sleep(1.5)
    ended.set()
    result = (pause, *answer.get())
    child.join()
    return result


def _by_playbook(guest: Guest) -> float:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as state:
        live_update(qemu(NEW_SUITE), pathlib.Path(state), [guest.name]).check_returncode()
        return json.loads((pathlib.Path(state) / guest.name / "update.json").read_text())["pause_ms"]


def _by_bare_sequence(guest: Guest, bridge: Bridge, tap: str) -> float:
    second = bridge.tap(f"cprq{os.getpid()}")
    guest.words = [word.replace(tap, second) for word in guest.words]
    return asyncio.run(bare_sequence.update_all([guest], qemu(NEW_SUITE), 1))[0]


def measure(directory: pathlib.Path, name: str) -> tuple[float, int, int, float]:
    """One update of a fresh guest, by the playbook or by the bare sequence."""
    bridge = Bridge()
    try:
        # Otherwise it takes the lowest one of its taps, and forgets its neighbours when that changes.
        ip("link", "set", bridge.name, "address", "02:00:00:00:00:01")
        tap = bridge.tap(f"cprx{os.getpid()}")
        card = ["-netdev", f"tap,id=n,ifname={tap},script=no,downscript=no"]
        card += ["-device", f"ne2k_isa,netdev=n,iobase=0x300,mac={_MAC}"]
        guest = boot_sector_guest(name, directory / name, machine="pc-q35-10.0", more=card)
        shutil.copyfile(CACHE / "guests" / "echo_sector.img", guest.directory / "disk.img")
        try:
            guest.start(qemu(OLD_SUITE))
            wait_until(lambda: _echoes(bridge), "the guest answers")
            return while_pinging(
                bridge.guest,
                lambda: _by_playbook(guest) if name == "playbook" else _by_bare_sequence(guest, bridge, tap),
            )
        finally:
            guest.kill()
    finally:
        bridge.delete()


def _echoes(bridge: Bridge) -> bool:
    ip("neigh", "replace", bridge.guest, "lladdr", _MAC, "nud", "permanent", "dev", bridge.name)
    ping = Ping(bridge.guest)
    ping.start()
    time.sleep(0.1)
    return ping.finish()[0] == 0


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    arguments = parser.parse_args()
    print(f"{arguments.runs} runs; a ping every 10 ms\n")
    print(
        "| | pings lost | of | longest gap, ms, median | worst | gap less pause, ms, worst |\n|---|---|---|---|---|---|"
    )
    for name in ("playbook", "bare"):
        with tempfile.TemporaryDirectory() as directory:
            rows = [measure(pathlib.Path(directory), name) for dummy in range(arguments.runs)]
        gaps = [gap for dummy, dummy, dummy, gap in rows]
        print(
            f"| {name} | {max(lost for dummy, dummy, lost, dummy in rows)} at most |"
            f" {round(statistics.mean(sent for dummy, sent, dummy, dummy in rows))} | {statistics.median(gaps):.1f} |"
            f" {max(gaps):.1f} | {max(gap - pause for pause, dummy, dummy, gap in rows):.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
