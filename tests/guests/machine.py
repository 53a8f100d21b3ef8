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
import zlib

from tests.guests.guest import CACHE, command_line_of, is_alive, wait_until

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

    All that is known of it lies there, so that it can be found again, and ended, by another process than
    the one that started it.

    :param shared: a directory that it sees at the same path.
    """

    def __init__(self, name: str, shared: pathlib.Path) -> None:
        self.name = name
        self.shared = shared
        # No other checkout has one of that name, and nobody but this directory's owner ends it.
        self._unique_name = f"{name}-{zlib.crc32(str(shared).encode()):08x}"
        self._pid_file = shared / f"{name}.pid"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> Machine:
        """Boot it, detached, and wait until systemd is up."""
        assert not self.pid(), f"{self.name} runs already"
        self.shared.mkdir(parents=True, exist_ok=True)
        log = open(self._log, "wb")
        self._process = subprocess.Popen(
            [
                "unshare", "-m", "--propagation", "private", "sh", "-c", _BOOT, "sh", self._unique_name,
                str(CACHE / "machine" / "nspawn"), "-q", "-D", str(CACHE / "machine" / "root"),
                "-M", self._unique_name, f"--hostname={self.name}",
                "--register=no", "--keep-unit", "--link-journal=no", "--console=pipe",
                # Several have the same root: what one writes is its own, and it is to take no lock.
                "--volatile=overlay", "--read-only",
                "--private-network", f"--bind={self.shared}", f"--bind-ro={CACHE}",
                *(["--bind=/dev/kvm"] if os.path.exists("/dev/kvm") else []), "-b",
            ],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
        log.close()
        self._pid_file.write_text(f"{self._process.pid}\n", encoding="utf-8")
        wait_until(self._has_booted, "the machine's systemd answers")
        # "degraded" is up too, and has the exit status 1.
        self.run("systemctl", "is-system-running", "--wait", check=False)
        return self

    @property
    def _log(self) -> pathlib.Path:
        return self.shared / f"{self.name}.log"

    def pid(self) -> int:
        """Its systemd-nspawn, 0 if it is off."""
        try:
            pid = int(self._pid_file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return 0
        # The file outlives one that was killed, and its number may be another's by then.
        return pid if self._unique_name in command_line_of(pid) and is_alive(pid) else 0

    @property
    def leader(self) -> int:
        """The pid on this machine of its systemd, 0 if there is none."""
        pid = self.pid()
        with contextlib.suppress(OSError, IndexError):
            return int(pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="utf-8").split()[0])
        return 0

    def address(self) -> str:
        """The path that leads to its SSH, as root, with the key ``.cache/machine/id_ed25519``."""
        return f"/proc/{self.leader}/root/run/ssh-unix-local/socket"

    def _has_booted(self) -> bool:
        assert self._process is not None
        if self._process.poll() is not None:
            raise RuntimeError(self._log.read_text(encoding="utf-8", errors="replace"))
        leader = self.leader
        return bool(leader) and pathlib.Path(f"/proc/{leader}/root/run/systemd/private").exists()

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
        pid, leader = self.pid(), self.leader
        if leader:
            with contextlib.suppress(ProcessLookupError):
                os.kill(leader, signal.SIGRTMIN + 4)  # systemd's poweroff
        try:
            wait_until(lambda: not self.pid(), f"{self.name} is off", patience=30)
        except TimeoutError:
            for number in filter(None, (leader, pid)):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(number, signal.SIGKILL)
        if self._process:
            self._process.wait()
            self._process = None
        wait_until(lambda: not any(map(is_alive, filter(None, (leader, pid)))), f"{self.name} is gone")
        with tempfile.TemporaryDirectory() as view:
            command = ["unshare", "-m", "--propagation", "private", "sh", "-c", _CLEAN, "sh", view, self._unique_name]
            subprocess.run(command, check=False)
        with contextlib.suppress(OSError):
            os.rmdir(f"/run/systemd/nspawn/propagate/{self._unique_name}")
        self._pid_file.unlink(missing_ok=True)
