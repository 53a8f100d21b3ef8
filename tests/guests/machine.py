# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A machine with a real systemd, in systemd-nspawn."""

from __future__ import annotations

import contextlib
import os
import pathlib
import signal
import subprocess
import tempfile

from tests.guests.guest import CACHE, is_alive, wait_until

# Its own view of cgroup2, since this machine may have version 1, and a cgroup of its own in it.
_BOOT = """
set -e
name=$1
shift
mount -t cgroup2 none /sys/fs/cgroup
mkdir -p "/sys/fs/cgroup/$name"
echo 0 >"/sys/fs/cgroup/$name/cgroup.procs"
exec "$@"
"""
_CLEAN = 'mount -t cgroup2 none "$1" && { [ ! -d "$1/$2" ] || find "$1/$2" -depth -type d -exec rmdir {} \\; ; }'
_ENVIRONMENT = ["env", "-i", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", "LANG=C.UTF-8"]


class Machine:
    """A machine of its own. What it writes goes with it, but for the shared directory.

    :param shared: a directory that it sees at the same path.
    """

    def __init__(self, name: str, shared: pathlib.Path) -> None:
        self.name = f"{name}-{os.getpid()}"
        self.shared = shared
        self._process: subprocess.Popen[bytes] | None = None
        self.leader = 0

    def start(self) -> Machine:
        """Boot it, and wait until systemd is up."""
        log = open(self.shared / f"{self.name}.log", "wb")
        self._process = subprocess.Popen(
            [
                "unshare", "-m", "--propagation", "private", "sh", "-c", _BOOT, "sh", self.name,
                str(CACHE / "machine" / "nspawn"), "-q", "-D", str(CACHE / "machine" / "root"), "-M", self.name,
                "--register=no", "--keep-unit", "--link-journal=no", "--console=pipe", "--volatile=overlay",
                "--private-network", f"--bind={self.shared}", f"--bind-ro={CACHE}", "-b",
            ],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
        log.close()
        self.leader = wait_until(self._find_leader, "the machine's systemd answers")
        # "degraded" is up too, and has the exit status 1.
        self.run("systemctl", "is-system-running", "--wait", check=False)
        return self

    def _find_leader(self) -> int:
        assert self._process is not None
        if self._process.poll() is not None:
            raise RuntimeError((self.shared / f"{self.name}.log").read_text(errors="replace"))
        pid = self._process.pid
        with contextlib.suppress(OSError, IndexError):
            leader = int(pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])
            if pathlib.Path(f"/proc/{leader}/root/run/systemd/private").exists():
                return leader
        return 0

    def run(self, *words: str, check: bool = True) -> str:
        """Run a command in it; what it prints."""
        command = ["nsenter", "-t", str(self.leader), "-a", *_ENVIRONMENT, *words]
        done = subprocess.run(
            command, check=False, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            timeout=120,
        )  # fmt: skip
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(words)}: {done.stdout}")
        return done.stdout

    def show(self, unit: str) -> dict[str, str]:
        """What systemd says of a unit."""
        text = self.run("systemctl", "show", unit)
        return dict(line.split("=", 1) for line in text.splitlines() if "=" in line)

    def python(self) -> str:
        """The path of an interpreter for Ansible's modules, which runs in the machine as a login would."""
        path = self.shared / f"{self.name}-python"
        words = ["nsenter", "-t", str(self.leader), "-a", *_ENVIRONMENT]
        words += ["systemd-run", "--scope", "--quiet", "--collect", "/usr/bin/python3"]
        path.write_text(f'#!/bin/sh\nexec {" ".join(words)} "$@"\n')
        path.chmod(0o755)
        return str(path)

    def process(self, pid: int) -> int:
        """The pid on this machine of a process of that one."""
        for entry in map(int, filter(str.isdigit, os.listdir("/proc"))):
            with contextlib.suppress(OSError):
                status = pathlib.Path(f"/proc/{entry}/status").read_text()
                numbers = next(line.split()[1:] for line in status.splitlines() if line.startswith("NSpid:"))
                same = os.readlink(f"/proc/{entry}/ns/pid") == os.readlink(f"/proc/{self.leader}/ns/pid")
                if same and numbers[-1] == str(pid):
                    return entry
        raise ProcessLookupError(pid)

    def stop(self) -> None:
        """Switch it off, and leave nothing behind."""
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            if self.leader:
                os.kill(self.leader, signal.SIGRTMIN + 4)  # systemd's poweroff
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            for pid in filter(None, (self.leader, self._process.pid)):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self._process.wait()
        if self.leader:
            wait_until(lambda: not is_alive(self.leader), "the machine is gone")
        with tempfile.TemporaryDirectory() as view:
            command = ["unshare", "-m", "--propagation", "private", "sh", "-c", _CLEAN, "sh", view, self.name]
            subprocess.run(command, check=False)
        with contextlib.suppress(OSError):
            os.rmdir(f"/run/systemd/nspawn/propagate/{self.name}")
