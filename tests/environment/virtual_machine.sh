#!/bin/sh
# Makes what a virtual machine needs that is a hypervisor itself and can be rebooted
# (tests/guests/virtual_machine.py boots it):
#
#     .cache/virtual-machine/vmlinuz      Debian trixie's cloud kernel; it needs no initrd for an NVMe disk
#     .cache/virtual-machine/root.img     Debian trixie with systemd, SSH and Python; every machine gets a copy
#     .cache/virtual-machine/shared.img   the QEMUs and the guests of .cache, which it sees at the same path
#     .cache/virtual-machine/id_ed25519   the key that root logs in with
#
# Does nothing when they are there and up to date.
set -eu

top=$(cd "$(dirname "$0")/../.." && pwd)
cache=$top/.cache/virtual-machine
suites="bookworm bookworm-backports trixie-backports"
. "$top/tests/environment/apt.sh"

need mke2fs e2fsprogs
need ssh-keygen openssh-client
need xz xz-utils
# shellcheck disable=SC2086
"$top/tests/environment/qemu.sh" $suites
"$top/tests/environment/guests.sh"
"$top/tests/environment/machine.sh" # for its mmdebstrap
mkdir -p "$cache"
exec 9>"$cache/lock"
flock 9

# image DIRECTORY ARGUMENT...: DIRECTORY.img by mke2fs with these arguments; the directory goes.
image() {
    rm -f "$1.img"
    mke2fs -q -t ext4 -m 0 -E lazy_itable_init=0,lazy_journal_init=0 -d "$@" >/dev/null
    rm -rf "$1"
}

make_root() {
    root=$cache/root
    rm -rf "$root" "$cache/packages" "$cache/id_ed25519" "$cache/id_ed25519.pub"
    PATH=$top/.cache/machine/tools/usr/bin:$PATH
    again bootstrap "$root" systemd-sysv,udev,dbus,libpam-systemd,openssh-server,python3,iproute2,kmod
    rm -f "$root/etc/hostname" "$root/etc/resolv.conf" # mmdebstrap copies this machine's
    : >"$root/etc/machine-id" # every machine gets its own
    rm -rf "$root/var/lib/apt/lists" "$root/var/cache/apt"

    # Unpacked and not installed: that would bring initramfs-tools along.
    mkdir "$cache/packages"
    apt_download trixie "$cache/packages" linux-image-cloud-amd64
    for package in "$cache/packages"/linux-image-[0-9]*.deb; do
        dpkg-deb --fsys-tarfile "$package" | tar -x --keep-directory-symlink -C "$root" --exclude='./usr/share' -f -
    done
    rm -rf "$cache/packages"
    mv "$root"/boot/vmlinuz-* "$cache/vmlinuz"
    rm -f "$root"/boot/*
    # Uncompressed once and for all: what emulates the machine's processor is slow.
    find "$root/usr/lib/modules" -name '*.ko.xz' -exec xz -d {} +
    chroot "$root" depmod "$(ls "$root/usr/lib/modules")"

    ssh-keygen -q -t ed25519 -N '' -C 'virtual machine for tests' -f "$cache/id_ed25519"
    mkdir -p -m 700 "$root/root/.ssh"
    cp "$cache/id_ed25519.pub" "$root/root/.ssh/authorized_keys"
    rm -f "$root"/etc/ssh/ssh_host_*
    ssh-keygen -q -t ed25519 -N '' -C 'virtual machine for tests' -f "$root/etc/ssh/ssh_host_ed25519_key"
    cat >"$root/etc/ssh/sshd_config.d/test.conf" <<END
HostKey /etc/ssh/ssh_host_ed25519_key
PasswordAuthentication no
PermitRootLogin prohibit-password
PrintMotd no
UseDNS no
END

    # udev takes its time there, so the driver is not left to it.
    cat >"$root/etc/systemd/system/network.service" <<END
[Unit]
Description=The address that QEMU's user network forwards to
DefaultDependencies=no
Before=network.target
Wants=network.target

[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/usr/sbin/modprobe virtio_net
ExecStart=/usr/sbin/ip address add 10.0.2.15/24 dev eth0
ExecStart=/usr/sbin/ip link set eth0 up

[Install]
WantedBy=multi-user.target
END
    ln -s ../network.service "$root/etc/systemd/system/multi-user.target.wants/network.service"
    # udev loads it too, but maybe after what starts guests.
    cat >"$root/etc/systemd/system/kvm.service" <<END
[Unit]
Description=KVM
DefaultDependencies=no
Before=basic.target

[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/bin/sh -c 'if grep -qw svm /proc/cpuinfo; then modprobe kvm_amd; else modprobe kvm_intel; fi'

[Install]
WantedBy=basic.target
END
    mkdir -p "$root/etc/systemd/system/basic.target.wants"
    ln -s ../kvm.service "$root/etc/systemd/system/basic.target.wants/kvm.service"

    # What no test looks at, and takes a second each.
    for unit in getty.target getty@.service serial-getty@.service user@.service modprobe@.service \
        systemd-binfmt.service systemd-journal-flush.service systemd-pstore.service systemd-random-seed.service \
        systemd-udev-load-credentials.service proc-sys-fs-binfmt_misc.automount dev-mqueue.mount \
        sys-fs-fuse-connections.mount sys-kernel-config.mount sys-kernel-debug.mount sys-kernel-tracing.mount \
        apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer fstrim.timer \
        systemd-tmpfiles-clean.timer; do
        ln -sf /dev/null "$root/etc/systemd/system/$unit"
    done
    mkdir -p "$root/etc/systemd/system-generators"
    for generator in "$root"/usr/lib/systemd/system-generators/*; do
        ln -s /dev/null "$root/etc/systemd/system-generators/${generator##*/}"
    done
    rm "$root/etc/systemd/system-generators/systemd-fstab-generator"
    touch -r "$root/usr" "$root/etc/.updated" "$root/var/.updated" # else ldconfig and others run at every first boot
    printf '%s\n' '/dev/nvme0n1 / ext4 rw 0 0' "/dev/vda $top/.cache ext4 ro 0 0" >"$root/etc/fstab"
    mkdir -p "$root$top/.cache"
    image "$root" "$root.img" 1G
}

