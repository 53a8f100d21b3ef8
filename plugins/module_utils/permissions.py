# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Owner and mode of what one QEMU has bound and another one binds anew: whoever started it may have let others in.

Private to the collection.
"""

from __future__ import annotations

import contextlib
import os
import stat
import typing as t

# Path, owner, group and mode.
Permission = t.Tuple[str, int, int, int]


def read(paths: t.Iterable[str]) -> list[Permission]:
    """Those of the files that are there."""
    found = []
    for path in paths:
        with contextlib.suppress(OSError):
            status = os.stat(path)
            found.append((path, status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)))
    return found


def put_back(permissions: t.Iterable[Permission]) -> None:
    """Give the files that are there what they had."""
    for path, owner, group, mode in permissions:
        with contextlib.suppress(OSError):
            os.chown(path, owner, group)
            os.chmod(path, mode)
