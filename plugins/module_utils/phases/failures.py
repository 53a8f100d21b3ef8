# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The failures that several phases tell in the same words.

Private to the collection.
"""

from __future__ import annotations

from ansible_collections.vmfleet.cpr.plugins.module_utils import command_line, launcher, process
from ansible_collections.vmfleet.cpr.plugins.module_utils.errors import CprError
from ansible_collections.vmfleet.cpr.plugins.module_utils.journal import Qemu, Update


def last_words(update: Update) -> str:
    """The end of the new QEMU's standard error, secrets hidden."""
    text = launcher.last_words(update.log)
    try:
        # Both QEMUs have the same secrets, and the old one still is there to be read.
        hidden = command_line.secrets(process.read(update.old.pid).options) if update.old else set()
    except (OSError, CprError):
        return "(not shown: the secrets in it can't be told any more)" if text else ""
    return command_line.mask(text, hidden)


def new_qemu_exited(update: Update) -> CprError:
    """The new QEMU ended before the guest was on it."""
    words = last_words(update)
    return CprError(
        "new-qemu-exited",
        f"The new QEMU exited. Its last words: {words or '(none)'}",
        "The guest runs on as before. Make the new QEMU accept this guest's devices and files, then run again.",
        qemu_description=words or None,
    )


def old_qemu_gone(update: Update) -> CprError:
    """The old QEMU ended, by itself or by somebody's hand, while the guest was on it."""
    return CprError(
        "old-qemu-gone",
        f"The old QEMU (process {update.old.pid if update.old else '?'}) exited while the guest was on it:"
        " the guest is down, and its state is gone with it.",
        "Start the guest anew; its disks are as after a power cut.",
    )


def new_qemu_gone(update: Update) -> CprError:
    """The new QEMU ended after the guest had gone on in it."""
    old, new = both(update)
    return CprError(
        "new-qemu-gone",
        f"The guest was told to go on in the new QEMU (process {new.pid}), which has exited since: the guest is down.",
        f"The old QEMU (process {old.pid}), if it still is there, must not be continued: end it and start the guest"
        " anew.",
        qemu_description=last_words(update) or None,
    )


def wrong_phase(update: Update, wanted: str, module: str) -> CprError:
    """The guest's update is not where this phase begins."""
    return CprError(
        "wrong-phase",
        f"The guest's update is in the phase {update.phase or 'none'}, and this one needs {wanted}.",
        f"Run vmfleet.cpr.{module} first.",
    )


def both(update: Update) -> tuple[Qemu, Qemu]:
    """The old and the new QEMU of an update that has begun."""
    if update.old is None or update.new is None:
        raise wrong_phase(update, "launched", "dest_launch")
    return update.old, update.new
