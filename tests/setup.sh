#!/bin/sh
# Installs what building and testing need on a Debian machine, by package name, and only what is
# missing: tests/setup.sh build | test
set -eu
what=${1:-build}

as_root() {
    if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi
}

build="build-essential pkg-config libseccomp-dev curl ca-certificates iproute2 busybox-static"
peers="qemu-system-x86 qemu-utils mmdebstrap e2fsprogs containerd runc crun containernetworking-plugins docker-registry skopeo umoci buildah nftables iptables conntrack socat jq apache2-utils openssl dbus-daemon"

packages=$build
[ "$what" = build ] || packages="$build $peers"
missing=""
for package in $packages; do
    dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing="$missing $package"
done
if [ -n "$missing" ]; then
    echo "installing:$missing"
    as_root apt-get update -qq
    # Daemons of these packages are started by the tests, in namespaces, and never by the machine.
    as_root env DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 apt-get install -y -qq --no-install-recommends $missing
fi

# The toolchain: whatever cargo is there if it is new enough, else rustup.
minimum=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' "$(dirname "$0")/../Cargo.toml")
have=$(cargo --version 2>/dev/null | cut -d' ' -f2 || true)
if [ -z "$have" ] || [ "$(printf '%s\n%s\n' "$minimum" "$have" | sort -V | head -n 1)" != "$minimum" ]; then
    if apt-cache show rustup >/dev/null 2>&1; then
        as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq rustup
        rustup default stable
    else
        curl --proto '=https' --tlsv1.2 -sSf https://sh.rustup.rs | sh -s -- -y --profile minimal -c clippy -c rustfmt
    fi
fi
PATH="${CARGO_HOME:-$HOME/.cargo}/bin:$PATH"
if [ "$what" != build ] && ! cargo nextest --version >/dev/null 2>&1; then
    cargo install --locked cargo-nextest
fi
