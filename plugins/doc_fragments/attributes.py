# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the attributes of every module mean."""

from __future__ import annotations


class ModuleDocFragment:
    """Attributes."""

    DOCUMENTATION = r"""
attributes:
  check_mode:
    description: Can run in check mode and says what it would do without changing anything.
  diff_mode:
    description: Returns what would change, or has changed, in diff mode.
  idempotent:
    description: A second run with the same arguments changes nothing.
"""
