# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The systemd service that a guest's QEMU is the main process of, and its handover.

systemd follows a service's main process. It is told of another one over its notification
socket (sd_notify(3), ``MAINPID=``), while the old QEMU still is there: once that has gone, the
service ends, and what else is in its control group with it. Seen to work with systemd 252, 257
and 262 for simple, exec, notify and forking services.

Private to the collection.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import typing as t

from ansible_collections.vmfleet.cpr.plugins.module_utils import commands, process
from ansible_collections.vmfleet.cpr.plugins.module_utils.errors import CprError

_SOCKET = "/run/systemd/notify"
_DROP_IN_TEXT = """\
# Made by the Ansible collection vmfleet.cpr, which tells systemd when a live update gives this
# service another main process. Goes with the next reboot of the host; safe to remove.
[Service]
NotifyAccess=main
"""
# Of a service whose guest waits to be restored: whoever starts it, at boot or by hand, gets a QEMU that
# waits too, instead of a guest that boots from a disk to which another state of it belongs.
_HELD_TEXT = """\
# Made by the Ansible collection vmfleet.cpr: this guest's state was written to a file (guest_checkpoint)
# and waits to be restored (guest_restore), which removes this drop-in.
[Service]
ExecStart=
ExecStart={}
"""
_SCM_CREDENTIALS = 2  # asm-generic/socket.h; not in Python's socket
_CAP_SYS_ADMIN = 21  # linux/capability.h
# Seconds that systemd gets to work off what it was told.
_BARRIER_TIMEOUT = 10.0
_PROPERTIES = "Id LoadState ActiveState SubState Job MainPID KillMode NotifyAccess NeedDaemonReload WatchdogUSec FreezerState".split()


def unit_of(cgroup: str) -> str | None:
    """The service unit in whose control group, or below it, a process is; None without one.

    A service of a user's own manager is given with that manager before it.

    :param cgroup: its ``/proc/PID/cgroup``.
    """
    for line in cgroup.splitlines():
        if line.startswith("0::") or ":name=systemd:" in line:
            services = [name for name in line.split("/") if name.endswith(".service")]
            if services and not services[-1].startswith("user@"):
                return "/".join(services[-2:]) if services[0].startswith("user@") else services[-1]
    return None


async def service_of(pid: int) -> dict[str, str] | None:
    """The service that a process is the main process of, as `systemctl show` tells it; None without one.

    :raises CprError: ``systemd-unit`` for one that can't be handed over, with the reason.
    """
    cgroup = process.read_file(pid, "cgroup")
    name = unit_of(cgroup)
    if name is None or not os.path.isdir("/run/systemd/system"):
        return None
    if "/" in name:
        raise _refused(name, "it belongs to a user's own systemd, which can't watch a process that it did not start")
    unit = await _show(name)
    if unit["NeedDaemonReload"] == "yes" and _has_drop_in(unit["Id"]):
        # A run died, or failed, between our drop-in and the reload, which comes anyway.
        unit.update(NeedDaemonReload="no", NotifyAccess="none")
    ancestors = list(process.ancestors(pid))
    if follows_another(unit, pid, ancestors):
        return None  # being in the control group is all
    reason = refusal(unit, pid, cgroup)
    if reason is None and not _may_speak_for_others():
        reason = "the task has not the privileges for it (run it as root)"
    if reason:
        raise _refused(unit["Id"], reason)
    return unit


def follows_another(unit: t.Mapping[str, str], pid: int, ancestors: t.Container[int]) -> bool:
    """Whether a service neither ends with a process nor ends it, as cron's and those of sshd do.

    :param ancestors: the processes that it comes from.
    """
    main = int(unit["MainPID"] or 0)
    return main == 0 or main != pid and main not in ancestors and unit["KillMode"] in ("process", "none")


