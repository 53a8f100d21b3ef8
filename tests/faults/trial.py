# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""One trial: a guest, a playbook run in which something breaks, and a run after it.

What holds afterwards is checked from outside: by processes, QMP, the guest's own count, image
locks and files.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pathlib
import random
import re
import signal
import shutil
import socket
import struct
import subprocess
import tempfile
import threading
import time
import typing as t
from dataclasses import dataclass, field

from tests.faults.faults import MODES, Fault, matrix_of
from tests.guests.ansible import start_live_update
from tests.guests.guest import NEW_SUITE, OLD_SUITE, Guest, Qmp, boot_sector_guest, qemu, wait_until

# Seconds that a run gets with a fault, with all its deadlines one after the other.
_RUN = 120.0
# Seconds after its phase began in which a fault happens, at random.
_WITHIN = {"launching": 0.05, "transferring": 0.06, "switching": 0.008, "commit": 0.004, "switched": 0.02}
_BETWEEN = 0.4


@dataclass
class Scene:
    """What a fault can get at."""

    guest: Guest
    state: pathlib.Path
    old: int
    mark: str
    target: str
    ansible: int = 0

    @property
    def record(self) -> pathlib.Path:
        """The guest's update record."""
        return self.state / self.guest.name / "update.json"

    def phase(self) -> str | None:
        """Where the update is, ``commit`` from the commit's mark on."""
        try:
            phase: str = json.loads(self.record.read_text(encoding="utf-8"))["phase"]
        except (OSError, ValueError):
            return None
        return "commit" if phase == "switching" and self.is_committed() else phase

    def is_committed(self) -> bool:
        """Whether the new QEMU may have been told to run the guest."""
        with contextlib.suppress(OSError):
            if (self.record.parent / "commit").read_bytes() == b"1":
                return True
        try:
            return json.loads(self.record.read_text(encoding="utf-8"))["phase"] in ("switched", "finished")
        except OSError:
            return False

    def new_pid(self) -> int:
        """The new QEMU."""
        pid: int = json.loads(self.record.read_text(encoding="utf-8"))["new"]["pid"]
        return pid

    def is_on_new(self, pid: int) -> bool:
        """Whether a process is the new QEMU; with cpr-exec it is the old one's."""
        return os.readlink(f"/proc/{pid}/exe") == self.target

    def processes(self) -> list[int]:
        """All processes of the run, told by a variable in their environment; QEMUs have none."""
        found = []
        for pid in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError):
                if self.mark.encode() in pathlib.Path(f"/proc/{pid}/environ").read_bytes():
                    found.append(int(pid))
        return found


@dataclass
class Result:
    """What a trial showed.

    :ivar hit: whether the fault happened before the run was over.
    :ivar still: the longest time in which the guest did not count, seconds.
    :ivar told: the error codes that the run's output names.
    :ivar after: where the guest was after the run.
    :ivar next_run: what the next run did.
    :ivar problems: what should not have been.
    """

    seed: int
    mode: str
    fault: str
    phase: str
    hit: bool = False
    still: float = 0
    told: list[str] = field(default_factory=list)
    after: str = ""
    next_run: str = ""
    problems: list[str] = field(default_factory=list)
    output: str = ""


class _Ticks(threading.Thread):
    """Notices how long the guest's output does not grow."""

    def __init__(self, guest: Guest) -> None:
        super().__init__(daemon=True)
        self._console = guest.console
        self._over = threading.Event()
        self.longest = 0.0

    def run(self) -> None:
        size, since = 0, time.monotonic()
        while not self._over.wait(0.005):
            now = time.monotonic()
            grown = self._console.stat().st_size
            if grown != size:
                size, since = grown, now
            self.longest = max(self.longest, now - since)

    def stop(self) -> float:
        """The longest time without growth, seconds."""
        self._over.set()
        self.join()
        return self.longest


