//! Pod networks in the real kernel, in network and mount namespaces of the test's own. Needs root.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test ends where something fails")]

mod host;

use std::{
    collections::BTreeMap,
    fs,
    net::{IpAddr, UdpSocket},
    path::PathBuf,
    process::Command,
    sync::Arc,
    time::Duration,
};

use cri_shim::network::{self, NetworkConfig, NetworkError, Protocol, netns};
use host::{
    Host, call, eventually, inside, ip, nft, pause, port, sctp, sctp_server, serve, transfer,
};

#[test]
fn sandboxes_talk_to_each_other_the_host_and_outside() {
    let host = Host::new();
    let network = host.open();
    let (a, b) = (host.sandbox("a", vec![]), host.sandbox("b", vec![]));
    let (ips_a, ips_b) = (host.setup(&network, &a).unwrap(), host.setup(&network, &b).unwrap());
    assert_eq!(ips_a, ["10.88.0.2".parse::<IpAddr>().unwrap(), "fd00:10:88::2".parse().unwrap()]);
    assert_eq!(ips_b[0], "10.88.0.3".parse::<IpAddr>().unwrap());
    assert_eq!(host.setup(&network, &a).unwrap(), ips_a, "setup is idempotent");
    host.status(&network).unwrap();
    // No address is still being tried, as none could be forwarded under meanwhile (IFA_F_TENTATIVE).
    let addresses = fs::read_to_string("/proc/thread-self/net/if_inet6").unwrap();
    let bridge = addresses.lines().filter(|line| line.ends_with("longshore0"));
    let flags = bridge.map(|line| line.split_whitespace().nth(4).unwrap());
    let flags: Vec<_> = flags.map(|hex| u32::from_str_radix(hex, 16).unwrap()).collect();
    assert!(flags.len() == 2 && flags.iter().all(|flags| flags & 0x40 == 0), "{addresses}");
    serve(&b.netns, 80);
    serve(&host.outside(), 80);
    // Pod to pod with its own address, host to pod, pod to outside under the host's address.
    assert_eq!(call(Some(&a.netns), "10.88.0.3:80").unwrap(), ips_a[0]);
    assert_eq!(call(Some(&a.netns), "[fd00:10:88::3]:80").unwrap(), ips_a[1]);
    assert_eq!(call(None, "10.88.0.3:80").unwrap(), "10.88.0.1".parse::<IpAddr>().unwrap());
    let outer: IpAddr = "192.0.2.1".parse().unwrap();
    assert_eq!(call(Some(&a.netns), "192.0.2.2:80").unwrap(), outer);
    let outer: IpAddr = "2001:db8::1".parse().unwrap();
    assert_eq!(call(Some(&a.netns), "[2001:db8::2]:80").unwrap(), outer);

    for id in ["a", "b", "a", "never"] {
        host.runtime.block_on(network.teardown(id)).unwrap();
    }
    host.settled(0, 0);
}

