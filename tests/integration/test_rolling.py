# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A fleet, batch after batch. Its hosts are this machine under several names, each with guests of its own."""

from __future__ import annotations

import datetime
import json
import os
import shlex

import ansible_runner
import pytest

from tests.guests.ansible import HYPERVISOR_PYTHON, playbook
from tests.guests.guest import NEW_SUITE, OLD_SUITE, TOP, qemu

OUT_OF_REACH = {"ansible_connection": "ssh", "ansible_host": "127.0.0.1", "ansible_port": 1}


class Fleet:
    """Hosts and their guests."""

    def __init__(self, place, start):
        self.place = place
        self.start = start
        self.inventory = {}
        self.guests = {}

    def host(self, name, *guests, busy=(), **variables):
        """A host with guests of these names; the busy ones' RAM has to be copied, and changes all the time."""
        for guest in guests:
            options = {"memory": None, "busy": True} if guest in busy else {}
            self.guests[guest] = self.start(guest, accelerator="tcg", suite=OLD_SUITE, **options)
        self.inventory[name] = {
            "ansible_connection": "local",
            "ansible_python_interpreter": HYPERVISOR_PYTHON,
            "live_update_guests": list(guests),
            "live_update_state_directory": str(self.place / name),
            **variables,
        }

    def run(self, *words, name="rolling_update", **variables):
        """Run a playbook of the fleet."""
        values = {"qemu_binary": qemu(NEW_SUITE), "soak": 0, **variables}
        run = playbook(name, self.inventory, {f"live_update_{key}": value for key, value in values.items()}, *words)
        print(run.stdout)
        return run

    def updated(self):
        """The guests that run on the new QEMU; all of them run."""
        for guest in self.guests.values():
            guest.wait_for_ticks()
            guest.check_continuity()
        return {name for name, guest in self.guests.items() if guest.version().startswith("11.1.")}

    def updated_but(self, *names):
        """The same of all but these guests, of which nothing is known."""
        guests, self.guests = self.guests, {name: guest for name, guest in self.guests.items() if name not in names}
        try:
            return self.updated()
        finally:
            self.guests = guests

    def record(self, host, guest):
        """A guest's update record."""
        return json.loads((self.place / host / guest / "update.json").read_text())


@pytest.fixture(name="fleet")
def fixture_fleet(tmp_path, start):
    return Fleet(tmp_path / "hosts", start)


def recap(run):
    """What the end of a run says of each host."""
    lines = run.stdout.partition("PLAY RECAP")[2].splitlines()[1:]
    found = {}
    for line in lines:
        name, colon, words = line.partition(" : ")
        if colon:
            found[name.strip()] = {key: int(value) for key, value in (word.split("=") for word in words.split())}
    return found


def test_a_fleet_is_updated_batch_by_batch_and_once(fleet):
    for number in range(4):
        fleet.host(f"hv{number}", f"web{number}", f"db{number}")
    status = fleet.run(name="status")
    assert status.returncode == 0
    assert "web0   10.0.2  11.1.3  ready, by cpr-transfer" in status.stdout
    assert fleet.updated() == set()

    dry = fleet.run("--check", until="2026-01-01T00:00")
    assert dry.returncode == 0
    assert "no batch begins after 2026-01-01 00:00:00" in dry.stdout and ", which has passed" in dry.stdout
    assert "batch 1: hv0 (web0, db0)" in dry.stdout.replace("db0, web0", "web0, db0")
    assert "batch 3" in dry.stdout
    assert "skipping: no hosts matched" in dry.stdout  # no batch, and no verdict on one
    assert '"passed"' not in dry.stdout
    assert fleet.updated() == set()

    run = fleet.run(batches=[1, "50%"])
    assert run.returncode == 0
    assert fleet.updated() == set(fleet.guests)
    assert run.stdout.count("PLAY [Update one batch of hosts after another]") == 3
    assert all(host["failed"] == 0 and host["unreachable"] == 0 for host in recap(run).values())
    pids = {name: guest.pid() for name, guest in fleet.guests.items()}

    again = fleet.run()
    assert again.returncode == 0
    assert "up to date: 8 guests" in again.stdout
    assert all(host["changed"] == 0 for host in recap(again).values())
    assert {name: guest.pid() for name, guest in fleet.guests.items()} == pids
    assert "up to date" in fleet.run(name="status").stdout


