# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A guest's network through an update: who talks to it from outside notices nothing."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time

import pytest

from tests.guests.guest import NEW_SUITE, qemu, wait_until
from tests.guests.network import Bridge, Ping, answers, ip, link


@pytest.fixture(name="bridge")
def fixture_bridge():
    bridge = Bridge()
    yield bridge
    bridge.delete()


def test_an_address_that_is_bound_to_the_tap_is_bound_to_the_new_one(start, host, bridge):
    """As against spoofing: the bridge learns nothing, and QEMU's announcement changes nothing."""
    name = bridge.tap(f"cprx{os.getpid()}")
    guest = start(
        "bound", linux=True, address=f"{bridge.guest}/24",
        network=["-netdev", f"tap,id=n,ifname={name},script=no,downscript=no", "-device", "virtio-net-pci,netdev=n"],
    )  # fmt: skip
    subprocess.run(["bridge", "link", "set", "dev", name, "learning", "off", "flood", "off"], check=True)
    words = ["bridge", "fdb", "replace", "52:54:00:12:34:56", "dev", name, "master", "static"]
    subprocess.run(words, check=True)
    wait_until(lambda: answers(bridge.guest), "the guest echoes")
    with socket.create_connection((bridge.guest, 7), timeout=10) as connection:
        host.until("resume", guest)
        connection.sendall(b"still there\n")
        assert connection.recv(100) == b"still there\n"
    wait_until(lambda: answers(bridge.guest), "the guest echoes again")
    shown = subprocess.run(["bridge", "fdb", "show", "dev", name], check=True, stdout=subprocess.PIPE, text=True).stdout
    assert f"52:54:00:12:34:56 master {bridge.name} static" in shown
    guest.check_continuity()


def test_several_cards_keep_their_interfaces(start, host, bridge, rebuilt_qemu):
    """One that was made beforehand, and stays without a QEMU, and one that goes with its QEMU."""
    first = bridge.tap(f"cprx{os.getpid()}")
    words = ["-netdev", f"tap,id=a,ifname={first},script=no,downscript=no", "-device", "e1000,netdev=a"]
    words += [
        "-netdev",
        f"tap,id=b,ifname=cpry{os.getpid()},script=no,downscript=no",
        "-device",
        "virtio-net-pci,netdev=b",
    ]
    guest = start("connected", more=words)
    ip("link", "set", f"cpry{os.getpid()}", "master", bridge.name, "mtu", "1400", "up")

    def ports():
        """Of each port what belongs to it."""
        found = json.loads(ip("-json", "-details", "link", "show", "master", bridge.name))
        return {item["ifname"]: (item["mtu"], item["address"], item["linkinfo"]["info_data"]) for item in found}

    before = ports()
    assert len(before) == 2
    for binary in (qemu(NEW_SUITE), rebuilt_qemu):
        host.until("resume", guest, qemu_binary=binary)
        assert ports() == before
    guest.check_continuity()


@pytest.mark.parametrize(
    ("backend", "made"),
    [
        ("tap,id=net0,ifname=NAME,script=no,downscript=no", []),
        ("tap,id=net0,ifname=NAME,script=no,downscript=no,queues=2", ["multi_queue", "vnet_hdr"]),
        ("tap,id=net0,ifname=NAME,script=SCRIPT,downscript=no", None),
    ],
    ids=["a tap by name", "several queues", "a script"],
)
def test_the_network_stays_up(start, host, bridge, tmp_path, rebuilt_qemu, backend, made):
    name = f"cprx{os.getpid()}"
    if made is not None:
        bridge.tap(name, *made)
    script = tmp_path / "ifup"
    script.write_text(f"#!/bin/sh\nip link set $1 master {bridge.name}\nip link set $1 up\n")
    script.chmod(0o755)
    card = "virtio-net-pci,netdev=net0" + (",mq=on" if "queues" in backend else "")
    guest = start(
        "talker", linux=True, address=f"{bridge.guest}/24",
        network=["-netdev", backend.replace("NAME", name).replace("SCRIPT", str(script)), "-device", card],
    )  # fmt: skip
    wait_until(lambda: answers(bridge.guest), "the guest echoes")
    before = link(name)

    for binary in (qemu(NEW_SUITE), rebuilt_qemu):
        ping = Ping(bridge.guest)
        with socket.create_connection((bridge.guest, 7), timeout=10) as connection:
            ping.start()
            time.sleep(2)
            outcome = host.until("resume", guest, qemu_binary=binary)
            time.sleep(2)
            lost, gap = ping.finish()
            connection.sendall(b"still there\n")
            assert connection.recv(100) == b"still there\n"
        pause = outcome.update.pause_ms
        print(f"{len(ping.sent)} pings, {lost} lost, longest gap {gap:.0f} ms, pause {pause} ms")  # pytest -s shows it
        assert lost <= 2 + pause / 10, "more than what was sent during the pause, of which there is one every 10 ms"
        after = link(name)
        for key in ("master", "mtu", "address", "txqlen", "flags"):
            assert after[key] == before[key]
        assert after["linkinfo"]["info_data"] == before["linkinfo"]["info_data"]
        assert len(json.loads(ip("-json", "link", "show", "master", bridge.name))) == 1
    guest.check_continuity()


@pytest.mark.parametrize("updated", [False, True], ids=["as it was started", "updated before"])
def test_a_tap_that_went_with_its_qemu_is_made_anew_for_a_restored_guest(start, host, bridge, updated):
    name = f"cprz{os.getpid()}"
    guest = start(
        "restored", linux=True, address=f"{bridge.guest}/24",
        network=["-netdev", f"tap,id=n,ifname={name},script=no,downscript=no", "-device", "virtio-net-pci,netdev=n"],
    )  # fmt: skip
    ip("link", "set", name, "master", bridge.name, "up")
    wait_until(lambda: answers(bridge.guest), "the guest echoes")
    if updated:
        host.until("resume", guest)
    (outcome,) = host.checkpoint(guest)
    assert outcome.error is None and not os.path.exists(f"/sys/class/net/{name}")
    (outcome,) = host.restore(guest)
    assert outcome.error is None, str(outcome.error)
    wait_until(lambda: answers(bridge.guest), "the guest echoes again")
    guest.wait_for_ticks()
    guest.check_continuity()
    shown = subprocess.run(["ip", "-d", "link", "show", name], check=True, stdout=subprocess.PIPE, text=True).stdout
    assert f"master {bridge.name}" in shown and "persist off" in shown
