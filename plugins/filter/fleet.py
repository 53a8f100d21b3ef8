# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The decisions of a rolling update as filters. Each is documented in the file of its name."""

from __future__ import annotations

import typing as t

from ansible_collections.vmfleet.cpr.plugins.plugin_utils import fleet_gate, fleet_plan, fleet_settings, fleet_tables


class FilterModule:
    """The filters of this collection."""

    def filters(self) -> dict[str, t.Callable[..., t.Any]]:
        """Each by its name."""
        return {
            "fleet_deadline": fleet_settings.deadline,
            "fleet_gate": fleet_gate.gate,
            "fleet_lost": fleet_gate.lost,
            "fleet_outcomes": fleet_gate.outcomes,
            "fleet_plan": fleet_plan.plan,
            "fleet_report": fleet_tables.report,
            "fleet_rounds": fleet_plan.rounds,
            "fleet_status": fleet_tables.status,
            "fleet_summary": fleet_tables.summary,
            "fleet_without": fleet_plan.without,
        }
