# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The role qemu_binary on a machine of its own: real packages by a real apt, under running guests."""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import re
import shlex
import subprocess
from dataclasses import dataclass

import pytest

from tests.guests.ansible import module
from tests.guests.guest import CACHE, TOP, boot_sector_guest, wait_until
from tests.guests.machine import Machine

REPOSITORY = CACHE / "packages" / "trixie-backports"
INSTALLED = "/usr/bin/qemu-system-x86_64"
BUILD = re.compile(r"Debian_1_10\.0\.\d+\+ds-.*")


@pytest.fixture(name="machine", scope="module")
def fixture_machine(tmp_path_factory):
    """A machine with Debian's QEMU 10.0 and a repository that has 11.1."""
    shared = tmp_path_factory.mktemp("machine")
    for parent in (shared, *shared.parents[:2]):
        parent.chmod(0o711)
    machine = Machine("binary", shared)
    try:
        machine.start()
        root = pathlib.Path(f"/proc/{machine.leader}/root")
        (root / "etc/apt/sources.list").write_text(f"deb [trusted=yes] file:{REPOSITORY} ./\n")
        yield machine
    finally:
        machine.stop()


@dataclass
class Run:
    """A run of the role.

    :ivar changed: how many tasks changed something.
    :ivar result: the fact that it set, empty if it failed.
    """

    ok: bool
    output: str
    changed: int
    result: dict


class Store:
    """A store of one test in the machine."""

    def __init__(self, machine, name):
        self.machine = machine
        self.directory = f"/opt/{name}"
        self.link = f"{self.directory}/bin/qemu-system-x86_64"

    def path(self, path):
        """A path of the machine as seen from here."""
        return pathlib.Path(f"/proc/{self.machine.leader}/root{path}")

    def run(self, source, *words, **variables):
        """Run the role."""
        values = {"source": source, "directory": self.directory, **variables}
        extra = {f"qemu_binary_{name}": value for name, value in values.items()}
        extra["ansible_remote_tmp"] = str(self.machine.shared / "tmp")
        extra["ansible_python_interpreter"] = self.machine.python()
        command = [str(TOP / ".venv/bin/ansible-playbook"), "vmfleet.cpr.qemu_binary", "-v", *words]
        done = subprocess.run(
            [*command, "-i", "localhost,", "-c", "local", "-e", json.dumps(extra)],
            check=False, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=TOP,
            timeout=200, env={**os.environ, "ANSIBLE_PIPELINING": "1", "ANSIBLE_NOCOLOR": "1"},
        )  # fmt: skip
        fact = re.search(r'^ok: .* => (\{"ansible_facts": \{"qemu_binary_result".*)$', done.stdout, re.MULTILINE)
        return Run(
            done.returncode == 0,
            done.stdout,
            int(re.search(r" changed=(\d+) ", done.stdout)[1]),
            json.loads(fact[1])["ansible_facts"]["qemu_binary_result"] if fact else {},
        )

    def module(self, name, **arguments):
        """Run one of the role's modules; what it returns."""
        words = ["-e", f"ansible_remote_tmp={self.machine.shared}/tmp"]
        arguments = {"directory": self.directory, **arguments}
        answer = module(f"qemu_binary_{name}", arguments, *words, python=self.machine.python())
        assert not answer.get("failed"), answer
        return answer

    def binary(self, version):
        """The emulator of a version."""
        return f"{self.directory}/{version}/bin/qemu-system-x86_64"

    def names(self):
        """What is in its directory, hidden files too."""
        return sorted(os.listdir(self.path(self.directory)))

    def version(self, binary):
        """What a binary says in the machine."""
        return self.machine.run(binary, "-version").partition("version ")[2].split()[0]


@pytest.fixture(name="store")
def fixture_store(machine, request):
    return Store(machine, request.node.name)


