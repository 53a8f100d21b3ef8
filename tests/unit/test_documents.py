# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The documents keep their promises."""

from __future__ import annotations

import pathlib
import re

import pytest

from ansible_collections.vmfleet.cpr.plugins.module_utils.phases import view

TOP = pathlib.Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", ["guests.md", "handshake.md"])
def test_every_row_has_a_test_that_is_there(name):
    page = (TOP / "docs" / name).read_text(encoding="utf-8")
    tests = set()
    for path in (TOP / "tests").glob("*/test_*.py"):
        tests |= set(re.findall(r"def (test_\w+)", path.read_text(encoding="utf-8")))
    named = set(re.findall(r"`(test_\w+)`", page))
    assert named - tests == set()
    for table in re.findall(r"\|[^\n]*\| test \|\n\|[-|]+\n((?:\|.*\n)+)", page):
        for row in table.splitlines():
            assert re.search(r"`test_\w+` \|$", row), row


def test_every_error_code_is_explained():
    page = (TOP / "docs" / "errors.md").read_text(encoding="utf-8")
    for path in (TOP / "plugins").glob("**/*.py"):
        for code in re.findall(r'CprError\(\s*"([a-z-]+)"', path.read_text(encoding="utf-8")):
            assert f"`{code}`" in page, f"{code} ({path.name})"
    module = (TOP / "plugins" / "modules" / "migration_setup.py").read_text(encoding="utf-8")
    assert re.findall(r"^      - (\w+-differs?)$", module, re.MULTILINE) == list(view.HINTS)
    assert [code for code in view.HINTS if f"`{code}`" not in page] == []
