# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Decisions about a fleet: whom to update, in which order, and whether to go on.

Pure functions on what the modules returned of each host. Private to the collection.
"""

from __future__ import annotations

import datetime
import json
import re
import typing as t

from ansible.errors import AnsibleFilterError
from ansible.utils.helpers import pct_to_int

from ansible_collections.vmfleet.cpr.plugins.module_utils.journal import ENDED

try:
    import jmespath
except ImportError:
    jmespath = None

Fact = t.Mapping[str, t.Any]


def plan(
    hosts: t.Mapping[str, Fact],
    *,
    query: str = "",
    batches: t.Any = 1,
    failure_budget: t.Any = 0,
    pause_budget: t.Any = None,
    skip_blocked: bool = False,
) -> dict[str, t.Any]:
    """Whom to update, from what the check of every host returned.

    :param hosts: of each by its name the result of its ``check`` and the ``labels`` of its guests; nothing of one that
        failed before it could be checked.
    :param query: a JMESPath expression over the list of all guests that returns some of them; all if empty.
    :param batches: hosts per batch, as Ansible's ``serial`` has them.
    :param failure_budget: how many hosts, or which part of them (``"5%"``), may be out of reach.
    :param pause_budget: as for `gate`; only looked at, so that a mistake in it is seen before anything has changed.
    :param skip_blocked: whether guests and hosts that the check refuses are left out.
    :returns: ``pending``, the guests of each host that are to be updated, with their ``labels`` and ``run_states``;
        ``batches`` of hosts; the numbers ``up_to_date`` and ``left_out``; ``refused`` and ``unreachable``, a
        sentence each; ``obstacles``, the sentences for which nothing may begin; ``notes`` on what is not looked at.
    :raises AnsibleFilterError: the query, the batches, a label or a budget makes no sense.
    """
    _limits(pause_budget)
    hosts = {host: item or {"check": {"msg": "It failed before it was checked."}} for host, item in hosts.items()}
    unreachable = {host: _reason(item["check"]) for host, item in hosts.items() if item["check"].get("unreachable")}
    refused: list[dict[str, t.Any]] = []
    guests: list[dict[str, t.Any]] = []
    notes = []
    for host, item in hosts.items():
        check = item["check"]
        if "guests" not in check:
            if host not in unreachable:
                refused.append({"host": host, "guest": None, "message": _reason(check)})
            continue
        of_each = _mapping("live_update_labels", item.get("labels"))
        labels = {name: _labels(name, value) for name, value in of_each.items()}
        named = [guest for guest in check["guests"] if not guest.get("unnamed")]
        guests += [{**guest, "host": host, "labels": labels.pop(guest["name"], [])} for guest in named]
        notes += [f"{host}: {guest['message']}" for guest in check["guests"] if guest.get("unnamed")]
        notes += [f"{host}: live_update_labels names {name}, which is not there" for name in labels]
    chosen = _query(guests, query)
    pending: dict[str, list[dict[str, t.Any]]] = {host: [] for host in hosts}
    up_to_date = 0
    for guest in chosen:
        begun = guest.get("phase") not in ENDED
        gone = guest["failed"] and guest["error"]["code"] == "guest-not-found"
        if gone and begun:
            guest["message"] += (
                f" Its update was begun by an earlier run ({guest['phase']}): run vmfleet.cpr.live_update on this host,"
                " which ends that and says what became of it."
            )
        if guest.get("up_to_date") and not begun:
            up_to_date += 1
        elif gone or (guest["failed"] or guest.get("verdict") == "blocked") and not begun:
            refused.append({"host": guest["host"], "guest": guest["name"], "message": guest["message"]})
        else:
            pending[guest["host"]].append(guest)
    # Batches go by the inventory's order whatever the order of the query's answer is.
    pending = {host: found for host, found in pending.items() if found}
    obstacles = [] if skip_blocked else [_sentence(item) for item in refused]
    if len(unreachable) > allowed(failure_budget, len(hosts)):
        obstacles += [f"{host}: {why}" for host, why in unreachable.items()]
    return {
        "pending": {host: [guest["name"] for guest in found] for host, found in pending.items()},
        "labels": {host: {guest["name"]: guest["labels"] for guest in found} for host, found in pending.items()},
        "run_states": {
            host: {guest["name"]: guest.get("run_state") for guest in found} for host, found in pending.items()
        },
        "batches": split(list(pending), batches),
        "up_to_date": up_to_date,
        "left_out": len(guests) - len(chosen),
        "refused": refused,
        "unreachable": unreachable,
        "obstacles": obstacles,
        "notes": notes,
    }


def summary(plan: Fact) -> list[str]:
    """A plan in lines for whoever watches.

    :param plan: as `plan` returned it.
    """
    lines = []
    for number, hosts in enumerate(plan["batches"], 1):
        guests = [f"{host} ({', '.join(plan['pending'][host])})" for host in hosts]
        lines.append(f"batch {number}: {', '.join(guests)}")
    lines += [f"up to date: {plan['up_to_date']} guests"]
    if plan["left_out"]:
        lines.append(f"left out by live_update_guest_query: {plan['left_out']} guests")
    lines += plan["notes"]
    lines += [f"refused: {_sentence(item)}" for item in plan["refused"]]
    lines += [f"unreachable: {host}: {why}" for host, why in plan["unreachable"].items()]
    return lines


def _labels(guest: str, value: t.Any) -> list[str]:
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not all(isinstance(item, str) for item in values):
        raise AnsibleFilterError(
            f"live_update_labels has {value!r} for {guest}, and must have a label or a list of labels."
        )
    return [str.__str__(item) for item in values]


def _mapping(name: str, value: t.Any) -> Fact:
    if value is not None and not isinstance(value, t.Mapping):
        raise AnsibleFilterError(
            f"{name} is {value!r}, and must be a dictionary. On the command line that is -e '{{\"{name}\": {{…}}}}'."
        )
    return value or {}


def _limits(pause_budget: t.Any) -> dict[str, float]:
    try:
        found = {name: float(most) for name, most in _mapping("live_update_pause_budget", pause_budget).items()}
    except (TypeError, ValueError):
        found = {"": 0.0}
    if not found.keys() <= {"p50", "p99", "largest"}:
        raise AnsibleFilterError(
            f"live_update_pause_budget is {pause_budget}, and has milliseconds for p50, p99 and largest, or some of these."
        )
    return found


def _reason(result: Fact) -> str:
    return str(result.get("msg") or "It did not answer.")


def _sentence(item: Fact) -> str:
    return ": ".join(str(item[key]) for key in ("host", "guest", "message") if item[key])


def _query(guests: list[dict[str, t.Any]], query: str) -> list[dict[str, t.Any]]:
    if not query:
        return guests
    if jmespath is None:
        raise AnsibleFilterError("live_update_guest_query needs jmespath on the control node: pip install jmespath.")
    try:
        # Its functions take no strings of Ansible's, which are of a type of their own.
        answer = jmespath.search(query, json.loads(json.dumps(guests)))
    except jmespath.exceptions.JMESPathError as error:
        hint = ""
        if isinstance(error, jmespath.exceptions.JMESPathTypeError) and error.actual_type == "null":
            hint = (
                " Not every guest has that value: ask for it first, like [?version && starts_with(version, '10.0.')]."
            )
        raise AnsibleFilterError(f"live_update_guest_query can't be used: {error}{hint}") from error
    by_key = {(guest["host"], guest["name"]): guest for guest in guests}
    try:
        keys = dict.fromkeys((item["host"], item["name"]) for item in answer)
        return [by_key[key] for key in keys]
    except (KeyError, TypeError):
        raise AnsibleFilterError(
            f"live_update_guest_query must return guests, and returned {str(answer)[:100]}."
            " It filters a list: [?starts_with(name, 'web')]."
        ) from None


def split(hosts: list[str], batches: t.Any) -> list[list[str]]:
    """The hosts in batches, as Ansible's ``serial`` makes them; a percentage is of all of them.

    :raises AnsibleFilterError: a size is neither a number nor a percentage.
    """
    sizes = batches if isinstance(batches, list) else [batches]
    for size in sizes:
        if not re.fullmatch(r"\d+%?", str(size).strip()):
            raise AnsibleFilterError(
                f"live_update_batches has {size}, and must have numbers of hosts or percentages like 10%."
            )
    found: list[list[str]] = []
    rest = list(hosts)
    while rest:
        size = str(sizes[min(len(found), len(sizes) - 1)]).strip() if sizes else "0"
        number = pct_to_int(size, len(hosts)) or len(rest)
        found.append(rest[:number])
        rest = rest[number:]
    return found


def rounds(plan: Fact, hosts: t.Sequence[str]) -> list[dict[str, list[str]]]:
    """A batch's guests, so that none with the same label are updated at once on different hosts.

    :param plan: as `plan` returned it.
    :param hosts: the batch.
    :returns: one after another, the guests of each host that can be updated side by side.
    """
    found: list[dict[str, list[str]]] = []
    taken: list[dict[str, str]] = []
    for host in hosts:
        for guest in plan["pending"].get(host, ()):
            labels = plan["labels"][host][guest]
            number = 0
            while number < len(taken) and any(taken[number].get(label, host) != host for label in labels):
                number += 1
            if number == len(taken):
                found.append({})
                taken.append({})
            found[number].setdefault(host, []).append(guest)
            taken[number].update(dict.fromkeys(labels, host))
    return found


def without(rounds: t.Sequence[t.Mapping[str, list[str]]], plan: Fact, lost: t.Sequence[str]) -> list[dict[str, t.Any]]:
    """The rounds without the lost hosts, and without guests that have a label of one of theirs.

    :param rounds: as `rounds` returned them.
    :param plan: as `plan` returned it.
    :param lost: hosts on which an update may still go on, though nobody waits for it.
    """
    taken = {label for host in lost for labels in plan["labels"].get(host, {}).values() for label in labels}
    return [
        {
            host: [guest for guest in guests if taken.isdisjoint(plan["labels"][host][guest])]
            for host, guests in found.items()
            if host not in lost
        }
        for found in rounds
    ]


def outcomes(
    noted: t.Sequence[Fact], hosts: t.Sequence[str], plan: Fact, rounds: t.Sequence[t.Mapping[str, list[str]]]
) -> list[dict[str, t.Any]]:
    """What became of every host of a batch.

    :param noted: what was noted of each; nothing of one that failed before.
    :param rounds: what was tried.
    """
    return [
        {"found": {"msg": "It failed before its guests could be looked at."}, **item, "host": host,
         "wanted": [guest for found in rounds for guest in found.get(host, ())], "was": plan["run_states"][host]}
        for host, item in zip(hosts, noted)
    ]  # fmt: skip


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
        ``pauses_ms`` with ``p50``, ``p99``, ``largest`` and who had it, ``updated`` and ``tried`` guests.
    """
    failures = [failure for outcome in outcomes for failure in _failures(outcome)]
    tried = sum(len(outcome["wanted"]) for outcome in outcomes)
    pauses = sorted(pause for outcome in outcomes if outcome["host"] in batch for pause in _pauses(outcome))
    measured: dict[str, t.Any] = {}
    if pauses:
        figures = [pause for pause, dummy in pauses]
        measured = {name: percentile(figures, part) for name, part in (("p50", 50), ("p99", 99), ("largest", 100))}
        measured["slowest"] = pauses[-1][1]
    reasons = []
    limit = allowed(failure_budget, tried)
    if len(failures) > limit:
        reasons.append(f"{len(failures)} failed, and live_update_failure_budget allows {limit} of {tried} guests.")
    for name, most in _limits(pause_budget).items():
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
    }


