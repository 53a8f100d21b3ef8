# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What is found out before the guest stops, by asking both QEMUs."""

from __future__ import annotations

from tests.guests.guest import NEW_SUITE, OLD_SUITE, qemu

# Bytes. A QEMU's devices stand still while it writes an answer: its schema has 230 kB and
# costs them 60 ms, ``info qtree`` of a small guest has 15 kB and costs them 1 ms.
_LONG = 64 * 1024


def test_no_answer_of_the_running_guest_is_so_long_that_it_would_notice(start, host):
    """By what its QEMU writes to its monitor, which it can log."""
    monitor = ["-chardev", "socket,id=m,path={dir}/qmp.sock,server=on,wait=off,logfile={dir}/qmp.log,logappend=on"]
    guest = start("web1", monitor=[*monitor, "-mon", "chardev=m,mode=control"])
    host.until("setup", guest)
    answers = (guest.directory / "qmp.log").read_text().splitlines()
    assert any('"blocked' in answer or '"mode"' in answer for answer in answers), "nothing was logged"
    assert max(map(len, answers)) < _LONG


def test_a_mode_that_was_tried_is_put_back(start, host):
    guest = start("web1", suite=OLD_SUITE)
    with guest.qmp() as monitor:
        monitor.execute("migrate-set-parameters", mode="cpr-reboot")
    (outcome,) = host.launch(guest, check_mode=True, qemu_binary=qemu(NEW_SUITE))
    assert not outcome.error
    with guest.qmp() as monitor:
        assert monitor.execute("query-migrate-parameters")["mode"] == "cpr-reboot"
