# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Whom a rolling update updates, in which order, and when it stops."""

from __future__ import annotations

import datetime
import time

import hypothesis
import pytest
from ansible.errors import AnsibleFilterError
from hypothesis import strategies

from ansible_collections.vmfleet.cpr.plugins.plugin_utils import fleet_gate, fleet_plan, fleet_settings, fleet_tables


def guest(name, **facts):
    return {
        "name": name, "failed": False, "error": None, "message": f"{name} can go", "phase": None, "up_to_date": False,
        "verdict": "ready", "reasons": [], "mode": "cpr-transfer", "version": "10.0.2", "wanted_version": "11.1.3",
        "pid": 1, "new": None, **facts,
    }  # fmt: skip


def host(name, *guests, labels=None, **check):
    return name, {"check": check or {"guests": list(guests)}, "labels": labels or {}}


def plan_of(hosts, **options):
    return fleet_plan.plan(dict(hosts), **options)


UNREACHABLE = {"unreachable": True, "msg": "Connection refused"}


def test_what_is_done_is_not_done_again_and_what_was_begun_is_ended():
    plan = plan_of(
        [
            host("a", guest("done", up_to_date=True, phase="finished"), guest("left")),
            host("b", guest("done", up_to_date=True)),
            host(
                "c",
                guest("half", verdict="blocked", phase="transferred"),
                guest("over", up_to_date=True, phase="switched"),
            ),
        ]
    )
    assert plan["pending"] == {"a": ["left"], "c": ["half", "over"]}
    assert plan["up_to_date"] == 2
    assert plan["obstacles"] == []


@pytest.mark.parametrize(
    ("item", "said"),
    [
        (host("a", guest("x", verdict="blocked", message="no way")), "a: x: no way"),
        (host("a", guest("x", failed=True, message="busy", error={"code": "monitor-busy"})), "a: x: busy"),
        (host("a", failed=True, msg="no binary"), "a: no binary"),
        (("a", {}), "a: It failed before it was checked."),
        (
            host(
                "a", guest("x", failed=True, message="no QEMU.", error={"code": "guest-not-found"}, phase="switching")
            ),
            "a: x: no QEMU. Its update was begun by an earlier run (switching): run vmfleet.cpr.live_update on this host,"
            " which ends that and says what became of it.",
        ),
    ],
)
def test_what_the_check_refuses_is_an_obstacle_unless_it_is_to_be_left_out(item, said):
    hosts = [item, host("b", guest("y"))]
    assert plan_of(hosts)["obstacles"] == [said]
    plan = plan_of(hosts, skip_blocked=True)
    assert plan["obstacles"] == [] and plan["pending"] == {"b": ["y"]}
    assert f"refused: {said}" in fleet_tables.summary(plan)


@pytest.mark.parametrize(("budget", "stops"), [(0, True), (1, False), ("24%", True), ("25%", False), ("0", True)])
def test_hosts_out_of_reach_count_against_the_budget(budget, stops):
    hosts = [host("gone", **UNREACHABLE), *(host(name, guest("x")) for name in "abc")]
    plan = plan_of(hosts, failure_budget=budget, skip_blocked=True)
    assert bool(plan["obstacles"]) == stops
    assert list(plan["pending"]) == ["a", "b", "c"]
    assert "gone" in " ".join(fleet_tables.status(dict(hosts)))


@pytest.mark.parametrize("budget", ["some", "-1", "5 %%", None])
def test_a_budget_that_is_none_is_refused(budget):
    with pytest.raises(AnsibleFilterError, match="live_update_failure_budget"):
        fleet_settings.allowed(budget, 10)


class Tagged(str):
    """As Ansible's strings are, of a type of their own."""


def test_a_query_sees_hosts_and_labels():
    hosts = [
        host(Tagged("a"), guest("x"), guest("y"), labels={"x": Tagged("db"), "y": [Tagged("web"), Tagged("db")]}),
        host("b", guest("x")),
    ]

    def pending(query):
        return plan_of(hosts, query=query)["pending"]

    assert pending("[?contains(labels, 'db')]") == {"a": ["x", "y"]}
    assert pending("[?host == 'b']") == {"b": ["x"]}
    assert pending("reverse(@)") == {"a": ["y", "x"], "b": ["x"]}
    assert pending("[]") == {"a": ["x", "y"], "b": ["x"]}
    assert pending("[?false]") == {}
    assert pending("[?contains(host, 'b')]") == {"b": ["x"]}
    assert pending("[?starts_with(labels[0] || '', 'w')]") == {"a": ["y"]}
    assert plan_of(hosts, query="[?name == 'y']")["left_out"] == 2


