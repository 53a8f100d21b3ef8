# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a QEMU build offers for a live update, as data.

Pure functions. Private to the collection.
"""

from __future__ import annotations

import typing as t
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Offer:
    """What a QEMU build offers for a live update.

    :ivar version: ``major.minor.micro``.
    :ivar architecture: the guest's architecture (``x86_64``).
    :ivar modes: the members of its ``MigMode``; empty before QEMU 8.2.
    :ivar capabilities: its migration capabilities.
    :ivar parameters: the migration parameters that can be set.
    """

    version: tuple[int, int, int]
    architecture: str
    modes: frozenset[str]
    capabilities: frozenset[str]
    parameters: frozenset[str]

    @property
    def version_text(self) -> str:
        """The version as people write it."""
        return ".".join(map(str, self.version))


@dataclass(frozen=True)
class Binary:
    """A QEMU binary on disk.

    :ivar path: as it was given.
    :ivar executable_id: device and inode of what really runs, also behind a wrapper script.
    :ivar machine_types: the versioned machine types and aliases that it has.
    :ivar deprecated: those of them that its next major versions will lack.
    :ivar device_types: all devices that it has, processors too, as QOM types.
    :ivar kvm: whether it was built with KVM.
    :ivar default_ram: what each machine type calls RAM that has no backend of its own.
    """

    path: str
    executable_id: tuple[int, int]
    offer: Offer
    machine_types: frozenset[str]
    deprecated: frozenset[str] = frozenset()
    device_types: frozenset[str] = frozenset()
    kvm: bool = True
    default_ram: t.Mapping[str, str] = field(default_factory=dict)

    @property
    def has_aux_ram_share(self) -> bool:
        """Whether its machines can share their auxiliary RAM, which came with cpr-transfer (QEMU 10.0)."""
        return "cpr-transfer" in self.offer.modes


def read_schema(version: tuple[int, int, int], architecture: str, schema: t.Sequence[dict[str, t.Any]]) -> Offer:
    """What a QMP schema says about migration.

    The types' names are hidden in the schema, so they are followed from the commands.

    :param schema: what ``query-qmp-schema`` returned.
    """
    entities = {entity["name"]: entity for entity in schema}

    def members(type_name: str) -> dict[str, str]:
        return {member["name"]: member["type"] for member in entities[type_name]["members"]}

    def values(type_name: str) -> frozenset[str]:
        entity = entities[type_name]
        # "members" came with QEMU 7.0, "values" stays for older clients.
        return frozenset(entity["values"] if "values" in entity else (item["name"] for item in entity["members"]))

    capability_list = members(entities["migrate-set-capabilities"]["arg-type"])["capabilities"]
    capability = members(entities[capability_list]["element-type"])["capability"]
    parameters = members(entities["migrate-set-parameters"]["arg-type"])
    return Offer(
        version=version,
        architecture=architecture,
        modes=values(parameters["mode"]) if "mode" in parameters else frozenset(),
        capabilities=values(capability),
        parameters=frozenset(parameters),
    )
