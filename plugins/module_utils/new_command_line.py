# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The new QEMU's command line, made from the old one's and from what that one has become since.

Two QEMUs can't bind one path. So every socket and pid file that the guest's command line
names gets a path of this update's *generation* (``/run/web1.qmp.cpr1``) and is renamed to
its stable path (``/run/web1.qmp``) once the old QEMU is gone. The next update reads the
stable path back from the generation's. What has no path is handed over as a descriptor.

Pure functions. Private to the collection.
"""

from __future__ import annotations

import json
import re
import typing as t
from dataclasses import dataclass, field

from ansible_collections.vmfleet.cpr.plugins.module_utils import character_devices, taps, user_network, vnc
from ansible_collections.vmfleet.cpr.plugins.module_utils.command_line import (
    Option,
    Properties,
    machine_properties,
    read_properties,
    with_property,
)
from ansible_collections.vmfleet.cpr.plugins.module_utils.errors import CprError

# The kernel's limit for the path of a UNIX socket, without the closing NUL (unix(7)).
SOCKET_PATH_LIMIT = 107

# Options whose argument describes a character device in QEMU's short form.
_SHORT_CHARDEVS = (*character_devices.SHORT_FORMS, "vnc")
# Below them are standard input, output and error.
_FIRST_DESCRIPTOR = 10
_GENERATION = re.compile(r"^(?P<stable>.+)\.cpr(?P<number>[0-9]+)$", re.DOTALL)

# What the new QEMU can't be given safely, each with its reason.
_REFUSED = {
    "snapshot": "its disk writes are in temporary files that only the running QEMU has",
    "loadvm": "the new QEMU would load that snapshot over the running guest's state",
    "preconfig": "the new QEMU would stop for its configuration before it takes the guest over",
    "chroot": "paths mean something else inside it",
    "D": "the new QEMU would truncate the log that the running one writes",
    "tpmdev": "the emulator behind it serves one QEMU at a time",
}
_BOTH_READ = "both QEMUs would read from it, and the guest would miss what the other one got"
_REFUSED_CHARDEVS = {
    "pty": "the new QEMU would get another terminal than /dev/pts/N, where somebody may be connected",
    "pipe": _BOTH_READ,
    "serial": _BOTH_READ,
    "tty": _BOTH_READ,
    "parallel": _BOTH_READ,
    "parport": _BOTH_READ,
}
_REFUSED_DEVICES = {
    "usb-host": "the new QEMU would take the host's device from the running guest",
    "usb-redir": "the other end of the redirection serves one QEMU at a time",
    "vhost-vsock": "the host gives a context id to one QEMU at a time",
    "vhost-scsi": "its target serves one QEMU at a time",
    "virtio-input-host": _BOTH_READ,
    "input-linux": _BOTH_READ,
}
_REFUSED_RUN_WITH = ("chroot", "exit-with-parent")
# What is said anew to every QEMU; the launcher detaches it itself.
_OURS = ("S", "incoming", "daemonize", "add-fd")
_ONLY_THERE = "it names a file descriptor that only the running QEMU has"


@dataclass(frozen=True)
class Descriptor:
    """A file descriptor that the new QEMU must have.

    :ivar number: its number there.
    :ivar of_old: the old QEMU's descriptor that it is a duplicate of.
    :ivar opened_anew: whether that file is opened once more instead: two QEMUs that share an
        open file share its locks too, and the image would be protected from neither.
    :ivar tap: or else the temporary interface of a tap that it is a queue of.
    :ivar path: or else the file that it is.
    """

    number: int
    of_old: int | None = None
    opened_anew: bool = False
    tap: str | None = None
    path: str | None = None


@dataclass(frozen=True)
class Running:
    """What the running QEMU has, whatever its command line says.

    :ivar machine_type: versioned.
    :ivar taps: for each tap backend of the command line, in order.
    :ivar fd_sets: what ``query-fdsets`` returned.
    :ivar displays: what ``query-vnc-servers`` returned.
    :ivar generation_id: what ``query-vm-generation-id`` returned, None without that device.
    :ivar user_networks: what ``info usernet`` prints.
    """

    machine_type: str
    listeners: t.Sequence[character_devices.Listener] = ()
    taps: t.Sequence[taps.Tap] = ()
    fd_sets: t.Sequence[t.Mapping[str, t.Any]] = ()
    displays: t.Sequence[t.Mapping[str, t.Any]] = ()
    user_networks: str = ""
    generation_id: str | None = None


@dataclass
class NewCommandLine:
    """What to start.

    :ivar arguments: the words of the command line, the binary (``argv[0]``) left out.
    :ivar generation: how many live updates lie behind the new QEMU, this one counted.
    :ivar renames: pairs of a path of this generation and the stable path that it becomes.
    :ivar descriptors: what it must be born with.
    :ivar display: what ``display-update`` must be told once the old QEMU is gone, or None.
    :ivar forwards: pairs of a network and a port, for ``hostfwd_add`` once the old QEMU is gone.
    """

    arguments: list[Option]
    generation: int
    renames: list[tuple[str, str]] = field(default_factory=list)
    descriptors: list[Descriptor] = field(default_factory=list)
    display: dict[str, t.Any] | None = None
    forwards: list[tuple[str, str]] = field(default_factory=list)

    def descriptor(self, of_old: int | None = None, **source: t.Any) -> int:
        """Ask for one more descriptor; its number in the new QEMU."""
        number = _FIRST_DESCRIPTOR + len(self.descriptors)
        self.descriptors.append(Descriptor(number, of_old, **source))
        return number


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
    # Without one of our own ".cpr3" is just how the user named the socket.
    if not any(
        option.name == "incoming" and (option.value == "defer" or is_cpr_leftover(option)) for option in options
    ):
        return 0
    numbers = [0]
    for path in bound_paths(options):
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


def make(options: t.Sequence[Option], running: Running, *, cpr_socket: str | None) -> NewCommandLine:
    """The command line of a QEMU that takes this guest over while the old one still is there.

    :param options: the old QEMU's.
    :param cpr_socket: where the new QEMU shall wait for the CPR state; None for a mode without any.
    :raises CprError: ``unsupported-option`` for what can't be carried over safely;
        ``socket-path-too-long`` where a generation's path would not fit.
    """
    refuse_unsupported(options)
    updated = generation_of(options) > 0
    result = NewCommandLine([], generation_of(options) + 1)
    doubles = iter(running.taps)
    written = _written(options, running, result)
    for index, option in enumerate(written):
        if option.name in _OURS:
            continue
        option = _at_run_time(option, running)
        option = character_devices.with_listener(option, running.listeners, result.descriptor)
        if taps.is_tap(option):
            option = _with_tap(option, next(doubles), result)
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
        result.arguments.extend(_appending(option, _serial_number(written, index)))
    for item in running.fd_sets:
        result.arguments += _fd_set(item, result)
    if character_devices.uses_standard_streams(written):
        result.descriptors += [Descriptor(number, of_old=number) for number in (0, 1)]
    # Pinned: q35 means something newer in a newer binary.
    result.arguments = _with_machine_type(result.arguments, running.machine_type)
    result.arguments += [Option("-S"), Option("-incoming", "defer")]
    if cpr_socket:
        channel = {"channel-type": "cpr", "addr": {"transport": "socket", "type": "unix", "path": cpr_socket}}
        result.arguments.append(Option("-incoming", json.dumps(channel, separators=(",", ":"))))
    return result


def make_in_place(options: t.Sequence[Option], running: Running, *, state: str) -> NewCommandLine:
    """The command line of a QEMU that its process becomes, or that is started when that has ended.

    Every path, port and interface is free again by then, so all have their stable names.

    :param state: where the guest's state lies; empty for a QEMU that waits to be told.
    :raises CprError: ``unsupported-option`` for what can't be carried over safely.
    """
    refuse_unsupported(options)
    if running.fd_sets:
        raise _unsupported("-add-fd", _ONLY_THERE)
    updated = generation_of(options) > 0
    interfaces = iter(running.taps)
    result = NewCommandLine([], 0)
    written = _written(options, running, result)
    for index, option in enumerate(written):
        if option.name in _OURS:
            continue
        option = character_devices.with_address(_at_run_time(option, running), running.listeners)
        if taps.is_tap(option):
            option = taps.with_interface(option, next(interfaces))
        path = _bound_path(option)
        if path:
            option = _with_bound_path(option, stable_path(path) if updated else path)
        elif option.name == "chardev" and read_properties(option).is_on("server"):
            option = Option(option.flag, str(character_devices.without_wait(read_properties(option))))
        result.arguments.extend(_appending(option, _serial_number(written, index)))
    result.arguments = _with_machine_type(result.arguments, running.machine_type)
    result.arguments += (
        [Option("-incoming", f"file:{state}")] if state else [Option("-S"), Option("-incoming", "defer")]
    )
    return result


def _written(options: t.Sequence[Option], running: Running, result: NewCommandLine) -> list[Option]:
    """The options written out, without the ports that it gets only when it runs the guest."""
    written = character_devices.write_out(options)
    written, result.display = vnc.without_port(written, running.displays)
    written, result.forwards = user_network.without_ports(written, running.user_networks)
    return written


def _at_run_time(option: Option, running: Running) -> Option:
    """An option by what the running QEMU has made of it, and as every QEMU takes it."""
    if option.name == "runas":  # QEMU 11.1 has this form only
        option = Option("-run-with", f"user={option.value}")
    if running.generation_id and option.name == "device" and _driver(option) == "vmgenid":
        # guid=auto would be another one, and tell the guest that it is a copy of itself.
        option = with_property(option, "guid", running.generation_id)
    return option


def _driver(option: Option) -> str | None:
    given = read_properties(option)
    return given.implied or given.get("driver")


def _with_tap(option: Option, tap: taps.Tap, result: NewCommandLine) -> Option:
    queues = range(tap.queues)
    numbers = [result.descriptor(tap=tap.temporary) for dummy in queues]
    vhost = [result.descriptor(path="/dev/vhost-net") for dummy in queues] if taps.has_vhost_descriptors(option) else []
    return taps.with_descriptors(option, numbers, vhost)


def _fd_set(fd_set: t.Mapping[str, t.Any], result: NewCommandLine) -> list[Option]:
    """The options that give the new QEMU the same set of descriptors."""
    found = []
    for item in fd_set["fds"]:
        pairs: list[tuple[str | None, str]] = [
            ("fd", str(result.descriptor(item["fd"], opened_anew=True))),
            ("set", str(fd_set["fdset-id"])),
        ]
        if item.get("opaque"):
            pairs.append(("opaque", item["opaque"]))
        found.append(Option("-add-fd", str(Properties(pairs))))
    return found


def changes_user(options: t.Iterable[Option]) -> bool:
    """Whether a QEMU with these options starts as root and becomes another user by itself."""
    return any(
        option.name == "runas" or option.name == "run-with" and read_properties(option).get("user") is not None
        for option in options
    )


def refuse_unsupported(options: t.Sequence[Option]) -> None:
    """Refuse a command line that can't be carried over safely.

    :raises CprError: ``unsupported-option`` with the option and the reason.
    """
    for option in options:
        reason = _refusal(option, read_properties(option) if option.value else Properties([]))
        if reason:
            raise _unsupported(option.flag, reason)


def _unsupported(flag: str, reason: str) -> CprError:
    return CprError(
        "unsupported-option",
        f"The guest's command line has the option {flag}, and {reason}.",
        "Start the guest without it when it next starts, or leave this guest out of live_update_guests.",
    )


def _refusal(option: Option, properties: Properties) -> str | None:
    """Why an option can't be carried over, or None if it can."""
    kind = properties.implied or properties.get("driver") or properties.get("type") or properties.get("backend") or ""
    keys = {(key or "").rpartition(".")[2] for key, dummy in properties.pairs}
    reason = _REFUSED.get(option.name)
    if option.name == "run-with" and keys.intersection(_REFUSED_RUN_WITH):
        reason = "it ties the process to the root or the parent that the running one started with"
    elif option.name in ("netdev", "nic", "net", "chardev", "object", "device") and keys & {"fd", "fds"}:
        is_listener = option.name == "chardev" and kind == "socket" and properties.is_on("server")
        reason = None if taps.is_tap(option) or is_listener else _ONLY_THERE
    elif option.name == "device" and "failover_pair_id" in keys:
        reason = "whether that device is there depends on the guest's driver (virtio-net failover)"
    elif option.name == "drive" and properties.is_on("snapshot"):
        reason = _REFUSED["snapshot"]
    elif _is_socket_not_carried(option, properties):
        reason = "this form of a UNIX socket is not carried over"
    elif option.name == "drive" and "/dev/fdset/" in (option.value or "") and properties.get("auto-read-only") != "off":
        # Seen with 10.0 and 11.1: neither QEMU gets the image's lock back then, and the guest is down.
        reason = "a -drive with a file descriptor can't be locked again; one with auto-read-only=off can"
    elif option.name == "trace" and "file" in keys:
        reason = _REFUSED["D"]
    elif option.name in ("device", "object") and _refused_device(kind):
        reason = _refused_device(kind)
    elif _refused_chardev(option, kind):
        reason = _refused_chardev(option, kind)
    elif "vhost-user" in kind:
        reason = "its backend serves one QEMU at a time"
    elif option.name == "spice" and keys & {"port", "tls-port"}:
        reason = "its port can't be handed over"
    elif option.name in ("netdev", "net", "nic") and (
        keys & {"listen", "localaddr"}
        or properties.is_on("server")
        or kind == "l2tpv3"
        or any((key or "").startswith("local.") for key, dummy in properties.pairs)
    ):
        reason = "its port can't be handed over"
    elif kind == "udp" and keys & {"localport", "localaddr"} or re.match(r"(mon:)?udp:.*@", option.value or ""):
        reason = "its port can't be handed over"
    return reason


