# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""How the switch waits, on stand-ins for both QEMUs whose events come at chosen instants.

What QEMU itself does is in tests/integration/test_switch.py.
"""

from __future__ import annotations

import asyncio
import itertools
import time
import types

import pytest

from ansible_collections.vmfleet.cpr.plugins.module_utils import journal
from ansible_collections.vmfleet.cpr.plugins.module_utils.phases import switch

STOP = {"event": "STOP"}
COMPLETED = {"event": "MIGRATION", "data": {"status": "completed"}}
PAUSE_LIMIT = 1.0


class StandIn:
    """A monitor that tells these events, each so many turns of the event loop after the one before."""

    def __init__(self, *events):
        self._events = list(events)

    async def next_event(self, dummy):
        turns, event = self._events.pop(0)
        for dummy in range(turns):
            await asyncio.sleep(0)
        return event


def until_completed(old, new):
    """Wait for two such QEMUs; how long that took in seconds."""

    async def waiting():
        living = types.SimpleNamespace(ended=asyncio.Event())
        ends = switch.Ends(old, new, living, living)
        started = time.monotonic()
        update = journal.Update("web1", "/nowhere")
        takeover = switch._Takeover(update, ends, None, None, switch.Limits(timeout=5.0, copy=5.0, pause=PAUSE_LIMIT))
        await takeover._until_completed("old", "new")
        return time.monotonic() - started

    return asyncio.run(waiting())


@pytest.mark.parametrize("turns", list(itertools.product(range(3), repeat=3)), ids=str)
def test_nothing_is_waited_for_once_both_ends_have_completed(turns):
    """However close together the events are: a guest stood still for the whole limit where they fell into one turn."""
    until_stop, until_old_is_through, until_new_is_through = turns
    old = StandIn((until_stop, STOP), (until_old_is_through, COMPLETED))
    new = StandIn((until_new_is_through, COMPLETED))
    assert until_completed(old, new) < PAUSE_LIMIT / 2


@pytest.mark.parametrize(("limit", "tries"), [(300, [10, 20, 40, 80, 160, 300, 300]), (5, [5, 5]), (10, [10, 10])])
def test_a_copy_aims_at_a_short_pause_first_and_never_beyond_the_limit(limit, tries):
    downtime = switch._Downtime(limit)
    assert [downtime.next()["downtime-limit"] for dummy in tries] == tries
