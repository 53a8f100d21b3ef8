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
from ansible_collections.vmfleet.cpr.plugins.module_utils.modes import CPR_TRANSFER
from ansible_collections.vmfleet.cpr.plugins.module_utils.process import Identity
from ansible_collections.vmfleet.cpr.plugins.module_utils.taps import Tap

FORMAT = 1

# The phases of an update, in order. The guest runs on the old QEMU up to SET_UP, on the new one
# in all of COMMITTED, and in neither for some milliseconds of SWITCHING.
LAUNCHING = "launching"
LAUNCHED = "launched"
TRANSFERRING = "transferring"
TRANSFERRED = "transferred"
SET_UP = "set-up"
SWITCHING = "switching"
SWITCHED = "switched"
FINISHED = "finished"
ROLLED_BACK = "rolled-back"

# Those of a checkpoint. The guest runs up to CHECKPOINTING and from RESTORED on. In between its state is in a
# file, which in RESUMING may be out of date already.
CHECKPOINTING = "checkpointing"
CHECKPOINTED = "checkpointed"
RESTORING = "restoring"
RESUMING = "resuming"
RESTORED = "restored"

OF_A_CHECKPOINT = (CHECKPOINTING, CHECKPOINTED, RESTORING, RESUMING)
COMMITTED = (SWITCHED, FINISHED)
ENDED = (None, FINISHED, ROLLED_BACK, CHECKPOINTED, RESTORED)

# Of the tasks of this host, by guest.
_LOCKS = "/run/lock/vmfleet-cpr"

