# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What is broken, and when: the faults, and the matrix of both."""

from __future__ import annotations

import ctypes
import os
import pathlib
import random
import signal
import socket
import subprocess
import typing as t
from dataclasses import dataclass

from tests.guests.guest import Qmp, is_alive, wait_until

if t.TYPE_CHECKING:
    from tests.faults.trial import Scene

# Seconds that a stopped process stays stopped: longer than the pause limit.
HOLD = 3.0

# The record's phases, in order, with the instant in which the commit is marked between them.
PHASES = (
    "launching", "launched", "transferring", "transferred", "set-up", "switching", "commit", "switched", "finished",
)  # fmt: skip


@dataclass(frozen=True)
class Fault:
    """Something that breaks.

    :ivar inject: breaks it; returns what mends it again, or None where that is not needed.
        Raises ProcessLookupError where there is nothing to break any more.
    :ivar phases: when it can happen.
    :ivar mended_after: seconds; None for the end of the run.
    :ivar beside: whether it takes a new QEMU beside the old one, which cpr-exec has not.
    """

    name: str
    inject: t.Callable[[Scene], t.Callable[[], object] | None]
    phases: tuple[str, ...] = PHASES
    mended_after: float | None = None
    beside: bool = False


def parent_of(pid: int) -> int:
    """The process that started this one, or adopted it."""
    return int(pathlib.Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[1])


def _holder(scene: Scene) -> int:
    """The process that holds the guest's lock, once there is one."""

    def found() -> int:
        try:
            pid = int((scene.record.parent / "lock").read_text(encoding="utf-8").split()[1])
        except (OSError, IndexError, ValueError):
            return 0
        return pid if is_alive(pid) else 0

    return wait_until(found, "a module works on the guest", patience=3)


def _is_detached(pid: int) -> bool:
    return os.getsid(pid) == pid


def _module(scene: Scene) -> int:
    pid = _holder(scene)
    return parent_of(pid) if _is_detached(pid) else pid


def _switch_process(scene: Scene) -> int:
    def found() -> int:
        pid = _holder(scene)
        return pid if _is_detached(pid) else 0

    return wait_until(found, "the switch has a process", patience=3)


_TARGETS: dict[str, tuple[t.Callable[[Scene], int], tuple[str, ...]]] = {
    "the new QEMU": (lambda scene: scene.new_pid(), PHASES),
    "the old QEMU": (lambda scene: scene.old, PHASES),
    "the module": (_module, PHASES),
    "the switch process": (_switch_process, ("set-up", "switching", "commit", "switched")),
    "ansible-playbook": (lambda scene: scene.ansible, PHASES),
}


def _signals() -> t.Iterator[Fault]:
    for target, (find, phases) in _TARGETS.items():
        for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP):

            def inject(
                scene: Scene, find: t.Callable[[Scene], int] = find, number: signal.Signals = number
            ) -> t.Callable[[], object] | None:
                pid = find(scene)
                os.kill(pid, number)
                return (lambda: _go_on(pid)) if number == signal.SIGSTOP else None

            # Nobody but the update itself has to get along with a new QEMU that hangs.
            is_new = target == "the new QEMU"
            yield Fault(f"{number.name} to {target}", inject, phases, None if is_new else HOLD, beside=is_new)


def _go_on(pid: int) -> None:
    if is_alive(pid):
        os.kill(pid, signal.SIGCONT)


def _kill_all(scene: Scene) -> None:
    processes = scene.processes()
    if not processes:
        raise ProcessLookupError("the run is over")
    for pid in processes:
        os.kill(pid, signal.SIGKILL)


def _fill(scene: Scene) -> t.Callable[[], object]:
    ballast = scene.state / "ballast"
    with open(ballast, "wb", buffering=0) as stream:
        try:
            for size in (4096, 1):
                while stream.write(b"x" * size):
                    pass
        except OSError:
            pass  # it is full
    return ballast.unlink


