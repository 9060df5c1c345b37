//! Pod networks in the real kernel, in network and mount namespaces of the test's own. Needs root.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test ends where something fails")]

use std::{
    fs::{self, File},
    io::{Read, Write},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
    time::Duration,
};

use cri_shim::network::{
    self, Network, NetworkConfig, NetworkError, PortMapping, Protocol, SandboxNetwork, netns,
};
use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, setns, unshare},
};

fn ip(args: &str) -> String {
    let output = Command::new("ip").args(args.split_whitespace()).output().unwrap();
    assert!(output.status.success(), "ip {args}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn nft(args: &str) -> String {
    let output = Command::new("nft").args(args.split_whitespace()).output().unwrap();
    String::from_utf8(output.stdout).unwrap()
}

/// Runs `work` in a namespace, in a thread of its own.
fn inside<T: Send + 'static>(ns: &Path, work: impl FnOnce() -> T + Send + 'static) -> T {
    let ns = File::open(ns).unwrap();
    std::thread::spawn(move || {
        setns(ns, CloneFlags::CLONE_NEWNET).unwrap();
        work()
    })
    .join()
    .unwrap()
}

/// A host in namespaces of the test's own, with a machine outside at 192.0.2.2 and 2001:db8::2.
struct Host {
    folder: tempfile::TempDir,
    runtime: tokio::runtime::Runtime,
}

impl Host {
    fn new() -> Self {
        unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS).expect("these tests need root");
        let none = None::<&str>;
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
        // /sys shows the network of the namespace it was mounted in.
        mount(Some("sysfs"), "/sys", Some("sysfs"), MsFlags::empty(), none).unwrap();
        ip("link set lo up");
        let folder = tempfile::tempdir().unwrap();
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .unwrap();
        let host = Self { folder, runtime };
        let outside = host.outside();
        netns::create(&outside).unwrap();
        ip(&format!("link add up0 type veth peer name out0 netns {}", outside.display()));
        ip("addr add 192.0.2.1/24 dev up0");
        ip("addr add 2001:db8::1/64 dev up0 nodad");
        ip("link set up0 up");
        inside(&outside, || {
            ip("addr add 192.0.2.2/24 dev out0");
            ip("addr add 2001:db8::2/64 dev out0 nodad");
            ip("link set out0 up");
        });
        host
    }

    fn outside(&self) -> PathBuf {
        self.folder.path().join("outside")
    }

    fn config(&self) -> NetworkConfig {
        let mut config = NetworkConfig::new(self.folder.path());
        config.cni_conf_dir = self.folder.path().join("net.d");
        config
    }

    fn open(&self) -> Arc<dyn Network> {
        let _context = self.runtime.enter();
        network::open(self.config()).unwrap()
    }

    fn sandbox(&self, id: &str, port_mappings: Vec<PortMapping>) -> SandboxNetwork {
        let path = self.folder.path().join("ns").join(id);
        netns::create(&path).unwrap();
        SandboxNetwork {
            id: id.to_owned(),
            netns: path,
            namespace: "default".to_owned(),
            name: format!("pod-{id}"),
            uid: "1-2-3".to_owned(),
            hostname: String::new(),
            port_mappings,
            annotations: Default::default(),
        }
    }

    fn setup(
        &self,
        network: &Arc<dyn Network>,
        sandbox: &SandboxNetwork,
    ) -> Result<Vec<IpAddr>, NetworkError> {
        self.runtime.block_on(network.setup(sandbox)).map(|result| result.ips)
    }

    /// Pods' links on the host.
    fn pod_links(&self) -> usize {
        ip("-o link")
            .lines()
            .filter(|line| line.contains(": lsv") || line.contains(": veth"))
            .count()
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        for folder in [self.folder.path().join("ns"), self.folder.path().to_owned()] {
            for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
                if netns::exists(&entry.path()) {
                    let _ = netns::delete(&entry.path());
                }
            }
        }
    }
}

