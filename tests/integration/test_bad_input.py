# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Every bad input is one clear error, before anything has changed."""

from __future__ import annotations

import os
import pathlib
import socket
import struct
import subprocess

import pytest

from ansible_collections.vmfleet.cpr.plugins.module_utils import qemu_binary
from ansible_collections.vmfleet.cpr.plugins.module_utils.errors import CprError
from tests.guests.ansible import live_update
from tests.guests.guest import NEW_SUITE, OLD_SUITE, Qmp, qemu, wait_until


@pytest.fixture(name="refused")
def fixture_refused(host):
    """Launches, must be refused with this code, and must have changed nothing."""

    def refused(guest, code, **parameters):
        before = guest.pids()
        try:
            (outcome,) = host.launch(guest, **parameters)
            error = outcome.error
        except CprError as raised:
            error = raised
        assert error is not None and error.code == code, str(error)
        assert error.message and error.hint
        assert guest.pids() == before
        assert not (host.state / guest.name / "update.json").exists()
        return error

    return refused


def an_elf_for_another_processor(path: pathlib.Path) -> str:
    """A valid ELF header for AArch64 and nothing behind it."""
    header = (
        b"\x7fELF\x02\x01\x01" + bytes(9) + struct.pack("<HHIQQQIHHHHHH", 2, 183, 1, 0, 64, 0, 0, 64, 56, 0, 64, 0, 0)
    )
    path.write_bytes(header)
    path.chmod(0o755)
    return str(path)


def test_bad_binaries(start, refused, tmp_path):
    guest = start("web1")
    plain = tmp_path / "plain"
    plain.write_text("#!/bin/sh\n")
    assert "/no/such" in refused(guest, "binary-missing", qemu_binary="/no/such/qemu").message
    refused(guest, "binary-missing", qemu_binary="qemu-system-x86_64")
    refused(guest, "binary-not-executable", qemu_binary=str(plain))
    refused(guest, "binary-not-qemu", qemu_binary="/bin/true")
    refused(guest, "binary-wrong-architecture", qemu_binary=an_elf_for_another_processor(tmp_path / "elf"))


def test_a_wrapper_script_is_seen_through(start, host, tmp_path):
    guest = start("web1")
    wrapper = tmp_path / "qemu"
    wrapper.write_text(f'#!/bin/sh\nexec {qemu(NEW_SUITE)} "$@"\n')
    wrapper.chmod(0o755)
    host.until("resume", guest, qemu_binary=str(wrapper))
    assert os.readlink(f"/proc/{guest.pid()}/exe") == qemu(NEW_SUITE)
    (again,) = host.launch(guest, qemu_binary=str(wrapper))
    assert not again.changed and again.error is None


def test_a_qemu_without_a_name_is_told_of(start, host):
    named = start("named")
    with subprocess.Popen([qemu(NEW_SUITE), "-machine", "q35", "-S", "-display", "none", "-nodefaults"]) as unnamed:
        try:
            key = f"process {unnamed.pid}"
            wait_until(lambda: key in {item.guest for item in host.preflight()}, "it is seen")
            found = {item.guest: item.as_dict() for item in host.preflight()}
            run = live_update(qemu(NEW_SUITE), host.state, [], "--check")
        finally:
            unnamed.kill()
    assert found["named"]["verdict"] == "ready"
    assert found[key]["unnamed"] and found[key]["reasons"][0]["code"] == "guest-unnamed"
    assert key not in {item.guest for item in host.preflight(named)}
    assert run.returncode == 0, run.stdout
    assert f"The QEMU of {key} has no -name" in " ".join(f"{run.stdout} {run.stderr}".split())


def test_a_name_that_is_not_there_or_there_twice(start, refused, host):
    start("web1")
    with pytest.raises(CprError, match="web2.*") as caught:
        host.launch("web1", "web2")
    assert caught.value.code == "guest-not-found" and "web1" in caught.value.hint
    other = start("twin")
    other.words = [word.replace("qmp.sock", "qmp2.sock").replace("disk.img", "disk2.img") for word in other.words]
    (other.directory / "disk2.img").write_bytes((other.directory / "disk.img").read_bytes())
    other.monitor = other.directory / "qmp2.sock"
    other.start(qemu(OLD_SUITE))
    refused(other, "guest-ambiguous")


def test_memory_that_is_not_shared(start, refused):
    error = refused(start("web1", memory=()), "memory-not-shared", mode="cpr-transfer")
    assert "memory-backend-memfd,id=ram0,size=64M,share=on" in error.hint
    partly = start("web2", machine="q35")
    partly.kill()
    partly.words = [word.replace(",aux-ram-share=on", "") for word in partly.words]
    partly.start(qemu(OLD_SUITE))
    assert "aux-ram-share=on" in refused(partly, "aux-ram-not-shared", mode="cpr-transfer").hint


