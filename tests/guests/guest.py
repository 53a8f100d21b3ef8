# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Real guests on real QEMUs, for tests, benchmarks and the demonstration.

They are started like somebody's script starts them and looked at from outside, by means of
their own (a plain QMP client, ``/proc``, the guest's own output): nothing here uses the code
under test.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import typing as t

TOP = pathlib.Path(__file__).resolve().parents[2]
CACHE = TOP / ".cache"
OLD_SUITE = "bookworm-backports"  # QEMU 10.0.2
NEW_SUITE = "trixie-backports"  # QEMU 11.1

# Seconds; generous, since nothing here measures time.
PATIENCE = 60.0


def qemu(suite: str) -> str:
    """The path of a suite's QEMU, which ``make qemu`` unpacks."""
    path = CACHE / "qemu" / suite / "bin" / "qemu-system-x86_64"
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: run make qemu")
    return str(path)


def wait_until(condition: t.Callable[[], t.Any], what: str, patience: float = PATIENCE) -> t.Any:
    """What the condition returns once it is true."""
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.02)
    raise TimeoutError(f"waited {patience:g} s in vain until {what}")


def command_line_of(pid: int) -> list[str]:
    """The words of a process's command line; empty if it is gone."""
    try:
        return pathlib.Path(f"/proc/{pid}/cmdline").read_text(encoding="utf-8", errors="replace").split("\0")[:-1]
    except OSError:
        return []


def is_alive(pid: int) -> bool:
    """Whether the process runs; one that only waits to be reaped does not."""
    try:
        fields = pathlib.Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return False
    return fields[0] not in "ZX"


class Qmp:
    """A plain QMP connection.

    What QEMU still owes the client before may come first, and is passed over.
    """

    _numbers = itertools.count()

    def __init__(self, path: str | os.PathLike[str], timeout: float = 10) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(timeout)
        self._socket.connect(str(path))
        self._stream = self._socket.makefile("rw")
        self.greeting: dict[str, t.Any] = {}
        while "QMP" not in self.greeting:
            self.greeting = json.loads(self._stream.readline())
        self.execute("qmp_capabilities")

    def send(self, command: str, **arguments: t.Any) -> int:
        """Send a command, and return the number that its answer will have."""
        number = next(self._numbers)
        self._stream.write(json.dumps({"execute": command, "arguments": arguments, "id": number}) + "\n")
        self._stream.flush()
        return number

    def execute(self, command: str, **arguments: t.Any) -> t.Any:
        """What the command returns; KeyError with QEMU's error if it is refused."""
        number = self.send(command, **arguments)
        answer: dict[str, t.Any] = {}
        while answer.get("id") != number:
            answer = json.loads(self._stream.readline())
        if "error" in answer:
            raise KeyError(answer["error"]["desc"])
        return answer["return"]

    def __enter__(self) -> Qmp:
        return self

    def __exit__(self, *dummy: object) -> None:
        self._stream.close()
        self._socket.close()


