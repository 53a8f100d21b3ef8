# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Guests as somebody's script has started them: who talked to them finds them at the same place.

Every row of docs/guests.md that can run here has its test here, in test_hotplug.py,
test_network.py or test_systemd.py; what is refused is in the unit tests.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import pwd
import socket
import subprocess
import sys
import time

import pytest

from tests.guests.guest import NEW_SUITE, qemu, wait_until

NOBODY = pwd.getpwnam("nobody").pw_uid


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def said_at(address, more=b"", until=b"", times=1):
    """What a client hears, up to some words, who connects to a path, or to a port of this machine."""
    family = socket.AF_INET if isinstance(address, int) else socket.AF_UNIX
    with socket.socket(family) as client:
        client.settimeout(10)
        client.connect(("127.0.0.1", address) if isinstance(address, int) else str(address))
        client.sendall(more)
        heard = b""
        while not heard or heard.count(until) < times:
            part = client.recv(4096)
            if not part:
                break
            heard += part
        return heard


def updated_twice(host, guest, rebuilt_qemu):
    """The guest after each of two updates: the second one starts from what the first has made."""
    for binary in (qemu(NEW_SUITE), rebuilt_qemu):
        host.until("resume", guest, qemu_binary=binary)
        yield
        guest.wait_for_ticks()
    guest.check_continuity()


# A client connects and must hear this; {dir} and {port} are filled in.
HEARD = {
    "console at a socket": (["-serial", "none", "-serial", "unix:{dir}/c,server=on,wait=off"], "{dir}/c", b"", None),
    "human monitor": (["-monitor", "unix:{dir}/hmp,server,nowait"], "{dir}/hmp", b"", b"QEMU 11.1"),
    "human monitor on a serial line": (["-serial", "mon:unix:{dir}/m,server=on,wait=off"], "{dir}/m", b"\x01c", b"QEMU 11.1"),
    "human monitor by telnet": (["-monitor", "telnet:127.0.0.1:{port},server,nowait"], "{port}", b"", b"QEMU 11.1"),
    "human monitor by -mon": (
        ["-chardev", "socket,id=h,path={dir}/hmp,server=on,wait=off", "-mon", "chardev=h,mode=readline"],
        "{dir}/hmp", b"", b"QEMU 11.1",
    ),
    "a second QMP monitor": (["-qmp-pretty", "unix:{dir}/q,server=on,wait=off"], "{dir}/q", b"", b'"QMP"'),
    "QMP at a port": (["-qmp", "tcp:127.0.0.1:{port},server=on,wait=off"], "{port}", b"", b'{"QMP"'),
    "QMP at a port by -chardev": (
        ["-chardev", "socket,id=m2,host=127.0.0.1,port={port},server=on,wait=off", "-mon", "chardev=m2,mode=control"],
        "{port}", b"", b'{"QMP"',
    ),
    "debugger": (["-gdb", "tcp:127.0.0.1:{port}"], "{port}", b"$qSupported#37+$D#44", b"$OK#9a"),
    "VNC at a path": (["-vnc", "unix:{dir}/vnc"], "{dir}/vnc", b"", b"RFB 003.008"),
    "VNC by -display at a path": (["-display", "vnc=unix:{dir}/vnc"], "{dir}/vnc", b"", b"RFB 003.008"),
}  # fmt: skip


@pytest.mark.parametrize("row", HEARD)
def test_who_connects_at_the_old_place_reaches_the_guest(start, host, tmp_path, rebuilt_qemu, row):
    words, where, sent, heard = HEARD[row]
    values = {"dir": str(tmp_path / "found"), "port": str(free_port())}
    words = [word.format(**values) for word in words]
    where = where.format(**values)
    address = int(where) if where.isdigit() else where
    guest = start("found", more=words)
    for dummy in updated_twice(host, guest, rebuilt_qemu):
        if heard is None:
            with contextlib.closing(socket.socket(socket.AF_UNIX)) as client:
                client.connect(address)
        else:
            assert heard in said_at(address, sent, heard)


