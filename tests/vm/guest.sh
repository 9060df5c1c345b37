#!/bin/bash
# Runs inside the test machine, as a unit, once in each boot: installs the package, uses it under a
# real systemd with cgroup v2, breaks it, reboots, and says what it saw on the serial console as
# `RESULT <name> ok|failed <detail>` lines, which the test on the outside reads.
set -u
exec >/dev/ttyS0 2>&1
export HOME=/root SYSTEMD_PAGER= SYSTEMD_COLORS=0
state=/var/lib/vm-test
mkdir -p "$state"
boot=$(cat "$state/boot" 2>/dev/null || echo 0)
echo $((boot + 1)) >"$state/boot"
# A machine with SELinux is another, which boots once.
! grep -q security=selinux /proc/cmdline || boot=selinux
manifests=/etc/kubernetes/manifests
cgroups=/sys/fs/cgroup
failures=0

# check NAME COMMAND...: one line of result, with what was said when it failed.
check() {
    local name=$1 out start=$SECONDS
    shift
    if out=$("$@" 2>&1); then
        echo "RESULT $name ok $((SECONDS - start))s"
    else
        failures=$((failures + 1))
        echo "RESULT $name failed $(echo "$out" | tail -n 5 | tr '\n' '|')"
    fi
}
# finish NEXT: what to read when something failed, then what comes next.
finish() {
    if [ $failures != 0 ]; then
        echo "=== journal"
        journalctl -b -o short-monotonic --no-pager -n 250 -u longshore -u init.scope
        echo "=== status"
        longshore status
        systemd-cgls --no-pager
        dmesg | tail -n 20
        echo "=== end"
    fi
    sync
    "$@"
}
# within SECONDS COMMAND...: waits for a command to succeed, two tries a second. Tries are counted, not
# seconds: on a busy machine everything takes longer, and so does a try. The console hears of it, as
# its silence is taken for the machine's end.
within() {
    local tries=$(($1 * 2)) try=0
    shift
    until "$@" >/dev/null 2>&1; do
        try=$((try + 1))
        [ $try -lt $tries ] || { "$@"; return 1; }
        [ $((try % 20)) != 0 ] || echo "... try $try of $tries: $*" >/dev/ttyS0
        sleep 0.5
    done
}
equal() { [ "$1" = "$2" ] || { echo "$1 instead of $2"; return 1; }; }
main_pid() { systemctl show -p MainPID --value longshore; }
sleeper() { pgrep -f '^sleep 86400' | head -n 1; }
page() { curl -sf --max-time 3 http://10.96.0.80/ | grep -q Hello; }
new_main() { local pid; pid=$(main_pid); [ "$pid" != 0 ] && [ "$pid" != "$1" ] && systemctl is-active -q longshore; }
same_sleeper() { equal "$(sleeper)" "$1"; }
no_sleeper() { [ -z "$(sleeper)" ]; }
# The last line that a container said: said POD CONTAINER
said() { cat /var/log/pods/default_"$1"-*/"$2"/*.log | tail -n 1 | cut -d ' ' -f 4-; }
says() { equal "$(said "$1" "$2")" "$3"; }
said_like() { said "$1" "$2" | grep -E "$3" || { said "$1" "$2"; return 1; }; }
status_has() { longshore status | tr -s ' ' | grep -E "$1" || { longshore status; return 1; }; }
# No cgroup of a pod with limits is left; those of one driver the other never looks at.
no_limits() { ! grep -rlx 67108864 $cgroups/kubepods* --include=memory.max; }
# The cgroup of the web pod's server, which has the limits.
server_cgroup() { dirname "$(grep -rlx 67108864 $cgroups/kubepods* --include=memory.max | head -n 1)"; }
# Its limits, as the kernel has them.
limits() {
    local cgroup
    cgroup=$(server_cgroup)
    equal "$(cat "$cgroup/memory.max")" 67108864 && equal "$(cat "$cgroup/cpu.max")" "50000 100000" &&
        equal "$(cat "$cgroup/cpu.weight")" 11 && equal "$(cat "$cgroup/pids.max")" max && equal "$(cat "$cgroup/memory.oom.group")" 1
}
# ... and as systemd has them.
unit_limits() {
    local unit
    unit=$(basename "$(server_cgroup)")
    equal "$(systemctl show -p MemoryMax --value "$unit")" 67108864 &&
        equal "$(systemctl show -p CPUQuotaPerSecUSec --value "$unit")" 500ms &&
        equal "$(systemctl show -p Delegate --value "$unit")" yes &&
        equal "$(systemctl show -p ActiveState --value "$unit")" active
}
# Every process of a pod is in a scope of its pod's slice.
all_in_scopes() {
    local lost
    lost=$(find $cgroups/kubepods.slice -name cgroup.procs -size -1k -exec grep -l . {} + | grep -v '\.scope/cgroup.procs$')
    equal "$lost" "" || return 1
    for scope in $(find $cgroups/kubepods.slice -name '*.scope' -printf '%f\n'); do
        systemctl is-active -q "$scope" || { echo "$scope is no unit"; return 1; }
    done
}
load_profile() {
    apparmor_parser --replace <<-'PROFILE'
	profile vm-test-strict flags=(attach_disconnected,mediate_deleted) {
	  file,
	  network,
	  capability,
	  signal,
	  ptrace,
	  deny /data/forbidden w,
	}
	PROFILE
}
apparmor_confines() {
    check apparmor-default within 60 says confined default "longshore-default (enforce) refused"
    check apparmor-unconfined within 60 says confined free "unconfined mounted"
    check apparmor-localhost within 60 says strict probe "vm-test-strict (enforce) refused written"
    # Ready is who says so in an exec.
    check apparmor-exec within 60 status_has 'confined-test-machine 2/2 Running'
    check apparmor-localhost-exec within 60 status_has 'strict-test-machine 1/1 Running'
    # What the profile denies by name is denied without a word: the rest of the pods' day is allowed.
    check apparmor-allows-the-rest sh -c '! dmesg | grep "apparmor=\"DENIED\"" | grep longshore-default'
}
label_of() { stat -c %C "$1"; }
# A pod's volume called data: volume_of POD
volume_of() { ls -d /var/lib/kubelet/pods/*/volumes/kubernetes.io~empty-dir/data | grep "$(basename "$(ls -d /var/log/pods/default_"$1"-*)" | sed 's/.*_//')"; }
# What the graceful pod's container is spared and throttled at; the node's memory but for what is reserved.
memory_qos() {
    local cgroup
    cgroup=$(dirname "$(grep -rlx 50331648 $cgroups/kubepods.slice --include=memory.max | grep scope | head -n 1)")
    equal "$(cat "$cgroup/memory.low") $(cat "$cgroup/memory.high") $(cat "$cgroup/memory.swap.max")" "33554432 48652288 0" &&
        equal "$(cat "$(dirname "$cgroup")/memory.low")" 33554432 &&
        [ "$(cat $cgroups/kubepods.slice/memory.min)" -ge 33554432 ]
}
node_limits() {
    local total
    total=$(awk '/MemTotal/ {print $2 * 1024}' /proc/meminfo)
    equal "$(cat $cgroups/kubepods.slice/memory.max)" $((total - (256 << 20))) &&
        equal "$(systemctl show -p MemoryMax --value kubepods.slice)" $((total - (256 << 20))) &&
        equal "$(cat $cgroups/system.slice/cpu.weight)" 20
}
inhibits() { equal "$(busctl --json=short call org.freedesktop.login1 /org/freedesktop/login1 org.freedesktop.login1.Manager ListInhibitors | grep -o '"shutdown","kubelet","[^"]*","delay"' | wc -l)" 1; }
delay() { busctl get-property org.freedesktop.login1 /org/freedesktop/login1 org.freedesktop.login1.Manager InhibitDelayMaxUSec; }
no_pods() { ! find $cgroups/kubepods* -path '*pod*pod*' -type d 2>/dev/null | grep .; }
options() { echo "LONGSHORE_OPTIONS=\"$*\"" >/etc/default/longshore; }
standalone="--standalone --manifests $manifests --node-ip 192.0.2.10"

ip link set lo up
ip link add uplink type veth peer name outside
ip addr add 192.0.2.10/24 dev uplink
ip link set uplink up
ip link set outside up
ip route add default via 192.0.2.1

nothing_left() {
    check nothing-mounted sh -c '! grep -E "longshore|/var/lib/kubelet/pods" /proc/self/mountinfo'
    check no-sleeper no_sleeper
    check no-monitors sh -c '! pgrep -a longshore'
    check no-cgroups sh -c "! ls -d $cgroups/kubepods* $cgroups/longshore*"
    check no-units sh -c '! systemctl list-units --all --no-legend "kubepods*" "*longshore-*"  | grep .'
    check no-links sh -c '! ip -o link | grep -E "longshore|lsv"'
    check no-namespaces sh -c '! ip netns list | grep .'
    check no-rules sh -c '! nft list ruleset | grep -i longshore'
    check no-state sh -c '! ls -d /var/lib/longshore/* /run/longshore /var/lib/kubelet/* /var/log/pods /var/log/containers 2>/dev/null'
}

case $boot in
selinux)
    check enforcing equal "$(cat /sys/fs/selinux/enforce)" 1
    check install dpkg -i /opt/longshore.deb
    check import longshore image import /opt/image.tar
    mkdir -p $manifests /srv/node
    echo of-the-node >/srv/node/secret
    chcon system_u:object_r:etc_t:s0 /srv/node /srv/node/secret
    cp /opt/manifests/selinux/*.yaml $manifests/
    options $standalone
    check start systemctl enable --now longshore
    # The label is the policy's, with categories of the pod's own; both containers have the same.
    check own-files within 120 said_like labelled probe '^system_u:system_r:container_t:s0:c[0-9]*,c[0-9]* own yes image yes node no$'
    check pods-level within 60 says labelled second "$(said labelled probe)"
    check exec within 60 status_has 'labelled-test-machine 2/2 Running'
    level=$(said labelled probe | cut -d ' ' -f 1 | cut -d : -f 4-)
    check volume equal "$(label_of "$(volume_of labelled)/file")" "system_u:object_r:container_file_t:$level"
    check level within 60 says level probe system_u:system_r:container_t:s0:c123,c456
    check level-of-files equal "$(label_of "$(volume_of level)/file")" system_u:object_r:container_file_t:s0:c123,c456
    check privileged within 60 said_like privileged probe ':kernel_t:s0 of-the-node$'
    check unheard within 60 status_has 'unheard-test-machine 0/1 (RunContainerError|CreateContainerError|CrashLoopBackOff)'
    check unheard-said sh -c 'journalctl -u longshore | grep -q "unheard_of_t"'
    # Nothing is denied but the node's file.
    check allows-the-rest sh -c 'journalctl -k | grep "avc:  denied" | grep scontext=system_u:system_r:container_t | grep -v -e "name=\"secret\"" -e "name=\"node\"" | (! grep .)'
    pid=$(main_pid)
    kill -9 "$pid"
    check restarted-after-kill within 60 new_main "$pid"
    check kept-after-kill within 60 status_has 'labelled-test-machine 2/2 Running 0 '
    cp $manifests/selinux.yaml /root/again.yaml
    sed -i 's/name: level}/name: later}/' /root/again.yaml
    cp /root/again.yaml $manifests/selinux.yaml
    check pod-after-restart within 60 says later probe system_u:system_r:container_t:s0:c123,c456
    check reset longshore reset --yes
    nothing_left
    echo "RESULT done ok"
    finish systemctl poweroff
    ;;
0)
    check install dpkg -i /opt/longshore.deb
    check conffile test -f /etc/default/longshore
    check not-started sh -c '! systemctl is-active longshore && ! systemctl is-enabled longshore'
    mkdir -p $manifests /etc/systemd/system/longshore.service.d
    # Emulation is slow, waiting for a minute is slower: twenty seconds and what a hundred processes
    # take here now, ten times.
    start=$(date +%s%N)
    for _ in $(seq 100); do /bin/true; done
    pace=$((($(date +%s%N) - start) / 100000000))
    echo "... a hundred processes take $pace tenths of a second"
    printf '[Service]\nWatchdogSec=%ss\n' $((20 + pace)) >/etc/systemd/system/longshore.service.d/watchdog.conf
    systemctl daemon-reload
    check verify systemd-analyze verify longshore.service
    check import longshore image import /opt/image.tar

    # Pods as folders of cgroupfs, beside systemd.
    options $standalone --cgroup-driver cgroupfs
    cp /opt/manifests/web.yaml $manifests/
    check cgroupfs-start systemctl enable --now longshore
    check cgroupfs-page within 120 page
    check cgroupfs-limits limits
    check cgroupfs-layout test -d $cgroups/kubepods/burstable
    systemctl daemon-reload
    systemctl stop longshore
    check cgroupfs-limits-kept limits
    systemctl start longshore
    rm $manifests/web.yaml
    check cgroupfs-drained within 60 no_pods
    check cgroupfs-removed within 60 no_limits

    # Pods as slices of systemd, which is what a machine with systemd does by itself.
    options $standalone
    cp /opt/manifests/*.yaml $manifests/
    systemctl restart longshore
    check page within 120 page
    check limits within 10 limits
    check unit-limits within 10 unit_limits
    check all-in-scopes within 20 all_in_scopes
    systemctl daemon-reload
    check limits-after-reload limits
    check unit-limits-after-reload unit_limits
    systemctl daemon-reexec
    check limits-after-reexec limits
    check out-of-memory within 60 status_has 'hungry-test-machine 0/1 OOMKilled'
    check devices within 30 says curious probe "null:ok kmsg:denied disk:denied"
    # The cgroup's root, as seen by a pod with users of its own, is its container's.
    check users within 60 says stranger probe "0 0 65536 65536 0 domain"
    check users-outside equal "$(stat -c %u "/proc/$(pgrep -f '^sleep 43210')")" 65536
    cp /opt/manifests/late/*.yaml $manifests/
    check pod-after-reexec within 60 says late late hello

    # The default profile, which the node has loaded by itself, and one that was loaded for it.
    check apparmor-missing within 60 status_has 'missing-test-machine 0/1 CreateContainerError'
    check apparmor-missing-said sh -c 'journalctl -u longshore | grep -q "vm-test-missing.*not loaded"'
    check apparmor-load load_profile
    apparmor_confines

    pid=$(main_pid) child=$(sleeper)
    kill -9 "$pid"
    check restarted-after-kill within 60 new_main "$pid"
    check kept-after-kill same_sleeper "$child"
    pid=$(main_pid)
    kill -STOP "$pid"
    check restarted-by-watchdog within 120 new_main "$pid"
    check kept-after-watchdog same_sleeper "$child"
    check watchdog-said sh -c 'journalctl -u longshore | grep -q "Watchdog timeout"'
    check restart systemctl restart longshore
    check kept-after-restart same_sleeper "$child"
    # A page that is not ready at this moment would stay away.
    check page-before-stop within 60 page
    check stop systemctl stop longshore
    check kept-while-stopped same_sleeper "$child"
    check page-while-stopped within 30 page
    check limits-while-stopped unit_limits
    check start-again systemctl start longshore
    check kept-after-start same_sleeper "$child"
    check page-again within 60 page
    check restarts-nothing within 30 status_has 'worker-test-machine 1/1 Running 0 '

    # A shutdown waits for the pods.
    printf '%s\n' 'kind: KubeletConfiguration' 'apiVersion: kubelet.config.k8s.io/v1beta1' \
        'shutdownGracePeriod: 60s' 'shutdownGracePeriodCriticalPods: 20s' \
        'featureGates: {MemoryQoS: true}' 'memoryReservationPolicy: TieredReservation' \
        'enforceNodeAllocatable: [pods, system-reserved-compressible]' 'systemReservedCgroup: /system.slice' \
        'systemReserved: {cpu: 500m, memory: 256Mi}' >/root/kubelet.yaml
    options $standalone --config /root/kubelet.yaml
    cp /opt/manifests/graceful/*.yaml $manifests/
    systemctl restart longshore
    check graceful-pod within 60 says graceful main ready
    check inhibits within 30 inhibits
    check inhibit-delay equal "$(delay)" "t 60000000"
    check memory-qos memory_qos
    check node-limits within 10 node_limits
    systemctl daemon-reload
    check memory-qos-after-reload memory_qos
    check node-limits-after-reload node_limits
    systemctl restart systemd-logind
    check inhibits-again within 30 inhibits
    check inhibit-delay-again equal "$(delay)" "t 60000000"
    date +%s >"$state/rebooted"
    echo "RESULT reboot ok"
    finish systemctl reboot
    ;;
1)
    check active-after-reboot within 120 systemctl is-active longshore
    check page-after-reboot within 120 page
    check shutdown-waited equal "$(cat /srv/graceful)" "ended in its own time"
    check shutdown-noted sh -c 'grep endTime /var/lib/kubelet/graceful_node_shutdown_state | grep -v 0001-01-01'
    check graceful-pod-again within 60 status_has 'graceful-test-machine 1/1 Running 1 '
    check restarted-once within 30 status_has 'worker-test-machine 1/1 Running 1 '
    check still-out-of-memory status_has 'hungry-test-machine 0/1 OOMKilled 0 '
    check all-in-scopes-after-reboot within 20 all_in_scopes
    check apparmor-load-after-reboot load_profile
    apparmor_confines
    check reset longshore reset --yes
    nothing_left

    # A worker of a cluster, which here is the test's own control plane.
    rm -f $manifests/*.yaml
    options
    /opt/test-control-plane --listen 127.0.0.1:6443 --kubeconfig /root/admin.conf >/root/join 2>/root/plane.log &
    check control-plane within 60 grep -q '^longshore join' /root/join
    check join sh -c "$(grep '^longshore join' /root/join) --node-ip 192.0.2.10"
    check join-enables systemctl is-enabled longshore
    check join-starts systemctl is-active longshore
    object() {
        curl -sf --cacert /etc/kubernetes/pki/ca.crt --cert /var/lib/kubelet/pki/kubelet-client-current.pem \
            https://127.0.0.1:6443/api/v1/nodes/test-machine | tr -d ' \n'
    }
    node() { object | grep -q '"status":"True","type":"Ready"'; }
    check node-ready within 60 node

    # The cluster hears of a shutdown, and that it was called off.
    printf '%s\n' 'kind: KubeletConfiguration' 'apiVersion: kubelet.config.k8s.io/v1beta1' \
        'shutdownGracePeriod: 5s' >/root/grace.yaml
    options --config /root/grace.yaml
    emit() { busctl emit /org/freedesktop/login1 org.freedesktop.login1.Manager PrepareForShutdown b "$1"; }
    leaving() { object | grep -q '"message":"nodeisshuttingdown","reason":"KubeletNotReady","status":"False"'; }
    check restart-with-grace systemctl restart longshore
    check inhibits-in-cluster within 60 inhibits
    emit true
    check node-leaves within 30 leaving
    emit false
    check node-stays within 30 node
    check inhibits-once-more within 30 inhibits
    check credentials-are-roots sh -c '! find /etc/kubernetes /var/lib/kubelet/pki -name "*.conf" -perm /077 | grep .'
    check reset-after-join longshore reset --yes
    check reset-disables sh -c '! systemctl is-enabled longshore && ! systemctl is-active longshore'
    nothing_left
    check no-credentials sh -c '! ls /etc/kubernetes/*.conf 2>/dev/null'
    check purge apt-get -qq purge -y longshore
    check no-files sh -c '! ls -d /var/lib/longshore /etc/longshore /etc/default/longshore /usr/bin/longshore /run/longshore 2>/dev/null'
    echo "RESULT done ok"
    finish systemctl poweroff
    ;;
esac