@pytest.mark.parametrize("query", ["[?", "[].name", "length(@)", "[].{host: host, name: 'z'}"])
def test_a_query_that_returns_no_guests_is_refused(query):
    with pytest.raises(AnsibleFilterError, match="live_update_guest_query"):
        plan_of([host("a", guest("x"))], query=query)


def test_a_query_for_what_not_every_guest_has_is_told_how():
    hosts = [host("a", guest("x"), guest("y", version=None))]
    with pytest.raises(AnsibleFilterError, match=r"\[\?version && starts_with"):
        plan_of(hosts, query="[?starts_with(version, '10.0.')]")
    assert plan_of(hosts, query="[?version && starts_with(version, '10.0.')]")["pending"] == {"a": ["x"]}


def test_a_qemu_without_a_name_is_said_and_stops_nothing():
    unnamed = {"name": "process 7", "failed": False, "message": "It has no -name.", "unnamed": True, "phase": None,
               "verdict": "blocked", "up_to_date": False, "mode": None,
               "reasons": [{"message": "It has no -name.", "code": "guest-unnamed"}]}  # fmt: skip
    hosts = [host("a", guest("x"), unnamed)]
    plan = plan_of(hosts)
    assert plan["pending"] == {"a": ["x"]} and plan["obstacles"] == []
    assert "a: It has no -name." in fleet_tables.summary(plan)
    assert (
        "process 7" in fleet_tables.status(dict(hosts))[2] and "[guest-unnamed]" in fleet_tables.status(dict(hosts))[2]
    )


@pytest.mark.parametrize("budget", ['{"p50": 100}', {"p50": None}, {"p95": 5}, {"p50": "much"}, [100]])
def test_a_pause_budget_that_is_none_is_refused_before_anything_changes(budget):
    with pytest.raises(AnsibleFilterError, match="live_update_pause_budget"):
        plan_of([host("a", guest("x"))], pause_budget=budget)


@pytest.mark.parametrize(
    ("number", "batches", "sizes"),
    [
        (20, [1, "10%", "25%"], [1, 2, 5, 5, 5, 2]),
        (3, [1, "10%", "25%"], [1, 1, 1]),
        (4, [1, 2], [1, 2, 1]),
        (5, ["100%"], [5]),
        (5, "2", [2, 2, 1]),
        (5, 2, [2, 2, 1]),
        (5, "40%", [2, 2, 1]),
        (0, [1], []),
    ],
)
def test_batches_are_those_of_serial(number, batches, sizes):
    hosts = [f"h{index}" for index in range(number)]
    found = fleet_settings.split(hosts, batches)
    assert [len(batch) for batch in found] == sizes
    assert sum(found, []) == hosts


@pytest.mark.parametrize("batches", [[-1], "all", ["10%", None], "1,2", [], [0], [1, 0], "0%"])
def test_batches_that_are_none_are_refused(batches):
    with pytest.raises(AnsibleFilterError, match="live_update_batches"):
        fleet_settings.split(["a"], batches)


@pytest.mark.parametrize("labels", [{"x": None}, {"x": 5}, {"x": [["a"]]}, '{"x": "db"}'])
def test_labels_that_are_none_are_refused(labels):
    with pytest.raises(AnsibleFilterError, match="live_update_labels"):
        plan_of([host("a", guest("x"), labels=labels)])


def test_a_label_of_a_guest_that_is_not_there_is_said():
    plan = plan_of([host("a", guest("x"), labels={"y": "db"})])
    assert "a: live_update_labels names y, which is not there" in fleet_tables.summary(plan)


def test_guests_with_a_label_of_a_lost_host_are_left_out():
    labels = {"x": "db", "y": ["web"]}
    plan = plan_of(
        [host(name, guest("x"), guest("y"), labels=labels if name != "c" else {"x": "web"}) for name in "abc"]
    )
    rounds = fleet_plan.rounds(plan, ["a", "b", "c"])
    assert rounds == [{"a": ["x", "y"], "c": ["y"]}, {"b": ["x", "y"]}, {"c": ["x"]}]
    assert fleet_plan.without(rounds, plan, ["a"]) == [{"c": ["y"]}, {"b": []}, {"c": []}]
    assert fleet_plan.without(rounds, plan, []) == rounds


