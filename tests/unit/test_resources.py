# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Whether a host has room for a second QEMU, on recorded tables of the kernel."""

from __future__ import annotations

import pytest

from ansible_collections.vmfleet.cpr.plugins.module_utils import process, resources
from ansible_collections.vmfleet.cpr.plugins.module_utils.memory import Block


@pytest.fixture(name="host")
def fixture_host(tmp_path, monkeypatch):
    """A host with 4 GiB to spare, and a QEMU of 200 MiB in a cgroup below one with a limit."""

    def make(
        available=4 << 20, limit="max", used=0, inactive=0, environment="", running=(), own=(), nodes="0-1",
        policy="default",
    ):  # fmt: skip
        directory = tmp_path / "proc" / "7"
        directory.mkdir(parents=True)
        (tmp_path / "proc" / "meminfo").write_text(f"MemTotal: 8388608 kB\nMemAvailable: {available} kB\n")
        allowed = f"Mems_allowed_list:\t{nodes}\n"
        (directory / "status").write_text(f"Name:\tqemu\nRssAnon:\t  204800 kB\nRssShmem:\t 1048576 kB\n{allowed}")
        (directory / "numa_maps").write_text(f"55d0 default file=/qemu\n55d1 {policy} heap anon=9\n")
        (directory / "cgroup").write_text("0::/guests/web1.service\n")
        (directory / "environ").write_text(environment)
        for path, values in (("guests", (limit, used)), ("guests/web1.service", ("max", used))):
            cgroup = tmp_path / "cgroup" / path
            cgroup.mkdir(parents=True, exist_ok=True)
            (cgroup / "memory.max").write_text(f"{values[0]}\n")
            (cgroup / "memory.current").write_text(f"{values[1]}\n")
            (cgroup / "memory.stat").write_text(f"anon 1\nactive_file {inactive}\n")
        monkeypatch.setattr(process, "PROC", str(tmp_path / "proc"))
        monkeypatch.setattr(resources, "_CGROUPS", str(tmp_path / "cgroup"))
        return [blocker.message for blocker in resources.memory_blockers(resources.demand(7, running, own))]

    return make


def test_a_host_with_room_is_none(host):
    assert host(limit=str(2 << 30), used=1 << 30) == []


def test_a_host_without_memory_is_told_with_both_figures(host):
    (message,) = host(available=100 << 10)
    assert "needs 232 MiB" in message and "the host has 100 MiB left" in message


def test_a_cgroup_above_with_a_limit_counts(host):
    (message,) = host(limit=str(2 << 30), used=(2 << 30) - (50 << 20))
    assert "the cgroup /guests has 50 MiB left" in message


def test_memory_that_the_kernel_can_drop_is_left(host):
    assert host(limit=str(2 << 30), used=(2 << 30) - (50 << 20), inactive=512 << 20) == []


def test_a_module_directory_of_another_build_is_told(host):
    host(environment="A=1\0QEMU_MODULE_DIR=/usr/lib/qemu-10.0\0")
    (warning,) = resources.warnings(7)
    assert warning.code == "module-directory" and "/usr/lib/qemu-10.0" in warning.message


PRIVATE = Block("pc.ram", 1 << 30)


def test_a_copy_of_the_guests_ram_counts_and_its_first_one_does_not_count_twice(host):
    # All of the old QEMU's 200 MiB are the guest's RAM, as far as it was used.
    (message,) = host(available=1040 << 10, running=[PRIVATE], own=[PRIVATE])
    assert "needs 1056 MiB" in message and "the host has 1040 MiB left" in message


@pytest.fixture(name="pools")
def fixture_pools(tmp_path, monkeypatch, host):
    """Two NUMA nodes, and huge pages of 2 MiB in both, of which one is promised to somebody."""
    for node, (free, pages) in enumerate(((400 << 10, 16), (50 << 10, 4))):
        directory = tmp_path / "node" / f"node{node}"
        (directory / "hugepages" / "hugepages-2048kB").mkdir(parents=True)
        (directory / "meminfo").write_text(f"Node {node} MemFree: {free} kB\nNode {node} Inactive(file): 1024 kB\n")
        (directory / "hugepages" / "hugepages-2048kB" / "free_hugepages").write_text(f"{pages}\n")
    pages = tmp_path / "hugepages" / "hugepages-2048kB"
    pages.mkdir(parents=True)
    (pages / "free_hugepages").write_text("20\n")
    (pages / "resv_hugepages").write_text("1\n")
    monkeypatch.setattr(resources, "_NODES", str(tmp_path / "node"))
    monkeypatch.setattr(resources, "_HUGE_PAGES", str(tmp_path / "hugepages"))
    return host


@pytest.mark.parametrize(
    ("block", "expected"),
    [
        (Block("m0", 256 << 20, nodes=(0,)), None),
        (Block("m1", 256 << 20, nodes=(1,)), "NUMA node 1 has 51 MiB left"),
        (Block("m", 440 << 20, nodes=(0, 1)), None),
        (Block("h", 38 << 20, page_size=2 << 20), None),
        (Block("h", 40 << 20, page_size=2 << 20), "the pool of 2048 KiB pages of the host has 38 MiB left"),
        (
            Block("h", 8 << 20, page_size=2 << 20, nodes=(1,)),
            "the pool of 2048 KiB pages of NUMA node 1 has 6 MiB left",
        ),
    ],
)
def test_ram_is_counted_where_it_must_come_from(pools, block, expected):
    messages = pools(running=[block], own=[block])
    assert [expected in message for message in messages] == ([True] if expected else [])


BOUND = Block("m0", 256 << 20, nodes=(0,))


@pytest.mark.parametrize(
    ("block", "around", "expected"),
    [
        (PRIVATE, {"nodes": "0-1"}, None),
        (PRIVATE, {"policy": "interleave:0-1"}, None),
        (PRIVATE, {"nodes": "1"}, "needs 1056 MiB of its own beside the running one, and NUMA node 1 has 51 MiB left"),
        (PRIVATE, {"policy": "bind:1"}, "needs 1056 MiB of its own beside the running one, and NUMA node 1 has 51 MiB left"),
        (PRIVATE, {"policy": "bind=static:0-1"}, "NUMA node 0, 1 has 452 MiB left"),
        (BOUND, {"policy": "bind:1"}, None),  # what has a policy of its own
        (BOUND, {"nodes": "1"}, "NUMA node 1 has 51 MiB left"),  # a cpuset knows no such exceptions
        (BOUND, {"nodes": "0"}, None),  # and nothing is counted twice
        (Block("m", 256 << 20), {"nodes": "0", "policy": "bind:0"}, None),
    ],
)
def test_a_qemu_that_is_bound_to_nodes_has_a_second_one_there_too(pools, block, around, expected):
    messages = pools(running=[block], own=[block], **around)
    assert [expected in message for message in messages] == ([True] if expected else [])


def test_those_who_come_later_find_what_the_first_ones_left(host):
    host(available=3 << 20)
    room, needed = resources.Room(), resources.demand(7, [PRIVATE], [PRIVATE])
    assert room.short(needed) is None
    room.take(needed)
    assert room.short(needed) is None
    room.take(needed)
    pool, size, left = room.short(needed)
    assert (str(pool), size >> 20, left >> 20) == ("the host", 1056, 960)


def test_a_disk_without_room_is_told(tmp_path):
    assert resources.disk_blockers(str(tmp_path / "not" / "there")) == []
    (blocker,) = resources.disk_blockers(str(tmp_path / "not" / "there"), 1 << 60)
    assert blocker.code == "disk-short" and str(tmp_path) in blocker.message
