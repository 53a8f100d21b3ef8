# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The memory of a guest on a command line, and what takes its place.

What QEMU compares of RAM is the names of its blocks: a block is called like its backend, or,
where the command line names none, by the machine's ``default-ram-id`` (QEMU's qapi/machine.json).
So a QEMU with shared RAM can take a guest over from one without, if the names agree.

Pure functions. Private to the collection.
"""

from __future__ import annotations

import json
import mmap
import typing as t
from dataclasses import dataclass

from ansible_collections.vmfleet.cpr.plugins.module_utils.command_line import (
    Option,
    Properties,
    machine_properties,
    read_properties,
    with_property,
)
from ansible_collections.vmfleet.cpr.plugins.module_utils.errors import CprError

# What a backend of any kind keeps when it is made anew. Where its file lies is not among it.
_KEPT = (
    "id", "size", "host-nodes", "policy", "prealloc", "prealloc-threads", "merge", "dump",
    "x-use-canonical-path-for-ramblock-id",
)  # fmt: skip
ORDINARY_PAGE = mmap.PAGESIZE


@dataclass(frozen=True)
class Block:
    """A piece of a guest's RAM.

    :ivar name: of the RAM block, and of the backend.
    :ivar size: bytes.
    :ivar page_size: of the host's pages behind it, bytes.
    :ivar nodes: the host's NUMA nodes that it is bound to; none where it may lie anywhere.
    :ivar shared: whether it can be shared with another process.
    :ivar path: of the file that it is, and that another QEMU would find there; None without one.
    :ivar discarded: whether QEMU empties that file when it ends.
    """

    name: str
    size: int
    page_size: int = ORDINARY_PAGE
    nodes: tuple[int, ...] = ()
    shared: bool = False
    path: str | None = None
    discarded: bool = False

    @property
    def is_in_place(self) -> bool:
        """Whether another QEMU can map it: QEMU's ``x-ignore-shared`` then leaves it out of the stream."""
        return self.shared and self.path is not None


def is_backend(option: Option) -> bool:
    """Whether the option makes a memory backend."""
    if option.name != "object":
        return False
    given = read_properties(option)
    return (given.implied or given.get("qom-type") or "").startswith("memory-backend-")


def with_backend(option: Option, kind: str, kept: t.Container[str], **more: t.Any) -> Option:
    """A memory backend of another kind, in the syntax that it has.

    :param kept: the properties that it keeps.
    :param more: further ones, an underscore for each dash.
    """
    added = {name.replace("_", "-"): value for name, value in more.items()}
    if (option.value or "").startswith("{"):
        tree = {name: value for name, value in json.loads(option.value or "").items() if name in kept}
        return Option(option.flag, json.dumps({"qom-type": kind, **tree, **added}, separators=(",", ":")))
    pairs: list[tuple[t.Optional[str], str]] = [pair for pair in read_properties(option).pairs if pair[0] in kept]
    pairs += [(name, {True: "on", False: "off"}.get(value, str(value))) for name, value in added.items()]
    return Option(option.flag, str(Properties([(None, kind), *pairs])))


def _base_backends(options: t.Sequence[Option]) -> set[str]:
    """The ids of the backends that the machine starts with: one, or one for each NUMA node; none where QEMU makes it."""
    nodes = [read_properties(option).get("memdev") for option in options if option.name == "numa"]
    return {name for name in (machine_properties(options).get("memory-backend"), *nodes) if name}


def _modules(options: t.Sequence[Option]) -> set[str]:
    """The ids of the backends of its memory modules."""
    drivers = [read_properties(option) for option in options if option.name == "device"]
    modules = [given.get("memdev") for given in drivers if "pc-dimm" in (given.implied, given.get("driver"))]
    return {name.rpartition("/")[2] for name in modules if name}


def special_backends(options: t.Sequence[Option]) -> list[CprError]:
    """What of a guest's memory can't be copied into memory of the new QEMU's own."""
    ordinary = _base_backends(options) | _modules(options)
    names = [read_properties(option).get("id") or "" for option in options if is_backend(option)]
    special = sorted(set(names) - ordinary)
    if not special:
        return []
    return [
        CprError(
            "memory-not-adoptable",
            f"The guest's memory backend {', '.join(special)} is no ordinary RAM (nvdimm, ivshmem, virtio-mem, SGX): others"
            " may use it, or it must stay where it is, so it is not copied.",
            "Take it away, or restart the guest.",
        )
    ]


def default_ram_blockers(
    options: t.Sequence[Option], blocks: t.Iterable[Block], default_ram: str | None
) -> list[CprError]:
    """Whether RAM that no option names is called alike in both QEMUs.

    :param default_ram: the ``default-ram-id`` of the guest's machine type in the new one.
    """
    names = [block.name for block in blocks]
    if _base_backends(options) or default_ram in names:
        return []
    return [
        CprError(
            "memory-not-adoptable",
            f"The new QEMU calls the guest's RAM {default_ram or 'by no name'}, and the running one {', '.join(names)}.",
            "Restart the guest, or choose another QEMU.",
        )
    ]


def adopted(
    options: t.Sequence[Option], blocks: t.Iterable[Block], *, default_ram: str | None, aux_ram_share: bool
) -> list[Option]:
    """The options of a QEMU whose RAM has the same names, and is shared.

    :param blocks: the guest's RAM, whose pages the new one is to have.
    :param default_ram: the ``default-ram-id`` of the machine type.
    :param aux_ram_share: whether the new QEMU knows that property (QEMU 10.0).
    """
    by_name = {block.name: block for block in blocks}

    def huge(name: str) -> dict[str, t.Any]:
        page_size = by_name[name].page_size
        return {} if page_size == ORDINARY_PAGE else {"hugetlb": True, "hugetlbsize": page_size}

    result = []
    prealloc = False
    for option in options:
        if option.name in ("mem-path", "mem-prealloc"):
            prealloc = prealloc or option.name == "mem-prealloc"
            continue
        if is_backend(option):
            name = read_properties(option).get("id") or ""
            option = with_backend(option, "memory-backend-memfd", _KEPT, share=True, **huge(name))
        if option.name == "machine":
            option = with_property(option, "aux-ram-share", None)
            if not option.value:
                continue
        result.append(option)
    machine = [("aux-ram-share", "on")] if aux_ram_share else []
    if not _base_backends(options) and default_ram is not None:
        more = {"prealloc": True} if prealloc else {}
        size = by_name[default_ram].size
        backend = {"qom-type": "memory-backend-memfd", "id": default_ram, "size": size, "share": True}
        text = json.dumps({**backend, **more, **huge(default_ram)}, separators=(",", ":"))
        result.append(Option("-object", text))
        machine.insert(0, ("memory-backend", default_ram))
    return [*result, Option("-machine", str(Properties(machine)))] if machine else result