make_shared() {
    shared=$cache/shared
    rm -rf "$shared"
    mkdir -p "$shared/qemu" "$shared/guests"
    for suite in $suites; do
        # "rebuilt" comes and goes with the tests.
        tar -c -C "$top/.cache/qemu" --exclude=qemu-system-i386 --exclude='*-rebuilt' -f - "$suite" |
            tar -x -C "$shared/qemu" -f -
        # bookworm's is an absolute link, to the C library of whoever runs it.
        ln -sf ../lib/x86_64-linux-gnu/ld-linux-x86-64.so.2 "$shared/qemu/$suite/lib64/"
    done
    cp -a "$top/.cache/guests/vmlinuz" "$top/.cache/guests/initrd" "$top/.cache/guests"/*.img "$shared/guests/"
    image "$shared" -O ^has_journal "$shared.img" "$(du -sm "$shared" | awk '{ print int($1 * 1.1) + 16 "M" }')"
}

state=$(echo "$cache"; cksum <"$0")
if [ "$(cat "$cache/root.complete" 2>/dev/null)" != "$state" ]; then
    echo "Making a virtual machine ..."
    make_root
    echo "$state" >"$cache/root.complete"
fi
state=$(
    echo "$state"
    cd "$top/.cache"
    ls -l --time-style=full-iso qemu/*/bin/qemu-system-x86_64
    cksum guests/vmlinuz guests/initrd guests/*.img
)
if [ "$(cat "$cache/shared.complete" 2>/dev/null)" != "$state" ]; then
    make_shared
    echo "$state" >"$cache/shared.complete"
fi
