# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Tap interfaces and their doubles, on what ip, bridge and tc of real hosts print.

VLANs and most queue disciplines can't be had on every test machine: these are recorded.
"""

from __future__ import annotations

import copy

import pytest

from ansible_collections.vmfleet.cpr.plugins.module_utils import command_line, taps
from ansible_collections.vmfleet.cpr.plugins.module_utils.errors import CprError

LINK = {
    "ifname": "tap0", "flags": ["BROADCAST", "MULTICAST", "UP", "LOWER_UP"], "mtu": 9000, "qdisc": "tbf", "master": "br0",
    "operstate": "UP", "group": "guests", "txqlen": 500, "address": "36:9b:d9:cb:a8:74", "ifalias": "web one",
    "linkinfo": {
        "info_kind": "tun",
        "info_data": {"type": "tap", "pi": False, "vnet_hdr": True, "multi_queue": True, "numqueues": 2, "persist": True,
                      "user": "1000"},
        "info_slave_kind": "bridge",
    },
}  # fmt: skip
PORT = {
    "ifname": "tap0",
    "state": "forwarding",
    "priority": 32,
    "cost": 2,
    "hairpin": False,
    "learning": True,
    "isolated": True,
}
VLANS = {
    "ifname": "tap0",
    "vlans": [
        {"vlan": 10, "flags": ["PVID", "Egress Untagged"]},
        {"vlan": 20, "vlanEnd": 29},
    ],
}
TBF = "qdisc tbf 8001: root refcnt 257 rate 10Mbit burst 32Kb lat 400ms \n"


def settings(link=None, port=None, vlans=None, queue_disciplines=TBF):
    return taps.read_settings(link or LINK, [port or PORT], [vlans or VLANS], queue_disciplines)


def changed(*path, value):
    link = copy.deepcopy(LINK)
    target = link
    for key in path[:-1]:
        target = target[key]
    if value is None:
        del target[path[-1]]
    else:
        target[path[-1]] = value
    return link


def test_a_tap_is_described():
    addresses = [
        {"mac": "52:54:00:00:00:01", "ifname": "tap0", "vlan": 10, "flags": [], "master": "br0", "state": "static"},
        {"mac": "52:54:00:00:00:02", "ifname": "tap0", "flags": [], "master": "br0", "state": ""},
        {"mac": LINK["address"], "ifname": "tap0", "flags": [], "master": "br0", "state": "permanent"},
        {"mac": "33:33:00:00:00:01", "ifname": "tap0", "flags": ["self"], "state": "permanent"},
    ]
    assert taps.describe(LINK, addresses, 2, "cpr7n0") == taps.Tap(
        addresses=[("52:54:00:00:00:01", 10)],
        name="tap0",
        temporary="cpr7n0",
        queues=2,
        multi_queue=True,
        vnet_header=True,
        persistent=True,
        owner=1000,
    )


def test_its_double_gets_all_that_it_has():
    wanted = settings()
    fresh = settings(
        {**LINK, "ifname": "cpr7n0", "flags": ["BROADCAST", "MULTICAST"]},
        {**PORT, "isolated": False},
        {"ifname": "cpr7n0", "vlans": [{"vlan": 1, "flags": ["PVID", "Egress Untagged"]}]},
        "",
    )
    assert [" ".join(command) for command in taps.create_commands(wanted, "cpr7n0")] == [
        "ip link set dev cpr7n0 address 36:9b:d9:cb:a8:74",
        "ip link set dev cpr7n0 mtu 9000",
        "ip link set dev cpr7n0 txqueuelen 500",
        "ip link set dev cpr7n0 alias web one",
        "ip link set dev cpr7n0 group guests",
        "ip link set dev cpr7n0 master br0",
        "tc qdisc add dev cpr7n0 root tbf rate 10Mbit burst 32Kb latency 400ms",
    ]
    assert [" ".join(command) for command in taps.adapt_commands(wanted, fresh, "cpr7n0")] == [
        "bridge link set dev cpr7n0 isolated on",
        "bridge vlan del dev cpr7n0 vid 1",
        "bridge vlan add dev cpr7n0 vid 10 pvid untagged",
        "bridge vlan add dev cpr7n0 vid 20-29",
        "ip link set dev cpr7n0 up",
    ]


def test_a_double_that_is_alike_is_left_alone():
    assert taps.adapt_commands(settings(), settings(), "x") == [["ip", "link", "set", "dev", "x", "up"]]
    assert taps.differences(settings(), settings()) == []


def test_what_could_not_be_made_alike_is_named():
    (difference,) = taps.differences(settings(), settings(vlans={"ifname": "x", "vlans": []}))
    assert difference.startswith("vlans is () and not (('10',")


@pytest.mark.parametrize(
    ("printed", "words"),
    [
        ("qdisc noqueue 0: root refcnt 2 \n", ()),
        ("qdisc mq 0: root \nqdisc pfifo_fast 0: parent :1 bands 3 priomap 1 2 2 2 1 2 0 0 1 1 1 1 1 1 1 1\n", ()),
        ("qdisc pfifo 8004: root refcnt 257 limit 77p\n", ("pfifo", "limit", "77")),
        ("qdisc fq_codel 8005: root refcnt 2 limit 500p flows 1024 quantum 1514 target 5ms interval 100ms ecn\n",
         ("fq_codel", "limit", "500", "flows", "1024", "quantum", "1514", "target", "5ms", "interval", "100ms", "ecn")),
    ],
)  # fmt: skip
def test_queue_disciplines(printed, words):
    assert settings(queue_disciplines=printed).queue_discipline == words


@pytest.mark.parametrize(
    ("link", "reason"),
    [
        (changed("linkinfo", "info_slave_kind", value=None), "belongs to br0, which is no Linux bridge"),
        (changed("linkinfo", "info_kind", value="macvtap"), "it is macvtap"),
        ({key: value for key, value in changed("linkinfo", "info_slave_kind", value=None).items() if key != "master"},
         "it is in no bridge"),
    ],
    ids=["open vswitch", "macvtap", "routed"],
)  # fmt: skip
def test_a_tap_that_cant_be_doubled_is_refused(link, reason):
    with pytest.raises(CprError, match=reason) as caught:
        taps.describe(link, [], 1, "x")
    assert caught.value.code == "tap-unsupported"


def test_a_queue_discipline_with_classes_is_refused():
    with pytest.raises(CprError, match="htb") as caught:
        settings(queue_disciplines="qdisc htb 8002: root refcnt 2 r2q 10 default 0x10\n")
    assert caught.value.code == "tap-unsupported"


def interfaces(words, open_taps):
    return taps.interfaces(command_line.parse(words), open_taps)


def test_the_interface_of_each_backend_is_found():
    by_name = ["-netdev", "tap,id=a,ifname=tap0", "-netdev", "tap,id=b,ifname=tap1"]
    assert interfaces(by_name, {9: "tap1", 12: "tap0"}) == ["tap0", "tap1"]
    assert interfaces(["-nic", "tap,fd=12", "-netdev", "tap,id=b,fds=9:10"], {9: "x", 10: "x", 12: "y"}) == ["y", "x"]
    # The helper, or QEMU, has chosen the name; or somebody has changed it.
    assert interfaces(["-netdev", "bridge,br=br0,id=a"], {9: "tap7"}) == ["tap7"]
    assert interfaces(["-net", "tap,ifname=old", "-net", "nic"], {9: "new"}) == ["new"]
    assert interfaces(["-netdev", '{"type":"tap","id":"a","ifname":"tap0"}'], {9: "tap0"}) == ["tap0"]
    assert interfaces(["-netdev", "user,id=a"], {}) == []
    with pytest.raises(CprError) as caught:
        interfaces(["-netdev", "tap,id=a", "-netdev", "tap,id=b"], {9: "tap0"})
    assert caught.value.code == "tap-unknown"


@pytest.mark.parametrize(
    ("before", "numbers", "vhost", "after"),
    [
        ("tap,id=n,ifname=t,script=no,downscript=no", [10], [], "tap,id=n,fd=10"),
        ("tap,id=n,ifname=t,queues=2,vhost=on", [10, 11], [], "tap,id=n,vhost=on,fds=10:11"),
        ("tap,id=n,fds=3:4,vhostfds=5:6", [10, 11], [12, 13], "tap,id=n,fds=10:11,vhostfds=12:13"),
        ("bridge,br=br0,id=n,helper=/x", [10], [], "tap,id=n,fd=10"),
        ('{"type":"tap","id":"n","ifname":"t","vhost":true}', [10], [], "tap,id=n,vhost=on,fd=10"),
    ],
)
def test_a_backend_gets_descriptors(before, numbers, vhost, after):
    option = command_line.Option("-netdev", before)
    assert taps.with_descriptors(option, numbers, vhost).value == after
    assert taps.has_vhost_descriptors(option) == bool(vhost)
    assert taps.queues(option) == len(numbers)
