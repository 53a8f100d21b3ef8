# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Runs the module qemu_binary_info with qemu.qmp at hand."""

from __future__ import annotations

from ansible_collections.vmfleet.cpr.plugins.plugin_utils.qmp_action import QmpAction


class ActionModule(QmpAction):
    """The control node's side of qemu_binary_info."""
