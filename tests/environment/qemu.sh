#!/bin/sh
# Unpacks the QEMU of one or more Debian suites side by side:
#
#     qemu.sh SUITE...    ->  .cache/qemu/SUITE/bin/qemu-system-x86_64
#
# Every build brings its own C library and data files and runs from any directory;
# nothing is installed on the machine. The mirror is the one that this machine's apt uses.
# A suite that is there already is left alone.
set -eu

top=$(cd "$(dirname "$0")/../.." && pwd)
cache=$top/.cache/qemu
packages="qemu-system-x86 qemu-system-data qemu-system-common seabios ipxe-qemu"
. "$top/tests/environment/apt.sh"

need patchelf patchelf

unpack() {
    suite=$1
    prefix=$cache/$suite
    binary=$prefix/bin/qemu-system-x86_64
    # The interpreter's path is absolute: a moved checkout needs a new one.
    if [ -f "$prefix/complete" ] && [ "$(cat "$prefix/complete")" = "$prefix" ]; then
        return
    fi
    echo "Unpacking QEMU of Debian $suite ..."
    rm -rf "$prefix" "$prefix.new"
    mkdir -p "$prefix.new/usr/lib" "$prefix.new/usr/lib64" "$prefix.new/usr/bin" "$prefix.new/usr/sbin"
    for directory in lib lib64 bin sbin; do # the merged /usr of every current Debian
        ln -s "usr/$directory" "$prefix.new/$directory"
    done
    # shellcheck disable=SC2086
    apt_download "$suite" "$prefix.new/packages" $packages
    for package in "$prefix.new/packages"/*.deb; do
        dpkg-deb --fsys-tarfile "$package" |
            tar -x --keep-directory-symlink --no-same-owner -C "$prefix.new" \
                --exclude='./usr/share/doc' --exclude='./usr/share/man' --exclude='./usr/share/locale' \
                --exclude='./etc' --exclude='./var' -f -
    done
    mv "$prefix.new/usr" "$prefix"
    # Absolute in Debian's package: it would be this host's, which fits no other suite's C library.
    ln -sf ../lib/x86_64-linux-gnu/ld-linux-x86-64.so.2 "$prefix/lib64/ld-linux-x86-64.so.2"
    rm -rf "$prefix.new"
    # QEMU 8.1 and later look for firmware and modules in the system's /usr, unless there is
    # a "qemu-bundle" beside the binary (QEMU's util/cutils.c, get_relocated_path).
    mkdir "$prefix/bin/qemu-bundle"
    ln -s ../.. "$prefix/bin/qemu-bundle/usr"
    # DT_RPATH and not DT_RUNPATH: it also serves the libraries' own libraries and modules.
    patchelf --force-rpath \
        --set-interpreter "$prefix/lib64/ld-linux-x86-64.so.2" \
        --set-rpath "$prefix/lib/x86_64-linux-gnu" "$binary"
    "$binary" -version | head -n 1
    echo "$prefix" >"$prefix/complete"
}

[ $# -gt 0 ] || { echo "usage: qemu.sh SUITE..." >&2; exit 2; }
mkdir -p "$cache"
exec 9>"$cache/lock"
flock 9
for suite in "$@"; do
    unpack "$suite"
done
