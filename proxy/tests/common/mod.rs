//! A node with two pods and a client outside, as network namespaces of the test's own, and the
//! proxy running on the node.
#![allow(dead_code, reason = "each test binary uses a part")]
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]

use std::fs::File;
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::process::Command;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, setns, unshare};
use proxy::object::{
    Change, Endpoint, EndpointPort, EndpointSlice, NamespacedName, NodeState, Protocol, Service,
    ServicePort, TrafficPolicy,
};
use proxy::{Config, Mode, Proxy, ProxyStatus};
use tokio::sync::{mpsc, watch};

/// A network namespace, kept by a descriptor.
pub struct Namespace(File);

impl Namespace {
    fn current() -> Self {
        Namespace(File::open("/proc/thread-self/ns/net").expect("own namespace"))
    }

    fn new() -> Self {
        std::thread::spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).expect("root is needed: a network namespace");
            sh(NO_DAD);
            Namespace::current()
        })
        .join()
        .expect("namespace thread")
    }

    /// Runs something in the namespace.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        std::thread::scope(|scope| {
            scope
                .spawn(|| {
                    setns(&self.0, CloneFlags::CLONE_NEWNET).expect("enter namespace");
                    work()
                })
                .join()
                .expect("work in a namespace")
        })
    }

    pub fn sh(&self, script: &str) -> String {
        self.run(|| sh(script))
    }
}

pub fn sh(script: &str) -> String {
    let out = Command::new("sh").args(["-ec", script]).output().expect("sh");
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    assert!(out.status.success(), "{script}\n{text}{}", String::from_utf8_lossy(&out.stderr));
    text
}

pub struct Net {
    pub node: Namespace,
    pub pods: Vec<Namespace>,
    pub client: Namespace,
}

pub const CLIENT: [&str; 2] = ["192.168.50.2", "fd50::2"];
pub const NODE: [&str; 2] = ["192.168.50.1", "fd50::1"];

pub fn pod_ip(pod: usize, v6: bool) -> IpAddr {
    let text = if v6 { format!("fd88::{}", pod + 2) } else { format!("10.88.0.{}", pod + 2) };
    text.parse().expect("address")
}

/// Link-local addresses are usable at once: neighbours are asked from them.
const NO_DAD: &str = "sysctl -qw net.ipv6.conf.default.accept_dad=0 net.ipv6.conf.all.accept_dad=0";

impl Net {
    /// Makes the namespaces; the calling thread is on the node afterwards.
    pub fn new(pods: usize) -> Net {
        unshare(CloneFlags::CLONE_NEWNET).expect("root is needed: a network namespace");
        let node = Namespace::current();
        sh(NO_DAD);
        sh("ip link set lo up; sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1");
        let net = Net {
            node,
            pods: (0..pods).map(|_| Namespace::new()).collect(),
            client: Namespace::new(),
        };
        for (index, pod) in net.pods.iter().enumerate() {
            let (v4, v6) = (pod_ip(index, false), pod_ip(index, true));
            link(pod, &format!("pod{index}"));
            sh(&format!(
                "ip addr add 10.88.0.1/32 dev pod{index}; ip route add {v4}/32 dev pod{index}
                 ip -6 addr add fd88::1/128 dev pod{index} nodad; ip -6 route add {v6}/128 dev pod{index}"
            ));
            pod.sh(&format!(
                "ip link set lo up; ip link set eth0 up
                 ip addr add {v4}/32 dev eth0; ip route add 10.88.0.1 dev eth0; ip route add default via 10.88.0.1
                 ip -6 addr add {v6}/128 dev eth0 nodad; ip -6 route add fd88::1 dev eth0; ip -6 route add default via fd88::1"
            ));
        }
        link(&net.client, "outside");
        sh("# A redirect would use up the budget of the ICMP errors that the test waits for.
            sysctl -qw net.ipv4.conf.all.send_redirects=0 net.ipv4.conf.outside.send_redirects=0
            ip addr add 192.168.50.1/24 dev outside; ip -6 addr add fd50::1/64 dev outside nodad
            ip route add default via 192.168.50.2; ip -6 route add default via fd50::2");
        net.client.sh("ip link set lo up; ip link set eth0 up
             ip addr add 192.168.50.2/24 dev eth0; ip -6 addr add fd50::2/64 dev eth0 nodad
             ip route add default via 192.168.50.1; ip -6 route add default via fd50::1");
        net
    }
}

/// Joins the node and a namespace: `name` here, `eth0` there.
fn link(there: &Namespace, name: &str) {
    let fd = std::os::fd::AsRawFd::as_raw_fd(&there.0);
    let pid = std::process::id();
    sh(&format!(
        "ip link add {name} type veth peer name eth0 netns /proc/{pid}/fd/{fd}; ip link set {name} up"
    ));
}

/// Serves TCP and UDP on both families: every answer is "<name> <peer address>".
pub fn serve(pod: &Namespace, name: &'static str, port: u16) {
    pod.run(|| {
        let listener = TcpListener::bind(("::", port)).expect("listen");
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                std::thread::spawn(move || answer(stream, name));
            }
        });
        let socket = UdpSocket::bind(("::", port)).expect("bind");
        std::thread::spawn(move || {
            let mut buffer = [0; 64];
            while let Ok((_, from)) = socket.recv_from(&mut buffer) {
                let _ = socket.send_to(format!("{name} {}", plain(from)).as_bytes(), from);
            }
        });
    });
}