def run_trial(seed: int) -> Result:
    """One trial; the seed says what breaks and when."""
    mode = MODES[seed % len(MODES)]
    matrix = matrix_of(mode)
    fault, phase = matrix[seed // len(MODES) % len(matrix)]
    result = Result(seed, mode, fault.name, phase)
    chance = random.Random(seed)
    directory = pathlib.Path(tempfile.mkdtemp(prefix="faults-", dir="/dev/shm"))
    state = directory / "state"
    state.mkdir()
    more = ["-device", "qemu-xhci,id=usb", "-device", "usb-mouse,bus=usb.0,id=mouse"]
    guest = boot_sector_guest(
        f"fault{seed}-{os.getpid()}", directory / "guest", more=more, memory=_memory(mode, directory)
    )
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m", "faults", str(state)], check=True)
    target = pathlib.Path(qemu(NEW_SUITE))
    if mode == "cpr-exec":  # which the old suite's has not
        target = target.with_name(f"{target.name}-rebuilt-{guest.name}")
        shutil.copy2(qemu(NEW_SUITE), target)
    try:
        guest.start(qemu(NEW_SUITE if mode == "cpr-exec" else OLD_SUITE))
        guest.wait_for_ticks(3)
        scene = Scene(guest, state, guest.pid(), f"VMFLEET_TRIAL={seed}.{os.getpid()}", str(target))
        _play(scene, fault, phase, chance, result)
    except (AssertionError, OSError, RuntimeError, KeyError, subprocess.SubprocessError) as error:
        result.problems.append(f"{type(error).__name__}: {error}")
    finally:
        guest.kill()
        subprocess.run(["umount", "-l", str(state)], check=True)
        shutil.rmtree(directory)
        if mode == "cpr-exec":
            target.unlink()
    return result


def _memory(mode: str, directory: pathlib.Path) -> t.Sequence[str] | None:
    """The RAM with which the collection takes this mode by itself, or that goes well with it."""
    if mode == "precopy":
        return None
    kind = f"file,mem-path={directory}/ram" if mode == "cpr-reboot" else "memfd"
    return ("-object", f"memory-backend-{kind},id=ram0,size=64M,share=on")


def _play(scene: Scene, fault: Fault, phase: str, chance: random.Random, result: Result) -> None:
    guest = scene.guest
    ticks = _Ticks(guest)
    ticks.start()
    delay = chance.uniform(0, _WITHIN.get(phase, _BETWEEN)) if chance.random() < 0.7 else 0.0
    try:
        with _run(scene, result) as run:
            mend, committed = _break(scene, fault, phase, delay, run, result)
        if mend:
            mend()
    finally:
        result.still = ticks.stop()
    down = _may_be_down(fault, committed, result)
    _look(scene, result, down)
    if run.returncode == 0 and result.after != "new" and not down:
        result.problems.append(f"success was reported, and the guest is on: {result.after}")
    with _run(scene, result) as run:
        pass
    _look_again(scene, fault, result, down, run.returncode or 0)


def _break(
    scene: Scene, fault: Fault, phase: str, delay: float, run: subprocess.Popen[str], result: Result
) -> tuple[t.Callable[[], object] | None, bool]:
    """Wait for the instant, break, and wait for the end; what mends it, and whether it was committed by then."""
    reached = _wait_for(scene, phase, run)
    if reached and delay:
        time.sleep(delay)
    committed = scene.is_committed()
    if not reached:
        return None, committed
    try:
        mend = fault.inject(scene)
        result.hit = True
    except (ProcessLookupError, TimeoutError, FileNotFoundError, KeyError):
        return None, committed  # there was nothing left to break, or QEMU does not let it happen then
    # Between two looks the commit may have passed: the later one counts. At a SIGTERM a QEMU ends in its own time, and
    # what counts is whether it had the guest by then.
    if fault.name == "SIGTERM to the new QEMU":
        with contextlib.suppress(TimeoutError):
            wait_until(lambda: [pid for pid in scene.guest.pids() if pid != scene.old] == [], "it has ended", 10)
    committed = scene.is_committed()
    if mend and fault.mended_after is not None:
        time.sleep(fault.mended_after)
        mend()
        mend = None
    return mend, committed


def _wait_for(scene: Scene, phase: str, run: subprocess.Popen[str]) -> bool:
    """Whether the update came to this phase; noticed within a fraction of a millisecond."""
    from tests.faults.faults import PHASES

    wanted = PHASES.index(phase)
    while run.poll() is None:
        now = scene.phase()
        if now in PHASES and PHASES.index(now) >= wanted:
            return True
        if now == "rolled-back":
            return False
        # Just before the short phases there is no time to sleep.
        if not (now == "switching" and phase == "commit"):
            time.sleep(0.0003)
    return False


@contextlib.contextmanager
def _run(scene: Scene, result: Result) -> t.Iterator[subprocess.Popen[str]]:
    """A run of the playbook, until all of its processes are gone."""
    with tempfile.TemporaryFile("w+") as output:
        name, value = scene.mark.split("=")
        run = start_live_update(
            scene.target, scene.state, [scene.guest.name], output, environment={name: value}, timeout=5,
            copy_timeout=30, mode=result.mode,
        )  # fmt: skip
        scene.ansible = run.pid
        try:
            yield run
            run.wait(_RUN)
            wait_until(lambda: not scene.processes(), "the run's processes are gone", patience=60)
        finally:
            for pid in scene.processes():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            run.wait()
            output.seek(0)
            text = output.read()
            result.output += text + "\n" + "=" * 80 + "\n"
            if not result.told:
                result.told = sorted(set(re.findall(r"\[([a-z]+(?:-[a-z]+)+)\]", text)))


def _may_be_down(fault: Fault, committed: bool, result: Result) -> bool:
    """Whether the fault itself took the guest down: it ended the QEMU that had the guest."""
    ends = fault.name.startswith(("SIGKILL to the", "SIGTERM to the")) and result.hit
    if result.mode == "cpr-exec":
        return ends and fault.name.endswith("old QEMU")  # there is no other
    return ends and (fault.name.endswith("new QEMU") if committed else fault.name.endswith("old QEMU"))


def _states(guest: Guest) -> dict[int, str]:
    """The run state that each of the guest's QEMUs reports; ``silent`` where one does not."""
    states = {pid: "silent" for pid in guest.pids()}
    for path in guest.directory.glob("qmp.sock*"):
        with contextlib.suppress(OSError, ValueError, KeyError):
            with Qmp(path) as monitor:
                states[_listener(path)] = monitor.execute("query-status")["status"]
    return states


def _listener(path: pathlib.Path) -> int:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(path))
        pid, dummy, dummy = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return int(pid)