def test_the_console_is_the_guests_own(start, host, rebuilt_qemu, tmp_path):
    """Ticks are heard at the socket, and the log that QEMU keeps of it goes on."""
    guest = start(
        "speaker",
        console=["-chardev", "socket,id=console,path={dir}/con,server=on,wait=off,logfile={dir}/console.log",
                 "-serial", "chardev:console"],
    )  # fmt: skip
    for dummy in updated_twice(host, guest, rebuilt_qemu):
        heard = said_at(tmp_path / "speaker" / "con", until=b"\n", times=3)
        assert int(heard.split(b"\n")[1], 16) in guest.ticks()


def test_the_guest_agents_channel(start, host, tmp_path, rebuilt_qemu):
    path = tmp_path / "channel"
    guest = start(
        "agent", linux=True,
        more=["-device", "virtio-serial-pci", "-chardev", f"socket,id=agent,path={path},server=on,wait=off",
              "-device", "virtserialport,chardev=agent,name=org.qemu.guest_agent.0"],
    )  # fmt: skip
    wait_until(lambda: b"hello" in said_at(path, b"hello\n", b"hello"), "the guest's agent answers")
    for dummy in updated_twice(host, guest, rebuilt_qemu):
        assert b"again" in said_at(path, b"again\n", b"again")


@pytest.mark.parametrize(
    "words", [["-vnc", "127.0.0.1:{display}"], ["-display", "vnc=127.0.0.1:{display},share=ignore"]]
)
def test_vnc_at_a_port(start, host, rebuilt_qemu, words):
    port = 5900 + free_port() % 200
    guest = start("seen", more=["-device", "VGA", *(word.format(display=port - 5900) for word in words)])
    for dummy in updated_twice(host, guest, rebuilt_qemu):
        assert said_at(port).startswith(b"RFB 003.008")


def test_a_vnc_address_that_was_changed_at_run_time(start, host, rebuilt_qemu):
    port = free_port()
    guest = start("seen", more=["-device", "VGA", "-vnc", "none"])
    with guest.qmp() as monitor:
        address = {"type": "inet", "host": "127.0.0.1", "port": str(port)}
        monitor.execute("display-update", type="vnc", addresses=[address])
    for dummy in updated_twice(host, guest, rebuilt_qemu):
        assert said_at(port).startswith(b"RFB 003.008")


def test_forwarded_ports(start, host, rebuilt_qemu):
    first, second = free_port(), free_port()
    guest = start(
        "forwarding", linux=True, address="10.0.2.15/24",
        network=["-nic", f"user,model=virtio-net-pci,hostfwd=tcp:127.0.0.1:{first}-10.0.2.15:7"],
    )  # fmt: skip
    with guest.qmp() as monitor:
        monitor.execute("human-monitor-command", **{"command-line": f"hostfwd_add tcp:127.0.0.1:{second}-10.0.2.15:7"})
    wait_until(lambda: said_at(first, b"hello\n") == b"hello\n", "the guest echoes")
    for dummy in updated_twice(host, guest, rebuilt_qemu):
        for port in (first, second):
            wait_until(lambda port=port: said_at(port, b"again\n") == b"again\n", f"the guest echoes at port {port}")


def test_a_disk_by_an_inherited_descriptor(start, host, tmp_path, rebuilt_qemu):
    image = tmp_path / "more.img"
    image.write_bytes(bytes(1 << 20))
    descriptor = os.open(image, os.O_RDWR)
    os.set_inheritable(descriptor, True)
    node = {"driver": "file", "node-name": "more", "filename": "/dev/fdset/7"}
    guest = start(
        "heir",
        more=["-add-fd", f"fd={descriptor},set=7,opaque=rdwr:more", "-blockdev", json.dumps(node),
              "-device", "virtio-blk-pci,drive=more"],
        surroundings={"pass_fds": [descriptor]},
    )  # fmt: skip
    os.close(descriptor)
    for dummy in updated_twice(host, guest, rebuilt_qemu):
        with guest.qmp() as monitor:
            (fd_set,) = monitor.execute("query-fdsets")
        assert fd_set["fdset-id"] == 7
        assert fd_set["fds"][0]["opaque"] == "rdwr:more"
        links = {
            os.readlink(entry) for entry in pathlib.Path(f"/proc/{guest.pid()}/fd").iterdir() if entry.is_symlink()
        }
        assert str(image) in links


