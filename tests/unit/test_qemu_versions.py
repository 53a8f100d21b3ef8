# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Which versions of QEMU may go, and how versions are told apart."""

from __future__ import annotations

import dataclasses
import hashlib
import os

import asyncio
import pytest
from hypothesis import given, strategies

from ansible_collections.vmfleet.cpr.plugins.module_utils import process, qemu_add, qemu_store, qemu_versions
from ansible_collections.vmfleet.cpr.plugins.module_utils.errors import CprError
from ansible_collections.vmfleet.cpr.plugins.module_utils.qemu_versions import Version


def version(name, made_at=1.0, **more):
    path = f"/opt/qemu/{name}"
    return Version(name, path, f"{path}/bin/qemu-system-x86_64", made_at, **{"complete": True, **more})


def removable(versions, keep, **more):
    judged = qemu_versions.judge(versions, keep=keep, **more)
    return sorted(name for name, judgement in judged.items() if judgement.removable)


def test_the_latest_that_nobody_uses_are_kept_beside_those_that_are_needed():
    versions = [version(f"v{number}", float(number)) for number in range(6)]
    versions[0] = dataclasses.replace(versions[0], used_by=("guest web1 (process 7)",))
    versions[1] = dataclasses.replace(versions[1], named_by=("/etc/systemd/system/a.service",))
    assert removable(versions, 2, defaults=["v5"]) == ["v2"]
    assert removable(versions, 0, defaults=["v5"]) == ["v2", "v3", "v4"]
    assert removable(versions, 0, defaults=["v5"], protected=["v2"]) == ["v3", "v4"]
    assert removable(versions, 9, defaults=["v5"]) == []


@given(
    strategies.lists(
        strategies.builds(
            version,
            strategies.sampled_from("abcdefgh"),
            made_at=strategies.none() | strategies.floats(0, 9),
            complete=strategies.booleans(),
            used_by=strategies.sampled_from([(), ("process 1 (qemu)",)]),
            named_by=strategies.sampled_from([(), ("/etc/systemd/system/a.service",)]),
        ),
        unique_by=lambda item: item.name,
    ),
    strategies.integers(0, 4),
    strategies.sampled_from("abcdefgh"),
    strategies.integers(0, 1),
)
def test_nothing_that_is_needed_or_somebody_elses_is_ever_removed(versions, keep, default, unseen):
    gone = removable(versions, keep, defaults=[default], unseen=unseen)
    for item in versions:
        if item.made_at is None or item.name == default or item.used_by or item.named_by or unseen:
            assert item.name not in gone
    judged = qemu_versions.judge(versions, keep=keep, defaults=[default], unseen=unseen)
    assert set(judged) == {item.name for item in versions}
    assert all(judgement.reason for judgement in judged.values())


def test_every_reason_names_who_and_not_a_crowd():
    users = tuple(f"guest web{number} (process {number})" for number in range(40))
    judged = qemu_versions.judge([version("a", used_by=users)], keep=0)
    assert judged["a"].reason.startswith("in use by guest web0 (process 0), guest web1")
    assert judged["a"].reason.endswith("and 35 more")


@pytest.mark.parametrize("name", ["", ".", "..", "bin", "a/b", ".hidden", "1:11.1", "-rf", "a b", "ä", "x" * 201])
def test_a_name_that_would_be_another_place_is_refused(name):
    with pytest.raises(CprError) as caught:
        qemu_versions.check_name(name)
    assert caught.value.code == "bad-argument"


@pytest.mark.parametrize("name", ["11.1.3", "11.1.3+ds-1~bpo13+1", "Debian_1_10.0.13+ds-0+deb13u1", "own-2"])
def test_a_name_like_a_version_is_taken(name):
    qemu_versions.check_name(name)


@pytest.mark.parametrize(
    ("text", "build"),
    [
        ("QEMU emulator version 10.0.13 (Debian 1:10.0.13+ds-0+deb13u1)\nCopyright", ("10.0.13", "Debian 1:10.0.13+ds-0+deb13u1")),
        ("QEMU emulator version 9.1.0\nCopyright", ("9.1.0", "")),
        ("QEMU emulator version 8.2.0 (qemu-kvm-8.2.0-11.el9)", ("8.2.0", "qemu-kvm-8.2.0-11.el9")),
    ],
)  # fmt: skip
def test_a_build_is_read_from_what_it_says(text, build):
    assert qemu_versions.build_of(text) == build


def test_what_does_not_say_a_version_is_no_qemu():
    with pytest.raises(CprError) as caught:
        qemu_versions.build_of("bash, version 5")
    assert caught.value.code == "binary-not-qemu"


def test_the_directory_of_modules_is_called_as_qemu_does():
    assert qemu_versions.sanitized("Debian 1:10.0.13+ds-0+deb13u1~x") == "Debian_1_10.0.13+ds-0+deb13u1~x"


