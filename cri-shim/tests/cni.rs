//! CNI plugins in the real kernel: Debian's (`containernetworking-plugins`), and a script that plays
//! what they do not know yet or never do. Needs root.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test ends where something fails")]

mod host;

use std::{
    collections::BTreeMap,
    fs,
    net::{IpAddr, UdpSocket},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use cri_shim::network::{Network, NetworkConfig, Protocol, SandboxNetwork, netns};
use host::{Host, call, eventually, inside, ip, port, serve, transfer};
use serde_json::{Value, json};

/// Keeps its input, does what a file beside it says, and answers as a plugin of version 1.1.
const SCRIPT: &str = r#"#!/bin/sh
dir=$(dirname "$0") name=$(basename "$0")
cat > "$dir/input.$CNI_COMMAND.$name.$CNI_CONTAINERID"
echo "$CNI_COMMAND $name $CNI_CONTAINERID" >> "$dir/log"
[ -f "$dir/do.$CNI_COMMAND.$name" ] && . "$dir/do.$CNI_COMMAND.$name"
case $CNI_COMMAND in
VERSION) echo '{"cniVersion":"1.1.0","supportedVersions":["0.4.0","1.0.0","1.1.0"]}' ;;
ADD) echo '{"interfaces":[{"name":"eth0","sandbox":"'$CNI_NETNS'"}],
    "ips":[{"address":"10.9.0.2/24","interface":0}],"dns":{"nameservers":["10.9.0.1"]},
    "by":"'$name'"}' ;;
esac
"#;

/// A host with plugins that are scripts.
struct Plugins {
    host: Host,
    bin: PathBuf,
}

impl Plugins {
    fn new() -> Self {
        let host = Host::new();
        let bin = host.folder.path().join("bin");
        fs::create_dir_all(&bin).unwrap();
        fs::create_dir_all(host.config().cni_conf_dir).unwrap();
        Self { host, bin }
    }

    fn config(&self) -> NetworkConfig {
        let mut config = self.host.config();
        config.cni_bin_dirs = vec![self.bin.clone()];
        config
    }

    fn open(&self) -> Arc<dyn Network> {
        self.host.open_with(self.config())
    }

    fn install(&self, name: &str) {
        let path = self.bin.join(name);
        fs::write(&path, SCRIPT).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    }

    /// What `plugin` does at `command` before its answer.
    fn behave(&self, command: &str, plugin: &str, script: &str) {
        fs::write(self.bin.join(format!("do.{command}.{plugin}")), script).unwrap();
    }

    fn behave_well(&self, command: &str, plugin: &str) {
        fs::remove_file(self.bin.join(format!("do.{command}.{plugin}"))).unwrap();
    }

    fn configure(&self, text: &str) {
        fs::write(self.config().cni_conf_dir.join("10-test.conflist"), text).unwrap();
    }

    /// The calls since the last look.
    fn calls(&self) -> Vec<String> {
        let log = self.bin.join("log");
        let text = fs::read_to_string(&log).unwrap_or_default();
        let _ = fs::remove_file(log);
        text.lines().map(|line| line.trim().to_owned()).collect()
    }

    fn called(&self, call: &str) -> bool {
        fs::read_to_string(self.bin.join("log"))
            .is_ok_and(|log| log.lines().any(|l| l.trim() == call))
    }

    fn input(&self, command: &str, plugin: &str, container: &str) -> Value {
        let path = self.bin.join(format!("input.{command}.{plugin}.{container}"));
        serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
    }
}

