# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Whether a host has room for a second QEMU, on recorded tables of the kernel."""

from __future__ import annotations

import pytest

from ansible_collections.vmfleet.cpr.plugins.module_utils import process, resources


@pytest.fixture(name="host")
def fixture_host(tmp_path, monkeypatch):
    """A host with 4 GiB to spare, and a QEMU of 200 MiB in a cgroup below one with a limit."""

    def make(available=4 << 20, limit="max", used=0, inactive=0, environment=""):
        directory = tmp_path / "proc" / "7"
        directory.mkdir(parents=True)
        (tmp_path / "proc" / "meminfo").write_text(f"MemTotal: 8388608 kB\nMemAvailable: {available} kB\n")
        (directory / "status").write_text("Name:\tqemu\nRssAnon:\t  204800 kB\nRssShmem:\t 1048576 kB\n")
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
        return [blocker.message for blocker in resources.blockers(7, str(tmp_path / "not" / "there"))]

    return make


def test_a_host_with_room_is_none(host):
    assert host(limit=str(2 << 30), used=1 << 30) == []


def test_a_host_without_memory_is_told_with_both_figures(host):
    (message,) = host(available=100 << 10)
    assert "some 232 MiB" in message and "the host has 100 MiB left" in message


def test_a_cgroup_above_with_a_limit_counts(host):
    (message,) = host(limit=str(2 << 30), used=(2 << 30) - (50 << 20))
    assert "the cgroup /guests has 50 MiB left" in message


def test_memory_that_the_kernel_can_drop_is_left(host):
    assert host(limit=str(2 << 30), used=(2 << 30) - (50 << 20), inactive=512 << 20) == []


def test_a_module_directory_of_another_build_is_told(host):
    host(environment="A=1\0QEMU_MODULE_DIR=/usr/lib/qemu-10.0\0")
    (warning,) = resources.warnings(7)
    assert warning.code == "module-directory" and "/usr/lib/qemu-10.0" in warning.message
