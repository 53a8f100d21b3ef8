# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What can be seen of the guests of start_guest.sh on this machine, as JSON; nothing here is of the collection.

look.py [SECONDS]: how long to wait until every guest counts on, 60 by default.
"""

from __future__ import annotations

import json
import os
import pathlib
import re
import subprocess
import sys
import time

_GUESTS = pathlib.Path("/var/lib/guests")
_RECORDS = pathlib.Path("/run/vmfleet-cpr")


def _console(guest: pathlib.Path) -> tuple[list[int], int]:
    """What it has counted, and how often it has booted."""
    lines = [line.strip("\r") for line in (guest / "console.log").read_text("ascii", "replace").split("\n")[:-1]]
    linux = [line.split() for line in lines if re.fullmatch("tick [0-9]+ [0-9a-f-]+", line)]
    if linux:
        return [int(words[1]) for words in linux], len({words[2] for words in linux})
    return [int(line, 16) for line in lines if re.fullmatch("[0-9A-Fa-f]{4,8}", line)], lines.count("boot")


def _properties(text: str) -> dict[str, str]:
    return dict(line.split("=", 1) for line in text.splitlines() if "=" in line)


def _qemus(name: str) -> dict[int, str]:
    """The binary of every process that has to do with the guest."""
    found = {}
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            words = pathlib.Path(f"/proc/{entry}/cmdline").read_bytes().split(b"\0")
            if any(word.startswith(f"guest={name},".encode()) for word in words):
                found[int(entry)] = os.readlink(f"/proc/{entry}/exe")
        except OSError:
            continue  # it is gone
    return found


def _look(guest: pathlib.Path, deadline: float) -> dict[str, object]:
    length = len(_console(guest)[0])
    while len(_console(guest)[0]) < length + 5 and time.monotonic() < deadline:
        time.sleep(0.1)
    ticks, boots = _console(guest)
    unit = _properties(subprocess.check_output(["systemctl", "show", f"{guest.name}.service"], text=True))
    before = _properties((guest / "before").read_text())
    qemus = _qemus(guest.name)
    record = _RECORDS / guest.name / "update.json"
    return {
        "name": guest.name,
        "counts_on": len(ticks) >= length + 5,
        "ticks": len(ticks),
        "contiguous": ticks == list(range(ticks[0], ticks[0] + len(ticks))),
        "boots": boots,
        "qemus": list(qemus),
        "binaries": list(qemus.values()),
        "main_pid": int(unit["MainPID"]),
        "main_pid_before": int(before["MainPID"]),
        "unit": [unit["ActiveState"], unit["SubState"], unit["Result"]],
        "restarts": int(unit["NRestarts"]),
        "active_since_before": unit["ActiveEnterTimestampMonotonic"] == before["ActiveEnterTimestampMonotonic"],
        # When the last update of it ended, or went as far as it did.
        "record": record.stat().st_mtime_ns if record.exists() else 0,
    }


def main() -> None:
    """See above."""
    deadline = time.monotonic() + float(sys.argv[1] if len(sys.argv) > 1 else 60)
    print(json.dumps({guest.name: _look(guest, deadline) for guest in sorted(_GUESTS.iterdir())}))


if __name__ == "__main__":
    main()
