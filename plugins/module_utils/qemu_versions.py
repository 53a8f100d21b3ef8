# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The versions of QEMU that lie side by side on a host: which may go, and who runs another than the default.

Pure functions. Private to the collection.
"""

from __future__ import annotations

import re
import typing as t
from dataclasses import dataclass

from ansible_collections.vmfleet.cpr.plugins.module_utils.errors import CprError

# Where the links to the default are; no version can be called so.
DEFAULTS = "bin"
# A version on its way: a sibling of where it will be, so that a rename takes it there.
UNFINISHED = ".vmfleet-cpr-"
# No colon: it separates paths. Nothing that is hidden: that is ours.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+~-]*")
_ENDED_RECORDS = (None, "finished", "rolled-back", "restored")


@dataclass(frozen=True)
class Version:
    """One version in the store.

    :ivar name: of its directory.
    :ivar binary: the path of its emulator.
    :ivar made_at: seconds since 1970; None if this collection has not made it.
    :ivar complete: whether all of it is there.
    :ivar qemu_version: what its emulator said when it was made.
    :ivar used_by: the processes that have files of it, as people call them.
    :ivar named_by: the files that tell the host to run it: of units, of machines, of updates under way.
    """

    name: str
    path: str
    binary: str
    made_at: float | None
    complete: bool
    qemu_version: str | None = None
    used_by: tuple[str, ...] = ()
    named_by: tuple[str, ...] = ()


@dataclass(frozen=True)
class Judgement:
    """Whether a version may be removed, and why, as half a sentence."""

    removable: bool
    reason: str


def check_name(name: str) -> None:
    """Refuse what can't be the directory of a version.

    :raises CprError: ``bad-argument``.
    """
    if not _NAME.fullmatch(name) or name == DEFAULTS or len(name) > 200:
        raise CprError(
            "bad-argument",
            f"A version can't be called {name!r}.",
            f"Use letters, digits and ._+~-, a letter or digit first, and not {DEFAULTS!r}.",
        )


def sanitized(text: str) -> str:
    """A build's own version as QEMU makes a directory's name of it (util/module.c, since 5.1)."""
    return re.sub(r"[^A-Za-z0-9+.~-]", "_", text)


def build_of(text: str) -> tuple[str, str]:
    """What ``qemu-system-… -version`` says: the version, and the build's own version or nothing.

    :raises CprError: ``binary-not-qemu``.
    """
    found = re.search(r"emulator version (\S+?),?(?: \((.*)\))?,?$", text.partition("\n")[0])
    if not found:
        raise CprError("binary-not-qemu", f"It does not say its version, but {text[:100]!r}.")
    return found[1], found[2] or ""


def fits(name: str, version: str) -> bool:
    """Whether the name of a version's directory is none that speaks of another version of QEMU.

    :param version: what its emulator says, ``11.1.3``.
    """
    spoken_of = re.match(r"\d{1,2}\.\d+", name)
    return not spoken_of or f"{version}.".startswith(f"{spoken_of[0]}.")


def mentions(text: str, path: str) -> bool:
    """Whether a text holds a path, or one below it, and not only one that begins alike."""
    return re.search(rf"(?<![\w./-]){re.escape(path)}(?![\w.+~-])", text) is not None


def unit_mentions(text: str, path: str) -> bool:
    """Whether a file of settings holds a path outside of its comments."""
    lines = text.splitlines()
    return any(mentions(line, path) for line in lines if not line.lstrip().startswith(("#", ";")))


def record_needs(record: t.Mapping[str, t.Any]) -> bool:
    """Whether what an update record names is needed: the update is under way, or waits to be restored.

    What a finished update came from nobody goes back to by its record.
    """
    return record.get("phase") not in _ENDED_RECORDS


def owner_of(path: str, trees: t.Mapping[str, str]) -> str | None:
    """The version to which a path belongs that the kernel gave, also of a file that was deleted.

    :param trees: the directory of each.
    """
    for name, tree in trees.items():
        if path.startswith(tree + "/") or path == tree:
            return name
    return None


def judge(
    versions: t.Iterable[Version],
    *,
    keep: int,
    defaults: t.Container[str] = (),
    protected: t.Container[str] = (),
    unseen: int = 0,
) -> dict[str, Judgement]:
    """Which versions may be removed.

    Those that nothing speaks for are counted from the latest; so many of them stay.

    :param keep: how many of them stay.
    :param defaults: the names of the versions that new guests get, one for each emulator.
    :param protected: the names of versions that were asked for.
    :param unseen: how many processes could not be looked at.
    """
    found: dict[str, Judgement] = {}
    others = []
    for version in versions:
        reason = _speaks_for(version, defaults, protected, unseen)
        if reason:
            found[version.name] = Judgement(False, reason)
        elif not version.complete:
            found[version.name] = Judgement(True, "it was never completed")
        else:
            others.append(version)
    others.sort(key=lambda version: (version.made_at or 0, version.name), reverse=True)
    for place, version in enumerate(others, 1):
        if place <= keep:
            found[version.name] = Judgement(False, f"it is one of the latest {keep} that nobody uses")
        else:
            found[version.name] = Judgement(True, f"nobody uses it, and {keep} later ones are kept")
    return found


def _speaks_for(version: Version, defaults: t.Container[str], protected: t.Container[str], unseen: int) -> str | None:
    if version.made_at is None:
        return "it was not made by this collection"
    if version.name in defaults:
        return "it is the default for new guests"
    if version.name in protected:
        return "it is the one that was asked for"
    if version.used_by:
        return f"in use by {_some(version.used_by)}"
    if version.named_by:
        return f"named by {_some(version.named_by)}"
    if unseen:
        return f"{unseen} processes could not be looked at, which may use it"
    return None


def _some(items: t.Sequence[str], most: int = 5) -> str:
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + more
