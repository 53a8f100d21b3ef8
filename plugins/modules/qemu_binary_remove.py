#!/usr/bin/python
# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: qemu_binary_remove
short_description: Remove the versions of QEMU that nobody needs any more
version_added: 1.0.0
description:
  - Removes those that M(vmfleet.cpr.qemu_binary_info) calls removable, and what half-made ones have left.
  - A version goes only if this collection has made it, it is not the default of any emulator, no process runs, maps or
    has open a file of it, no unit and no update record names it, and O(keep) later ones like it are there.
  - With them go modules that were kept for guests below C(/run/qemu), once no process runs their build.
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
author:
  - vmfleet.cpr contributors (@vmfleet)
"""

EXAMPLES = r"""
- name: Keep nothing that nobody uses
  vmfleet.cpr.qemu_binary_remove:
    keep: 0
"""

RETURN = r"""
removed:
  description: The directories that were removed.
  returned: success
  type: list
  elements: str
  sample: [/opt/qemu/10.0.2]
kept:
  description: The versions that stay, each with C(name), C(path) and C(reason).
  returned: success
  type: list
  elements: dict
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
    keep_argument_spec,
    remove,
    run,
)


def main() -> None:
    module = AnsibleModule(argument_spec=argument_spec(**keep_argument_spec()), supports_check_mode=True)
    run(module, remove)


if __name__ == "__main__":
    main()
