# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The new QEMU's command line, made from the old one's.

Two QEMUs can't bind one path. So every socket and pid file that the guest's command line
names gets a path of this update's *generation* (``/run/web1.qmp.cpr1``) and is renamed to
its stable path (``/run/web1.qmp``) once the old QEMU is gone. The next update reads the
stable path back from the generation's.

Pure functions. Private to the collection.
"""

from __future__ import annotations

import json
import re
import typing as t
from dataclasses import dataclass, field

from ansible_collections.vmfleet.cpr.plugins.module_utils.command_line import (
    Option,
    Properties,
    machine_properties,
    read_properties,
)
from ansible_collections.vmfleet.cpr.plugins.module_utils.errors import CprError

# The kernel's limit for the path of a UNIX socket, without the closing NUL (unix(7)).
SOCKET_PATH_LIMIT = 107

# Options whose argument describes a character device in QEMU's short form.
_SHORT_CHARDEVS = ("qmp", "qmp-pretty", "monitor", "serial", "parallel", "debugcon", "gdb", "vnc")
_GENERATION = re.compile(r"^(?P<stable>.+)\.cpr(?P<number>[0-9]+)$", re.DOTALL)

# What the new QEMU can't be given safely, each with its reason.
_REFUSED = {
    "snapshot": "its disk writes are in temporary files that only the running QEMU has",
    "loadvm": "the new QEMU would load that snapshot over the running guest's state",
    "add-fd": "it names a file descriptor that only the running QEMU has",
    "preconfig": "the new QEMU would stop for its configuration before it takes the guest over",
    "readconfig": "what the file configures is not carried over yet",
    "runas": "the new QEMU starts as the user that the running one has become",
    "chroot": "paths mean something else inside it",
    "D": "the new QEMU would truncate the log that the running one writes",
    "tpmdev": "the emulator behind it serves one QEMU at a time",
}
_REFUSED_RUN_WITH = ("user", "chroot", "exit-with-parent")


@dataclass
class NewCommandLine:
    """What to start.

    :ivar arguments: the words of the command line, the binary (``argv[0]``) left out.
    :ivar generation: how many live updates lie behind the new QEMU, this one counted.
    :ivar renames: pairs of a path of this generation and the stable path that it becomes.
    """

    arguments: list[Option]
    generation: int
    renames: list[tuple[str, str]] = field(default_factory=list)


def stable_path(path: str) -> str:
    """The path that users know, from a path of any generation."""
    match = _GENERATION.match(path)
    return match.group("stable") if match else path


def is_cpr_leftover(option: Option) -> bool:
    """Whether this is the ``-incoming`` channel that an earlier live update left."""
    if option.name != "incoming" or not (option.value or "").startswith("{"):
        return False
    return json.loads(option.value or "").get("channel-type") == "cpr"


def generation_of(options: t.Sequence[Option]) -> int:
    """How many live updates lie behind the QEMU with this command line."""
    # Without the leftover, ".cpr3" is just how the user named the socket.
    if not any(is_cpr_leftover(option) for option in options):
        return 0
    numbers = [0]
    for path in _bound_paths(options):
        match = _GENERATION.match(path)
        if match:
            numbers.append(int(match.group("number")))
    return max(numbers)


def qmp_paths(options: t.Sequence[Option]) -> list[str]:
    """The stable paths of the QMP monitors that listen on a UNIX socket, in order."""
    updated = generation_of(options) > 0
    sockets = {}
    found = []
    for option in options:
        properties = read_properties(option) if option.value else Properties([])
        path = _bound_path(option)
        if option.name == "chardev" and path:
            sockets[properties.get("id")] = path
        elif option.name in ("qmp", "qmp-pretty") and path:
            found.append(path)
    for option in options:
        properties = read_properties(option) if option.name in ("mon", "object") else Properties([])
        if option.name == "mon" and properties.get("mode") == "control":
            path = sockets.get(properties.get("chardev") or properties.implied)
        elif "monitor-qmp" in (properties.implied, properties.get("qom-type")):  # QEMU 11.1
            path = sockets.get(properties.get("chardev"))
        else:
            path = None
        if path:
            found.append(path)
    return [stable_path(path) if updated else path for path in found]


def make(options: t.Sequence[Option], *, machine_type: str, cpr_socket: str) -> NewCommandLine:
    """The command line of a QEMU that takes this guest over by cpr-transfer.

    :param options: the old QEMU's.
    :param machine_type: the versioned machine type that the old QEMU resolved; ``q35`` means
        something newer in a newer binary.
    :param cpr_socket: where the new QEMU shall wait for the CPR state.
    :raises CprError: ``unsupported-option`` for what can't be carried over safely;
        ``socket-path-too-long`` where a generation's path would not fit.
    """
    refuse_unsupported(options)
    updated = generation_of(options) > 0
    result = NewCommandLine([], generation_of(options) + 1)
    for index, option in enumerate(options):
        if option.name in ("S", "incoming", "daemonize"):
            continue  # the launcher detaches the new QEMU itself
        path = _bound_path(option)
        if path:
            stable = stable_path(path) if updated else path
            temporary = f"{stable}.cpr{result.generation}"
            if option.name != "pidfile" and len(temporary.encode()) > SOCKET_PATH_LIMIT:
                raise CprError(
                    "socket-path-too-long",
                    f"The path {temporary} that the new QEMU needs is longer than the {SOCKET_PATH_LIMIT} bytes"
                    " that a UNIX socket's path may have.",
                    "Give the guest's sockets shorter paths when it next starts.",
                )
            result.renames.append((temporary, stable))
            option = _with_bound_path(option, temporary)
        result.arguments.extend(_appending(option, _serial_number(options, index)))
    result.arguments = _with_machine_type(result.arguments, machine_type)
    channel = {"channel-type": "cpr", "addr": {"transport": "socket", "type": "unix", "path": cpr_socket}}
    result.arguments += [
        Option("-S"),
        Option("-incoming", "defer"),
        Option("-incoming", json.dumps(channel, separators=(",", ":"))),
    ]
    return result


def refuse_unsupported(options: t.Sequence[Option]) -> None:
    """Refuse a command line that can't be carried over safely.

    :raises CprError: ``unsupported-option`` with the option and the reason.
    """
    explicit_serial = any(option.name == "serial" for option in options)
    for option in options:
        reason = _REFUSED.get(option.name)
        properties = read_properties(option) if option.value else Properties([])
        keys = {(key or "").rpartition(".")[2] for key, dummy in properties.pairs}
        if option.name == "run-with" and keys.intersection(_REFUSED_RUN_WITH):
            reason = "it ties the process to the user, root or parent that the running one started with"
        elif option.name in ("netdev", "nic", "net", "chardev", "object") and keys & {
            "fd",
            "fds",
            "vhostfd",
            "vhostfds",
        }:
            reason = _REFUSED["add-fd"]
        elif option.name == "drive" and properties.is_on("snapshot"):
            reason = _REFUSED["snapshot"]
        elif _is_socket_not_carried(option, properties):
            reason = "this form of a UNIX socket is not carried over yet"
        elif "/dev/fdset/" in (option.value or ""):
            reason = _REFUSED["add-fd"]
        elif "vhost-user" in (properties.implied or properties.get("driver") or properties.get("type") or ""):
            reason = "its backend serves one QEMU at a time"
        elif properties.get("abstract") is not None and properties.is_on("abstract"):
            reason = "an abstract socket can't be handed over"
        elif option.name == "nographic" and not explicit_serial:
            reason = "it puts the console on the running process's own terminal"
        elif option.name in _SHORT_CHARDEVS + ("chardev",) and (properties.implied or "").rpartition(":")[2] == "stdio":
            reason = "it is the running process's own terminal"
        if reason:
            raise CprError(
                "unsupported-option",
                f"The guest's command line has the option {option.flag}, and {reason}.",
                "Start the guest without it when it next starts, or leave this guest out of live_update_guests.",
            )


def _is_socket_not_carried(option: Option, properties: Properties) -> bool:
    """Whether both QEMUs would bind one path, and the old one's exit remove it."""
    value = option.value or ""
    return (
        (option.name in _SHORT_CHARDEVS and value.startswith("mon:unix:"))
        or (option.name == "netdev" and properties.is_on("server") and properties.get("addr.type") == "unix")
        or (option.name == "spice" and properties.is_on("unix"))
        or (option.name == "display" and value.startswith("vnc=unix:"))
    )


