# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A guest's network through an update: who talks to it from outside notices nothing."""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import struct
import subprocess
import threading
import time

import pytest

from tests.guests.guest import NEW_SUITE, qemu, wait_until


def ip(*words):
    return subprocess.run(
        ["ip", *words], check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, "LC_ALL": "C"}
    ).stdout


def link(name, *more):
    return json.loads(ip("-json", "-details", *more, "link", "show", "dev", name))[0]


class Bridge:
    """A bridge of this machine, with an address of its own."""

    def __init__(self):
        number = os.getpid() % 200
        self.name = f"cprt{os.getpid()}"
        self.guest = f"10.209.{number}.2"
        self.address = f"10.209.{number}.1"
        ip("link", "add", self.name, "type", "bridge")
        ip("address", "add", f"{self.address}/24", "dev", self.name)
        ip("link", "set", self.name, "up")

    def tap(self, name, *words):
        """A tap in it that somebody made beforehand."""
        ip("tuntap", "add", "dev", name, "mode", "tap", *words)
        ip("link", "set", name, "master", self.name)
        ip("link", "set", name, "up")
        return name


@pytest.fixture(name="bridge")
def fixture_bridge():
    bridge = Bridge()
    yield bridge
    for item in json.loads(ip("-json", "link", "show", "master", bridge.name)):
        ip("link", "delete", "dev", item["ifname"])
    ip("link", "delete", "dev", bridge.name)


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


class Ping(threading.Thread):
    """Asks an address for an echo every 10 ms, and notes which answers came when."""

    def __init__(self, address):
        super().__init__()
        self.address = address
        self.sent = {}
        self.answers = {}
        self._going = True

    def run(self):
        with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as raw:
            raw.connect((self.address, 0))
            number, due = 0, time.monotonic()
            while self._going or time.monotonic() < due + 0.5:
                now = time.monotonic()
                if self._going and now >= due:
                    raw.send(self._request(number))
                    self.sent[number] = now
                    number += 1
                    due += 0.01
                if select.select([raw], [], [], max(0, min(0.01, due - time.monotonic())))[0]:
                    packet = raw.recv(2048)
                    kind, dummy, dummy, identity, answered = struct.unpack("!BBHHH", packet[20:28])
                    if kind == 0 and identity == os.getpid() & 0xFFFF:
                        self.answers.setdefault(answered, time.monotonic())

    @staticmethod
    def _request(number):
        header = struct.pack("!BBHHH", 8, 0, 0, os.getpid() & 0xFFFF, number)
        total = sum(struct.unpack("!4H", header))
        total = (total & 0xFFFF) + (total >> 16)
        return struct.pack("!BBHHH", 8, 0, ~total & 0xFFFF, os.getpid() & 0xFFFF, number)

    def finish(self):
        """Lost requests and the longest time, in milliseconds, between two answers."""
        self._going = False
        self.join()
        times = sorted(self.answers.values())
        gap = max(after - before for before, after in zip(times, times[1:]))
        return len(self.sent) - len(self.answers), gap * 1000


def answers(address):
    with contextlib.suppress(OSError), socket.create_connection((address, 7), timeout=1) as connection:
        connection.sendall(b"hello\n")
        return connection.recv(100) == b"hello\n"
    return False


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
