# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Starts and stops machines for Molecule.

    python -m tests.guests.fleet start machine|virtual-machine DIRECTORY
    python -m tests.guests.fleet stop DIRECTORY...

All that is known of a machine lies in its directory, whose name is the machine's; ``address`` there is what
connect.py reads. A machine that does not come up is stopped, and its directory kept for whoever looks for
the reason. ``stop`` removes the directory, whether the machine runs or not.
"""

from __future__ import annotations

import argparse
import pathlib
import shutil
import time

from tests.guests.machine import Machine
from tests.guests.virtual_machine import VirtualMachine


def _start(kind: str, directory: pathlib.Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "kind").write_text(f"{kind}\n", encoding="utf-8")
    machine = _machine(directory)
    if machine.pid():
        return
    begun = time.monotonic()
    try:
        machine.start()
        (directory / "address").write_text(f"{machine.address()}\n", encoding="utf-8")
    except BaseException:
        _end(machine)
        raise
    print(f"{machine.name} was up after {time.monotonic() - begun:.1f} s")


def _stop(directory: pathlib.Path) -> None:
    if directory.exists():
        _end(_machine(directory))
        shutil.rmtree(directory)


def _machine(directory: pathlib.Path) -> Machine | VirtualMachine:
    kind = (directory / "kind").read_text(encoding="utf-8").strip()
    return {"machine": Machine, "virtual-machine": VirtualMachine}[kind](directory.name, directory)


def _end(machine: Machine | VirtualMachine) -> None:
    if isinstance(machine, Machine):
        machine.stop()
    else:
        machine.kill()


def main() -> None:
    """See above."""
    parser = argparse.ArgumentParser()
    actions = parser.add_subparsers(dest="action", required=True)
    start = actions.add_parser("start")
    start.add_argument("kind", choices=["machine", "virtual-machine"])
    start.add_argument("directories", metavar="DIRECTORY", nargs=1, type=pathlib.Path)
    actions.add_parser("stop").add_argument("directories", metavar="DIRECTORY", nargs="*", type=pathlib.Path)
    arguments = parser.parse_args()
    for directory in arguments.directories:
        if arguments.action == "start":
            _start(arguments.kind, directory.resolve())
        else:
            _stop(directory.resolve())


if __name__ == "__main__":
    main()
