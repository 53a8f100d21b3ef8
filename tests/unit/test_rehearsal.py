# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A QEMU that only rehearses has the guest's machine and none of its lines, RAM or ports."""

from __future__ import annotations

import pytest

from ansible_collections.vmfleet.cpr.plugins.module_utils import command_line, new_command_line, rehearsal
from ansible_collections.vmfleet.cpr.plugins.module_utils.errors import CprError


def rehearsed(*words):
    running = new_command_line.Running(machine_type="pc-q35-10.0")
    new = new_command_line.make(command_line.parse(words), running, cpr_socket=None)
    return command_line.write(rehearsal.command_line(new, 99).arguments)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["-qmp", "unix:/run/g.qmp,server=on,wait=off", "-monitor", "stdio", "-pidfile", "/run/g.pid"], []),
        (["-vnc", ":1", "-mem-path", "/dev/hugepages", "-mem-prealloc"], []),
        (["-chardev", "socket,id=c,path=/run/c,server=on,wait=off,mux=on"], ["-chardev", "null,id=c,mux=on"]),
        (["-serial", "null", "-serial", "chardev:c"], ["-serial", "null", "-serial", "chardev:c"]),
        (["-audiodev", "wav,id=a,path=/var/log/g.wav"], ["-audiodev", "none,id=a"]),
        (["-netdev", "stream,id=n,addr.type=unix,addr.path=/run/passt"], ["-netdev", "hubport,id=n,hubid=99"]),
        (["-netdev", '{"type":"user","id":"n"}'], ["-netdev", '{"type":"user","id":"n"}']),
        (["-name", "guest=g", "-object", "filter-dump,id=f,netdev=n,file=/var/log/g.pcap"], []),
        (["-serial", "file:/var/log/g"], ["-chardev", "null,id=serial0", "-serial", "chardev:serial0"]),
        (
            ["-object", "memory-backend-file,id=ram0,size=64M,mem-path=/dev/shm/g,share=on,prealloc=on"],
            ["-object", "memory-backend-ram,id=ram0,size=64M"],
        ),
        (
            ["-object", '{"qom-type":"memory-backend-memfd","id":"m","size":67108864,"share":true,"host-nodes":[0]}'],
            ["-object", '{"qom-type":"memory-backend-ram","id":"m","size":67108864,"host-nodes":[0]}'],
        ),
        (["-overcommit", "mem-lock=on"], []),
        (
            ["-blockdev", "driver=file,filename=/g.img,node-name=d", "-device", "virtio-blk-pci,drive=d"],
            ["-blockdev", "driver=file,filename=/g.img,node-name=d", "-device", "virtio-blk-pci,drive=d"],
        ),
    ],
)
def test_what_it_is_started_with(words, expected):
    found = rehearsed(*words)
    monitor = ["-chardev", "socket,id=cpr_rehearsal,fd=99", "-mon", "chardev=cpr_rehearsal,mode=control"]
    machine = ["-machine", "type=pc-q35-10.0"]
    rest = ["-S", "-incoming", "defer", *monitor]
    assert found[:2] == ["-display", "none"] and found[-len(rest) :] == rest
    assert [word for word in found[2 : -len(rest)] if word not in machine] == expected


def test_what_serves_one_qemu_at_a_time_is_not_rehearsed():
    with pytest.raises(CprError) as caught:
        rehearsed("-device", "vfio-pci,host=0000:03:00.0")
    assert caught.value.code == rehearsal.NOT_REHEARSED and "vfio-pci" in caught.value.message
