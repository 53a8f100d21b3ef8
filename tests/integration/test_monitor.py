# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The QMP connection itself."""

from __future__ import annotations

import asyncio
import os
import signal

from ansible_collections.vmfleet.cpr.plugins.module_utils.monitor import Monitor
from tests.guests.guest import NEW_SUITE, Qmp

# Without a second try about one connection in a hundred fails here.
_CONNECTIONS = 1000


def test_what_another_client_was_still_owed_is_not_taken_for_an_answer(start):
    guest = start("web1", suite=NEW_SUITE)
    pid = guest.pid()

    def leave_during_a_command():
        """A client that goes away while QEMU, which stands still, has its command before it."""
        with Qmp(guest.monitor) as client:
            client.execute("stop")
            os.kill(pid, signal.SIGSTOP)
            client.send("cont")

    async def connect():
        for dummy in range(_CONNECTIONS):
            leave_during_a_command()
            connecting = asyncio.ensure_future(Monitor.connect(str(guest.monitor), pid=pid))
            await asyncio.sleep(0)
            os.kill(pid, signal.SIGCONT)
            async with await connecting as monitor:
                assert "status" in await monitor.execute("query-status")

    try:
        asyncio.run(connect())
    finally:
        os.kill(pid, signal.SIGCONT)
