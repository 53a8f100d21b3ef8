# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Connects ssh to a machine for tests: its ProxyCommand, with ProxyUseFdpass.

    connect.py FILE

The file says where the machine's SSH is now. It imports nothing of the tests, since it is in everybody's way.
"""

from __future__ import annotations

import pathlib
import socket
import sys


def main() -> None:
    """Connect, and hand the connection to ssh."""
    address = pathlib.Path(sys.argv[1]).read_text(encoding="utf-8").strip()
    if address.startswith("/"):
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(address)
    else:
        host, dummy, port = address.rpartition(":")
        connection = socket.create_connection((host, int(port)))
    with socket.socket(fileno=sys.stdout.fileno()) as ssh:
        socket.send_fds(ssh, [b"\0"], [connection.fileno()])
        ssh.detach()


if __name__ == "__main__":
    main()
