# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The whole way with ansible-playbook, as a user goes it."""

from __future__ import annotations

import json
import os
import pathlib
import resource
import subprocess

import pytest

from tests.guests.ansible import live_update, module
from tests.guests.guest import NEW_SUITE, OLD_SUITE, TOP, Qmp, command_line_of, is_alive, qemu


def recap(run):
    """ok, changed and failed of the play's last line."""
    words = dict(word.split("=") for word in run.stdout.splitlines()[-2].split() if "=" in word)
    return {name: int(words[name]) for name in ("changed", "failed")}


def test_guests_of_all_kinds_move_and_move_again(start, tmp_path, rebuilt_qemu):
    pidfile = tmp_path / "counter.pid"
    guests = [
        start("counter", more=["-pidfile", str(pidfile), "-monitor", f"unix:{tmp_path}/hmp,server=on,wait=off"]),
        start("oldtimer", machine="pc", accelerator="tcg"),
        start("penguin", linux=True),
    ]
    paused = start("sleeper")
    with paused.qmp() as monitor:
        monitor.execute("stop")
    everyone = [*guests, paused]
    names = [guest.name for guest in everyone]
    old = {guest.name: guest.pid() for guest in everyone}
    state = tmp_path / "state"

    for binary in (qemu(NEW_SUITE), rebuilt_qemu):
        slept_at = paused.ticks()
        run = live_update(binary, state, names)
        assert run.returncode == 0, run.stdout + run.stderr
        assert recap(run) == {"changed": 4, "failed": 0}
        for guest in everyone:
            assert not is_alive(old[guest.name])
            old[guest.name] = guest.pid()
            assert os.readlink(f"/proc/{guest.pid()}/exe") == binary
            assert guest.version().startswith("11.1.")
        for guest in guests:
            guest.wait_for_ticks()
            guest.check_continuity()
            assert json.loads((state / guest.name / "update.json").read_text())["pause_ms"] > 0
        assert paused.status() == "paused"
        assert paused.ticks() == slept_at
        assert int(pidfile.read_text()) == old["counter"]

        again = live_update(binary, state, names)
        assert again.returncode == 0, again.stdout
        assert recap(again) == {"changed": 0, "failed": 0}
        assert {guest.name: guest.pid() for guest in everyone} == old

    with paused.qmp() as monitor:
        monitor.execute("cont")
    paused.wait_for_ticks()
    paused.check_continuity()
    assert sorted(path.name for path in pathlib.Path(tmp_path).glob("**/*.cpr[0-9]*")) == []
    with_log = {path.name for path in (state / "counter").iterdir()}
    assert with_log == {"update.json", "lock", "qemu.2.log"}


def test_the_migration_settings_of_a_guest_go_along(start, tmp_path):
    guest = start("tuned")
    with guest.qmp() as monitor:
        monitor.execute("migrate-set-parameters", **{"max-bandwidth": 12345678})
        monitor.execute("migrate-set-capabilities", capabilities=[{"capability": "xbzrle", "state": True}])
    run = live_update(qemu(NEW_SUITE), tmp_path / "state", ["tuned"])
    assert run.returncode == 0, run.stdout
    with guest.qmp() as monitor:
        assert monitor.execute("query-migrate-parameters")["max-bandwidth"] == 12345678
        capabilities = {item["capability"]: item["state"] for item in monitor.execute("query-migrate-capabilities")}
    assert capabilities["xbzrle"] and not capabilities["return-path"]


def test_the_surroundings_go_along(start, tmp_path):
    def enter():
        resource.setrlimit(resource.RLIMIT_NOFILE, (777, 888))
        os.umask(0o027)
        os.nice(3)
        os.setgroups([4321])
        os.setresgid(1234, 1234, 1234)
        os.setresuid(1234, 1234, 1234)

    tmp_path.chmod(0o711)
    for parent in tmp_path.parents[:2]:
        parent.chmod(0o711)
    guest = start(
        "servant", accelerator="tcg", owner=1234, surroundings={"preexec_fn": enter, "env": {"COLOUR": "green"}}
    )

    def surroundings():
        base = pathlib.Path(f"/proc/{guest.pid()}")
        wanted = ("Uid", "Gid", "Groups", "Umask")
        return (
            [line for line in (base / "status").read_text().splitlines() if line.split(":")[0] in wanted],
            (base / "limits").read_text(), (base / "environ").read_text(), os.readlink(base / "cwd"),
            (base / "cgroup").read_text(), (base / "oom_score_adj").read_text(),
            os.getpriority(os.PRIO_PROCESS, guest.pid()),
            (guest.monitor.stat().st_mode, guest.monitor.stat().st_uid, guest.monitor.stat().st_gid),
        )  # fmt: skip

    os.chown(guest.monitor, 1234, 4321)
    guest.monitor.chmod(0o762)
    before = surroundings()
    assert "Uid:\t1234\t1234\t1234\t1234" in before[0]
    run = live_update(qemu(NEW_SUITE), tmp_path / "state", ["servant"])
    assert run.returncode == 0, run.stdout
    assert surroundings() == before
    guest.wait_for_ticks()


