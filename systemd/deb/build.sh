#!/bin/sh
# Builds the Debian package from a release binary: systemd/deb/build.sh BINARY OUTPUT_DIR
set -eu
here=$(cd "$(dirname "$0")" && pwd)
binary=$1
out=$2
version=$(sed -n 's/^version = "\(.*\)"/\1/p' "$here/../../Cargo.toml" | head -n 1)
arch=$(dpkg --print-architecture)
stage=$(mktemp -d)
trap 'rm -rf "$stage"' EXIT

install -D -m 0755 "$binary" "$stage/usr/bin/longshore"
install -D -m 0644 "$here/../longshore.service" "$stage/usr/lib/systemd/system/longshore.service"
install -D -m 0644 "$here/../longshore.default" "$stage/etc/default/longshore"
install -D -m 0644 "$here/../../LICENSE" "$stage/usr/share/doc/longshore/copyright"
install -D -m 0644 "$here/../../README.md" "$stage/usr/share/doc/longshore/README.md"
install -d "$stage/usr/share/bash-completion/completions"
"$binary" completion bash >"$stage/usr/share/bash-completion/completions/longshore"
install -d "$stage/usr/share/zsh/vendor-completions" "$stage/usr/share/fish/vendor_completions.d"
"$binary" completion zsh >"$stage/usr/share/zsh/vendor-completions/_longshore"
"$binary" completion fish >"$stage/usr/share/fish/vendor_completions.d/longshore.fish"
# Debian's policy: pages compressed, without a time in them.
"$binary" man "$stage/usr/share/man/man1"
gzip -9n "$stage"/usr/share/man/man1/*.1

install -d "$stage/DEBIAN"
size=$(du -sk "$stage" | cut -f1)
sed -e "s/@VERSION@/$version/" -e "s/@ARCH@/$arch/" -e "s/@SIZE@/$size/" \
    "$here/control.in" >"$stage/DEBIAN/control"
echo /etc/default/longshore >"$stage/DEBIAN/conffiles"
for script in postinst prerm postrm; do
    install -m 0755 "$here/$script" "$stage/DEBIAN/$script"
done
mkdir -p "$out"
dpkg-deb --root-owner-group --build "$stage" "$out/longshore_${version}_${arch}.deb"
