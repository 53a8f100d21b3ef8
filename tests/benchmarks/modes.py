# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""How long a guest pauses in each mode, and what that costs, beside the bare QMP sequence of the same mode.

    .venv/bin/python -m tests.benchmarks.modes [--runs 5] [--memory 256]

Every run starts fresh guests for both: boot-sector guests whose RAM is filled with random data, so that
nothing of it is cheap to copy. Prints medians and ratios.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
import statistics
import tempfile
import threading
import time
import typing as t

from tests.benchmarks import bare_sequence
from tests.guests.guest import NEW_SUITE, Guest, Qmp, boot_sector_guest, qemu
from tests.integration.conftest import Host

_MEMFD = ("-object", "memory-backend-memfd,id=ram0,size={size}M,share=on")
_FILE = ("-object", "memory-backend-file,id=ram0,size={size}M,mem-path={dir}/ram,share=on")
_EVENTS = [{"capability": "events", "state": True}]
_BOTH = [*_EVENTS, {"capability": "return-path", "state": True}]


@dataclasses.dataclass
class Figures:
    """What one update took."""

    pause_ms: float
    seconds: float
    mib: float


class Peak:
    """The most memory of the host that was taken at once since it began, in MiB."""

    def __enter__(self) -> Peak:
        self._before = self._least = _available()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stopped.wait(0.01):
            self._least = min(self._least, _available())

    def __exit__(self, *dummy: object) -> None:
        self._stopped.set()
        self._thread.join()
        self.mib = (self._before - self._least) / 1024


def _available() -> int:
    text = pathlib.Path("/proc/meminfo").read_text(encoding="ascii")
    return next(int(line.split()[1]) for line in text.splitlines() if line.startswith("MemAvailable:"))


def _start(name: str, directory: pathlib.Path, memory: t.Sequence[str] | None, size: int) -> Guest:
    words = memory and [word.replace("{size}", str(size)) for word in memory]
    guest = boot_sector_guest(name, directory / name, memory=words, more=["-m", f"{size}M"])
    guest.start(qemu(NEW_SUITE))
    guest.wait_for_ticks(5)
    with guest.qmp() as monitor:
        _fill(monitor, guest.pid(), size)
    return guest


def _fill(monitor: Qmp, pid: int, size: int) -> None:
    """Fill all but the first 16 MiB of the guest's RAM, from outside, with what can't be packed."""
    text = monitor.execute("human-monitor-command", **{"command-line": "info ramblock"})
    line = next(line for line in text.splitlines() if line.split()[:1] in (["ram0"], ["pc.ram"]))
    base = int(line.split()[6], 16)
    with open(f"/proc/{pid}/mem", "r+b", buffering=0) as stream:
        for offset in range(16, size):
            stream.seek(base + (offset << 20))
            stream.write(os.urandom(1 << 20))


def by_collection(
    directory: pathlib.Path, mode: str, memory: t.Sequence[str] | None, size: int, binary: str
) -> Figures:
    """All phases without Ansible: from the first look to the end of the old QEMU."""
    guest = _start("ours", directory, memory, size)
    host = Host(pathlib.Path(tempfile.mkdtemp(dir="/dev/shm")))
    try:
        started = time.monotonic()
        with Peak() as peak:
            outcome = host.until("resume", guest, qemu_binary=binary, mode=mode, pause_limit=60.0)
        seconds = time.monotonic() - started
        guest.wait_for_ticks()
        guest.check_continuity()
        return Figures(t.cast(float, t.cast(t.Any, outcome.update).pause_ms), seconds, peak.mib)
    finally:
        guest.kill()
        shutil.rmtree(host.state)


def by_bare_sequence(
    directory: pathlib.Path, mode: str, memory: t.Sequence[str] | None, size: int, binary: str
) -> Figures:
    """The QMP messages of the mode and nothing else: no checks, no record, no undo."""
    guest = _start("bare", directory, memory, size)
    try:
        started = time.monotonic()
        with Peak() as peak:
            pause = _BARE[mode](guest, directory / "bare", size, binary)
        seconds = time.monotonic() - started
        guest.wait_for_ticks()
        guest.check_continuity()
        return Figures(pause, seconds, peak.mib)
    finally:
        guest.kill()


def _second(guest: Guest, directory: pathlib.Path, binary: str, *more: str) -> t.Iterator[Qmp]:
    """A new QEMU beside the old one."""
    words = [
        word.replace("qmp.sock", "new.sock").replace("console.log", "console.log,append=on") for word in guest.words
    ]
    other = Guest(guest.name, directory, [*words, *more, "-S", "-incoming", "defer"])
    other.monitor = directory / "new.sock"
    other.start(binary)
    with other.qmp() as monitor:
        yield monitor
    os.rename(other.monitor, guest.monitor)


def _wait(monitor: Qmp, name: str, status: str | None = None) -> float:
    """When this event came, in milliseconds."""
    while True:
        event = json.loads(monitor._stream.readline())
        if event.get("event") == name and status in (None, event.get("data", {}).get("status")):
            return event["timestamp"]["seconds"] * 1e3 + event["timestamp"]["microseconds"] / 1e3


def _bare_transfer(guest: Guest, dummy: pathlib.Path, size: int, binary: str) -> float:
    return asyncio.run(bare_sequence.update_all([guest], binary, 1))[0]


