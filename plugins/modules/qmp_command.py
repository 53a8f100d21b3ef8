#!/usr/bin/python
# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: qmp_command
short_description: Execute a QMP command on guests
version_added: 1.0.0
description:
  - Executes one QMP command on the monitor of each guest and returns what it answers.
  - Check mode executes only commands that are known to read (most C(query-*) and C(qom-list) and
    the like); any other counts as a change and is not executed then.
  - Where a guest's binary was replaced or deleted since it was started, C(qom-list-types), C(qom-list-properties) and
    C(device-list-properties) are refused (C(modules-replaced)). QEMU would load modules for them, and may abort.
extends_documentation_fragment:
  - vmfleet.cpr.guests
  - vmfleet.cpr.attributes
attributes:
  check_mode:
    support: partial
    details:
      - Commands that only read are executed in check mode too, others are not.
  diff_mode:
    support: none
  idempotent:
    support: partial
    details:
      - Every command that is not known to read counts as a change.
options:
  command:
    description:
      - The name of the command.
    type: str
    required: true
  arguments:
    description:
      - Its arguments.
    type: dict
author:
  - vmfleet.cpr contributors (@vmfleet)
"""

EXAMPLES = r"""
- name: Ask for the block devices
  vmfleet.cpr.qmp_command:
    guests:
      - web1
    command: query-block
  register: blocks

- name: Let the guest shut down
  vmfleet.cpr.qmp_command:
    guests:
      - web1
    command: system_powerdown

- name: Ask for one property
  vmfleet.cpr.qmp_command:
    guests:
      - web1
    command: qom-get
    arguments:
      path: /machine
      property: type
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
      sample: {launch: 61.2, transfer: 88.0, setup: 14.9, switch: 19.3, retire: 41.7}
    response:
      description: What the command returned; null where it was not executed.
      type: raw
error:
  description: The first failure, with the same keys as in RV(guests[].error).
  returned: failure
  type: dict
"""

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.vmfleet.cpr.plugins.module_utils.phases.command import execute_all
from ansible_collections.vmfleet.cpr.plugins.module_utils.runner import (
    guests_argument_spec,
    run,
)


def main() -> None:
    module = AnsibleModule(
        argument_spec=guests_argument_spec(
            command={"type": "str", "required": True},
            arguments={"type": "dict"},
        ),
        supports_check_mode=True,
    )
    run(module, execute_all)


if __name__ == "__main__":
    main()
