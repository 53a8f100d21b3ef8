# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Networks of real guests, and who talks to those from outside."""

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

    def delete(self):
        """With all that is in it."""
        for item in json.loads(ip("-json", "link", "show", "master", self.name)):
            ip("link", "delete", "dev", item["ifname"])
        ip("link", "delete", "dev", self.name)


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
        gap = max((after - before for before, after in zip(times, times[1:])), default=float("inf"))
        return len(self.sent) - len(self.answers), gap * 1000


def answers(address):
    with contextlib.suppress(OSError), socket.create_connection((address, 7), timeout=1) as connection:
        connection.sendall(b"hello\n")
        return connection.recv(100) == b"hello\n"
    return False