#[test]
fn host_ports_are_reached_from_everywhere_and_go_with_the_pod() {
    let host = Host::new();
    let network = host.open();
    let web = host.sandbox(
        "web",
        vec![
            port(Protocol::Tcp, None, 8080, 80),
            port(Protocol::Tcp, Some("192.0.2.1"), 8081, 80),
            port(Protocol::Udp, None, 5353, 53),
        ],
    );
    let other = host.sandbox("other", vec![]);
    host.setup(&network, &other).unwrap();
    // The base rules stand by now: what the next sandbox adds must all go with it.
    let before = nft("list ruleset");
    assert!(before.contains("longshore-pods"));
    let web_ips = host.setup(&network, &web).unwrap();
    serve(&web.netns, 80);
    let outside = host.outside();
    let far: IpAddr = "192.0.2.2".parse().unwrap();
    assert_eq!(call(Some(&outside), "192.0.2.1:8080").unwrap(), far);
    assert_eq!(call(Some(&outside), "192.0.2.1:8081").unwrap(), far);
    let far: IpAddr = "2001:db8::2".parse().unwrap();
    assert_eq!(call(Some(&outside), "[2001:db8::1]:8080").unwrap(), far);
    call(None, "192.0.2.1:8080").unwrap();
    call(None, "127.0.0.1:8080").unwrap();
    call(None, "[2001:db8::1]:8080").unwrap();
    assert!(call(None, "127.0.0.1:8081").is_err(), "bound to another address");
    call(Some(&other.netns), "192.0.2.1:8080").unwrap();
    call(Some(&web.netns), "192.0.2.1:8080").expect("a pod reaches itself by its host port");
    call(Some(&web.netns), "[2001:db8::1]:8080").unwrap();

    let server = inside(&web.netns, || UdpSocket::bind("0.0.0.0:53").unwrap());
    let client = inside(&outside, || UdpSocket::bind("192.0.2.2:0").unwrap());
    for socket in [&server, &client] {
        socket.set_read_timeout(Some(Duration::from_secs(3))).unwrap();
    }
    client.send_to(b"hi", "192.0.2.1:5353").unwrap();
    let mut buffer = [0; 16];
    let (_, from) = server.recv_from(&mut buffer).unwrap();
    server.send_to(b"ho", from).unwrap();
    assert_eq!(client.recv_from(&mut buffer).unwrap().1, "192.0.2.1:5353".parse().unwrap());

    // Taken ports name who has them; the loser leaves nothing.
    let rival = host.sandbox("rival", vec![port(Protocol::Tcp, None, 8080, 1)]);
    let error = host.setup(&network, &rival).unwrap_err();
    assert!(matches!(error, NetworkError::PortTaken { .. }), "{error}");
    assert!(error.to_string().contains("default/pod-web"), "{error}");

    // A restart finds everything; a flushed ruleset is written again.
    drop(network);
    nft("flush ruleset");
    let network = host.open();
    host.runtime.block_on(network.collect(&["web".to_owned(), "other".to_owned()])).unwrap();
    assert_eq!(host.setup(&network, &web).unwrap(), web_ips);
    call(Some(&outside), "192.0.2.1:8080").unwrap();
    host.runtime.block_on(network.teardown("web")).unwrap();
    assert_eq!(nft("list ruleset"), before);
    assert!(call(Some(&outside), "192.0.2.1:8080").is_err());
    host.setup(&network, &rival).unwrap();
}

#[test]
fn a_udp_client_that_keeps_its_socket_finds_the_next_pod() {
    let host = Host::new();
    let network = host.open();
    let outside = host.outside();
    let mut buffer = [0; 16];
    for (client, to) in
        [("192.0.2.2:0", "192.0.2.1:5353"), ("[2001:db8::2]:0", "[2001:db8::1]:5353")]
    {
        let client = inside(&outside, move || UdpSocket::bind(client).unwrap());
        // Nobody serves it yet: the kernel remembers that the host itself is meant.
        client.send_to(b"early", to).unwrap();
        for id in ["first", "second"] {
            let pod = host.sandbox(id, vec![port(Protocol::Udp, None, 5353, 53)]);
            host.setup(&network, &pod).unwrap();
            let server = inside(&pod.netns, || UdpSocket::bind("[::]:53").unwrap());
            server.set_read_timeout(Some(Duration::from_secs(3))).unwrap();
            client.send_to(b"hi", to).unwrap();
            let (_, from) =
                server.recv_from(&mut buffer).unwrap_or_else(|e| panic!("{to} {id}: {e}"));
            server.send_to(b"ho", from).unwrap();
            host.runtime.block_on(network.teardown(id)).unwrap();
            netns::delete(&pod.netns).unwrap();
        }
    }
}

#[test]
fn what_a_crash_leaves_is_collected() {
    let host = Host::new();
    let network = host.open();
    for id in ["keep", "lost", "gone"] {
        host.setup(&network, &host.sandbox(id, vec![])).unwrap();
    }
    netns::delete(&host.folder.path().join("ns/gone")).unwrap();
    drop(network);
    ip("link add lsv0123456789ab type veth peer name x0");
    fs::write(host.folder.path().join("network/sandboxes/broken.json"), "{").unwrap();
    let network = host.open();
    host.runtime.block_on(network.collect(&["keep".to_owned()])).unwrap();
    assert_eq!(host.pod_links(), 1, "{}", ip("-o link"));
    // A freed address rests.
    let next = host.setup(&network, &host.sandbox("next", vec![])).unwrap();
    assert_eq!(next[0], "10.88.0.5".parse::<IpAddr>().unwrap());
}

