#!/bin/bash
# The main job on one machine: pods with a shared volume, a pod that is killed and comes back, a
# Service in front. Everything happens in network, mount and PID namespaces of the demo's own and
# in one cgroup subtree, so that the machine is left as it was: examples/demo.sh BINARY
#
# It ends on Ctrl-C; with DEMO_ONCE=1 it ends by itself after the tour.
set -euo pipefail

binary=$(readlink -f "$1")
here=$(cd "$(dirname "$0")" && pwd)

if [ -z "${LONGSHORE_DEMO_DIR:-}" ]; then
    # Outside: make the namespaces, and take away what is left when they have gone.
    export LONGSHORE_DEMO_DIR
    LONGSHORE_DEMO_DIR=$(mktemp -d /tmp/longshore-demo.XXXXXX)
    export LONGSHORE_DEMO_CGROUP="longshore-demo-$$"
    clean_up() {
        for _ in 1 2 3 4 5; do
            find /sys/fs/cgroup -depth -type d -path "*/$LONGSHORE_DEMO_CGROUP*" -exec rmdir {} + 2>/dev/null || true
            find /sys/fs/cgroup -type d -name "$LONGSHORE_DEMO_CGROUP" 2>/dev/null | grep -q . || break
            sleep 0.2
        done
        rm -rf --one-file-system "$LONGSHORE_DEMO_DIR"
        echo "demo: cleaned up"
    }
    trap clean_up EXIT
    trap : INT TERM
    unshare --net --mount --uts --pid --fork --mount-proc --kill-child --propagation private "$0" "$binary" || true
    exit 0
fi

dir=$LONGSHORE_DEMO_DIR
mount -t tmpfs -o mode=0755 demo "$dir"
mkdir -p "$dir"/{manifests,root,state,run,logs,containers}
ip link set lo up
# An uplink, as any node has: addresses and a default route, in this namespace alone.
ip link add uplink type veth peer name outside
ip addr add 192.0.2.10/24 dev uplink
ip link set uplink up
ip link set outside up
ip route add default via 192.0.2.1

say() { printf '\n\033[1m== %s\033[0m\n' "$*"; }
fetch() { curl --silent --show-error --max-time 2 "$@"; }
until_ok() { # until_ok SECONDS COMMAND...: waits for a command to succeed
    local end=$((SECONDS + $1))
    shift
    until "$@" >/dev/null 2>&1; do
        if [ $SECONDS -ge $end ]; then
            echo "demo: gave up waiting for: $*" >&2
            tail -n 40 "$dir/longshore.log" >&2
            exit 1
        fi
        sleep 0.05
    done
}
paths=(--state-dir "$dir/state" --run-dir "$dir/run")

say "An image without a registry: Debian's static busybox as a docker-archive"
"$here/image.sh" "$dir/image.tar"
"$binary" image import --state-dir "$dir/state" "$dir/image.tar"

say "The node: agent, proxy and CRI shim in one process"
cp "$here"/*.yaml "$dir/manifests/"
"$binary" run --standalone --manifests "$dir/manifests" "${paths[@]}" --root-dir "$dir/root" \
    --hostname-override demo-node --node-ip 192.0.2.10 --cgroup-root "/$LONGSHORE_DEMO_CGROUP" \
    --pod-logs-dir "$dir/logs" --container-logs-dir "$dir/containers" >"$dir/longshore.log" 2>&1 &
node=$!
finish() {
    trap : INT TERM
    say "Taking it all away"
    kill -TERM "$node" 2>/dev/null && wait "$node" || true
    "$binary" reset --yes "${paths[@]}" --root-dir "$dir/root" --kubernetes-dir "$dir/kubernetes" \
        --pod-logs-dir "$dir/logs" --container-logs-dir "$dir/containers" \
        --cgroup-root "/$LONGSHORE_DEMO_CGROUP" || true
}
trap 'finish; exit 0' INT TERM

status() { "$binary" status --run-dir "$dir/run" "$@"; }
until_ok 30 fetch http://10.96.0.80/

say "curl the Service's VIP, then its NodePort"
fetch http://10.96.0.80/
fetch http://192.0.2.10:30080/

say "Kill the second pod's process: it comes back"
pid=$(pgrep -o -x -f 'sleep 86400')
echo "kill -9 $pid"
kill -9 "$pid"
came_back() { new=$(pgrep -o -x -f 'sleep 86400') && [ "$new" != "$pid" ]; }
until_ok 30 came_back
echo "running again as $new"
sleep 0.5

say "longshore status"
status

if [ -n "${DEMO_ONCE:-}" ]; then
    finish
    exit 0
fi
say "Running. From another terminal nothing of it is seen; Ctrl-C ends it."
while kill -0 "$node" 2>/dev/null; do
    sleep 5 &
    wait $! || true
    fetch http://10.96.0.80/ || true
done
