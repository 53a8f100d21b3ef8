# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Makes a version of the store: from packages, from an archive, or of what the host has installed.

All is made in a sibling directory, tried there, and renamed: a version is whole or not there. Private to the
collection.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
import re
import shutil
import stat
import time
from dataclasses import dataclass, field

from ansible_collections.vmfleet.cpr.plugins.module_utils import (
    commands,
    qemu_binary,
    qemu_modules,
    qemu_store,
    qemu_versions,
)
from ansible_collections.vmfleet.cpr.plugins.module_utils.errors import CprError

ARCHIVE, UNPACKED, INSTALLED = "archive", "unpacked", "installed"
# Seconds; a package of some 100 MB on a slow disk.
_UNPACK_TIMEOUT = 900.0
# What must be left beside a new version.
_RESERVE = 64 << 20
# Unpacked an archive is so many times its size, if it can't be told beforehand.
_EXPANSION = 6
# What no guest of a PC starts without.
_BIOS = "bios-256k.bin"
_CHECKSUMS = ("sha256", "sha384", "sha512")
# Of packages: nothing that would have to be elsewhere, or is for people.
_KEPT_TOPS = ("bin", "libexec", "share")
_LEFT_OUT = (
    *("share/doc", "share/man", "share/info", "share/locale", "share/lintian", "share/bug", "share/applications"),
    *("share/icons", "share/metainfo", "share/bash-completion", "share/zsh", "share/perl5", "share/licenses"),
    *("lib/systemd", "lib/udev", "lib/modules", "lib/sysusers.d", "lib/tmpfiles.d", "lib/.build-id"),
)


@dataclass(frozen=True)
class Wish:
    """The version that shall be there.

    :ivar name: of its directory.
    :ivar emulator: the file name of its binary.
    :ivar archive: the path of an archive.
    :ivar checksum: of that, ``sha256:`` and so on.
    :ivar packages: the paths of .deb or .rpm files, or of directories with such.
    :ivar installed: the path of a binary of the host's packages.
    :ivar described_as: what the user gave instead of these paths, to be compared with on the next run.
    :ivar executables: of an installed one, as `qemu_modules.executables`: what runs these uses the copy's files.
    :ivar only_plan: whether the archive, or more packages than these, are not here yet: nothing is made then.
    """

    directory: str
    name: str
    emulator: str
    archive: str | None = None
    checksum: str | None = None
    packages: tuple[str, ...] = ()
    installed: str | None = None
    described_as: tuple[str, ...] = ()
    executables: tuple[tuple[int, int], ...] = ()
    only_plan: bool = False

    @property
    def source(self) -> str:
        """Where it comes from."""
        return INSTALLED if self.installed else ARCHIVE if self.archive else UNPACKED

    @property
    def origin(self) -> list[str]:
        """What tells it from another of the same name."""
        if self.source == INSTALLED:
            return []  # the name is the build's own
        return [self.checksum or ""] if self.source == ARCHIVE else sorted(self.described_as or self.packages)

    @property
    def path(self) -> str:
        """Where it will be."""
        return os.path.join(os.path.realpath(self.directory), self.name)

    @property
    def binary(self) -> str:
        """Where its emulator will be."""
        return os.path.join(self.path, "bin", self.emulator)


@dataclass
class Made:
    """What became of a wish.

    :ivar present: whether it was there already.
    :ivar modules: the modules that were kept for running guests of it.
    """

    wish: Wish
    present: bool
    message: str
    modules: list[str] = field(default_factory=list)


async def of_installed(directory: str, binary: str) -> tuple[Wish, str]:
    """The wish for a copy of what the host has installed, named after its build, and the build's own version.

    :param binary: the path of its emulator.
    :raises CprError: ``binary-missing``, ``command-failed``, ``binary-not-qemu``.
    """
    if not os.path.isfile(binary):
        raise CprError("binary-missing", f"There is no QEMU binary at {binary} on this host.", "Nothing is to be kept.")
    version, build = qemu_versions.build_of(await commands.run(binary, "-version"))
    name = qemu_versions.sanitized(build) if build else version
    executables = tuple(await qemu_modules.executables(binary, (version, build)))
    return Wish(directory, name, os.path.basename(binary), installed=binary, executables=executables), build


