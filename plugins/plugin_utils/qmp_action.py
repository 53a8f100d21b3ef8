# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The control node's side of every module of this collection.

It sends the control node's qemu.qmp along: a hypervisor often reaches no package index, and few
distributions have a package. The library is pure Python without dependencies and small. And it
says which run of Ansible the task belongs to, and which other runs have ended, which no
hypervisor can tell. Private to the collection.
"""

from __future__ import annotations

import base64
import functools
import importlib.util
import io
import os
import pathlib
import platform
import pwd
import typing as t
import zipfile

from ansible.plugins.action import ActionBase

from ansible_collections.vmfleet.cpr.plugins.module_utils import process

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


# Of ansible-playbook: it loads this before it forks a child for each task. A child that outlives it
# still belongs to its run.
_PROCESS = process.identify(os.getpid()) or process.Identity(os.getpid(), 0)


def this_run() -> dict[str, str]:
    """The run of Ansible that this task belongs to.

    :returns: its ``key``, for programs, and ``who`` it is, for people.
    """
    try:
        user = pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        user = f"user {os.getuid()}"  # in a container it need not have a name
    return {
        "key": f"{_control_node()} {_PROCESS.pid} {_PROCESS.start_time}",
        "who": f"process {_PROCESS.pid} of {user} on the control node {platform.node()}",
    }


def has_ended(key: str) -> bool:
    """Whether a run of this control node has ended; False also where this can't be told."""
    node, pid, start_time = key.rsplit(" ", 2)
    if node != _control_node():
        return False
    identity = process.identify(int(pid))
    if identity:
        return identity.start_time != int(start_time)
    try:
        os.kill(int(pid), 0)  # where there is no /proc
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return os.path.exists("/proc/self")  # it only waits to be reaped


def _control_node() -> str:
    """This host, and on it this container: a pid means nothing outside of it."""
    try:
        return f"{platform.node()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return platform.node()


class QmpAction(ActionBase):
    """Runs the module of the task's own name, with the library and the run among its arguments."""

    def run(self, tmp: str | None = None, task_vars: dict[str, t.Any] | None = None) -> dict[str, t.Any]:
        """Run the module on the host.

        :returns: what the module returned.
        """
        result = super().run(tmp, task_vars)
        arguments = {**self._task.args, "qmp_library": qmp_archive(), "run": this_run()}
        answer = self._execute_module(module_args=arguments, task_vars=task_vars)
        if "other_runs" in answer:
            arguments["ended_runs"] = [key for key in answer["other_runs"] if has_ended(key)]
            answer = self._execute_module(module_args=arguments, task_vars=task_vars)
        result.update(answer)
        return result