# Seconds without a step after which a run that can't be asked is taken for dead.
SILENCE = 600.0


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

    :ivar mode: one of `modes.MODES`.
    :ivar mode_reason: why it is that one, as a sentence.
    :ivar copied: of ``precopy`` how far the copy of the RAM is, or was at its end.
    :ivar run_state: the guest's run state before (``running`` or ``paused``); it is the same
        afterwards.
    :ivar capabilities: the migration capabilities that both QEMUs use.
    :ivar parameters: the migration parameters that are set on both.
    :ivar dropped: what the user wished of them and an end lacks, as sentences.
    :ivar agreement: what `handshake.record` says of both ends; None before they were compared.
    :ivar heartbeat: how the guest is checked after the switch: ``agent`` if one answered before,
        ``command`` of the user's, ``timeout`` in seconds for each.
    :ivar restore: capabilities and parameters of the old QEMU as they were, to put back.
    :ivar executable_id: with ``cpr-exec`` device and inode of the new QEMU's binary.
    :ivar exec_command: with ``cpr-exec`` what the process becomes.
    :ivar permissions: with ``cpr-exec`` path, owner, group and mode of what the new QEMU binds anew.
    :ivar checkpoint: of a guest whose state is in a file what restoring it takes: see `phases.checkpoint`.
    :ivar renames: pairs of a socket's or pid file's path during the update and its stable path.
    :ivar taps: the new QEMU's tap interfaces, each with the name that it takes over.
    :ivar unit: the systemd service whose main process the new QEMU becomes.
    :ivar display: what ``display-update`` must be told once the old QEMU is gone.
    :ivar forwards: pairs of a user network and a port, for ``hostfwd_add`` once the old QEMU is gone.
    :ivar durations_ms: how long each phase took, milliseconds.
    :ivar pause_ms: from STOP on the old to RESUME on the new QEMU, milliseconds.
    :ivar run: the run of Ansible that works on it: ``key``, ``who`` and ``since``; None outside
        of one.
    :ivar message: how the latest step ended, in a sentence.
    """

    guest: str
    directory: str
    phase: str | None = None
    old: Qemu | None = None
    new: Qemu | None = None
    machine_type: str | None = None
    run_state: str | None = None
    mode: str = CPR_TRANSFER  # what records had no word for before there were others
    mode_reason: str = ""
    copied: dict[str, float] = field(default_factory=dict)
    generation: int = 0
    capabilities: dict[str, bool] = field(default_factory=dict)
    parameters: dict[str, t.Any] = field(default_factory=dict)
    dropped: list[str] = field(default_factory=list)
    agreement: dict[str, t.Any] | None = None
    heartbeat: dict[str, t.Any] = field(default_factory=dict)
    restore: dict[str, t.Any] = field(default_factory=dict)
    executable_id: list[int] = field(default_factory=list)
    exec_command: list[str] = field(default_factory=list)
    permissions: list[tuple[str, int, int, int]] = field(default_factory=list)
    checkpoint: dict[str, t.Any] = field(default_factory=dict)
    renames: list[tuple[str, str]] = field(default_factory=list)
    taps: list[Tap] = field(default_factory=list)
    display: dict[str, t.Any] | None = None
    unit: str | None = None
    forwards: list[tuple[str, str]] = field(default_factory=list)
    durations_ms: dict[str, float] = field(default_factory=dict)
    pause_ms: float | None = None
    run: dict[str, str] | None = None
    message: str | None = None
    changed_at: float = 0
    format: int = FORMAT

    @property
    def record(self) -> str:
        """Where this is kept."""
        return os.path.join(self.directory, "update.json")

    @property
    def is_under_way(self) -> bool:
        """Whether a run began it and neither finished nor undid it."""
        return self.phase not in ENDED

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
    def state_file(self) -> str:
        """Where the guest's state lies between two QEMUs of which one writes and the other reads it."""
        return os.path.join(self.channels, "state")

    @property
    def log(self) -> str:
        """Where the new QEMU's standard error goes."""
        return self.log_of(self.generation)

    def log_of(self, generation: int) -> str:
        """Where the standard error of a generation's QEMU goes."""
        return os.path.join(self.directory, f"qemu.{generation}.log")

    def _as_dict(self) -> dict[str, t.Any]:
        # Not dataclasses.asdict: its deep copies cost a millisecond each time.
        return {
            **vars(self),
            "old": self.old and vars(self.old),
            "new": self.new and vars(self.new),
            "taps": [vars(tap) for tap in self.taps],
        }

    def note_copy(self, migration: t.Mapping[str, t.Any]) -> None:
        """Note how far the copy of the guest's RAM is, also for whoever looks from outside meanwhile.

        Not on disk for sure: it is news, not the record.

        :param migration: what ``query-migrate`` returned.
        """
        ram = migration.get("ram")
        if not ram:
            return
        self.copied = {
            "seconds": round(migration.get("total-time", 0) / 1000, 2),
            "passes": ram["dirty-sync-count"],
            "mib_total": ram["total"] >> 20,
            "mib_transferred": ram["transferred"] >> 20,
            "mib_remaining": ram["remaining"] >> 20,
            "mib_per_second": round(ram["mbps"] / 8.388608, 1),
            "dirty_mib_per_second": ram["dirty-pages-rate"] * ram["page-size"] >> 20,
            "throttle_percent": migration.get("cpu-throttle-percentage", 0),
        }
        with contextlib.suppress(OSError), open(self.progress, "w", encoding="ascii", opener=_private) as stream:
            stream.write(json.dumps(self.copied))

    def copy_text(self) -> str:
        """What `note_copy` noted last, as part of a sentence."""
        if not self.copied:
            return "nothing is known of it"
        return (
            "after {passes} passes {mib_remaining} of {mib_total} MiB were left; the guest changes {dirty_mib_per_second}"
            " MiB a second, and {mib_per_second} are copied".format(**self.copied)
        )

    @property
    def progress(self) -> str:
        """Where it says how far a copy is."""
        return os.path.join(self.directory, "progress.json")

    def took(self, step: str, started: float) -> None:
        """Note how long a step took; recorded by the next `enter`.

        :param started: the value of ``time.monotonic()`` when it began.
        """
        self.durations_ms[step] = round((time.monotonic() - started) * 1000, 1)

    def enter(self, phase: str | None, message: str | None = None) -> None:
        """Record that a phase begins or ends; it is on disk when this returns.

        :param message: how the step ended, in a sentence.
        :raises CprError: ``state-directory`` if it can't be written.
        """
        self.message = message
        self.phase = phase
        self.changed_at = time.time()
        temporary = self.record + ".new"
        try:
            with open(temporary, "w", encoding="utf-8", opener=_private) as stream:
                stream.write(json.dumps(self._as_dict(), indent=1))
                stream.flush()
                os.fsync(stream.fileno())
            os.rename(temporary, self.record)
            _sync(self.directory)  # a checkpoint must outlive the host
        except OSError as error:
            raise _unwritable(self.directory, error) from error

    def commit_mark(self) -> CommitMark:
        """The mark for the switch that begins now, not set yet.

        :raises CprError: ``state-directory`` if it can't be written.
        """
        try:
            return CommitMark(self._mark)
        except OSError as error:
            raise _unwritable(self.directory, error) from error

    @property
    def may_have_run(self) -> bool:
        """Whether the latest switch may have told the new QEMU to run the guest."""
        try:
            with open(self._mark, "rb") as stream:
                return stream.read(1) == b"1"
        except FileNotFoundError:
            return False

    def remove_mark(self) -> None:
        """Remove what `commit_mark` made; if that fails, the next one is made of it."""
        with contextlib.suppress(OSError):
            os.unlink(self._mark)

    @property
    def _mark(self) -> str:
        return os.path.join(self.directory, "commit")