def refusal(unit: t.Mapping[str, str], pid: int, cgroup: str) -> str | None:
    """Why a service can't be handed over, or None if it can.

    :param unit: what `systemctl show` tells.
    :param pid: the QEMU.
    :param cgroup: its ``/proc/PID/cgroup``.
    """
    if unit["MainPID"] != str(pid):
        return f"its main process is not the QEMU but another one ({unit['MainPID']}), which may wait for it"
    if not any(line.startswith("0::/") and len(line) > len("0::/") for line in cgroup.splitlines()):
        return "the host uses version 1 of control groups"
    if unit["LoadState"] != "loaded" or unit["NeedDaemonReload"] == "yes":
        return "its unit file was changed or removed, and systemd was not told (systemctl daemon-reload)"
    if (unit["ActiveState"], unit["SubState"]) != ("active", "running") or unit["Job"] not in ("", "0"):
        return f"it is {unit['ActiveState']} ({unit['SubState']}) or about to change"
    if unit["WatchdogUSec"] not in ("0", "infinity", ""):
        return "it has a watchdog (WatchdogSec=), which QEMU does not serve"
    if unit.get("FreezerState", "running") != "running":
        return "it is frozen"
    return None


def needs_drop_in(unit: t.Mapping[str, str]) -> bool:
    """Whether systemd would not listen to the main process of the service as it is."""
    return unit["NotifyAccess"] == "none"


async def let_speak(names: t.Sequence[str]) -> None:
    """Let the main processes of these services speak to systemd, by a drop-in that is gone after a reboot.

    :raises CprError: ``systemd-unit`` where systemd does not take it.
    """
    for name in names:
        path = _drop_in(name)
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(path, "w", encoding="ascii") as stream:
                stream.write(_DROP_IN_TEXT)
        except OSError as error:
            raise _refused(name, f"{path} can't be written: {error.strerror}") from error
    await commands.run("systemctl", "daemon-reload", timeout=60)
    for name in names:
        unit = await _show(name)
        if needs_drop_in(unit) or unit["LoadState"] != "loaded":
            raise _refused(name, f"systemd did not take {_drop_in(name)}; does another drop-in say NotifyAccess=none?")


async def hold_back(name: str, binary: str, arguments: t.Iterable[str]) -> None:
    """Let a service start only this from now on, also after a reboot.

    :raises CprError: ``systemd-unit`` where the drop-in can't be written.
    """
    path = held(name)
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "w", encoding="utf-8", opener=lambda path, flags: os.open(path, flags, 0o600)) as stream:
            stream.write(_HELD_TEXT.format(" ".join(map(_quoted, (binary, *arguments)))))
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        raise _refused(name, f"{path} can't be written: {error.strerror}") from error
    await commands.run("systemctl", "daemon-reload", timeout=60)
    starts = await commands.run("systemctl", "show", "--property=ExecStart", "--", name)
    if starts.count("ExecStart=") != 1 or f"path={binary} " not in starts or "-incoming defer" not in starts:
        raise _refused(name, f"systemd does not start what {path} says; does another drop-in set ExecStart=?")


async def let_go(name: str) -> None:
    """Let a service start what its unit file says again.

    :raises CprError: ``command-failed``.
    """
    try:
        os.unlink(held(name))
    except FileNotFoundError:
        if (await _show(name))["NeedDaemonReload"] != "yes":  # else it was removed and systemd never heard of it
            return
    with contextlib.suppress(OSError):
        os.rmdir(os.path.dirname(held(name)))
    await commands.run("systemctl", "daemon-reload", timeout=60)


async def restart(name: str, timeout: float) -> int:
    """Start a service anew, so that it is what its unit file says now; its main process.

    :param timeout: seconds.
    :raises CprError: ``command-failed`` with what systemd said.
    """
    with contextlib.suppress(CprError):  # it may have failed too often at boot
        await commands.run("systemctl", "reset-failed", "--", name)
    await commands.run("systemctl", "restart", "--", name, timeout=timeout)
    return int((await _show(name))["MainPID"])


