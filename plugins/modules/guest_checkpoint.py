#!/usr/bin/python
# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: guest_checkpoint
short_description: Write the state of guests to files and end their QEMUs
version_added: 1.0.0
description:
  - Checks every guest and, only if all can be restored, writes each one's state to a file and ends its
    QEMU. The guests are then down, until M(vmfleet.cpr.guest_restore) lets them go on where they were,
    after a reboot of the host or with another QEMU.
  - RAM in a file (C(memory-backend-file) with C(share=on)) that outlives a reboot stays there; all other RAM is
    written to O(state_directory), where the room for it must be beforehand. What was written is on the disk, and
    its checksum noted, before the QEMU ends.
  - A guest whose state can't be written runs on.
  - A guest that is a systemd service gets a drop-in, so that whoever starts the service meanwhile, at boot
    say, gets a QEMU that waits for the guest's state.
  - The QEMU that the guests will go on in is what O(qemu_binary) names, or what lies at the path of their own by now. Where that
    is another one than runs them, after an upgrade of its package say, it is tried beforehand with each guest's machine.
  - Needs QEMU 8.2 or later (cpr-reboot).
  - What an earlier run that died left behind is undone first.
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
      - The guests to checkpoint, by their C(-name). All that run on the host if empty.
    type: list
    elements: str
    default: []
    required: false
  state_directory:
    description:
      - Where the checkpoints are kept. It must outlive the reboot.
    type: path
    default: /var/lib/vmfleet-cpr
  qemu_binary:
    description:
      - The absolute path of another QEMU on the host that the guests will be restored with.
    type: path
  accept_differences:
    description:
      - Error codes of that trial, like V(devices-differ), whose differences shall not count.
    type: list
    elements: str
    default: []
  write_timeout:
    description:
      - Seconds that the state of one guest may take to be written. Past them the guest goes on as before.
    type: float
    default: 600.0
  heartbeat_command:
    description:
      - A shell command on the hypervisor that succeeds if the guest is well, with its name as C($1). It is tried
        after the guest was restored.
    type: str
  heartbeat_timeout:
    description:
      - Seconds in which that must succeed, and in which a guest agent that answers now must answer again.
    type: float
    default: 60.0
author:
  - vmfleet.cpr contributors (@vmfleet)
"""

EXAMPLES = r"""
- name: Write all guests to files before the host reboots
  vmfleet.cpr.guest_checkpoint:
    concurrency: 2
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
      sample: checkpointed
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

from ansible_collections.vmfleet.cpr.plugins.module_utils.phases.checkpoint import checkpoint_all
from ansible_collections.vmfleet.cpr.plugins.module_utils.runner import CHECKPOINT_DIRECTORY, guests_argument_spec, run


def main() -> None:
    module = AnsibleModule(
        argument_spec=guests_argument_spec(
            guests={"type": "list", "elements": "str", "default": []},
            state_directory={"type": "path", "default": CHECKPOINT_DIRECTORY},
            qemu_binary={"type": "path"},
            accept_differences={"type": "list", "elements": "str", "default": []},
            write_timeout={"type": "float", "default": 600.0},
            heartbeat_command={"type": "str"},
            heartbeat_timeout={"type": "float", "default": 60.0},
        ),
        supports_check_mode=True,
    )
    run(module, checkpoint_all, outlives_caller=True)


if __name__ == "__main__":
    main()