@pytest.fixture(name="guest_of")
def fixture_guest_of(machine):
    """Starts guests in units of the machine, which end with the test."""
    names = []

    def start(name, binary):
        guest = boot_sector_guest(name, machine.shared / name, machine="pc-q35-10.0", accelerator="tcg")
        names.append(name)
        unit = f"[Service]\nExecStart={shlex.join([binary, *guest.words])}\n"
        pathlib.Path(f"/proc/{machine.leader}/root/run/systemd/system/{name}.service").write_text(unit)
        machine.run("systemctl", "daemon-reload")
        machine.run("systemctl", "start", f"{name}.service")
        wait_until(guest.monitor.exists, f"{name} has its monitor")
        guest.wait_for_ticks(3)
        return guest

    def stop(name):
        machine.run("systemctl", "stop", f"{name}.service")
        pathlib.Path(f"/proc/{machine.leader}/root/run/systemd/system/{name}.service").unlink()
        names.remove(name)

    start.stop = stop
    yield start
    for name in list(names):
        stop(name)


def test_packages_unpacked_beside_the_old_build_leave_the_host_as_it_is(store, guest_of):
    before = store.machine.run("sh", "-c", "dpkg -l; ls -lR /usr/share/qemu /var/lib/apt; cat /etc/ld.so.conf")
    old = guest_of("unpacked-old", INSTALLED)
    words = {"version": "11.1.3-1", "keep": 0}
    wrong = store.run("unpacked", "--check", packages=["qemu-system-nothing"], version="11.1.3-1")
    assert not wrong.ok and "[package-not-available]" in wrong.output and "qemu-system-nothing" in wrong.output

    check = store.run("unpacked", "--check", **words)
    assert check.ok and check.changed > 0 and check.result["guests_elsewhere"][0]["name"] == "unpacked-old"
    assert not store.path(store.directory).exists()

    done = store.run("unpacked", **words)
    assert done.ok, done.output
    new = f"{store.directory}/11.1.3-1/bin/qemu-system-x86_64"
    assert done.result["path"] == done.result["default"] == new
    assert done.result["version"] == store.version(store.link) == "11.1.3"
    (elsewhere,) = done.result["guests_elsewhere"]
    assert elsewhere == {"name": "unpacked-old", "binary": INSTALLED, "version": elsewhere["version"]}
    assert elsewhere["version"].startswith("10.0.")
    assert store.names() == [".lock", "11.1.3-1", "bin"]
    after = store.machine.run("sh", "-c", "dpkg -l; ls -lR /usr/share/qemu /var/lib/apt; cat /etc/ld.so.conf")
    assert after == before

    again = store.run("unpacked", **words)
    assert again.ok and again.changed == 0, again.output

    # It runs guests, by its own firmware and modules.
    guest = guest_of("unpacked-new", store.link)
    assert os.readlink(f"/proc/{guest.pid()}/exe") == new
    with guest.qmp() as monitor:
        monitor.execute("device-list-properties", typename="virtio-gpu-pci")
    assert f"{store.directory}/11.1.3-1/lib" in pathlib.Path(f"/proc/{guest.pid()}/maps").read_text()
    old.wait_for_ticks()


def test_libraries_that_come_along_are_used(store):
    """And nothing is begun without what makes QEMU use them."""
    packages = [str(path) for path in REPOSITORY.glob("*.deb") if re.match("qemu-|seabios|libelf|ipxe", path.name)]
    missing = store.run("unpacked", version="own", packages=packages)
    assert not missing.ok and "[patchelf-missing]" in missing.output
    assert store.names() == [".lock"]
    check = store.run("unpacked", "--check", version="own", packages=packages)
    assert check.ok and "There is no patchelf on this host" in check.output

    store.machine.run("sh", "-c", f"dpkg -i {CACHE}/packages/trixie/*.deb")
    done = store.run("unpacked", version="own", packages=packages)
    assert done.ok, done.output
    used = store.machine.run("ldd", f"{store.directory}/own/bin/qemu-system-x86_64")
    assert f"{store.directory}/own/bin/../lib/x86_64-linux-gnu/libelf" in used
    assert "=> /lib/x86_64-linux-gnu/libc.so.6" in used  # the machine's