def test_the_gate_stops_after_a_failure_and_the_next_run_does_the_rest(fleet):
    """The copy of one guest of the second batch takes too long: it alone is left behind."""
    for number in range(4):
        fleet.host(f"hv{number}", f"one{number}", f"two{number}", busy=["one1"])
    slow = {"live_update_copy_timeout": 3, "live_update_parameters": {"max-bandwidth": 1 << 20, "downtime-limit": 1}}
    fleet.inventory["hv1"].update(slow)
    run = fleet.run(batches=[1, 2])
    assert run.returncode == 2
    assert "[not-converging]" in run.stdout and "[gate-closed]" in run.stdout
    assert fleet.updated() == {"one0", "two0", "two1", "one2", "two2"}
    assert fleet.record("hv1", "one1")["phase"] == "rolled-back"
    assert not list(fleet.place.glob("hv3/*/update.json"))
    ended = recap(run)
    assert {name: host["failed"] for name, host in ended.items()} == {"hv0": 0, "hv1": 1, "hv2": 0, "hv3": 0}
    assert ended["hv3"]["changed"] == 0
    pids = {name: fleet.guests[name].pid() for name in fleet.updated()}

    for name in slow:
        del fleet.inventory["hv1"][name]
    run = fleet.run(batches=[1, 2])
    assert run.returncode == 0
    assert fleet.updated() == set(fleet.guests)
    assert {name: fleet.guests[name].pid() for name in pids} == pids
    assert "up to date: 5 guests" in run.stdout


def test_failures_within_the_budget_stop_nothing_and_fail_the_run(fleet):
    fleet.host("gone", **OUT_OF_REACH)
    fleet.host("hv1", "one", live_update_pause_limit=0.000001)
    fleet.host("hv2", "two")
    for host in fleet.inventory.values():
        host["live_update_batches"] = [1]
    run = fleet.run()
    assert run.returncode == 2
    assert "[fleet-not-ready]" in run.stdout and "gone: " in run.stdout
    assert fleet.updated() == set()
    dry = fleet.run("--check", failure_budget=1)
    assert dry.returncode == 2 and recap(dry)["gone"]["failed"] == 1  # as the run itself
    assert fleet.updated() == set()
    run = fleet.run(failure_budget=1)
    assert run.returncode == 2
    assert fleet.updated() == {"two"}
    assert "[pause-limit]" in run.stdout and "[gate-closed]" not in run.stdout
    assert run.stdout.count("PLAY [Update one batch of hosts after another]") == 2
    ended = recap(run)
    assert (ended["hv1"]["failed"], ended["hv2"]["failed"], ended["gone"]["failed"]) == (1, 0, 1)


@pytest.mark.parametrize("budget", [0, 2])
def test_a_host_that_is_lost_on_the_way_is_a_failure_and_no_end(fleet, tmp_path, budget):
    """It goes while the canary is looked at."""
    link = tmp_path / "link"
    link.write_text("local")
    for number in range(3):
        fleet.host(f"hv{number}", f"one{number}")
    fleet.inventory["hv0"]["live_update_health_command"] = f"echo ssh >{link}"
    lost = {**OUT_OF_REACH, "ansible_connection": f"{{{{ lookup('file', '{link}') }}}}"}
    fleet.inventory["hv1"].update(lost)
    run = fleet.run(batches=[1], failure_budget=budget)
    assert run.returncode == 2
    assert fleet.updated() == ({"one0", "one2"} if budget else {"one0"})
    assert ("[gate-closed]" in run.stdout) != bool(budget)
    assert {name: host["failed"] for name, host in recap(run).items()} == {"hv0": 0, "hv1": 1, "hv2": 0}
    link.write_text("local")
    fleet.inventory["hv0"]["live_update_health_command"] = ""
    assert fleet.run(batches=[1]).returncode == 0
    assert fleet.updated() == set(fleet.guests)


def test_nothing_begins_as_long_as_one_guest_is_refused(fleet):
    fleet.host("hv0", "fine")
    fleet.host("hv1", "busy")
    with fleet.guests["busy"].qmp():  # somebody else is at its monitor
        run = fleet.run()
        assert run.returncode == 2
        assert "[fleet-not-ready]" in run.stdout and "[monitor-busy]" in run.stdout
        assert fleet.guests["fine"].version().startswith("10.0.")
        run = fleet.run(skip_blocked=True)
        assert run.returncode == 0
    assert fleet.updated() == {"fine"}


