# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the documentation of the modules for the versions of QEMU on a host shares."""

from __future__ import annotations


class ModuleDocFragment:
    """Options and requirements."""

    DOCUMENTATION = r"""
options:
  directory:
    description:
      - Where the versions lie, each in a directory of its name.
    type: path
    default: /opt/qemu
  emulator:
    description:
      - The file name of the emulator.
    type: str
    default: qemu-system-x86_64
  qmp_library:
    description:
      - Set by the collection itself. The Python library qemu.qmp from the control node, for
        hosts that have none.
    type: str
  run:
    description:
      - Set by the collection itself. The run of Ansible that the task belongs to.
    type: dict
requirements:
  - Python 3.9 or later and Linux 5.3 or later on the hypervisor.
  - qemu.qmp 0.0.3 or later on the control node or on the hypervisor.
"""

    KEEP = r"""
options:
  keep:
    description:
      - How many versions stay that are not the default, not in use, not named by anything and not in
        O(protect). Those that were made last stay.
    type: int
    default: 2
  default:
    description:
      - The binary to take for the default for new guests. What the link in O(directory) leads to if not given.
    type: path
  protect:
    description:
      - Binaries whose versions stay in any case.
    type: list
    elements: path
    default: []
  state_directories:
    description:
      - Where the hypervisor keeps update records and checkpoints.
    type: list
    elements: path
    default: [/run/vmfleet-cpr, /var/lib/vmfleet-cpr]
notes:
  - Only root sees who uses a version. Where a process can't be looked at no version counts as removable.
"""