def _pauses(outcome: Fact) -> list[tuple[float, str]]:
    """How long each guest that went stood still, milliseconds, and whose that is."""
    return [
        (guest["pause_ms"], f"{outcome['host']}: {guest['name']}")
        for guest in outcome["found"].get("guests", ())
        if guest["name"] in outcome["wanted"] and guest.get("up_to_date") and guest.get("pause_ms") is not None
    ]


def _is_unwell(outcome: Fact) -> bool:
    """Whether the command failed, or could not be asked."""
    health = outcome.get("health") or {"skipped": True}
    if health.get("unreachable") and outcome["found"].get("unreachable"):
        return False  # the host is lost, and its guests count as failures
    return not health.get("skipped") and health.get("rc") != 0


def _said(result: Fact) -> str:
    """The last line that a command printed, or why it could not be run."""
    lines = f"{result.get('stdout', '')}\n{result.get('stderr', '')}".strip().splitlines()
    return lines[-1] if lines else _reason(result) if result.get("msg") else f"exit status {result.get('rc')}"


def _failures(outcome: Fact) -> list[dict[str, t.Any]]:
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
        return " ".join([*(outcome.get("messages") or ()), _reason(outcome["found"])])
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


def allowed(budget: t.Any, whole: int) -> int:
    """How many failures a budget allows.

    :param budget: a number, or a percentage like ``"5%"``.
    :param whole: what a percentage is of.
    :raises AnsibleFilterError: it is neither.
    """
    text = str(budget).strip()
    match = re.fullmatch(r"(\d+(?:\.\d+)?)%", text)
    if match:
        return int(float(match.group(1)) * whole / 100)
    if not text.isdigit():
        raise AnsibleFilterError(f"live_update_failure_budget is {text}, and must be a number or a percentage like 5%.")
    return int(text)