def test_a_host_is_lost_as_long_as_an_update_may_go_on_there():
    outcomes = [
        outcome("a", wanted=["x"], found=UNREACHABLE),
        outcome("b", moved("x"), guest("y", phase="rolled-back"), guest("z", phase="switching"), wanted=["x", "y"]),
        outcome("c", guest("x", phase="switching")),
        outcome("d", guest("x", phase="switching", failed=True, message="monitor-busy")),
    ]
    assert fleet_gate.lost(outcomes) == ["a", "c", "d"]


def test_a_guest_that_was_left_out_for_a_lost_host_did_not_fail():
    plan = plan_of([host(name, guest("x"), guest("y"), labels={"y": "db"}) for name in "ab"])
    rounds = fleet_plan.rounds(plan, ["a", "b"])
    assert rounds == [{"a": ["x", "y"], "b": ["x"]}, {"b": ["y"]}]
    rounds = rounds[:1] + fleet_plan.without(rounds[1:], plan, ["a"])
    noted = [{"found": UNREACHABLE}, {"found": {"guests": [moved("x"), guest("y", run_state="running")]}}]
    outcomes = fleet_gate.outcomes(noted, ["a", "b"], plan, rounds)
    verdict = fleet_gate.gate(outcomes, ["a", "b"], failure_budget=2)
    assert (verdict["passed"], verdict["updated"], verdict["tried"]) == (True, 1, 3)
    assert "left out, since an update may still go on on a lost host: y" in fleet_tables.report(plan, outcomes)[2]


def test_the_health_of_a_lost_host_is_its_failure_only():
    lost = outcome("a", wanted=["x"], found=UNREACHABLE, health=UNREACHABLE)
    assert fleet_gate.gate([lost], ["a"], failure_budget=1)["reasons"] == []
    assert fleet_gate.gate([lost], ["a"])["reasons"] == [
        "1 failed, and live_update_failure_budget allows 0 of 1 guests."
    ]


LABELS = strategies.lists(strategies.sampled_from("abc"), max_size=2)


@hypothesis.given(strategies.lists(strategies.lists(LABELS, max_size=3), max_size=4))
def test_no_round_has_a_label_on_two_hosts_and_nobody_is_forgotten(labels):
    hosts = [
        host(f"h{number}", *(guest(f"g{index}") for index in range(len(of_guests))),
             labels={f"g{index}": of_guest for index, of_guest in enumerate(of_guests)})
        for number, of_guests in enumerate(labels)
    ]  # fmt: skip
    plan = plan_of(hosts)
    rounds = fleet_plan.rounds(plan, list(plan["pending"]))
    done = [(name, item) for found in rounds for name, items in found.items() for item in items]
    assert sorted(done) == sorted((name, item) for name, items in plan["pending"].items() for item in items)
    for found in rounds:
        where: dict[str, str] = {}
        for name, items in found.items():
            for label in {label for item in items for label in plan["labels"][name][item]}:
                assert where.setdefault(label, name) == name
    if not any(sum(labels, [])):
        assert len(rounds) <= 1


def outcome(name, *guests, wanted=None, **more):
    return {
        "host": name, "wanted": wanted or [item["name"] for item in guests], "found": {"guests": list(guests)},
        "health": {"skipped": True}, "messages": [], "was": {}, "left": [], **more,
    }  # fmt: skip


def moved(name, pause=5.0, **facts):
    return guest(name, up_to_date=True, phase="finished", pause_ms=pause, run_state="running", new={"pid": 1}, **facts)


