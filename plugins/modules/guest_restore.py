#!/usr/bin/python
# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: guest_restore
short_description: Let guests go on whose state is in files
version_added: 1.0.0
description:
  - Starts a QEMU for each guest that M(vmfleet.cpr.guest_checkpoint) wrote to a file, gives it the guest's state, and
    lets the guest run, in the order in which the guests were once started. A guest that was paused stays paused.
  - The checkpoint is checked beforehand and removed only after the guest runs. If anything fails before, it
    stays as it is. Once the guest may have run it is never used again, since the guest's disks have moved on.
  - The QEMU gets the user, groups, limits, environment and working directory of the one before, or is started as the
    main process of the guest's systemd service. Taps that are gone are made anew in their bridges.
  - A guest whose checkpoint was not completed, and whose QEMU still is there, goes on in that.
extends_documentation_fragment:
  - vmfleet.cpr.guests
  - vmfleet.cpr.attributes
attributes:
  check_mode:
    support: full
  diff_mode:
    support: none
  idempotent:
    support: full
options:
  guests:
    description:
      - The guests to restore, by their C(-name). All that have a checkpoint on the host if empty.
    type: list
    elements: str
    default: []
    required: false
  qemu_binary:
    description:
      - The absolute path of another QEMU on the host to restore the guests with, newer or older. The one that
        M(vmfleet.cpr.guest_checkpoint) was told, and tried, if empty.
    type: path
  accept_differences:
    description:
      - V(disks-changed) restores guests also where somebody has written to their disks since. A guest that was started from
        them meanwhile would damage them.
    type: list
    elements: str
    choices: [disks-changed]
    default: []
  state_directory:
    description:
      - Where the checkpoints are kept.
    type: path
    default: /var/lib/vmfleet-cpr
  restore_timeout:
    description:
      - Seconds that loading the state of one guest may take.
    type: float
    default: 600.0
author:
  - vmfleet.cpr contributors (@vmfleet)
"""

EXAMPLES = r"""
- name: Let all guests go on after the host's reboot
  vmfleet.cpr.guest_restore:

- name: Let one go on in an older QEMU
  vmfleet.cpr.guest_restore:
    guests:
      - web1
    qemu_binary: /opt/qemu-10.0/bin/qemu-system-x86_64
"""

RETURN = r"""
guests:
  description: What was done to each guest, in the order of O(guests).
  returned: unless the failure concerns the whole host
  type: list
  elements: dict
  contains:
    name:
      description: The guest's name.
      type: str
      sample: web1
    changed:
      description: Whether the module changed anything for this guest.
      type: bool
    failed:
      description: Whether it failed for this guest.
      type: bool
    message:
      description: What was done, in a sentence.
      type: str
    error:
      description: >-
        Why it failed, or null. Has the keys C(code), C(message), C(hint), C(guest), C(phase),
        C(qemu_class) and C(qemu_description); the last two are QEMU's own words.
      type: dict
    phase:
      description: >-
        Where the guest's checkpoint is, one of V(checkpointing), V(checkpointed), V(restoring), V(resuming),
        V(restored) and V(rolled-back); null without one.
      type: str
      sample: restored
    old:
      description: The old QEMU of that update, with C(pid), C(binary), C(version) and C(monitor).
      type: dict
    new:
      description: The new QEMU of that update, with the same keys.
      type: dict
    pause_ms:
      description: >-
        Milliseconds from the guest's stop to its resumption, over the reboot and all; null before.
      type: float
      sample: 48120.5
    host_rebooted:
      description: Whether the host has booted since the checkpoint was written. Not of a guest that failed.
      type: bool
    durations_ms:
      description: Milliseconds that each phase took.
      type: dict
      sample: {checkpoint: 812.4, restore: 230.1}
error:
  description: The first failure, with the same keys as in RV(guests[].error).
  returned: failure
  type: dict
"""

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.vmfleet.cpr.plugins.module_utils.phases.restore import restore_all
from ansible_collections.vmfleet.cpr.plugins.module_utils.runner import CHECKPOINT_DIRECTORY, guests_argument_spec, run


def main() -> None:
    module = AnsibleModule(
        argument_spec=guests_argument_spec(
            guests={"type": "list", "elements": "str", "default": []},
            qemu_binary={"type": "path"},
            accept_differences={"type": "list", "elements": "str", "choices": ["disks-changed"], "default": []},
            state_directory={"type": "path", "default": CHECKPOINT_DIRECTORY},
            restore_timeout={"type": "float", "default": 600.0},
        ),
        supports_check_mode=True,
    )
    run(module, restore_all, outlives_caller=True)


if __name__ == "__main__":
    main()
