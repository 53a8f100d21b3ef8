# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Guests whose devices were changed while they ran."""

from __future__ import annotations


import asyncio

import pytest

from ansible_collections.vmfleet.cpr.plugins.module_utils import command_line, process
from ansible_collections.vmfleet.cpr.plugins.module_utils.monitor import Monitor
from ansible_collections.vmfleet.cpr.plugins.module_utils.phases.describe import describe
from tests.guests.guest import OLD_SUITE, Guest, qemu, wait_until


def names(guest):
    """The ids of the devices that were made by an option or device_add."""
    with guest.qmp() as monitor:
        return [item["name"] for item in monitor.execute("qom-list", path="/machine/peripheral")]


def peripherals(guest):
    """Type, bus and place of each device that was made by an option or device_add."""
    with guest.qmp() as monitor:
        found = {}
        for item in monitor.execute("qom-list", path="/machine/peripheral"):
            if item["type"].startswith("child<"):
                path = f"/machine/peripheral/{item['name']}"
                names = {entry["name"] for entry in monitor.execute("qom-list", path=path)}
                found[item["name"]] = [item["type"]] + [
                    monitor.execute("qom-get", path=path, property=name)
                    for name in ("addr", "mac", "serial", "memdev", "node")
                    if name in names
                ]
        return found


def disks(guest):
    """The image under each device."""
    with guest.qmp() as monitor:
        return {
            block.get("qdev") or block["device"]: (block.get("inserted") or {}).get("file")
            for block in monitor.execute("query-block")
        }


def image(path):
    # The QEMU packages have no qemu-img; a raw file is enough.
    with open(path, "wb") as stream:
        stream.truncate(1 << 20)
    return str(path)


def test_what_was_plugged_in_stays_and_what_was_unplugged_stays_out(start, host, tmp_path, rebuilt_qemu):
    ports = [word for number in range(4) for word in ("-device", f"pcie-root-port,id=rp{number},chassis={number + 1}")]
    guest = start(
        "changeable",
        memory=["-object", "memory-backend-memfd,id=ram0,size=64M,share=on", "-m", "64M,slots=2,maxmem=1G"],
        more=[*ports, "-device", "qemu-xhci,id=xhci", "-device", "usb-tablet,id=tablet", "-device", "usb-kbd,id=keys"],
    )
    with guest.qmp() as monitor:
        extra = {"driver": "raw", "node-name": "extra", "file": {"driver": "file", "filename": image(tmp_path / "x")}}
        monitor.execute("blockdev-add", **extra)
        monitor.execute("device_add", driver="virtio-blk-pci", id="hotdisk", bus="rp0", drive="extra", serial="abc")
        monitor.execute("netdev_add", type="user", id="hotnet")
        monitor.execute("device_add", driver="virtio-net-pci", id="hotcard", bus="rp1", netdev="hotnet",
                        mac="52:54:00:aa:bb:cc")  # fmt: skip
        monitor.execute(
            "object-add", **{"qom-type": "memory-backend-memfd", "id": "more", "size": 128 << 20, "share": True}
        )
        monitor.execute("device_add", driver="pc-dimm", id="dimm", memdev="more")
        monitor.execute("object-add", **{"qom-type": "iothread", "id": "helper"})
        monitor.execute("device_add", driver="virtio-rng-pci", bus="rp2")
        monitor.execute("device_del", id="tablet")
    wait_until(lambda: "tablet" not in names(guest), "the tablet is gone")
    before = peripherals(guest), disks(guest)
    assert {"hotdisk", "hotcard", "dimm", "keys"} <= set(before[0])

    for binary in (None, rebuilt_qemu):
        outcome = host.until("resume", guest, **({"qemu_binary": binary} if binary else {}))
        assert outcome.changed
        assert (peripherals(guest), disks(guest)) == before
        guest.wait_for_ticks()
    guest.check_continuity()


def test_a_guest_sees_just_what_it_saw(start, host, tmp_path):
    """A Linux guest that uses the disk and the card that it got later."""
    ports = [word for number in range(3) for word in ("-device", f"pcie-root-port,id=rp{number},chassis={number + 1}")]
    guest = start("observer", linux=True, more=[*ports, "-device", "virtio-rng-pci,id=spare,bus=rp2"])

    def devices():
        """What the guest itself sees: it says so when it changes."""
        lines = [line for line in guest.lines() if line.startswith("pci ")]
        return lines[-1] if lines else None

    first = wait_until(devices, "the guest has looked")
    with guest.qmp() as monitor:
        extra = {"driver": "raw", "node-name": "extra", "file": {"driver": "file", "filename": image(tmp_path / "x")}}
        monitor.execute("blockdev-add", **extra)
        monitor.execute("device_add", driver="virtio-blk-pci", id="hotdisk", bus="rp0", drive="extra")
        monitor.execute("netdev_add", type="user", id="hotnet")
        monitor.execute("device_add", driver="virtio-net-pci", id="hotcard", bus="rp1", netdev="hotnet")
        monitor.execute("device_del", id="spare")
    wait_until(lambda: "spare" not in names(guest), "the guest has let the device go")
    wait_until(lambda: devices() != first and len(devices().split()) == len(first.split()) + 1, "the guest sees both")
    seen = devices()
    host.until("resume", guest)
    guest.wait_for_ticks(30)
    assert devices() == seen
    assert "spare" not in names(guest)
    guest.check_continuity()


