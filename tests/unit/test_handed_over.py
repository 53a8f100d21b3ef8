# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the new QEMU gets from the old one when that is gone: ports, displays, units."""

from __future__ import annotations

import pytest

from ansible_collections.vmfleet.cpr.plugins.module_utils import (
    character_devices,
    command_line,
    managers,
    new_command_line,
    read_config,
    surroundings,
    systemd,
    user_network,
    vnc,
)
from ansible_collections.vmfleet.cpr.plugins.module_utils.character_devices import Listener
from ansible_collections.vmfleet.cpr.plugins.module_utils.errors import CprError
from ansible_collections.vmfleet.cpr.plugins.module_utils.new_command_line import Descriptor


def make(*words, **live):
    running = new_command_line.Running("pc-q35-10.0", **live)
    command = new_command_line.make(command_line.parse(["-M", "q35", *words]), running, cpr_socket="/s")
    return command_line.write(command.arguments)[2:-5], command


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (
            ["-monitor", "telnet:127.0.0.1:7,server,nowait"],
            ["-chardev", "socket,id=cpr_monitor0,telnet=on,server=on,wait=off,fd=10",
             "-mon", "chardev=cpr_monitor0,mode=readline"],
        ),
        (
            ["-qmp", "unix:/q,server=on", "-qmp-pretty", "tcp::7,server=on"],
            ["-qmp", "unix:/q.cpr1,server=on,wait=off", "-chardev", "socket,id=cpr_monitor1,server=on,fd=10,wait=off",
             "-mon", "chardev=cpr_monitor1,mode=control,pretty=on"],
        ),
        (
            ["-serial", "null", "-serial", "mon:tcp:localhost:7,server=on,nodelay"],
            ["-serial", "null", "-chardev", "socket,id=serial1,server=on,nodelay=on,mux=on,fd=10,wait=off",
             "-mon", "chardev=serial1,mode=readline", "-serial", "chardev:serial1"],
        ),
        (["-s"], ["-chardev", "socket,id=gdb,server=on,wait=off,fd=10", "-gdb", "chardev:gdb"]),
        (["-serial", "tcp:localhost:7"], ["-chardev", "socket,id=serial0,host=localhost,port=7", "-serial", "chardev:serial0"]),
        (["-serial", "stdio"], ["-serial", "stdio"]),
    ],
)  # fmt: skip
def test_a_port_is_handed_over_as_the_socket_itself(before, after):
    port = 1234 if before == ["-s"] else 7
    words, command = make(*before, listeners=[Listener(25, port=port)])
    assert words == after
    number = [item for item in command.descriptors if item.number >= 10]
    assert number == ([Descriptor(10, of_old=25)] if "fd=10" in " ".join(after) else [])


def test_the_second_update_starts_from_descriptors():
    words = ["-chardev", "socket,id=m,fd=10,server=on,wait=off", "-qmp", "unix:/q,server=on"]
    after, command = make(*words, listeners=[Listener(9, port=7), Listener(10, port=8)])
    assert after[:2] == ["-chardev", "socket,id=m,server=on,wait=off,fd=10"]
    assert command.descriptors == [Descriptor(10, of_old=10)]


def test_a_port_with_several_sockets_is_refused():
    with pytest.raises(CprError, match="2 listening sockets") as caught:
        make("-serial", "tcp::7,server=on", listeners=[Listener(5, port=7), Listener(6, port=7)])
    assert caught.value.code == "unsupported-option"


def test_an_abstract_socket_is_told_by_its_name():
    words, command = make("-chardev", "socket,id=c,path=a,abstract=on,server=on", listeners=[Listener(5, name="a")])
    assert words == ["-chardev", "socket,id=c,server=on,fd=10,wait=off"]
    assert command.descriptors[0].of_old == 5


def test_sets_of_descriptors_are_opened_anew():
    fd_sets = [{"fdset-id": 3, "fds": [{"fd": 5, "opaque": "rdwr"}, {"fd": 6}]}]
    words, command = make("-add-fd", "fd=3,set=3", fd_sets=fd_sets)
    assert words == ["-add-fd", "fd=10,set=3,opaque=rdwr", "-add-fd", "fd=11,set=3"]
    assert command.descriptors == [Descriptor(10, 5, opened_anew=True), Descriptor(11, 6, opened_anew=True)]


