# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Records, locks and what /proc says."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import pathlib
import resource
import signal
import subprocess

import pytest

from ansible_collections.vmfleet.cpr.plugins.module_utils import launcher, process, surroundings, systemd
from ansible_collections.vmfleet.cpr.plugins.module_utils.errors import CprError
from ansible_collections.vmfleet.cpr.plugins.module_utils.journal import FINISHED, Journal, Qemu
from ansible_collections.vmfleet.cpr.plugins.module_utils.quiet import Quiet
from ansible_collections.vmfleet.cpr.plugins.module_utils.taps import Tap


def test_a_record_reads_back_as_it_was_written(tmp_path):
    records = Journal(str(tmp_path))
    update = records.create("web1")
    update.old = Qemu(1, 2, "/old", "10.0.2", "/a.qmp")
    update.renames = [("/a.qmp.cpr1", "/a.qmp")]
    update.taps = [Tap("tap0", "cpr7n0", 1, False, True, False, addresses=[("52:54:00:00:00:01", None)])]
    update.forwards = [("n0", "tcp::2222-:22")]
    update.enter(FINISHED)
    assert records.load("web1") == update
    assert os.stat(update.record).st_mode & 0o777 == 0o600
    assert records.load("web2") is None


@pytest.mark.parametrize("name", ["../etc", "..", ".", "a/b", "name with spaces", "größe", "%2F"])
def test_any_name_gets_a_directory_of_its_own_below_the_state_directory(tmp_path, name):
    records = Journal(str(tmp_path))
    assert os.path.dirname(os.path.realpath(records.path(name))) == os.path.realpath(tmp_path)
    assert records.path(name) != records.path(name + "x")


@pytest.mark.parametrize("text", ["", "{", '{"format": 99}', '{"format": 1, "surprise": 2}'])
def test_a_damaged_record_is_named(tmp_path, text):
    records = Journal(str(tmp_path))
    (tmp_path / "web1").mkdir()
    (tmp_path / "web1" / "update.json").write_text(text)
    with pytest.raises(CprError, match=str(tmp_path / "web1")) as caught:
        records.load("web1")
    assert caught.value.code == "record-unreadable"


def test_a_second_task_is_refused_and_told_who_holds_the_guest(tmp_path):
    records = Journal(str(tmp_path))
    with records.lock("web1"), records.lock("web2"):
        with pytest.raises(CprError, match=f"process {os.getpid()} since ") as caught:
            with records.lock("web1"):
                pass
    assert caught.value.code == "guest-locked"
    with records.lock("web1"):
        pass


def test_a_state_directory_that_cant_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CprError) as caught:
        Journal(str(tmp_path / "file")).create("web1")
    assert caught.value.code == "state-directory"
    assert "state_directory" in caught.value.hint


def test_limits_are_read_as_the_kernel_writes_them():
    text = (
        "Limit                     Soft Limit           Hard Limit           Units     \n"
        "Max open files            1024                 524288               files     \n"
        "Max locked memory         unlimited            unlimited            bytes     \n"
        "Max nice priority         0                    0                    \n"
    )
    assert surroundings.parse_limits(text) == {
        resource.RLIMIT_NOFILE: (1024, 524288),
        resource.RLIMIT_MEMLOCK: (resource.RLIM_INFINITY, resource.RLIM_INFINITY),
        resource.RLIMIT_NICE: (0, 0),
    }


def test_our_own_limits_read_like_the_c_library_says():
    for number, pair in surroundings.read(os.getpid()).limits.items():
        assert pair == resource.getrlimit(number)


@pytest.mark.parametrize(
    ("cgroup", "unit"),
    [
        ("0::/system.slice/guest@web1.service\n", "guest@web1.service"),
        ("12:cpu:/\n1:name=systemd:/system.slice/a.service\n0::/\n", "a.service"),
        ("0::/user.slice/user-0.slice/session-3.scope\n", None),
        ("0::/\n", None),
        ("0::/system.slice/a.service/vm\n", "a.service"),
        ("0::/user.slice/user-1000.slice/user@1000.service/app.slice/vm.service\n", "user@1000.service/vm.service"),
        ("0::/user.slice/user-1000.slice/user@1000.service/app.slice/run-1.scope\n", None),
    ],
)
def test_a_service_unit_is_told_from_a_scope(cgroup, unit):
    assert systemd.unit_of(cgroup) == unit