@pytest.mark.parametrize("kind", ["drive", "blockdev"])
def test_a_disk_with_a_snapshot_keeps_it(start, host, tmp_path, kind):
    base = tmp_path / "base"
    node = f'{{"driver":"file","node-name":"data","filename":"{base}"}}'
    image(base)
    more = {
        "drive": ["-drive", f"if=none,id=data,file={base},format=raw", "-device", "virtio-blk-pci,id=vd,drive=data"],
        "blockdev": ["-blockdev", node, "-device", "virtio-blk-pci,id=vd,drive=data"],
    }[kind]
    guest = start("snapped", more=more)
    target = {"device": "data"} if kind == "drive" else {"node-name": "data", "snapshot-node-name": "top"}
    with guest.qmp() as monitor:
        monitor.execute(
            "blockdev-snapshot-sync", **target, **{"snapshot-file": str(tmp_path / "overlay"), "format": "qcow2"}
        )
    before = disks(guest)
    assert str(tmp_path / "overlay") in before.values()
    host.until("resume", guest)
    assert disks(guest) == before
    guest.check_continuity()


def test_a_medium_that_was_changed_is_the_one_that_is_there(start, host, tmp_path):
    first, second = image(tmp_path / "first.iso"), image(tmp_path / "second.iso")
    guest = start(
        "reader",
        more=["-drive", f"if=none,id=cd,media=cdrom,file={first},format=raw", "-device", "ide-cd,id=drive,drive=cd,bus=ide.2",
              "-device", "ide-cd,id=empty,bus=ide.3"],
    )  # fmt: skip
    with guest.qmp() as monitor:
        monitor.execute("blockdev-change-medium", id="drive", filename=second, format="raw")
        monitor.execute("blockdev-change-medium", id="empty", filename=first, format="raw")
    before = disks(guest)
    host.until("resume", guest)
    assert disks(guest) == before
    guest.check_continuity()


def test_drives_that_were_added_by_the_human_monitor(start, host, tmp_path):
    medium = image(tmp_path / "medium")
    guest = start("old school", more=["-device", "virtio-scsi-pci,id=scsi"])
    with guest.qmp() as monitor:
        for line in (
            f"drive_add 0 if=none,id=disk1,file={medium},format=raw", "drive_add 0 if=none,id=cd1,media=cdrom",
            "device_add scsi-hd,id=hd1,drive=disk1,bus=scsi.0", "device_add scsi-cd,id=cd,drive=cd1,bus=scsi.0",
        ):  # fmt: skip
            monitor.execute("human-monitor-command", **{"command-line": line})
    before = disks(guest)
    assert str(medium) in before.values()
    host.until("resume", guest)
    assert disks(guest) == before
    guest.check_continuity()


def test_a_disk_that_others_use_through_qemu_is_refused(start, host, tmp_path):
    guest = start("exported")
    with guest.qmp() as monitor:
        address = {"type": "unix", "data": {"path": str(tmp_path / "nbd")}}
        monitor.execute("nbd-server-start", addr=address)
        node = monitor.execute("query-block")[0]["inserted"]["node-name"]
        monitor.execute("block-export-add", type="nbd", id="backup", **{"node-name": node})
    (outcome,) = host.launch(guest)
    assert outcome.error.code == "block-export-running"
    assert "backup" in outcome.error.message
    assert len(guest.pids()) == 1


def test_what_qemu_does_not_tell_is_refused_before_anything_is_started(start, host):
    guest = start("odd", more=["-device", "virtio-serial-pci"])
    with guest.qmp() as monitor:
        monitor.execute("chardev-add", id="later", backend={"type": "pty", "data": {}})
        monitor.execute("device_add", driver="virtserialport", id="port", chardev="later")
    (outcome,) = host.launch(guest)
    assert outcome.error.code == "device-unreadable"
    assert "later" in outcome.error.message
    assert len(guest.pids()) == 1