def test_standard_input_and_output_go_along():
    dummy, command = make("-nographic")
    assert command.descriptors == [Descriptor(0, of_old=0), Descriptor(1, of_old=1)]
    for words in (
        ["-serial", "null"],
        ["-nographic", "-nodefaults"],
        ["-nographic", "-serial", "null", "-qmp", "unix:/q"],
    ):
        assert not character_devices.uses_standard_streams(command_line.parse(words))
    for words in (["-nographic", "-monitor", "none"], ["-nographic", "-serial", "null"], ["-monitor", "stdio"]):
        assert character_devices.uses_standard_streams(command_line.parse(words))


def display(*servers, auth="none"):
    keys = ("family", "host", "service", "websocket")
    return {"id": "default", "auth": auth, "clients": [], "server": [dict(zip(keys, server)) for server in servers]}


PORT = ("ipv4", "127.0.0.1", "5901", False)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (["-vnc", ":1,share=ignore"], ["-vnc", "none,share=ignore"]),
        (["-display", "vnc=:1,to=9"], ["-vnc", "none"]),
        ([], ["-vnc", "none"]),  # QEMU has one by default
    ],
)
def test_a_display_gets_its_port_later(before, after):
    words, command = make(*before, displays=[display(PORT)])
    assert words == after
    assert command.display == {
        "type": "vnc",
        "addresses": [{"type": "inet", "host": "127.0.0.1", "port": "5901"}],
    }


def test_a_display_without_a_port_needs_nothing():
    assert make("-vnc", "none", displays=[display()])[1].display is None
    words, command = make("-vnc", "unix:/v", displays=[display(("unix", "", "/v", False))])
    assert (words, command.display) == (["-vnc", "unix:/v.cpr1"], None)


@pytest.mark.parametrize(
    ("words", "displays"),
    [
        (["-vnc", ":1,websocket=on"], [display(PORT, ("ipv4", "0.0.0.0", "5701", True))]),
        (["-vnc", ":1,password=on"], [display(PORT, auth="vnc")]),
        (["-vnc", ":1,id=a", "-vnc", ":2,id=b"], [display(PORT), display(PORT)]),
    ],
    ids=["websocket", "password", "several"],
)
def test_a_display_that_cant_be_handed_over_is_refused(words, displays):
    with pytest.raises(CprError) as caught:
        vnc.without_port(command_line.parse(words), displays)
    assert caught.value.code == "unsupported-option"


USERNET = """\
Hub -1 (n0):\r
  Protocol[State]    FD  Source Address  Port   Dest. Address  Port RecvQ SendQ\r
  TCP[HOST_FORWARD]   9       127.0.0.1  2222       10.0.2.15    22     0     0\r
  TCP[ESTABLISHED]   12       127.0.0.1  2222       10.0.2.15    22     0     0\r
  UDP[HOST_FORWARD]   8               *  5353       10.0.2.15    53     0     0\r
Hub -1 (#net032):\r
  Protocol[State]    FD  Source Address  Port   Dest. Address  Port RecvQ SendQ\r
  TCP[HOST_FORWARD]  10               *  8080       10.0.2.15    80     0     0\r
"""


def test_forwarded_ports_are_given_later():
    words, command = make(
        "-netdev", "user,id=n0,hostfwd=tcp:127.0.0.1:2222-:22,net=10.0.2.0/24", "-nic", "user,model=e1000,hostfwd=tcp::8080-:80",
        user_networks=USERNET,
    )  # fmt: skip
    assert words == ["-netdev", "user,id=n0,net=10.0.2.0/24", "-nic", "user,model=e1000,id=cpruser2"]
    assert command.forwards == [
        ("n0", "tcp:127.0.0.1:2222-10.0.2.15:22"),
        ("n0", "udp::5353-10.0.2.15:53"),
        ("cpruser2", "tcp::8080-10.0.2.15:80"),
    ]


def test_a_forwarding_that_cant_be_read_is_refused():
    with pytest.raises(CprError) as caught:
        user_network.forwards("Hub -1 (n0):\n  TCP[HOST_FORWARD]   9   109.112.47.104 x  10.0.2.15    22     0     0\n")
    assert caught.value.code == "unsupported-option"


