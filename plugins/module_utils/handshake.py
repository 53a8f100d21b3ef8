# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What both QEMUs of an update agree on: QEMU's two ends do not ask each other.

Pure functions. Private to the collection.
"""

from __future__ import annotations

import typing as t

from ansible_collections.vmfleet.cpr.plugins.module_utils.errors import CprError
from ansible_collections.vmfleet.cpr.plugins.module_utils.offer import Offer

MODE = "cpr-transfer"

# "events" lets both ends say at once where the migration is. "return-path" lets the old QEMU
# learn that the new one could not load the state, and resume the guest by itself; without it
# the old one reports "completed" (seen with 10.0 to 11.1).
REQUIRED_CAPABILITIES = ("events", "return-path")

# No bandwidth limit that somebody set for ordinary migrations shall stretch this one.
PARAMETERS: dict[str, t.Any] = {"max-bandwidth": 0}


def agree_capabilities(old: Offer, new: Offer) -> dict[str, bool]:
    """Every capability that both ends have, and whether it is on.

    All but the required ones are off, whatever was on before: one that is on at one end only
    makes the new QEMU wait for ever while the old one says ``completed`` (seen with multifd).

    :raises CprError: ``capability-missing`` if an end lacks a required one.
    """
    for whose, offer in (("running", old), ("new", new)):
        missing = [name for name in REQUIRED_CAPABILITIES if name not in offer.capabilities]
        if missing:
            raise CprError(
                "capability-missing",
                f"The {whose} QEMU ({offer.version_text}) lacks the migration capability {', '.join(missing)}.",
                "Choose another QEMU binary; every one since 2.12 has it.",
            )
    return {name: name in REQUIRED_CAPABILITIES for name in sorted(old.capabilities & new.capabilities)}


def capabilities_to_set(
    current: t.Iterable[t.Mapping[str, t.Any]], agreed: t.Mapping[str, bool]
) -> list[dict[str, t.Any]]:
    """What ``migrate-set-capabilities`` must be told.

    A capability that the other end does not know is off too.

    :param current: what ``query-migrate-capabilities`` returned.
    """
    return [
        {"capability": item["capability"], "state": agreed.get(item["capability"], False)}
        for item in current
        if item["state"] != agreed.get(item["capability"], False)
    ]


def capabilities_to_restore(
    current: t.Iterable[t.Mapping[str, t.Any]], changes: t.Iterable[t.Mapping[str, t.Any]]
) -> list[dict[str, t.Any]]:
    """The present state of the capabilities that are about to change."""
    changing = {item["capability"] for item in changes}
    return [dict(item) for item in current if item["capability"] in changing]
