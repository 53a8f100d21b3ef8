# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Says what is planned for a fleet, how it stands and what became of it, in lines for whoever watches.

Pure functions. Private to the collection.
"""

from __future__ import annotations

import typing as t

from ansible_collections.vmfleet.cpr.plugins.module_utils.journal import ENDED, local_time
from ansible_collections.vmfleet.cpr.plugins.plugin_utils.fleet_gate import failures_of, left_out, pauses_of
from ansible_collections.vmfleet.cpr.plugins.plugin_utils.fleet_plan import reason, sentence
from ansible_collections.vmfleet.cpr.plugins.plugin_utils.fleet_settings import Fact


def summary(plan: Fact, deadline: float | None = None, now: float = 0) -> list[str]:
    """A plan in lines for whoever watches.

    :param plan: as `fleet_plan.plan` returned it.
    :param deadline: after when no batch begins, in seconds since 1970; None for ever.
    :param now: the time, in the same.
    """
    lines = []
    if deadline is not None:
        lines.append(f"no batch begins after {local_time(deadline)}{', which has passed' if now >= deadline else ''}")
    for number, hosts in enumerate(plan["batches"], 1):
        guests = [f"{host} ({', '.join(plan['pending'][host])})" for host in hosts]
        lines.append(f"batch {number}: {', '.join(guests)}")
    lines += [f"up to date: {plan['up_to_date']} guests"]
    if plan["left_out"]:
        lines.append(f"left out by live_update_guest_query: {plan['left_out']} guests")
    lines += plan["notes"]
    lines += [f"refused: {sentence(item)}" for item in plan["refused"]]
    lines += [f"unreachable: {host}: {why}" for host, why in plan["unreachable"].items()]
    return lines


def status(hosts: t.Mapping[str, Fact]) -> list[str]:
    """A table of every guest: its host, its name, the version that it runs and the wanted one, whether it is ready.

    :param hosts: as for `fleet_plan.plan`.
    """
    rows: list[list[t.Any]] = []
    for host, item in hosts.items():
        check = item["check"] if item else {"msg": "It failed before it was checked."}
        if "guests" not in check:
            how = "unreachable: " if check.get("unreachable") else ""
            rows.append([host, "-", "-", "-", how + reason(check)])
        for guest in check.get("guests", ()):
            rows.append([host, guest["name"], guest.get("version"), guest.get("wanted_version"), _state(guest)])
        if not check.get("guests", True):
            rows.append([host, "-", "-", "-", "no guests"])
    return table(rows, ["host", "guest", "runs", "wanted", "state"])


def _state(guest: Fact) -> str:
    if guest["failed"]:
        return str(guest["message"])
    if guest["phase"] not in ENDED:
        return f"begun: its update is {guest['phase']}"
    if guest["up_to_date"]:
        return "up to date"
    if guest["verdict"] == "ready":
        return f"ready, by {guest['mode']}"
    reasons = " ".join(f"{item['message']} [{item['code']}]" for item in guest["reasons"])
    return f"ready, by {guest['mode']}, with a warning: {reasons}" if guest["verdict"] == "warning" else reasons


def report(plan: Fact, outcomes: t.Sequence[Fact]) -> list[str]:
    """A table of every host: what became of its guests.

    :param plan: as `fleet_plan.plan` returned it.
    :param outcomes: as for `fleet_gate.gate`.
    """
    rows: list[list[t.Any]] = []
    tried = {outcome["host"]: outcome for outcome in outcomes}
    for host, pending in plan["pending"].items():
        if host not in tried:
            rows.append([host, 0, 0, len(pending), "", "not begun"])
            continue
        names = tried[host]["wanted"]
        left = tried[host]["left"]
        failed = [failure["guest"] for failure in failures_of(tried[host])]
        pauses = [pause for pause, dummy in pauses_of(tried[host])]
        longest = f"{max(pauses):.1f}" if pauses else ""
        said = [f"failed: {', '.join(failed)}"] if failed else []
        said += [left_out(left)] if left else []
        rows.append([host, len(names) - len(failed), len(failed), len(left), longest, "; ".join(said)])
    rows += [[host, 0, 0, "?", "", f"unreachable: {why}"] for host, why in plan["unreachable"].items()]
    rows += [
        [item["host"], 0, 0, 1 if item["guest"] else "?", "", sentence({**item, "host": None})]
        for item in plan["refused"]
    ]
    return table(rows, ["host", "updated", "failed", "left", "longest pause, ms", ""])


def table(rows: t.Sequence[t.Sequence[t.Any]], head: t.Sequence[str]) -> list[str]:
    """Rows as lines whose columns stand below each other."""
    lines = [[str("" if cell is None else cell) for cell in row] for row in (head, *rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines]
