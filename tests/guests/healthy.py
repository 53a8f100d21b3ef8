# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Command lines with nothing wrong: what people run, and what must pass without a word."""

from __future__ import annotations

import pathlib
import typing as t

from tests.guests.guest import NEW_SUITE, OLD_SUITE

_NUMA = (
    *("-object", "memory-backend-memfd,id=m0,size=32M,share=on"),
    *("-object", "memory-backend-memfd,id=m1,size=32M,share=on"),
    *("-numa", "node,nodeid=0,cpus=0-1,memdev=m0", "-numa", "node,nodeid=1,cpus=2-3,memdev=m1"),
)
_IMAGE = "if=none,format=raw,file={dir}/"


def _disk(name: str) -> tuple[str, str]:
    """A drive of its own; `prepare` makes its image."""
    return ("-drive", f"id={name},{_IMAGE}{name}.img")


def _blockdev(name: str) -> tuple[str, ...]:
    return ("-blockdev", f"driver=file,filename={{dir}}/{name}.img,node-name={name}-file", "-blockdev",
            f"driver=raw,file={name}-file,node-name={name}")  # fmt: skip


# A name, the QEMU that it starts on, and the arguments of `boot_sector_guest`.
COMMAND_LINES: dict[str, tuple[str, dict[str, t.Any]]] = {
    "plain": (OLD_SUITE, {}),
    "i440fx": (OLD_SUITE, {"machine": "pc-i440fx-10.0", "accelerator": "tcg"}),
    "q35-9.2, machine properties": (OLD_SUITE, {"machine": "pc-q35-9.2,hpet=off,vmport=off,smm=off"}),
    "q35-9.0, four processors": (OLD_SUITE, {"machine": "pc-q35-9.0", "more": ["-smp", "4,sockets=2,cores=2"]}),
    "a named CPU model": (OLD_SUITE, {"accelerator": "tcg", "more": ["-cpu", "Nehalem-v1"]}),
    "a CPU with features": (OLD_SUITE, {"accelerator": "tcg", "more": ["-cpu", "qemu64,+ssse3,-svm,vendor=GenuineIntel"]}),
    "NUMA": (OLD_SUITE, {"memory": (), "more": [*_NUMA, "-smp", "4"]}),
    "memory slots with a DIMM": (OLD_SUITE, {"more": [
        "-m", "64M,slots=4,maxmem=1G", "-object", "memory-backend-memfd,id=d0,size=128M,share=on",
        "-device", "pc-dimm,id=dimm0,memdev=d0"]}),
    "virtio-blk with an I/O thread": (OLD_SUITE, {"more": [
        "-object", "iothread,id=io0", *_blockdev("data"), "-device", "virtio-blk-pci,drive=data,iothread=io0,id=vda"]}),
    "virtio-scsi with disk and CD": (OLD_SUITE, {"more": [
        "-device", "virtio-scsi-pci,id=scsi0", *_blockdev("data"), "-device", "scsi-hd,drive=data,bus=scsi0.0,lun=1",
        *_disk("cd"), "-device", "scsi-cd,drive=cd,bus=scsi0.0,lun=2"]}),
    "a second disk with a serial number": (OLD_SUITE, {"more": [
        *_blockdev("data"), "-device", "ide-hd,bus=ide.2,drive=data,serial=cpr1,id=sdb"]}),
    "AHCI with an empty CD": (OLD_SUITE, {"more": ["-device", "ide-cd,bus=ide.1,id=cd0"]}),
    "several cards": (OLD_SUITE, {"more": [
        "-netdev", "user,id=a", "-device", "virtio-net-pci,netdev=a,mac=52:54:00:01:02:03",
        "-netdev", "user,id=b", "-device", "e1000e,netdev=b", "-netdev", "user,id=c", "-device", "rtl8139,netdev=c"]}),
    "a display by VNC": (OLD_SUITE, {"more": ["-vga", "std", "-vnc", "unix:{dir}/vnc.sock"]}),
    "virtio-gpu and a tablet": (OLD_SUITE, {"more": [
        "-device", "virtio-vga,id=gpu", "-device", "qemu-xhci,id=xhci", "-device", "usb-tablet,bus=xhci.0",
        "-vnc", "unix:{dir}/vnc.sock"]}),
    "USB": (OLD_SUITE, {"more": [
        "-device", "qemu-xhci,id=xhci", "-device", "usb-kbd,bus=xhci.0", "-device", "usb-hub,bus=xhci.0,port=2",
        *_blockdev("stick"), "-device", "usb-storage,bus=xhci.0,port=2.1,drive=stick"]}),
    "small virtio devices": (OLD_SUITE, {"more": [
        "-device", "virtio-balloon-pci", "-object", "rng-random,id=r0,filename=/dev/urandom", "-device",
        "virtio-rng-pci,rng=r0", "-device", "virtio-serial-pci", "-chardev",
        "socket,id=agent,path={dir}/agent.sock,server=on,wait=off", "-device",
        "virtserialport,chardev=agent,name=org.qemu.guest_agent.0"]}),
    "PCIe root ports": (OLD_SUITE, {"more": [
        "-device", "pcie-root-port,id=rp0,chassis=1,slot=1", "-device", "pcie-root-port,id=rp1,chassis=2,slot=2",
        "-netdev", "user,id=a", "-device", "virtio-net-pci,netdev=a,bus=rp0",
        "-device", "pcie-pci-bridge,id=br0,bus=rp1"]}),
    "sound": (OLD_SUITE, {"more": [
        "-audiodev", "none,id=snd0", "-device", "ich9-intel-hda", "-device", "hda-duplex,audiodev=snd0"]}),
    "watchdog, panic device, identity": (OLD_SUITE, {"more": [
        "-device", "i6300esb", "-device", "pvpanic", "-uuid", "8b2e4f5c-3d6a-4b8f-9c1e-0a1b2c3d4e5f",
        "-smbios", "type=1,manufacturer=Example,serial=42", "-rtc", "base=localtime", "-boot", "menu=on"]}),
    "11.1, plain": (NEW_SUITE, {}),
    "11.1, virtio": (NEW_SUITE, {"machine": "pc-q35-10.1", "more": [
        *_blockdev("data"), "-device", "virtio-blk-pci,drive=data", "-netdev", "user,id=a", "-device",
        "virtio-net-pci,netdev=a", "-device", "virtio-rng-pci", "-device", "virtio-keyboard-pci"]}),
    "11.1, i440fx with a named CPU model": (NEW_SUITE, {
        "machine": "pc-i440fx-11.0", "accelerator": "tcg", "more": ["-cpu", "EPYC-v1,-avx2"]}),
}  # fmt: skip


def prepare(directory: pathlib.Path) -> None:
    """Make the images that the command lines name."""
    directory.mkdir(parents=True, exist_ok=True)
    for name in ("data", "stick", "cd"):
        with open(directory / f"{name}.img", "wb") as image:
            image.truncate(4 << 20)
