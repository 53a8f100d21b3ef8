# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What takes the place of a guest's memory, on command lines."""

from __future__ import annotations

import pytest

from ansible_collections.vmfleet.cpr.plugins.module_utils import command_line, memory
from ansible_collections.vmfleet.cpr.plugins.module_utils.memory import Block

PLAIN = Block("pc.ram", 64 << 20)


def adopted(words, *blocks, aux_ram_share=True):
    options = memory.adopted(command_line.parse(words), blocks, default_ram="pc.ram", aux_ram_share=aux_ram_share)
    return command_line.write(options)


PLAIN_RESULT = [
    "-object", '{"qom-type":"memory-backend-memfd","id":"pc.ram","size":67108864,"share":true}',
    "-machine", "memory-backend=pc.ram,aux-ram-share=on",
]  # fmt: skip


@pytest.mark.parametrize(
    ("words", "blocks", "expected"),
    [
        (["-M", "q35", "-m", "64"], [PLAIN], ["-M", "q35", "-m", "64", *PLAIN_RESULT]),
        (["-m", "64", "-mem-path", "/dev/shm"], [PLAIN], ["-m", "64", *PLAIN_RESULT]),
        (
            ["-mem-prealloc", "-mem-path", "/dev/hugepages"],
            [Block("pc.ram", 64 << 20, page_size=2 << 20)],
            [
                "-object", '{"qom-type":"memory-backend-memfd","id":"pc.ram","size":67108864,"share":true,"prealloc":true,'
                '"hugetlb":true,"hugetlbsize":2097152}',
                "-machine", "memory-backend=pc.ram,aux-ram-share=on",
            ],
        ),
        (
            ["-M", "q35,memory-backend=m", "-object", "memory-backend-ram,id=m,size=1G,host-nodes=0,policy=bind"],
            [Block("m", 1 << 30, nodes=(0,))],
            [
                "-M", "q35,memory-backend=m",
                "-object", "memory-backend-memfd,id=m,size=1G,host-nodes=0,policy=bind,share=on",
                "-machine", "aux-ram-share=on",
            ],
        ),
        (
            ["-object", "memory-backend-file,id=m,size=1G,mem-path=/h,share=off,discard-data=on", "-numa", "node,memdev=m"],
            [Block("m", 1 << 30, page_size=1 << 30, path="/h")],
            [
                "-object", "memory-backend-memfd,id=m,size=1G,share=on,hugetlb=on,hugetlbsize=1073741824",
                "-numa", "node,memdev=m", "-machine", "aux-ram-share=on",
            ],
        ),
        (
            ["-object", '{"qom-type":"memory-backend-ram","id":"d","size":5,"reserve":true}', "-device", "pc-dimm,memdev=d"],
            [PLAIN, Block("d", 5)],
            ["-object", '{"qom-type":"memory-backend-memfd","id":"d","size":5,"share":true}', "-device", "pc-dimm,memdev=d",
             *PLAIN_RESULT],
        ),
    ],
)  # fmt: skip
def test_ram_is_made_anew_shared_and_under_its_old_name(words, blocks, expected):
    assert adopted(words, *blocks) == expected


def test_a_qemu_that_can_not_share_auxiliary_memory_is_not_told_to():
    words = ["-M", "q35,memory-backend=m,aux-ram-share=on", "-object", "memory-backend-memfd,id=m,size=5,share=on"]
    assert adopted(words, Block("m", 5, shared=True), aux_ram_share=False) == [
        "-M", "q35,memory-backend=m", "-object", "memory-backend-memfd,id=m,size=5,share=on",
    ]  # fmt: skip


@pytest.mark.parametrize("device", ["nvdimm,memdev=m", "ivshmem-plain,memdev=m", "virtio-mem-pci,memdev=m"])
def test_memory_that_others_use_or_that_must_stay_is_not_copied(device):
    words = ["-object", "memory-backend-file,id=m,mem-path=/x,size=5,share=on", "-device", device]
    (blocker,) = memory.special_backends(command_line.parse(words))
    assert blocker.code == "memory-not-adoptable" and " m " in blocker.message
    assert memory.special_backends(command_line.parse([*words[:3], "pc-dimm,memdev=m"])) == []


def test_ram_that_is_called_otherwise_in_the_new_qemu_is_refused():
    assert memory.default_ram_blockers([], [PLAIN], "pc.ram") == []
    (blocker,) = memory.default_ram_blockers([], [PLAIN], "ram")
    assert blocker.code == "memory-not-adoptable"
    named = command_line.parse(["-M", "q35,memory-backend=m"])
    assert memory.default_ram_blockers(named, [Block("m", 5)], None) == []
