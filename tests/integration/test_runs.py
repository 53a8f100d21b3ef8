# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""One run at a time works on a guest; one that died is followed by the next."""

from __future__ import annotations

import os
import signal

import pytest

from ansible_collections.vmfleet.cpr.plugins.plugin_utils import qmp_action
from tests.guests.ansible import live_update, start_live_update
from tests.guests.guest import NEW_SUITE, is_alive, qemu, wait_until

MINE = {"key": "here 1 1", "who": "process 1 of me on the control node here"}
THEIRS = {"key": "there 2 2", "who": "process 2 of them on the control node there"}


@pytest.fixture(name="begun")
def fixture_begun(start, host):
    """A guest whose update another run has begun."""
    guest = start("web1")
    host.until("transfer", guest, run=THEIRS)
    return guest


@pytest.mark.parametrize("module", ["launch", "transfer", "setup", "resume", "rollback"])
def test_no_other_run_touches_the_update_of_a_run_at_work(begun, host, module):
    before = host.record(begun)
    (outcome,) = getattr(host, module)(begun, run=MINE)
    assert outcome.error.code == "guest-held"
    for part in (THEIRS["who"], f"since {before['run']['since']}", "transferred since"):
        assert part in outcome.error.message
    assert host.record(begun) == before and len(begun.pids()) == 2 and begun.status() == "running"
    (outcome,) = host.setup(begun, run=THEIRS)
    assert outcome.error is None


def test_a_run_that_ended_is_followed_by_the_next(begun, host):
    host.until("resume", begun, run=MINE, ended_runs=[THEIRS["key"]])
    assert host.record(begun)["run"]["key"] == MINE["key"]
    begun.wait_for_ticks()
    begun.check_continuity()


def test_a_run_that_was_silent_for_long_is_taken_for_dead(begun, host):
    with host.changed_record(begun) as record:
        record["changed_at"] -= 601
    host.until("resume", begun, run=MINE)


def test_a_finished_update_holds_nobody(start, host):
    guest = start("web1")
    host.until("resume", guest, run=THEIRS)
    (outcome,) = host.launch(guest, run=MINE)
    assert outcome.error is None
    assert "The run before" in outcome.extra["earlier_run"] and "went from QEMU 10.0" in outcome.extra["earlier_run"]
    host.transfer(guest, run=MINE)  # a call out of turn is no news
    (outcome,) = host.launch(guest, run=THEIRS)  # who did it knows
    assert outcome.extra["earlier_run"] is None


def test_a_control_node_knows_which_of_its_own_runs_have_ended():
    key = qmp_action.this_run()["key"]
    assert not qmp_action.has_ended(key)
    node, pid, start_time = key.rsplit(" ", 2)
    assert qmp_action.has_ended(f"{node} {pid} {int(start_time) + 1}")
    assert not qmp_action.has_ended(f"elsewhere {pid} {int(start_time) + 1}")
    child = os.fork()
    if child == 0:
        os._exit(0)
    wait_until(lambda: not is_alive(child), "the child has ended")
    assert qmp_action.has_ended(f"{node} {child} 1")  # not reaped yet
    os.waitpid(child, 0)
    assert qmp_action.has_ended(f"{node} {child} 1")


def test_a_second_playbook_is_refused_while_the_first_is_at_work_and_takes_over_when_it_died(start, host, tmp_path):
    guest = start("web1")
    old = guest.pid()
    with open(tmp_path / "first.log", "w", encoding="utf-8") as log:
        first = start_live_update(qemu(NEW_SUITE), host.state, ["web1"], log, {})
        try:
            record = host.state / "web1" / "update.json"
            wait_until(lambda: record.exists() and host.record(guest)["phase"] == "launched", "it is at work")
            os.kill(first.pid, signal.SIGSTOP)  # between two of its tasks
            second = live_update(qemu(NEW_SUITE), host.state, ["web1"])
            assert second.returncode == 2 and "[guest-held]" in second.stdout
            assert f"process {first.pid} of " in second.stdout
            assert guest.status() == "running" and old in guest.pids() and len(guest.pids()) == 2
        finally:
            first.kill()
            first.wait()
    third = live_update(qemu(NEW_SUITE), host.state, ["web1"])
    assert third.returncode == 0, third.stdout
    assert "An earlier run had left its update unfinished" in third.stdout
    assert guest.pid() != old and guest.version().startswith("11.1.")
    guest.wait_for_ticks()
    guest.check_continuity()
