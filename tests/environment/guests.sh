#!/bin/sh
# Makes the test guests in .cache/guests:
#
#     boot_sector.img     a disk whose boot sector is the whole guest (tests/guests/boot_sector.S)
#     busy_sector.img     the same, and it changes its memory all the time
#     echo_sector.img     another, which answers pings (tests/guests/echo_sector.S)
#     vmlinuz, initrd     Debian's cloud kernel with a busybox that runs tests/guests/init
#
# Does nothing when they are there and up to date.
set -eu

top=$(cd "$(dirname "$0")/../.." && pwd)
sources=$top/tests/guests
cache=$top/.cache/guests
. "$top/tests/environment/apt.sh"

mkdir -p "$cache"
exec 9>"$cache/lock"
flock 9

for name in boot_sector busy_sector echo_sector; do
    if [ ! "$cache/$name.img" -nt "$sources/$name.S" ]; then
        need as binutils
        as --32 -I "$sources" -o "$cache/$name.o" "$sources/$name.S"
        ld -m elf_i386 -Ttext 0x7c00 --oformat binary -o "$cache/$name.img" "$cache/$name.o"
        truncate -s 1M "$cache/$name.img" # the BIOS does not read a disk of one sector
    fi
done

if [ ! -f "$cache/root/complete" ]; then
    echo "Unpacking the Linux guest ..."
    rm -rf "$cache/root" "$cache/packages"
    mkdir -p "$cache/packages" "$cache/root"
    apt_download bookworm "$cache/packages" linux-image-cloud-amd64 busybox-static
    for package in "$cache/packages"/linux-image-[0-9]*.deb "$cache/packages"/busybox-static_*.deb; do
        dpkg-deb -x "$package" "$cache/root"
    done
    rm -rf "$cache/packages"
    touch "$cache/root/complete"
fi

if [ ! "$cache/initrd" -nt "$sources/init" ] || [ ! "$cache/initrd" -nt "$0" ]; then
    tree=$cache/tree
    rm -rf "$tree"
    mkdir -p "$tree/bin" "$tree/modules" "$tree/proc" "$tree/sys" "$tree/dev"
    cp "$cache/root/bin/busybox" "$tree/bin/busybox"
    { echo '#!/bin/busybox sh'; cat "$sources/init"; } >"$tree/init"
    chmod +x "$tree/init"
    # Those that this kernel has as modules; init loads them in this order.
    for module in virtio virtio_ring virtio_pci_legacy_dev virtio_pci_modern_dev virtio_pci virtio_blk failover net_failover virtio_net rng-core virtio-rng virtio_console; do
        find "$cache/root/lib/modules" -name "$module.ko" -exec cp {} "$tree/modules/$(printf %s "$module")" \;
        if [ -f "$tree/modules/$module" ]; then echo "$module"; fi
    done >"$tree/modules.order"
    (cd "$tree" && find . | "$cache/root/bin/busybox" cpio -o -H newc 2>/dev/null | gzip) >"$cache/initrd"
    cp "$cache/root"/boot/vmlinuz-* "$cache/vmlinuz"
    rm -rf "$tree"
fi