def test_check_mode_shows_both_command_lines_without_secrets_and_touches_nothing(start, tmp_path):
    guest = start("web1", more=["-object", "secret,id=key,data=hunter2"])
    before = guest.pids()
    run = live_update(qemu(NEW_SUITE), tmp_path / "state", ["web1"], "--check", "--diff")
    assert run.returncode == 0, run.stdout
    assert "-type=pc" not in run.stdout
    assert "+-S" in run.stdout and "+type=pc-q35-10.0," in run.stdout
    assert "data=********" in run.stdout and "hunter2" not in run.stdout + run.stderr
    assert guest.pids() == before and guest.status() == "running"
    assert not (tmp_path / "state").exists()


def test_a_guest_that_fails_is_brought_back_and_the_others_go_on(start, tmp_path):
    notes = tmp_path / "notes"
    notes.write_text("for the guest")
    more = ["-object", "secret,id=key,data=hunter2", "-fw_cfg", f"name=opt/org.example,file={notes}"]
    good, bad = start("good"), start("bad", more=more)
    notes.unlink()  # the running QEMU has read it; a new one can't
    run = live_update(qemu(NEW_SUITE), tmp_path / "state", ["good", "bad"])
    assert run.returncode == 2
    assert str(notes) in run.stdout and "[new-qemu-exited]" in run.stdout and "hunter2" not in run.stdout
    last = run.stdout.partition("Fail if a guest was not updated")[2]
    assert "bad: The new QEMU exited" in last and "good" not in last.partition("PLAY RECAP")[0]
    assert good.version().startswith("11.1.") and bad.version().startswith("10.0.")
    for guest in (good, bad):
        assert guest.pid()
        guest.wait_for_ticks()
        guest.check_continuity()


def test_what_a_run_that_died_left_behind_is_cleared_by_the_next(start, host, tmp_path):
    guest = start("web1")
    host.until("setup", guest)
    assert len(guest.pids()) == 2
    run = live_update(qemu(NEW_SUITE), host.state, ["web1"])
    assert run.returncode == 0, run.stdout
    assert guest.version().startswith("11.1.") and guest.pid()
    guest.wait_for_ticks()
    guest.check_continuity()


def test_guest_info_says_what_runs_and_what_stands_in_the_way(start, tmp_path):
    start("ready")
    start("private", memory=(), machine="q35")
    answer = module("guest_info", {"qemu_binary": qemu(NEW_SUITE), "guests": ["ready", "private"]})
    ready, private = answer["guests"]
    assert ready["version"] == "10.0.2" and ready["machine_type"] == "pc-q35-10.0"
    assert ready["binary"] == qemu(OLD_SUITE) and ready["binary_on_disk"] == "same"
    assert ready["modes"]["cpr-transfer"] == {"ready": True, "blockers": []}
    assert ready["wanted_version"].startswith("11.1.") and not ready["up_to_date"] and not ready["update_blockers"]
    blocker, of_qemu = private["modes"]["cpr-transfer"]["blockers"]
    assert of_qemu["code"] == "migration-blocked" and "share=on" in of_qemu["message"]
    assert blocker["code"] == "memory-not-shared" and "size=64M" in blocker["hint"]
    assert private["modes"]["cpr-reboot"]["ready"] and private["modes"]["precopy"]["ready"]
    assert (ready["update_mode"], private["update_mode"]) == ("cpr-transfer", "precopy")
    assert not answer["changed"]


def test_guest_info_finds_a_guest_whose_binary_was_replaced(start, tmp_path):
    guest = start("web1")
    # A guest of a binary that can be removed: its files are looked up beside it.
    copy = pathlib.Path(qemu(NEW_SUITE)).with_name("qemu-system-x86_64-soon-gone")
    copy.write_bytes(pathlib.Path(qemu(NEW_SUITE)).read_bytes())
    copy.chmod(0o755)
    try:
        assert live_update(str(copy), tmp_path / "state", ["web1"]).returncode == 0
    finally:
        copy.unlink()
    answer = module("guest_info", {"guests": ["web1"], "state_directory": str(tmp_path / "state")})
    assert answer["guests"][0]["binary_on_disk"] == "deleted"
    assert answer["guests"][0]["phase"] == "finished"
    answer = module("qmp_command", {"guests": ["web1"], "command": "qom-list-types"})
    assert answer["error"]["code"] == "modules-replaced"
    run = live_update(qemu(NEW_SUITE), tmp_path / "state", ["web1"])
    assert run.returncode == 0, run.stdout
    assert guest.pid()
    guest.wait_for_ticks()
    guest.check_continuity()


