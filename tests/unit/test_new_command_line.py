# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The new QEMU's command line, from the old one's."""

from __future__ import annotations

import json

import pytest

from ansible_collections.vmfleet.cpr.plugins.module_utils import command_line, new_command_line
from ansible_collections.vmfleet.cpr.plugins.module_utils.errors import CprError


def make(*words, machine_type="pc-q35-10.0", **live):
    running = new_command_line.Running(machine_type, **live)
    return new_command_line.make(command_line.parse(words), running, cpr_socket="/s/cpr.sock")


def words_of(command):
    words = command_line.write(command.arguments)
    tail = ["-S", "-incoming", "defer", "-incoming"]
    assert words[-5:-1] == tail
    channel = {"channel-type": "cpr", "addr": {"transport": "socket", "type": "unix", "path": "/s/cpr.sock"}}
    assert json.loads(words[-1]) == channel
    return words[:-5]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (["-machine", "q35,accel=kvm"], ["-machine", "type=pc-q35-10.0,accel=kvm"]),
        (["-M", "q35"], ["-M", "type=pc-q35-10.0"]),
        (["-machine", "accel=kvm,type=q35"], ["-machine", "accel=kvm,type=pc-q35-10.0"]),
        (["-machine", "accel=kvm", "-M", "q35"], ["-machine", "accel=kvm", "-M", "type=pc-q35-10.0"]),
        (["-machine", "accel=kvm"], ["-machine", "type=pc-q35-10.0", "-machine", "accel=kvm"]),
        (["-m", "1G"], ["-machine", "type=pc-q35-10.0", "-m", "1G"]),
    ],
)
def test_the_machine_type_is_pinned(before, after):
    assert words_of(make(*before)) == after


@pytest.mark.parametrize(
    ("before", "after", "renames"),
    [
        (
            ["-qmp", "unix:/run/a.qmp,server=on,wait=off"],
            ["-qmp", "unix:/run/a.qmp.cpr1,server=on,wait=off"],
            [("/run/a.qmp.cpr1", "/run/a.qmp")],
        ),
        (
            ["-monitor", "unix:a.hmp,server,nowait"],
            ["-monitor", "unix:a.hmp.cpr1,server,wait=off"],
            [("a.hmp.cpr1", "a.hmp")],
        ),
        (
            ["-chardev", "socket,id=q,path=q,server=on"],
            ["-chardev", "socket,id=q,path=q.cpr1,server=on,wait=off"],
            [("q.cpr1", "q")],
        ),
        (
            ["-chardev", "socket,id=q,path=/a,,b,server=yes"],
            ["-chardev", "socket,id=q,path=/a,,b.cpr1,server=yes,wait=off"],
            [("/a,b.cpr1", "/a,b")],
        ),
        (["-vnc", "unix:/run/vnc"], ["-vnc", "unix:/run/vnc.cpr1"], [("/run/vnc.cpr1", "/run/vnc")]),
        (["-pidfile", "/run/a.pid"], ["-pidfile", "/run/a.pid.cpr1"], [("/run/a.pid.cpr1", "/run/a.pid")]),
        # As a client QEMU binds nothing.
        (["-chardev", "socket,id=q,path=/a"], ["-chardev", "socket,id=q,path=/a"], []),
        (["-daemonize", "-S", "-incoming", "defer"], [], []),
    ],
)
def test_what_two_processes_would_fight_over_gets_a_path_of_its_own(before, after, renames):
    command = make("-M", "q35", *before)
    assert words_of(command)[2:] == after
    assert command.renames == renames
    assert command.generation == 1


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (["-chardev", "file,id=c,path=/l"], ["-chardev", "file,id=c,path=/l,append=on"]),
        (["-chardev", "file,id=c,path=/l,append=off"], ["-chardev", "file,id=c,path=/l,append=on"]),
        (["-chardev", "null,id=c,logfile=/l"], ["-chardev", "null,id=c,logfile=/l,logappend=on"]),
        (["-chardev", "null,id=c"], ["-chardev", "null,id=c"]),
        (
            ["-serial", "null", "-serial", "file:/l,1"],
            ["-serial", "null", "-chardev", "file,id=serial1,path=/l,,1,append=on", "-serial", "chardev:serial1"],
        ),
    ],
)
def test_a_log_of_the_old_qemu_is_appended_to(before, after):
    assert words_of(make("-M", "q35", *before))[2:] == after


