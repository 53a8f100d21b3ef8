# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Guests whose devices were changed while they ran."""

from __future__ import annotations


import pytest

from tests.guests.guest import wait_until


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
    wait_until(lambda: "tablet" not in peripherals(guest), "the tablet is gone")
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
    wait_until(lambda: "spare" not in peripherals(guest), "the guest has let the device go")
    wait_until(lambda: devices() != first and len(devices().split()) == len(first.split()) + 1, "the guest sees both")
    seen = devices()
    host.until("resume", guest)
    guest.wait_for_ticks(30)
    assert devices() == seen
    assert "spare" not in peripherals(guest)
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


def test_what_qemu_does_not_tell_is_refused_before_anything_is_started(start, host):
    guest = start("odd", more=["-device", "virtio-serial-pci"])
    with guest.qmp() as monitor:
        monitor.execute("chardev-add", id="later", backend={"type": "pty", "data": {}})
        monitor.execute("device_add", driver="virtserialport", id="port", chardev="later")
    (outcome,) = host.launch(guest)
    assert outcome.error.code == "device-unreadable"
    assert "later" in outcome.error.message
    assert len(guest.pids()) == 1