async def make(wish: Wish, check_mode: bool) -> Made:
    """Let a version be in the store; nothing is changed if it is there.

    :raises CprError: ``bad-argument``, ``version-taken``, ``source-missing``, ``checksum-differs``,
        ``store-full``, ``unpack-failed``, ``emulator-missing``, ``patchelf-missing``, ``firmware-missing``,
        ``store-locked``; as `qemu_binary.probe` for a QEMU that does not start. Nothing is left behind then.
    :raises OSError: the host refused it.
    """
    qemu_versions.check_name(wish.name)
    if _is_there(wish):
        return Made(wish, True, f"{wish.path} is there already.")
    _check_source(wish)
    await _check_room(wish)
    if check_mode or wish.only_plan:
        return Made(wish, False, f"{wish.path} would be made.")
    os.makedirs(wish.directory, mode=0o755, exist_ok=True)
    with qemu_store.lock(wish.directory):
        if not _is_there(wish):  # somebody else made it meanwhile
            await _make(wish)
    return Made(wish, False, f"{wish.path} was made.")


def _is_there(wish: Wish) -> bool:
    """Whether this very version is there.

    :raises CprError: ``version-taken``.
    """
    if not os.path.lexists(wish.path):
        return False
    marker = qemu_store.read_marker(wish.path)
    hint = "Give another qemu_binary_version, or remove that directory once nothing uses it."
    if marker is None:
        raise CprError("version-taken", f"{wish.path} is there, and this collection has not made it.", hint)
    made_of = (marker["source"], marker["emulator"], marker["origin"])
    if made_of != (wish.source, wish.emulator, wish.origin):
        raise CprError(
            "version-taken",
            f"{wish.path} is there, with {marker['emulator']} from another source ({marker['source']}:"
            f" {', '.join(marker['origin'])}).",
            hint,
        )
    if not os.access(wish.binary, os.X_OK):
        raise CprError("version-taken", f"{wish.path} is there, and {wish.binary} is not.", hint)
    return True


def _check_source(wish: Wish) -> None:
    kind, dummy, wanted = (wish.checksum or "").partition(":")
    if wish.archive and (kind not in _CHECKSUMS or not wanted):
        raise CprError("bad-argument", f"{wish.checksum!r} is no checksum.", "Write sha256: and its digits.")
    sources = _sources(wish)
    missing = [path for path in sources if not os.access(path, os.R_OK)]
    if missing or not (sources or wish.only_plan):
        raise CprError(
            "source-missing",
            f"There is nothing to read at {', '.join(missing)}." if missing else "There are no packages to unpack.",
            "Give paths of this host, or see why nothing was fetched.",
        )
    if wish.archive and not wish.only_plan:
        found = _digest(wish.archive, kind)
        if found != wanted.lower():
            raise CprError(
                "checksum-differs",
                f"The archive has the checksum {kind}:{found}, and not {kind}:{wanted}.",
                "It is another one, or was not fetched whole. Nothing was unpacked.",
            )