class Guest:
    """A guest in a directory of its own.

    :param words: the QEMU command line without the binary, ``{dir}`` for the directory.
    """

    def __init__(self, name: str, directory: pathlib.Path, words: t.Sequence[str]) -> None:
        self.name = name
        self.directory = directory
        self.monitor = directory / "qmp.sock"
        self.console = directory / "console.log"
        self.words = [word.replace("{dir}", str(directory)) for word in words]
        self._children: list[subprocess.Popen[bytes]] = []

    def start(self, binary: str, prefix: t.Sequence[str] = (), **surroundings: t.Any) -> Guest:
        """Start it on this QEMU, detached, and wait for its monitor.

        :param prefix: a command that becomes the QEMU.
        :param surroundings: arguments of `subprocess.Popen` (environment, user, limits).
        """
        self.monitor.unlink(missing_ok=True)
        with open(self.directory / "stderr.log", "ab") as log:
            child = subprocess.Popen(
                [*prefix, binary, *self.words],
                **{
                    "stdin": subprocess.DEVNULL,
                    "stdout": log,
                    "stderr": log,
                    "start_new_session": True,
                    "cwd": self.directory,
                    **surroundings,
                },
            )
        self._children.append(child)

        def ready() -> bool:
            if child.poll():  # with -daemonize it ends at once, and well
                raise RuntimeError((self.directory / "stderr.log").read_text(encoding="utf-8"))
            return self.monitor.exists()

        wait_until(ready, f"{self.name} has its monitor")
        return self

    def pids(self) -> list[int]:
        """Every QEMU process that has to do with this guest."""
        mark = f"guest={self.name},"
        return [
            pid
            for pid in map(int, filter(str.isdigit, os.listdir("/proc")))
            if is_alive(pid) and any(mark in word for word in command_line_of(pid))
        ]

    def pid(self) -> int:
        """The one process that has to do with this guest."""
        pids = self.pids()
        assert len(pids) == 1, f"{self.name}: {len(pids)} processes: {pids}"
        return pids[0]

    def qmp(self) -> Qmp:
        """A connection to the monitor at the path that the guest was started with."""
        return Qmp(self.monitor)

    def version(self) -> str:
        """The version of the QEMU that answers at that path."""
        with self.qmp() as monitor:
            version = monitor.greeting["QMP"]["version"]["qemu"]
        return f"{version['major']}.{version['minor']}.{version['micro']}"

    def status(self) -> str:
        """The run state, from that monitor."""
        with self.qmp() as monitor:
            return monitor.execute("query-status")["status"]

    def lines(self) -> list[str]:
        """The guest's own output, whole lines only."""
        text = self.console.read_text(encoding="ascii", errors="replace") if self.console.exists() else ""
        return [line.strip("\r") for line in text.split("\n")[:-1]]

    def ticks(self) -> list[int]:
        """Every value that the guest has counted."""
        raise NotImplementedError

    def boots(self) -> int:
        """How many times the guest has booted."""
        raise NotImplementedError

    def wait_for_ticks(self, more: int = 5) -> int:
        """Wait until the guest has counted so much further; its newest value."""
        before = len(self.ticks())
        wait_until(lambda: len(self.ticks()) >= before + more, f"{self.name} counts on")
        return self.ticks()[-1]

    def check_continuity(self) -> None:
        """Every value once, in order, and one boot: the guest never noticed anything."""
        ticks = self.ticks()
        assert ticks == list(range(ticks[0], ticks[0] + len(ticks))), f"{self.name}: gap in {ticks}"
        assert self.boots() == 1, f"{self.name}: booted {self.boots()} times"

    def kill(self) -> None:
        """End all of the guest's processes, by pid."""
        for pid in self.pids():
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not self.pids(), f"{self.name} is gone")
        for child in self._children:
            child.wait()


class BootSectorGuest(Guest):
    """The guest in one sector; see boot_sector.S."""

    def ticks(self) -> list[int]:
        """Every value that the guest has counted."""
        return [int(line, 16) for line in self.lines() if re.fullmatch("[0-9A-Fa-f]{4,8}", line)]

    def boots(self) -> int:
        """How many times the guest has booted."""
        return self.lines().count("boot")


class LinuxGuest(Guest):
    """The Linux guest; see init."""

    def _ticks(self) -> list[list[str]]:
        return [line.split() for line in self.lines() if line.startswith("tick ") and line.count(" ") == 2]

    def ticks(self) -> list[int]:
        """Every value that the guest has counted."""
        return [int(words[1]) for words in self._ticks()]

    def boots(self) -> int:
        """How many times the guest has booted."""
        return len({words[2] for words in self._ticks()})