@pytest.mark.parametrize(
    ("text", "does"),
    [
        ("ExecStart=/opt/qemu/11.1/bin/qemu-system-x86_64 -S", True),
        ('ExecStart="/opt/qemu/11.1"', True),
        ("ExecStart=/bin/sh -c 'exec /opt/qemu/11.1/bin/qemu'", True),
        ("PATH=/usr/bin:/opt/qemu/11.1/bin", True),
        ("ExecStart=/opt/qemu/11.1.3/bin/qemu", False),
        ("ExecStart=/opt/qemu/11.1-own/bin/qemu", False),
        ("ExecStart=/srv/opt/qemu/11.1/bin/qemu", False),
        ("# ExecStart=/opt/qemu/11.1/bin/qemu", False),
    ],
)
def test_a_unit_names_a_version_by_its_whole_path(text, does):
    assert qemu_versions.unit_mentions(f"[Service]\n{text}\n", "/opt/qemu/11.1") is does


@pytest.mark.parametrize(
    ("phase", "needed"),
    [("set-up", True), ("launching", True), ("checkpointed", True), ("finished", False), ("rolled-back", False)],
)
def test_a_record_needs_its_binaries_until_the_update_has_ended(phase, needed):
    assert qemu_versions.record_needs({"phase": phase}) is needed


@pytest.mark.parametrize(
    ("path", "owner"),
    [
        ("/opt/qemu/11.1/bin/qemu-system-x86_64", "11.1"),
        ("/opt/qemu/11.1/bin/qemu-system-x86_64 (deleted)", "11.1"),
        ("/opt/qemu/11.1.3/bin/qemu-system-x86_64", None),
        ("/usr/bin/qemu-system-x86_64", None),
    ],
)
def test_a_path_of_the_kernel_belongs_to_a_version(path, owner):
    assert qemu_versions.owner_of(path, {"11.1": "/opt/qemu/11.1"}) == owner


def made(tmp_path, name, made_at=1.0):
    directory = tmp_path / name
    (directory / "bin").mkdir(parents=True)
    (directory / "bin" / "qemu-system-x86_64").write_text("")
    (directory / "bin" / "qemu-system-x86_64").chmod(0o755)
    marker = {"format": 1, "source": "archive", "origin": ["sha256:1"], "emulator": "qemu-system-x86_64"}
    text = qemu_store.json.dumps({**marker, "qemu_version": "1.2.3", "made_at": made_at})
    (directory / qemu_store.MARKER).write_text(text)
    return directory


def test_who_has_a_file_of_a_version_open_is_seen_also_when_it_is_deleted(tmp_path):
    used, free = made(tmp_path, "used"), made(tmp_path, "free")
    (used / "rom").write_text("")
    with open(used / "rom", encoding="utf-8"):
        (used / "rom").unlink()
        found = {item.name: item for item in qemu_store.look(str(tmp_path), "qemu-system-x86_64", []).versions}
    assert [f"process {os.getpid()} " in user for user in found["used"].used_by] == [True]
    assert found["free"].used_by == ()
    assert free.exists()


@pytest.mark.parametrize(
    ("name", "version", "fits"),
    [
        ("11.1.3", "11.1.3", True),
        ("11.1.3-1", "11.1.4", True),
        ("11.1", "11.10.0", False),
        ("11.1.3", "10.0.13", False),
        ("Debian_1_10.0.13", "10.0.13", True),
        ("2026.11", "11.1.3", True),
        ("ours", "11.1.3", True),
    ],
)
def test_a_name_that_speaks_of_another_version_is_seen(name, version, fits):
    assert qemu_versions.fits(name, version) == fits


def test_who_runs_the_build_that_a_copy_was_made_of_uses_it(tmp_path, monkeypatch):
    """That build was upgraded under the guest since, and what it runs is no file of the copy."""
    copy, other = made(tmp_path, "copy"), made(tmp_path, "other")
    marker = qemu_store.json.loads((copy / qemu_store.MARKER).read_text())
    (copy / qemu_store.MARKER).write_text(qemu_store.json.dumps({**marker, "executables": [[1, 2], [1, 3]]}))
    guest = process.QemuProcess(process.Identity(7, 1), ("-name", "web1"), "/usr/bin/qemu", (1, 3), "deleted", "/")
    monkeypatch.setattr(process, "find", lambda: [guest])
    judged = qemu_store.look(str(tmp_path), "qemu-system-x86_64", []).judge(0, None, [])
    assert judged["copy"].reason == "in use by guest web1 (process 7)" and not judged["copy"].removable
    assert judged["other"].removable and other.exists()


def test_a_version_that_is_started_just_when_it_goes_stays(tmp_path, monkeypatch):
    made(tmp_path, "late")
    real, seen = qemu_store._users, []

    def users(trees):
        found, unseen = real(trees)
        seen.append(trees)
        return ({"late": ["guest web1 (process 7)"]} if len(seen) > 1 else found), unseen

    monkeypatch.setattr(qemu_store, "_users", users)
    arguments = {"keep": 0, "default": None, "protected": [], "check_mode": False}
    dummy, judged, dummy = asyncio.run(qemu_store.remove(str(tmp_path), "qemu-system-x86_64", [], **arguments))
    assert judged["late"] == qemu_versions.Judgement(False, "in use by guest web1 (process 7)")
    assert sorted(os.listdir(tmp_path)) == [".lock", "late"]


