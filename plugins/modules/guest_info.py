#!/usr/bin/python
# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: guest_info
short_description: Find the running QEMU guests of a hypervisor
version_added: 1.0.0
description:
  - Finds every QEMU guest that runs on the host, by C(/proc) and the guests' QMP monitors.
  - Says of each what it runs on, whether that binary still is the one on disk, which modes of
    live update it is ready for and what stands in the way.
  - The guests and the host are as before.
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
      - The guests to look at, by their C(-name). All that run here if empty; QEMUs without a name are then named too, as
        V(process 1234).
    type: list
    elements: str
    default: []
    required: false
  qemu_binary:
    description:
      - A QEMU binary on the host to judge the guests against. It is started once, without a
        machine, to be asked what it can do.
    type: path
author:
  - vmfleet.cpr contributors (@vmfleet)
"""

EXAMPLES = r"""
- name: See what runs where
  vmfleet.cpr.guest_info:
  register: found

- name: Name the guests that run a binary which is no longer the one on disk
  ansible.builtin.debug:
    msg: "{{ found.guests | selectattr('binary_on_disk', 'ne', 'same') | map(attribute='name') }}"

- name: See what stands in the way of an update to this binary
  vmfleet.cpr.guest_info:
    guests:
      - web1
    qemu_binary: /opt/qemu-11.1/bin/qemu-system-x86_64
"""

RETURN = r"""
guests:
  description: What is known of each guest.
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
    unnamed:
      description: Whether it is a QEMU without a C(-name), with which nothing can be done.
      type: bool
    pid:
      description: The process that runs the guest.
      type: int
    binary:
      description: The path of its binary.
      type: str
      sample: /usr/bin/qemu-system-x86_64
    binary_on_disk:
      description: >-
        Whether the running binary still lies at that path (V(same)), another one does
        (V(replaced)) or none (V(deleted)).
      type: str
    monitor:
      description: The path of the QMP monitor that answered, or null.
      type: str
    version:
      description: The version of the running QEMU, or null if no monitor answered.
      type: str
      sample: 10.0.2
    architecture:
      description: The guest's architecture, or null.
      type: str
      sample: x86_64
    machine_type:
      description: The versioned machine type, or null.
      type: str
      sample: pc-q35-10.0
    run_state:
      description: The guest's run state, or null.
      type: str
      sample: running
    modes:
      description: >-
        For each of V(cpr-transfer), V(cpr-exec), V(cpr-reboot) and V(precopy) whether the running guest is
        C(ready) for it and what stands in the way (C(blockers), each with C(code), C(message)
        and C(hint)). Which of them an update takes is RV(guests[].update_mode).
      type: dict
    notes:
      description: What a live update would lose, or could not carry over, as sentences.
      type: list
      elements: str
      sample: [Connections through its user network will be lost.]
    systemd_unit:
      description: The systemd service that the guest is the main process of, or null.
      type: str
      sample: guest@web1.service
    up_to_date:
      description: Whether the guest runs on O(qemu_binary) already. Only with O(qemu_binary).
      type: bool
    wanted_version:
      description: The version of O(qemu_binary). Only with O(qemu_binary).
      type: str
    update_mode:
      description: >-
        The mode that a live update to O(qemu_binary) would take by itself, null if none or if it is up to date. Only
        with O(qemu_binary).
      type: str
      sample: cpr-transfer
    copy:
      description: >-
        How far the copy of the guest's RAM is while an update copies it, with C(seconds), C(passes), C(mib_total),
        C(mib_transferred), C(mib_remaining), C(mib_per_second), C(dirty_mib_per_second) and C(throttle_percent); null
        otherwise.
      type: dict
    update_blockers:
      description: What stands in the way of a live update to O(qemu_binary). Only with O(qemu_binary).
      type: list
      elements: dict
error:
  description: The first failure, with the same keys as in RV(guests[].error).
  returned: failure
  type: dict
"""

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.vmfleet.cpr.plugins.module_utils.phases.info import inspect_all
from ansible_collections.vmfleet.cpr.plugins.module_utils.runner import (
    guests_argument_spec,
    run,
)


def main() -> None:
    module = AnsibleModule(
        argument_spec=guests_argument_spec(
            guests={"type": "list", "elements": "str", "default": []},
            qemu_binary={"type": "path"},
        ),
        supports_check_mode=True,
    )
    run(module, inspect_all)


if __name__ == "__main__":
    main()
