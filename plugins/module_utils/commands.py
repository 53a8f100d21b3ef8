# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Runs a command of the host: iproute2, systemctl.

Private to the collection.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import typing as t

from ansible_collections.vmfleet.cpr.plugins.module_utils.errors import CprError

# Seconds; all that are used here answer at once.
TIMEOUT = 20.0


async def run(*words: str, timeout: float = TIMEOUT, of_user: bool = False) -> str:
    """Run a command; what it prints.

    :param timeout: seconds until it must have ended.
    :param of_user: whether it is one of the user's, which may start others: all of them are ended
        when it takes too long, and no signal is ignored in them.
    :raises CprError: ``command-failed`` with what it said.
    """
    # A task may run with a path that lacks where these commands are (cron, sudo).
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/bin:/sbin:/bin"
    pipe = asyncio.subprocess.PIPE
    try:
        child = await asyncio.create_subprocess_exec(
            *words,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=pipe,
            stderr=pipe,
            env={**os.environ, "LC_ALL": "C", "PATH": path},
            start_new_session=of_user,
            preexec_fn=_hear_signals if of_user else None,
        )
    except OSError as error:
        raise _failed(words, error.strerror or str(error)) from error
    try:
        output, errors = await asyncio.wait_for(child.communicate(), timeout)
    except asyncio.TimeoutError:
        with contextlib.suppress(ProcessLookupError):
            (os.killpg if of_user else os.kill)(child.pid, signal.SIGKILL)
        raise _failed(words, f"it did not end within {timeout:g} s") from None
    if child.returncode:
        raise _failed(words, errors.decode(errors="replace").strip() or f"exit status {child.returncode}")
    return output.decode(errors="replace")


def _hear_signals() -> None:
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGPIPE):
        signal.signal(number, signal.SIG_DFL)


def _failed(words: t.Sequence[str], why: str) -> CprError:
    return CprError(
        "command-failed",
        f"`{' '.join(words)}` failed: {why}.",
        "See whether it works on this host by hand, as root.",
    )