#[test]
fn a_chain_hands_results_on_and_is_undone_backwards() {
    let plugins = Plugins::new();
    let (host, network) = (&plugins.host, plugins.open());
    for name in ["first", "second"] {
        plugins.install(name);
    }
    plugins.configure(
        r#"{"cniVersion":"1.1.0","name":"net","plugins":[{"type":"first","key":"kept"},
            {"type":"second","capabilities":{"portMappings":true,"bandwidth":true,"dns":true,
                "cgroupPath":true,"io.kubernetes.cri.pod-annotations":true}}]}"#,
    );
    let mut pod = host.sandbox("a", vec![port(Protocol::Udp, Some("192.0.2.1"), 53, 5353)]);
    pod.cgroup_parent = "/kubepods/pod1".to_owned();
    pod.annotations =
        BTreeMap::from([("kubernetes.io/egress-bandwidth".to_owned(), "1M".to_owned())]);
    let given = host.runtime.block_on(network.setup(&pod)).unwrap();
    assert_eq!(given.ips, ["10.9.0.2".parse::<IpAddr>().unwrap()]);
    assert_eq!(given.dns.unwrap().servers, ["10.9.0.1"]);
    assert_eq!(given.shown["Interfaces"]["eth0"]["IPConfigs"][0]["IP"], "10.9.0.2");
    assert_eq!(plugins.calls(), ["ADD first a", "ADD second a"]);
    let (first, second) = (plugins.input("ADD", "first", "a"), plugins.input("ADD", "second", "a"));
    assert_eq!(
        first,
        json!({"cniVersion": "1.1.0", "name": "net", "type": "first", "key": "kept"})
    );
    assert_eq!(second["prevResult"]["by"], "first");
    assert_eq!(second["prevResult"]["cniVersion"], "1.1.0");
    assert_eq!(
        second["runtimeConfig"],
        json!({
            "portMappings": [{"hostPort": 53, "containerPort": 5353, "protocol": "udp", "hostIP": "192.0.2.1"}],
            "bandwidth": {"egressRate": 1_000_000, "egressBurst": 1_048_576},
            "cgroupPath": "/kubepods/pod1",
            "io.kubernetes.cri.pod-annotations": {"kubernetes.io/egress-bandwidth": "1M"},
        })
    );
    // What the library would have written is there for others.
    let cached = host.folder.path().join("cni/results/net-a-eth0");
    let cache: Value = serde_json::from_slice(&fs::read(&cached).unwrap()).unwrap();
    assert_eq!((&cache["kind"], &cache["result"]["by"]), (&json!("cniCacheV1"), &json!("second")));
    // Once more is a check, with the last result.
    host.setup(&network, &pod).unwrap();
    assert_eq!(plugins.calls(), ["CHECK first a", "CHECK second a"]);
    assert_eq!(plugins.input("CHECK", "first", "a")["prevResult"]["by"], "second");
    // A check that fails does not take a running pod's network.
    plugins.behave("CHECK", "first", "echo '{\"code\":7,\"msg\":\"odd\"}'; exit 1");
    host.setup(&network, &pod).unwrap();
    assert_eq!(plugins.calls(), ["CHECK first a"]);
    host.teardown(&network, "a").unwrap();
    host.teardown(&network, "a").unwrap();
    assert_eq!(plugins.calls(), ["DEL second a", "DEL first a"]);
    assert_eq!(plugins.input("DEL", "first", "a")["prevResult"]["by"], "second");
    assert!(!cached.exists());
    assert_eq!(host.records(), 0);
    let mut bad = host.sandbox("bad", vec![]);
    bad.annotations =
        BTreeMap::from([("kubernetes.io/ingress-bandwidth".to_owned(), "fast".to_owned())]);
    let error = host.setup(&network, &bad).unwrap_err().to_string();
    assert!(error.contains("ingress-bandwidth") && error.contains("fast"), "{error}");
    assert_eq!((plugins.calls().len(), host.records()), (0, 0));
}

#[test]
fn the_newest_version_that_all_plugins_know_is_spoken() {
    let plugins = Plugins::new();
    let (host, network) = (&plugins.host, plugins.open());
    for name in ["new", "old"] {
        plugins.install(name);
    }
    plugins.behave(
        "VERSION",
        "old",
        "echo '{\"supportedVersions\":[\"0.4.0\",\"1.0.0\"]}'; exit 0",
    );
    plugins.configure(
        r#"{"cniVersions":["0.4.0","1.0.0","1.1.0","7.0.0"],"name":"net","disableCheck":true,
            "plugins":[{"type":"new"},{"type":"old"}]}"#,
    );
    host.setup(&network, &host.sandbox("a", vec![])).unwrap();
    assert_eq!(plugins.input("ADD", "new", "a")["cniVersion"], "1.0.0");
    // Asked once, not for each pod; and anew once the program was replaced.
    plugins.calls();
    let b = host.sandbox("b", vec![]);
    host.setup(&network, &b).unwrap();
    host.setup(&network, &b).unwrap();
    assert_eq!(plugins.calls(), ["ADD new b", "ADD old b"], "disableCheck");
    plugins.behave_well("VERSION", "old");
    plugins.install("old");
    host.setup(&network, &host.sandbox("c", vec![])).unwrap();
    assert_eq!(plugins.input("ADD", "old", "c")["cniVersion"], "1.1.0");
    // DEL speaks as ADD did.
    host.teardown(&network, "a").unwrap();
    assert_eq!(plugins.input("DEL", "old", "a")["cniVersion"], "1.0.0");
}