def test_a_query_chooses_the_guests(fleet):
    fleet.host("hv0", "web0", "db0")
    fleet.host("hv1", "web1", "db1")
    query = "[?starts_with(name, 'web') && !contains(host, '1') && machine_type != 'none']"
    run = fleet.run("--limit", "hv0", guests=["web0", "db0"], guest_query=query)
    assert run.returncode == 0
    assert fleet.updated() == {"web0"}
    run = fleet.run(guest_query="[?starts_with(name")
    assert run.returncode == 2
    assert "live_update_guest_query can't be used" in run.stdout
    mistakes = {
        "pause_budget": '{"p50": 100}',
        "labels": '{"web0": "db"}',
    }
    for name, value in mistakes.items():
        run = fleet.run(**{name: value})
        assert run.returncode == 2 and f"live_update_{name} is" in run.stdout
    run = fleet.run(guest_query="[].name")
    assert run.returncode == 2
    assert "must return guests" in run.stdout


def test_guests_with_one_label_are_not_updated_at_once(fleet):
    for number in range(3):
        fleet.host(f"hv{number}", f"a{number}", f"b{number}", live_update_labels={f"a{number}": "a"})
    run = fleet.run(batches=[3])
    assert run.returncode == 0
    assert fleet.updated() == set(fleet.guests)
    spans = []
    for number in range(3):
        record = fleet.record(f"hv{number}", f"a{number}")
        spans.append((record["changed_at"] - sum(record["durations_ms"].values()) / 1000, record["changed_at"]))
    spans.sort()
    assert all(before[1] <= after[0] for before, after in zip(spans, spans[1:]))


def test_what_may_go_on_on_a_lost_host_keeps_its_label(fleet, tmp_path):
    """It goes just when its guest is to be switched."""
    link = tmp_path / "link"
    link.write_text("local")
    fleet.host("hv0", "a0", live_update_labels={"a0": "db"})
    fleet.host("hv1", "a1", "b1", live_update_labels={"a1": "db"})
    fleet.host("hv2", "a2", live_update_labels={"a2": "db"})
    goes = f"{{{{ 60 if __live_update_set_up is not defined or lookup('pipe', 'echo ssh >{link}') else 60 }}}}"
    lost = {**OUT_OF_REACH, "ansible_connection": f"{{{{ lookup('file', '{link}') }}}}"}
    fleet.inventory["hv0"].update(lost, live_update_copy_timeout=goes)
    run = fleet.run(batches=[2], failure_budget=5)
    assert run.returncode == 2
    assert fleet.updated_but("a0") == {"b1"}
    assert "[host-lost]" in run.stdout or "hv0: Failed to connect" in run.stdout
    assert "left out, since an update may still go on on a lost host: a1" in run.stdout
    assert "left out, since an update may still go on on a lost host: a2" in run.stdout
    # Those too of which a guest was left behind.
    assert {name: host["failed"] for name, host in recap(run).items()} == {"hv0": 1, "hv1": 1, "hv2": 1}
    link.write_text("local")
    del fleet.inventory["hv0"]["live_update_copy_timeout"]
    assert fleet.run().returncode == 0
    assert fleet.updated() == set(fleet.guests)


def test_a_guest_that_was_started_anew_meanwhile_did_not_go_on(fleet, tmp_path):
    """Its new QEMU dies, and the service starts it anew, as new as the fleet is to be."""
    fleet.host("hv0", "one0")
    fleet.host("hv1", "one1")
    anew = tmp_path / "anew"
    guest = fleet.guests["one0"]
    anew.write_text(
        f"kill -KILL $(pgrep -f guest=one0,)\nsleep 1\nrm -f {guest.monitor}\n"
        f"setsid {shlex.join([qemu(NEW_SUITE), *guest.words])} >/dev/null 2>&1 </dev/null &\n"
        f"while [ ! -S {guest.monitor} ]; do sleep 0.1; done\n"
    )
    fleet.inventory["hv0"]["live_update_health_command"] = f"sh {anew}"
    run = fleet.run(batches=[1])
    assert run.returncode == 2
    assert "It was started anew since" in run.stdout and "[gate-closed]" in run.stdout
    assert fleet.guests["one1"].version().startswith("10.0.")


def test_a_host_whose_health_can_t_be_asked_is_not_well(fleet):
    """The task on it does not only fail, it can't even be tried."""
    # It comes first, as a host that has nothing to do with all this may.
    fleet.inventory["nowhere"] = {"ansible_connection": "none.such"}
    for number in range(3):
        fleet.host(f"hv{number}", f"one{number}")
    fleet.inventory["hv0"]["live_update_health_host"] = "nowhere"
    run = fleet.run(hosts="all:!nowhere", batches=[2], health_command="true", failure_budget=5)
    assert run.returncode == 2
    assert "[gate-closed]" in run.stdout and "none.such" in run.stdout
    assert '"updated": 2' in run.stdout or "updated: 2" in run.stdout  # the guests are well
    assert fleet.updated() == {"one0", "one1"}