def percentile(figures: t.Sequence[float], part: float) -> float:
    """The smallest figure that at least this part of them does not exceed.

    :param figures: in order, at least one.
    :param part: in percent.
    """
    return figures[max(0, -(-len(figures) * part // 100) - 1)]


def deadline(until: str, begun: float) -> float | None:
    """After when no batch begins, in seconds since 1970; None for ever.

    :param until: ``HH:MM``, the time nearest to the beginning at which this control node's clock shows that, so that a
        run that begins late has no time left, and not a day; or a date and time in ISO 8601, on this control
        node's clock where it has no offset. Empty for ever.
    :param begun: when the run began, in the same.
    :raises AnsibleFilterError: it is neither.
    """
    text = str(until).strip()
    if not text:
        return None
    start = datetime.datetime.fromtimestamp(begun)
    try:
        if re.fullmatch(r"\d{1,2}:\d{2}", text):
            hour, minute = map(int, text.split(":"))
            found = start.replace(hour=hour, minute=minute, second=0, microsecond=0)
            if found <= start - datetime.timedelta(hours=12):
                found += datetime.timedelta(days=1)
            elif found > start + datetime.timedelta(hours=12):
                found -= datetime.timedelta(days=1)
            return found.timestamp()
        return datetime.datetime.fromisoformat(text).timestamp()
    except ValueError:
        raise AnsibleFilterError(
            f"live_update_until is {text}, and must be a time in quotes, like '05:30' or '2026-11-24T05:30'."
        ) from None


def table(rows: t.Sequence[t.Sequence[t.Any]], head: t.Sequence[str]) -> list[str]:
    """Rows as lines whose columns stand below each other."""
    lines = [[str("" if cell is None else cell) for cell in row] for row in (head, *rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines]


def status(hosts: t.Mapping[str, Fact]) -> list[str]:
    """A table of every guest: its host, its name, the version that it runs and the wanted one, whether it is ready.

    :param hosts: as for `plan`.
    """
    rows: list[list[t.Any]] = []
    for host, item in hosts.items():
        check = item["check"] if item else {"msg": "It failed before it was checked."}
        if "guests" not in check:
            how = "unreachable: " if check.get("unreachable") else ""
            rows.append([host, "-", "-", "-", how + _reason(check)])
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

    :param plan: as `plan` returned it.
    :param outcomes: as for `gate`.
    """
    rows: list[list[t.Any]] = []
    tried = {outcome["host"]: outcome for outcome in outcomes}
    for host, pending in plan["pending"].items():
        if host not in tried:
            rows.append([host, 0, 0, len(pending), "", "not begun"])
            continue
        names = tried[host]["wanted"]
        left = [name for name in pending if name not in names]
        failed = [failure["guest"] for failure in _failures(tried[host])]
        pauses = [pause for pause, dummy in _pauses(tried[host])]
        longest = f"{max(pauses):.1f}" if pauses else ""
        said = [f"failed: {', '.join(failed)}"] if failed else []
        said += [f"left out, since an update may still go on on a lost host: {', '.join(left)}"] if left else []
        rows.append([host, len(names) - len(failed), len(failed), len(left), longest, "; ".join(said)])
    rows += [[host, 0, 0, "?", "", f"unreachable: {why}"] for host, why in plan["unreachable"].items()]
    rows += [
        [item["host"], 0, 0, 1 if item["guest"] else "?", "", _sentence({**item, "host": None})]
        for item in plan["refused"]
    ]
    return table(rows, ["host", "updated", "failed", "left", "longest pause, ms", ""])
