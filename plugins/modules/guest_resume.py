#!/usr/bin/python
# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: guest_resume
short_description: Let guests go on in their new QEMU
version_added: 1.0.0
description:
  - Switches each guest from the old QEMU to the new one. The guest pauses for milliseconds; with
    a V(cpr-reboot) that writes its RAM to a file, for as long as that takes.
  - Then checks that the guest runs, makes the new QEMU the main process of the guest's systemd
    service, ends the old QEMU and gives the new one the old one's paths, ports and interface names,
    so that everything answers where it did before.
  - If the new QEMU fails before the guest runs on it, the guest is brought back on the old one
    by this very module; there is nothing left to undo then.
  - A guest that was paused before stays paused.
  - A dropped connection and the end of Ansible or of this module don't interrupt it. A guest that
    stands still by then goes on, on the new QEMU or on the old one, and the next run says which.
    Guests whose switch has not begun stay where they are.
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
  switch_concurrency:
    description:
      - How many guests are switched at a time. More than one makes every pause longer and saves
        next to nothing.
    type: int
    default: 1
  pause_limit:
    description:
      - Seconds that a guest may stand still. Past them the new QEMU is killed and the guest goes on
        in the old one. It takes milliseconds where nothing is wrong.
    type: float
    default: 2.0
  copy_timeout:
    description:
      - Seconds that the copy of one guest's RAM may take where there is one (V(precopy)), while the guest
        runs. Past them the copy is given up, and the guest stays on the old QEMU.
    type: float
    default: 600.0
  heartbeat_command:
    description:
      - A shell command on the hypervisor that succeeds if the guest is well, with its name as
        C($1). It must succeed once before the switch, else the guest is not switched. It is tried until
        O(heartbeat_timeout) after the switch, and the old QEMU is ended only once it has succeeded.
      - The guest agent (qemu-ga) is asked too, without any option, if it answered before the switch.
    type: str
  heartbeat_timeout:
    description:
      - Seconds in which the agent must answer, and in which O(heartbeat_command) must succeed.
    type: float
    default: 10.0
author:
  - vmfleet.cpr contributors (@vmfleet)
"""

EXAMPLES = r"""
- name: Switch to the new QEMU
  vmfleet.cpr.guest_resume:
    guests:
      - web1
      - web2
  register: resumed

- name: Show how long each guest stood still
  ansible.builtin.debug:
    msg: "{{ resumed.guests | items2dict(key_name='name', value_name='pause_ms') }}"
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

from ansible_collections.vmfleet.cpr.plugins.module_utils.phases.resume import resume_all
from ansible_collections.vmfleet.cpr.plugins.module_utils.runner import (
    guests_argument_spec,
    run,
)


def main() -> None:
    module = AnsibleModule(
        argument_spec=guests_argument_spec(
            switch_concurrency={"type": "int", "default": 1},
            pause_limit={"type": "float", "default": 2.0},
            copy_timeout={"type": "float", "default": 600.0},
            heartbeat_command={"type": "str"},
            heartbeat_timeout={"type": "float", "default": 10.0},
        ),
        supports_check_mode=True,
    )
    run(module, resume_all, outlives_caller=True)


if __name__ == "__main__":
    main()
