# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Work that neither a signal nor the end of its caller interrupts, with real processes."""

from __future__ import annotations

import os
import signal
import time

import pytest

from ansible_collections.vmfleet.cpr.plugins.module_utils import detached
from ansible_collections.vmfleet.cpr.plugins.module_utils.errors import CprError


def wait_for(path):
    for dummy in range(1000):
        if path.exists():
            return path.read_text()
        time.sleep(0.01)
    raise TimeoutError(path)


def test_the_result_comes_back_whatever_its_size():
    assert detached.run(lambda is_abandoned: {"text": "x" * 1_000_000, "gone": is_abandoned()}) == {
        "text": "x" * 1_000_000,
        "gone": False,
    }


def test_it_has_a_session_of_its_own():
    result = detached.run(lambda dummy: {"pid": os.getpid(), "session": os.getsid(0)})
    assert result["pid"] == result["session"] != os.getpid()


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGTSTP])
def test_it_ignores_what_ends_a_session(number):
    def work(dummy):
        os.kill(os.getpid(), number)
        return {"alive": True}

    assert detached.run(work) == {"alive": True}


def test_it_is_let_go_on_when_somebody_stops_it():
    def work(dummy):
        os.kill(os.getpid(), signal.SIGSTOP)
        return {"alive": True}

    assert detached.run(work) == {"alive": True}


def test_it_is_taken_up_again_when_somebody_kills_it(tmp_path):
    def work(dummy):
        if not (tmp_path / "once").exists():
            (tmp_path / "once").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return {"again": True}

    assert detached.run(work) == {"again": True}


def test_a_process_that_is_killed_each_time_is_an_error():
    with pytest.raises(CprError) as failure:
        detached.run(lambda dummy: os.kill(os.getpid(), signal.SIGKILL))
    assert failure.value.code == "process-killed" and "by signal 9" in failure.value.message


def test_a_mistake_in_the_work_is_shown(capfd):
    def work(dummy):
        raise RuntimeError("a mistake in the program")

    with pytest.raises(CprError, match="without a result"):
        detached.run(work)
    assert "RuntimeError: a mistake in the program" in capfd.readouterr().err


def test_it_goes_on_when_its_caller_is_killed_and_knows_that(tmp_path):
    def work(is_abandoned):
        (tmp_path / "began").write_text(str(os.getpid()))
        while not is_abandoned():
            time.sleep(0.01)
        (tmp_path / "ended").write_text(str(os.getpid()))
        return {}

    caller = os.fork()
    if caller == 0:
        detached.run(work)
        os._exit(0)
    try:
        pid = wait_for(tmp_path / "began")
        assert int(pid) != caller and not (tmp_path / "ended").exists()
    finally:
        os.kill(caller, signal.SIGKILL)
        os.waitpid(caller, 0)
    assert wait_for(tmp_path / "ended") == pid
