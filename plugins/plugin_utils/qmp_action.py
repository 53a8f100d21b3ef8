# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Sends the control node's qemu.qmp along with every module of this collection.

A hypervisor often reaches no package index, and few distributions have a package. The
library is pure Python without dependencies and small. Private to the collection.
"""

from __future__ import annotations

import base64
import functools
import importlib.util
import io
import pathlib
import typing as t
import zipfile

from ansible.plugins.action import ActionBase

# GPL-2.0-only, which this collection must not hand on; nothing that is used here needs it, nor
# the programs for a terminal.
_LEFT_OUT = ("legacy.py", "qmp_shell.py", "qmp_tui.py")


@functools.cache
def qmp_archive() -> str | None:
    """The control node's qemu.qmp as a zip file in base64, or None if it has none."""
    try:
        specification = importlib.util.find_spec("qemu.qmp")
    except ImportError:
        specification = None
    if specification is None or specification.origin is None:
        return None
    package = pathlib.Path(specification.origin).parent
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as stream:
        # Before Python 3.13 a namespace package in a zip file needs an entry for its directory.
        stream.writestr("qemu/", "")
        for path in sorted(package.glob("*.py")):
            if path.name not in _LEFT_OUT:
                stream.write(path, f"qemu/qmp/{path.name}")
    return base64.b64encode(archive.getvalue()).decode()


class QmpAction(ActionBase):
    """Runs the module of the task's own name, with the library among its arguments."""

    def run(self, tmp: str | None = None, task_vars: dict[str, t.Any] | None = None) -> dict[str, t.Any]:
        """Run the module on the host.

        :returns: what the module returned.
        """
        result = super().run(tmp, task_vars)
        arguments = {**self._task.args, "qmp_library": qmp_archive()}
        result.update(self._execute_module(module_args=arguments, task_vars=task_vars))
        return result
