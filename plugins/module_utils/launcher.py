# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Starts the new QEMU in the surroundings of the old one, detached from whoever starts it.

Private to the collection.
"""

from __future__ import annotations

import os
import resource
import subprocess
import typing as t

from ansible_collections.vmfleet.cpr.plugins.module_utils import process
from ansible_collections.vmfleet.cpr.plugins.module_utils.errors import CprError


def start(binary: str, arguments: t.Sequence[str], surroundings: process.Surroundings, log: str) -> process.Identity:
    """Start a QEMU that outlives this task.

    It gets a session of its own, so that no hang-up of the task's terminal reaches it.

    :param log: where its standard output and error go; appended to.
    :raises CprError: ``launch-failed`` if it can't be started at all.
    """
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)

    def enter_surroundings() -> None:
        # In the child, before exec. Raising limits and joining a cgroup need the privileges
        # that the last lines give up.
        os.setsid()
        for path in surroundings.cgroups:
            with open(path, "w", encoding="ascii") as stream:
                stream.write("0")
        for number, pair in surroundings.limits.items():
            resource.setrlimit(number, pair)
        os.setpriority(os.PRIO_PROCESS, 0, surroundings.nice)
        with open(f"{process.PROC}/self/oom_score_adj", "w", encoding="ascii") as stream:
            stream.write(str(surroundings.out_of_memory_score))
        os.umask(surroundings.umask)
        if os.geteuid() == 0:
            os.setgroups(surroundings.groups)
            os.setresgid(surroundings.group, surroundings.group, surroundings.group)
            os.setresuid(surroundings.user, surroundings.user, surroundings.user)

    try:
        child = subprocess.Popen(
            [binary, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=descriptor,
            stderr=descriptor,
            cwd=surroundings.working_directory,
            env=surroundings.environment,
            preexec_fn=enter_surroundings,
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise CprError(
            "launch-failed",
            f"{binary} could not be started like the running QEMU: {error}.",
            "Run the task as root (become), so that it may take over the guest's user, limits and cgroup.",
        ) from error
    finally:
        os.close(descriptor)
    identity = process.identify(child.pid)
    # It is nobody's child once this task has ended; its end is noticed by a pidfd.
    child.returncode = 0
    return identity or process.Identity(child.pid, 0)


def last_words(log: str, lines: int = 5) -> str:
    """The end of what a QEMU wrote to its standard error, or an empty string."""
    try:
        with open(log, "rb") as stream:
            stream.seek(0, os.SEEK_END)
            stream.seek(max(0, stream.tell() - 4096))
            text = stream.read().decode(errors="replace")
    except OSError:
        return ""
    return "\n".join(text.strip().splitlines()[-lines:])