async def is_stopping() -> bool:
    """Whether the host is on its way down: only a systemd says so."""
    if not os.path.isdir("/run/systemd/system"):
        return False
    with contextlib.suppress(CprError):  # it need not be what runs here
        return "SystemState=stopping" in await commands.run("systemctl", "show", "--property=SystemState")
    return False


def held(name: str) -> str:
    """The drop-in of `hold_back`; its name comes after those of others, whose ExecStart= would win else."""
    return os.path.join("/etc/systemd/system", f"{name}.d", "zzz-vmfleet-cpr-held.conf")


def _quoted(word: str) -> str:
    """A word of a command line in a unit file (systemd.service(5))."""
    for character, written in (("\\", "\\\\"), ('"', '\\"'), ("%", "%%"), ("$", "$$"), ("\n", "\\n")):
        word = word.replace(character, written)
    return f'"{word}"'


def _drop_in(name: str) -> str:
    return os.path.join("/run/systemd/system", f"{name}.d", "90-vmfleet-cpr.conf")


def _has_drop_in(name: str) -> bool:
    try:
        with open(_drop_in(name), encoding="utf-8") as stream:
            return stream.read() == _DROP_IN_TEXT
    except OSError:
        return False


async def hand_over(name: str, old: int, new: int) -> None:
    """Make another process the main process of a service, while both live.

    :raises CprError: ``unit-not-handed-over`` if systemd does not take it.
    """
    try:
        present = (await _show(name))["MainPID"]
        if present != str(new):
            _tell(f"MAINPID={new}", old)
            # systemd answers whether it took the process or not.
            present = (await _show(name))["MainPID"]
    except (OSError, CprError) as error:
        raise _not_handed_over(name, new, str(error)) from error
    if present != str(new):
        raise _not_handed_over(name, new, f"its main process still is {present}")


def _tell(message: str, sender: int) -> None:
    """Send systemd a message in the name of a process, and wait until it has been worked off.

    :raises OSError: not permitted, or systemd does not answer.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as connection:
        connection.connect(_SOCKET)
        credentials = struct.pack("iII", sender, 0, 0)
        connection.sendmsg([message.encode()], [(socket.SOL_SOCKET, _SCM_CREDENTIALS, credentials)])
        ours, theirs = os.pipe2(os.O_CLOEXEC)
        try:
            socket.send_fds(connection, [b"BARRIER=1"], [theirs])
        finally:
            os.close(theirs)
        waiting = select.poll()
        waiting.register(ours, 0)
        try:
            if not waiting.poll(_BARRIER_TIMEOUT * 1000):
                raise TimeoutError(f"systemd did not answer within {_BARRIER_TIMEOUT:g} s")
        finally:
            os.close(ours)


def _may_speak_for_others() -> bool:
    """Whether this process may send a message in another one's name (unix(7), SCM_CREDENTIALS)."""
    for line in process.read_file("self", "status").splitlines():
        if line.startswith("CapEff:"):
            return bool(int(line.split()[1], 16) >> _CAP_SYS_ADMIN & 1)
    return False


async def _show(name: str) -> dict[str, str]:
    text = await commands.run("systemctl", "show", f"--property={','.join(_PROPERTIES)}", "--", name)
    found = {key: value for key, dummy, value in (line.partition("=") for line in text.splitlines())}
    return {**dict.fromkeys(_PROPERTIES, ""), **found}


def _refused(name: str, why: str) -> CprError:
    return CprError(
        "systemd-unit",
        f"The guest belongs to the systemd unit {name}, which can't be handed over: {why}.",
        "Mend that, run the guest in a service of its own or in a scope, or leave it out of live_update_guests.",
    )


def _not_handed_over(name: str, new: int, why: str) -> CprError:
    return CprError(
        "unit-not-handed-over",
        f"The guest runs on the new QEMU (process {new}), but systemd did not take that for the main process of"
        f" {name}: {why}.",
        "The old QEMU was left stopped, so that systemd does not end the service. See `systemctl status`, and run"
        " again.",
    )