def _digest(path: str, kind: str) -> str:
    digest = hashlib.new(kind)
    with open(path, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _sources(wish: Wish) -> list[str]:
    if wish.installed:
        return [wish.installed]
    if wish.archive:
        return [] if wish.only_plan else [wish.archive]
    found = []
    for path in wish.packages:
        inside = sorted(glob.glob(f"{glob.escape(path)}/*.deb") + glob.glob(f"{glob.escape(path)}/*.rpm"))
        found += inside if os.path.isdir(path) else [path]
    return found


async def _check_room(wish: Wish) -> None:
    """Refuse what there is no room for.

    :raises CprError: ``store-full``.
    """
    needed = _RESERVE
    for path in _sources(wish):
        if wish.installed:
            needed += sum(map(_size, [path, *await _data_of(path), *qemu_modules.directories()]))
        else:
            needed += await _unpacked_size(path)
    place = os.path.realpath(wish.directory)
    while not os.path.isdir(place):
        place = os.path.dirname(place)
    free = shutil.disk_usage(place).free
    if free < needed:
        raise CprError(
            "store-full",
            f"{place} has {free >> 20} MiB free, and {wish.name} would need {needed >> 20} MiB.",
            "Make room, lower qemu_binary_keep, or choose another qemu_binary_directory.",
        )


def _size(path: str) -> int:
    if os.path.isdir(path):
        return sum(_size(os.path.join(path, name)) for name in os.listdir(path))
    with contextlib.suppress(OSError):
        return os.stat(path).st_size
    return 0


async def _unpacked_size(path: str) -> int:
    """The bytes that an archive or a package takes; twice that for a package, which is merged with others."""
    if path.endswith(".deb"):
        return int(await commands.run("dpkg-deb", "--field", path, "Installed-Size") or 0) << 10
    if path.endswith(".rpm"):
        return int(await commands.run("rpm", "-qp", "--queryformat", "%{LONGSIZE}", path))
    return os.path.getsize(path) * _EXPANSION


async def _make(wish: Wish) -> None:
    work = os.path.join(os.path.realpath(wish.directory), qemu_versions.UNFINISHED + wish.name)
    shutil.rmtree(work, ignore_errors=True)  # of a run that died
    root = os.path.join(work, "root")
    try:
        os.makedirs(root, mode=0o755)
        prefix = await {INSTALLED: _copy, ARCHIVE: _unpack_archive, UNPACKED: _unpack_packages}[wish.source](wish, work)
        _make_bundle(root, prefix)
        _make_harmless(root)
        binary = os.path.join(root, "bin", wish.emulator)
        interpreter = await _use_own_libraries(root) if wish.source == UNPACKED else None
        version = (await qemu_binary.probe(binary)).offer.version_text
        await _check_data(binary, root)
        if interpreter:  # absolute, other than all the rest
            await _patch(root, "--set-interpreter", os.path.join(wish.path, os.path.relpath(interpreter, root)))
        with open(os.path.join(root, qemu_store.MARKER), "w", encoding="utf-8") as stream:
            json.dump(
                {
                    "format": qemu_store.FORMAT,
                    "source": wish.source,
                    "origin": wish.origin,
                    "emulator": wish.emulator,
                    "qemu_version": version,
                    "executables": wish.executables,
                    "made_at": time.time(),
                },
                stream,
            )
        _write_out(root)
        os.rename(root, wish.path)
        _write_out(os.path.dirname(wish.path), below=False)
    finally:
        shutil.rmtree(work, ignore_errors=True)


async def _copy(wish: Wish, work: str) -> str:
    """Copy a binary of the host's packages with its firmware, option ROMs and modules; its prefix."""
    root, binary = os.path.join(work, "root"), wish.installed or ""
    os.makedirs(os.path.join(root, "bin"))
    shutil.copy2(binary, os.path.join(root, "bin", wish.emulator))
    for directory in [*await _data_of(binary), *qemu_modules.directories()]:
        if directory.startswith("/usr/"):
            # The links among them lead out of it (to OVMF): what they lead to is taken.
            target = os.path.join(root, os.path.relpath(directory, "/usr"))
            shutil.copytree(directory, target, dirs_exist_ok=True, ignore_dangling_symlinks=True)
    return "usr"


async def _data_of(binary: str) -> list[str]:
    """Where a QEMU looks for firmware and option ROMs, as far as it is there."""
    return [path for path in (await commands.run(binary, "-L", "help")).splitlines() if os.path.isdir(path)]


async def _unpack_archive(wish: Wish, work: str) -> str:
    """Unpack an archive so that the directory above its ``bin`` is the version; the path of that in it."""
    top = os.path.join(work, "archive")
    os.mkdir(top)
    await _unpack("tar", "-xf", wish.archive or "", "-C", top, "--no-same-owner", "--no-same-permissions")
    binaries = [
        os.path.join(place, wish.emulator)
        for place, dummy, names in os.walk(top)
        if os.path.basename(place) == "bin" and wish.emulator in names
    ]
    if len(binaries) != 1:
        found = ", ".join(os.path.relpath(path, top) for path in binaries) or "none"
        raise CprError(
            "emulator-missing",
            f"The archive must hold one bin/{wish.emulator}, and has {found}.",
            "Give an archive of one installed QEMU, and its emulator's name as qemu_binary_emulator.",
        )
    prefix = os.path.dirname(os.path.dirname(binaries[0]))
    os.rmdir(os.path.join(work, "root"))
    os.rename(prefix, os.path.join(work, "root"))
    os.chmod(os.path.join(work, "root"), 0o755)
    return "" if prefix == top else os.path.relpath(prefix, top)


async def _unpack_packages(wish: Wish, work: str) -> str:
    """Unpack packages over one another, each file where it is below ``/usr``; the prefix."""
    for package in _sources(wish):
        tree = os.path.join(work, "package")
        os.mkdir(tree)
        if package.endswith(".rpm"):
            script = 'cd "$2" && rpm2cpio "$1" | cpio --quiet -idm --no-absolute-filenames'
            await _unpack("sh", "-c", script, "sh", os.path.abspath(package), tree)
        else:
            await _unpack("dpkg-deb", "--extract", package, tree)
        for top in (os.path.join(tree, "usr"), tree):
            _merge(top, os.path.join(work, "root"))
        shutil.rmtree(tree)
    if not os.path.isfile(os.path.join(work, "root", "bin", wish.emulator)):
        raise CprError(
            "emulator-missing",
            f"None of the packages has a bin/{wish.emulator}.",
            "Name the package that has it in qemu_binary_packages, or another qemu_binary_emulator.",
        )
    return "usr"


async def _unpack(*words: str) -> None:
    try:
        await commands.run(*words, timeout=_UNPACK_TIMEOUT, of_user=True)
    except CprError as error:
        raise CprError("unpack-failed", error.message, "Nothing of it was left behind.") from error


def _merge(source: str, root: str) -> None:
    """Move what a QEMU needs of an unpacked package."""
    for place, directories, names in os.walk(source):
        below = os.path.relpath(place, source)
        if below == ".":
            directories[:] = [name for name in directories if name in _KEPT_TOPS or name.startswith("lib")]
            continue
        if below in _LEFT_OUT:
            directories[:] = []
            continue
        for name in [*names, *(name for name in directories if os.path.islink(os.path.join(place, name)))]:
            # Of the packages that QEMU depends on the host has its own programs.
            if below in ("bin", "libexec") and not (name.startswith("qemu") or name == "virtiofsd"):
                continue
            target = os.path.join(root, below, name)
            os.makedirs(os.path.dirname(target), exist_ok=True)
            os.rename(os.path.join(place, name), target)


def _make_bundle(root: str, prefix: str) -> None:
    """Let QEMU find firmware and modules below the version.

    It looks below ``qemu-bundle`` beside its binary, if that is there, for what was built to be at an
    absolute path (util/cutils.c, since 7.1). Else one that was built to be in the system's directories may
    take what is there.

    :param prefix: what it was built for, without a slash before it; another one than usual moves with its binary.
    """
    bundle = os.path.join(root, "bin", "qemu-bundle")
    parts = prefix.split("/")
    if prefix.endswith(("usr", "usr/local")) and not os.path.lexists(bundle):
        parts = parts[parts.index("usr") :]
        os.makedirs(os.path.join(bundle, *parts[:-1]))
        os.symlink("/".join([".."] * (len(parts) + 1)), os.path.join(bundle, *parts))


def _make_harmless(root: str) -> None:
    """Let nothing in it run as somebody else, or be written to by others, and no link lead to the host's files."""
    for place, directories, names in os.walk(root):
        for path in (os.path.join(place, name) for name in [*directories, *names]):
            os.lchown(path, os.geteuid(), os.getegid())
            if not os.path.islink(path):
                mode = stat.S_IMODE(os.lstat(path).st_mode)
                os.chmod(path, (mode | stat.S_IRUSR | stat.S_IWUSR) & 0o755)
                continue
            target = os.readlink(path)
            inside = os.path.join(root, re.sub(r"^/(usr/)?", "", target))
            if target.startswith("/") and os.path.lexists(inside):
                os.unlink(path)
                os.symlink(os.path.relpath(inside, place), path)


async def _use_own_libraries(root: str) -> str | None:
    """Let the programs use the libraries that came with them, and the host's for the rest.

    :returns: the path of the C library's loader, if that came along too.
    :raises CprError: ``patchelf-missing``.
    """
    places = set()
    loader = None
    for place, dummy, names in os.walk(root):
        if os.path.relpath(place, root).startswith("lib") and any(re.search(r"\.so\.\d", name) for name in names):
            places.add(place)
        for name in names:
            path = os.path.join(place, name)
            if re.fullmatch(r"ld-(linux.*|musl.*|\d.*)\.so(\.\d+)?", name) and not os.path.islink(path):
                loader = path
    if not places:
        return None
    origin = [f"$ORIGIN/../{os.path.relpath(place, root)}" for place in sorted(places)]
    words = ["--force-rpath", "--set-rpath", ":".join(origin)]
    await _patch(root, *words, *(["--set-interpreter", loader] if loader else []))
    return loader


def lacks_patchelf() -> bool:
    """Whether this host has not what makes QEMU use libraries that came with it."""
    return not shutil.which("patchelf", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/bin:/sbin:/bin")


async def _patch(root: str, *words: str) -> None:
    """Change how the programs find their libraries.

    DT_RPATH, and not DT_RUNPATH as patchelf has it by itself: it serves the libraries' own libraries, and modules.
    """
    if lacks_patchelf():
        raise CprError(
            "patchelf-missing",
            "The packages bring libraries of their own, and there is no patchelf on this host to make QEMU use them.",
            "Install the package patchelf on the hypervisor, or give packages that need none but the host's libraries.",
        )
    for place in ("bin", "libexec"):
        for program in sorted(glob.glob(os.path.join(root, place, "*"))):
            if os.path.isfile(program) and not os.path.islink(program) and _is_elf(program):
                await commands.run("patchelf", *words, program)


def _is_elf(path: str) -> bool:
    with open(path, "rb") as stream:
        return stream.read(4) == b"\x7fELF"


async def _check_data(binary: str, root: str) -> None:
    """Refuse a QEMU without its own firmware.

    :raises CprError: ``firmware-missing``.
    """
    places = [os.path.realpath(path) for path in await _data_of(binary)]
    hint = (
        "Give all packages of that build (seabios too), or an archive with the firmware, of a QEMU that was built"
        " relocatable or packed with its whole path (usr/…)."
    )
    if not any(path.startswith(os.path.realpath(root) + "/") for path in places):
        found = ", ".join(places) or "nowhere"
        raise CprError(
            "firmware-missing", f"This QEMU would take firmware and option ROMs from {found}, and not its own.", hint
        )
    is_pc = re.search(r"x86_64|i386|qemu-kvm", os.path.basename(binary)) and os.uname().machine == "x86_64"
    if is_pc and not any(os.path.exists(os.path.join(path, _BIOS)) for path in places):
        raise CprError("firmware-missing", f"This QEMU has no {_BIOS} in {', '.join(places)}.", hint)


def _write_out(path: str, below: bool = True) -> None:
    """See that it is on disk: after a power failure a version must not be there by name only."""
    for place, dummy, names in os.walk(path):
        for name in [".", *names]:
            if not os.path.islink(os.path.join(place, name)):
                descriptor = os.open(os.path.join(place, name), os.O_RDONLY | os.O_NONBLOCK)
                try:
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)
            if not below:
                return
