# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The decisions of a rolling update as filters. Each is documented in the file of its name."""

from __future__ import annotations

import typing as t

from ansible_collections.vmfleet.cpr.plugins.plugin_utils import fleet


class FilterModule:
    """The filters of this collection."""

    def filters(self) -> dict[str, t.Callable[..., t.Any]]:
        """Each by its name."""
        return {
            "fleet_deadline": fleet.deadline,
            "fleet_gate": fleet.gate,
            "fleet_lost": fleet.lost,
            "fleet_outcomes": fleet.outcomes,
            "fleet_plan": fleet.plan,
            "fleet_report": fleet.report,
            "fleet_rounds": fleet.rounds,
            "fleet_status": fleet.status,
            "fleet_summary": fleet.summary,
            "fleet_without": fleet.without,
        }
