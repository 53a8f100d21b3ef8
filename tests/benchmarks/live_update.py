# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""How long a guest pauses and how long an update takes, beside the bare QMP sequence.

    .venv/bin/python -m tests.benchmarks.live_update [--guests 1 4 16] [--runs 10] [--concurrency 4] [--written 0]

Every run starts fresh guests for both and takes them from QEMU 10.0 to 11.1: first by
``ansible-playbook vmfleet.cpr.live_update``, then by the bare sequence at the same
concurrency. With ``--written 1024`` each guest has a disk of which 1024 MiB were written right before and are in the
host's page cache only. Prints medians and ratios.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import pathlib
import shutil
import statistics
import tempfile
import time

from tests.benchmarks import bare_sequence
from tests.guests.ansible import live_update
from tests.guests.guest import NEW_SUITE, OLD_SUITE, Guest, boot_sector_guest, qemu

_SECOND_DISK = ("-drive", "if=none,id=second,file={dir}/second.img,format=raw", "-device", "ide-hd,drive=second")


def start(count: int, directory: pathlib.Path, prefix: str, written: int) -> list[Guest]:
    """Start so many guests on the old QEMU and wait until all of them count.

    :param written: MiB of each guest's second disk that shall be in the page cache only.
    """
    guests: list[Guest] = []
    for i in range(count):
        place = directory / f"{prefix}{i}"
        more = _SECOND_DISK if written else ()
        # The bare sequence pins nothing, so the type is versioned from the start.
        guests.append(boot_sector_guest(f"{prefix}{i}", place, machine="pc-q35-10.0", more=more))
        if written:
            (place / "second.img").touch()
            os.truncate(place / "second.img", written << 20)
    for guest in guests:
        guest.start(qemu(OLD_SUITE))
    for guest in guests:
        guest.wait_for_ticks(20)
    for guest in guests if written else []:
        with open(guest.directory / "second.img", "r+b") as disk:
            for dummy in range(written):
                disk.write(os.urandom(1 << 20))
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


def measure(count: int, runs: int, concurrency: int, written: int) -> dict[str, float]:
    """Medians over all runs."""
    figures: dict[str, list[float]] = {"playbook": [], "bare": [], "pause": [], "bare_pause": []}
    for dummy in range(runs):
        with tempfile.TemporaryDirectory() as name:
            directory = pathlib.Path(name)
            guests = start(count, directory, "bench", written)
            seconds, pauses = by_playbook(guests, concurrency)
            finish(guests)
            figures["playbook"].append(seconds)
            figures["pause"].append(statistics.median(pauses))
            guests = start(count, directory, "bare", written)
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
    parser.add_argument("--written", type=int, default=0)
    arguments = parser.parse_args()
    print(f"{arguments.runs} runs, {arguments.concurrency} guests at a time, switched one at a time; medians\n")
    print("| guests | pause, ms | bare, ms | ratio | playbook, s | bare, s | a further guest, s | bare, s | ratio |")
    print("|---|---|---|---|---|---|---|---|---|")
    first: dict[str, float] | None = None
    for count in arguments.guests:
        figures = measure(count, arguments.runs, arguments.concurrency, arguments.written)
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
