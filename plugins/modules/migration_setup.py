#!/usr/bin/python
# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: migration_setup
short_description: Set both QEMUs of guests up for the switch
version_added: 1.0.0
description:
  - Sets the migration capabilities and parameters on both QEMUs, from what both of them offer,
    and reads them back. QEMU's two ends do not agree on these by themselves.
  - Compares the machines that both give the guest, and refuses what differs and what a guest could see.
    That is machine type, accelerator, processors and their features, memory, NUMA layout, the sizes of
    firmware and option ROMs, every device with its place and properties, virtio queues, disks and
    their images.
  - Puts the threads of the new QEMU on the host's processors that the old one's have.
  - The guest runs on its old QEMU, before and after. M(vmfleet.cpr.guest_rollback) undoes this
    module.
  - The whole way is P(vmfleet.cpr.live_update#role), which calls this module as one step.
extends_documentation_fragment:
  - vmfleet.cpr.guests
  - vmfleet.cpr.attributes
attributes:
  check_mode:
    support: full
    details:
      - Says what would be done, without looking at the guest.
  diff_mode:
    support: none
  idempotent:
    support: full
options:
  accept_differences:
    description:
      - Error codes of the comparison, like V(devices-differ), whose differences shall not count. They are
        reported in RV(guests[].message) and in RV(guests[].agreement).
      - The guest will see them, and QEMU may still refuse the guest in the pause. It then goes on in the
        old one.
      - V(tcg-precopy) is for M(vmfleet.cpr.dest_launch), and says nothing here.
    type: list
    elements: str
    choices:
      - machine-differs
      - cpu-differs
      - memory-differs
      - disks-differ
      - devices-differ
      - queues-differ
      - firmware-differs
      - tcg-precopy
    default: []
author:
  - vmfleet.cpr contributors (@vmfleet)
"""

EXAMPLES = r"""
- name: Set both QEMUs up
  vmfleet.cpr.migration_setup:
    guests:
      - web1
      - web2
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
        Where the guest's latest update is, one of V(launching), V(launched), V(transferring),
        V(transferred), V(set-up), V(switching), V(switched), V(finished) and V(rolled-back);
        null if there never was one.
      type: str
      sample: finished
    old:
      description: The old QEMU of that update, with C(pid), C(binary), C(version) and C(monitor).
      type: dict
    new:
      description: The new QEMU of that update, with the same keys.
      type: dict
    mode:
      description: The mode of that update, null without one.
      type: str
      sample: cpr-transfer
    mode_reason:
      description: Why it is that one, in a sentence.
      type: str
    pause_ms:
      description: >-
        Milliseconds from the STOP event of the old QEMU to the RESUME event of the new one, by
        QEMU's own timestamps; with V(cpr-exec) until it is seen running. Null before the switch and for a
        guest that was paused anyway.
      type: float
      sample: 6.41
    durations_ms:
      description: Milliseconds that each phase took.
      type: dict
      sample: {launch: 61.2, transfer: 88.0, setup: 14.9, page_cache: 6.2, switch: 19.3, retire: 41.7}
    agreement:
      description:
        - What was compared and agreed, null before. The update record has it too.
        - C(version) is 1; a reader should refuse one that it does not know. C(mode), C(capabilities) and
          C(parameters) are what both use, C(dropped) what an end lacks, C(compared) the codes of what was
          looked for, C(accepted) what was found and accepted, C(machine) what the guest is compared with again after the switch.
      returned: success
      type: dict
error:
  description: The first failure, with the same keys as in RV(guests[].error).
  returned: failure
  type: dict
"""

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.vmfleet.cpr.plugins.module_utils.phases.setup import DONE, set_up
from ansible_collections.vmfleet.cpr.plugins.module_utils.runner import (
    guests_argument_spec,
    run_phase,
)


def main() -> None:
    module = AnsibleModule(
        argument_spec=guests_argument_spec(
            accept_differences={
                "type": "list",
                "elements": "str",
                "choices": [
                    "machine-differs",
                    "cpu-differs",
                    "memory-differs",
                    "disks-differ",
                    "devices-differ",
                    "queues-differ",
                    "firmware-differs",
                    "tcg-precopy",
                ],
                "default": [],
            }
        ),
        supports_check_mode=True,
    )
    run_phase(
        module,
        set_up,
        done=DONE,
        would="Capabilities and parameters would be set on both QEMUs.",
        accept_differences=module.params["accept_differences"],
    )


if __name__ == "__main__":
    main()
