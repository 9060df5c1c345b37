#!/bin/bash
# Runs inside the test machine, as a unit, once in each boot: installs the package, uses it under a
# real systemd with cgroup v2, breaks it, reboots, and says what it saw on the serial console as
# `RESULT <name> ok|failed <detail>` lines, which the test on the outside reads.
set -u
exec >/dev/ttyS0 2>&1
state=/var/lib/vm-test
mkdir -p "$state"
boot=$(cat "$state/boot" 2>/dev/null || echo 0)
echo $((boot + 1)) >"$state/boot"

result() { echo "RESULT $1 $2 ${3:-}"; }
# check NAME COMMAND...: one line of result, with what was said when it failed.
check() {
    local name=$1 out
    shift
    if out=$("$@" 2>&1); then result "$name" ok; else result "$name" failed "$(echo "$out" | tail -n 5 | tr '\n' '|')"; fi
}
# within SECONDS COMMAND...: waits for a command to succeed.
within() {
    local end=$((SECONDS + $1))
    shift
    until "$@" >/dev/null 2>&1; do
        [ $SECONDS -lt $end ] || { "$@"; return 1; }
        sleep 0.5
    done
}
main_pid() { systemctl show -p MainPID --value longshore; }
sleeper() { pgrep -f '^sleep 86400' | head -n 1; }
page() { curl -sf --max-time 3 http://10.96.0.80/ | grep -q Hello; }
new_main() { local pid; pid=$(main_pid); [ "$pid" != 0 ] && [ "$pid" != "$1" ] && systemctl is-active -q longshore; }
same_sleeper() { [ "$(sleeper)" = "$1" ]; }

ip link set lo up
ip link add uplink type veth peer name outside
ip addr add 192.0.2.10/24 dev uplink
ip link set uplink up
ip link set outside up
ip route add default via 192.0.2.1

case $boot in
0)
    check install dpkg -i /opt/longshore.deb
    check conffile test -f /etc/default/longshore
    echo 'LONGSHORE_OPTIONS="--standalone --manifests /etc/kubernetes/manifests --node-ip 192.0.2.10"' >/etc/default/longshore
    mkdir -p /etc/kubernetes/manifests /etc/systemd/system/longshore.service.d
    # Emulation is slow, waiting for a minute is slower.
    printf '[Service]\nWatchdogSec=20s\n' >/etc/systemd/system/longshore.service.d/watchdog.conf
    systemctl daemon-reload
    cp /opt/manifests/*.yaml /etc/kubernetes/manifests/
    check import longshore image import /opt/image.tar
    check verify systemd-analyze verify longshore.service
    check start systemctl enable --now longshore
    check page within 120 page
    check cgroup-v2 sh -c 'grep -rqx 67108864 /sys/fs/cgroup/kubepods* --include=memory.max'
    pid=$(main_pid) child=$(sleeper)
    kill -9 "$pid"
    check restarted-after-kill within 60 new_main "$pid"
    check kept-after-kill same_sleeper "$child"
    pid=$(main_pid)
    kill -STOP "$pid"
    check restarted-by-watchdog within 120 new_main "$pid"
    check kept-after-watchdog same_sleeper "$child"
    check stop systemctl stop longshore
    check kept-while-stopped same_sleeper "$child"
    check start-again systemctl start longshore
    check kept-after-start same_sleeper "$child"
    check page-again within 60 page
    check status longshore status
    sync
    echo "RESULT reboot ok"
    systemctl reboot
    ;;
1)
    check active-after-reboot within 120 systemctl is-active longshore
    check page-after-reboot within 120 page
    longshore status
    # A cgroup driver of the other kind: systemd makes the slices.
    check reset longshore reset --yes
    check nothing-mounted sh -c '! grep -E "longshore|/var/lib/kubelet/pods" /proc/self/mountinfo'
    check no-sleeper sh -c '! pgrep -f "^sleep 86400"'
    check no-cgroups sh -c '! ls -d /sys/fs/cgroup/kubepods*'
    check no-links sh -c '! ip -o link | grep -E "longshore|veth"'
    check no-rules sh -c '! nft list ruleset | grep -i longshore'
    check purge dpkg --purge longshore
    check no-files sh -c '! ls -d /var/lib/longshore /etc/default/longshore /usr/bin/longshore 2>/dev/null'
    sync
    echo "RESULT done ok"
    systemctl poweroff
    ;;
esac
