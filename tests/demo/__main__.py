# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""``make demo``: three guests go from QEMU 10.0 to 11.1 while they run.

Starts the guests, runs the playbook as a user would, shows what became of each, and ends
what it started.
"""

from __future__ import annotations

import json
import pathlib
import sys
import tempfile

from tests.guests.ansible import live_update
from tests.guests.guest import NEW_SUITE, OLD_SUITE, Guest, best_accelerator, boot_sector_guest, linux_guest, qemu


def make_guests(directory: pathlib.Path) -> dict[str, Guest]:
    """The guests by what to call them in the table."""
    accelerator = best_accelerator()
    shared_file = ("-object", "memory-backend-file,id=ram0,size=64M,share=on,mem-path={dir}/ram")
    return {
        f"boot sector, q35, {accelerator}": boot_sector_guest("counter", directory / "counter"),
        "boot sector, i440fx, RAM in a file, tcg": boot_sector_guest(
            "oldtimer", directory / "oldtimer", machine="pc", accelerator="tcg", memory=shared_file
        ),
        "Linux, 2 CPUs, virtio, tcg": linux_guest("penguin", directory / "penguin"),
    }


def row(guest: Guest, kind: str, seen: dict[str, int], state: pathlib.Path) -> list[str]:
    """A guest's line in the table, looked up from outside once it has counted on."""
    before = seen[guest.name]
    guest.wait_for_ticks(10)
    guest.check_continuity()
    record = json.loads((state / guest.name / "update.json").read_text(encoding="utf-8"))
    ticks = guest.ticks()
    return [
        guest.name,
        kind,
        f"{record['old']['version']} → {guest.version()}",
        f"{record['pause_ms']:.1f} ms",
        f"{ticks[0]}…{before}",
        f"{before + 1}…{ticks[-1]}, no gap, no reboot",
    ]


def show(rows: list[list[str]]) -> None:
    """Print the table."""
    rows = [["guest", "kind", "QEMU", "pause", "its ticks before", "and after"], *rows]
    widths = [max(len(cells[i]) for cells in rows) for i in range(len(rows[0]))]
    line = "  ".join("─" * width for width in widths)
    print()
    for number, cells in enumerate(rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(cells, widths)).rstrip())
        if number == 0:
            print(line)
    print()


def main() -> int:
    """Run the demonstration; the exit status says whether all guests went on."""
    with tempfile.TemporaryDirectory(prefix="vmfleet-demo-") as name:
        directory = pathlib.Path(name)
        state = directory / "state"
        print("Starting three guests on QEMU 10.0 ...", flush=True)
        guests = make_guests(directory)
        try:
            for guest in guests.values():
                guest.start(qemu(OLD_SUITE))
            for guest in guests.values():
                guest.wait_for_ticks(25)
            print("Moving all of them onto QEMU 11.1 with one playbook run:\n", flush=True)
            print(
                f"  ansible-playbook vmfleet.cpr.live_update -e live_update_qemu_binary={qemu(NEW_SUITE)}", flush=True
            )
            seen = {guest.name: guest.ticks()[-1] for guest in guests.values()}
            run = live_update(qemu(NEW_SUITE), state, [guest.name for guest in guests.values()])
            if run.returncode:
                print(run.stdout, run.stderr, file=sys.stderr)
                return run.returncode
            show([row(guest, kind, seen, state) for kind, guest in guests.items()])
        finally:
            for guest in guests.values():
                guest.kill()
    print("The guests are stopped again. Where to look further:")
    print("  README.md                           what it does, and how to use it on your hosts")
    print("  .venv/bin/ansible-doc vmfleet.cpr.guest_resume   each module: what, how, what it returns")
    print("  roles/live_update/README.md         the role, its inputs, and what happens on failure")
    return 0


if __name__ == "__main__":
    sys.exit(main())
