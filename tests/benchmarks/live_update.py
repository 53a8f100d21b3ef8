# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""How long a guest pauses and how long an update takes, beside the bare QMP sequence.

    .venv/bin/python -m tests.benchmarks.live_update [--guests 1 4 16] [--runs 10] [--concurrency 4]

Every run starts fresh guests for both and takes them from QEMU 10.0 to 11.1: first by
``ansible-playbook vmfleet.cpr.live_update``, then by the bare sequence at the same
concurrency. Prints medians and ratios.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import pathlib
import shutil
import statistics
import tempfile
import time

from tests.benchmarks import bare_sequence
from tests.guests.ansible import live_update
from tests.guests.guest import NEW_SUITE, OLD_SUITE, Guest, boot_sector_guest, qemu


def start(count: int, directory: pathlib.Path, prefix: str) -> list[Guest]:
    """Start so many guests on the old QEMU and wait until all of them count."""
    guests: list[Guest] = [
        # The bare sequence pins nothing, so the type is versioned from the start.
        boot_sector_guest(f"{prefix}{i}", directory / f"{prefix}{i}", machine="pc-q35-10.0")
        for i in range(count)
    ]
    for guest in guests:
        guest.start(qemu(OLD_SUITE))
    for guest in guests:
        guest.wait_for_ticks(20)
    return guests


def finish(guests: list[Guest]) -> None:
    """Check that all guests went on, then end them."""
    for guest in guests:
        guest.wait_for_ticks()
        guest.check_continuity()
        guest.kill()


def by_playbook(guests: list[Guest], concurrency: int) -> tuple[float, list[float]]:
    """Seconds of the whole playbook run, and each guest's pause in milliseconds."""
    # On a tmpfs, as the default /run is on a hypervisor.
    state = pathlib.Path(tempfile.mkdtemp(dir="/dev/shm"))
    names = [guest.name for guest in guests]
    started = time.monotonic()
    live_update(qemu(NEW_SUITE), state, names, concurrency=concurrency).check_returncode()
    seconds = time.monotonic() - started
    records = [json.loads((state / guest.name / "update.json").read_text()) for guest in guests]
    shutil.rmtree(state)
    return seconds, [record["pause_ms"] for record in records]


def by_bare_sequence(guests: list[Guest], concurrency: int) -> tuple[float, list[float]]:
    """Seconds of the bare sequence, and each guest's pause in milliseconds."""
    started = time.monotonic()
    pauses = asyncio.run(bare_sequence.update_all(guests, qemu(NEW_SUITE), concurrency))
    return time.monotonic() - started, pauses


def measure(count: int, runs: int, concurrency: int) -> dict[str, float]:
    """Medians over all runs."""
    figures: dict[str, list[float]] = {"playbook": [], "bare": [], "pause": [], "bare_pause": []}
    for dummy in range(runs):
        with tempfile.TemporaryDirectory() as name:
            directory = pathlib.Path(name)
            guests = start(count, directory, "bench")
            seconds, pauses = by_playbook(guests, concurrency)
            finish(guests)
            figures["playbook"].append(seconds)
            figures["pause"].append(statistics.median(pauses))
            guests = start(count, directory, "bare")
            seconds, pauses = by_bare_sequence(guests, concurrency)
            finish(guests)
            figures["bare"].append(seconds)
            figures["bare_pause"].append(statistics.median(pauses))
    return {name: statistics.median(values) for name, values in figures.items()}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--guests", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--concurrency", type=int, default=4)
    arguments = parser.parse_args()
    print(f"{arguments.runs} runs, {arguments.concurrency} guests at a time, switched one at a time; medians\n")
    print("| guests | pause, ms | bare, ms | ratio | playbook, s | bare, s | a further guest, s | bare, s | ratio |")
    print("|---|---|---|---|---|---|---|---|---|")
    first: dict[str, float] | None = None
    for count in arguments.guests:
        figures = measure(count, arguments.runs, arguments.concurrency)
        row = [f"{count}", f"{figures['pause']:.1f}", f"{figures['bare_pause']:.1f}"]
        row += [
            f"{figures['pause'] / figures['bare_pause']:.2f}",
            f"{figures['playbook']:.2f}",
            f"{figures['bare']:.2f}",
        ]
        if first is None:
            first = figures
            row += ["", "", ""]
        else:
            more = count - arguments.guests[0]
            ours, bare = ((figures[name] - first[name]) / more for name in ("playbook", "bare"))
            row += [f"{ours:.3f}", f"{bare:.3f}", f"{ours / bare:.2f}"]
        print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
