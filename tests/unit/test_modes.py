# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Which mode a guest takes."""

from __future__ import annotations

import pytest

from ansible_collections.vmfleet.cpr.plugins.module_utils import modes
from ansible_collections.vmfleet.cpr.plugins.module_utils.errors import CprError


def choose(wish="auto", adopt=True, memory_in_place=False, **blocked):
    """The mode, or the codes of what is in the way."""
    blockers = {mode: [CprError(code, "Why.") for code in blocked.get(mode[-6:], ())] for mode in modes.MODES}
    choice = modes.choose(wish, blockers, adopt=adopt, memory_in_place=memory_in_place)
    return [item.code for item in choice] if isinstance(choice, list) else choice.mode


PRIVATE = {"ansfer": ["memory-not-shared"]}
OLDER = {"ansfer": ["older-qemu"], "r-exec": ["older-qemu"]}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "cpr-transfer"),
        ({**PRIVATE}, "precopy"),
        ({**PRIVATE, "adopt": False}, ["memory-not-shared"]),
        ({**PRIVATE, "recopy": ["memory-short"]}, ["memory-short"]),
        ({**PRIVATE, "recopy": ["memory-short"], "adopt": False}, ["memory-not-shared"]),
        ({"ansfer": ["systemd-unit", "x"], "recopy": ["systemd-unit"]}, ["systemd-unit"]),
        ({**OLDER}, "precopy"),
        ({**OLDER, "memory_in_place": True}, "cpr-reboot"),
        ({**OLDER, "memory_in_place": True, "reboot": ["mode-missing"]}, "precopy"),
        ({"ansfer": ["systemd-unit"], "recopy": ["systemd-unit"], "reboot": ["systemd-unit"]}, ["systemd-unit"]),
        ({"wish": "cpr-exec"}, "cpr-exec"),
        ({"wish": "precopy"}, "precopy"),
        ({"wish": "cpr-reboot", "reboot": ["disk-short"]}, ["disk-short"]),
    ],
)
def test_auto_takes_the_gentlest_mode_that_can_be_had(options, expected):
    assert choose(**options) == expected


def test_auto_never_takes_a_mode_that_could_lose_the_guest():
    found = choose(ansfer=["systemd-unit"], recopy=["systemd-unit"], reboot=["systemd-unit"])
    assert found == ["systemd-unit"]  # though cpr-exec would do


def test_the_reason_says_why_it_is_not_the_better_one():
    blockers = {mode: [] for mode in modes.MODES}
    blockers["cpr-transfer"] = [CprError("memory-not-shared", "Why.")]
    choice = modes.choose("auto", blockers, adopt=True, memory_in_place=False)
    assert "memory-not-shared" in choice.reason and "copied" in choice.reason
