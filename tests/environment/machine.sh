#!/bin/sh
# Makes what a small machine with a real systemd needs (tests/guests/machine.py boots it):
#
#     .cache/machine/nspawn   systemd-nspawn, this machine's own or one that is unpacked beside it
#     .cache/machine/root     Debian trixie with systemd, Python and iproute2
#
# Nothing is installed on this machine. Does nothing when both are there.
set -eu

top=$(cd "$(dirname "$0")/../.." && pwd)
cache=$top/.cache/machine
. "$top/tests/environment/apt.sh"

need ip iproute2
mkdir -p "$cache"
exec 9>"$cache/lock"
flock 9
if [ -f "$cache/complete" ] && [ "$(cat "$cache/complete")" = "$cache" ]; then
    exit
fi
echo "Making a machine with systemd ..."
rm -rf "$cache/tools" "$cache/root" "$cache/packages"
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

keyring=$(find /usr/share/keyrings -name 'debian-archive-keyring.[gp]*' | sort | head -n 1)
PATH=$cache/tools/usr/bin:$PATH mmdebstrap --quiet --mode=root --variant=essential --format=directory \
    --include=systemd-sysv,dbus,python3,iproute2 \
    --aptopt='Acquire::Languages "none"' --aptopt='APT::Install-Recommends "false"' \
    --dpkgopt=force-unsafe-io --dpkgopt='path-exclude=/usr/share/doc/*' \
    --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/locale/*' \
    trixie "$cache/root" "deb [signed-by=$keyring] $(debian_mirror) trixie main" </dev/null
for unit in systemd-networkd.service systemd-resolved.service getty@.service console-getty.service apt-daily.timer \
    dpkg-db-backup.timer e2scrub_all.timer fstrim.timer; do
    ln -sf /dev/null "$cache/root/etc/systemd/system/$unit"
done
rm -f "$cache/root/etc/hostname" # mmdebstrap copies this machine's
echo "$cache" >"$cache/complete"
