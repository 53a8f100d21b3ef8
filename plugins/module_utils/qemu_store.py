# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Where the versions of QEMU lie side by side on a host, and who uses them.

Private to the collection.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import glob
import json
import os
import shutil
import time
import typing as t

from ansible_collections.vmfleet.cpr.plugins.module_utils import guests, process, qemu_modules, qemu_versions
from ansible_collections.vmfleet.cpr.plugins.module_utils.errors import CprError
from ansible_collections.vmfleet.cpr.plugins.module_utils.qemu_versions import Judgement, Version

# What is in a version that this collection has made, written when all else was there.
MARKER = ".vmfleet-cpr.json"
FORMAT = 1
# What tells a host which QEMU to start: systemd.unit(5), and libvirt's machines.
_SETTINGS = (
    *("/etc/systemd", "/run/systemd/system", "/run/systemd/transient", "/run/systemd/user", "/run/systemd/generator"),
    *("/run/systemd/system.control", "/usr/local/lib/systemd", "/usr/lib/systemd", "/lib/systemd"),
    "/etc/libvirt/qemu",
)
_LARGEST_SETTING = 1 << 20
# Where the role puts what it fetches, and the seconds after which its run is dead.
_FETCHED = qemu_versions.UNFINISHED + "fetch."
_FETCHED_AGE = 86400.0


@dataclasses.dataclass(frozen=True)
class Store:
    """All versions of a host.

    :ivar directory: where they lie, a real path.
    :ivar emulator: the one that is asked about.
    :ivar unseen: how many processes could not be looked at.
    """

    directory: str
    emulator: str
    versions: tuple[Version, ...] = ()
    unseen: int = 0

    def holding(self, path: str | None) -> str | None:
        """The name of the version to which a path leads, None if it leads elsewhere."""
        trees = {version.name: version.path for version in self.versions}
        return qemu_versions.owner_of(os.path.realpath(path), trees) if path else None

    def judge(self, keep: int, default: str | None, protected: t.Iterable[str]) -> dict[str, Judgement]:
        """As `qemu_versions.judge`, by paths; the defaults of other emulators are as they are."""
        links = glob.glob(default_link(glob.escape(self.directory), "*"))
        others = [path for path in links if os.path.basename(path) != self.emulator]
        return qemu_versions.judge(
            self.versions,
            keep=keep,
            defaults=[name for name in map(self.holding, [default, *others]) if name],
            protected=[name for name in map(self.holding, protected) if name],
            unseen=self.unseen,
        )


def default_link(directory: str, emulator: str) -> str:
    """Where the link is by which new guests get the default."""
    return os.path.join(directory, qemu_versions.DEFAULTS, emulator)


def read_marker(path: str) -> dict[str, t.Any] | None:
    """What a version says of itself; None of one that this collection has not made."""
    try:
        with open(os.path.join(path, MARKER), encoding="utf-8") as stream:
            marker = json.load(stream)
        return marker if marker["format"] == FORMAT else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


@contextlib.contextmanager
def lock(directory: str) -> t.Iterator[None]:
    """Keep other tasks from changing the store.

    :raises CprError: ``store-locked`` with the store's directory.
    """
    with open(os.path.join(directory, ".lock"), "w", encoding="ascii") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CprError(
                "store-locked", f"Another task changes {directory} right now.", "Let it end, then run again."
            ) from None
        yield


def look(directory: str, emulator: str, state_directories: t.Iterable[str]) -> Store:
    """The versions, and who uses or names each.

    :param state_directories: where update records are.
    """
    given, directory = directory, os.path.realpath(directory)
    versions = {version.name: version for version in _versions(directory, emulator)}
    if not versions:
        return Store(directory, emulator)
    used, unseen = _users({name: version.path for name, version in versions.items()})
    for name, users in _users_of_originals(versions.values()).items():
        used[name] += [user for user in users if user not in used[name]]
    named = _named(versions, {given, directory}, state_directories)
    filled = (
        dataclasses.replace(version, used_by=tuple(used[name]), named_by=tuple(named[name]))
        for name, version in versions.items()
    )
    return Store(directory, emulator, tuple(sorted(filled, key=lambda version: version.name)), unseen)