fn plain(address: SocketAddr) -> IpAddr {
    address.ip().to_canonical()
}

/// Answers once per byte it is sent, so that a connection can be kept and tried again.
fn answer(mut stream: TcpStream, name: &str) {
    let Ok(from) = stream.peer_addr() else { return };
    let mut byte = [0];
    while let Ok(1) = stream.read(&mut byte) {
        if stream.write_all(format!("{name} {}\n", plain(from)).as_bytes()).is_err() {
            return;
        }
    }
}

pub fn ask_stream(stream: &mut TcpStream) -> Result<String, String> {
    stream.set_read_timeout(Some(Duration::from_secs(3))).map_err(|e| e.to_string())?;
    stream.write_all(b"?").map_err(|e| e.to_string())?;
    let mut line = Vec::new();
    let mut byte = [0];
    loop {
        match stream.read(&mut byte).map_err(|e| e.to_string())? {
            0 => return Err("closed".into()),
            _ if byte[0] == b'\n' => return Ok(String::from_utf8_lossy(&line).into_owned()),
            _ => line.push(byte[0]),
        }
    }
}

/// Connects, asks once.
pub fn ask_tcp(to: SocketAddr) -> Result<String, String> {
    let mut stream = TcpStream::connect_timeout(&to, Duration::from_secs(2))
        .map_err(|e| e.kind().to_string())?;
    ask_stream(&mut stream)
}

/// Asks by a datagram from a new port.
pub fn ask_udp(to: SocketAddr) -> Result<String, String> {
    let any: IpAddr = if to.is_ipv4() { [0; 4].into() } else { [0; 16].into() };
    ask_datagram(&UdpSocket::bind((any, 0)).map_err(|e| e.to_string())?, to)
}

/// Asks by a datagram from a socket.
pub fn ask_datagram(socket: &UdpSocket, to: SocketAddr) -> Result<String, String> {
    socket.set_read_timeout(Some(Duration::from_millis(1000))).map_err(|e| e.to_string())?;
    socket.connect(to).map_err(|e| e.to_string())?;
    socket.send(b"?").map_err(|e| e.kind().to_string())?;
    let mut buffer = [0; 100];
    let len = socket.recv(&mut buffer).map_err(|e| e.kind().to_string())?;
    Ok(String::from_utf8_lossy(&buffer[..len]).into_owned())
}

/// Tries until it holds, for 20 seconds.
pub fn eventually<T: std::fmt::Debug>(
    what: &str,
    mut look: impl FnMut() -> T,
    holds: impl Fn(&T) -> bool,
) -> T {
    // Longer than any wait within the proxy but that for the periodic look.
    let end = Instant::now() + Duration::from_secs(20);
    loop {
        let seen = look();
        if holds(&seen) {
            return seen;
        }
        assert!(Instant::now() < end, "{what}: still {seen:?}");
        std::thread::park_timeout(Duration::from_millis(20));
    }
}

/// The proxy on the node, in a thread of its own.
pub struct Running {
    pub changes: mpsc::Sender<Change>,
    pub status: watch::Receiver<ProxyStatus>,
    pub asker: proxy::question::Asker,
    shutdown: watch::Sender<bool>,
    thread: Option<JoinHandle<Result<(), proxy::Error>>>,
}

pub fn config(mode: Mode) -> Config {
    Config {
        mode,
        node_name: "node".into(),
        cluster_cidrs: vec!["10.88.0.0/16".parse().unwrap(), "fd88::/64".parse().unwrap()],
        ..Config::default()
    }
}