#[test]
fn the_nodes_blocks_are_used_and_run_out_with_a_clear_error() {
    let host = Host::new();
    let network = host.open();
    let old = host.setup(&network, &host.sandbox("old", vec![])).unwrap();
    network.set_pod_cidrs(vec!["10.99.1.0/29".parse().unwrap()]);
    for n in 2..=6 {
        let ips = host.setup(&network, &host.sandbox(&format!("p{n}"), vec![])).unwrap();
        assert_eq!(ips, [format!("10.99.1.{n}").parse::<IpAddr>().unwrap()]);
    }
    let error = host.setup(&network, &host.sandbox("p7", vec![])).unwrap_err();
    assert!(error.to_string().contains("no free address in 10.99.1.0/29"), "{error}");
    // One that is just leaving makes room.
    host.teardown(&network, "p3").unwrap();
    let ips = host.setup(&network, &host.sandbox("p8", vec![])).unwrap();
    assert_eq!(ips, ["10.99.1.3".parse::<IpAddr>().unwrap()]);
    // Sandboxes from before keep working.
    serve(&host.folder.path().join("ns/old"), 80);
    assert!(call(Some(&host.folder.path().join("ns/p2")), &format!("{}:80", old[0])).is_ok());
}

#[test]
fn fifty_sandboxes_at_once() {
    let host = Host::new();
    let network = host.open();
    let sandboxes: Vec<_> = (0..50).map(|n| host.sandbox(&format!("s{n}"), vec![])).collect();
    let started = std::time::Instant::now();
    let ips: Vec<Vec<IpAddr>> = host.runtime.block_on(async {
        let setups: Vec<_> = sandboxes
            .iter()
            .cloned()
            .map(|sandbox| {
                let network = Arc::clone(&network);
                tokio::spawn(async move { network.setup(&sandbox).await.unwrap().ips })
            })
            .collect();
        let mut all = Vec::new();
        for setup in setups {
            all.push(setup.await.unwrap());
        }
        all
    });
    println!("50 sandboxes connected in {:?}", started.elapsed());
    let unique: std::collections::BTreeSet<_> = ips.iter().flatten().collect();
    assert_eq!(unique.len(), 100);
    serve(&sandboxes[49].netns, 80);
    call(Some(&sandboxes[0].netns), &format!("{}:80", ips[49][0])).unwrap();
    let started = std::time::Instant::now();
    host.runtime.block_on(async {
        let all: Vec<_> = sandboxes
            .iter()
            .map(|sandbox| {
                let (network, id) = (Arc::clone(&network), sandbox.id.clone());
                tokio::spawn(async move { network.teardown(&id).await.unwrap() })
            })
            .collect();
        for one in all {
            one.await.unwrap();
        }
    });
    println!("50 sandboxes disconnected in {:?}", started.elapsed());
    host.settled(0, 0);
    let started = std::time::Instant::now();
    for n in 0..20 {
        let sandbox = host.sandbox(&format!("t{n}"), vec![port(Protocol::Tcp, None, 9000 + n, 80)]);
        host.setup(&network, &sandbox).unwrap();
    }
    println!("one by one, with netns and a host port: {:?} each", started.elapsed() / 20);
}

#[test]
fn sctp_host_ports_lead_to_the_pod_and_forget_it() {
    let host = Host::new();
    let network = host.open();
    let client = inside(&host.outside(), || sctp("192.0.2.2:1000", "192.0.2.1:9000"));
    // The kernel follows this one to the host itself.
    client.send();
    for id in ["first", "second"] {
        let pod = host.sandbox(id, vec![port(Protocol::Sctp, Some("192.0.2.1"), 9000, 9001)]);
        host.setup(&network, &pod).unwrap();
        let server = inside(&pod.netns, sctp_server);
        client.send();
        assert_eq!(server.next(), 9001, "{id}");
        host.teardown(&network, id).unwrap();
        netns::delete(&pod.netns).unwrap();
    }
}