def _bound_path(option: Option) -> str | None:
    """The path that the option makes QEMU bind or create and remove, or None."""
    value = option.value or ""
    if option.name == "pidfile":
        return value
    if option.name in _SHORT_CHARDEVS and value.startswith("unix:"):
        properties = Properties.read(value[len("unix:") :])
        if option.name == "vnc" or properties.is_on("server"):
            return properties.implied or properties.get("path")
    if option.name == "chardev":
        properties = read_properties(option)
        if properties.implied == "socket" and properties.is_on("server"):
            return properties.get("path")
    return None


def _bound_paths(options: t.Sequence[Option]) -> list[str]:
    return [path for path in map(_bound_path, options) if path]


def _with_bound_path(option: Option, path: str) -> Option:
    if option.name == "pidfile":
        return Option(option.flag, path)
    if option.name == "chardev":
        return Option(option.flag, str(_without_wait(read_properties(option).with_value("path", path))))
    properties = Properties.read((option.value or "")[len("unix:") :])
    if properties.implied is None:
        properties = properties.with_value("path", path)
    else:
        properties = Properties([(None, path), *properties.pairs[1:]])
    # VNC waits for nobody and has no such key.
    return Option(option.flag, f"unix:{properties if option.name == 'vnc' else _without_wait(properties)}")


