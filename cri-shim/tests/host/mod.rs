//! A host in network and mount namespaces of the test's own. Needs root.

#![allow(dead_code, reason = "each test binary uses its part of it")]
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test ends where something fails")]

use std::{
    fs::{self, File},
    io::{Read, Write},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream},
    os::fd::{AsRawFd, OwnedFd},
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
    time::{Duration, Instant},
};

use cri_shim::network::{
    self, Network, NetworkConfig, NetworkError, PortMapping, Protocol, SandboxNetwork, netns,
};
use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, setns, unshare},
    sys::{
        socket::{
            AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrStorage, recv,
            sendto, setsockopt, socket, sockopt,
        },
        time::TimeVal,
    },
};

pub fn ip(args: &str) -> String {
    let output = Command::new("ip").args(args.split_whitespace()).output().unwrap();
    assert!(output.status.success(), "ip {args}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

pub fn nft(args: &str) -> String {
    let output = Command::new("nft").args(args.split_whitespace()).output().unwrap();
    String::from_utf8(output.stdout).unwrap()
}

/// Runs `work` in a namespace, in a thread of its own.
pub fn inside<T: Send + 'static>(ns: &Path, work: impl FnOnce() -> T + Send + 'static) -> T {
    let ns = File::open(ns).unwrap();
    std::thread::spawn(move || {
        setns(ns, CloneFlags::CLONE_NEWNET).unwrap();
        work()
    })
    .join()
    .unwrap()
}

/// A host in namespaces of the test's own, with a machine outside at 192.0.2.2 and 2001:db8::2.
pub struct Host {
    pub folder: tempfile::TempDir,
    pub runtime: tokio::runtime::Runtime,
}

impl Host {
    pub fn new() -> Self {
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

    pub fn outside(&self) -> PathBuf {
        self.folder.path().join("outside")
    }

    pub fn config(&self) -> NetworkConfig {
        let mut config = NetworkConfig::new(self.folder.path());
        config.cni_conf_dir = self.folder.path().join("net.d");
        config.retry_after = Duration::from_millis(100);
        config
    }

    pub fn open_with(&self, config: NetworkConfig) -> Arc<dyn Network> {
        let _context = self.runtime.enter();
        network::open(config).unwrap()
    }

    pub fn open(&self) -> Arc<dyn Network> {
        self.open_with(self.config())
    }

    pub fn sandbox(&self, id: &str, port_mappings: Vec<PortMapping>) -> SandboxNetwork {
        let path = self.folder.path().join("ns").join(id);
        netns::create(&path).unwrap();
        SandboxNetwork {
            id: id.to_owned(),
            netns: path,
            namespace: "default".to_owned(),
            name: format!("pod-{id}"),
            uid: "1-2-3".to_owned(),
            port_mappings,
            ..SandboxNetwork::default()
        }
    }

    pub fn setup(
        &self,
        network: &Arc<dyn Network>,
        sandbox: &SandboxNetwork,
    ) -> Result<Vec<IpAddr>, NetworkError> {
        self.runtime.block_on(network.setup(sandbox)).map(|result| result.ips)
    }

    pub fn teardown(&self, network: &Arc<dyn Network>, id: &str) -> Result<(), NetworkError> {
        self.runtime.block_on(network.teardown(id))
    }

    pub fn collect(&self, network: &Arc<dyn Network>, keep: &[&str]) {
        let keep: Vec<_> = keep.iter().map(|id| (*id).to_owned()).collect();
        self.runtime.block_on(network.collect(&keep)).unwrap();
    }

    /// Records of sandboxes.
    pub fn records(&self) -> usize {
        let folder = fs::read_dir(self.folder.path().join("network/sandboxes"));
        folder.into_iter().flatten().count()
    }

    /// Waits until the built-in network is rid of what was torn down.
    pub fn settled(&self, links: usize, records: usize) {
        eventually("what was torn down is gone", || {
            self.pod_links() == links && self.records() == records
        });
    }

    pub fn status(&self, network: &Arc<dyn Network>) -> Result<(), String> {
        self.runtime.block_on(network.status())
    }

    /// Pods' links on the host.
    pub fn pod_links(&self) -> usize {
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

pub fn port(
    protocol: Protocol,
    host_ip: Option<&str>,
    host_port: u16,
    container: u16,
) -> PortMapping {
    PortMapping {
        protocol,
        host_ip: host_ip.map(|ip| ip.parse().unwrap()),
        host_port,
        container_port: container,
    }
}

/// Serves TCP in `ns`: each client is told its own address as the server sees it.
pub fn serve(ns: &Path, port: u16) {
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

pub fn call(ns: Option<&Path>, to: &str) -> Result<IpAddr, std::io::Error> {
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

/// Waits until something is so, long enough for a machine under load.
pub fn eventually(what: &str, is_so: impl Fn() -> bool) {
    let started = Instant::now();
    while !is_so() {
        assert!(started.elapsed() < Duration::from_secs(30), "never: {what}");
        pause(Duration::from_millis(20));
    }
}

/// Waits.
#[allow(clippy::disallowed_methods, reason = "a test's own thread")]
pub fn pause(time: Duration) {
    std::thread::sleep(time);
}

/// Sends `bytes` bytes from `from` to a server in `to` at `address`; how long that took until all had come.
pub fn transfer(from: Option<&Path>, to: &Path, address: &str, bytes: usize) -> Duration {
    let address: SocketAddr = address.parse().unwrap();
    let listener = inside(to, move || TcpListener::bind(("::", address.port())).unwrap());
    let server = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut buffer = vec![0; 64 << 10];
        let mut got = 0;
        while got < bytes {
            got += match stream.read(&mut buffer).unwrap() {
                0 => break,
                read => read,
            };
        }
        got
    });
    let send = move || {
        let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(10)).unwrap();
        let chunk = vec![7; 16 << 10];
        let started = Instant::now();
        for _ in 0..bytes.div_ceil(chunk.len()) {
            if stream.write_all(&chunk).is_err() {
                break;
            }
        }
        started
    };
    let started = match from {
        Some(ns) => inside(ns, send),
        None => send(),
    };
    assert!(server.join().unwrap() >= bytes);
    started.elapsed()
}

/// An SCTP client and server by hand, as kernels come without SCTP: one packet with a chunk INIT.
pub struct Sctp {
    socket: OwnedFd,
    to: SocketAddr,
    packet: Vec<u8>,
}

/// A client at `from`.
pub fn sctp(from: &str, to: &str) -> Sctp {
    let (from, to): (SocketAddr, SocketAddr) = (from.parse().unwrap(), to.parse().unwrap());
    let mut packet = Vec::new();
    packet.extend(from.port().to_be_bytes());
    packet.extend(to.port().to_be_bytes());
    packet.extend([0; 8]);
    // INIT: its length, a tag, a window, one stream each way, a first number.
    packet.extend([1, 0, 0, 20, 0, 0, 0, 7, 0, 1, 0, 0, 0, 1, 0, 1, 0, 0, 0, 1]);
    let checksum = crc32c(&packet);
    packet[8..12].copy_from_slice(&checksum.to_le_bytes());
    Sctp { socket: raw_sctp(to.is_ipv4()), to, packet }
}

impl Sctp {
    pub fn send(&self) {
        let mut to = self.to;
        to.set_port(0);
        let sent = sendto(
            self.socket.as_raw_fd(),
            &self.packet,
            &SockaddrStorage::from(to),
            MsgFlags::empty(),
        );
        assert_eq!(sent.unwrap(), self.packet.len());
    }
}

/// What comes to a namespace by SCTP over IPv4.
pub struct SctpServer(OwnedFd);

pub fn sctp_server() -> SctpServer {
    let socket = raw_sctp(true);
    setsockopt(&socket, sockopt::ReceiveTimeout, &TimeVal::new(10, 0)).unwrap();
    SctpServer(socket)
}

impl SctpServer {
    /// The port of the next packet.
    pub fn next(&self) -> u16 {
        let mut buffer = [0; 256];
        recv(self.0.as_raw_fd(), &mut buffer, MsgFlags::empty()).expect("no packet came");
        let header = usize::from(buffer[0] & 15) * 4;
        u16::from_be_bytes([buffer[header + 2], buffer[header + 3]])
    }
}

fn raw_sctp(ipv4: bool) -> OwnedFd {
    let family = if ipv4 { AddressFamily::Inet } else { AddressFamily::Inet6 };
    socket(family, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::Sctp).unwrap()
}

fn crc32c(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0u32, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| {
            (crc >> 1) ^ if crc & 1 == 1 { 0x82f6_3b78 } else { 0 }
        })
    })
}
