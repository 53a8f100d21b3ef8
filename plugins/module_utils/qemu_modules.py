# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The modules of a QEMU that is about to be upgraded in place, for guests that run it and load one later.

A QEMU loads no module of another build. It looks for those of its own in ``/run/qemu`` too, if built with
``--enable-module-upgrades`` (util/module.c). Debian's qemu-block-extra puts its own there when it is upgraded
under a running QEMU; those of qemu-system-common nobody does (10.0, 11.1: virtio-gpu, usb-host and more).

That saves only modules that the new build has not: QEMU 10.0 looks no further than the first file of a
module's name, which is the new build's. What is worse, after one such failure it aborts at the next module
(seen with 10.0.13: a second ``blockdev-add`` of ssh, or one ``qom-list-types``). Nothing on the host's side
prevents that but to leave the modules where they are, which is why guests are warned about here. Private to the
collection.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import shutil
import typing as t

from ansible_collections.vmfleet.cpr.plugins.module_utils import commands, guests, process, qemu_versions
from ansible_collections.vmfleet.cpr.plugins.module_utils.errors import CprError

_PLACE = "/run/qemu"
_MARKER = ".vmfleet-cpr.json"
_DIRECTORIES = ("/usr/lib/*/qemu", "/usr/lib64/qemu", "/usr/lib64/qemu-kvm", "/usr/lib/qemu", "/usr/lib/qemu-kvm")


def directories() -> list[str]:
    """Where the host's packages have QEMU's modules."""
    return sorted({path for pattern in _DIRECTORIES for path in glob.glob(pattern) if glob.glob(f"{path}/*.so")})


async def executables(binary: str, build: tuple[str, str]) -> list[tuple[int, int]]:
    """Device and inode of all installed emulators of a build: they share its modules, and a package has more than one.

    :param binary: one of them.
    :param build: its version and the build's own, as `qemu_versions.build_of`.
    """
    found: set[tuple[int, int] | None] = {process.file_id(binary), None}
    for path in glob.glob(f"{glob.escape(os.path.dirname(binary))}/qemu-system-*"):
        if process.file_id(path) in found:
            continue
        with contextlib.suppress(CprError):  # something else of that name
            if qemu_versions.build_of(await commands.run(path, "-version")) == build:
                found.add(process.file_id(path))
    return sorted(identity for identity in found if identity)


def endangered(identities: t.Container[tuple[int, int]]) -> list[str]:
    """The guests that run an installed build and could load modules of another one; their names or processes.

    :param identities: as `executables`.
    """
    if not directories():
        return []
    running = [qemu for qemu in process.find() if qemu.executable_id in identities]
    return sorted(guests.name_of(qemu) or f"process {qemu.identity.pid}" for qemu in running)


def missing(binary: str, build: str, identities: t.Container[tuple[int, int]]) -> list[str]:
    """The modules of an installed build that its running guests would lose with it.

    :param build: its own version, as in parentheses in ``-version``.
    :param identities: as `executables`.
    :returns: their paths.
    """
    if not build or not _looks_there(binary):
        return []
    if not any(qemu.executable_id in identities for qemu in process.find()):
        return []
    kept = os.path.join(_PLACE, qemu_versions.sanitized(build))
    by_others = _kept_by_scripts()
    modules = [path for directory in directories() for path in sorted(glob.glob(f"{directory}/*.so"))]
    return [
        path
        for path in modules
        if os.path.basename(path) not in by_others and not os.path.exists(f"{kept}/{os.path.basename(path)}")
    ]


def _looks_there(binary: str) -> bool:
    with open(binary, "rb") as stream:
        return f"{_PLACE}/".encode() in stream.read()


def _kept_by_scripts() -> set[str]:
    """The modules that scripts of the installed packages keep by themselves."""
    found: set[str] = set()
    for path in glob.glob("/var/lib/dpkg/info/qemu*.prerm"):
        with contextlib.suppress(OSError), open(path, encoding="utf-8", errors="replace") as stream:
            for line in stream:
                if _PLACE in line and "cp " in line:
                    found.update(word for word in line.split() if word.endswith(".so"))
    return found


async def keep(binary: str, build: str, identities: t.Sequence[tuple[int, int]]) -> list[str]:
    """Put the modules where the running guests will look for them; the names of these.

    :raises CprError: ``command-failed`` where the directory can't be made to run programs from.
    :raises OSError: the host refused it.
    """
    paths = missing(binary, build, identities)
    if not paths:
        return []
    place = os.path.join(_PLACE, qemu_versions.sanitized(build))
    os.makedirs(place, mode=0o755, exist_ok=True)
    for path in paths:
        target = os.path.join(place, os.path.basename(path))
        shutil.copy2(path, target + ".new")
        os.rename(target + ".new", target)
    if os.statvfs(place).f_flag & os.ST_NOEXEC:  # /run most often is; a module is mapped as a program
        await commands.run("mount", "--bind", place, place)
        await commands.run("mount", "-o", "remount,bind,exec,nosuid,nodev", place)
    names = sorted(map(os.path.basename, paths))
    with open(os.path.join(place, _MARKER), "w", encoding="utf-8") as stream:
        json.dump({"executables": identities, "modules": names}, stream)
    return names


async def drop_unused(check_mode: bool) -> list[str]:
    """Remove the kept modules of builds that no process runs any more; the directories.

    :raises OSError: the host refused it.
    """
    dropped = []
    for marker in glob.glob(f"{_PLACE}/*/{_MARKER}"):
        with contextlib.suppress(ValueError, KeyError, TypeError):
            with open(marker, encoding="utf-8") as stream:
                kept = json.load(stream)
            running = {qemu.executable_id for qemu in process.find()}
            if not running.isdisjoint(map(tuple, kept["executables"])):
                continue
            place = os.path.dirname(marker)
            dropped.append(place)
            if not check_mode:
                for name in (*kept["modules"], _MARKER):
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(os.path.join(place, os.path.basename(name)))
                if not os.listdir(place):  # what a package's script has put there is its own
                    if os.path.ismount(place):
                        await commands.run("umount", place)
                    os.rmdir(place)
    return dropped