impl Running {
    pub fn start(config: Config) -> Running {
        let (changes, receiver) = mpsc::channel(1024);
        let (shutdown, stop) = watch::channel(false);
        let proxy = Proxy::new(config);
        let (status, asker) = (proxy.status(), proxy.asker());
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .expect("runtime");
            runtime.block_on(proxy.run(receiver, stop))
        });
        Running { changes, status, asker, shutdown, thread: Some(thread) }
    }

    pub fn send(&self, change: Change) {
        self.changes.blocking_send(change).expect("the proxy runs");
    }

    /// Waits until the kernel has everything that was sent.
    pub fn settle(&mut self) {
        let begin = jiff::Timestamp::now();
        self.send(Change::SourceError(Some(begin.to_string())));
        let status = self.status.clone();
        eventually(
            "the kernel has it",
            || status.borrow().clone(),
            |s| {
                s.source_error == Some(begin.to_string()) && s.pending == 0 && s.last_sync.is_some()
            },
        );
    }

    /// Waits until a backend has been chosen, before anything is synced.
    pub fn settle_unsynced(&mut self) {
        let status = self.status.clone();
        eventually("a mode", || status.borrow().mode, |mode| *mode != Mode::Auto);
    }

    /// Waits for its own end.
    pub fn end(mut self) -> Result<(), proxy::Error> {
        self.thread.take().expect("it runs").join().expect("proxy thread")
    }

    pub fn stop(mut self) {
        let _ = self.shutdown.send(true);
        if let Some(thread) = self.thread.take() {
            thread.join().expect("proxy thread").expect("proxy");
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.shutdown.send(true);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

pub fn name(name: &str) -> NamespacedName {
    NamespacedName { namespace: "default".into(), name: name.into() }
}

/// A dual-stack Service `number`: cluster IPs 10.96.0.n and fd96::n, ports "http" 80/TCP and
/// "dns" 53/UDP.
pub fn service(number: u16) -> Service {
    let n = number.to_be_bytes();
    Service {
        key: name(&format!("svc{number}")),
        cluster_ips: vec![
            IpAddr::from([10, 96, n[0], n[1]]),
            format!("fd96::{number:x}").parse().unwrap(),
        ],
        external_ips: vec![],
        load_balancer_ips: vec![],
        load_balancer_source_ranges: vec![],
        ports: vec![
            ServicePort { name: "http".into(), protocol: Protocol::Tcp, port: 80, node_port: 0 },
            ServicePort { name: "dns".into(), protocol: Protocol::Udp, port: 53, node_port: 0 },
        ],
        session_affinity: None,
        internal_traffic_policy: TrafficPolicy::Cluster,
        external_traffic_policy: TrafficPolicy::Cluster,
        health_check_node_port: 0,
    }
}

pub fn endpoint(address: IpAddr) -> Endpoint {
    Endpoint {
        address,
        ready: true,
        serving: true,
        terminating: false,
        local: true,
        zones: vec![],
        node_hint: Default::default(),
    }
}

/// A slice of a Service for one family with these pods at port 8080.
pub fn slice(number: u16, v6: bool, pods: &[usize]) -> EndpointSlice {
    let port = |name: &str, protocol| EndpointPort { name: name.into(), protocol, port: 8080 };
    let family = if v6 { "v6" } else { "v4" };
    EndpointSlice {
        key: name(&format!("svc{number}-{family}")),
        service: Arc::from(format!("svc{number}")),
        ports: vec![port("http", Protocol::Tcp), port("dns", Protocol::Udp)],
        endpoints: pods.iter().map(|pod| endpoint(pod_ip(*pod, v6))).collect(),
        triggered: None,
    }
}

pub fn slices(number: u16, pods: &[usize]) -> [Change; 2] {
    [false, true].map(|v6| Change::Slice(slice(number, v6, pods)))
}

pub fn node_state() -> NodeState {
    NodeState {
        known: true,
        addresses: NODE.iter().map(|a| a.parse().unwrap()).collect(),
        ..NodeState::default()
    }
}

pub fn at(address: &str, port: u16) -> SocketAddr {
    SocketAddr::new(address.parse().expect("address"), port)
}

pub fn vip(service: &Service, v6: bool, port: u16) -> SocketAddr {
    SocketAddr::new(service.cluster_ips[usize::from(v6)], port)
}