def test_a_batch_in_which_all_is_well_passes():
    verdict = fleet_gate.gate(
        [outcome("a", moved("x"), moved("y", None))], ["a"], pause_budget={"p50": 5, "largest": 5}
    )
    assert verdict["passed"] and verdict["reasons"] == [] and verdict["failures"] == []
    assert (verdict["updated"], verdict["tried"]) == (2, 2)


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (
            guest("x", run_state="running", phase="rolled-back"),
            "It runs on QEMU 10.0.2 still; its update is rolled-back.",
        ),
        (moved("x") | {"phase": "switched"}, "its update is switched"),
        (moved("x") | {"run_state": "guest-panicked"}, "guest-panicked"),
        (moved("x") | {"run_state": "paused"}, "paused"),
        (moved("x") | {"run_state": None}, "None"),
        (moved("x") | {"pid": 2}, "It was started anew since (process 2): it did not go on."),
        (guest("x", up_to_date=True, phase="rolled-back", run_state="running"), "started anew"),
        (moved("other"), "It did not answer."),
        (guest("x", failed=True, message="monitor-busy"), "monitor-busy"),
    ],
)
def test_a_guest_that_is_not_well_on_the_new_qemu_is_a_failure(found, said):
    outcomes = [outcome("a", found, wanted=["x"])]
    verdict = fleet_gate.gate(outcomes, ["a"])
    assert not verdict["passed"]
    assert [failure["guest"] for failure in verdict["failures"]] == ["x"]
    assert said in verdict["failures"][0]["message"]
    assert fleet_gate.gate(outcomes, ["a"], failure_budget=1)["passed"]
    assert fleet_gate.gate(outcomes, ["a"], failure_budget="100%")["passed"]
    assert not fleet_gate.gate(outcomes, ["a"], failure_budget="99%")["passed"]


def test_a_guest_that_was_paused_may_be_so():
    paused = moved("x") | {"run_state": "paused"}
    assert fleet_gate.gate([outcome("a", paused, was={"x": "paused"})], ["a"])["passed"]


def test_a_host_of_which_nothing_was_noted_is_a_failure():
    plan = plan_of([host("a", guest("x")), host("b", guest("y"))])
    noted = {"found": {"guests": [moved("x")]}}
    outcomes = fleet_gate.outcomes([noted, {}], ["a", "b"], plan, fleet_plan.rounds(plan, ["a", "b"]))
    verdict = fleet_gate.gate(outcomes, ["a", "b"])
    assert not verdict["passed"] and (verdict["updated"], verdict["tried"]) == (1, 2)
    assert [failure["host"] for failure in verdict["failures"]] == ["b"]
    assert "not begun" not in " ".join(fleet_tables.report(plan, outcomes))


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        (["y: other", "x: own"], "x: own"),
        (["y: other"], "It runs on QEMU 10.0.2 still; its update is None."),
        (["web-x: other"], "web-x: other"),
        (["The host is broken."], "The host is broken."),
    ],
)
def test_what_failed_on_the_host_is_said(messages, said):
    guests = [guest("x", run_state="running"), moved("y")]
    verdict = fleet_gate.gate([outcome("a", *guests, messages=messages)], ["a"])
    assert verdict["failures"][0]["message"] == said


def test_why_a_guest_failed_is_said_and_a_host_that_went_away_counts():
    outcomes = [
        outcome("a", guest("x", run_state="running"), messages=["x: too slow [pause-limit]"]),
        outcome("b", wanted=["y", "z"], found=UNREACHABLE),
    ]
    verdict = fleet_gate.gate(outcomes, ["b"])
    assert [failure["message"] for failure in verdict["failures"]] == [
        "x: too slow [pause-limit]", "Connection refused", "Connection refused",
    ]  # fmt: skip
    plan = plan_of([host("a", guest("x")), host("b", guest("y"), guest("z")), host("c", guest("w"))])
    assert [line.split()[:4] for line in fleet_tables.report(plan, outcomes)[1:]] == [
        ["a", "0", "1", "0"], ["b", "0", "2", "0"], ["c", "0", "0", "1"],
    ]  # fmt: skip


def test_guests_that_were_left_out_are_named_though_nothing_failed():
    """A host was lost and came back by the time it was looked at; a guest of the other one has the label of one there."""
    labels = {"x": "db", "y": "db"}
    plan = plan_of([host("a", guest("x"), labels=labels), host("b", guest("y"), guest("z"), labels=labels)])
    rounds = fleet_plan.without(fleet_plan.rounds(plan, ["a", "b"]), plan, ["a"])
    rounds[0]["a"] = ["x"]
    noted = [{"found": {"guests": [moved("x")]}}, {"found": {"guests": [moved("z")]}}]
    verdict = fleet_gate.gate(fleet_gate.outcomes(noted, ["a", "b"], plan, rounds), ["a", "b"])
    assert verdict["passed"]
    assert verdict["left_out"] == {"b": "left out, since an update may still go on on a lost host: y"}