def archive_of(store, name, place, version):
    """An archive on this machine of a QEMU 10.0 with its firmware; its path and checksum."""
    archive = store.machine.shared / f"{name}.tar"
    script = (
        f"set -e; rm -rf /tmp/{name}; mkdir -p /tmp/{name}/{place}/bin /tmp/{name}/{place}/share/qemu;"
        f" cp {INSTALLED} /tmp/{name}/{place}/bin; cp -rL /usr/share/seabios /tmp/{name}/{place}/share;"
        f" echo {version} >/tmp/{name}/{place}/share/qemu/ours; tar -C /tmp/{name} -cf {archive} .; rm -r /tmp/{name}"
    )
    store.machine.run("sh", "-c", script)
    return str(archive), f"sha256:{hashlib.sha256(archive.read_bytes()).hexdigest()}"


def test_versions_that_nobody_needs_go_and_others_stay(store, guest_of):
    archive, checksum = archive_of(store, "archive", "usr", 1)
    wrong = store.run("archive", version="a1", archive=archive, checksum="sha256:" + "0" * 64)
    assert not wrong.ok and "[checksum-differs]" in wrong.output and wrong.changed == 0
    assert not store.path(store.directory).exists()

    def put(version, **variables):
        arguments = {"archive": archive, "archive_on_hypervisor": version != "a1", "checksum": checksum, **variables}
        done = store.run("archive", version=version, **arguments)
        assert done.ok, done.output
        return done.result

    put("a1", keep=0)
    guest = guest_of("archive", store.link)
    store.machine.run("mkdir", "-p", f"{store.directory}/by-hand/bin")
    store.machine.run("cp", INSTALLED, f"{store.directory}/by-hand/bin")
    result = put("a2", keep=0)
    assert {item["name"]: item["reason"] for item in result["kept"]} == {
        "a1": f"in use by guest archive (process {store.machine.show('archive')['MainPID']})",
        "a2": "it is the default for new guests",
        "by-hand": "it was not made by this collection",
    }
    assert result["guests_elsewhere"][0]["binary"].endswith("/a1/bin/qemu-system-x86_64")

    # It ends, and a unit still names what it ran.
    unit = store.path("/etc/systemd/system/named.service")
    unit.write_text(f"[Service]\nExecStart={store.binary('a1')} -S\n")
    guest_of.stop("archive")
    wait_until(lambda: not guest.pids(), "it is gone")
    store.module("add", version="a3", archive=archive, checksum=checksum)
    answer = store.module("remove", keep=0, protect=[store.binary("a3")])
    assert not answer["changed"]
    assert "named by /etc/systemd/system/named.service" in json.dumps(answer["kept"])
    unit.unlink()

    # What an update under way names stays as well, and one more that is the latest.
    record = store.path("/run/vmfleet-cpr/web1/update.json")
    record.parent.mkdir(parents=True)
    record.write_text(json.dumps({"phase": "set-up", "old": {"executable": store.binary("a1")}}))
    found = store.module("info", keep=1, default=store.binary("by-hand"))
    assert {item["name"]: item["reason"] for item in found["versions"]} == {
        "a1": "named by /run/vmfleet-cpr/web1/update.json",
        "a2": "nobody uses it, and 1 later ones are kept",
        "a3": "it is one of the latest 1 that nobody uses",
        "by-hand": "it was not made by this collection",
    }
    record.unlink()

    # And to what is there, by its path.
    back = store.run("path", path=store.binary("a3"), keep=0)
    assert back.ok and back.result["default"] == store.binary("a3")
    assert sorted(back.result["removed"]) == [f"{store.directory}/a1", f"{store.directory}/a2"]
    assert store.names() == [".lock", "a3", "bin", "by-hand"]

    # Which may be the very link that new guests get it by. And what is said in text counts, not that there is one.
    same = store.run("path", path=store.link, keep=0)
    assert same.ok and same.changed == 0 and same.result["default"] == store.binary("a3")
    other = store.run("path", path=INSTALLED, keep=0, default="false")
    assert other.ok and other.changed == 0 and other.result["default"] == store.binary("a3")
    wrong = store.run("unpacked", version="a4", packages="/a.deb,b")
    assert not wrong.ok and "[bad-argument]" in wrong.output


