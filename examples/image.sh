#!/bin/bash
# Writes the example image, Debian's static busybox with its applets, as a docker-archive:
# examples/image.sh OUTPUT.tar
set -euo pipefail
out=$(readlink -f "$(dirname "$1")")/$(basename "$1")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"

mkdir -p rootfs/{bin,etc,tmp,var,root}
chmod 1777 rootfs/tmp
install -m 0755 /bin/busybox rootfs/bin/busybox
for applet in $(rootfs/bin/busybox --list); do
    [ "$applet" = busybox ] || ln -s busybox "rootfs/bin/$applet"
done
echo 'root:x:0:0:root:/root:/bin/sh' >rootfs/etc/passwd
echo 'root:x:0:' >rootfs/etc/group

tar --sort=name --mtime=@0 --owner=0 --group=0 --numeric-owner -C rootfs -cf layer.tar .
diff_id=$(sha256sum layer.tar | cut -d' ' -f1)
case $(uname -m) in aarch64) arch=arm64 ;; *) arch=amd64 ;; esac
printf '{"architecture":"%s","os":"linux","config":{"Env":["PATH=/bin"],"Cmd":["sh"]},"rootfs":{"type":"layers","diff_ids":["sha256:%s"]}}' \
    "$arch" "$diff_id" >config.json
printf '[{"Config":"config.json","RepoTags":["longshore.local/demo/busybox:1"],"Layers":["layer.tar"]}]' >manifest.json
tar -cf "$out" manifest.json config.json layer.tar