def _look(scene: Scene, result: Result, down: bool) -> None:
    """What must hold after a run in which something broke."""
    states = _states(scene.guest)
    running = [pid for pid, state in states.items() if state == "running"]
    if len(running) > 1:
        result.problems.append(f"doubled: {states}")
    where = ["new" if scene.is_on_new(pid) else "old" for pid in running]
    result.after = where[0] if where else "down"
    if not running and not down:
        # Only a run that was killed as a whole may leave a guest that stands still to the next.
        if result.fault != "SIGKILL to all of the run":
            result.problems.append(f"lost after the run: {states}")
        result.after = "still"
    if running and len(states) > 1:
        result.after += ", the other QEMU waits"


def _look_again(scene: Scene, fault: Fault, result: Result, down: bool, status: int) -> None:
    """What must hold after the run that follows."""
    guest = scene.guest
    states = _states(guest)
    if down and "running" not in states.values():
        # A guest whose QEMU ends once nothing is left to do but to report is not found by the next run.
        known = {"old-qemu-gone", "new-qemu-gone", "state-unclear", "guest-not-running", "guest-not-found"}
        result.next_run = "says so" if known.intersection(result.told) else "silence"
        if not known.intersection(result.told):
            result.problems.append(f"down, and the message is {result.told}")
        if set(states.values()) - {"postmigrate"}:
            result.problems.append(f"left over beside a guest that is down: {states}")
    else:
        result.next_run = _what_it_did(result)
        if status != 0:
            result.problems.append(f"next run: status {status}")
        _check_all_is_well(scene, result, states)
    left = [path.name for path in guest.directory.iterdir() if ".cpr" in path.name]
    left += [path.name for path in (scene.record.parent).iterdir() if not _belongs(path.name)]
    if left and not down:
        result.problems.append(f"left over: {left}")


def _belongs(name: str) -> bool:
    return name in ("lock", "update.json") or re.fullmatch(r"qemu\.\d+\.log", name) is not None


def _check_all_is_well(scene: Scene, result: Result, states: dict[int, str]) -> None:
    guest = scene.guest
    if list(states.values()) != ["running"] or not scene.is_on_new(*states):
        result.problems.append(f"at the end: {states}, the old QEMU was {scene.old}")
        return
    guest.wait_for_ticks()
    guest.check_continuity()
    if not _is_locked(guest.directory / "disk.img"):
        result.problems.append("the image is not locked")
    if scene.phase() != "finished":
        result.problems.append(f"the record says {scene.phase()}")


def _is_locked(image: pathlib.Path) -> bool:
    """Whether a QEMU holds the lock of an image (its bytes from 100 on, block/file-posix.c)."""
    with open(image, "r+b") as stream:
        query = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 100, 200, 0)
        answer = fcntl.fcntl(stream, fcntl.F_OFD_GETLK, query)
    return struct.unpack("hhqqi4x", answer)[0] != fcntl.F_UNLCK


def _what_it_did(result: Result) -> str:
    last = result.output.split("=" * 80)[-2]
    if "had left its update unfinished. The guest went" in last:
        return "finished it"
    if "had left its update unfinished" in last:
        return "undid it, updated"
    if "already" in last:
        return "reports it" if "The run before" in last else "nothing to do"
    return "updated"
