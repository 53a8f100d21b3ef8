#!/bin/sh
# Fetches what the tests of the role qemu_binary install on the machine that machine.sh makes, patchelf:
#
#     .cache/packages/trixie/*.deb
#
# Does nothing when they are there and up to date.
set -eu

top=$(cd "$(dirname "$0")/../.." && pwd)
directory=$top/.cache/packages/trixie
machine=$top/.cache/machine/root
. "$top/tests/environment/apt.sh"

mkdir -p "$top/.cache/packages"
exec 9>"$top/.cache/packages/lock"
flock 9
state=$(cat "$machine/../complete"; cksum <"$0")
if [ "$(cat "$directory/complete" 2>/dev/null)" = "$state" ]; then
    exit
fi
echo "Fetching packages for a machine ..."
rm -rf "$directory"
mkdir -p "$directory"
apt_download trixie "$directory" patchelf
# shellcheck disable=SC2016
installed=$(dpkg-query --admindir="$machine/var/lib/dpkg" -W -f '${Package}\n')
for package in "$directory"/*.deb; do
    if echo "$installed" | grep -qxF "$(dpkg-deb -f "$package" Package)"; then
        rm "$package"
    fi
done
echo "$state" >"$directory/complete"