def test_a_configuration_file_is_written_out():
    text = '# a guest\n[device "rng0"]\n  driver = "virtio-rng-pci"\n  bus = "pcie.0"\n\n[memory]\n  size = "1G"\n' + (
        '[global]\n  driver = "a"\n  property = "b"\n  value = "c,d"\n[machine]\n  type = "q35"\n'
    )
    words = command_line.write(read_config.options(text, command_line.OPTIONS_WITH_ARGUMENT))
    assert words == [
        "-device", "virtio-rng-pci,id=rng0,bus=pcie.0", "-m", "size=1G", "-global", "driver=a,property=b,value=c,,d",
        "-machine", "type=q35",
    ]  # fmt: skip


@pytest.mark.parametrize("text", ["size = 1G\n", '[frobnicate]\n  a = "b"\n', "[memory]\n  size = 1G\n"])
def test_a_configuration_file_that_is_not_understood_is_refused(text):
    with pytest.raises(CprError) as caught:
        read_config.options(text, command_line.OPTIONS_WITH_ARGUMENT)
    assert caught.value.code == "unreadable-option"


@pytest.mark.parametrize(
    ("words", "cgroup", "manager"),
    [
        (
            ["-chardev", "socket,id=charmonitor,fd=31,server=on"],
            "0::/machine.slice/machine-qemu\\x2d1\\x2dweb.scope",
            "libvirt",
        ),
        (
            ["-object", '{"qom-type":"secret","file":"/var/lib/libvirt/qemu/domain-1-web/master-key.aes"}'],
            "",
            "libvirt",
        ),
        (["-chardev", "socket,id=qmp,path=/var/run/qemu-server/100.qmp,server=on"], "", "Proxmox VE"),
        (["-readconfig", "/run/incus/web/qemu.conf"], "", "Incus"),
        (["-drive", "file=/var/lib/libvirt/images/web.qcow2"], "0::/system.slice/guest.service", None),
    ],
)
def test_guests_of_other_managers_are_told(words, cgroup, manager):
    assert managers.manager_of(words, cgroup) == manager


GOOD_UNIT = {
    "Id": "guest.service", "LoadState": "loaded", "ActiveState": "active", "SubState": "running", "Job": "0", "MainPID": "7",
    "NotifyAccess": "none", "NeedDaemonReload": "no", "WatchdogUSec": "infinity", "FreezerState": "running",
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "cgroup", "reason"),
    [
        ({}, "0::/system.slice/guest.service", None),
        ({"WatchdogUSec": "0"}, "0::/system.slice/guest.service", None),
        ({"MainPID": "6"}, "0::/system.slice/guest.service", "not the QEMU"),
        ({"NeedDaemonReload": "yes"}, "0::/system.slice/guest.service", "daemon-reload"),
        ({"SubState": "reload"}, "0::/system.slice/guest.service", "reload"),
        ({"Job": "512"}, "0::/system.slice/guest.service", "about to change"),
        ({"WatchdogUSec": "30s"}, "0::/system.slice/guest.service", "watchdog"),
        ({"FreezerState": "frozen"}, "0::/system.slice/guest.service", "frozen"),
        ({}, "1:name=systemd:/system.slice/guest.service\n0::/", "version 1"),
    ],
)
def test_which_units_can_be_handed_over(change, cgroup, reason):
    found = systemd.refusal({**GOOD_UNIT, **change}, 7, cgroup)
    assert found is None if reason is None else reason in found


@pytest.mark.parametrize(
    ("main", "kill_mode", "expected"),
    [
        (0, "control-group", True),  # oneshot
        (5, "process", True),  # cron, sshd
        (5, "control-group", False),  # a script that polls a pid file
        (4, "process", False),  # a script that waits for its child
        (7, "process", False),
    ],
)
def test_a_service_that_follows_something_else_is_no_obstacle(main, kill_mode, expected):
    unit = {**GOOD_UNIT, "MainPID": str(main), "KillMode": kill_mode}
    assert systemd.follows_another(unit, 7, [6, 4]) is expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("bind:0", (2, 0b1)),
        ("interleave:0-2,5", (3, 0b100111)),
        ("prefer (many):1", (5, 0b10)),
        ("bind=static:1", (2 | 1 << 15, 0b10)),
        ("local", (4, 0)),
    ],
)
def test_memory_policies_are_read_as_the_kernel_writes_them(text, expected):
    assert surroundings.parse_memory_policy(text) == expected