def _bare_precopy(guest: Guest, directory: pathlib.Path, size: int, binary: str) -> float:
    shared = ("-object", f"memory-backend-memfd,id=pc.ram,size={size}M,share=on", "-machine", "memory-backend=pc.ram")
    with guest.qmp() as old, contextlib.contextmanager(_second)(guest, directory, binary, *shared) as new:
        for monitor in (old, new):
            monitor.execute("migrate-set-capabilities", capabilities=_BOTH)
            monitor.execute("migrate-set-parameters", **{"max-bandwidth": 0})
        new.execute("migrate-incoming", uri=f"unix:{directory}/main.sock")
        old.send("migrate", uri=f"unix:{directory}/main.sock")
        stop = _wait(old, "STOP")
        _wait(new, "MIGRATION", "completed")
        new.send("cont")
        resume = _wait(new, "RESUME")
        old.send("quit")
    return resume - stop


def _bare_reboot(guest: Guest, directory: pathlib.Path, dummy: int, binary: str) -> float:
    in_place = any("mem-path" in word for word in guest.words)
    capabilities = [*_EVENTS, {"capability": "x-ignore-shared", "state": in_place}]
    with guest.qmp() as old, contextlib.contextmanager(_second)(guest, directory, binary) as new:
        for monitor in (old, new):
            monitor.execute("migrate-set-capabilities", capabilities=capabilities)
            monitor.execute("migrate-set-parameters", **{"max-bandwidth": 0})
        old.execute("migrate-set-parameters", mode="cpr-reboot")
        old.send("migrate", uri=f"file:/dev/shm/{guest.name}.state")
        stop = _wait(old, "STOP")
        _wait(old, "MIGRATION", "completed")
        new.send("migrate-incoming", uri=f"file:/dev/shm/{guest.name}.state")
        _wait(new, "MIGRATION", "completed")
        new.send("cont")
        resume = _wait(new, "RESUME")
        old.send("quit")
    os.unlink(f"/dev/shm/{guest.name}.state")
    return resume - stop


def _bare_exec(guest: Guest, directory: pathlib.Path, dummy: int, binary: str) -> float:
    words = [word.replace("console.log", "console.log,append=on") for word in guest.words]
    with guest.qmp() as old:
        old.execute("migrate-set-capabilities", capabilities=_EVENTS)
        command = [binary, *words, "-incoming", f"file:{directory}/state"]
        old.execute("migrate-set-parameters", mode="cpr-exec", **{"cpr-exec-command": command})
        old.send("migrate", uri=f"file:{directory}/state")
        stop = _wait(old, "STOP")
        while True:
            try:
                if old._stream.readline() == "":
                    break
            except OSError:
                break
    while True:
        try:
            with guest.qmp() as new:
                while new.execute("query-status")["status"] != "running":
                    time.sleep(0.001)
                return time.time() * 1e3 - stop
        except (OSError, ValueError):
            time.sleep(0.001)


_BARE = {
    "cpr-transfer": _bare_transfer, "precopy": _bare_precopy, "cpr-reboot": _bare_reboot, "cpr-exec": _bare_exec,
}  # fmt: skip
_ROWS: list[tuple[str, str, t.Sequence[str] | None]] = [
    ("cpr-transfer", "shared", _MEMFD),
    ("cpr-exec", "shared", _MEMFD),
    ("cpr-reboot", "shared, in a file", _FILE),
    ("cpr-reboot", "shared", _MEMFD),
    ("precopy", "plain", None),
]


def checkpointed(directory: pathlib.Path, size: int) -> Figures:
    """guest_checkpoint and guest_restore, without a reboot between them."""
    guest = _start("file", directory, _MEMFD, size)
    host = Host(directory / "state")
    try:
        started = time.monotonic()
        with Peak() as peak:
            for outcome in (*host.checkpoint(guest), *host.restore(guest)):
                assert outcome.error is None, str(outcome.error)
        seconds = time.monotonic() - started
        guest.wait_for_ticks()
        guest.check_continuity()
        return Figures(t.cast(float, t.cast(t.Any, outcome.update).pause_ms), seconds, peak.mib)
    finally:
        guest.kill()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--memory", type=int, default=256, help="MiB of RAM")
    arguments = parser.parse_args()
    original = pathlib.Path(qemu(NEW_SUITE))
    binary = original.with_name("qemu-system-x86_64-again")
    shutil.copy2(original, binary)  # another file, as after a rebuild of the package
    print(f"{arguments.runs} runs, {arguments.memory} MiB of RAM, QEMU 11.1 to 11.1; medians\n")
    print("| mode | RAM | pause, ms | bare, ms | ratio | all phases, s | bare, s | more memory, MiB | bare, MiB |")
    print("|---|---|---|---|---|---|---|---|---|")
    try:
        for mode, name, memory in _ROWS:
            ours, bare = [], []
            for dummy in range(arguments.runs):
                for found, measure in ((ours, by_collection), (bare, by_bare_sequence)):
                    with tempfile.TemporaryDirectory() as place:
                        found.append(measure(pathlib.Path(place), mode, memory, arguments.memory, str(binary)))
            _print_row(mode, name, ours, bare)
        found = []
        for dummy in range(arguments.runs):
            with tempfile.TemporaryDirectory() as place:
                found.append(checkpointed(pathlib.Path(place), arguments.memory))
        _print_row("checkpoint and restore", "shared", found, [])
    finally:
        binary.unlink()


def _print_row(mode: str, name: str, ours: list[Figures], bare: list[Figures]) -> None:
    def median(found: list[Figures], what: str) -> float:
        return statistics.median(getattr(item, what) for item in found)

    row = [mode, name, f"{median(ours, 'pause_ms'):.1f}"]
    row += (
        [f"{median(bare, 'pause_ms'):.1f}", f"{median(ours, 'pause_ms') / median(bare, 'pause_ms'):.2f}"]
        if bare
        else ["", ""]
    )
    row += [f"{median(ours, 'seconds'):.2f}", f"{median(bare, 'seconds'):.2f}" if bare else ""]
    row += [f"{median(ours, 'mib'):.0f}", f"{median(bare, 'mib'):.0f}" if bare else ""]
    print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