def _versions(directory: str, emulator: str) -> t.Iterator[Version]:
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        for entry in os.scandir(directory):
            unfinished = entry.name.startswith(qemu_versions.UNFINISHED)
            if not entry.is_dir(follow_symlinks=False) or entry.name == qemu_versions.DEFAULTS:
                continue
            if entry.name.startswith(_FETCHED) and time.time() - entry.stat().st_mtime < _FETCHED_AGE:
                continue  # of a run that may still be at it
            if entry.name.startswith(".") and not unfinished:
                continue
            marker = None if unfinished else read_marker(entry.path)
            binary = os.path.join(entry.path, "bin", marker["emulator"] if marker else emulator)
            if not (marker or unfinished or os.path.exists(binary)):
                continue  # no QEMU
            yield Version(
                name=entry.name,
                path=entry.path,
                binary=binary,
                made_at=0.0 if unfinished else marker and marker["made_at"],
                complete=not unfinished and os.access(binary, os.X_OK),
                qemu_version=marker and marker["qemu_version"],
            )


def _users(trees: t.Mapping[str, str]) -> tuple[dict[str, list[str]], int]:
    """Which processes have files below each directory, and how many processes could not be looked at."""
    found: dict[str, list[str]] = {name: [] for name in trees}
    unseen = 0
    files = _files(trees)
    qemus = {qemu.identity.pid: qemu for qemu in process.find()}
    for pid in sorted(int(name) for name in os.listdir(process.PROC) if name.isdigit()):
        try:
            owners = _used(pid, trees, files)
        except PermissionError:
            unseen += pid != 1  # which runs no QEMU, and is hidden in some containers
            continue
        except OSError:
            continue  # it ended
        if pid in qemus:  # firmware that it may read once more is on its command line (-L)
            words = " ".join(qemus[pid].arguments)
            owners |= {name for name, tree in trees.items() if qemu_versions.mentions(words, tree)}
        for owner in owners:
            found[owner].append(_user(qemus[pid]) if pid in qemus else f"process {pid} ({_command(pid)})")
    return found, unseen


def _users_of_originals(versions: t.Iterable[Version]) -> dict[str, list[str]]:
    """Which guests run the installed build that a version is a copy of, also when it was upgraded under them."""
    markers = {version.name: read_marker(version.path) or {} for version in versions}
    return {
        name: [_user(qemu) for qemu in process.find() if list(qemu.executable_id) in marker.get("executables", [])]
        for name, marker in markers.items()
    }


def _user(qemu: process.QemuProcess) -> str:
    name, pid = guests.name_of(qemu), qemu.identity.pid
    return f"guest {name} (process {pid})" if name else f"process {pid} ({_command(pid)})"


def _files(trees: t.Mapping[str, str]) -> dict[tuple[int, int], str]:
    """The version of each file by device and inode, as seen from any mount namespace."""
    found = {}
    for name, tree in trees.items():
        for top, dummy, names in os.walk(tree):
            for path in (os.path.join(top, name) for name in names):
                with contextlib.suppress(OSError):
                    status = os.lstat(path)
                    found[status.st_dev, status.st_ino] = name
    return found


def _used(pid: int, trees: t.Mapping[str, str], files: t.Mapping[tuple[int, int], str]) -> set[str]:
    """The versions of which a process runs, maps or has open a file.

    :raises OSError: it is gone, or can't be looked at.
    """
    base = f"{process.PROC}/{pid}"
    found: set[str | None] = set()
    paths = list(process.descriptors(pid).values())
    for name in ("exe", "cwd", "root"):
        with contextlib.suppress(FileNotFoundError):  # a thread of the kernel
            paths.append(os.readlink(f"{base}/{name}"))
    with contextlib.suppress(FileNotFoundError):
        status = os.stat(f"{base}/exe")
        found.add(files.get((status.st_dev, status.st_ino)))
    for line in set(process.read_file(pid, "maps").splitlines()):
        fields = line.split(None, 5)
        if len(fields) == 6:
            major, minor = (int(number, 16) for number in fields[3].split(":"))
            found.add(files.get((os.makedev(major, minor), int(fields[4]))))
            paths.append(fields[5])
    found |= {qemu_versions.owner_of(path, trees) for path in paths}
    return {name for name in found if name}


