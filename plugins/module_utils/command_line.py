# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""QEMU's command line as data: reading it, writing it back, hiding its secrets.

Pure functions. Private to the collection.
"""

from __future__ import annotations

import json
import re
import typing as t
from dataclasses import dataclass

from ansible_collections.vmfleet.cpr.plugins.module_utils.errors import CprError

# Whether an option takes an argument can't be told from the words themselves. Both tables
# hold what QEMU 7.2 to 11.1 accept (x86-64); a test asks the real binaries.
OPTIONS_WITHOUT_ARGUMENT = frozenset("""
    S async-teardown audio-help daemonize enable-kvm enable-sync-profile full-screen h help
    jitdump mem-prealloc no-acpi no-fd-bootchk no-hpet no-reboot no-shutdown no-user-config
    nodefaults nographic old-param only-migratable perfmap portrait preconfig s semihosting
    singlestep snapshot usb version win2k-hack xen-attach xen-domid-restrict
    """.split())
OPTIONS_WITH_ARGUMENT = frozenset("""
    D L M accel acpitable action add-fd append audio audiodev bios blockdev boot cdrom chardev
    chroot compat cpu d debugcon device dfilter display drive dtb dump-vmstate echr fda fdb
    fsdev fw_cfg g gdb global hda hdb hdc hdd icount incoming initrd iscsi k kernel loadvm m
    machine mem-path mon monitor msg mtdblock name net netdev nic numa object option-rom
    overcommit parallel pflash pidfile plugin prom-env qmp qmp-pretty readconfig rotate rtc
    run-with runas sandbox sd seed semihosting-config serial set shim smbios smp spice tpmdev
    trace usbdevice uuid vga virtfs vnc watchdog-action xen-domid
    """.split())


@dataclass(frozen=True)
class Option:
    """One option as it was written.

    :ivar flag: with its dashes (``-device``, ``--device``); empty for a bare disk image.
    :ivar value: its argument, or None where it takes none.
    """

    flag: str
    value: str | None = None

    @property
    def name(self) -> str:
        """The option's name without dashes, an alias by its full name."""
        name = self.flag.lstrip("-")
        return "machine" if name == "M" else name


def parse(arguments: t.Sequence[str]) -> list[Option]:
    """Read a command line, the binary (``argv[0]``) left out.

    ``write(parse(arguments)) == list(arguments)`` for everything that QEMU accepts.

    :raises CprError: ``unknown-option`` for an option that no known QEMU has, since it can't
        be told whether the next word belongs to it; ``missing-argument`` for an option that
        lacks its argument.
    """
    options = []
    words = iter(arguments)
    for word in words:
        if not word.startswith("-") or word == "-":
            options.append(Option("", word))
            continue
        # QEMU's own rule (system/vl.c, lookup_opt): one dash or two mean the same.
        name = word[2:] if word.startswith("--") else word[1:]
        if name in OPTIONS_WITHOUT_ARGUMENT:
            options.append(Option(word))
        elif name in OPTIONS_WITH_ARGUMENT:
            value = next(words, None)
            if value is None:
                raise CprError("missing-argument", f"The QEMU option {word} lacks its argument.")
            options.append(Option(word, value))
        else:
            raise CprError(
                "unknown-option",
                f"The guest's command line has the option {word}, which this collection does not know.",
                "Please report it: it can't be carried over safely before it is known.",
            )
    return options


def write(options: t.Iterable[Option]) -> list[str]:
    """The words of a command line, the binary left out."""
    words = []
    for option in options:
        if option.flag:
            words.append(option.flag)
        if option.value is not None:
            words.append(option.value)
    return words


class Properties:
    """The argument of an option in QEMU's ``key=value`` syntax, in order, repeats kept.

    A first word without ``=`` is the implied key's value and has the key None, as has a bare
    flag (``server``). A comma in a value is written twice (QEMU's docs/system/qemu-options).
    """

    def __init__(self, pairs: t.Iterable[tuple[str | None, str]]) -> None:
        self.pairs = list(pairs)

    @classmethod
    def read(cls, value: str) -> Properties:
        """:param value: the option's argument in ``key=value`` syntax."""
        pairs: list[tuple[str | None, str]] = []
        for part in re.findall(r"((?:[^,]|,,)+)", value):
            key, separator, rest = part.partition("=")
            text = (rest if separator else part).replace(",,", ",")
            pairs.append((key if separator else None, text))
        return cls(pairs)

    def __str__(self) -> str:
        return ",".join((f"{key}=" if key is not None else "") + text.replace(",", ",,") for key, text in self.pairs)

    def get(self, key: str) -> str | None:
        """The last value of a key, as QEMU counts it, or None."""
        return next((text for name, text in reversed(self.pairs) if name == key), None)

    @property
    def implied(self) -> str | None:
        """The value of the implied first key, or None."""
        return self.pairs[0][1] if self.pairs and self.pairs[0][0] is None else None

    def with_value(self, key: str, text: str) -> Properties:
        """A copy in which a key has this value, at its old place where there is one."""
        if self.get(key) is None:
            return Properties([*self.pairs, (key, text)])
        return Properties((name, text if name == key else old) for name, old in self.pairs)

    def is_on(self, key: str) -> bool:
        """Whether a boolean key is on, in any of the forms that QEMU takes."""
        value = self.get(key)
        if value is None:  # a bare flag: "server" means server=on, and "nowait" wait=off
            return (None, key) in self.pairs
        return value in ("on", "yes", "true", "y")


