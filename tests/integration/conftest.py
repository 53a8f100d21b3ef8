# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Guests for the tests, and the phases without Ansible."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pathlib
import shutil
import socket
import subprocess
import typing as t
import uuid

import pytest

from ansible_collections.vmfleet.cpr.plugins.module_utils.phases import (
    assess,
    checkpoint,
    launch,
    restore,
    resume,
    rollback,
    setup,
    transfer,
)
from ansible_collections.vmfleet.cpr.plugins.module_utils.task import Outcome, Task
from tests.guests.guest import NEW_SUITE, OLD_SUITE, Guest, boot_sector_guest, linux_guest, qemu


@pytest.fixture(name="start")
def fixture_start(tmp_path: pathlib.Path) -> t.Iterator[t.Callable[..., Guest]]:
    """Starts boot-sector guests, or Linux guests, and ends them with the test."""
    guests: list[Guest] = []

    def start(
        name: str,
        *,
        suite: str = OLD_SUITE,
        binary: str | None = None,
        linux: bool = False,
        owner: int = 0,
        surroundings: t.Any = None,
        prefix: t.Sequence[str] = (),
        **options: t.Any,
    ) -> Guest:
        make = linux_guest if linux else boot_sector_guest
        guest = make(name, tmp_path / name, **options)
        guests.append(guest)
        for path in (guest.directory, guest.directory / "disk.img"):
            os.chown(path, owner, owner)
        guest.start(binary or qemu(suite), prefix, **(surroundings or {}))
        guest.wait_for_ticks(3)
        return guest

    yield start
    for guest in guests:
        guest.kill()


class Host:
    """The phases on this machine, without Ansible."""

    def __init__(self, state: pathlib.Path) -> None:
        self.state = state

    def task(
        self,
        guests: t.Sequence[Guest | str],
        *,
        check_mode: bool = False,
        is_abandoned: t.Callable[[], bool] = lambda: False,
        **parameters: t.Any,
    ) -> Task:
        """A task as a module makes it from its arguments."""
        names = [guest if isinstance(guest, str) else guest.name for guest in guests]
        defaults = {
            "guests": names, "concurrency": 4, "timeout": 30.0, "state_directory": str(self.state),
            "switch_concurrency": 1, "pause_limit": 2.0, "copy_timeout": 60.0,
            "mode": "auto", "adopt": True, "accept_differences": [], "qemu_binary": qemu(NEW_SUITE),
            "capabilities": {}, "parameters": {}, "when_missing": "fail", "when_refused": "stop",
            "heartbeat_command": "", "heartbeat_timeout": 10.0, "rehearse": False,
        }  # fmt: skip
        return Task({**defaults, **parameters}, check_mode, is_abandoned)

    def launch(self, *guests: Guest | str, **parameters: t.Any) -> list[Outcome]:
        """dest_launch."""
        return asyncio.run(launch.launch_all(self.task(guests, **parameters)))

    def preflight(self, *guests: Guest | str, **parameters: t.Any) -> list[Outcome]:
        """guest_preflight."""
        return asyncio.run(assess.assess_all(self.task(guests, **parameters)))

    def transfer(self, *guests: Guest | str, **parameters: t.Any) -> list[Outcome]:
        """cpr_transfer."""
        return self._each(transfer, "transfer", guests, parameters)

    def setup(self, *guests: Guest | str, **parameters: t.Any) -> list[Outcome]:
        """migration_setup."""
        return self._each(setup, "set_up", guests, parameters)

    def resume(self, *guests: Guest | str, **parameters: t.Any) -> list[Outcome]:
        """guest_resume."""
        return asyncio.run(resume.resume_all(self.task(guests, **parameters)))

    def rollback(self, *guests: Guest | str, **parameters: t.Any) -> list[Outcome]:
        """guest_rollback."""
        return self._each(rollback, "roll_back", guests, parameters)

    def checkpoint(self, *guests: Guest | str, **parameters: t.Any) -> list[Outcome]:
        """guest_checkpoint."""
        parameters = {"qemu_binary": None, "heartbeat_command": None, "write_timeout": 60.0, **parameters}
        return asyncio.run(checkpoint.checkpoint_all(self.task(guests, **parameters)))

    def restore(self, *guests: Guest | str, **parameters: t.Any) -> list[Outcome]:
        """guest_restore."""
        parameters = {"qemu_binary": None, "restore_timeout": 60.0, **parameters}
        return asyncio.run(restore.restore_all(self.task(guests, **parameters)))

    def until(self, last: str, guest: Guest, **parameters: t.Any) -> Outcome:
        """All phases up to one; every one of them must succeed."""
        for phase in ("launch", "transfer", "setup", "resume"):
            (outcome,) = getattr(self, phase)(guest, **parameters)
            assert outcome.error is None, str(outcome.error)
            if phase == last:
                return outcome
        raise ValueError(last)

    def record(self, guest: Guest) -> dict[str, t.Any]:
        """The guest's update record as it lies on disk."""
        return json.loads((self.state / guest.name / "update.json").read_text(encoding="utf-8"))

    @contextlib.contextmanager
    def changed_record(self, guest: Guest) -> t.Iterator[dict[str, t.Any]]:
        """The same, written back as it was changed."""
        record = self.record(guest)
        yield record
        (self.state / guest.name / "update.json").write_text(json.dumps(record), encoding="utf-8")

    def _each(self, module: t.Any, name: str, guests: t.Sequence[Guest | str], parameters: t.Any) -> list[Outcome]:
        task = self.task(guests, **parameters)
        options = {"accept_differences": task.parameters["accept_differences"]} if name == "set_up" else {}
        return asyncio.run(task.for_each_update(getattr(module, name), done=module.DONE, would="", **options))


@pytest.fixture(name="host")
def fixture_host(tmp_path: pathlib.Path) -> Host:
    """This machine as a hypervisor, its state directory the test's own."""
    return Host(tmp_path / "state")


@pytest.fixture(name="rebuilt_qemu", scope="session")
def fixture_rebuilt_qemu() -> t.Iterator[str]:
    """Another file with the new suite's QEMU, as after a rebuild of the package."""
    original = pathlib.Path(qemu(NEW_SUITE))
    copy = original.with_name(f"qemu-system-x86_64-rebuilt-{uuid.uuid4().hex[:8]}")
    shutil.copy2(original, copy)
    yield str(copy)
    copy.unlink()


@pytest.fixture(name="small_place")
def fixture_small_place(tmp_path: pathlib.Path) -> t.Iterator[pathlib.Path]:
    """A directory with 8 MiB of room."""
    place = tmp_path / "small"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "none", str(place)], check=True)
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.fixture(name="free_ports")
def fixture_free_ports() -> list[int]:
    """Two TCP ports that nobody listens at."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for dummy in range(2)]
    ports = [item.getsockname()[1] for item in sockets]
    for item in sockets:
        item.close()
    return ports