def test_a_health_command_that_does_not_end_is_a_bad_sign(fleet):
    fleet.host("hv0", "one0")
    fleet.host("hv1", "one1")
    run = fleet.run(batches=[1], health_command="sleep 1000", health_timeout=2, failure_budget=5)
    assert run.returncode == 2 and "[gate-closed]" in run.stdout and "live_update_health_command failed" in run.stdout
    assert fleet.updated() == {"one0"}


def test_a_guest_that_goes_away_after_the_check_keeps_nobody_else_back(fleet, tmp_path):
    fleet.host("hv0", "one0")
    fleet.host("hv1", "one1", "two1")
    pids = tmp_path / "pid"
    pids.write_text(str(fleet.guests["two1"].pid()))
    fleet.inventory["hv0"]["live_update_health_command"] = f"kill -KILL $(cat {pids})"
    run = fleet.run(batches=[1])
    assert run.returncode == 2
    assert "two1: No QEMU on this host runs a guest named two1" in run.stdout
    del fleet.guests["two1"]
    assert fleet.updated() == {"one0", "one1"}


def test_pauses_and_health_are_judged(fleet):
    for number in range(3):
        fleet.host(f"hv{number}", f"one{number}")
    run = fleet.run(pause_budget={"p50": 0.001}, batches=[1])
    assert run.returncode == 2
    assert "live_update_pause_budget" in run.stdout
    assert fleet.updated() == {"one0"}
    run = fleet.run(health_command="echo the fan stands still; false", batches=[1])
    assert run.returncode == 2
    assert "hv1: live_update_health_command failed: the fan stands still" in run.stdout
    assert fleet.updated() == {"one0", "one1"}
    # The window closes while the host is looked at.
    fleet.host("hv3", "one3")
    until = datetime.datetime.now().astimezone() + datetime.timedelta(seconds=25)
    wait = f"while [ $(date +%s) -le {int(until.timestamp())} ]; do sleep 0.1; done"
    run = fleet.run(batches=[1], until=until.isoformat(), health_command=wait)
    assert run.returncode == 0
    assert "live_update_until has passed" in run.stdout and "not begun" in run.stdout
    assert fleet.updated() == {"one0", "one1", "one2"}


def test_ansible_runner_drives_it_as_awx_does(fleet, tmp_path):
    """AWX and execution environments run playbooks by ansible-runner, and show its events and its status."""
    fleet.host("hv0", "one0")
    fleet.host("hv1", "one1", live_update_pause_limit=0.000001)
    (tmp_path / "runner").mkdir()

    def run(**variables):
        return ansible_runner.run(
            private_data_dir=str(tmp_path / "runner"),
            playbook="vmfleet.cpr.rolling_update",
            inventory={"all": {"hosts": fleet.inventory}},
            extravars={"live_update_qemu_binary": qemu(NEW_SUITE), "live_update_soak": 0, **variables},
            envvars={"PATH": f"{TOP}/.venv/bin:{os.environ['PATH']}"},
            quiet=True,
        )

    def events(done, kind, task):
        return {
            event["event_data"]["host"]: event["event_data"]["res"]
            for event in done.events
            if event["event"] == kind and event["event_data"]["task"] == task
        }

    done = run()
    assert (done.status, done.rc) == ("failed", 2), done.stdout.read()
    assert fleet.updated() == {"one0"}
    resumed = events(done, "runner_on_ok", "Switch to the new QEMU")
    assert resumed["hv0"]["guests"][0]["pause_ms"] > 0
    assert resumed["hv1"]["guests"][0]["error"]["code"] == "pause-limit"
    assert set(events(done, "runner_on_failed", "Fail for this host's failures")) == {"hv1"}
    assert (done.stats["ok"]["hv0"] > 0, done.stats["failures"]) == (True, {"hv1": 1})

    del fleet.inventory["hv1"]["live_update_pause_limit"]
    done = run()
    assert (done.status, done.rc, done.stats["failures"]) == ("successful", 0, {}), done.stdout.read()
    assert fleet.updated() == {"one0", "one1"}
    assert done.stats["changed"] == {"hv1": done.stats["changed"]["hv1"]}
