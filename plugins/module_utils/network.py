# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The host's side of a guest's network, by iproute2, in the network namespace of its QEMU.

Private to the collection.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
import typing as t

from ansible_collections.vmfleet.cpr.plugins.module_utils import commands, descriptors, namespaces, process, taps
from ansible_collections.vmfleet.cpr.plugins.module_utils.errors import CprError

_POLL = 0.1


def open_taps(pid: int) -> dict[int, str]:
    """The names of the tap interfaces that a process has open, by its descriptors."""
    found = {}
    for number, target in process.descriptors(pid).items():
        if target == "/dev/net/tun":
            # The kernel tells the present name, also of one that was renamed (drivers/net/tun.c).
            for line in process.read_file(pid, f"fdinfo/{number}").splitlines():
                if line.startswith("iff:"):
                    found[number] = line.partition(":")[2].strip()
    return found


async def inspect(pid: int, name: str) -> tuple[dict[str, t.Any], taps.Settings]:
    """An interface: what ``ip`` says of it, and what a double must have alike.

    :raises CprError: as `taps.read_settings`, or ``command-failed``.
    """
    link = (await _json(pid, "ip", "-json", "-details", "link", "show", "dev", name))[0]
    return link, taps.read_settings(
        link,
        await _json(pid, "bridge", "-json", "-details", "link", "show", "dev", name),
        await _json(pid, "bridge", "-json", "vlan", "show", "dev", name),
        await run(pid, "tc", "qdisc", "show", "dev", name),
    )


async def make_alike(pid: int, tap: taps.Tap, *, timeout: float) -> None:
    """Set a tap's double up like the tap, and wait until the bridge forwards to it.

    :param pid: the process in whose network namespace they are.
    :param timeout: seconds until the bridge must forward.
    :raises CprError: ``tap-differs`` with what could not be made alike, ``tap-not-forwarding``.
    """
    dummy, wanted = await inspect(pid, tap.name)
    await set_up(pid, tap.temporary, wanted)
    await _wait_until_forwarding(pid, tap, timeout)


async def set_up(pid: int, name: str, wanted: taps.Settings) -> None:
    """Give a tap that was just made the settings of another one.

    :param pid: a process in its network namespace.
    :raises CprError: ``tap-differs`` with what could not be made alike.
    """
    for command in taps.create_commands(wanted, name):
        await run(pid, *command)
    dummy, present = await inspect(pid, name)
    for command in taps.adapt_commands(wanted, present, name):
        await run(pid, *command)
    dummy, present = await inspect(pid, name)
    differences = taps.differences(wanted, present)
    if differences:
        raise CprError(
            "tap-differs",
            f"The tap {name} could not be made like the guest's: {'; '.join(differences)}.",
            "Leave this guest out, and report this.",
        )


async def _wait_until_forwarding(pid: int, tap: taps.Tap, timeout: float) -> None:
    """With the spanning tree protocol on, a bridge listens and learns first."""
    deadline = time.monotonic() + timeout
    while await _port_state(pid, tap.temporary) != await _port_state(pid, tap.name):
        if time.monotonic() > deadline:
            raise CprError(
                "tap-not-forwarding",
                f"The bridge did not forward to a second tap like {tap.name} within {timeout:g} s.",
                "A spanning tree bridge takes twice its forward delay: give it more time (live_update_timeout).",
            )
        await asyncio.sleep(_POLL)


async def _port_state(pid: int, name: str) -> str | None:
    ports = await _json(pid, "bridge", "-json", "link", "show", "dev", name)
    return ports[0].get("state") if ports else None


async def addresses(pid: int, name: str) -> list[dict[str, t.Any]]:
    """The MAC addresses that the bridge has for an interface.

    :raises CprError: ``command-failed``.
    """
    return await _json(pid, "bridge", "-json", "fdb", "show", "dev", name)


async def take_addresses(pid: int, doubles: t.Iterable[taps.Tap]) -> list[str]:
    """Bind the MAC addresses that were bound to the taps to their doubles: the bridge does not learn those.

    :param pid: the new QEMU.
    :returns: what did not work, as sentences.
    """
    problems = []
    for tap in doubles:
        for address, vlan in tap.addresses:
            words = ["vlan", str(vlan)] if vlan is not None else []
            name = tap.temporary
            try:
                if name not in open_taps(pid).values():
                    name = tap.name  # renamed already, by a run that died
                await run(pid, "bridge", "fdb", "replace", address, "dev", name, "master", "static", *words)
            except (CprError, OSError) as error:
                problems.append(f"Its address {address} could not be bound to {name} in the bridge: {error}")
    return problems


async def take_names(pid: int, doubles: t.Iterable[taps.Tap]) -> list[str]:
    """Give the doubles the names of the taps that they replace, which are nobody's any more.

    :param pid: the new QEMU, the old one is gone.
    :returns: what did not work, as sentences: the guest's network works all the same.
    """
    problems = []
    try:
        numbers = {name: number for number, name in open_taps(pid).items()}
    except OSError:
        return []  # it is gone, which others will say
    for tap in doubles:
        if tap.temporary not in numbers:
            continue  # renamed already, by a run that died
        try:
            if tap.persistent:
                descriptors.make_persistent(tap, pid, numbers[tap.temporary])
                with contextlib.suppress(CprError):  # gone already
                    await run(pid, "ip", "link", "delete", "dev", tap.name)
            await run(pid, "ip", "link", "set", "dev", tap.temporary, "name", tap.name)
        except (CprError, OSError) as error:
            # Before Linux 6.2 an interface must be down for it, and that would cost packets.
            problems.append(f"Its network interface {tap.name} is now called {tap.temporary}: {error}")
    return problems


async def _json(pid: int, *words: str) -> t.Any:
    return json.loads(await run(pid, *words) or "[]")


async def run(pid: int, *words: str) -> str:
    """Run a command in a process's network namespace; what it prints.

    :raises CprError: ``command-failed``.
    """
    if not namespaces.shares(pid, "net"):
        words = ("nsenter", f"--net={process.PROC}/{pid}/ns/net", "--", *words)
    return await commands.run(*words)
