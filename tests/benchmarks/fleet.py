# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a rolling update costs the control node, with many hypervisors.

    .venv/bin/python -m tests.benchmarks.fleet [--hosts 100 400] [--guests 4] [--forks 10]

The hypervisors are **stand-ins**: in place of its Python each has a script of shell that reads the module
that it is sent and answers what a real one answered, recorded in the same run from real guests that move
from QEMU 10.0 to 11.1. Beside it a bare play that runs as many modules on as many such hosts, and nothing
else. Prints processor time of the control node per host, with that of the stand-ins, and the memory of
its largest process.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import resource
import subprocess
import tempfile
import time
import typing as t

import ansible_runner

from tests.guests.ansible import HYPERVISOR_PYTHON
from tests.guests.guest import NEW_SUITE, OLD_SUITE, TOP, boot_sector_guest, qemu

_STAND_IN = """#!/bin/sh
# Each module comes as a Python program on standard input, which has its name in it.
module=$(grep -a -o -m 1 'vmfleet.cpr.plugins.modules.[a-z_]*' | tail -n 1)
cat >/dev/null
cat {directory}/"${{module##*.}}".json
"""
_BARE = """\
- hosts: all
  gather_facts: false
  serial: [1, "10%", "25%"]
  tasks:
{tasks}
"""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=int, nargs="+", default=[100, 400])
    parser.add_argument("--guests", type=int, default=4, help="of each host")
    parser.add_argument("--forks", type=int, default=10)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        directory = pathlib.Path(name)
        modules = _record(directory, arguments.guests)
        stand_in = directory / "stand-in"
        stand_in.write_text(_STAND_IN.format(directory=directory))
        stand_in.chmod(0o755)
        bare = directory / "bare.yml"
        bare.write_text(_BARE.format(tasks="\n".join(_task(number) for number in range(modules))))
        print(f"{arguments.guests} guests a host, {modules} modules a host, {arguments.forks} forks\n")
        print("| hosts | CPU s a host | bare | ratio | wall s a host | bare | ratio | MiB | bare | ratio |")
        print("|---|---|---|---|---|---|---|---|---|---|")
        for hosts in arguments.hosts:
            inventory = directory / "inventory.json"
            variables = {
                "ansible_connection": "local",
                "ansible_pipelining": True,
                "ansible_python_interpreter": str(stand_in),
                "live_update_guests": [f"g{number}" for number in range(arguments.guests)],
            }
            inventory.write_text(
                json.dumps({"all": {"hosts": {f"hv{number}": {} for number in range(hosts)}, "vars": variables}})
            )
            ours = _run(["vmfleet.cpr.rolling_update", *_values()], inventory, arguments.forks)
            theirs = _run([str(bare)], inventory, arguments.forks)
            cells = [
                f"{one / whole:.{digits}f}"
                for mine, other, whole, digits in zip(ours, theirs, (hosts, hosts, 1), (3, 3, 0))
                for one in (mine, other)
            ]
            rows = [
                f"{cells[2 * index]} | {cells[2 * index + 1]} | {ours[index] / theirs[index]:.2f}" for index in range(3)
            ]
            print(f"| {hosts} | {' | '.join(rows)} |", flush=True)


def _task(number: int) -> str:
    """A module of the collection, so that the bare play sends as much."""
    return f"    - vmfleet.cpr.guest_info:\n        guests: [g{number}]\n        qemu_binary: /x"


def _values() -> list[str]:
    values = {"qemu_binary": qemu(NEW_SUITE), "soak": 0, "pause_budget": {}}
    return ["-e", json.dumps({f"live_update_{key}": value for key, value in values.items()})]


def _record(directory: pathlib.Path, number: int) -> int:
    """Update real guests once, and keep what each module answered; how many modules that took."""
    guests = [boot_sector_guest(f"g{index}", directory / f"g{index}") for index in range(number)]
    try:
        for guest in guests:
            guest.start(qemu(OLD_SUITE))
        for guest in guests:
            guest.wait_for_ticks(3)
        host = {
            "ansible_connection": "local",
            "ansible_python_interpreter": HYPERVISOR_PYTHON,
            "live_update_guests": [guest.name for guest in guests],
            "live_update_state_directory": str(directory / "state"),
        }
        (directory / "runner").mkdir()
        done = ansible_runner.run(
            private_data_dir=str(directory / "runner"),
            playbook="vmfleet.cpr.rolling_update",
            inventory={"all": {"hosts": {"hv": host}}},
            extravars={"live_update_qemu_binary": qemu(NEW_SUITE), "live_update_soak": 0},
            envvars={"PATH": f"{TOP}/.venv/bin:{os.environ['PATH']}"},
            quiet=True,
        )
        assert done.rc == 0, done.stdout.read()
    finally:
        for guest in guests:
            guest.kill()
    modules = 0
    for event in done.events:
        action = event.get("event_data", {}).get("resolved_action", "")
        if event["event"] == "runner_on_ok" and action.startswith("vmfleet.cpr."):
            answer = {key: value for key, value in event["event_data"]["res"].items() if not key.startswith("_ansible")}
            (directory / f"{action.rpartition('.')[2]}.json").write_text(json.dumps(answer))
            modules += 1
    return modules


def _run(words: list[str], inventory: pathlib.Path, forks: int) -> tuple[float, float, float]:
    """Run a playbook; seconds of processor and of wall time, and MiB of its largest process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.monotonic()
    command: list[t.Any] = [TOP / ".venv" / "bin" / "ansible-playbook", *words, "-i", inventory, "-f", str(forks)]
    done = subprocess.run(
        ["/usr/bin/env", "python3", "-c", _MEASURED, *map(str, command)],
        check=False, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=TOP,
        env={**os.environ, "ANSIBLE_NOCOLOR": "1"},
    )  # fmt: skip
    wall = time.monotonic() - began
    assert done.returncode == 0, done.stdout[-4000:]
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return cpu, wall, int(done.stdout.rsplit("\n", 2)[1]) / 1024


# Of its own children only: this process has had others.
_MEASURED = """
import resource, subprocess, sys
status = subprocess.run(sys.argv[1:]).returncode
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, flush=True)
sys.exit(status)
"""

if __name__ == "__main__":
    main()