#[test]
fn annotations_limit_the_bandwidth_both_ways() {
    const MIB: usize = 1 << 20;
    let host = Host::new();
    let network = host.open();
    let mut pod = host.sandbox("a", vec![]);
    pod.annotations = BTreeMap::from([
        ("kubernetes.io/ingress-bandwidth".to_owned(), "8M".to_owned()),
        ("kubernetes.io/egress-bandwidth".to_owned(), "16M".to_owned()),
    ]);
    host.setup(&network, &pod).unwrap();
    let free = host.sandbox("b", vec![]);
    host.setup(&network, &free).unwrap();
    // A second's worth may go at once; the rest takes its time.
    let took = transfer(Some(&free.netns), &pod.netns, "10.88.0.2:5001", 3 * MIB);
    assert!(took > Duration::from_secs(1), "1 MB/s was asked for: 3 MiB took {took:?}");
    let took = transfer(Some(&pod.netns), &host.outside(), "[2001:db8::2]:5002", 6 * MIB);
    assert!(took > Duration::from_secs(1), "2 MB/s was asked for: 6 MiB took {took:?}");
    assert!(ip("-o link").contains(": lsi"));
    // A crash leaves both devices.
    drop(network);
    let network = host.open();
    host.collect(&network, &["b"]);
    let links = ip("-o link");
    assert!(!links.contains(": lsi") && host.pod_links() == 1, "{links}");
    pod.annotations.insert("kubernetes.io/ingress-bandwidth".to_owned(), "10".to_owned());
    let error = host.setup(&network, &pod).unwrap_err().to_string();
    assert!(error.contains("ingress-bandwidth") && error.contains("less than"), "{error}");
}

#[test]
fn links_take_the_uplinks_mtu_and_the_bridge_keeps_its_address() {
    let host = Host::new();
    ip("link set up0 mtu 1400");
    ip("route add default via 192.0.2.2");
    let network = host.open();
    let bridge = || fs::read_to_string("/sys/class/net/longshore0/address").unwrap();
    let a = host.sandbox("a", vec![]);
    host.setup(&network, &a).unwrap();
    let address = bridge();
    assert_eq!(address.trim(), "0a:58:0a:58:00:01", "bound to the gateway's");
    let link = inside(&a.netns, || ip("-o link show eth0"));
    assert!(link.contains("mtu 1400") && link.contains("0a:58:0a:58:00:02"), "{link}");
    // Ports with lower addresses come and go.
    ip("link add low type veth peer name low1");
    ip("link set low address 02:00:00:00:00:01 master longshore0 up");
    assert_eq!(bridge(), address);
    ip("link del low");
    assert_eq!(bridge(), address);
    // The gateway has both addresses; the pod's are usable at once.
    let six = inside(&a.netns, || ip("-o -6 addr show dev eth0"));
    assert!(six.contains("fd00:10:88::2/128") && !six.contains("tentative"), "{six}");
    let lo = inside(&a.netns, || ip("-o addr show dev lo"));
    assert!(lo.contains("127.0.0.1/8") && lo.contains("::1/128"), "{lo}");
}

#[test]
fn one_family_alone_and_hardware_addresses_of_it() {
    let host = Host::new();
    let mut config = host.config();
    config.pod_cidrs = vec!["fd00:7::/112".parse().unwrap()];
    config.mtu = Some(1300);
    let network = host.open_with(config);
    let pods: Vec<_> = ["a", "b"].map(|id| host.sandbox(id, vec![])).into();
    for (pod, want) in pods.iter().zip(["fd00:7::2", "fd00:7::3"]) {
        assert_eq!(host.setup(&network, pod).unwrap(), [want.parse::<IpAddr>().unwrap()]);
    }
    serve(&pods[1].netns, 80);
    call(Some(&pods[0].netns), "[fd00:7::3]:80").unwrap();
    let link = inside(&pods[1].netns, || ip("-o link show eth0"));
    assert!(link.contains("0a:59:00:00:00:03") && link.contains("mtu 1300"), "{link}");
}

