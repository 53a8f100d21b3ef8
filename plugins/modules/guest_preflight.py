#!/usr/bin/python
# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: guest_preflight
short_description: Judge whether guests can go to a new QEMU without a stop
version_added: 1.0.0
description:
  - Says of each guest, for each mode of live update, whether it is ready, blocked or ready with a
    warning, and why, for a given new QEMU binary.
  - Looks at modes and capabilities of both, QEMU's own reasons against a mode (the mode is set for
    that, read and put back), shared memory, the machine type, every device type and property, the
    accelerator, jobs and exports of disks, the guest's run state, the room on the host, and whatever
    this collection can't carry over.
  - With O(rehearse) the new QEMU is also started with the guest's own command line, beside the guest,
    and the machine that it would be is compared with the guest's.
  - The guests are as before, and nothing stays behind. It can run on a whole fleet any day.
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
      - The guests to judge, by their C(-name). All that run here if empty; QEMUs without a name are then named too, as
        V(process 1234), and blocked (C(guest-unnamed)).
    type: list
    elements: str
    default: []
    required: false
  qemu_binary:
    description:
      - The absolute path of the new QEMU on the host. It is started without a machine, to be asked
        what it can do.
    type: path
    required: true
  rehearse:
    description:
      - Whether to start the new QEMU with each guest's command line. It gets RAM of its own, which it
        does not fill, taps in no bridge and none of the guest's sockets and ports; it opens the
        guest's images without a lock, runs no instruction, and is ended within a second or so.
      - Instead of connections to other programs (character devices, sound, networks other than taps and
        user networks) it has empty ones.
      - VFIO devices serve one QEMU at a time; a guest with one is not rehearsed, and its verdict
        says so.
    type: bool
    default: false
  mode:
    description:
      - The mode that the update is to take, as in M(vmfleet.cpr.dest_launch).
    type: str
    choices: [auto, cpr-transfer, cpr-exec, cpr-reboot, precopy]
    default: auto
  adopt:
    description:
      - Whether V(auto) may copy the RAM of guests that could not go otherwise.
    type: bool
    default: true
  accept_differences:
    description:
      - V(tcg-precopy) lets the RAM of guests that do not run under KVM be copied by a QEMU before 10.0, at your
        risk. QEMU 7.2 loses some of what such guests write meanwhile. The other codes are for M(vmfleet.cpr.migration_setup).
    type: list
    elements: str
    default: []
  capabilities:
    description:
      - Migration capabilities that the update is to use, as in M(vmfleet.cpr.dest_launch).
    type: dict
    default: {}
  parameters:
    description:
      - Migration parameters that the update is to use, as in M(vmfleet.cpr.dest_launch).
    type: dict
    default: {}
  when_missing:
    description:
      - What the update does with one of these that an end lacks, as in M(vmfleet.cpr.dest_launch).
    type: str
    choices: [fail, drop]
    default: fail
author:
  - vmfleet.cpr contributors (@vmfleet)
"""

EXAMPLES = r"""
- name: Judge all guests of the host
  vmfleet.cpr.guest_preflight:
    qemu_binary: /opt/qemu-11.1/bin/qemu-system-x86_64
    rehearse: true
  register: preflight

- name: Name those that can't go, and why
  ansible.builtin.debug:
    msg: "{{ item.message }}"
  loop: "{{ preflight.guests | selectattr('verdict', 'eq', 'blocked') }}"
  loop_control:
    label: "{{ item.name }}"
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
    unnamed:
      description: V(true) for a QEMU without a C(-name). It has little else but C(verdict) and C(reasons).
      returned: for such
      type: bool
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
    systemd_unit:
      description: The systemd service that the guest is the main process of, or null.
      type: str
      sample: guest@web1.service
    wanted_version:
      description: The version of O(qemu_binary).
      type: str
      sample: 11.1.3
    mode:
      description: The mode that the guest would take, null if it can't go or runs on O(qemu_binary) already.
      type: str
      sample: cpr-transfer
    verdict:
      description: Whether the guest can go by that mode, one of V(ready), V(warning) and V(blocked).
      type: str
      sample: ready
    reasons:
      description: >-
        Why, each with C(severity) (V(blocker) or V(warning)), C(code), C(message) and C(hint).
      type: list
      elements: dict
    modes:
      description: >-
        For each of V(cpr-transfer), V(cpr-exec), V(cpr-reboot) and V(precopy) the C(verdict), one of V(ready),
        V(warning) and V(blocked), and its C(reasons), each with C(severity) (V(blocker) or V(warning)),
        C(code), C(message) and C(hint).
      type: dict
      sample:
        cpr-transfer:
          verdict: blocked
          reasons:
            - severity: blocker
              code: machine-type-missing
              message: The guest's machine type pc-q35-4.2 is no longer in QEMU 11.1.3.
              hint: Restart the guest with a newer one.
    notes:
      description: What a live update would lose, or could not carry over, as sentences.
      type: list
      elements: str
      sample: [Connections through its user network will be lost.]
    up_to_date:
      description: Whether the guest runs on O(qemu_binary) already.
      type: bool
error:
  description: The first failure, with the same keys as in RV(guests[].error).
  returned: failure
  type: dict
"""

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.vmfleet.cpr.plugins.module_utils.phases.assess import assess_all
from ansible_collections.vmfleet.cpr.plugins.module_utils.runner import (
    guests_argument_spec,
    mode_argument_spec,
    run,
    wishes_argument_spec,
)


def main() -> None:
    module = AnsibleModule(
        argument_spec=guests_argument_spec(
            guests={"type": "list", "elements": "str", "default": []},
            qemu_binary={"type": "path", "required": True},
            rehearse={"type": "bool", "default": False},
            **mode_argument_spec(),
            **wishes_argument_spec(),
        ),
        supports_check_mode=True,
    )
    run(module, assess_all)


if __name__ == "__main__":
    main()