def test_a_configuration_file(start, host, tmp_path, rebuilt_qemu):
    config = tmp_path / "guest.cfg"
    config.write_text(
        '# devices\n[device "rng0"]\n  driver = "virtio-rng-pci"\n\n'
        f'[chardev "hmp"]\n  backend = "socket"\n  path = "{tmp_path}/hmp"\n  server = "on"\n  wait = "off"\n\n'
        '[mon "hm"]\n  mode = "readline"\n  chardev = "hmp"\n'
    )
    os.utime(config, (time.time() - 60, time.time() - 60))
    guest = start("configured", more=["-readconfig", str(config)])
    for dummy in updated_twice(host, guest, rebuilt_qemu):
        assert b"QEMU 11.1" in said_at(tmp_path / "hmp", until=b"QEMU 11.1")
        with guest.qmp() as monitor:
            names = [item["name"] for item in monitor.execute("qom-list", path="/machine/peripheral")]
        assert "rng0" in names


def test_a_configuration_file_that_was_changed_is_refused(start, host, tmp_path):
    config = tmp_path / "guest.cfg"
    config.write_text('[device "rng0"]\n  driver = "virtio-rng-pci"\n')
    os.utime(config, (time.time() - 60, time.time() - 60))
    guest = start("configured", more=["-readconfig", str(config)])
    os.utime(config, (time.time() + 60, time.time() + 60))
    (outcome,) = host.launch(guest)
    assert outcome.error.code == "config-changed"
    assert len(guest.pids()) == 1


def test_a_console_on_standard_output(start, host, tmp_path, rebuilt_qemu):
    """As under systemd or nohup: -nographic, standard output a file."""
    log = tmp_path / "console"
    with open(log, "ab") as stream:
        guest = start(
            "graphicless", more=["-nographic", "-serial", "mon:stdio"], surroundings={"stdout": stream}
        )  # fmt: skip
        for dummy in updated_twice(host, guest, rebuilt_qemu):
            assert os.readlink(f"/proc/{guest.pid()}/fd/1") == str(log)


def test_a_terminal_that_somebody_sits_at_is_refused(start, host):
    ours, theirs = os.openpty()
    guest = start("typed", more=["-serial", "stdio"], surroundings={"stdin": theirs})
    (outcome,) = host.launch(guest)
    os.close(ours)
    os.close(theirs)
    assert outcome.error.code == "terminal-in-use"
    assert len(guest.pids()) == 1


def test_a_pid_file_and_daemonize(start, host, tmp_path, rebuilt_qemu):
    pidfile = tmp_path / "guest.pid"
    guest = start("daemon", more=["-daemonize", "-pidfile", str(pidfile)], accelerator="tcg")
    for dummy in updated_twice(host, guest, rebuilt_qemu):
        assert int(pidfile.read_text()) == guest.pid()


def test_a_qemu_that_becomes_another_user(start, host, tmp_path, rebuilt_qemu):
    for parent in (tmp_path, *tmp_path.parents[:2]):
        parent.chmod(0o711)
    guest = start("humble", more=["-run-with", "user=nobody"], owner=NOBODY)
    before = pathlib.Path(f"/proc/{guest.pid()}/status").read_text()
    assert f"Uid:\t{NOBODY}" in before
    for dummy in updated_twice(host, guest, rebuilt_qemu):
        after = pathlib.Path(f"/proc/{guest.pid()}/status").read_text()
        for key in ("Uid:", "Gid:", "Groups:"):
            assert [line for line in after.splitlines() if line.startswith(key)] == [
                line for line in before.splitlines() if line.startswith(key)
            ]


def test_a_disk_that_only_root_could_open_is_refused(start, host):
    """QEMU opens a disk again when the guest goes on: neither the new nor the old one could."""
    guest = start("humble", more=["-run-with", "user=nobody"])
    (outcome,) = host.launch(guest)
    assert outcome.error.code == "image-not-accessible"
    assert "disk.img" in outcome.error.message
    assert len(guest.pids()) == 1


def test_a_disk_whose_file_was_replaced_is_refused(start, host):
    guest = start("replaced")
    image = guest.directory / "disk.img"
    other = guest.directory / "other.img"
    other.write_bytes(image.read_bytes())
    other.rename(image)
    (outcome,) = host.launch(guest)
    assert outcome.error.code == "image-replaced"
    assert str(image) in outcome.error.message
    assert len(guest.pids()) == 1