#[test]
fn status_is_the_plugins_own() {
    let plugins = Plugins::new();
    let (host, network) = (&plugins.host, plugins.open());
    host.status(&network).expect("the built-in network");
    let list =
        r#"{"cniVersion":"1.1.0","name":"net","plugins":[{"type":"p","capabilities":{"x":true}}]}"#;
    plugins.configure(list);
    let error = host.status(&network).unwrap_err();
    assert!(error.contains("plugin p of network net is not in"), "{error}");
    plugins.install("p");
    plugins.behave(
        "STATUS",
        "p",
        "echo '{\"code\":50,\"msg\":\"no route to the server\"}'; exit 1",
    );
    for _ in 0..2 {
        let error = host.status(&network).unwrap_err();
        assert!(error.contains("STATUS") && error.contains("no route to the server"), "{error}");
    }
    plugins.behave_well("STATUS", "p");
    plugins.calls();
    for _ in 0..3 {
        host.status(&network).unwrap();
    }
    assert_eq!(plugins.calls(), ["STATUS p"], "a good answer counts for a while");
    assert_eq!(
        plugins.input("STATUS", "p", ""),
        json!({"cniVersion": "1.1.0", "name": "net", "type": "p"})
    );
    plugins.configure(&list.replace("1.1.0", "1.0.0"));
    host.status(&network).unwrap();
    assert!(plugins.calls().is_empty(), "1.0.0 knows no STATUS");
    // Half an edit does not change anything, and is told.
    plugins.configure("{\"cniVersion\":");
    host.status(&network).unwrap();
    assert!(network.describe().last_load.unwrap_err().contains("10-test.conflist"));
    assert_eq!(network.describe().cni["Networks"][0]["Config"]["Name"], "net");
    plugins.configure(list);
    assert!(network.describe().last_load.is_ok());
}

#[test]
fn garbage_is_collected_at_the_start_and_living_attachments_are_named() {
    let plugins = Plugins::new();
    let host = &plugins.host;
    plugins.install("p");
    let list = r#"{"cniVersion":"1.1.0","name":"net","plugins":[{"type":"p"}]}"#;
    plugins.configure(list);
    let network = plugins.open();
    for id in ["keep", "lost", "rebooted"] {
        host.setup(&network, &host.sandbox(id, vec![])).unwrap();
    }
    drop(network);
    netns::delete(&host.folder.path().join("ns/rebooted")).unwrap();
    // Another runtime is on the same network.
    let results = host.folder.path().join("cni/results");
    let other = host.sandbox("other", vec![]);
    let entry = |id: &str, netns: &Path| {
        let value = json!({"kind": "cniCacheV1", "containerId": id, "ifName": "eth0",
            "networkName": "net", "netns": netns});
        fs::write(results.join(format!("net-{id}-eth0")), value.to_string()).unwrap();
    };
    entry("other", &other.netns);
    entry("dead", Path::new("/run/netns/not-there"));
    plugins.calls();
    let network = plugins.open();
    host.collect(&network, &["keep"]);
    eventually("GC", || plugins.called("GC p"));
    assert!(plugins.called("DEL p lost") && plugins.called("DEL p rebooted"));
    assert!(!plugins.called("DEL p keep") && !plugins.called("DEL p dead"));
    let names = json!([{"containerID": "keep", "ifname": "eth0"},
        {"containerID": "other", "ifname": "eth0"}]);
    let input = plugins.input("GC", "p", "");
    assert_eq!(input["cni.dev/valid-attachments"], names);
    assert_eq!(input["cni.dev/attachments"], names);
    assert_eq!(host.records(), 1);
    drop(network);
    for (list, why) in [
        (list.replace("\"name\"", "\"disableGC\":true,\"name\""), "disableGC"),
        (list.replace("1.1.0", "1.0.0"), "version 1.0.0"),
    ] {
        plugins.configure(&list);
        plugins.calls();
        let network = plugins.open();
        host.setup(&network, &host.sandbox("more", vec![])).unwrap();
        host.collect(&network, &["keep"]);
        eventually("DEL", || plugins.called("DEL p more"));
        eventually("the record is gone", || host.records() == 1);
        drop(network);
        assert!(!plugins.called("GC p"), "{why}");
    }
}