# As real scripts write them; {dir} has some images.
UNTOUCHED = {
    "as little as can be": "-m 64 -hda {dir}/a -cdrom {dir}/b -boot d",
    "defaults and a display": "-m 64 -usb -usbdevice tablet -vga std -display none -nic user,model=e1000",
    "a drive by its interface": "-M pc -m 64 -drive file={dir}/a,if=virtio,format=raw,cache=none -drive file={dir}/b,media=cdrom -net nic -net user",
    "drives and devices": "-nodefaults -m 64 -drive file={dir}/a,if=none,id=d0,format=raw -device virtio-blk-pci,drive=d0"
    " -drive if=none,id=cd0,media=cdrom -device ide-cd,drive=cd0,id=cd -device virtio-balloon -device virtio-rng-pci",
    "scsi": "-nodefaults -m 64 -device virtio-scsi-pci,id=scsi0 -drive file={dir}/a,if=none,id=d0,format=raw"
    " -device scsi-hd,drive=d0,bus=scsi0.0,channel=0,scsi-id=0,lun=0 -device scsi-cd"
    " -drive file={dir}/b,if=none,id=d1,format=raw -device scsi-hd,drive=d1",
    "usb": "-nodefaults -m 64 -device qemu-xhci,id=x -device usb-tablet -device usb-kbd,id=k"
    " -drive file={dir}/a,if=none,id=stick,format=raw -device usb-storage,drive=stick",
    "json": """-nodefaults -m 64 -blockdev {{"driver":"raw","node-name":"n0","file":{{"driver":"file","filename":"{dir}/a"}}}}"""
    """ -device {{"driver":"virtio-blk-pci","drive":"n0","id":"d"}} -netdev {{"type":"user","id":"u0"}} -device {{"driver":"e1000","netdev":"u0"}}""",
    "both syntaxes": """-nodefaults -m 64 -blockdev {{"driver":"file","node-name":"a","filename":"{dir}/a"}}"""
    """ -drive file={dir}/b,if=none,id=b,format=raw -device {{"driver":"virtio-blk-pci","drive":"a"}} -device virtio-blk-pci,drive=b""",
    "a hub": "-nodefaults -m 64 -netdev user,id=n1 -netdev hubport,id=h0,hubid=0,netdev=n1 -netdev hubport,id=h1,hubid=0"
    " -device virtio-net-pci,netdev=h1",
    "objects": "-nodefaults -m 64 -smp 2 -object iothread,id=io0 -object memory-backend-ram,id=m0,size=32M -object memory-backend-ram,id=m1,size=32M"
    " -numa node,nodeid=0,memdev=m0,cpus=0 -numa node,nodeid=1,memdev=m1,cpus=1 -object rng-random,id=r,filename=/dev/urandom -device virtio-rng-pci,rng=r"
    " -device virtio-serial -chardev null,id=c0 -device virtserialport,chardev=c0,name=a"
    " -drive file={dir}/a,if=none,id=d0,format=raw -device virtio-blk-pci,drive=d0,iothread=io0",
    "bridges": "-nodefaults -M q35 -m 64 -device pcie-root-port,id=rp0,chassis=1 -device virtio-net-pci,bus=rp0,netdev=n0,romfile= -netdev user,id=n0"
    " -device pcie-pci-bridge,id=b0 -device e1000,bus=b0,addr=3,netdev=n1 -netdev user,id=n1 -device pxb-pcie,bus_nr=8,id=pxb",
    "firmware and sound": "-M pc -m 64 -audiodev none,id=snd -device intel-hda -device hda-duplex,audiodev=snd"
    " -serial none -parallel none -monitor none -rtc base=utc",
}  # fmt: skip


@pytest.mark.parametrize("row", UNTOUCHED)
def test_a_guest_that_nobody_touched_keeps_its_command_line(tmp_path, row):
    for name in ("a", "b"):
        image(tmp_path / name)
    line = UNTOUCHED[row].format(dir=tmp_path)
    words = ["-name", "guest=untouched,debug-threads=on", "-S", "-qmp", f"unix:{tmp_path}/qmp.sock,server=on,wait=off"]
    guest = Guest("untouched", tmp_path, [*words, "-display", "none", *line.split()])
    try:
        guest.start(qemu(OLD_SUITE))
        found = process.read(guest.pid())

        async def look():
            async with await Monitor.connect(str(guest.monitor), pid=guest.pid()) as monitor:
                return await describe(monitor, found, "any")

        description = asyncio.run(look())
        assert command_line.write(description.options) == list(found.arguments)
        assert [note for note in description.notes if "user network" not in note] == []
    finally:
        guest.kill()
