# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Decides whom a rolling update updates, in which order, and who side by side.

Pure functions on what the check of every host returned. Private to the collection.
"""

from __future__ import annotations

import typing as t

from ansible_collections.vmfleet.cpr.plugins.module_utils.journal import ENDED
from ansible_collections.vmfleet.cpr.plugins.plugin_utils.fleet_settings import (
    Fact,
    allowed,
    labels_of,
    pause_limits,
    select,
    split,
)


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
    :param pause_budget: as for `fleet_gate.gate`; only looked at, so that a mistake in it is seen early.
    :param skip_blocked: whether guests and hosts that the check refuses are left out.
    :returns: ``pending``, the guests of each host that are to be updated, with their ``labels`` and ``run_states``;
        ``batches`` of hosts; the numbers ``up_to_date`` and ``left_out``; ``refused`` and ``unreachable``, a
        sentence each; ``obstacles``, the sentences for which nothing may begin; ``notes`` on what is not looked at.
    :raises AnsibleFilterError: the query, the batches, a label or a budget makes no sense.
    """
    pause_limits(pause_budget)
    hosts = {host: item or {"check": {"msg": "It failed before it was checked."}} for host, item in hosts.items()}
    unreachable = {host: reason(item["check"]) for host, item in hosts.items() if item["check"].get("unreachable")}
    refused: list[dict[str, t.Any]] = []
    guests: list[dict[str, t.Any]] = []
    notes = []
    for host, item in hosts.items():
        check = item["check"]
        if "guests" not in check:
            if host not in unreachable:
                refused.append({"host": host, "guest": None, "message": reason(check)})
            continue
        labels = labels_of(item.get("labels"))
        named = [guest for guest in check["guests"] if not guest.get("unnamed")]
        guests += [{**guest, "host": host, "labels": labels.pop(guest["name"], [])} for guest in named]
        notes += [f"{host}: {guest['message']}" for guest in check["guests"] if guest.get("unnamed")]
        notes += [f"{host}: live_update_labels names {name}, which is not there" for name in labels]
    chosen = select(guests, query)
    notes += [
        f"{guest['host']}: {guest['name']}: an earlier run began its update ({guest['phase']}), and"
        " live_update_guest_query leaves it out"
        for guest in guests
        if guest.get("phase") not in ENDED and guest not in chosen
    ]
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
    obstacles = [] if skip_blocked else [sentence(item) for item in refused]
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


def reason(result: Fact) -> str:
    """Why a host has no result."""
    return str(result.get("msg") or "It did not answer.")


def sentence(item: Fact) -> str:
    """Whom it is about, and what is said of it."""
    return ": ".join(str(item[key]) for key in ("host", "guest", "message") if item[key])
