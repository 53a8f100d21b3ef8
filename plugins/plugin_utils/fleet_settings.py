# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the operator of a rolling update set: read, or refused with what it must look like.

Pure functions. Private to the collection.
"""

from __future__ import annotations

import datetime
import json
import re
import typing as t

from ansible.errors import AnsibleFilterError
from ansible.utils.helpers import pct_to_int

try:
    import jmespath
except ImportError:
    jmespath = None

Fact = t.Mapping[str, t.Any]


def _mapping(name: str, value: t.Any) -> Fact:
    if value is not None and not isinstance(value, t.Mapping):
        raise AnsibleFilterError(
            f"{name} is {value!r}, and must be a dictionary. On the command line that is -e '{{\"{name}\": {{…}}}}'."
        )
    return value or {}


def labels_of(value: t.Any) -> dict[str, list[str]]:
    """The labels of a host's guests.

    :param value: of each guest by its name one label or a list of them.
    :raises AnsibleFilterError: it is something else.
    """
    found = {}
    for guest, of_guest in _mapping("live_update_labels", value).items():
        values = [of_guest] if isinstance(of_guest, str) else of_guest
        if not isinstance(values, list) or not all(isinstance(item, str) for item in values):
            raise AnsibleFilterError(
                f"live_update_labels has {of_guest!r} for {guest}, and must have a label or a list of labels."
            )
        found[guest] = [str.__str__(item) for item in values]
    return found


def select(guests: list[dict[str, t.Any]], query: str) -> list[dict[str, t.Any]]:
    """The guests that a JMESPath expression returns; all if it is empty.

    :raises AnsibleFilterError: it is none, or returns something else than guests.
    """
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
    for size in sizes or ["nothing"]:
        if not re.fullmatch(r"0*[1-9]\d*%?", str(size).strip()):
            raise AnsibleFilterError(
                f"live_update_batches has {size}, and must have numbers of hosts or percentages like 10%."
            )
    found: list[list[str]] = []
    rest = list(hosts)
    while rest:
        number = pct_to_int(str(sizes[min(len(found), len(sizes) - 1)]).strip(), len(hosts))
        found.append(rest[:number])
        rest = rest[number:]
    return found


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


def pause_limits(pause_budget: t.Any) -> dict[str, float]:
    """Milliseconds by ``p50``, ``p99`` and ``largest``, or some of these.

    :raises AnsibleFilterError: it is something else.
    """
    try:
        found = {name: float(most) for name, most in _mapping("live_update_pause_budget", pause_budget).items()}
    except (TypeError, ValueError):
        found = {"": 0.0}
    if not found.keys() <= {"p50", "p99", "largest"}:
        raise AnsibleFilterError(
            f"live_update_pause_budget is {pause_budget}, and has milliseconds for p50, p99 and largest, or some of these."
        )
    return found


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
        if len(text) <= len("2026-11-24"):
            raise ValueError("a date is not enough: it would be over when it begins")
        return datetime.datetime.fromisoformat(text).timestamp()
    except ValueError:
        raise AnsibleFilterError(
            f"live_update_until is {text}, and must be a time in quotes, like '05:30' or '2026-11-24T05:30'."
        ) from None
