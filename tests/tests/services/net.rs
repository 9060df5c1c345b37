//! A node with three pods, and a client outside that is also a pod of another node: network
//! namespaces of the test's own.

use std::fs::File;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::os::fd::AsRawFd;
use std::process::Command;
use std::sync::atomic::AtomicU16;
use std::thread::JoinHandle;
use std::time::Duration;

use nix::sched::{CloneFlags, setns, unshare};
use tokio::io::AsyncWriteExt;
use tokio::net::{TcpListener, UdpSocket};
use tokio::sync::watch;

use crate::sctp::Sctp;

/// Names of the pods, which they answer with.
pub const PODS: [&str; 3] = ["a", "b", "c"];
/// Ports that every pod serves, by TCP, UDP and SCTP; the last ones are for the marker.
pub const PORTS: [u16; 7] = [8080, 8081, 8443, 9000, 9001, 9002, 9003];
/// Addresses of the node: those of its object first.
pub const NODE: [&str; 4] = ["192.168.50.1", "fd50::1", "10.88.0.1", "fd88::1"];
/// Addresses outside.
const CLIENT: [&str; 6] =
    ["192.168.50.2", "fd50::2", "10.96.200.200", "fd96::c8c8", "10.88.1.9", "fd88:0:0:1::9"];

/// A network namespace, kept by a descriptor.
pub struct Namespace(File);

impl Namespace {
    fn current() -> Self {
        Namespace(File::open("/proc/thread-self/ns/net").expect("own namespace"))
    }

    fn new() -> Self {
        let make = || {
            unshare(CloneFlags::CLONE_NEWNET).expect("root is needed: a network namespace");
            sh("sysctl -qw net.ipv6.conf.default.accept_dad=0 net.ipv6.conf.all.accept_dad=0
                sysctl -qw net.ipv4.icmp_ratelimit=0 net.ipv6.icmp.ratelimit=0
                sysctl -qw net.ipv4.icmp_msgs_per_sec=100000 net.ipv4.icmp_msgs_burst=10000 2>/dev/null || true
                ip link set lo up");
            Namespace::current()
        };
        std::thread::spawn(make).join().expect("namespace thread")
    }

    /// Puts the calling thread into it.
    pub fn enter(&self) {
        setns(&self.0, CloneFlags::CLONE_NEWNET).expect("enter namespace");
    }

    /// Runs something in it.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        let there = || {
            self.enter();
            work()
        };
        std::thread::scope(|scope| scope.spawn(there).join().expect("work in a namespace"))
    }
}

/// Runs a script, which must succeed.
pub fn sh(script: &str) -> String {
    let out = Command::new("sh").args(["-ec", script]).output().expect("sh");
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    assert!(out.status.success(), "{script}\n{text}{}", String::from_utf8_lossy(&out.stderr));
    text
}

/// Where packets come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Place {
    /// The first pod, which may be an endpoint itself.
    Pod,
    /// The node.
    Node,
    /// A pod of another node: in the cluster's range, but from the outside interface.
    FarPod,
    /// A client that is no pod.
    Client,
}

impl Place {
    /// All of them.
    pub const ALL: [Place; 4] = [Place::Pod, Place::Node, Place::FarPod, Place::Client];

    /// The address to come from, where it is not the usual one.
    pub fn source(self, ipv4: bool) -> Option<IpAddr> {
        let text = if ipv4 { "10.88.1.9" } else { "fd88:0:0:1::9" };
        (self == Place::FarPod).then(|| text.parse().expect("address"))
    }
}

/// The namespaces of one node.
pub struct Net {
    /// The node.
    pub node: Namespace,
    /// Its pods.
    pub pods: Vec<Namespace>,
    /// The outside.
    pub client: Namespace,
    /// SCTP in the pods, the node and outside.
    sctp: Vec<Sctp>,
    /// Ports that datagrams were not sent from yet: a port that had been used before would be a flow
    /// that goes on as it was.
    pub fresh: AtomicU16,
    end: watch::Sender<bool>,
    servers: Vec<JoinHandle<()>>,
}

/// The address of a pod.
pub fn pod_ip(pod: usize, ipv4: bool) -> IpAddr {
    let text = if ipv4 { format!("10.88.0.{}", pod + 2) } else { format!("fd88::{}", pod + 2) };
    text.parse().expect("address")
}

