# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Runs a command, and kills it with all its processes once its output matches a pattern.

kill.py LOG PATTERN WORD...: the command's output goes to LOG; the exit status is 0 if it was killed.
"""

from __future__ import annotations

import os
import pathlib
import re
import signal
import subprocess
import sys
import time


def _family(pid: int) -> list[int]:
    """The process and all that descend from it; Ansible's workers have sessions of their own."""
    children: dict[int, list[int]] = {}
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            parent = int(pathlib.Path(f"/proc/{entry}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[1])
        except OSError:
            continue
        children.setdefault(parent, []).append(int(entry))
    found = [pid]
    for member in found:
        found += children.get(member, [])
    return found


def main() -> int:
    """See above."""
    log, pattern, *words = sys.argv[1:]
    with open(log, "w", encoding="utf-8") as stream:
        command = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, start_new_session=True
        )
        while command.poll() is None:
            if re.search(pattern, pathlib.Path(log).read_text(encoding="utf-8"), re.DOTALL):
                # The first one first, which could otherwise say something to what becomes of the others.
                for pid in _family(command.pid):
                    try:
                        os.kill(pid, signal.SIGKILL)
                    except ProcessLookupError:
                        pass
                command.wait()
                return 0
            time.sleep(0.01)
    return 1


if __name__ == "__main__":
    sys.exit(main())
