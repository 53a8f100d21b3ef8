# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The guests of a host: which process runs which guest.

Private to the collection.
"""

from __future__ import annotations

import typing as t

from ansible_collections.vmfleet.cpr.plugins.module_utils import command_line, new_command_line
from ansible_collections.vmfleet.cpr.plugins.module_utils.errors import CprError
from ansible_collections.vmfleet.cpr.plugins.module_utils.journal import (
    COMMITTED,
    OF_A_CHECKPOINT,
    RESTORED,
    Journal,
    Update,
)
from ansible_collections.vmfleet.cpr.plugins.module_utils.monitor import Monitor
from ansible_collections.vmfleet.cpr.plugins.module_utils.process import QemuProcess


def name_of(process: QemuProcess) -> str | None:
    """The guest's name, or None where it has none or its command line can't be read."""
    try:
        return command_line.guest_name(process.options)
    except CprError:
        # An option that we don't know; the name itself is still easy to see.
        words = process.arguments
        names = [words[i + 1] for i, word in enumerate(words[:-1]) if word in ("-name", "--name")]
        return command_line.guest_name([command_line.Option("-name", name) for name in names])


def by_name(processes: t.Iterable[QemuProcess], journal: Journal) -> dict[str | None, list[QemuProcess]]:
    """The processes by their guests' names.

    During an update two processes have one guest's name; the one that does not run it is
    left out.
    """
    found: dict[str | None, list[QemuProcess]] = {}
    for process in processes:
        found.setdefault(name_of(process), []).append(process)
    for name, several in found.items():
        if name is not None and len(several) > 1:
            idle = _idle(journal.load(name))
            found[name] = [process for process in several if process.identity != idle] or several
    return found


def _idle(update: Update | None) -> t.Any:
    """The process of an update that does not run the guest."""
    if update is None or update.phase in (*OF_A_CHECKPOINT, RESTORED):
        return None  # only one process has it
    if update.old and update.new and update.old.identity == update.new.identity:
        return None
    qemu = update.old if update.phase in COMMITTED else update.new
    return qemu.identity if qemu else None


def unnamed(qemu: QemuProcess) -> CprError:
    """Why nothing can be done with a QEMU that has no name."""
    return CprError(
        "guest-unnamed",
        f"The QEMU of process {qemu.identity.pid} has no -name, and nothing can be done with it.",
        "Give it a -name when it next starts.",
    )


def select(
    wanted: t.Sequence[str], found: t.Mapping[str | None, list[QemuProcess]]
) -> tuple[t.Sequence[str], dict[str, QemuProcess]]:
    """These guests, or all that have a name if none is given, and their processes.

    :raises CprError: ``guest-not-found`` or ``guest-ambiguous`` with all that are wrong.
    """
    names = wanted or sorted(name for name in found if name)
    missing = [name for name in names if name not in found]
    if missing:
        known = sorted(name for name in found if name)
        raise CprError(
            "guest-not-found",
            f"No QEMU on this host runs a guest named {', '.join(missing)}.",
            f"The guests that run here: {', '.join(known) or 'none'}.",
        )
    for name in names:
        if len(found[name]) > 1:
            pids = ", ".join(str(process.identity.pid) for process in found[name])
            raise CprError(
                "guest-ambiguous",
                f"More than one QEMU on this host runs a guest named {name} (processes {pids}).",
                "Give every guest a -name of its own.",
            )
    return names, {name: found[name][0] for name in names}


async def open_monitor(process: QemuProcess) -> Monitor:
    """Connect to a guest's QMP monitor, the first of its command line that answers.

    :raises CprError: ``no-monitor`` if it has none at a UNIX socket; else as `Monitor.connect`.
    """
    paths = new_command_line.qmp_paths(process.options)
    if not paths:
        raise CprError(
            "no-monitor",
            "The guest's command line has no QMP monitor at a UNIX socket.",
            "It would need: -qmp unix:/run/NAME.qmp,server=on,wait=off.",
        )
    failure = None
    for path in paths:
        try:
            return await Monitor.connect(process.path(path), pid=process.identity.pid)
        except CprError as error:
            # That another client holds one says more than that another one is gone.
            failure = error if failure is None or error.code == "monitor-busy" else failure
    raise failure or CprError("no-monitor", "The guest has no QMP monitor.")
