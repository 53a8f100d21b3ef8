# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Keeps a task's own work still while one of its guests stands still.

Private to the collection.
"""

from __future__ import annotations

import asyncio
import contextlib
import typing as t


class Quiet:
    """Either work goes on, for any number of guests, or switches do.

    Connecting, retiring an old QEMU and writing its record cost processor time, and beside a
    switch they would lengthen its pause: with four guests on two cores by half. A switch that
    waits goes before new work. To be made inside the event loop.

    :param switches: how many switches may go on at a time.
    """

    def __init__(self, switches: int) -> None:
        self._changed = asyncio.Condition()
        self._limit = switches
        self._working = 0
        self._switching = 0
        self._waiting = 0

    @contextlib.asynccontextmanager
    async def work(self) -> t.AsyncIterator[None]:
        """While no guest is switched or waits for it."""
        async with self._changed:
            await self._changed.wait_for(lambda: not self._switching and not self._waiting)
            self._working += 1
        try:
            yield
        finally:
            async with self._changed:
                self._working -= 1
                self._changed.notify_all()

    @contextlib.asynccontextmanager
    async def switch(self) -> t.AsyncIterator[None]:
        """While nobody works."""
        async with self._changed:
            self._waiting += 1
            try:
                await self._changed.wait_for(lambda: not self._working and self._switching < self._limit)
                self._switching += 1
            finally:
                self._waiting -= 1
        try:
            yield
        finally:
            async with self._changed:
                self._switching -= 1
                self._changed.notify_all()
