# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Breaks live updates in every way at every step, and looks what becomes of the guest.

    .venv/bin/python -m tests.faults [--trials 500] [--seed 0] [--table docs/faults.md]

A trial starts a guest, runs the playbook on it, breaks something, looks at what is left, and
runs the playbook again. Its seed, the first one and those that follow it, says what breaks and
when: ``--trials 1 --seed N`` repeats trial N. Two trials go on side by side.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import os
import pathlib
import re
import sys
import time

from tests.faults.faults import FAULTS, MODES, PHASES, matrix_of
from tests.faults.trial import Result, run_trial
from tests.guests.guest import CACHE


def table(results: list[Result]) -> str:
    """What was seen, a row for each fault and phase."""
    lines = [
        "| mode | what breaks | when | trials | the guest stood still for at most | the user was told | after the run it is on"
        " | the next run |",
        "|---|---|---|---|---|---|---|---|",
    ]
    order = {fault.name: number for number, fault in enumerate(FAULTS)}
    rows: dict[tuple[int, int, int], list[Result]] = {}
    for result in results:
        key = (MODES.index(result.mode), order[result.fault], PHASES.index(result.phase))
        rows.setdefault(key, []).append(result)
    for key in sorted(rows):
        row = [result for result in rows[key] if result.hit]
        first = rows[key][0]
        if not row:
            lines.append(f"| {first.mode} | {first.fault} | {first.phase} | 0 of {len(rows[key])} hit | | | | |")
            continue
        still = max(result.still for result in row)
        cells = [
            first.mode, first.fault, first.phase, f"{len(row)}",
            "down" if any(result.after == "down" for result in row) else _duration(still),
            _all(", ".join(f"`{code}`" for code in result.told) for result in row) or "nothing",
            _all(result.after for result in row),
            _all(result.next_run for result in row),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _duration(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"


def _all(values: object) -> str:
    return "; ".join(sorted({str(value) for value in values if value}))  # type: ignore[attr-defined]


def write_table(path: pathlib.Path, text: str) -> None:
    """Put the table where the page has its mark for it."""
    page = path.read_text(encoding="utf-8")
    start, end = "<!-- from make faults -->\n", "<!-- end -->"
    path.write_text(
        re.sub(f"{start}.*{end}", lambda dummy: f"{start}{text}\n{end}", page, flags=re.DOTALL), encoding="utf-8"
    )


def main() -> int:
    """Run the trials, print each and what they show together."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--table", type=pathlib.Path)
    arguments = parser.parse_args()
    started = time.monotonic()
    seeds = range(arguments.seed, arguments.seed + arguments.trials)
    logs = CACHE / "faults"
    logs.mkdir(parents=True, exist_ok=True)
    results = []
    with concurrent.futures.ProcessPoolExecutor(arguments.workers) as pool:
        for result in pool.map(run_trial, seeds):
            results.append(result)
            hit = "" if result.hit else " (not hit)"
            told = ", ".join(result.told) or "-"
            print(
                f"{result.seed:5} {result.mode}: {result.fault}, {result.phase}{hit}: still {_duration(result.still)}, told {told},"
                f" after {result.after or '?'}, next run {result.next_run or '?'}",
                flush=True,
            )
            log = logs / f"{result.seed}.log"
            log.write_text(result.output, encoding="utf-8")
            if result.problems:
                print(
                    f"      FAILED: {'; '.join(result.problems)}\n      its output: {os.path.relpath(log)}", flush=True
                )
    text = table(results)
    print(f"\n{text}\n")
    failed = [result.seed for result in results if result.problems]
    problems = [problem for result in results for problem in result.problems]
    counts = {word: sum(problem.startswith(word) for problem in problems) for word in ("lost", "doubled", "left over")}
    cells = len({(result.mode, result.fault, result.phase) for result in results if result.hit})
    summary = (
        f"{len(results)} trials from seed {arguments.seed} in {time.monotonic() - started:.0f} s,"
        f" {sum(result.hit for result in results)} hit, {cells} of {sum(len(matrix_of(mode)) for mode in MODES)} cells:"
        f" {counts['lost']} lost, {counts['doubled']} doubled, {counts['left over']} left over,"
        f" {len(failed)} failed{f' (seeds {failed})' if failed else ''}."
    )
    print(summary)
    if arguments.table:
        write_table(arguments.table, f"{summary}\n\n{text}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
