# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Starts the new QEMU in the surroundings of the old one, detached from whoever starts it.

Private to the collection.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
import types
import typing as t

from ansible_collections.vmfleet.cpr.plugins.module_utils import process
from ansible_collections.vmfleet.cpr.plugins.module_utils.errors import CprError
from ansible_collections.vmfleet.cpr.plugins.module_utils.surroundings import Surroundings


class Prepared:
    """A child that becomes a QEMU when it is told to, and ends when nobody can tell it any more.

    Its pid and start time stay the same, so they can be recorded before there is a QEMU. It
    gets a session of its own, so that no hang-up of the task's terminal reaches it. It is
    forked by hand, since neither subprocess nor asyncio leaves a child alone when it goes.

    :ivar identity: the process that the QEMU will be.
    """

    def __init__(
        self,
        binary: str,
        arguments: t.Sequence[str],
        surroundings: Surroundings,
        log: str,
        descriptors: t.Mapping[int, int] = types.MappingProxyType({}),
        *,
        ends_with_us: bool = False,
    ) -> None:
        """Fork.

        :param log: where its standard output and error go; appended to.
        :param descriptors: ours that it gets, by the numbers at which it gets them.
        :param ends_with_us: whether the kernel shall kill it when this process ends.
        """
        self._binary = binary
        waiting, self._go = os.pipe2(os.O_CLOEXEC)
        self._failure, failed = os.pipe2(os.O_CLOEXEC)
        self._pid = os.fork()
        if self._pid == 0:
            try:
                os.close(self._go)
                if not os.read(waiting, 1):  # whoever forked us is gone
                    os._exit(0)
                # Out of the way of the numbers that it gets.
                beyond = max([2, *descriptors]) + 1
                failed = fcntl.fcntl(failed, fcntl.F_DUPFD_CLOEXEC, beyond)
                kept = {
                    number: fcntl.fcntl(ours, fcntl.F_DUPFD_CLOEXEC, beyond) for number, ours in descriptors.items()
                }
                _redirect(log)
                for number, ours in kept.items():
                    os.dup2(ours, number)
                surroundings.enter()
                if ends_with_us:  # only now: whoever becomes another user loses it (prctl(2))
                    process.end_with_parent()
                os.execve(binary, [binary, *arguments], surroundings.environment)
            except (OSError, ValueError) as error:
                os.write(failed, str(error).encode())
            finally:
                os._exit(127)
        os.close(waiting)
        os.close(failed)
        # Nobody else can reap it, so it is there.
        self.identity = process.identify(self._pid) or process.Identity(self._pid, 0)

    def start(self, timeout: float) -> None:
        """Let it become the QEMU, which outlives this task.

        From then on it is told by pid and start time, and its end is noticed by a pidfd: once
        this task has ended it is nobody's child.

        :param timeout: seconds until it must have.
        :raises CprError: ``launch-failed`` if it can't be started at all; ``new-qemu-silent``.
        """
        os.write(self._go, b"1")
        waiting = select.poll()
        waiting.register(self._failure, select.POLLIN)
        if not waiting.poll(timeout * 1000):
            raise CprError(
                "new-qemu-silent",
                f"The process that was to become the new QEMU did not within {timeout:g} s.",
                "Was it stopped by a signal, or does the host's storage hang? See that, and run again.",
            )
        # Its end comes when exec closes the other side; what is written is short and comes at once.
        failure = os.read(self._failure, 4096).decode(errors="replace")
        if failure:
            raise CprError(
                "launch-failed",
                f"{self._binary} could not be started like the running QEMU: {failure}.",
                "Run the task as root (become), so that it may take over the guest's user, limits and cgroup.",
            )

    def __enter__(self) -> Prepared:
        return self

    def __exit__(self, kind: object, *dummy: object) -> None:
        os.close(self._go)
        os.close(self._failure)
        if kind is not None:
            os.kill(self._pid, signal.SIGKILL)  # it may be stopped; until it is waited for the pid is its own
            os.waitpid(self._pid, 0)


def _redirect(log: str) -> None:
    nothing = os.open(os.devnull, os.O_RDONLY)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for source, target in ((nothing, 0), (output, 1), (output, 2)):
        os.dup2(source, target)
    for name in os.listdir(f"{process.PROC}/self/fd"):
        if int(name) > 2:
            with contextlib.suppress(OSError):  # the one that listed them
                os.set_inheritable(int(name), False)
    for number in (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGHUP):  # ignored here, and exec keeps that
        signal.signal(number, signal.SIG_DFL)


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