#[test]
fn what_could_not_be_undone_is_tried_again() {
    let plugins = Plugins::new();
    let (host, network) = (&plugins.host, plugins.open());
    for name in ["first", "second"] {
        plugins.install(name);
    }
    plugins.configure(
        r#"{"cniVersion":"1.1.0","name":"net","plugins":[{"type":"first"},{"type":"second"}]}"#,
    );
    let a = host.sandbox("a", vec![]);
    host.setup(&network, &a).unwrap();
    // The plugin is away, so is the namespace by the time it is back.
    fs::remove_file(plugins.bin.join("first")).unwrap();
    let error = host.teardown(&network, "a").unwrap_err().to_string();
    assert!(error.contains("plugin first") && error.contains("not found"), "{error}");
    netns::delete(&a.netns).unwrap();
    assert_eq!(host.records(), 1);
    plugins.install("first");
    eventually("the record is gone", || host.records() == 0);
    assert!(plugins.called("DEL first a"));
    // A sandbox that never came to be is not its caller's any more.
    plugins.behave("ADD", "second", "echo '{\"code\":11,\"msg\":\"full\"}'; exit 1");
    plugins.behave("DEL", "first", "[ -f $dir/hold ] && { echo held >&2; exit 1; }");
    fs::write(plugins.bin.join("hold"), "").unwrap();
    let error = host.setup(&network, &host.sandbox("b", vec![])).unwrap_err().to_string();
    assert!(error.contains("full") && error.contains("held"), "{error}");
    assert_eq!(host.records(), 1);
    fs::remove_file(plugins.bin.join("hold")).unwrap();
    eventually("the record is gone", || host.records() == 0);
    // A plugin that never ran is not asked to undo.
    plugins.configure(
        r#"{"cniVersion":"1.1.0","name":"net","plugins":[{"type":"first"},{"type":"absent"}]}"#,
    );
    plugins.calls();
    let error = host.setup(&network, &host.sandbox("c", vec![])).unwrap_err().to_string();
    assert!(error.contains("absent") && error.contains("not found"), "{error}");
    let calls = plugins.calls();
    let about: Vec<_> = calls.iter().filter(|call| call.ends_with(" c")).collect();
    assert_eq!(about, ["ADD first c", "DEL first c"]);
    assert_eq!(host.records(), 0);
    // While DEL fails, DEL of what stands before it in the list waits.
    plugins.behave_well("ADD", "second");
    plugins.configure(
        r#"{"cniVersion":"1.1.0","name":"net","plugins":[{"type":"first"},{"type":"second"}]}"#,
    );
    host.setup(&network, &host.sandbox("d", vec![])).unwrap();
    plugins.behave("DEL", "second", "[ -f $dir/hold ] && exit 1");
    fs::write(plugins.bin.join("hold"), "").unwrap();
    host.teardown(&network, "d").unwrap_err();
    assert!(plugins.called("DEL second d") && !plugins.called("DEL first d"));
    fs::remove_file(plugins.bin.join("hold")).unwrap();
    eventually("the record is gone", || host.records() == 0);
    assert!(plugins.called("DEL first d"));
}

