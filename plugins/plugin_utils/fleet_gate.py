# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Decides whether a rolling update goes on after a batch.

Pure functions on what became of every host. Private to the collection.
"""

from __future__ import annotations

import re
import typing as t

from ansible_collections.vmfleet.cpr.plugins.module_utils.journal import ENDED
from ansible_collections.vmfleet.cpr.plugins.plugin_utils.fleet_plan import reason
from ansible_collections.vmfleet.cpr.plugins.plugin_utils.fleet_settings import Fact, allowed, pause_limits


def outcomes(
    noted: t.Sequence[Fact], hosts: t.Sequence[str], plan: Fact, rounds: t.Sequence[t.Mapping[str, list[str]]]
) -> list[dict[str, t.Any]]:
    """What became of every host of a batch, and who of it was ``left`` out.

    :param noted: what was noted of each; nothing of one that failed before.
    :param rounds: what was tried.
    """
    found = []
    for host, item in zip(hosts, noted):
        wanted = [guest for tried in rounds for guest in tried.get(host, ())]
        left = [guest for guest in plan["pending"][host] if guest not in wanted]
        nothing = {"found": {"msg": "It failed before its guests could be looked at."}}
        found.append({**nothing, **item, "host": host, "wanted": wanted, "left": left, "was": plan["run_states"][host]})
    return found


def lost(outcomes: t.Sequence[Fact]) -> list[str]:
    """The hosts of which it is not known whether an update still goes on there, or is known that it does."""
    return [
        outcome["host"]
        for outcome in outcomes
        if "guests" not in outcome["found"]
        or any(
            guest["name"] in outcome["wanted"] and guest["phase"] not in ENDED for guest in outcome["found"]["guests"]
        )
    ]


def gate(
    outcomes: t.Sequence[Fact],
    batch: t.Sequence[str],
    *,
    failure_budget: t.Any = 0,
    pause_budget: t.Any = None,
) -> dict[str, t.Any]:
    """Whether to go on after a batch.

    :param outcomes: of each host so far its ``host``, the guests that were ``wanted`` on the new QEMU and their run states
        before (``was``), the result of the look at them (``found``), the result of the ``health`` command, and
        ``messages`` of what failed.
    :param batch: the hosts of this batch, whose pauses and health count.
    :param failure_budget: how many failures there may be so far, or which part of the guests (``"5%"``).
    :param pause_budget: milliseconds for ``p50``, ``p99`` and ``largest``.
    :returns: ``passed``, the ``reasons`` why not, ``failures`` with ``host``, ``guest`` and ``message``,
        ``pauses_ms`` with ``p50``, ``p99``, ``largest`` and who had it, ``updated`` and ``tried`` guests, and what is to
        be said of those that were ``left_out`` of each host.
    """
    failures = [failure for outcome in outcomes for failure in failures_of(outcome)]
    tried = sum(len(outcome["wanted"]) for outcome in outcomes)
    pauses = sorted(pause for outcome in outcomes if outcome["host"] in batch for pause in pauses_of(outcome))
    measured: dict[str, t.Any] = {}
    if pauses:
        figures = [pause for pause, dummy in pauses]
        measured = {name: percentile(figures, part) for name, part in (("p50", 50), ("p99", 99), ("largest", 100))}
        measured["slowest"] = pauses[-1][1]
    reasons = []
    limit = allowed(failure_budget, tried)
    if len(failures) > limit:
        reasons.append(f"{len(failures)} failed, and live_update_failure_budget allows {limit} of {tried} guests.")
    for name, most in pause_limits(pause_budget).items():
        if measured.get(name, 0) > most:
            reasons.append(
                f"The {name} of this batch's pauses is {measured[name]:.1f} ms, and live_update_pause_budget allows"
                f" {most:g}; the longest was that of {measured['slowest']}."
            )
    for outcome in outcomes:
        if outcome["host"] in batch and _is_unwell(outcome):
            reasons.append(f"{outcome['host']}: live_update_health_command failed: {_said(outcome['health'])}")
    return {
        "passed": not reasons,
        "reasons": reasons,
        "failures": failures,
        "pauses_ms": measured,
        "updated": tried - len(failures),
        "tried": tried,
        "left_out": {outcome["host"]: left_out(outcome["left"]) for outcome in outcomes if outcome.get("left")},
    }


def left_out(guests: t.Iterable[str]) -> str:
    """What is to be said of guests that were not tried."""
    return f"left out, since an update may still go on on a lost host: {', '.join(guests)}"


def percentile(figures: t.Sequence[float], part: float) -> float:
    """The smallest figure that at least this part of them does not exceed.

    :param figures: in order, at least one.
    :param part: in percent.
    """
    return figures[max(0, -(-len(figures) * part // 100) - 1)]


def _is_unwell(outcome: Fact) -> bool:
    """Whether the command failed, or could not be asked."""
    health = outcome.get("health") or {"skipped": True}
    if health.get("unreachable") and outcome["found"].get("unreachable"):
        return False  # the host is lost, and its guests count as failures
    return not health.get("skipped") and health.get("rc") != 0


def _said(result: Fact) -> str:
    """The last line that a command printed, or why it could not be run."""
    lines = f"{result.get('stdout', '')}\n{result.get('stderr', '')}".strip().splitlines()
    return lines[-1] if lines else reason(result) if result.get("msg") else f"exit status {result.get('rc')}"


def pauses_of(outcome: Fact) -> list[tuple[float, str]]:
    """How long each guest that went stood still, milliseconds, and whose that is."""
    return [
        (guest["pause_ms"], f"{outcome['host']}: {guest['name']}")
        for guest in outcome["found"].get("guests", ())
        if guest["name"] in outcome["wanted"] and guest.get("up_to_date") and guest.get("pause_ms") is not None
    ]


def failures_of(outcome: Fact) -> list[dict[str, t.Any]]:
    """The guests of a host that did not go on: its name, theirs, and what is the matter."""
    guests = {guest["name"]: guest for guest in outcome["found"].get("guests", ())}
    failures = []
    for name in outcome["wanted"]:
        message = _trouble(outcome, name, guests.get(name))
        if message:
            failures.append({"host": outcome["host"], "guest": name, "message": message})
    return failures


def _trouble(outcome: Fact, name: str, guest: Fact | None) -> str | None:
    """What is the matter with a guest, or None."""
    if guest is None:
        return " ".join([*(outcome.get("messages") or ()), reason(outcome["found"])])
    if guest["failed"]:
        return str(guest["message"])
    if not guest["up_to_date"] or guest["phase"] not in ENDED:
        # What failed says whom it is about; what concerns the whole host does not.
        said = outcome.get("messages") or ()
        own = [text for text in said if _is_about(text, [name])]
        of_all = [text for text in said if not _is_about(text, outcome["wanted"])]
        still = f"It runs on QEMU {guest['version']} still; its update is {guest['phase']}."
        return [*own, *of_all, still][0]
    if guest["phase"] is not None and (guest["new"] or {}).get("pid") != guest["pid"]:
        return f"It was started anew since (process {guest['pid']}): it did not go on."
    if guest["run_state"] != "running" and (guest["run_state"], outcome.get("was", {}).get(name)) != ("paused",) * 2:
        return f"It runs on the new QEMU, and is {guest['run_state']}."
    return None


def _is_about(text: str, guests: t.Iterable[str]) -> bool:
    return any(re.search(rf"(^|\s){re.escape(name)}:", text) for name in guests)