class CommitMark:
    """Says whether the new QEMU may have been told to run the guest.

    One byte, written over another in a file that is open before the guest stops. Unlike the
    record it doesn't wait for the disk: it need outlive its writer only, since no guest outlives
    the host.
    """

    def __init__(self, path: str) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self.set(False)

    def set(self, told: bool) -> None:
        """Note whether the new QEMU may have been told to run the guest."""
        os.pwrite(self._descriptor, b"1" if told else b"0", 0)

    def __enter__(self) -> CommitMark:
        return self

    def __exit__(self, *dummy: object) -> None:
        os.close(self._descriptor)


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
            data["forwards"] = [tuple(pair) for pair in data.get("forwards", [])]
            data["taps"] = [
                Tap(**{**tap, "addresses": [tuple(pair) for pair in tap["addresses"]]}) for tap in data.get("taps", [])
            ]
            return Update(**{**data, "directory": directory})
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CprError(
                "record-unreadable",
                f"The update record in {directory} can't be read: {error}.",
                "If no update of this guest is under way, remove that directory.",
            ) from error

    def guests(self) -> list[str]:
        """The names of all guests that have a record."""
        try:
            return sorted(urllib.parse.unquote(name) for name in os.listdir(self.directory))
        except OSError:
            return []

    def guests_under_way(self) -> list[str]:
        """The names of those whose update was begun and has not ended, or whose record can't be read."""
        found = []
        for name in self.guests():
            try:
                update = self.load(name)
            except CprError:
                found.append(name)
            else:
                if update and update.is_under_way:
                    found.append(name)
        return found

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
        common = os.path.join(_LOCKS, os.path.basename(directory))
        with contextlib.ExitStack() as stack:
            # Whatever the directory of the records: a checkpoint and an update keep theirs in different ones.
            with contextlib.suppress(PermissionError, FileNotFoundError):
                os.makedirs(_LOCKS, mode=0o700, exist_ok=True)
                stack.enter_context(_locked(common))
            try:
                stack.enter_context(_locked(os.path.join(directory, "lock")))
            except OSError as error:
                raise _unwritable(directory, error) from error
            yield


@contextlib.contextmanager
def _locked(path: str) -> t.Iterator[None]:
    """Hold a lock, and say in its file who does.

    :raises CprError: ``guest-locked``.
    """
    with open(path, "a+", encoding="utf-8", opener=_private) as stream:
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
        stream.write(f"process {os.getpid()} since {local_time(time.time())}")
        stream.flush()
        yield


def local_time(seconds: float) -> str:
    """A time of ``time.time()`` as people read it."""
    return time.strftime("%Y-%m-%d %H:%M:%S %z", time.localtime(seconds))


def _sync(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _unwritable(directory: str, error: OSError) -> CprError:
    return CprError(
        "state-directory",
        f"The state directory {directory} can't be written: {error.strerror}.",
        "Give the collection a state_directory on this host that has room and that it may write.",
    )
