# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Where a guest may go on whose switch was cut off."""

from __future__ import annotations

import itertools

import pytest

from ansible_collections.vmfleet.cpr.plugins.module_utils.verdict import Verdict, decide

OLD = ("running", "paused", "finish-migrate", "postmigrate", "gone", "silent")
NEW = ("inmigrate", "paused", "running", "io-error", "gone", "silent")


@pytest.mark.parametrize(
    ("old", "new", "may_have_run", "verdict"),
    [
        # Cut off before the end of the stream: the old QEMU has the guest.
        ("running", "inmigrate", False, Verdict.BACK),
        ("finish-migrate", "inmigrate", False, Verdict.BACK),
        ("postmigrate", "inmigrate", False, Verdict.BACK),
        ("postmigrate", "gone", False, Verdict.BACK),
        ("finish-migrate", "paused", False, Verdict.BACK),
        # Both have all of it and neither runs it.
        ("postmigrate", "paused", False, Verdict.EITHER),
        # Only the new one has it.
        ("gone", "paused", False, Verdict.FORWARD),
        ("postmigrate", "running", False, Verdict.FORWARD),
        ("postmigrate", "io-error", True, Verdict.FORWARD),
        ("postmigrate", "paused", True, Verdict.FORWARD),
        # It may have run on a new QEMU that can't be asked.
        ("postmigrate", "gone", True, Verdict.UNCLEAR),
        ("postmigrate", "silent", True, Verdict.UNCLEAR),
        ("silent", "gone", True, Verdict.UNCLEAR),
        ("gone", "silent", False, Verdict.UNCLEAR),
    ],
)
def test_verdict(old, new, may_have_run, verdict):
    assert decide(old, new, may_have_run) == verdict


def test_a_guest_that_may_have_run_on_the_new_qemu_is_never_taken_back_from_a_postmigrate():
    for new in NEW:
        assert decide("postmigrate", new, True) in (Verdict.FORWARD, Verdict.UNCLEAR)


def test_nothing_goes_forward_while_the_old_qemu_may_still_run_the_guest():
    for old, told in itertools.product(("running", "finish-migrate"), (False, True)):
        for new in ("inmigrate", "gone", "silent"):
            assert decide(old, new, told) in (Verdict.BACK, Verdict.UNCLEAR)


def test_every_case_has_a_verdict():
    for old, new, told in itertools.product(OLD, NEW, (False, True)):
        assert isinstance(decide(old, new, told), Verdict)
