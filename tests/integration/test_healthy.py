# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""No false alarms: guests with nothing wrong pass without a word, and really go."""

from __future__ import annotations

import pytest

from tests.guests import healthy
from tests.guests.guest import NEW_SUITE, OLD_SUITE, qemu


@pytest.mark.parametrize("name", healthy.COMMAND_LINES)
def test_a_healthy_guest_passes_without_a_warning_and_goes(start, host, tmp_path, rebuilt_qemu, name):
    suite, options = healthy.COMMAND_LINES[name]
    binary = qemu(NEW_SUITE) if suite == OLD_SUITE else rebuilt_qemu
    healthy.prepare(tmp_path / "healthy")
    guest = start("healthy", suite=suite, **options)
    (outcome,) = host.preflight(guest, qemu_binary=binary, rehearse=True)
    assert not outcome.error and outcome.extra["modes"]["cpr-transfer"] == {"verdict": "ready", "reasons": []}
    assert len(guest.pids()) == 1 and guest.status() == "running"
    host.until("resume", guest, qemu_binary=binary)
    guest.wait_for_ticks()
    guest.check_continuity()