def test_a_monitor_that_another_client_holds(start, refused):
    guest = start("web1")
    with guest.qmp():
        error = refused(guest, "monitor-busy")
    assert str(guest.monitor) in error.message and "ss -xp" in error.hint


def test_a_second_monitor_is_used_when_the_first_is_held(start, host, tmp_path):
    guest = start("web1", more=["-qmp", f"unix:{tmp_path}/second,server=on,wait=off"])
    with guest.qmp():
        (outcome,) = host.launch(guest)
        assert outcome.error is None
        assert outcome.update.old.monitor == f"{tmp_path}/second"


def test_no_monitor_at_all(start, refused):
    guest = start("web1", monitor=("-monitor", "unix:{dir}/qmp.sock,server=on,wait=off"))
    assert "-qmp unix:" in refused(guest, "no-monitor").hint


def test_a_guest_that_is_already_migrating(start, refused, tmp_path):
    guest = start("web1")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "nowhere"))
    listener.listen(1)
    with guest.qmp() as monitor:
        monitor.execute("migrate-set-parameters", **{"max-bandwidth": 1})
        monitor.execute("migrate", uri=f"unix:{tmp_path}/nowhere")
    refused(guest, "already-migrating")
    with guest.qmp() as monitor:
        monitor.execute("migrate_cancel")
    listener.close()


def test_a_machine_type_that_the_new_binary_no_longer_has(start, refused):
    assert "pc-q35-2.12" in refused(start("web1", machine="pc-q35-2.12"), "machine-type-missing").message


def test_an_older_binary(start, refused):
    guest = start("web1", suite=NEW_SUITE)
    assert "11.1." in refused(guest, "older-qemu", qemu_binary=qemu(OLD_SUITE), mode="cpr-transfer").message


def test_a_qemu_without_the_mode(start, refused):
    guest = start("web1", memory=(), machine="pc-q35-7.2")
    guest.kill()
    guest.words = [word.replace(",aux-ram-share=on", "") for word in guest.words]
    guest.start(qemu("bookworm"))
    assert "7.2." in refused(guest, "mode-missing", mode="cpr-transfer").message


def test_an_option_that_cant_be_carried(start, refused, tmp_path):
    guest = start("web1", more=["-D", str(tmp_path / "log")])
    assert "-D" in refused(guest, "unsupported-option").message


def test_a_state_directory_that_cant_be_written(start, host):
    guest = start("web1")
    host.state.write_text("a file")
    (outcome,) = host.launch(guest)
    assert outcome.error.code == "state-directory"
    assert guest.pid()


def test_a_guest_that_is_not_ready_keeps_the_whole_run_from_starting(start, host, tmp_path):
    ready, private = start("ready"), start("private", memory=())
    run = live_update(qemu(NEW_SUITE), host.state, ["ready", "private"], adopt=False)
    assert run.returncode == 2
    assert "[memory-not-shared]" in run.stdout
    for guest in (ready, private):
        assert guest.version() == "10.0.2" and guest.pid()
    with Qmp(ready.monitor) as monitor:
        assert monitor.execute("query-migrate-parameters")["mode"] == "normal"


def test_bad_arguments_of_the_role(start, tmp_path):
    run = live_update(qemu(NEW_SUITE), tmp_path / "state", [], concurrency=0)
    assert run.returncode == 2 and "[bad-argument]" in run.stdout
    run = live_update("", tmp_path / "state", [], timeout="soon")
    assert run.returncode == 2 and "live_update_timeout" in run.stdout


def test_the_offers_of_every_suite_are_read_from_their_schemas():
    import asyncio

    offers = {suite: asyncio.run(qemu_binary.probe(qemu(suite))) for suite in ("bookworm", OLD_SUITE, NEW_SUITE)}
    assert offers["bookworm"].offer.modes == frozenset()
    assert {"cpr-reboot", "cpr-transfer"} <= offers[OLD_SUITE].offer.modes and "cpr-exec" not in offers[
        OLD_SUITE
    ].offer.modes
    assert "cpr-exec" in offers[NEW_SUITE].offer.modes
    for binary in offers.values():
        assert {"events", "return-path", "multifd"} <= binary.offer.capabilities
        assert "max-bandwidth" in binary.offer.parameters
        assert binary.offer.architecture == "x86_64"
    assert "pc-q35-2.12" in offers[OLD_SUITE].machine_types and "pc-q35-2.12" not in offers[NEW_SUITE].machine_types