def test_qmp_command_reads_in_check_mode_and_changes_only_outside_of_it(start):
    guest = start("web1")
    answer = module("qmp_command", {"guests": ["web1"], "command": "query-status"}, "--check")
    assert answer["guests"][0]["response"]["status"] == "running" and not answer["changed"]
    answer = module("qmp_command", {"guests": ["web1"], "command": "stop"}, "--check")
    assert answer["changed"] and answer["guests"][0]["response"] is None and guest.status() == "running"
    answer = module("qmp_command", {"guests": ["web1"], "command": "stop"})
    assert answer["changed"] and guest.status() == "paused"
    answer = module("qmp_command", {"guests": ["web1"], "command": "no-such-command"})
    error = answer["guests"][0]["error"]
    assert error["code"] == "qmp-error" and error["qemu_class"] == "CommandNotFound"


def test_a_hypervisor_with_python_3_9_and_no_library(start, tmp_path):
    oldest = TOP / ".venv-3.9" / "bin" / "python"
    if not oldest.exists():
        pytest.skip("no Python 3.9 was found on this machine")
    # What the virtual environment was made from, which has no qemu.qmp.
    python = subprocess.run(
        [oldest, "-c", "import sys; print(sys._base_executable)"], check=True, capture_output=True, text=True
    )
    guest = start("web1")
    run = live_update(qemu(NEW_SUITE), tmp_path / "state", ["web1"], python=python.stdout.strip())
    assert run.returncode == 0, run.stdout
    guest.wait_for_ticks()
    guest.check_continuity()


def test_nothing_of_the_librarys_gpl2_only_file_reaches_a_hypervisor(tmp_path):
    import base64
    import io
    import zipfile

    from ansible_collections.vmfleet.cpr.plugins.plugin_utils.qmp_action import qmp_archive

    names = zipfile.ZipFile(io.BytesIO(base64.b64decode(qmp_archive()))).namelist()
    assert "qemu/qmp/qmp_client.py" in names and "qemu/qmp/legacy.py" not in names


def test_the_new_qemu_has_the_old_ones_command_line(start, tmp_path):
    guest = start("web1")
    before = command_line_of(guest.pid())
    assert live_update(qemu(NEW_SUITE), tmp_path / "state", ["web1"]).returncode == 0
    after = command_line_of(guest.pid())
    added = [word for word in after if word not in before]
    assert [word.split("=")[0] for word in added[1:]] == [
        "type", "file,id", "unix:" + str(guest.monitor) + ".cpr1,server", "-S", "-incoming", "defer", "-incoming",
        added[-1].split("=")[0],
    ]  # fmt: skip
    assert len(before) == len(after) - 5
    with Qmp(guest.monitor) as monitor:
        assert monitor.execute("query-name")["name"] == "web1"


@pytest.mark.parametrize("words", [(), ("--check",)])
def test_the_preflight_playbook_judges_and_leaves_all_as_it_is(start, tmp_path, words):
    ready = start("ready", more=["-netdev", "user,id=n", "-device", "virtio-net-pci,netdev=n"])
    private = start("private", memory=())
    before = {guest.name: (guest.pid(), sorted(os.listdir(guest.directory))) for guest in (ready, private)}
    state = tmp_path / "state"
    run = live_update(
        qemu(NEW_SUITE), state, ["ready", "private"], *words, playbook="preflight", rehearse=True,
        capabilities={"xbzrle": True}, timeout=20, adopt=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    assert recap(run) == {"changed": 0, "failed": 0}
    assert "The guest can go from QEMU 10.0.2 to 11.1.3 by cpr-transfer." in run.stdout
    assert "memory-backend-memfd" in run.stdout and "[memory-not-shared]" in run.stdout
    assert {g.name: (g.pid(), sorted(os.listdir(g.directory))) for g in (ready, private)} == before
    assert not state.exists()
    with Qmp(ready.monitor) as monitor:
        assert monitor.execute("query-migrate-parameters")["mode"] == "normal"


def test_preflight_names_what_the_new_binary_lacks(start, tmp_path):
    """Of the QEMUs at hand only older ones lack a device."""
    guest = start("web1", more=["-device", "igb", "-device", "virtio-rng-pci,x-pcie-flr-init=on"])
    answer = module(
        "guest_preflight", {"guests": ["web1"], "qemu_binary": qemu("bookworm"), "state_directory": str(tmp_path)}
    )
    codes = {reason["code"] for reason in answer["guests"][0]["modes"]["cpr-reboot"]["reasons"]}
    assert {"machine-type-missing", "mode-missing", "device-missing"} <= codes
    assert guest.status() == "running" and not answer["changed"]
