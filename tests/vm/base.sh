#!/bin/bash
# Makes the test machine's disk: a minimal Debian with systemd and the cloud kernel, no network, the
# test's part as a unit: tests/vm/base.sh OUTPUT_DIR -> base.img, vmlinuz, initrd.img
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
out=$1
# Made again when what it is made of changed.
made_of=$(cat "$here/base.sh" "$here/vm-test.service" "$here/container.cil" | sha256sum)
[ -f "$out/base.img" ] && [ "$(cat "$out/made-of" 2>/dev/null)" = "$made_of" ] && exit 0
rm -f "$out/base.img"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$out"
mmdebstrap --quiet --variant=minbase --format=tar \
    --include=systemd,systemd-sysv,udev,dbus,linux-image-cloud-amd64,nftables,iptables,iproute2,libseccomp2,curl,kmod,procps,apparmor,selinux-policy-default \
    --aptopt='APT::Install-Recommends "false"' \
    --customize-hook="install -m 0644 $here/vm-test.service \$1/etc/systemd/system/vm-test.service" \
    --customize-hook="install -m 0644 $here/container.cil \$1/root/container.cil" \
    --customize-hook='chroot "$1" semodule --noreload --install /root/container.cil' \
    --customize-hook='ln -s ../vm-test.service $1/etc/systemd/system/multi-user.target.wants/vm-test.service' \
    --customize-hook='printf "/dev/vda / ext4 defaults 0 1\n/dev/vdb /opt ext4 ro 0 0\n" > $1/etc/fstab' \
    --customize-hook='echo test-machine > $1/etc/hostname' \
    bookworm "$work/root.tar"
mkdir "$work/root"
tar -C "$work/root" -xf "$work/root.tar"
cp "$work"/root/boot/vmlinuz-* "$out/vmlinuz"
cp "$work"/root/boot/initrd.img-* "$out/initrd.img"
truncate -s 4G "$work/base.img"
mke2fs -q -t ext4 -d "$work/root" "$work/base.img"
# Last, so that a base that was cut short is made again.
mv "$work/base.img" "$out/base.img"
echo "$made_of" >"$out/made-of"
