#!/bin/sh
# What the tests' guests need beside the installed QEMU, unpacked from Debian's archive into .vmm
# and not installed: a kernel, and the QEMU of Debian 12 itself, which is a 7.2. Needs apt; root only
# where apt's lists are missing or old. Done once.
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

# The package behind the one that only names the newest.
kernel() {
    apt-cache depends linux-image-amd64 | sed -n 's/^ *Depends: \(linux-image-[0-9]\)/\1/p'
}

if [ ! -d "$place/qemu7" ] && [ "$(id -u)" = 0 ]; then
    apt-get -qq update
fi
unpack kernel ./boot "$(kernel)"
unpack qemu7 ./usr qemu-system-x86/bookworm qemu-system-common/bookworm qemu-system-data/bookworm \
    seabios/bookworm ipxe-qemu/bookworm
"$place/qemu7/usr/bin/qemu-system-x86_64" --version | head -1