def _forbid(scene: Scene) -> t.Callable[[], object]:
    path = str(scene.state)
    subprocess.run(["mount", "--bind", path, path], check=True)
    subprocess.run(["mount", "-o", "remount,bind,ro", path], check=True)
    return lambda: subprocess.run(["umount", "-l", path], check=True)


def _cut(which: str) -> t.Callable[[Scene], None]:
    def inject(scene: Scene) -> None:
        """Shut the connection of the task at work to a monitor down, from outside, once there is one."""
        monitor = str(scene.guest.monitor) + (".cpr1" if which == "new" else "")
        wait_until(lambda: _shut(_holder(scene), monitor), "the task is connected", patience=3)

    return inject


def _shut(pid: int, monitor: str) -> bool:
    for name in os.listdir(f"/proc/{pid}/fd"):
        with _steal(pid, int(name)) as connection:
            if connection is not None and connection.family == socket.AF_UNIX:
                try:
                    peer = connection.getpeername()
                except OSError:
                    continue
                if peer == monitor:
                    connection.shutdown(socket.SHUT_RDWR)
                    return True
    return False


class _steal:
    """A duplicate of another process's socket; None for anything else (pidfd_getfd(2))."""

    _PIDFD_GETFD = 438

    def __init__(self, pid: int, number: int) -> None:
        self._pid, self._number = pid, number
        self._socket: socket.socket | None = None

    def __enter__(self) -> socket.socket | None:
        process = os.pidfd_open(self._pid)
        try:
            copy = ctypes.CDLL(None, use_errno=True).syscall(self._PIDFD_GETFD, process, self._number, 0)
        finally:
            os.close(process)
        if copy < 0:
            return None
        try:
            self._socket = socket.socket(fileno=copy)
        except OSError:
            os.close(copy)
        return self._socket

    def __exit__(self, *dummy: object) -> None:
        if self._socket is not None:
            self._socket.close()


def _set_capability(scene: Scene) -> None:
    with Qmp(str(scene.guest.monitor) + ".cpr1") as monitor:
        monitor.execute("migrate-set-capabilities", capabilities=[{"capability": "multifd", "state": True}])


def _plug(scene: Scene) -> t.Callable[[], object]:
    with scene.guest.qmp() as monitor:
        monitor.execute("device_add", driver="usb-tablet", id="tablet", bus="usb.0")

    def unplug() -> None:
        with scene.guest.qmp() as monitor:
            monitor.execute("device_del", id="tablet")

    return unplug


def _unplug_from_new(scene: Scene) -> None:
    """The new QEMU then can't load the state of the device, in the pause."""
    with Qmp(str(scene.guest.monitor) + ".cpr1") as monitor:
        monitor.execute("device_del", id="mouse")


FAULTS = (
    *_signals(),
    Fault("SIGKILL to all of the run", _kill_all),
    Fault("state directory full", _fill),
    Fault("state directory not writable", _forbid),
    Fault("connection to the old QEMU cut", _cut("old"), ("transferring", "set-up", "switching", "commit", "switched")),
    Fault("connection to the new QEMU cut", _cut("new"), ("set-up", "switching", "commit", "switched"), beside=True),
    Fault("a capability on the new QEMU only", _set_capability, ("transferred", "set-up"), beside=True),
    Fault("a device that the new QEMU lacks", _plug, ("launching", "launched")),
    Fault("a device that goes from the new QEMU", _unplug_from_new, ("set-up",), beside=True),
)

# Spread, so that a few trials in a row see a bit of everything.
MATRIX = [(fault, phase) for fault in FAULTS for phase in fault.phases]
random.Random(0).shuffle(MATRIX)

MODES = ("cpr-transfer", "precopy", "cpr-reboot", "cpr-exec")


def matrix_of(mode: str) -> list[tuple[Fault, str]]:
    """What can break in a mode, and when."""
    return [(fault, phase) for fault, phase in MATRIX if mode != "cpr-exec" or not fault.beside]
