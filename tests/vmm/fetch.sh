#!/bin/sh
# The QEMU of Debian 12 itself, a 7.2, beside the installed one, and its kernel for a guest: unpacked
# from Debian's archive into .vmm and not installed. Needs apt; root only where apt's lists are
# missing or old. Done once.
set -eu
place=$(cd "$(dirname "$0")/../.." && pwd)/.vmm
mkdir -p "$place/packages"
cd "$place/packages"

# Folder, what is wanted of the packages, packages.
unpack() {
    folder=$place/$1 wanted=$2
    shift 2
    [ -d "$folder" ] && return
    rm -rf "$folder.part" ./*.deb
    mkdir "$folder.part"
    apt-get -qq -o APT::Sandbox::User=root download "$@"
    for package in *.deb; do
        dpkg-deb --fsys-tarfile "$package" | tar -x -C "$folder.part" "$wanted"
    done
    mv "$folder.part" "$folder"
    rm ./*.deb
}

if { [ ! -d "$place/qemu7" ] || [ ! -d "$place/kernel" ]; } && [ "$(id -u)" = 0 ]; then
    apt-get -qq update
fi
unpack qemu7 ./usr qemu-system-x86/bookworm qemu-system-common/bookworm qemu-system-data/bookworm \
    seabios/bookworm ipxe-qemu/bookworm
# A kernel's package has the version in its name; the one that is asked for depends on the newest.
kernel=$(apt-cache show linux-image-cloud-amd64/bookworm |
    sed -n 's/^Depends: linux-image-\([^ ,]*\).*/\1/p' | head -1)
unpack kernel "./boot/vmlinuz-$kernel" "linux-image-$kernel"
"$place/qemu7/usr/bin/qemu-system-x86_64" --version | head -1
ls "$place"/kernel/boot