def read_properties(option: Option) -> Properties:
    """An option's argument, in either syntax, its nested JSON keys joined by dots.

    JSON has its place in ``-object``, ``-device``, ``-blockdev`` and others from QEMU 6.0 on.
    """
    value = option.value or ""
    if not value.startswith("{") or option.name not in _JSON_OPTIONS:
        return Properties.read(value)
    try:
        return Properties(_flatten(json.loads(value)))
    except ValueError as error:
        raise CprError(
            "unreadable-option",
            f"The guest's command line has the option {option.flag} with JSON that can't be read: {error}.",
            "QEMU takes single quotes there, this collection does not: write it with double quotes.",
        ) from error


def with_property(option: Option, key: str, value: t.Any) -> Option:
    """An option in which a key has this value, or is missing for None, in the syntax that it has."""
    text = option.value or ""
    if text.startswith("{") and option.name in _JSON_OPTIONS:
        tree = {name: old for name, old in json.loads(text).items() if name != key}
        return Option(option.flag, json.dumps(tree if value is None else {**tree, key: value}, separators=(",", ":")))
    properties = read_properties(option)
    if value is None:
        return Option(option.flag, str(Properties(pair for pair in properties.pairs if pair[0] != key)))
    return Option(option.flag, str(properties.with_value(key, str(value))))


def _flatten(tree: dict[str, t.Any], prefix: str = "") -> t.Iterator[tuple[str, str]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        elif isinstance(value, bool):
            yield prefix + key, "on" if value else "off"
        else:
            yield prefix + key, str(value)


def guest_name(options: t.Iterable[Option]) -> str | None:
    """The guest's name: the ``guest=`` part, or the whole, of the last ``-name``."""
    name = None
    for option in options:
        if option.name == "name":
            properties = read_properties(option)
            name = properties.get("guest") or properties.implied or name
    return name


def machine_properties(options: t.Iterable[Option]) -> Properties:
    """All ``-machine`` and ``-M`` options merged, as QEMU does."""
    return Properties(
        ("type", text) if key is None and position == 0 else (key, text)
        for option in options
        if option.name == "machine"
        for position, (key, text) in enumerate(read_properties(option).pairs)
    )


_JSON_OPTIONS = frozenset("audiodev blockdev compat device display incoming netdev object".split())
MASK = "********"
_SECRET_KEYS = ("password", "passwd", "key-data")
_URL_PASSWORD = re.compile(r"(?<=://)([^:/@\s,]*):([^@/\s,]+)(?=@)")
_CREDENTIAL = re.compile(r"^(io\.systemd\.credential[^:=]*[:=][^=]*=)(.+)$", re.DOTALL)


def secrets(options: t.Iterable[Option]) -> set[str]:
    """Every secret that stands in a command line.

    These are the ``data`` of ``-object secret`` and its relatives, passwords, passwords in
    URLs and systemd credentials handed over by SMBIOS or fw_cfg.
    """
    found = set()
    for option in options:
        value = option.value or ""
        found.update(match.group(2) for match in _URL_PASSWORD.finditer(value))
        if "=" not in value and not value.startswith("{"):
            continue
        properties = read_properties(option)
        kind = properties.get("qom-type") or properties.implied or ""
        for key, text in properties.pairs:
            last = (key or "").rpartition(".")[2]
            if last in _SECRET_KEYS and text not in ("on", "off", "yes", "no", "true", "false"):
                found.add(text)
            elif option.name == "object" and kind.startswith("secret") and last == "data":
                found.add(text)
            elif option.name == "smbios" and key == "value":
                found.update(match.group(2) for match in _CREDENTIAL.finditer(text))
            elif option.name == "fw_cfg" and key == "string":
                found.add(text)
    return found - {""}


def mask(text: str, hidden: t.Iterable[str]) -> str:
    """A text with every secret hidden.

    :param hidden: what `secrets` returned.
    """
    for secret in sorted(hidden, key=len, reverse=True):
        for form in (secret, secret.replace(",", ",,"), json.dumps(secret)[1:-1]):
            text = text.replace(form, MASK)
    return text


def masked_words(options: t.Sequence[Option]) -> list[str]:
    """The words of a command line with every secret hidden, to show to people."""
    hidden = secrets(options)
    return [mask(word, hidden) if word[:1] != "-" else word for word in write(options)]