def _without_wait(properties: Properties) -> Properties:
    """A server socket that does not wait for a client, as QEMU by default does.

    The client that the old QEMU waited for is connected to that one; the new one would never
    start.
    """
    pairs = [pair for pair in properties.pairs if pair not in ((None, "wait"), (None, "nowait"))]
    return Properties(pairs).with_value("wait", "off")


def _serial_number(options: t.Sequence[Option], index: int) -> int:
    """The number that QEMU gives this option's device among those of the same name."""
    return sum(1 for option in options[:index] if option.name == options[index].name)


def _appending(option: Option, number: int) -> list[Option]:
    """The option so that a file that the old QEMU writes is appended to, not truncated."""
    value = option.value or ""
    if option.name in ("serial", "parallel", "debugcon") and value.startswith("file:"):
        # The short form can't append. QEMU itself names the device so (chardev/char.c).
        identity = f"{'debugcon' if option.name == 'debugcon' else option.name + str(number)}"
        chardev = Properties([(None, "file"), ("id", identity), ("path", value[len("file:") :]), ("append", "on")])
        return [Option("-chardev", str(chardev)), Option(option.flag, f"chardev:{identity}")]
    if option.name == "chardev":
        properties = read_properties(option)
        if properties.implied == "file":
            properties = properties.with_value("append", "on")
        if properties.get("logfile") is not None:
            properties = properties.with_value("logappend", "on")
        return [option if str(properties) == value else Option(option.flag, str(properties))]
    return [option]


def _with_machine_type(options: t.Sequence[Option], machine_type: str) -> list[Option]:
    """The options with the machine type named once, and by its versioned name."""
    if machine_properties(options).get("type") is None:
        return [Option("-machine", f"type={machine_type}"), *options]
    result = []
    for option in options:
        if option.name == "machine":
            properties = read_properties(option)
            pairs = [
                ("type", machine_type) if key == "type" or (key is None and position == 0) else (key, text)
                for position, (key, text) in enumerate(properties.pairs)
            ]
            option = Option(option.flag, str(Properties(pairs)))
        result.append(option)
    return result
