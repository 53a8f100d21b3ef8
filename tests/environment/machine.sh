#!/bin/sh
# Makes what a small machine with a real systemd needs (tests/guests/machine.py boots it):
#
#     .cache/machine/nspawn   systemd-nspawn, this machine's own or one that is unpacked beside it
#     .cache/machine/root     Debian trixie with systemd, SSH, Python, iproute2 and QEMU 10.0
#     .cache/machine/id_ed25519           the key that root logs in with
#     .cache/packages/trixie-backports    what an upgrade to QEMU 11.1 takes, as a repository for its apt
#
# Nothing is installed on this machine. Does nothing when they are there and up to date.
set -eu

top=$(cd "$(dirname "$0")/../.." && pwd)
cache=$top/.cache/machine
repository=$top/.cache/packages/trixie-backports
. "$top/tests/environment/apt.sh"

need ip iproute2
need ssh-keygen openssh-client
mkdir -p "$cache"
exec 9>"$cache/lock"
flock 9
state=$(echo "$cache"; cksum <"$0")
if [ "$(cat "$cache/complete" 2>/dev/null)" = "$state" ]; then
    exit
fi
echo "Making a machine with systemd ..."
rm -rf "$cache/complete" "$cache/tools" "$cache/root" "$cache/packages" "$cache"/id_ed25519* "$repository"
mkdir -p "$cache/packages" "$cache/tools"
suite=$(. /etc/os-release && echo "$VERSION_CODENAME")
apt_download "$suite" "$cache/packages" systemd-container mmdebstrap
for package in "$cache/packages"/systemd-container_*.deb "$cache/packages"/libsystemd-shared_*.deb "$cache/packages"/mmdebstrap_*.deb; do
    dpkg-deb -x "$package" "$cache/tools"
done
rm -rf "$cache/packages"
{
    echo '#!/bin/sh'
    echo "LD_LIBRARY_PATH=$(echo "$cache/tools"/usr/lib/*/systemd) exec $cache/tools/usr/bin/systemd-nspawn \"\$@\""
} >"$cache/nspawn"
chmod +x "$cache/nspawn"

PATH=$cache/tools/usr/bin:$PATH
again bootstrap "$cache/root" apt,systemd-sysv,dbus,python3,iproute2,openssh-server,qemu-system-x86,qemu-block-extra
for unit in systemd-networkd.service systemd-resolved.service getty@.service console-getty.service apt-daily.timer \
    dpkg-db-backup.timer e2scrub_all.timer fstrim.timer ssh.service ssh.socket; do
    ln -sf /dev/null "$cache/root/etc/systemd/system/$unit"
done
rm -f "$cache/root/etc/hostname" "$cache/root/etc/resolv.conf" # mmdebstrap copies this machine's
# It has no network. What it gets to install, it gets from this machine's cache.
rm -rf "$cache/root/etc/apt/sources.list" "$cache/root/var/lib/apt/lists" "$cache/root/var/cache/apt"

ssh-keygen -q -t ed25519 -N '' -C 'machine for tests' -f "$cache/id_ed25519"
mkdir -p -m 700 "$cache/root/root/.ssh"
cp "$cache/id_ed25519.pub" "$cache/root/root/.ssh/authorized_keys"

mkdir -p "$repository"
apt_download trixie-backports "$repository" qemu-system-x86 qemu-block-extra
# shellcheck disable=SC2016
one='${Package}:${Architecture}=${Version}\n'
installed=$(dpkg-query --admindir="$cache/root/var/lib/dpkg" -W -f "$one")
for package in "$repository"/*.deb; do
    # ipxe-qemu is the same in both, and yet part of what is unpacked beside the installed one.
    case $package in
        */ipxe-qemu_*) ;;
        *)
            if echo "$installed" | grep -qxF "$(dpkg-deb -W --showformat="$one" "$package")"; then
                rm "$package"
                continue
            fi
            ;;
    esac
    dpkg-deb -f "$package"
    echo "Filename: ./${package##*/}"
    echo "Size: $(stat -c %s "$package")"
    echo "SHA256: $(sha256sum "$package" | cut -d ' ' -f 1)"
    echo
done >"$repository/Packages"
echo "$state" >"$cache/complete"