def test_what_is_half_made_goes_and_what_is_not_ours_stays(tmp_path):
    made(tmp_path, "old", 1.0), made(tmp_path, "new", 2.0), made(tmp_path, "default", 0.0)
    for name in (".vmfleet-cpr-half", "foreign", "foreign/bin", "bin", "share"):
        (tmp_path / name).mkdir()
    (tmp_path / "foreign" / "bin" / "qemu-system-x86_64").write_text("")
    (tmp_path / "bin" / "qemu-system-i386").symlink_to(tmp_path / "default" / "bin" / "qemu-system-x86_64")
    arguments = {"keep": 1, "default": None, "protected": [], "check_mode": True}
    before = sorted(os.listdir(tmp_path))
    for check_mode in (True, False):
        arguments["check_mode"] = check_mode
        store, judged, dummy = asyncio.run(qemu_store.remove(str(tmp_path), "qemu-system-x86_64", [], **arguments))
        assert store.unseen == 0
        assert {name for name, item in judged.items() if item.removable} == {".vmfleet-cpr-half", "old"}
        if check_mode:
            assert sorted(os.listdir(tmp_path)) == before
    assert sorted(os.listdir(tmp_path)) == [".lock", "bin", "default", "foreign", "new", "share"]


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"checksum": "sha256:" + "0" * 64}, "checksum-differs"),
        ({"checksum": "md5:0"}, "bad-argument"),
        ({"name": "../x"}, "bad-argument"),
        ({"name": "made"}, "version-taken"),
        ({"name": "foreign"}, "version-taken"),
        ({"archive": "/no/such/file"}, "source-missing"),
        ({}, "unpack-failed"),
    ],
)
def test_bad_input_leaves_nothing_behind(tmp_path, change, code):
    made(tmp_path, "made")
    (tmp_path / "foreign").mkdir()
    archive = tmp_path / "archive.tar"
    archive.write_text("no archive")
    wish = qemu_add.Wish(
        **{
            "directory": str(tmp_path),
            "name": "11.1",
            "emulator": "qemu-system-x86_64",
            "archive": str(archive),
            "checksum": f"sha256:{hashlib.sha256(archive.read_bytes()).hexdigest()}",
            **change,
        }
    )
    before = set(os.listdir(tmp_path))
    with pytest.raises(CprError) as caught:
        asyncio.run(qemu_add.make(wish, False))
    assert caught.value.code == code
    assert set(os.listdir(tmp_path)) - {".lock"} == before


def test_a_store_without_room_is_refused_before_anything_is_unpacked(tmp_path, monkeypatch):
    archive = tmp_path / "archive.tar"
    archive.write_bytes(b"x" * 1000)
    checksum = f"sha256:{hashlib.sha256(archive.read_bytes()).hexdigest()}"
    wish = qemu_add.Wish(str(tmp_path / "store" / "qemu"), "11.1", "qemu", archive=str(archive), checksum=checksum)
    usage = type("Usage", (), {"free": 1 << 20})
    monkeypatch.setattr(qemu_add.shutil, "disk_usage", lambda path: usage if path == str(tmp_path) else None)
    with pytest.raises(CprError) as caught:
        asyncio.run(qemu_add.make(wish, True))
    assert caught.value.code == "store-full"
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("prefix", "link", "target"),
    [
        ("usr", "usr", "../.."),
        ("build/usr/local", "usr/local", "../../.."),
        ("qemu-11.1", None, None),
        ("", None, None),
    ],
)
def test_a_qemu_built_for_the_systems_directories_is_led_into_its_own(tmp_path, prefix, link, target):
    (tmp_path / "bin").mkdir()
    qemu_add._make_bundle(str(tmp_path), prefix)
    bundle = tmp_path / "bin" / "qemu-bundle"
    assert bundle.exists() is bool(link)
    if link:
        assert os.readlink(bundle / link) == target
        assert (bundle / link).resolve() == tmp_path


def test_nothing_unpacked_keeps_rights_or_leads_to_the_hosts_files(tmp_path):
    (tmp_path / "lib").mkdir()
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "qemu-helper"
    program.write_text("")
    program.chmod(0o6777)
    (tmp_path / "lib" / "libx.so.1").write_text("")
    (tmp_path / "lib" / "libx.so").symlink_to("/usr/lib/libx.so.1")
    (tmp_path / "lib" / "outside").symlink_to("/etc/alternatives/y")
    qemu_add._make_harmless(str(tmp_path))
    assert program.stat().st_mode & 0o7777 == 0o755
    assert os.readlink(tmp_path / "lib" / "libx.so") == "libx.so.1"
    assert os.readlink(tmp_path / "lib" / "outside") == "/etc/alternatives/y"