def test_a_daemon_with_relative_paths(start, host, rebuilt_qemu, tmp_path):
    """QEMU goes to / when it becomes a daemon; its command line still counts from where it was started."""
    directory = tmp_path / "daemon"
    directory.mkdir()
    (directory / "more.img").write_bytes(bytes(1 << 20))
    guest = start(
        "daemon", accelerator="tcg", surroundings={"env": {**os.environ, "PWD": str(directory)}},
        more=["-daemonize", "-pidfile", "guest.pid", "-blockdev", "driver=file,node-name=more,filename=more.img",
              "-device", "virtio-blk-pci,drive=more"],
    )  # fmt: skip
    for dummy in updated_twice(host, guest, rebuilt_qemu):
        assert int((directory / "guest.pid").read_text()) == guest.pid()


def test_processors_and_scheduling(start, host, rebuilt_qemu):
    if os.cpu_count() < 2:
        pytest.skip("this machine has one processor only, so nothing can be pinned")
    guest = start("pinned", accelerator="tcg", more=["-smp", "2", "-object", "iothread,id=io0"])

    def threads(key, command):
        with guest.qmp() as monitor:
            return {item[key]: item["thread-id"] for item in monitor.execute(command)}

    os.sched_setscheduler(guest.pid(), os.SCHED_BATCH, os.sched_param(0))
    for number, thread in threads("cpu-index", "query-cpus-fast").items():
        os.sched_setaffinity(thread, {number % 2})
    os.sched_setaffinity(threads("id", "query-iothreads")["io0"], {1})
    for dummy in updated_twice(host, guest, rebuilt_qemu):
        for number, thread in threads("cpu-index", "query-cpus-fast").items():
            assert os.sched_getaffinity(thread) == {number % 2}
        assert os.sched_getaffinity(threads("id", "query-iothreads")["io0"]) == {1}
        assert os.sched_getscheduler(guest.pid()) == os.SCHED_BATCH


_BOUND = """
import ctypes, os, sys
mask = ctypes.c_ulong(1)
if ctypes.CDLL(None).syscall(238, 2, ctypes.byref(mask), ctypes.c_ulong(64)):
    sys.exit("no NUMA here")
"""


def test_the_numa_policy(start, host, rebuilt_qemu):
    if os.uname().machine != "x86_64" or subprocess.run([sys.executable, "-c", _BOUND], check=False).returncode:
        pytest.skip("the NUMA policy of a process can't be set on this machine")

    def bind():
        exec(_BOUND)

    def policy():
        lines = pathlib.Path(f"/proc/{guest.pid()}/numa_maps").read_text().splitlines()
        return next(line.split()[1] for line in lines if " heap " in line)

    guest = start("bound", surroundings={"preexec_fn": bind})
    assert policy() == "bind:0"
    for dummy in updated_twice(host, guest, rebuilt_qemu):
        assert policy() == "bind:0"


def test_a_network_namespace_of_its_own(start, host, rebuilt_qemu):
    name = f"cprns{os.getpid()}"

    def ip(*words):
        return subprocess.run(["ip", *words], check=True, stdout=subprocess.PIPE, text=True).stdout

    ip("netns", "add", name)
    try:
        ip("-n", name, "link", "add", "br0", "type", "bridge")
        ip("-n", name, "tuntap", "add", "dev", "tap0", "mode", "tap")
        ip("-n", name, "link", "set", "tap0", "master", "br0")
        ip("-n", name, "link", "set", "tap0", "up")
        enter = f"import os,sys; os.execvp('ip', ['ip', 'netns', 'exec', '{name}'] + sys.argv[1:])"
        guest = start(
            "apart",
            more=["-netdev", "tap,id=n,ifname=tap0,script=no,downscript=no", "-device", "virtio-net-pci,netdev=n"],
            prefix=[sys.executable, "-c", enter],
        )
        namespace = os.readlink(f"/proc/{guest.pid()}/ns/net")
        assert namespace != os.readlink("/proc/self/ns/net")
        for dummy in updated_twice(host, guest, rebuilt_qemu):
            assert os.readlink(f"/proc/{guest.pid()}/ns/net") == namespace
            links = json.loads(ip("-n", name, "-json", "link", "show", "master", "br0"))
            assert [item["ifname"] for item in links if "UP" in item["flags"]] == ["tap0"]
        guest.kill()
    finally:
        ip("netns", "delete", name)