def test_an_upgrade_in_place_keeps_what_running_guests_need(store, guest_of):
    old = guest_of("upgraded", INSTALLED)
    pid = old.pid()
    lists = store.machine.run("sh", "-c", "find /var/lib/apt /var/cache/apt || true")  # none was fetched yet
    check = store.run("package", "--check", version="1:11.1*")
    assert check.ok and check.result["guests_elsewhere"][0]["name"] == "upgraded", check.output
    assert store.machine.run("sh", "-c", "find /var/lib/apt /var/cache/apt || true") == lists
    wrong = store.run("package", version="1:99*")
    assert not wrong.ok and "[package-not-available]" in wrong.output and "1:99*" in wrong.output
    assert wrong.changed == 0

    assert store.version(INSTALLED).startswith("10.0.")

    done = store.run("package", version="1:11.1*", keep=0)
    assert done.ok, done.output
    (copy,) = done.result["kept"]
    assert copy["reason"].startswith("in use by guest upgraded"), copy
    assert done.result["path"] == done.result["default"] == INSTALLED
    assert done.result["version"] == store.version(store.link) == "11.1.3"
    (elsewhere,) = done.result["guests_elsewhere"]
    assert elsewhere["name"] == "upgraded" and elsewhere["version"].startswith("10.0.")
    assert old.pid() == pid
    old.wait_for_ticks()
    old.check_continuity()
    assert not store.path("/usr/sbin/policy-rc.d").exists()

    # Its QEMU finds a module of its own build where the new one has none of that name; else it would abort.
    assert "The guests upgraded run the build that is to be replaced." in re.sub(r"\s+", " ", done.output)
    (build,) = [name for name in os.listdir(store.path("/run/qemu")) if BUILD.fullmatch(name)]
    store.path("/usr/lib/x86_64-linux-gnu/qemu/hw-usb-host.so").unlink()
    with old.qmp() as monitor:
        monitor.execute("device-list-properties", typename="usb-host")
    assert f"/run/qemu/{build}/hw-usb-host.so" in pathlib.Path(f"/proc/{pid}/maps").read_text()

    again = store.run("package", version="1:11.1*")
    assert again.ok and again.changed == 0, again.output
    assert build in store.names()

    # There is a way back.
    back = guest_of("back", f"{store.directory}/{build}/bin/qemu-system-x86_64")
    with back.qmp() as monitor:
        monitor.execute("device-list-properties", typename="virtio-gpu-pci")
    maps = pathlib.Path(f"/proc/{back.pid()}/maps").read_text()
    assert f"{store.directory}/{build}/lib/x86_64-linux-gnu/qemu/hw-display-virtio-gpu.so" in maps

    # Once nobody runs that build, nothing of it is left.
    answer = store.module("remove", keep=0)
    assert not answer["changed"] and "in use by guest back" in json.dumps(answer["kept"])
    guest_of.stop("back")
    guest_of.stop("upgraded")
    wait_until(lambda: not old.pids() and not back.pids(), "they are gone")
    answer = store.module("remove", keep=0)
    assert answer["removed"] == [f"{store.directory}/{build}", f"/run/qemu/{build}"]
    assert not any(path.suffix == ".so" and "block" not in path.name for path in store.path("/run/qemu").rglob("*"))
    assert store.names() == [".lock", "bin"]