def test_the_end_of_a_process_is_noticed_and_a_pid_alone_proves_nothing():
    child = subprocess.Popen(["sleep", "60"])
    identity = process.identify(child.pid)
    assert identity is not None and identity.is_alive()
    assert not process.Identity(child.pid, identity.start_time + 1).is_alive()

    async def watch():
        with process.Watch(identity) as living, process.Watch(process.Identity(child.pid, 1)) as other:
            assert other.ended.is_set()
            assert not await living.wait(0.01)
            await living.kill()
            assert living.ended.is_set()

    asyncio.run(watch())
    assert not identity.is_alive()
    assert child.wait() == -9


def test_a_started_program_gets_nothing_of_the_task_but_the_surroundings_given(tmp_path):
    leaked = os.open(os.devnull, os.O_RDONLY)
    os.set_inheritable(leaked, True)
    around = dataclasses.replace(
        surroundings.read(os.getpid()), environment={"COLOUR": "green"}, working_directory=str(tmp_path), umask=0o027
    )
    with launcher.Prepared("/bin/sleep", ["60"], around, str(tmp_path / "log")) as child:
        identity = child.identity
        child.start(10)
    try:
        assert process.identify(identity.pid) == identity  # known before it became another program
        base = pathlib.Path(f"/proc/{identity.pid}")
        assert sorted(os.listdir(base / "fd")) == ["0", "1", "2"]
        assert (base / "environ").read_bytes() == b"COLOUR=green\0"
        assert os.readlink(base / "cwd") == str(tmp_path)
        status = (base / "status").read_text()
        ignored = int(status.partition("SigIgn:\t")[2].split()[0], 16)
        assert not ignored & (1 << signal.SIGPIPE - 1) and "Umask:\t0027" in status
        assert os.getsid(identity.pid) == identity.pid
    finally:
        os.kill(identity.pid, 9)
        os.waitpid(identity.pid, 0)
        os.close(leaked)


@pytest.mark.parametrize(
    ("binary", "limits"), [("/no/such/binary", {}), ("/bin/true", {resource.RLIMIT_NOFILE: (2, 1)})]
)
def test_a_program_that_cant_be_started_says_why(tmp_path, binary, limits):
    around = dataclasses.replace(surroundings.read(os.getpid()), limits=limits)
    with pytest.raises(CprError, match=binary) as caught:
        with launcher.Prepared(binary, [], around, str(tmp_path / "log")) as child:
            child.start(10)
    assert caught.value.code == "launch-failed"


def test_a_program_that_does_not_come_to_start_is_ended(tmp_path):
    around = surroundings.read(os.getpid())
    with pytest.raises(CprError) as caught:
        with launcher.Prepared("/bin/sleep", ["60"], around, str(tmp_path / "log")) as child:
            os.kill(child.identity.pid, signal.SIGSTOP)
            child.start(0.2)
    assert caught.value.code == "new-qemu-silent"
    assert not child.identity.is_alive()


def test_a_program_that_nobody_started_ends_with_whoever_prepared_it(tmp_path):
    around = surroundings.read(os.getpid())
    with launcher.Prepared("/bin/touch", [str(tmp_path / "started")], around, str(tmp_path / "log")) as child:
        assert child.identity.is_alive()
    os.waitpid(child.identity.pid, 0)
    assert not child.identity.is_alive() and not (tmp_path / "started").exists()


def test_nobody_works_while_a_guest_is_switched():
    state = {"working": 0, "switching": 0, "most_switching": 0}

    async def guest(quiet):
        async with quiet.work():
            state["working"] += 1
            assert not state["switching"]
            await asyncio.sleep(0.001)
            state["working"] -= 1
        async with quiet.switch():
            state["switching"] += 1
            state["most_switching"] = max(state["most_switching"], state["switching"])
            assert not state["working"]
            await asyncio.sleep(0.001)
            state["switching"] -= 1
        async with quiet.work():
            assert not state["switching"]

    async def everyone():
        quiet = Quiet(2)
        await asyncio.gather(*(guest(quiet) for dummy in range(9)))

    asyncio.run(everyone())
    assert state["most_switching"] == 2