#[test]
fn an_add_cut_off_is_undone_and_its_plugin_ended() {
    let plugins = Plugins::new();
    let host = &plugins.host;
    plugins.install("p");
    plugins.configure(r#"{"cniVersion":"1.1.0","name":"net","plugins":[{"type":"p"}]}"#);
    plugins.behave("ADD", "p", "setsid sh -c 'echo $$ > '$dir'/pid; exec sleep 300' & sleep 300");
    let pod = host.sandbox("a", vec![]);
    // A shim of its own, which ends in the middle as if it was killed.
    let shim = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
    let shim = shim.unwrap();
    let network = {
        let _context = shim.enter();
        cri_shim::network::open(plugins.config()).unwrap()
    };
    let adding = Arc::clone(&network);
    let of = pod.clone();
    shim.spawn(async move { adding.setup(&of).await });
    let pid = plugins.bin.join("pid");
    eventually("the plugin runs", || fs::read_to_string(&pid).is_ok_and(|pid| pid.ends_with('\n')));
    shim.shutdown_timeout(Duration::ZERO);
    drop(network);
    let pid = fs::read_to_string(pid).unwrap().trim().to_owned();
    let runs =
        || fs::read_to_string(format!("/proc/{pid}/cmdline")).is_ok_and(|c| c.contains("sleep"));
    assert!(runs(), "what it started lives on");
    let network = plugins.open();
    host.collect(&network, &[]);
    eventually("DEL", || plugins.called("DEL p a"));
    eventually("the record is gone", || host.records() == 0);
    // Killed before DEL; dying takes a moment.
    eventually("what it started is gone", || !runs());
    plugins.behave_well("ADD", "p");
    host.setup(&network, &pod).unwrap();
}

#[test]
fn a_plugin_that_hangs_is_ended_and_undone() {
    let plugins = Plugins::new();
    let host = &plugins.host;
    plugins.install("p");
    plugins.configure(r#"{"cniVersion":"1.1.0","name":"net","plugins":[{"type":"p"}]}"#);
    plugins.behave("ADD", "p", "echo stuck >&2; sleep 300");
    let mut config = plugins.config();
    config.cni_timeout = Duration::from_secs(1);
    let network = host.open_with(config);
    let error = host.setup(&network, &host.sandbox("a", vec![])).unwrap_err().to_string();
    assert!(error.contains("plugin p") && error.contains("no answer in 1 s"), "{error}");
    assert_eq!(plugins.calls(), ["ADD p a", "DEL p a"]);
    assert_eq!(host.records(), 0);
}

#[test]
fn slow_plugins_run_side_by_side() {
    const PODS: usize = 20;
    let plugins = Plugins::new();
    let (host, network) = (&plugins.host, plugins.open());
    plugins.install("p");
    plugins.configure(r#"{"cniVersion":"1.1.0","name":"net","plugins":[{"type":"p"}]}"#);
    // Each waits for all: one at a time would wait for ever.
    let all = format!(
        "touch $dir/here.$CNI_CONTAINERID; while [ $(ls $dir/here.* | wc -l) -lt {PODS} ]; do sleep 0.1; done"
    );
    plugins.behave("ADD", "p", &all);
    let pods: Vec<SandboxNetwork> =
        (0..PODS).map(|n| host.sandbox(&format!("s{n}"), vec![])).collect();
    host.runtime.block_on(async {
        let setups = pods.iter().map(|pod| network.setup(pod));
        futures::future::try_join_all(setups).await.unwrap();
    });
    assert_eq!(host.records(), PODS);
}

/// A configuration with Debian's plugins.
fn debian(host: &Host, plugins: Value) -> Arc<dyn Network> {
    let config = host.config();
    fs::create_dir_all(&config.cni_conf_dir).unwrap();
    let list = json!({"cniVersion": "1.0.0", "name": "test", "plugins": plugins});
    fs::write(config.cni_conf_dir.join("10-test.conflist"), list.to_string()).unwrap();
    host.open()
}

fn host_local(host: &Host, subnets: &[&str]) -> Value {
    let ranges: Vec<_> = subnets.iter().map(|subnet| json!([{"subnet": subnet}])).collect();
    json!({"type": "host-local", "dataDir": host.folder.path().join("ipam"), "ranges": ranges,
        "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}]})
}

#[test]
fn ptp_connects_both_families() {
    let host = Host::new();
    fs::write("/proc/sys/net/ipv4/ip_forward", "1").unwrap();
    let ipam = host_local(&host, &["10.78.0.0/24", "fd00:78::/64"]);
    let network = debian(&host, json!([{"type": "ptp", "ipMasq": false, "ipam": ipam}]));
    let (a, b) = (host.sandbox("a", vec![]), host.sandbox("b", vec![]));
    let ips = host.setup(&network, &a).unwrap();
    assert_eq!(ips, ["10.78.0.2".parse::<IpAddr>().unwrap(), "fd00:78::2".parse().unwrap()]);
    host.setup(&network, &b).unwrap();
    serve(&a.netns, 80);
    assert_eq!(
        call(Some(&b.netns), "10.78.0.2:80").unwrap(),
        "10.78.0.3".parse::<IpAddr>().unwrap()
    );
    call(None, "[fd00:78::2]:80").unwrap();
    let shown = host.runtime.block_on(network.setup(&a)).unwrap().shown;
    assert_eq!(shown["Interfaces"]["eth0"]["IPConfigs"][1]["IP"], "fd00:78::2");
    assert_eq!(shown["Interfaces"]["eth0"]["Sandbox"], a.netns.display().to_string());
    for id in ["a", "b"] {
        host.teardown(&network, id).unwrap();
    }
    assert_eq!((host.pod_links(), host.records()), (0, 0));
}

#[test]
fn macvlan_connects_pods_with_the_outside() {
    let host = Host::new();
    let ipam = json!({"type": "host-local", "dataDir": host.folder.path().join("ipam"),
        "ranges": [[{"subnet": "192.0.2.0/24", "rangeStart": "192.0.2.100"}]]});
    let network = debian(&host, json!([{"type": "macvlan", "master": "up0", "ipam": ipam}]));
    let (a, b) = (host.sandbox("a", vec![]), host.sandbox("b", vec![]));
    let ips = host.setup(&network, &a).unwrap();
    assert_eq!(ips, ["192.0.2.100".parse::<IpAddr>().unwrap()]);
    host.setup(&network, &b).unwrap();
    serve(&host.outside(), 80);
    serve(&a.netns, 80);
    assert_eq!(call(Some(&a.netns), "192.0.2.2:80").unwrap(), ips[0], "as itself");
    call(Some(&b.netns), "192.0.2.100:80").unwrap();
    call(Some(&host.outside()), "192.0.2.100:80").unwrap();
    for id in ["a", "b"] {
        host.teardown(&network, id).unwrap();
    }
    let left = inside(&a.netns, || ip("-o link"));
    assert!(!left.contains("eth0"), "{left}");
}

#[test]
fn bandwidth_limits_both_ways() {
    const MIB: usize = 1 << 20;
    let host = Host::new();
    let ipam = host_local(&host, &["10.77.0.0/24"]);
    let network = debian(
        &host,
        json!([{"type": "bridge", "bridge": "cni0", "isGateway": true, "ipam": ipam},
            {"type": "bandwidth", "capabilities": {"bandwidth": true}}]),
    );
    let mut pod = host.sandbox("a", vec![]);
    pod.annotations = BTreeMap::from([
        ("kubernetes.io/ingress-bandwidth".to_owned(), "8M".to_owned()),
        ("kubernetes.io/egress-bandwidth".to_owned(), "16M".to_owned()),
    ]);
    host.setup(&network, &pod).unwrap();
    // A second's worth may go at once; the rest takes its time.
    let took = transfer(None, &pod.netns, "10.77.0.2:5001", 3 * MIB);
    assert!(took > Duration::from_secs(1), "1 MB/s was asked for: 3 MiB took {took:?}");
    let own = PathBuf::from("/proc/thread-self/ns/net");
    let took = transfer(Some(&pod.netns), &own, "10.77.0.1:5002", 6 * MIB);
    assert!(took > Duration::from_secs(1), "2 MB/s was asked for: 6 MiB took {took:?}");
    host.teardown(&network, "a").unwrap();
    let left = ip("-o link");
    assert!(!left.contains("bwp") && !left.contains("veth"), "{left}");
}

#[test]
fn portmap_opens_ports_of_every_kind() {
    let host = Host::new();
    let ipam = host_local(&host, &["10.77.0.0/24"]);
    let network = debian(
        &host,
        json!([{"type": "bridge", "bridge": "cni0", "isGateway": true, "ipMasq": true, "ipam": ipam},
            {"type": "portmap", "capabilities": {"portMappings": true}, "snat": true}]),
    );
    let pod = host.sandbox(
        "a",
        vec![
            port(Protocol::Tcp, Some("192.0.2.1"), 8080, 80),
            port(Protocol::Udp, None, 5353, 53),
            port(Protocol::Sctp, None, 9000, 9001),
        ],
    );
    host.setup(&network, &pod).unwrap();
    serve(&pod.netns, 80);
    let outside = host.outside();
    call(Some(&outside), "192.0.2.1:8080").unwrap();
    assert!(call(None, "127.0.0.1:8080").is_err(), "bound to another address");
    let server = inside(&pod.netns, || UdpSocket::bind("0.0.0.0:53").unwrap());
    server.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    let client = inside(&outside, || UdpSocket::bind("192.0.2.2:0").unwrap());
    client.send_to(b"hi", "192.0.2.1:5353").unwrap();
    assert_eq!(server.recv_from(&mut [0; 16]).unwrap().0, 2);
    let sctp = inside(&outside, || host::sctp("192.0.2.2:1000", "192.0.2.1:9000"));
    let came = inside(&pod.netns, host::sctp_server);
    sctp.send();
    assert_eq!(came.next(), 9001);
    host.teardown(&network, "a").unwrap();
    assert!(call(Some(&outside), "192.0.2.1:8080").is_err());
}

#[test]
fn cni_plugins_connect_and_disconnect() {
    let host = Host::new();
    let config = host.config();
    fs::create_dir_all(&config.cni_conf_dir).unwrap();
    let network = host.open();
    // Nothing there: the built-in network. Something unusable: not ready.
    host.status(&network).unwrap();
    let file = config.cni_conf_dir.join("10-test.conflist");
    fs::write(&file, "{").unwrap();
    assert!(host.status(&network).unwrap_err().contains("10-test.conflist"));
    let data = host.folder.path().join("ipam");
    let text = format!(
        r#"{{"cniVersion":"1.0.0","name":"test","plugins":[
            {{"type":"bridge","bridge":"cni0","isGateway":true,"ipMasq":true,"hairpinMode":true,
              "ipam":{{"type":"host-local","dataDir":"{}","ranges":[[{{"subnet":"10.77.0.0/24"}}]],
                "routes":[{{"dst":"0.0.0.0/0"}}]}}}},
            {{"type":"portmap","capabilities":{{"portMappings":true}}}}]}}"#,
        data.display()
    );
    fs::write(&file, &text).unwrap();
    host.status(&network).unwrap();
    let (a, b) =
        (host.sandbox("a", vec![port(Protocol::Tcp, None, 8080, 80)]), host.sandbox("b", vec![]));
    let ips = host.setup(&network, &a).unwrap();
    assert_eq!(ips, ["10.77.0.2".parse::<IpAddr>().unwrap()]);
    host.setup(&network, &b).unwrap();
    assert_eq!(host.setup(&network, &a).unwrap(), ips, "CHECK passes and nothing changes");
    serve(&a.netns, 80);
    call(Some(&b.netns), "10.77.0.2:80").unwrap();
    call(Some(&host.outside()), "192.0.2.1:8080").unwrap();

    // DEL uses what ADD used, also after a restart, with other or no configuration, twice, and
    // without the namespace.
    drop(network);
    fs::remove_file(&file).unwrap();
    let network = host.open();
    netns::delete(&b.netns).unwrap();
    for id in ["a", "a", "b"] {
        host.teardown(&network, id).unwrap();
    }
    let left: Vec<_> = fs::read_dir(data.join("test"))
        .unwrap()
        .filter_map(|entry| entry.unwrap().file_name().into_string().ok())
        .filter(|name| name.starts_with("10."))
        .collect();
    assert!(left.is_empty(), "{left:?}");
    assert_eq!(host.pod_links(), 0, "{}", ip("-o link"));
    assert_eq!(host.records(), 0);
    let c = host.sandbox("c", vec![]);
    assert_eq!(host.setup(&network, &c).unwrap()[0], "10.88.0.2".parse::<IpAddr>().unwrap());
}

#[test]
fn a_failing_plugin_says_why_and_leaves_nothing() {
    let host = Host::new();
    let config = host.config();
    fs::create_dir_all(&config.cni_conf_dir).unwrap();
    let bin = host.folder.path().join("bin");
    fs::create_dir_all(&bin).unwrap();
    let log = host.folder.path().join("log");
    let script = format!(
        "#!/bin/sh\necho $CNI_COMMAND >> {}\ncat > /dev/null\n[ $CNI_COMMAND = DEL ] && exit 0\n\
         echo 'something on stderr' >&2\n\
         echo '{{\"cniVersion\":\"1.0.0\",\"code\":11,\"msg\":\"no room\",\"details\":\"try later\"}}'\nexit 1\n",
        log.display()
    );
    let plugin = bin.join("broken");
    fs::write(&plugin, script).unwrap();
    fs::set_permissions(&plugin, fs::Permissions::from_mode(0o755)).unwrap();
    let mut config = config;
    config.cni_bin_dirs = vec![bin];
    let network = host.open_with(config.clone());
    let file = config.cni_conf_dir.join("a.conf");
    fs::write(&file, r#"{"cniVersion":"1.0.0","name":"n","type":"broken"}"#).unwrap();
    let sandbox = host.sandbox("a", vec![]);
    let error = host.setup(&network, &sandbox).unwrap_err().to_string();
    for want in ["plugin broken", "network n", "ADD", "no room: try later", "on stderr"] {
        assert!(error.contains(want), "{want}: {error}");
    }
    assert_eq!(fs::read_to_string(&log).unwrap(), "ADD\nDEL\n");
    fs::write(&file, r#"{"cniVersion":"1.0.0","name":"n","type":"absent"}"#).unwrap();
    let error = host.setup(&network, &sandbox).unwrap_err().to_string();
    assert!(error.contains("absent") && error.contains("not found"), "{error}");
}

/// Prints what a sandbox's network costs, built in and by Debian's bridge plugin: wall time of one
/// after the other, and processor time of this process and its children.
#[test]
#[ignore = "a measurement: cargo test --release -p cri-shim --test cni -- --ignored --nocapture cost"]
fn what_connecting_costs() {
    use nix::sys::resource::{UsageWho, getrusage};
    use std::time::Instant;

    const PODS: usize = 40;
    let processor = || {
        let of = |who| {
            let usage = getrusage(who).unwrap();
            let (user, system) = (usage.user_time(), usage.system_time());
            (user.tv_sec() + system.tv_sec()) * 1_000_000 + user.tv_usec() + system.tv_usec()
        };
        of(UsageWho::RUSAGE_SELF) + of(UsageWho::RUSAGE_CHILDREN)
    };
    let row = |what: &str, work: &mut dyn FnMut(usize)| {
        let mut times: Vec<Duration> = Vec::new();
        let before = processor();
        for n in 0..PODS {
            let started = Instant::now();
            work(n);
            times.push(started.elapsed());
        }
        times.sort();
        let cpu = (processor() - before) / PODS as i64;
        println!(
            "{what:32} p50 {:>9.3?}  p95 {:>9.3?}  processor {cpu} us",
            times[PODS / 2],
            times[PODS * 95 / 100]
        );
    };
    let measure = |host: &Host, network: &Arc<dyn Network>, what: &str| {
        let ports = vec![port(Protocol::Tcp, None, 8000, 80)];
        host.setup(network, &host.sandbox("warm", vec![])).unwrap();
        let mut pods = Vec::new();
        row(&format!("{what}: netns"), &mut |n| pods.push(host.sandbox(&format!("p{n}"), vec![])));
        row(&format!("{what}: connect"), &mut |n| drop(host.setup(network, &pods[n]).unwrap()));
        row(&format!("{what}: disconnect"), &mut |n| host.teardown(network, &pods[n].id).unwrap());
        row(&format!("{what}: netns away"), &mut |n| netns::delete(&pods[n].netns).unwrap());
        let mut pod = host.sandbox("ports", ports.clone());
        row(&format!("{what}: both, with a host port"), &mut |n| {
            pod.id = format!("q{n}");
            host.setup(network, &pod).unwrap();
            host.teardown(network, &pod.id).unwrap();
        });
    };
    let host = Host::new();
    measure(&host, &host.open(), "built in");
    let ipam = host_local(&host, &["10.77.0.0/24", "fd00:77::/64"]);
    let network = debian(
        &host,
        json!([{"type": "bridge", "bridge": "cni0", "isGateway": true, "ipMasq": true, "ipam": ipam},
            {"type": "portmap", "capabilities": {"portMappings": true}}]),
    );
    measure(&host, &network, "bridge + portmap");
}
