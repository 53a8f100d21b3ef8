# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Recognises guests that another manager looks after.

It holds the monitor and believes that it knows the process: an update behind its back would
leave it with a guest that it takes for dead. Pure functions. Private to the collection.
"""

from __future__ import annotations

import typing as t

from ansible_collections.vmfleet.cpr.plugins.module_utils.errors import CprError

# What stands in the command line of every guest of a manager.
_MARKS = {
    "libvirt": ("/var/lib/libvirt/qemu/", "/run/libvirt/"),
    "Proxmox VE": ("/var/run/qemu-server/", "/run/qemu-server/"),
    "Incus": ("/run/incus/", "/var/log/incus/"),
    "LXD": ("/var/snap/lxd/common/lxd/logs/", "/var/log/lxd/", "/run/lxd/"),
    "Ganeti": ("/run/ganeti/", "ganeti-hypervisor"),
    "Multipass": ("/multipassd/",),
    "Podman machine": ("/podman/machine/", "/containers/podman/"),
    "Kata Containers": ("/run/vc/vm/", "kata-containers"),
}
# systemd-machined's name for a guest of libvirt.
_LIBVIRT_SCOPE = "/machine-qemu\\x2d"


def manager_of(words: t.Sequence[str], cgroup: str) -> str | None:
    """Who manages the guest with this command line, or None.

    :param cgroup: its process's ``/proc/PID/cgroup``.
    """
    if _LIBVIRT_SCOPE in cgroup:
        return "libvirt"
    for manager, marks in _MARKS.items():
        if any(mark in word for mark in marks for word in words):
            return manager
    return None


def managed(manager: str) -> CprError:
    """The reason to leave such a guest alone."""
    return CprError(
        "managed-by-another",
        f"The guest belongs to {manager}, which holds its monitor and would take the new QEMU for a stranger.",
        f"Update it by the means of {manager}, and leave it out of live_update_guests.",
    )