def _command(pid: int) -> str:
    try:
        return process.read_file(pid, "comm").strip()
    except OSError:
        return "ended"


def _named(
    names: t.Iterable[str], directories: t.Collection[str], state_directories: t.Iterable[str]
) -> dict[str, list[str]]:
    """Which files name each version.

    :param directories: the store's, by each path that leads there.
    """
    found: dict[str, list[str]] = {name: [] for name in names}
    texts = [(path, text, qemu_versions.unit_mentions) for path, text in _settings()]
    texts += [(path, text, qemu_versions.mentions) for path, text in _records(state_directories)]
    for path, text, does_name in texts:
        if any(directory in text for directory in directories):
            for name, paths in found.items():
                if any(does_name(text, os.path.join(directory, name)) for directory in directories):
                    paths.append(path)
    return found


def _settings() -> t.Iterator[tuple[str, str]]:
    """The files that say what a host starts."""
    tops = dict.fromkeys(os.path.realpath(top) for top in _SETTINGS)  # /lib most often is /usr/lib
    for top in tops:
        for place, dummy, names in os.walk(top):
            for path in (os.path.join(place, name) for name in names):
                with contextlib.suppress(OSError):
                    if os.path.isfile(path) and os.path.getsize(path) <= _LARGEST_SETTING:
                        with open(path, encoding="utf-8", errors="replace") as stream:
                            yield path, stream.read()


def _records(directories: t.Iterable[str]) -> t.Iterator[tuple[str, str]]:
    """The update records that still matter; one that can't be read may."""
    for directory in directories:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            for entry in os.scandir(directory):
                path = os.path.join(entry.path, "update.json")
                with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                    with open(path, encoding="utf-8", errors="replace") as stream:
                        text = stream.read()
                    try:
                        needed = qemu_versions.record_needs(json.loads(text))
                    except (ValueError, AttributeError):
                        needed = True
                    if needed:
                        yield path, text


async def remove(
    directory: str,
    emulator: str,
    state_directories: t.Sequence[str],
    *,
    keep: int,
    default: str | None,
    protected: t.Sequence[str],
    check_mode: bool,
) -> tuple[Store, dict[str, Judgement], list[str]]:
    """Remove the versions that nobody needs, as judged while nobody else changes the store.

    :returns: the store as it was before, what was judged, and what was removed besides, which has no version.
    :raises CprError: ``store-locked``.
    :raises OSError: the host refused it.
    """
    if not os.path.isdir(directory):
        return Store(directory, emulator), {}, await qemu_modules.drop_unused(check_mode)
    with contextlib.nullcontext() if check_mode else lock(directory):
        store = look(directory, emulator, state_directories)
        judged = store.judge(keep, default, protected)
        for version in store.versions:
            if judged[version.name].removable and not check_mode:
                # At once out of the way of whoever starts one; what is left of it counts as unfinished.
                aside = version.path
                if not version.name.startswith(qemu_versions.UNFINISHED):
                    aside = os.path.join(store.directory, qemu_versions.UNFINISHED + version.name)
                    shutil.rmtree(aside, ignore_errors=True)
                    os.rename(version.path, aside)
                    users = _users({version.name: aside})[0][version.name]
                    if users:  # it was started a moment before
                        os.rename(aside, version.path)
                        judged[version.name] = Judgement(False, f"in use by {users[0]}")
                        continue
                shutil.rmtree(aside)
        return store, judged, await qemu_modules.drop_unused(check_mode)
