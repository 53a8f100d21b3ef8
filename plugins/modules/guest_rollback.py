#!/usr/bin/python
# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: guest_rollback
short_description: Undo the live update of guests before the commit
version_added: 1.0.0
description:
  - Kills the new QEMU, sees it dead, and then lets the old one go on where it does not run by
    itself; puts the old one's migration settings back and removes what the update left.
  - Works from any point before the guest runs on the new QEMU, and refuses after it. A guest
    without an update under way is left alone.
  - Afterwards the guest runs on its old QEMU, and no other QEMU has it.
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
author:
  - vmfleet.cpr contributors (@vmfleet)
"""

EXAMPLES = r"""
- name: Undo what an update left behind
  vmfleet.cpr.guest_rollback:
    guests:
      - web1
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
error:
  description: The first failure, with the same keys as in RV(guests[].error).
  returned: failure
  type: dict
"""

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.vmfleet.cpr.plugins.module_utils.phases.rollback import DONE, roll_back
from ansible_collections.vmfleet.cpr.plugins.module_utils.runner import (
    guests_argument_spec,
    run_phase,
)


def main() -> None:
    module = AnsibleModule(argument_spec=guests_argument_spec(), supports_check_mode=True)
    run_phase(module, roll_back, done=DONE, would="The update would be undone.")


if __name__ == "__main__":
    main()