def test_a_mount_namespace_of_its_own(start, host, tmp_path, rebuilt_qemu):
    """As with PrivateTmp= and the like: what both see is at the same place."""
    private = tmp_path / "private"
    private.mkdir()
    guest = start(
        "secluded",
        prefix=[
            "unshare",
            "-m",
            "--propagation",
            "private",
            "sh",
            "-c",
            f'mount -t tmpfs none {private}; exec "$@"',
            "-",
        ],
    )
    namespace = os.readlink(f"/proc/{guest.pid()}/ns/mnt")
    assert namespace != os.readlink("/proc/self/ns/mnt")
    for dummy in updated_twice(host, guest, rebuilt_qemu):
        assert os.readlink(f"/proc/{guest.pid()}/ns/mnt") == namespace


def test_a_state_directory_that_the_qemu_does_not_see_is_refused(start, host):
    host.state.mkdir()
    guest = start(
        "secluded",
        prefix=[
            "unshare",
            "-m",
            "--propagation",
            "private",
            "sh",
            "-c",
            f'mount -t tmpfs none {host.state}; exec "$@"',
            "-",
        ],
    )
    (outcome,) = host.launch(guest)
    assert outcome.error.code == "path-not-visible"
    assert str(host.state) in outcome.error.message
    assert len(guest.pids()) == 1


def test_a_guest_of_another_manager_is_left_alone(start, host, tmp_path):
    directory = tmp_path / "run" / "libvirt" / "qemu"
    directory.mkdir(parents=True)
    guest = start("theirs", more=["-monitor", f"unix:{directory}/hmp,server=on,wait=off"])
    (outcome,) = host.launch(guest)
    assert outcome.error.code == "managed-by-another"
    assert "libvirt" in outcome.error.message
    assert len(guest.pids()) == 1


def test_a_guest_in_a_container_is_refused(start, host):
    guest = start("inside", prefix=["unshare", "--pid", "--fork", "--kill-child"])
    before = guest.pids()
    (outcome,) = host.launch(guest)
    assert outcome.error.code == "in-container"
    assert guest.pids() == before


def test_what_blocks_a_migration_is_told_in_qemus_words(start, host, tmp_path):
    image = tmp_path / "nvme.img"
    image.write_bytes(bytes(1 << 20))
    guest = start(
        "blocked", more=["-drive", f"if=none,id=n,file={image},format=raw", "-device", "nvme,drive=n,serial=x"]
    )
    (outcome,) = host.launch(guest)
    assert outcome.error.code == "migration-blocked"
    assert "nvme" in outcome.error.message
    assert len(guest.pids()) == 1
    assert guest.status() == "running"
    guest.check_continuity()


@pytest.mark.parametrize("way", ["cpr-transfer", "precopy", "cpr-reboot", "cpr-exec", "checkpoint"])
def test_what_scripts_write_goes_along_in_every_way(start, host, rebuilt_qemu, tmp_path, way):
    port = free_port()
    configuration = tmp_path / "more.cfg"
    configuration.write_text('[device "usb"]\n  driver = "qemu-xhci"\n', encoding="ascii")
    more = ["-readconfig", str(configuration), "-pidfile", "{dir}/pid", "-device", "vmgenid,guid=auto"]
    more += ["-monitor", f"tcp:127.0.0.1:{port},server=on,wait=off", "-vnc", "unix:{dir}/vnc.sock"]
    private = {"memory": None} if way == "precopy" else {}
    guest = start("found", suite=NEW_SUITE, more=more, **private)
    with guest.qmp() as monitor:
        generation = monitor.execute("query-vm-generation-id")
    if way == "checkpoint":
        outcomes = [*host.checkpoint(guest), *host.restore(guest)]
        assert [outcome.error for outcome in outcomes] == [None, None]
    else:
        assert host.until("resume", guest, qemu_binary=rebuilt_qemu, mode=way).update.mode == way
    guest.wait_for_ticks()
    guest.check_continuity()
    with guest.qmp() as monitor:
        assert monitor.execute("query-vm-generation-id") == generation
        assert "usb" in [item["name"] for item in monitor.execute("qom-list", path="/machine/peripheral")]
    assert (guest.directory / "pid").read_text(encoding="ascii").strip() == str(guest.pid())
    assert said_at(port, until=b"(qemu)").startswith(b"QEMU")
    assert said_at(guest.directory / "vnc.sock").startswith(b"RFB")
