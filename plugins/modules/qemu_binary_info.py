#!/usr/bin/python
# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: qemu_binary_info
short_description: See which versions of QEMU a hypervisor has and who uses them
version_added: 1.0.0
description:
  - Finds the versions that lie side by side in a directory, what uses or names each, which may be removed and why
    the others not, what new guests get, and which running guests run something else.
  - No guest is asked. For the version that it runs, its binary is, if root or whoever runs the task owns that.
  - The host is as before.
extends_documentation_fragment:
  - vmfleet.cpr.store
  - vmfleet.cpr.store.keep
  - vmfleet.cpr.attributes
attributes:
  check_mode:
    support: full
  diff_mode:
    support: none
  idempotent:
    support: full
options:
  qemu_binary:
    description:
      - A QEMU binary on the host to ask for its version. It is started once, without a machine.
    type: path
seealso:
  - module: vmfleet.cpr.guest_info
author:
  - vmfleet.cpr contributors (@vmfleet)
"""

EXAMPLES = r"""
- name: See what there is
  vmfleet.cpr.qemu_binary_info:
  register: found

- name: Name the guests that still run something else than new guests get
  ansible.builtin.debug:
    msg: "{{ found.guests | selectattr('elsewhere') | map(attribute='name') }}"
"""

RETURN = r"""
versions:
  description: The versions in the directory, by name.
  returned: success
  type: list
  elements: dict
  contains:
    name:
      description: The name of its directory.
      type: str
      sample: 11.1.3
    path:
      description: Its directory.
      type: str
      sample: /opt/qemu/11.1.3
    binary:
      description: Its emulator.
      type: str
      sample: /opt/qemu/11.1.3/bin/qemu-system-x86_64
    version:
      description: What the emulator said when it was made, or null if this collection has not made it.
      type: str
      sample: 11.1.3
    complete:
      description: Whether all of it is there.
      type: bool
    used_by:
      description: The processes that run, map or have open a file of it, deleted ones too.
      type: list
      elements: str
      sample: [guest web1 (process 4711)]
    named_by:
      description: The files that name it, of systemd units, of libvirt's machines, and records of updates under way.
      type: list
      elements: str
      sample: [/etc/systemd/system/guest@.service]
    removable:
      description: Whether nobody needs it.
      type: bool
    reason:
      description: Why it may be removed, or why not, as half a sentence.
      type: str
      sample: it is the default for new guests
default:
  description: What new guests get, or null.
  returned: success
  type: str
  sample: /opt/qemu/11.1.3/bin/qemu-system-x86_64
default_link:
  description: The link by which they get it.
  returned: success
  type: str
  sample: /opt/qemu/bin/qemu-system-x86_64
guests:
  description: The running guests, by name.
  returned: success
  type: list
  elements: dict
  contains:
    name:
      description: The guest's name, or its process if it has none.
      type: str
      sample: web1
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
    version:
      description: The version of the running QEMU, or null if its binary can't be asked.
      type: str
      sample: 10.0.2
    runs:
      description: What it runs, in a few words.
      type: str
      sample: QEMU 10.0.2 from /usr/bin/qemu-system-x86_64, where another one is by now
    elsewhere:
      description: Whether it runs something else than the default.
      type: bool
binary:
  description: The binary that was asked, with C(path), C(real_path) (links followed) and C(version).
  returned: if O(qemu_binary) is given
  type: dict
error:
  description: >-
    Why it failed. Has the keys C(code), C(message), C(hint), C(guest), C(phase), C(qemu_class) and
    C(qemu_description).
  returned: failure
  type: dict
"""

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.vmfleet.cpr.plugins.module_utils.qemu_task import (
    argument_spec,
    inform,
    keep_argument_spec,
    run,
)


def main() -> None:
    module = AnsibleModule(
        argument_spec=argument_spec(**keep_argument_spec(), qemu_binary={"type": "path"}),
        supports_check_mode=True,
    )
    run(module, inform)


if __name__ == "__main__":
    main()
