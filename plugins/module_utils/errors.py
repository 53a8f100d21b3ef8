# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The one error of this collection. Private to the collection."""

from __future__ import annotations

import typing as t


class CprError(Exception):
    """A failure that a user can act on.

    :param code: what happened, as a word that programs can rely on (``monitor-busy``).
    :param message: what happened, as a sentence.
    :param hint: what to do next, as a sentence.
    :param guest: the guest's name; the runner fills it in where it is not given.
    :param phase: the phase that failed; the runner fills it in where it is not given.
    :param qemu_class: QEMU's own error class, where QEMU reported the failure.
    :param qemu_description: QEMU's own words, where QEMU reported the failure.
    """

    def __init__(
        self,
        code: str,
        message: str,
        hint: str = "",
        guest: str | None = None,
        phase: str | None = None,
        qemu_class: str | None = None,
        qemu_description: str | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.hint = hint
        self.guest = guest
        self.phase = phase
        self.qemu_class = qemu_class
        self.qemu_description = qemu_description

    def __str__(self) -> str:
        """The sentence a user reads: whose failure, what, what next, and the code."""
        whose = f"{self.guest}: " if self.guest else ""
        hint = f" {self.hint}" if self.hint else ""
        return f"{whose}{self.message}{hint} [{self.code}]"

    def as_dict(self) -> dict[str, t.Any]:
        """The failure as the data that a module returns."""
        return {
            "code": self.code,
            "message": self.message,
            "hint": self.hint,
            "guest": self.guest,
            "phase": self.phase,
            "qemu_class": self.qemu_class,
            "qemu_description": self.qemu_description,
        }
