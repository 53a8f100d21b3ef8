# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A hypervisor that is a virtual machine, with systemd, SSH and a KVM of its own: it can be rebooted."""

from __future__ import annotations

import contextlib
import os
import pathlib
import re
import shlex
import signal
import socket
import subprocess
import typing as t

from tests.guests.guest import CACHE, NEW_SUITE, Qmp, command_line_of, is_alive, qemu, wait_until

_PATIENCE = 300.0  # seconds, for a boot: 20 to 40 with two processors


class VirtualMachine:
    """A virtual machine in a directory of its own.

    All that is known of it lies there, so that it can be found again, and ended, by another process than
    the one that started it.

    :param memory: in MiB. This machine gives it as it is touched.
    """

    def __init__(self, name: str, directory: pathlib.Path, memory: int = 2048) -> None:
        self.name = name
        self.directory = directory
        self.memory = memory
        self._disk = directory / "disk.img"
        self._monitor = directory / "qmp.sock"
        self._pid_file = directory / "pid"
        self._child: subprocess.Popen[bytes] | None = None

    def start(self) -> VirtualMachine:
        """Switch it on, detached, and wait until it has booted.

        Its disk is a copy, which is kept: after `kill` this is what follows a power failure.
        """
        assert not self.pid(), f"{self.name} runs already"
        self.directory.mkdir(parents=True, exist_ok=True)
        base = CACHE / "virtual-machine" / "root.img"
        if not base.exists():
            raise FileNotFoundError(f"{base} is missing: run tests/environment/virtual_machine.sh")
        if not self._disk.exists():
            copy = self._disk.with_suffix(".new")
            subprocess.run(["cp", "--sparse=always", "--reflink=auto", str(base), str(copy)], check=True)
            copy.rename(self._disk)
        if _may_have_nested_kvm():
            try:
                self._boot(("-accel", "kvm", "-cpu", "host"), patience=90)
                return self
            except (RuntimeError, TimeoutError):
                self.kill()  # a KVM in name only
        # TCG emulates AMD's SVM, and so gives it a KVM where this machine has none to give.
        self._boot(("-accel", "tcg,thread=multi,tb-size=512", "-cpu", "max"), patience=_PATIENCE)
        return self

    def _boot(self, accelerator: t.Sequence[str], patience: float) -> None:
        for path in (self._monitor, self._pid_file):
            path.unlink(missing_ok=True)
        with open(self.directory / "stderr.log", "ab") as log:
            self._child = subprocess.Popen(
                [qemu(NEW_SUITE), *self._words(accelerator)],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, cwd=self.directory,
            )  # fmt: skip
        self._wait_for_boot("", patience)

    def _words(self, accelerator: t.Sequence[str]) -> list[str]:
        shared = CACHE / "virtual-machine" / "shared.img"
        kernel = f"root=/dev/nvme0n1 rw console=ttyS0 quiet mitigations=off net.ifnames=0 systemd.hostname={self.name}"
        return [
            "-name", self.name,
            "-machine", "q35", *accelerator, "-smp", "2",
            "-m", f"{self.memory}M", "-nodefaults", "-display", "none",
            "-kernel", str(CACHE / "virtual-machine" / "vmlinuz"), "-append", kernel,
            # The kernel has drivers for NVMe and ext4 built in, and so needs no initrd.
            "-blockdev", f"driver=file,filename={self._disk},node-name=file0,cache.no-flush=on",
            "-blockdev", "driver=raw,node-name=disk0,file=file0",
            "-device", "nvme,serial=disk0,drive=disk0",
            # A read-only namespace of NVMe does not look so to Linux, which then flushes it in vain.
            "-blockdev", f"driver=file,filename={shared},node-name=file1,read-only=on",
            "-blockdev", "driver=raw,node-name=disk1,file=file1,read-only=on",
            "-device", "virtio-blk-pci,drive=disk1",
            # The port is the kernel's choice: nobody else can take it in between.
            "-netdev", "user,id=net0,restrict=on,hostfwd=tcp:127.0.0.1:0-:22",
            "-device", "virtio-net-pci,netdev=net0,romfile=",
            "-device", "virtio-rng-pci",
            "-chardev", f"file,id=console,path={self.directory}/console.log,append=on", "-serial", "chardev:console",
            "-qmp", f"unix:{self._monitor},server=on,wait=off",
            "-pidfile", str(self._pid_file),
        ]  # fmt: skip

    def pid(self) -> int:
        """The QEMU that it runs on, 0 if it is off."""
        try:
            pid = int(self._pid_file.read_text())
        except (OSError, ValueError):
            return 0
        # The file outlives a QEMU that was killed, and its number may be another's by then.
        mine = any(f"filename={self._disk}," in word for word in command_line_of(pid))
        return pid if mine and is_alive(pid) else 0

    def port(self) -> int:
        """The port of 127.0.0.1 that leads to its SSH; another one after every `start`."""
        with Qmp(self._monitor) as monitor:
            text = monitor.execute("human-monitor-command", **{"command-line": "info usernet"})
        found = re.search(r"TCP\[HOST_FORWARD\]\s+\d+\s+127\.0\.0\.1\s+(\d+)", text)
        assert found, text
        return int(found.group(1))

    def address(self) -> str:
        """The address that leads to its SSH, as root, with the key ``.cache/virtual-machine/id_ed25519``."""
        return f"127.0.0.1:{self.port()}"

    def ssh_arguments(self) -> list[str]:
        """What ``ssh`` and ``scp`` need beside the address, which is ``root@127.0.0.1``."""
        return ["-i", str(_KEY), "-o", f"Port={self.port()}", *_OPTIONS]

    def inventory(self) -> dict[str, t.Any]:
        """The variables of its line in an Ansible inventory."""
        return {
            "ansible_host": "127.0.0.1",
            "ansible_port": self.port(),
            "ansible_user": "root",
            "ansible_ssh_private_key_file": str(_KEY),
            "ansible_ssh_common_args": shlex.join(_OPTIONS),
            "ansible_ssh_pipelining": True,
            # Looking for one takes as long as a task.
            "ansible_python_interpreter": "/usr/bin/python3",
        }

    def run(self, *words: str, check: bool = True, timeout: float = 300) -> str:
        """Run a command in it; what it prints."""
        done = self._ssh(*words, timeout=timeout)
        if check and done.returncode:
            raise RuntimeError(f"{shlex.join(words)}: {done.stdout}")
        return done.stdout

    def _ssh(self, *words: str, timeout: float) -> subprocess.CompletedProcess[str]:
        return _run("ssh", *self.ssh_arguments(), "root@127.0.0.1", shlex.join(words), timeout=timeout)

    def copy(self, local: str | os.PathLike[str], remote: str) -> None:
        """Copy a file or a directory into it."""
        done = _run("scp", "-r", *self.ssh_arguments(), os.fspath(local), f"root@127.0.0.1:{remote}", timeout=300)
        if done.returncode:
            raise RuntimeError(done.stdout)

    def boot_id(self) -> str:
        """What only a reboot changes; empty as long as it does not answer."""
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            # QEMU takes the connection long before the machine does; ssh would be slow to notice.
            with socket.create_connection(("127.0.0.1", self.port()), timeout=2) as probe:
                if not probe.recv(4):
                    return ""
            done = self._ssh("cat", "/proc/sys/kernel/random/boot_id", timeout=60)
            if not done.returncode:
                return done.stdout.strip()
        return ""

    def reboot(self) -> None:
        """Reboot it from inside, in order, and wait until it has booted anew."""
        before = self.boot_id()
        done = self._ssh("systemctl", "reboot", timeout=60)
        if done.returncode not in (0, 255):  # 255: the connection went down with it
            raise RuntimeError(f"{self.name} does not reboot: {done.stdout}")
        self._wait_for_boot(before)

    def _wait_for_boot(self, before: str, patience: float = _PATIENCE) -> None:
        def booted() -> bool:
            if self._child and self._child.poll() is not None:
                raise RuntimeError((self.directory / "stderr.log").read_text(encoding="utf-8", errors="replace"))
            return self.boot_id() not in ("", before)

        wait_until(booted, f"{self.name} answers", patience=patience)
        # "degraded" is up too, and has the exit status 1.
        self.run("systemctl", "is-system-running", "--wait", check=False, timeout=_PATIENCE)

    def kill(self) -> None:
        """Pull its plug."""
        pid = self.pid()
        if pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            wait_until(lambda: not is_alive(pid), f"{self.name} is off")
        if self._child:
            self._child.kill()  # it may not have come to write its number
            self._child.wait()
            self._child = None


_KEY = CACHE / "virtual-machine" / "id_ed25519"
# Every machine has the same key, at another port, and nobody but this machine reaches it.
_OPTIONS = [
    "-o", "IdentitiesOnly=yes", "-o", "BatchMode=yes", "-o", "StrictHostKeyChecking=no",
    "-o", "UserKnownHostsFile=/dev/null", "-o", "GlobalKnownHostsFile=/dev/null", "-o", "LogLevel=ERROR",
    "-o", "ConnectTimeout=30",
]  # fmt: skip


def _may_have_nested_kvm() -> bool:
    parameters = pathlib.Path("/sys/module").glob("kvm_*/parameters/nested")
    return os.access("/dev/kvm", os.W_OK) and any(path.read_text().strip() in ("Y", "1") for path in parameters)


def _run(*words: str, timeout: float) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        words, check=False, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        timeout=timeout,
    )  # fmt: skip
