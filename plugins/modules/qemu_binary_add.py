#!/usr/bin/python
# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: qemu_binary_add
short_description: Put a version of QEMU beside the others of a hypervisor
version_added: 1.0.0
description:
  - Unpacks packages or an archive into a directory of its own, or copies what the host's packages have installed.
    It is made aside, started once without a machine, and then renamed, so that a version is whole or not there.
  - Nothing else on the host changes, except for O(installed), and no guest is touched.
extends_documentation_fragment:
  - vmfleet.cpr.store
  - vmfleet.cpr.attributes
attributes:
  check_mode:
    support: full
  diff_mode:
    support: none
  idempotent:
    support: full
options:
  version:
    description:
      - The name of its directory. With O(installed) it is the build's own.
    type: str
  packages:
    description:
      - Paths on the host of C(.deb) or C(.rpm) files, or of directories with such.
      - They are not installed. What they have below C(/usr) is unpacked over one another. Programs of other packages
        than QEMU's, and what would have to be elsewhere, is left out.
      - QEMU then uses the libraries among them, the C library too if it is among them, and for the rest the host's.
    type: list
    elements: path
  archive:
    description:
      - The path on the host of an archive that GNU tar can read, which holds one C(bin/)O(emulator) somewhere. What is
        beside C(bin) becomes the version.
    type: path
  checksum:
    description:
      - The archive's checksum, as V(sha256:) and its digits; sha384 and sha512 work too.
    type: str
  installed:
    description:
      - The path of an emulator of the host's packages. A copy of it is made with its modules, firmware and option
        ROMs; its libraries stay those of the host.
      - Modules that running guests of this build may still load, and that no script of the packages keeps for them,
        are copied to where QEMU looks for them after an upgrade, below C(/run/qemu). QEMU 10.0 finds there
        only what the new build has no module of that name for, so guests of this build are warned about.
    type: path
  described_as:
    description:
      - What to compare with on the next run instead of the paths in O(packages).
    type: list
    elements: str
    default: []
  only_plan:
    description:
      - Whether the archive, or further packages, are not there yet. Then what can be told without them is checked, and
        nothing is made.
    type: bool
    default: false
author:
  - vmfleet.cpr contributors (@vmfleet)
"""

EXAMPLES = r"""
- name: Unpack a build of one's own beside the others
  vmfleet.cpr.qemu_binary_add:
    version: 11.1.3-own2
    archive: /var/tmp/qemu-11.1.3-own2.tar.gz
    checksum: sha256:5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03

- name: Keep a copy of what is installed
  vmfleet.cpr.qemu_binary_add:
    installed: /usr/bin/qemu-system-x86_64
"""

RETURN = r"""
present:
  description: Whether it was there already.
  returned: success
  type: bool
path:
  description: Its directory.
  returned: success
  type: str
  sample: /opt/qemu/11.1.3
binary:
  description: Its emulator.
  returned: success
  type: str
  sample: /opt/qemu/11.1.3/bin/qemu-system-x86_64
modules:
  description: The modules that were kept for running guests.
  returned: success
  type: list
  elements: str
  sample: [hw-display-virtio-gpu.so]
endangered:
  description: >-
    With O(installed) the running guests of that build, which an upgrade in place leaves without most of their modules.
    QEMU 10.0 aborts when it is made to load one then.
  returned: success
  type: list
  elements: str
  sample: [web1]
message:
  description: What was done, in a sentence.
  returned: success
  type: str
error:
  description: >-
    Why it failed. Has the keys C(code), C(message), C(hint), C(guest), C(phase), C(qemu_class) and
    C(qemu_description).
  returned: failure
  type: dict
"""

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.vmfleet.cpr.plugins.module_utils.qemu_task import add, argument_spec, run


def main() -> None:
    module = AnsibleModule(
        argument_spec=argument_spec(
            version={"type": "str"},
            packages={"type": "list", "elements": "path"},
            archive={"type": "path"},
            checksum={"type": "str"},
            installed={"type": "path"},
            described_as={"type": "list", "elements": "str", "default": []},
            only_plan={"type": "bool", "default": False},
        ),
        mutually_exclusive=[("packages", "archive", "installed")],
        required_one_of=[("packages", "archive", "installed")],
        required_by={"archive": ("checksum", "version"), "packages": ("version",)},
        supports_check_mode=True,
    )
    run(module, add)


if __name__ == "__main__":
    main()