impl Net {
    /// Makes it; the pods serve.
    pub fn new() -> Net {
        let node = Namespace::new();
        let pods: Vec<Namespace> = PODS.iter().map(|_| Namespace::new()).collect();
        let client = Namespace::new();
        node.run(|| {
            sh("sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1
                sysctl -qw net.ipv4.conf.all.send_redirects=0 net.ipv4.conf.default.send_redirects=0");
            for (index, pod) in pods.iter().enumerate() {
                link(pod, &format!("pod{index}"));
                let (v4, v6) = (pod_ip(index, true), pod_ip(index, false));
                sh(&format!(
                    "ip addr add 10.88.0.1/32 dev pod{index}; ip route add {v4}/32 dev pod{index}
                     ip -6 addr add fd88::1/128 dev pod{index} nodad
                     ip -6 route add {v6}/128 dev pod{index}"
                ));
            }
            link(&client, "outside");
            sh("ip addr add 192.168.50.1/24 dev outside; ip -6 addr add fd50::1/64 dev outside nodad
                ip route add 10.88.1.0/24 via 192.168.50.2
                ip -6 route add fd88:0:0:1::/64 via fd50::2
                ip route add default via 192.168.50.2; ip -6 route add default via fd50::2");
        });
        for (index, pod) in pods.iter().enumerate() {
            let (v4, v6) = (pod_ip(index, true), pod_ip(index, false));
            let up = format!(
                "ip link set eth0 up
                 ip addr add {v4}/32 dev eth0; ip route add 10.88.0.1 dev eth0
                 ip route add default via 10.88.0.1
                 ip -6 addr add {v6}/128 dev eth0 nodad; ip -6 route add fd88::1 dev eth0
                 ip -6 route add default via fd88::1"
            );
            pod.run(|| sh(&up));
        }
        client.run(|| {
            sh("ip link set eth0 up
                ip addr add 192.168.50.2/24 dev eth0; ip -6 addr add fd50::2/64 dev eth0 nodad
                # Who gets through to a cluster IP that no Service has is refused here.
                ip addr add 10.96.200.200/32 dev lo; ip -6 addr add fd96::c8c8/128 dev lo nodad
                ip addr add 10.88.1.9/32 dev lo; ip -6 addr add fd88:0:0:1::9/128 dev lo nodad
                ip route add default via 192.168.50.1; ip -6 route add default via fd50::1");
        });
        let end = watch::Sender::new(false);
        let mut servers: Vec<_> =
            pods.iter().zip(PODS).map(|(pod, name)| serve(pod, name, end.subscribe())).collect();
        let parse = |all: &[&str]| all.iter().map(|ip| ip.parse().expect("address")).collect();
        let mut hosts: Vec<(&Namespace, Vec<IpAddr>, _)> = pods
            .iter()
            .enumerate()
            .map(|(pod, at)| (at, [true, false].map(|v4| pod_ip(pod, v4)).into(), Some(PODS[pod])))
            .collect();
        hosts.push((&node, parse(&[&NODE[..], &["127.0.0.1", "::1"]].concat()), None));
        hosts.push((&client, parse(&CLIENT), None));
        let started = hosts.into_iter().map(|(at, ips, name)| {
            let (sctp, thread) = Sctp::start(at, ips, name, end.subscribe());
            servers.push(thread);
            sctp
        });
        let sctp = started.collect();
        Net { node, pods, client, sctp, fresh: AtomicU16::new(10_000), end, servers }
    }

    /// SCTP of a place.
    pub fn sctp(&self, place: Place) -> &Sctp {
        match place {
            Place::Pod => &self.sctp[0],
            Place::Node => &self.sctp[PODS.len()],
            Place::FarPod | Place::Client => &self.sctp[PODS.len() + 1],
        }
    }

    /// The namespace of a place.
    pub fn at(&self, place: Place) -> &Namespace {
        match place {
            Place::Pod => &self.pods[0],
            Place::Node => &self.node,
            Place::FarPod | Place::Client => &self.client,
        }
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        self.end.send_replace(true);
        self.servers.drain(..).for_each(|server| drop(server.join()));
    }
}

/// Joins the namespace of the calling thread and another: `name` here, `eth0` there.
fn link(there: &Namespace, name: &str) {
    let (pid, fd) = (std::process::id(), there.0.as_raw_fd());
    sh(&format!(
        "ip link add {name} type veth peer name eth0 netns /proc/{pid}/fd/{fd}; ip link set {name} up"
    ));
}

/// A runtime for the calling thread.
pub fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime")
}

/// Every answer is "<name>:<port> <the client's address>".
fn serve(pod: &Namespace, name: &'static str, mut end: watch::Receiver<bool>) -> JoinHandle<()> {
    let fd = Namespace(pod.0.try_clone().expect("descriptor"));
    let (ready, waiting) = std::sync::mpsc::channel();
    let work = move || {
        fd.enter();
        runtime().block_on(async move {
            for port in PORTS {
                let any = SocketAddr::from((Ipv6Addr::UNSPECIFIED, port));
                let listener = TcpListener::bind(any).await.expect("listen");
                let socket = UdpSocket::bind(any).await.expect("bind");
                let answer = move |from: SocketAddr| {
                    format!("{name}:{port} {}", from.ip().to_canonical()).into_bytes()
                };
                tokio::spawn(async move {
                    while let Ok((mut stream, from)) = listener.accept().await {
                        tokio::spawn(async move {
                            let _ = stream.write_all(&answer(from)).await;
                            let _ = stream.shutdown().await;
                            // The client's end comes first, lest it wait in TIME_WAIT.
                            let wait = Duration::from_secs(2);
                            let _ = tokio::time::timeout(wait, stream.readable()).await;
                        });
                    }
                });
                tokio::spawn(async move {
                    let mut buffer = [0; 64];
                    while let Ok((_, from)) = socket.recv_from(&mut buffer).await {
                        let _ = socket.send_to(&answer(from), from).await;
                    }
                });
            }
            let _ = ready.send(());
            let _ = end.wait_for(|end| *end).await;
        });
    };
    let thread = std::thread::spawn(work);
    waiting.recv().expect("the pod serves");
    thread
}
