#!/bin/sh
# start_guest.sh NAME QEMU CACHE KIND ACCELERATOR MEMORY [WORD...]
#
# A guest in a unit of its own, as somebody has it; ends once it counts.
#
#     CACHE          .cache, which the machine sees at the same path
#     KIND           linux or sector (see tests/guests)
#     ACCELERATOR    kvm, tcg, or best: KVM where a guest really runs under it
#     MEMORY         shared is ready for a live update, plain is not
#     WORD           further words of QEMU's command line
set -eu

name=$1 qemu=$2 cache=$3 kind=$4 accelerator=$5 memory=$6
shift 6
more=$*
directory=/var/lib/guests/$name

write_unit() {
    if [ "$kind" = linux ]; then
        # Debian's 10.0.13 gives every virtio queue 1024 entries, for which other QEMUs have no room.
        size=256M
        truncate -s 1M "$directory/disk.img"
        set -- -smp 2 -kernel "$cache/guests/vmlinuz" -initrd "$cache/guests/initrd" \
            -append "'console=ttyS0 quiet panic=-1'" \
            -blockdev "driver=file,filename=$directory/disk.img,node-name=file0" \
            -blockdev driver=raw,node-name=disk0,file=file0 -device virtio-blk-pci,drive=disk0,queue-size=1024 \
            -netdev user,id=net0 -device e1000e,netdev=net0
    else
        size=64M
        cp "$cache/guests/boot_sector.img" "$directory/disk.img"
        set -- -drive "if=none,id=disk,file=$directory/disk.img,format=raw" -device ide-hd,drive=disk,bus=ide.0
    fi
    machine=q35,accel=$accelerator
    if [ "$memory" = shared ]; then
        machine=$machine,memory-backend=ram0,aux-ram-share=on
        set -- "$@" -object "memory-backend-memfd,id=ram0,size=$size,share=on"
    fi
    # -cpu host is another one in every QEMU.
    cat >"/etc/systemd/system/$name.service" <<END
[Unit]
Description=The guest $name

[Service]
ExecStart=$qemu -name guest=$name,debug-threads=on -machine $machine -cpu qemu64 -m $size \\
    -nodefaults -display none $* $more \\
    -chardev file,id=console,path=$directory/console.log -serial chardev:console \\
    -qmp unix:$directory/qmp.sock,server=on,wait=off
Restart=on-failure

[Install]
WantedBy=multi-user.target
END
}

# counts SECONDS: whether it does within that time.
counts() {
    tries=$(($1 * 5))
    until [ "$(grep -sE '^(tick |[0-9A-Fa-f]{4,8})' "$directory/console.log" | wc -l)" -ge 5 ]; do
        tries=$((tries - 1))
        [ "$tries" -gt 0 ] || return 1
        sleep 0.2
    done
}

start() {
    write_unit
    systemctl daemon-reload
    systemctl start "$name.service"
    counts "$1" && return
    systemctl stop "$name.service"
    systemctl reset-failed "$name.service" 2>/dev/null || :
    rm -f "$directory/console.log"
    return 1
}

mkdir -p "$directory"
if [ "$accelerator" = best ]; then
    accelerator=kvm
    if [ ! -e /dev/kvm ] || ! start 10; then
        accelerator=tcg
    fi
fi
systemctl is-active -q "$name.service" || start 240
systemctl enable -q "$name.service"
systemctl show -p MainPID,ActiveEnterTimestampMonotonic "$name.service" >"$directory/before"
echo "$name runs under $accelerator on $qemu"
