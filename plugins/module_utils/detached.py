# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Does work in a process that neither a hang-up nor the end of its caller can interrupt.

Private to the collection.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import traceback
import typing as t

from ansible_collections.vmfleet.cpr.plugins.module_utils.errors import CprError

# What a terminal, a session's end or an administrator sends to a process by the way.
_IGNORED = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGTSTP)

# How often the work is taken up again after its process was killed.
_ATTEMPTS = 2

Work = t.Callable[[t.Callable[[], bool]], t.Dict[str, t.Any]]


def run(work: Work) -> dict[str, t.Any]:
    """Do work in a process of its own session, and guard that process meanwhile.

    It is let go on if somebody stops it, and the work is taken up again, once, if somebody
    kills it; so the work must be able to find out how far it came. If the caller is killed
    instead, the work goes on to its next good point to end.

    :param work: gets a function that says whether the caller is gone; returns what JSON holds.
    :raises CprError: ``process-killed`` if it was killed each time.
    """
    for dummy in range(_ATTEMPTS):
        with open(os.memfd_create("result"), "rb") as result:
            status = _guard(_fork(work, result.fileno()))
            text = result.read()
        if text:
            return json.loads(text)
    raise CprError(
        "process-killed",
        f"The process that worked on the guests ended without a result ({_how_ended(status)}).",
        "Run again: that finds out how far each guest is, and finishes or undoes its update.",
    )


def _fork(work: Work, result: int) -> int:
    caller = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        os.setsid()
        for number in _IGNORED:
            signal.signal(number, signal.SIG_IGN)
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        # The caller's output stays open: whoever reads it sees its end only when this ends.
        text = json.dumps(work(lambda: os.getppid() != caller)).encode()
        with open(os.dup(result), "wb") as stream:
            stream.write(text)
        os.lseek(result, 0, os.SEEK_SET)  # the position is shared with the caller
        status = 0
    finally:
        if status:
            traceback.print_exc()
        # Nothing of the caller's own (its clean-up at exit, its buffers) is to be done twice.
        os._exit(status)


def _guard(pid: int) -> int:
    """Wait for its end; how it ended."""
    while True:
        dummy, status = os.waitpid(pid, os.WUNTRACED)
        if not os.WIFSTOPPED(status):
            return status
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def _how_ended(status: int) -> str:
    if os.WIFSIGNALED(status):
        return f"by signal {os.WTERMSIG(status)}"
    return f"with status {os.WEXITSTATUS(status)}"
