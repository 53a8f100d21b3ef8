#!/usr/bin/python
# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: dest_launch
short_description: Start the new QEMU of guests, which then waits for them
version_added: 1.0.0
description:
  - Checks every guest and, only if all can be updated, starts a new QEMU for each beside the
    running one.
  - The new QEMU gets the old one's command line from C(/proc), with the machine type pinned, its
    sockets at paths of their own, what was plugged in or out since, and the old one's user,
    groups, limits, environment, namespaces, cgroup and working directory. It then waits for the
    guest (M(vmfleet.cpr.cpr_transfer)).
  - With V(cpr-exec) nothing is started but a rehearsal, which is ended again.
  - A guest with a tap gets a second one in the same bridge. A guest that is a systemd service gets
    a drop-in in C(/run/systemd/system) where C(NotifyAccess) is V(none).
  - The guest runs on its old QEMU, before and after. M(vmfleet.cpr.guest_rollback) undoes this
    module.
  - A guest that runs on O(qemu_binary) already is left alone.
  - What an earlier run that died left behind is cleared first, undone or, where the guest is on
    its new QEMU already, finished.
  - The whole way is P(vmfleet.cpr.live_update#role), which calls this module as one step.
extends_documentation_fragment:
  - vmfleet.cpr.guests
  - vmfleet.cpr.attributes
attributes:
  check_mode:
    support: full
    details:
      - Checks everything that can be checked without starting anything beside the guest.
  diff_mode:
    support: full
  idempotent:
    support: full
options:
  guests:
    description:
      - The guests to work on, by their C(-name) (its C(guest=) part). All that run on the host
        if empty; a QEMU without a name is warned of.
    type: list
    elements: str
    default: []
    required: false
  qemu_binary:
    description:
      - The absolute path of the new QEMU on the host.
    type: path
    required: true
  mode:
    description:
      - How the guests go to the new QEMU. V(auto) takes for each guest V(cpr-transfer) where nothing stands
        in its way; else V(cpr-reboot) where the guest's RAM is in a file that both QEMUs can map; else
        V(precopy), if O(adopt) allows it. The result says which and why.
      - V(cpr-transfer) hands the guest's memory over; a pause of milliseconds, nothing copied.
      - V(precopy) copies the RAM to a new QEMU that shares it, while the guest runs. It takes the guest's RAM
        twice for that time, and works from QEMU 6.2 on, also to an older QEMU. After it the guest is
        ready for V(cpr-transfer).
      - V(cpr-reboot) writes the guest's state to a file while it stands still. RAM in a file that both can map
        stays there; other RAM is written too, which makes the pause seconds long.
      - V(cpr-exec) lets the process become the new QEMU, so that its pid stays. There is no way back once it
        has begun, and V(auto) never takes it.
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
      - Migration capabilities to use, each V(true) or V(false). C(events) and C(return-path) are always
        on, all others off by default, whatever the running QEMU has set.
      - Both QEMUs must have those that are to be on, see O(when_missing). They are set on both, read
        back on both (M(vmfleet.cpr.migration_setup)), and the guest has its own again afterwards.
    type: dict
    default: {}
  parameters:
    description:
      - Migration parameters to set on both QEMUs, with values of QEMU's own types and units.
    type: dict
    default: {}
  when_refused:
    description:
      - What to do where one of the guests can't be updated. V(stop) starts nothing for any, V(go-on) leaves only
        that one out. It fails in both.
    type: str
    choices: [stop, go-on]
    default: stop
  when_missing:
    description:
      - What to do with a capability or parameter that one of both QEMUs lacks, V(fail) before
        anything has changed, or V(drop) it and say so.
    type: str
    choices: [fail, drop]
    default: fail
author:
  - vmfleet.cpr contributors (@vmfleet)
"""

EXAMPLES = r"""
- name: Start the new QEMU
  vmfleet.cpr.dest_launch:
    guests:
      - web1
      - web2
    qemu_binary: /opt/qemu-11.1/bin/qemu-system-x86_64
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
    earlier_run:
      description: >-
        What another run did to this guest last, where that is news; null otherwise. It is what a
        run that died could not report any more.
      type: str
      sample: >-
        The run before (2026-11-23 12:31:05 +0000): The guest went from QEMU 10.0.2 to 11.1.3 after a
        pause of 6.41 ms.
    launched:
      description: Whether a new QEMU waits for the guest, or would in check mode.
      type: bool
    deferred:
      description: >-
        Whether the host has memory for the guest's new QEMU only once others are done. Call the module again
        then; P(vmfleet.cpr.live_update#role) does.
      type: bool
error:
  description: The first failure, with the same keys as in RV(guests[].error).
  returned: failure
  type: dict
"""

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.vmfleet.cpr.plugins.module_utils.phases.launch import launch_all
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
            **mode_argument_spec(),
            when_refused={"type": "str", "choices": ["stop", "go-on"], "default": "stop"},
            **wishes_argument_spec(),
        ),
        supports_check_mode=True,
    )
    run(module, launch_all)


if __name__ == "__main__":
    main()
