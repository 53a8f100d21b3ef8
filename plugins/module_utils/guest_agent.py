# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Whether the agent in a guest answers: the only heartbeat that comes from inside.

Private to the collection.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import re
import typing as t

from ansible_collections.vmfleet.cpr.plugins.module_utils.device_tree import Device

# The name by which qemu-ga finds its port (QEMU's docs/interop/qemu-ga.rst).
_PORT = '"org.qemu.guest_agent.0"'
# Of ``query-chardev``: a socket that QEMU listens at, and that nobody else uses now.
_FREE = re.compile(r"disconnected:unix:(?P<path>[^@,][^,]*),server=on")


def socket_of(devices: t.Iterable[Device], chardevs: t.Iterable[t.Mapping[str, t.Any]], directory: str) -> str | None:
    """Where the agent of a guest can be spoken to; None where it has none, or another client does.

    :param chardevs: what ``query-chardev`` returned; its ``frontend-open`` says whether a
        program in the guest has opened the port.
    :param directory: the QEMU's working directory.
    """
    names = {
        device.properties.get("chardev", "").strip('"')
        for device in devices
        if device.type == "virtserialport" and device.properties.get("name") == _PORT
    }
    for item in chardevs:
        free = _FREE.fullmatch(item["filename"])
        if item["label"] in names and item["frontend-open"] and free:
            return os.path.join(directory, free["path"])
    return None


async def answers(path: str, timeout: float) -> bool:
    """Whether the agent behind this socket answers ``guest-sync``, which does nothing in the guest.

    :param timeout: seconds.
    """
    try:
        return await asyncio.wait_for(_sync(path), timeout)
    except (OSError, asyncio.TimeoutError, ValueError, RecursionError):  # a guest may say anything
        return False


async def _sync(path: str) -> bool:
    reader, writer = await asyncio.open_unix_connection(path)
    try:
        number = random.getrandbits(31)
        request = {"execute": "guest-sync", "arguments": {"id": number}}
        writer.write(json.dumps(request).encode() + b"\n")
        while True:
            line = await reader.readline()
            if not line:
                return False
            with contextlib.suppress(ValueError):  # what another client was still owed
                if json.loads(line) == {"return": number}:
                    return True
    finally:
        writer.close()
