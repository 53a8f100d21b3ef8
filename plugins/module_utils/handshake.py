# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What both QEMUs of an update agree on: QEMU's two ends do not ask each other.

Pure functions. Private to the collection.
"""

from __future__ import annotations

import typing as t
from dataclasses import dataclass, field

from ansible.module_utils.parsing.convert_bool import boolean

from ansible_collections.vmfleet.cpr.plugins.module_utils.errors import CprError
from ansible_collections.vmfleet.cpr.plugins.module_utils.modes import CPR_EXEC, CPR_REBOOT, CPR_TRANSFER
from ansible_collections.vmfleet.cpr.plugins.module_utils.offer import Offer

# Of what `record` returns.
PROTOCOL = 1

# "events" lets both ends say at once where the migration is. "return-path" lets the old QEMU
# learn that the new one could not load the state, and resume the guest by itself; without it
# the old one reports "completed" (seen with 10.0 to 11.1).
REQUIRED_CAPABILITIES = ("events", "return-path")
# A file has no way back; whether the new QEMU could load it is seen from that one alone.
_BY_FILE = (CPR_EXEC, CPR_REBOOT)
# Leaves out of the stream what both map from one file.
_IN_PLACE = "x-ignore-shared"

# No bandwidth limit that somebody set for ordinary migrations shall stretch this one.
PARAMETERS: dict[str, t.Any] = {"max-bandwidth": 0}


# What the user can't choose: the mode is the update itself.
_RESERVED_PARAMETERS = ("mode",)
# With these the guest would wait, stopped, for a command that nobody sends, or run on the wrong memory.
_IMPOSSIBLE_CAPABILITIES = ("background-snapshot", "pause-before-switchover", "postcopy-ram", "x-colo")


@dataclass(frozen=True)
class Wishes:
    """What a user wants of the migration beyond what it needs.

    :ivar when_missing: ``fail`` or ``drop``, for what an end lacks.
    """

    capabilities: t.Mapping[str, bool] = field(default_factory=dict)
    parameters: t.Mapping[str, t.Any] = field(default_factory=dict)
    when_missing: str = "fail"

    @classmethod
    def of(cls, parameters: t.Mapping[str, t.Any]) -> Wishes:
        """Those of a module's parameters.

        :raises CprError: ``bad-argument`` for a capability that is neither on nor off.
        """
        try:
            capabilities = {name: boolean(state) for name, state in parameters["capabilities"].items()}
        except TypeError as error:
            raise CprError("bad-argument", f"A capability is true or false: {error}") from error
        return cls(capabilities, parameters["parameters"], parameters["when_missing"])


@dataclass(frozen=True)
class Agreement:
    """What both ends are going to use.

    :ivar capabilities: every one that both have, and whether it is on.
    :ivar parameters: those that are set, with their values.
    :ivar dropped: wishes that an end can't fulfil, as sentences.
    """

    capabilities: dict[str, bool]
    parameters: dict[str, t.Any]
    dropped: list[str]


def agree(
    old: Offer, new: Offer, wishes: Wishes = Wishes(), mode: str = CPR_TRANSFER, *, in_place: bool = False
) -> Agreement:
    """What both ends have in common, and of that what is used.

    All capabilities but the required and the wished ones are off, whatever was on before: one
    that is on at one end only makes the new QEMU wait for ever while the old one says
    ``completed`` (seen with multifd).

    :param in_place: whether ``cpr-reboot`` leaves the RAM in its file.
    :raises CprError: ``bad-argument`` for a wish that can't be had with any QEMU;
        ``capability-missing`` or ``parameter-missing`` for what an end lacks.
    """
    for name in REQUIRED_CAPABILITIES:
        if wishes.capabilities.get(name) is False:
            raise CprError("bad-argument", f"The capability {name} can't be off: the update needs it.", "Leave it out.")
    for name in _IMPOSSIBLE_CAPABILITIES:
        if wishes.capabilities.get(name):
            raise CprError("bad-argument", f"The capability {name} does not go with a live update.", "Leave it out.")
    for name in _RESERVED_PARAMETERS:
        if name in wishes.parameters:
            raise CprError("bad-argument", f"The parameter {name} is set by the update itself.", "Leave it out.")
    required = ["events"] if mode in _BY_FILE else list(REQUIRED_CAPABILITIES)
    if mode == CPR_REBOOT and in_place:
        required.append(_IN_PLACE)
    wanted = [name for name, state in wishes.capabilities.items() if state and name not in REQUIRED_CAPABILITIES]
    dropped = []
    for code, what, names, offered in (
        ("capability-missing", "capability", (*required, *wanted), lambda offer: offer.capabilities),
        ("parameter-missing", "parameter", wishes.parameters, lambda offer: offer.parameters),
    ):
        for whose, offer in (("running", old), ("new", new)):
            for name in names:
                if name in offered(offer):
                    continue
                lack = f"The {whose} QEMU ({offer.version_text}) lacks the migration {what} {name}."
                if wishes.when_missing != "drop" or name in required:
                    raise CprError(code, lack, "Leave it out, or let it be dropped (live_update_when_missing: drop).")
                dropped.append(f"{lack} It is left out.")
    common = old.capabilities & new.capabilities
    return Agreement(
        capabilities={name: name in required or name in wanted for name in sorted(common)},
        parameters={
            **PARAMETERS,
            **{
                name: value
                for name, value in wishes.parameters.items()
                if name in old.parameters and name in new.parameters
            },
        },
        dropped=dropped,
    )


def record(
    mode: str,
    agreement: Agreement,
    machine: t.Mapping[str, t.Any],
    compared: t.Iterable[str],
    accepted: t.Mapping[str, t.Sequence[str]],
) -> dict[str, t.Any]:
    """What was compared and agreed, for the update record and for other tools.

    A reader must refuse a ``version`` that it does not know; keys may be added within one.

    :param machine: `machine_view.summary` of the guest.
    :param compared: the codes of `machine_view.differences` that were looked for.
    :param accepted: those that were found and that the user accepts.
    """
    return {
        "version": PROTOCOL,
        "mode": mode,
        "capabilities": agreement.capabilities,
        "parameters": agreement.parameters,
        "dropped": agreement.dropped,
        "compared": list(compared),
        "accepted": {code: list(sentences) for code, sentences in accepted.items()},
        "machine": dict(machine),
    }


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