#[test]
fn what_the_network_gave_is_shown_as_containerd_shows_it() {
    let host = Host::new();
    let network = host.open();
    let pod = host.sandbox("a", vec![]);
    let given = host.runtime.block_on(network.setup(&pod)).unwrap();
    let eth0 = &given.shown["Interfaces"]["eth0"];
    assert_eq!(
        eth0["IPConfigs"],
        serde_json::json!([{"IP": "10.88.0.2", "Gateway": "10.88.0.1"},
            {"IP": "fd00:10:88::2", "Gateway": "fd00:10:88::1"}])
    );
    assert_eq!(eth0["Mac"], "0a:58:0a:58:00:02");
    assert_eq!(
        given.shown["Routes"][0],
        serde_json::json!({"dst": "0.0.0.0/0", "gw": "10.88.0.1"})
    );
    drop(network);
    let network = host.open();
    assert_eq!(host.runtime.block_on(network.setup(&pod)).unwrap(), given, "after a restart, too");
}

#[test]
fn half_of_a_sandbox_is_taken_away_and_what_is_others_stays() {
    let host = Host::new();
    let network = host.open();
    host.setup(&network, &host.sandbox("base", vec![])).unwrap();
    let before = nft("list ruleset");
    ip("link add veth77 type veth peer name veth78");
    nft("add table inet other");
    let breakages: [(&str, Damage); 4] = [
        ("no link", |veth| drop(ip(&format!("link del {veth}")))),
        ("no rules", |_| drop(nft("flush ruleset"))),
        ("no bridge", |_| drop(ip("link del longshore0"))),
        ("not on the bridge", |veth| drop(ip(&format!("link set {veth} nomaster")))),
    ];
    for (n, (what, damage)) in breakages.into_iter().enumerate() {
        let id = format!("p{n}");
        let pod = host.sandbox(&id, vec![port(Protocol::Tcp, None, 80, 80)]);
        host.setup(&network, &pod).unwrap_or_else(|error| panic!("{what}: {error}"));
        let links = ip("-o link");
        let veth = links.lines().rev().find_map(|line| {
            let name = line.split(": ").nth(1)?.split('@').next()?;
            name.starts_with("lsv").then(|| name.to_owned())
        });
        damage(&veth.unwrap());
        host.teardown(&network, &id).unwrap_or_else(|error| panic!("{what}: {error}"));
        host.settled(3, 1);
    }
    let pod = host.sandbox("last", vec![port(Protocol::Tcp, None, 80, 80)]);
    let ips = host.setup(&network, &pod).unwrap();
    serve(&pod.netns, 80);
    call(Some(&host.outside()), "192.0.2.1:80").unwrap();
    call(None, &format!("{}:80", ips[0])).unwrap();
    host.teardown(&network, "last").unwrap();
    nft("add table inet other");
    host.collect(&network, &["base"]);
    let after = nft("list ruleset");
    assert!(after.contains("table inet other"), "{after}");
    assert_eq!(after.replace("table inet other {\n}\n", ""), before);
    assert!(ip("-o link").contains("veth77"));
}

/// What somebody does to a sandbox's link.
type Damage = fn(&str);

/// Where the victim of the next test works; it is run in a process of its own.
const VICTIM: &str = "LONGSHORE_TEST_VICTIM";

#[test]
#[ignore = "run by a_crash_at_any_moment_leaves_nothing"]
fn victim() {
    let Ok(folder) = std::env::var(VICTIM) else {
        return;
    };
    let folder = PathBuf::from(folder);
    let mut config = NetworkConfig::new(&folder);
    config.cni_conf_dir = folder.join("net.d");
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let _context = runtime.enter();
    let network = network::open(config).unwrap();
    for n in 0.. {
        let work = (0..3).map(|lane| {
            let id = format!("v{lane}-{n}");
            let mut pod = cri_shim::network::SandboxNetwork {
                netns: folder.join("ns").join(&id),
                id: id.clone(),
                port_mappings: vec![port(Protocol::Udp, None, 9000 + lane, 80)],
                ..Default::default()
            };
            if lane == 0 {
                pod.annotations
                    .insert("kubernetes.io/egress-bandwidth".to_owned(), "1M".to_owned());
            }
            let network = Arc::clone(&network);
            async move {
                netns::create(&pod.netns).unwrap();
                network.setup(&pod).await.unwrap();
                network.teardown(&id).await.unwrap();
                netns::delete(&pod.netns).unwrap();
            }
        });
        runtime.block_on(futures::future::join_all(work));
    }
}