def test_an_update_that_was_cut_off_is_named_though_the_query_leaves_it_out():
    plan = plan_of([host("a", guest("half", phase="transferred"), guest("x"))], query="[?name == 'x']")
    assert plan["pending"] == {"a": ["x"]}
    (note,) = plan["notes"]
    assert note.startswith("a: half: an earlier run began its update (transferred)")


def test_only_this_batch_s_pauses_and_health_count():
    outcomes = [
        outcome("a", moved("x", 900.0), health={"rc": 1}),
        outcome("b", *(moved(f"g{number}", float(number)) for number in range(1, 101))),
    ]
    budget = {"p50": 50, "p99": 99, "largest": 100}
    verdict = fleet_gate.gate(outcomes, ["b"], pause_budget=budget)
    assert verdict["passed"]
    assert verdict["pauses_ms"] == {"p50": 50.0, "p99": 99.0, "largest": 100.0, "slowest": "b: g100"}
    for name in budget:
        verdict = fleet_gate.gate(outcomes, ["b"], pause_budget={name: budget[name] - 1})
        assert len(verdict["reasons"]) == 1 and f"The {name} of" in verdict["reasons"][0]
    verdict = fleet_gate.gate(outcomes, ["a"], pause_budget=budget)
    assert len(verdict["reasons"]) == 4 and "health" in verdict["reasons"][-1]


@pytest.mark.parametrize(
    ("health", "said"),
    [
        ({"rc": 3, "stdout": "one\ntwo", "stderr": ""}, "two"),
        ({"rc": 3, "stdout": "", "stderr": ""}, "exit status 3"),
        (UNREACHABLE, "Connection refused"),
        ({"msg": "Missing sudo password"}, "Missing sudo password"),
    ],
)
def test_a_host_that_is_not_well_says_so(health, said):
    verdict = fleet_gate.gate([outcome("a", moved("x"), health=health)], ["a"])
    assert verdict["reasons"] == [f"a: live_update_health_command failed: {said}"]


def test_a_window_ends_at_the_nearest_such_time():
    begun = datetime.datetime(2026, 11, 23, 23, 0)

    def ends(until):
        return datetime.datetime.fromtimestamp(fleet_settings.deadline(until, begun.timestamp()))

    assert ends("23:30") == datetime.datetime(2026, 11, 23, 23, 30)
    assert ends("5:30") == datetime.datetime(2026, 11, 24, 5, 30)
    assert ends("22:00") == datetime.datetime(2026, 11, 23, 22, 0)  # it begins late
    assert ends("2026-11-25T01:00") == datetime.datetime(2026, 11, 25, 1, 0)
    assert fleet_settings.deadline("2026-11-25T01:00+00:00", 0) == 1795568400
    assert fleet_settings.deadline("", time.time()) is None


@pytest.mark.parametrize("until", ["25:00", "tomorrow", "5", 1350, "2026-11-24"])
def test_a_time_that_is_none_is_refused(until):
    with pytest.raises(AnsibleFilterError, match="live_update_until"):
        fleet_settings.deadline(until, 0)


def test_the_table_says_of_every_guest_what_is_the_matter():
    reasons = [{"severity": "blocker", "message": "Has a pipe.", "code": "pipe", "hint": ""}]
    lines = fleet_tables.status(
        dict([
            host(
                "a", guest("x"), guest("yy", up_to_date=True), guest("z", verdict="blocked", reasons=reasons, mode=None)
            ),
            host("b", guest("w", verdict="warning", reasons=reasons), guest("v", phase="set-up")),
            host("c", guests=[]),
            host("d", failed=True, msg="no binary"),
            ("e", {}),
        ])
    )  # fmt: skip
    assert lines[0].split() == ["host", "guest", "runs", "wanted", "state"]
    assert lines[1:4] == [
        "a     x      10.0.2  11.1.3  ready, by cpr-transfer",
        "a     yy     10.0.2  11.1.3  up to date",
        "a     z      10.0.2  11.1.3  Has a pipe. [pipe]",
    ]
    assert [line.split("  ")[-1].strip() for line in lines[4:]] == [
        "ready, by cpr-transfer, with a warning: Has a pipe. [pipe]", "begun: its update is set-up", "no guests",
        "no binary", "It failed before it was checked.",
    ]  # fmt: skip
