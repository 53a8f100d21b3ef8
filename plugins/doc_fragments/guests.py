# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the documentation of every module that works on guests shares."""

from __future__ import annotations


class ModuleDocFragment:
    """Options and requirements."""

    DOCUMENTATION = r"""
options:
  guests:
    description:
      - The guests to work on, by their C(-name) (its C(guest=) part).
    type: list
    elements: str
    required: true
  concurrency:
    description:
      - How many guests of a host are worked on side by side.
    type: int
    default: 4
  timeout:
    description:
      - Seconds that one guest may take in this phase.
    type: float
    default: 30.0
  state_directory:
    description:
      - Where the hypervisor keeps the update records and the sockets of updates under way. It
        need not survive a reboot of the host.
    type: path
    default: /run/vmfleet-cpr
  qmp_library:
    description:
      - Set by the collection itself. The Python library qemu.qmp from the control node, for
        hosts that have none.
    type: str
  run:
    description:
      - Set by the collection itself. The run of Ansible that the task belongs to. Until an update
        has ended, no other run may touch it.
    type: dict
  ended_runs:
    description:
      - Set by the collection itself. Which of the runs that began updates of these guests have
        ended, by what their control node says.
    type: list
    elements: str
requirements:
  - Python 3.9 or later and Linux 5.3 or later on the hypervisor.
  - qemu.qmp 0.0.3 or later on the control node or on the hypervisor.
notes:
  - The task needs the rights to look at the guests' processes and to start new ones like them,
    which most often means root (C(become)).
"""