fn port(protocol: Protocol, host_ip: Option<&str>, host_port: u16, container: u16) -> PortMapping {
    PortMapping {
        protocol,
        host_ip: host_ip.map(|ip| ip.parse().unwrap()),
        host_port,
        container_port: container,
    }
}

/// Serves TCP in `ns`: each client is told its own address as the server sees it.
fn serve(ns: &Path, port: u16) {
    let listeners: Vec<TcpListener> = inside(ns, move || {
        ["0.0.0.0", "[::]"]
            .iter()
            .filter_map(|ip| {
                if *ip == "[::]" {
                    // One socket takes both families.
                    TcpListener::bind(format!("[::]:{port}")).ok()
                } else {
                    None
                }
            })
            .collect()
    });
    for listener in listeners {
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let mut stream = stream;
                let peer = stream.peer_addr().unwrap().ip().to_canonical();
                let _ = write!(stream, "{peer}");
            }
        });
    }
}

fn call(ns: Option<&Path>, to: &str) -> Result<IpAddr, std::io::Error> {
    let to: SocketAddr = to.parse().unwrap();
    let ask = move || {
        let mut stream = TcpStream::connect_timeout(&to, Duration::from_secs(3))?;
        stream.set_read_timeout(Some(Duration::from_secs(3)))?;
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
        Ok(text.parse().unwrap())
    };
    match ns {
        Some(ns) => inside(ns, ask),
        None => ask(),
    }
}

#[test]
fn sandboxes_talk_to_each_other_the_host_and_outside() {
    let host = Host::new();
    let network = host.open();
    let (a, b) = (host.sandbox("a", vec![]), host.sandbox("b", vec![]));
    let (ips_a, ips_b) = (host.setup(&network, &a).unwrap(), host.setup(&network, &b).unwrap());
    assert_eq!(ips_a, ["10.88.0.2".parse::<IpAddr>().unwrap(), "fd00:10:88::2".parse().unwrap()]);
    assert_eq!(ips_b[0], "10.88.0.3".parse::<IpAddr>().unwrap());
    assert_eq!(host.setup(&network, &a).unwrap(), ips_a, "setup is idempotent");
    network.status().unwrap();
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
    assert_eq!(host.pod_links(), 0, "{}", ip("-o link"));
    assert!(fs::read_dir(host.folder.path().join("network/sandboxes")).unwrap().next().is_none());
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
    assert_eq!(host.pod_links(), 0);
    let started = std::time::Instant::now();
    for n in 0..20 {
        let sandbox = host.sandbox(&format!("t{n}"), vec![port(Protocol::Tcp, None, 9000 + n, 80)]);
        host.setup(&network, &sandbox).unwrap();
    }
    println!("one by one, with netns and a host port: {:?} each", started.elapsed() / 20);
}

#[test]
fn cni_plugins_connect_and_disconnect() {
    let host = Host::new();
    let config = host.config();
    fs::create_dir_all(&config.cni_conf_dir).unwrap();
    let network = host.open();
    // Nothing there: the built-in network. Something unusable: not ready.
    network.status().unwrap();
    let file = config.cni_conf_dir.join("10-test.conflist");
    fs::write(&file, "{").unwrap();
    assert!(network.status().unwrap_err().contains("10-test.conflist"));
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
    network.status().unwrap();
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
        host.runtime.block_on(network.teardown(id)).unwrap();
    }
    let left: Vec<_> = fs::read_dir(data.join("test"))
        .unwrap()
        .filter_map(|entry| entry.unwrap().file_name().into_string().ok())
        .filter(|name| name.starts_with("10."))
        .collect();
    assert!(left.is_empty(), "{left:?}");
    assert_eq!(host.pod_links(), 0, "{}", ip("-o link"));
    assert!(fs::read_dir(host.folder.path().join("network/sandboxes")).unwrap().next().is_none());
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
    fs::set_permissions(&plugin, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let mut config = config;
    config.cni_bin_dirs = vec![bin];
    let network = {
        let _context = host.runtime.enter();
        network::open(config.clone()).unwrap()
    };
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
