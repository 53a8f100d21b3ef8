# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Makes qemu.qmp importable on a hypervisor that has no package of it.

Private to the collection.
"""

from __future__ import annotations

import base64
import importlib
import os
import sys

from ansible_collections.vmfleet.cpr.plugins.module_utils.errors import CprError


def make_available(archive: str | None, directory: str) -> None:
    """Use the system's qemu.qmp, else the one that came with the task.

    :param archive: the control node's copy, a zip file in base64.
    :param directory: where the archive may lie while the task runs.
    :raises CprError: ``qmp-library-missing`` if there is neither.
    """
    try:
        importlib.import_module("qemu.qmp")
        return
    except ImportError:
        if not archive:
            raise CprError(
                "qmp-library-missing",
                "The Python library qemu.qmp is neither on this host nor on the control node.",
                "Install it where ansible-playbook runs: pip install qemu.qmp.",
            ) from None
    path = os.path.join(directory, "qemu.qmp.zip")
    with open(path, "wb") as stream:
        stream.write(base64.b64decode(archive))
    sys.path.insert(0, path)
    importlib.import_module("qemu.qmp")