#[test]
fn a_crash_at_any_moment_leaves_nothing() {
    let host = Host::new();
    let network = host.open();
    // What stays: the bridge, the table, and the sandbox that is kept.
    let kept = host.sandbox("kept", vec![port(Protocol::Tcp, None, 80, 80)]);
    let ips = host.setup(&network, &kept).unwrap();
    drop(network);
    let rules = || {
        let table = nft("list table inet longshore-pods");
        assert!(table.contains("hostports4"), "{table}");
        table
    };
    let (before, links) = (rules(), host.pod_links());
    let own = std::env::current_exe().unwrap();
    for round in 0u64..20 {
        let mut child = Command::new(&own)
            .args(["victim", "--exact", "--ignored", "--quiet"])
            .env(VICTIM, host.folder.path())
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::null())
            .spawn()
            .unwrap();
        // Spread over the steps of its work, once that has begun.
        let work = host.folder.path().join("ns/v0-0");
        eventually("the victim works", || work.exists());
        pause(Duration::from_micros(round * 3_700));
        assert!(child.try_wait().unwrap().is_none(), "it failed by itself");
        child.kill().unwrap();
        child.wait().unwrap();
        let network = host.open();
        host.collect(&network, &["kept"]);
        // Namespaces are their owner's; here, nobody's.
        for entry in fs::read_dir(host.folder.path().join("ns")).unwrap().flatten() {
            if entry.file_name() != "kept" {
                netns::delete(&entry.path()).unwrap();
            }
        }
        let now = ip("-o link");
        assert!(host.pod_links() == links && !now.contains(": lsi"), "round {round}: {now}");
        assert_eq!(host.records(), 1, "round {round}");
        assert_eq!(rules(), before, "round {round}");
        assert_eq!(host.setup(&network, &kept).unwrap(), ips, "round {round}");
    }
}

/// Runs iptables; what it prints.
fn iptables(args: &str) -> String {
    let output = Command::new("iptables").args(args.split_whitespace()).output().unwrap();
    assert!(output.status.success(), "{args}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn pods_pass_another_firewall_that_drops_what_is_forwarded() {
    let host = Host::new();
    // As Docker leaves it, with a rule of the operator's.
    iptables("-P FORWARD DROP");
    iptables("-A FORWARD -p tcp --dport 81 -j REJECT");
    nft("add table inet mine");
    nft("add chain inet mine forward { type filter hook forward priority 5 ; policy drop ; }");
    let network = host.open();
    let (a, b) =
        (host.sandbox("a", vec![port(Protocol::Tcp, None, 8080, 80)]), host.sandbox("b", vec![]));
    host.setup(&network, &a).unwrap();
    host.setup(&network, &b).unwrap();
    for port in [80, 81] {
        serve(&a.netns, port);
    }
    assert!(call(Some(&b.netns), "10.88.0.2:80").is_err(), "the operator's table is left alone");
    nft("delete table inet mine");
    call(Some(&b.netns), "10.88.0.2:80").unwrap();
    call(Some(&host.outside()), "192.0.2.1:8080").unwrap();
    assert!(call(Some(&b.netns), "10.88.0.2:81").is_err(), "what a rule refuses stays refused");
    let rules = iptables("-S FORWARD");
    for way in ["-i longshore0", "-o longshore0"] {
        assert!(rules.lines().any(|rule| rule.contains(way) && rule.contains("ACCEPT")), "{rules}");
    }
    // Once, however often the network is opened, and gone with it.
    drop(network);
    let network = host.open();
    host.collect(&network, &["a", "b"]);
    assert_eq!(iptables("-S FORWARD"), rules);
    let failures =
        host.runtime.block_on(network::cleanup("longshore0", &host.folder.path().join("none")));
    assert!(failures.is_empty(), "{failures:?}");
    assert!(!iptables("-S FORWARD").contains("longshore0"));
}
