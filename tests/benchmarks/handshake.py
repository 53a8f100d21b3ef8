# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What finding out beforehand costs, with many guests side by side.

    .venv/bin/python -m tests.benchmarks.handshake [--guests 16] [--concurrency 4]

Takes fresh guests with virtio disk, card and random numbers from QEMU 10.0 to 11.1 by the
phases themselves, without Ansible. Prints seconds a guest: the whole of a step, divided by the
guests, and the slowest guest.
"""

from __future__ import annotations

import argparse
import pathlib
import statistics
import tempfile
import time
import typing as t

from tests.benchmarks.live_update import finish
from tests.guests import healthy
from tests.guests.guest import OLD_SUITE, boot_sector_guest, qemu
from tests.integration.conftest import Host

_MORE = [
    *("-blockdev", "driver=null-co,node-name=data,size=1048576,read-zeroes=on"),
    *("-device", "virtio-blk-pci,drive=data", "-netdev", "user,id=n", "-device", "virtio-net-pci,netdev=n"),
    *("-device", "virtio-rng-pci"),
]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--guests", type=int, default=16)
    parser.add_argument("--concurrency", type=int, default=4)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        directory = pathlib.Path(name)
        guests = []
        for number in range(arguments.guests):
            healthy.prepare(directory / f"g{number}")
            guests.append(boot_sector_guest(f"g{number}", directory / f"g{number}", more=_MORE))
        try:
            for guest in guests:
                guest.start(qemu(OLD_SUITE))
            for guest in guests:
                guest.wait_for_ticks(20)
            print(f"{arguments.guests} guests, {arguments.concurrency} at a time\n")
            print("| step | s a guest | the slowest guest, s |\n|---|---|---|")
            _measure(Host(directory / "state"), guests, arguments.concurrency)
            finish(guests)
        finally:
            for guest in guests:
                guest.kill()


def _measure(host: Host, guests: list[t.Any], concurrency: int) -> None:
    for step, phase, key, parameters in (
        ("preflight", host.preflight, None, {}),
        ("preflight, rehearsed", host.preflight, None, {"rehearse": True}),
        ("preflight and launch", host.launch, "launch", {}),
        ("transfer", host.transfer, "transfer", {}),
        ("setup: the handshake", host.setup, "setup", {}),
        ("switch and retire", host.resume, "retire", {}),
    ):
        started = time.monotonic()
        outcomes = phase(*guests, concurrency=concurrency, **parameters)
        seconds = (time.monotonic() - started) / len(guests)
        failures = [outcome.message for outcome in outcomes if outcome.error]
        if failures:
            raise RuntimeError(failures[0])
        slowest = max(outcome.update.durations_ms[key] for outcome in outcomes) / 1000 if key else None
        print(f"| {step} | {seconds:.3f} | {f'{slowest:.3f}' if slowest is not None else ''} |", flush=True)
    pauses = statistics.median(outcome.update.pause_ms for outcome in outcomes)
    print(f"\nThe median pause was {pauses:.1f} ms.")


if __name__ == "__main__":
    main()
