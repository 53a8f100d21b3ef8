# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Guests that go to another QEMU by other ways than cpr-transfer, and back."""

from __future__ import annotations

import pytest

from tests.guests.guest import NEW_SUITE, OLD_SUITE, qemu

OLDEST_SUITE = "bookworm"  # QEMU 7.2


def test_a_guest_of_72_with_plain_memory_is_adopted_and_then_goes_by_cpr_transfer(start, host, rebuilt_qemu):
    guest = start("adopted", suite=OLDEST_SUITE, memory=None)
    first = host.until("resume", guest)
    print(first.message)
    assert first.update.mode == "precopy"
    guest.wait_for_ticks()
    second = host.until("resume", guest, qemu_binary=rebuilt_qemu)
    print(second.message)
    assert second.update.mode == "cpr-transfer"
    assert second.update.copied == {}
    guest.wait_for_ticks()
    guest.check_continuity()
    assert guest.version() == "11.1.3"
    guest.pid()
