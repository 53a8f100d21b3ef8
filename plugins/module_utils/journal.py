# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The update record: what was done to a guest, kept on its hypervisor.

A claim to be checked against the processes themselves, never the truth. Private to the
collection.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
import typing as t
import urllib.parse
from dataclasses import dataclass, field

from ansible_collections.vmfleet.cpr.plugins.module_utils.errors import CprError
from ansible_collections.vmfleet.cpr.plugins.module_utils.process import Identity

FORMAT = 1

# The phases of an update, in order. The guest runs on the old QEMU up to SET_UP, on the new one
# in all of COMMITTED, and in neither for some milliseconds of SWITCHING.
LAUNCHING = "launching"
LAUNCHED = "launched"
TRANSFERRING = "transferring"
TRANSFERRED = "transferred"
SET_UP = "set-up"
SWITCHING = "switching"
UNDOING = "undoing"  # the guest had stopped, and was not told to go on in the new QEMU
SWITCHED = "switched"
FINISHED = "finished"
ROLLED_BACK = "rolled-back"

COMMITTED = (SWITCHED, FINISHED)


@dataclass
class Qemu:
    """One of the two QEMUs of an update.

    :ivar monitor: where its QMP monitor answers, an absolute path.
    :ivar executable: the path of its binary.
    """

    pid: int
    start_time: int
    executable: str
    version: str
    monitor: str

    @property
    def identity(self) -> Identity:
        """The process for all time."""
        return Identity(self.pid, self.start_time)


@dataclass
class Update:
    """One guest's way from one QEMU to another, as recorded.

    :ivar run_state: the guest's run state before (``running`` or ``paused``); it is the same
        afterwards.
    :ivar capabilities: the migration capabilities that both QEMUs use.
    :ivar restore: capabilities and parameters of the old QEMU as they were, to put back.
    :ivar renames: pairs of a socket's or pid file's path during the update and its stable path.
    :ivar durations_ms: how long each phase took, milliseconds.
    :ivar pause_ms: from STOP on the old to RESUME on the new QEMU, milliseconds.
    """

    guest: str
    directory: str
    phase: str | None = None
    old: Qemu | None = None
    new: Qemu | None = None
    machine_type: str | None = None
    run_state: str | None = None
    generation: int = 0
    capabilities: dict[str, bool] = field(default_factory=dict)
    restore: dict[str, t.Any] = field(default_factory=dict)
    renames: list[tuple[str, str]] = field(default_factory=list)
    durations_ms: dict[str, float] = field(default_factory=dict)
    pause_ms: float | None = None
    changed_at: float = 0
    format: int = FORMAT

    @property
    def record(self) -> str:
        """Where this is kept."""
        return os.path.join(self.directory, "update.json")

    @property
    def channels(self) -> str:
        """The directory of this generation's migration sockets; the new QEMU's user owns it."""
        return os.path.join(self.directory, str(self.generation))

    @property
    def cpr_socket(self) -> str:
        """Where the new QEMU waits for the CPR state."""
        return os.path.join(self.channels, "cpr.sock")

    @property
    def main_socket(self) -> str:
        """Where the new QEMU waits for the migration stream."""
        return os.path.join(self.channels, "main.sock")

    @property
    def log(self) -> str:
        """Where the new QEMU's standard error goes."""
        return self.log_of(self.generation)

    def log_of(self, generation: int) -> str:
        """Where the standard error of a generation's QEMU goes."""
        return os.path.join(self.directory, f"qemu.{generation}.log")

    def _as_dict(self) -> dict[str, t.Any]:
        # Not dataclasses.asdict: its deep copies cost a millisecond each time.
        return {**vars(self), "old": self.old and vars(self.old), "new": self.new and vars(self.new)}

    def took(self, step: str, started: float) -> None:
        """Note how long a step took; recorded by the next `enter`.

        :param started: the value of ``time.monotonic()`` when it began.
        """
        self.durations_ms[step] = round((time.monotonic() - started) * 1000, 1)

    def enter(self, phase: str) -> None:
        """Record that a phase begins or ends; it is on disk when this returns.

        :raises CprError: ``state-directory`` if it can't be written.
        """
        self.phase = phase
        self.changed_at = time.time()
        temporary = self.record + ".new"
        try:
            with open(temporary, "w", encoding="utf-8", opener=_private) as stream:
                stream.write(json.dumps(self._as_dict(), indent=1))
                stream.flush()
                os.fsync(stream.fileno())
            os.rename(temporary, self.record)
        except OSError as error:
            raise _unwritable(self.directory, error) from error


class Journal:
    """All update records of a host.

    :param directory: the state directory.
    """

    def __init__(self, directory: str) -> None:
        self.directory = directory

    def path(self, guest: str) -> str:
        """The directory of a guest's record; a name is no path, so it is quoted."""
        quoted = urllib.parse.quote(guest, safe=" ")
        return os.path.join(self.directory, quoted.replace(".", "%2E") if not quoted.strip(".") else quoted)

    def load(self, guest: str) -> Update | None:
        """The guest's record, or None if it has none.

        :raises CprError: ``record-unreadable`` for one that is damaged or of a newer format.
        """
        directory = self.path(guest)
        try:
            with open(os.path.join(directory, "update.json"), encoding="utf-8") as stream:
                data = json.load(stream)
            if data["format"] != FORMAT:
                raise ValueError(f"format {data['format']}, this version reads {FORMAT}")
            for key in ("old", "new"):
                data[key] = Qemu(**data[key]) if data[key] else None
            data["renames"] = [tuple(pair) for pair in data["renames"]]
            return Update(**{**data, "directory": directory})
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CprError(
                "record-unreadable",
                f"The update record in {directory} can't be read: {error}.",
                "If no update of this guest is under way, remove that directory.",
            ) from error

    def create(self, guest: str) -> Update:
        """An empty record for a new update, not written yet.

        :raises CprError: ``state-directory`` if its directory can't be made.
        """
        directory = self.path(guest)
        try:
            os.makedirs(directory, mode=0o711, exist_ok=True)
        except OSError as error:
            raise _unwritable(self.directory, error) from error
        return Update(guest=guest, directory=directory)

    @contextlib.contextmanager
    def lock(self, guest: str) -> t.Iterator[None]:
        """Keep every other task off this guest's record.

        The kernel releases it when its holder dies.

        :raises CprError: ``guest-locked`` with who holds it and since when.
        """
        directory = self.create(guest).directory
        try:
            stream = open(os.path.join(directory, "lock"), "a+", encoding="utf-8", opener=_private)
        except OSError as error:
            raise _unwritable(directory, error) from error
        with stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                stream.seek(0)
                raise CprError(
                    "guest-locked",
                    f"Another task works on this guest: {stream.read().strip() or 'its process is not known'}.",
                    "Wait for it to end, then run again.",
                ) from None
            stream.truncate(0)
            stream.write(f"process {os.getpid()} since {time.strftime('%Y-%m-%d %H:%M:%S %z')}")
            stream.flush()
            yield


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _unwritable(directory: str, error: OSError) -> CprError:
    return CprError(
        "state-directory",
        f"The state directory {directory} can't be written: {error.strerror}.",
        "Give the collection a state_directory on this host that has room and that it may write.",
    )