def boot_sector_guest(
    name: str,
    directory: pathlib.Path,
    *,
    machine: str = "q35",
    accelerator: str | None = None,
    memory: t.Sequence[str] | None = ("-object", "memory-backend-memfd,id=ram0,size=64M,share=on"),
    monitor: t.Sequence[str] = ("-qmp", "unix:{dir}/qmp.sock,server=on,wait=off"),
    console: t.Sequence[str] = ("-chardev", "file,id=console,path={dir}/console.log", "-serial", "chardev:console"),
    more: t.Sequence[str] = (),
    busy: bool = False,
) -> BootSectorGuest:
    """A guest that is ready for a live update, unless told otherwise.

    :param memory: None for RAM that nobody can share, as almost every guest has it.
    :param machine: the machine type and further properties of ``-machine``.
    :param accelerator: ``kvm`` or ``tcg``; by default the better one that works here.
    :param busy: whether it changes its memory all the time.
    """
    directory.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(CACHE / "guests" / f"{'busy' if busy else 'boot'}_sector.img", directory / "disk.img")
    # Where a display is asked for, none would be one too many.
    display = [] if {"-vnc", "-display", "-nographic"} & {*more, *console} else ["-display", "none"]
    machine_words = f"{machine},accel={accelerator or best_accelerator()}"
    if memory is not None:
        machine_words += f"{',memory-backend=ram0' if memory else ''},aux-ram-share=on"
    return BootSectorGuest(
        name,
        directory,
        [
            "-name", f"guest={name},debug-threads=on",
            "-machine", machine_words,
            "-cpu", "qemu64", "-m", "64M", *(memory or ()),
            "-nodefaults", *display,
            "-drive", "if=none,id=disk,file={dir}/disk.img,format=raw",
            "-device", "ide-hd,drive=disk,bus=ide.0",
            *console, *monitor, *more,
        ],
    )  # fmt: skip


def linux_guest(
    name: str,
    directory: pathlib.Path,
    more: t.Sequence[str] = (),
    network: t.Sequence[str] = ("-netdev", "user,id=net0", "-device", "virtio-net-pci,netdev=net0"),
    address: str | None = None,
    shared: bool = True,
    words: str = "",
) -> LinuxGuest:
    """A Linux guest with two processors, a disk, a network card and a random number generator.

    It runs under TCG: that works on every machine.

    :param address: what its card gets, with the length of the prefix; it then echoes at port 7.
    :param shared: whether its RAM is ready for a live update.
    :param words: more words for its kernel; see init.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / "disk.img", "wb") as disk:
        disk.truncate(1 << 20)
    return LinuxGuest(
        name,
        directory,
        [
            "-name", f"guest={name},debug-threads=on",
            "-machine", f"q35,accel=tcg{',memory-backend=ram0,aux-ram-share=on' if shared else ''}",
            "-cpu", "qemu64", "-smp", "2", "-m", "256M",
            *(("-object", "memory-backend-memfd,id=ram0,size=256M,share=on") if shared else ()),
            "-nodefaults", "-display", "none",
            "-kernel", str(CACHE / "guests" / "vmlinuz"), "-initrd", str(CACHE / "guests" / "initrd"),
            "-append", f"console=ttyS0 quiet panic=-1{f' address={address}' if address else ''} {words}".strip(),
            "-blockdev", "driver=file,filename={dir}/disk.img,node-name=file0",
            "-blockdev", '{"driver":"raw","node-name":"disk0","file":"file0"}',
            "-device", "virtio-blk-pci,drive=disk0",
            *network,
            "-device", "virtio-rng-pci",
            "-chardev", "file,id=console,path={dir}/console.log", "-serial", "chardev:console",
            "-chardev", "socket,id=monitor,path={dir}/qmp.sock,server=on,wait=off",
            "-mon", "chardev=monitor,mode=control",
            *more,
        ],
    )  # fmt: skip


@functools.cache
def best_accelerator() -> str:
    """``kvm`` if a guest really runs under it here, else ``tcg``; /dev/kvm alone says little."""
    with tempfile.TemporaryDirectory() as directory:
        guest = boot_sector_guest("probe-kvm", pathlib.Path(directory), accelerator="kvm")
        try:
            guest.start(qemu(OLD_SUITE))
            wait_until(guest.ticks, "a guest under KVM counts", patience=15)
        except (RuntimeError, TimeoutError):
            return "tcg"
        finally:
            guest.kill()
    return "kvm"