def _refused_device(kind: str) -> str | None:
    return next((why for name, why in _REFUSED_DEVICES.items() if kind == name or kind.startswith(f"{name}-")), None)


def _refused_chardev(option: Option, kind: str) -> str | None:
    """Why a character device can't be handed over, or None."""
    if option.name == "chardev":
        return _REFUSED_CHARDEVS.get(kind)
    value = (option.value or "").split(",")[0]
    value = value[len("mon:") :] if value.startswith("mon:") else value
    if option.name not in character_devices.SHORT_FORMS:
        return None
    return _BOTH_READ if value.startswith("/dev/") else _REFUSED_CHARDEVS.get(value.split(":")[0])


def _is_socket_not_carried(option: Option, properties: Properties) -> bool:
    """Whether both QEMUs would bind one path, and the old one's exit remove it."""
    return option.name == "spice" and properties.is_on("unix")


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
        if properties.implied == "socket" and properties.is_on("server") and not properties.is_on("abstract"):
            return properties.get("path")
    return None


def bound_paths(options: t.Sequence[Option]) -> list[str]:
    """The paths that these options make QEMU bind or create, and remove."""
    return [path for path in map(_bound_path, options) if path]


def _with_bound_path(option: Option, path: str) -> Option:
    if option.name == "pidfile":
        return Option(option.flag, path)
    if option.name == "chardev":
        return Option(
            option.flag, str(character_devices.without_wait(read_properties(option).with_value("path", path)))
        )
    properties = Properties.read((option.value or "")[len("unix:") :])
    if properties.implied is None:
        properties = properties.with_value("path", path)
    else:
        properties = Properties([(None, path), *properties.pairs[1:]])
    # VNC waits for nobody and has no such key.
    return Option(
        option.flag, f"unix:{properties if option.name == 'vnc' else character_devices.without_wait(properties)}"
    )


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