def test_the_next_update_starts_from_the_stable_paths():
    words = ["-M", "q35", "-qmp", "unix:/run/a.qmp,server=on,wait=off", "-pidfile", "/run/a.pid", "-daemonize"]
    first = make(*words)
    second = make(*command_line.write(first.arguments))
    assert second.generation == 2
    assert second.renames == [("/run/a.qmp.cpr2", "/run/a.qmp"), ("/run/a.pid.cpr2", "/run/a.pid")]
    assert len(second.arguments) == len(first.arguments)
    assert new_command_line.qmp_paths(first.arguments) == ["/run/a.qmp"]
    assert new_command_line.qmp_paths(command_line.parse(words)) == ["/run/a.qmp"]


def test_a_path_that_only_looks_like_a_generation_is_the_users_own():
    words = ["-M", "q35", "-qmp", "unix:/run/a.cpr7,server=on,wait=off"]
    assert new_command_line.qmp_paths(command_line.parse(words)) == ["/run/a.cpr7"]
    assert make(*words).renames == [("/run/a.cpr7.cpr1", "/run/a.cpr7")]


@pytest.mark.parametrize(
    ("words", "paths"),
    [
        (["-qmp", "unix:/a,server=on"], ["/a"]),
        (["-qmp-pretty", "unix:/a,server,nowait"], ["/a"]),
        (["-chardev", "socket,id=m,path=/a,server=on", "-mon", "chardev=m,mode=control"], ["/a"]),
        (["-chardev", "socket,id=m,path=/a,server=on", "-mon", "m,mode=control"], ["/a"]),
        (["-mon", "m,mode=control", "-chardev", "socket,id=m,path=/a,server=on"], ["/a"]),
        (["-chardev", "socket,id=m,path=/a,server=on", "-object", "monitor-qmp,id=q,chardev=m"], ["/a"]),
        (["-chardev", "socket,id=m,path=/a,server=on", "-mon", "chardev=m,mode=readline"], []),
        (["-qmp", "tcp:localhost:4444,server=on"], []),
        (["-qmp", "unix:/a,server=on", "-qmp", "unix:/b,server=on"], ["/a", "/b"]),
    ],
)
def test_the_qmp_monitors_are_found_in_all_their_forms(words, paths):
    assert new_command_line.qmp_paths(command_line.parse(words)) == paths


@pytest.mark.parametrize(
    "words",
    [
        ["-snapshot"],
        ["-loadvm", "x"],
        ["-drive", "file=base.qcow2,snapshot=on"],
        ["-netdev", "stream,id=n,server=on,addr.type=unix,addr.path=/n"],
        ["-spice", "unix=on,addr=/run/spice"],
        ["-netdev", "vhost-user,id=n,chardev=c"],
        ["-device", "vhost-user-fs-pci,chardev=c,tag=t"],
        ["-run-with", "exit-with-parent=on"],
        ["-D", "/var/log/qemu.log"],
        ["-tpmdev", "emulator,id=t,chardev=c"],
    ],
)
def test_what_cant_be_carried_over_safely_is_refused_by_name(words):
    with pytest.raises(CprError) as caught:
        make("-M", "q35", *words)
    assert caught.value.code == "unsupported-option"
    assert words[0] in caught.value.message


def test_a_socket_path_that_would_be_too_long_is_refused():
    with pytest.raises(CprError) as caught:
        make("-qmp", f"unix:/{'x' * 105},server=on")
    assert caught.value.code == "socket-path-too-long"


def test_everything_else_is_carried_word_by_word():
    words = [
        "-M", "type=pc-q35-10.0", "-cpu", "host,+x", "-m", "size=1G,slots=2", "-smp", "2", "-nodefaults",
        "-device", '{"driver":"virtio-net-pci","netdev":"n"}', "-netdev", "user,id=n", "disk.img", "-global", "a.b=c",
        "-msg", "timestamp=on", "-append", "{not json", "-sandbox", "on", "-run-with", "async-teardown=on", "-object", "rng-random,id=r",
    ]  # fmt: skip
    assert words_of(make(*words)) == words
