//! SCTP as far as the answer to its first packet, by raw sockets: kernels for containers often lack
//! SCTP itself (`CONFIG_IP_SCTP`), while conntrack and NAT, which decide a packet's fate, have it.
//!
//! Every namespace has one of these. It answers as a host does: INIT ACK from a port that is served,
//! ABORT from any other; and it asks, telling the answers apart by the port that it asked from. The
//! packets are those of RFC 9260, section 3.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::UdpSocket;
use tokio::sync::{oneshot, watch};

use crate::net::{Namespace, PORTS, runtime};

const SCTP: i32 = 132;
const INIT: u8 = 1;
const INIT_ACK: u8 = 2;
const ABORT: u8 = 6;
/// The parameter of an INIT ACK that the other side keeps: here it holds the answer.
const STATE_COOKIE: [u8; 2] = [0, 7];
/// A packet may be lost; the first one comes again after this.
const AGAIN: Duration = Duration::from_millis(500);

/// What was heard of a packet.
#[derive(Debug)]
pub enum Heard {
    /// The answer.
    Answer(String),
    /// An ABORT or an ICMP error.
    Refused,
}

/// Asks, and answers if it has a name.
pub struct Sctp {
    shared: Arc<Shared>,
    /// By family, without an address of its own: the kernel chooses one.
    any: [std::net::UdpSocket; 2],
    /// Those with an address.
    own: Vec<(IpAddr, std::net::UdpSocket)>,
}

#[derive(Default)]
struct Shared {
    waiting: Mutex<HashMap<u16, oneshot::Sender<Heard>>>,
}

impl Shared {
    fn heard(&self, port: u16, heard: Heard) {
        let waiting = self.waiting.lock().expect("lock").remove(&port);
        drop(waiting.map(|waiting| waiting.send(heard)));
    }
}

/// A raw socket, with the calls of a UDP socket.
fn raw(ipv4: bool, protocol: Protocol, address: Option<IpAddr>) -> std::net::UdpSocket {
    let domain = if ipv4 { Domain::IPV4 } else { Domain::IPV6 };
    let socket = Socket::new(domain, Type::RAW, Some(protocol)).expect("raw socket");
    if let Some(address) = address {
        socket.bind(&SocketAddr::new(address, 0).into()).expect("bind a raw socket");
    }
    socket.set_nonblocking(true).expect("nonblocking");
    socket.into()
}

/// CRC32c, bit by bit.
fn crc32c(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| {
            if crc & 1 == 1 { crc >> 1 ^ 0x82f6_3b78 } else { crc >> 1 }
        })
    })
}

/// A packet of one chunk.
fn packet(ports: [u16; 2], tag: u32, kind: u8, value: &[u8]) -> Vec<u8> {
    let mut packet = Vec::new();
    packet.extend(ports.iter().flat_map(|port| port.to_be_bytes()));
    packet.extend(tag.to_be_bytes());
    packet.extend([0; 4]);
    packet.extend([kind, 0]);
    packet.extend((value.len() as u16 + 4).to_be_bytes());
    packet.extend(value);
    packet.resize(packet.len().next_multiple_of(4), 0);
    let sum = crc32c(&packet).to_le_bytes();
    packet[8..12].copy_from_slice(&sum);
    packet
}

/// The value of an INIT or INIT ACK: tag, window, a stream each way, first number.
fn beginning(tag: u32) -> Vec<u8> {
    [tag.to_be_bytes(), 65_535_u32.to_be_bytes(), [0, 1, 0, 1], [0, 0, 0, 1]].concat()
}

/// What follows the header of an IPv4 packet; IPv6's is not told.
fn payload(ipv4: bool, bytes: &[u8]) -> Option<&[u8]> {
    if ipv4 { bytes.get(usize::from(bytes.first()? & 15) * 4..) } else { Some(bytes) }
}

fn port_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

/// The port that a packet came from of which an ICMP error speaks.
fn refused_port(ipv4: bool, bytes: &[u8]) -> Option<u16> {
    let icmp = payload(ipv4, bytes)?;
    let unreachable = if ipv4 { 3 } else { 1 };
    if *icmp.first()? != unreachable {
        return None;
    }
    let inner = icmp.get(8..)?;
    let (protocol, header) = if ipv4 { (9, usize::from(inner.first()? & 15) * 4) } else { (6, 40) };
    (i32::from(*inner.get(protocol)?) == SCTP).then(|| port_at(inner, header))?
}

/// What to answer to a packet, if anything; `name` is whose ports are served.
fn answer(shared: &Shared, name: Option<&str>, from: IpAddr, bytes: &[u8]) -> Option<Vec<u8>> {
    let ports = [port_at(bytes, 0)?, port_at(bytes, 2)?];
    let reversed = [ports[1], ports[0]];
    let value = bytes.get(16..)?;
    match *bytes.get(12)? {
        INIT => {
            let tag = u32::from_be_bytes(value.get(..4)?.try_into().ok()?);
            let Some(name) = name.filter(|_| PORTS.contains(&ports[1])) else {
                return Some(packet(reversed, tag, ABORT, &[]));
            };
            let text = format!("{name}:{} {}", ports[1], from.to_canonical());
            let mut value = beginning(fastrand::u32(1..));
            value.extend(STATE_COOKIE);
            value.extend((text.len() as u16 + 4).to_be_bytes());
            value.extend(text.as_bytes());
            Some(packet(reversed, tag, INIT_ACK, &value))
        }
        INIT_ACK => {
            let len = usize::from(port_at(value, 18)?).checked_sub(4)?;
            let text = String::from_utf8_lossy(value.get(20..20 + len)?).into_owned();
            shared.heard(ports[1], Heard::Answer(text));
            None
        }
        ABORT => {
            shared.heard(ports[1], Heard::Refused);
            None
        }
        _ => None,
    }
}

impl Sctp {
    /// Starts in a namespace that has these addresses; its thread ends with `end`.
    pub fn start(
        namespace: &Namespace,
        addresses: Vec<IpAddr>,
        name: Option<&'static str>,
        mut end: watch::Receiver<bool>,
    ) -> (Sctp, JoinHandle<()>) {
        let icmp = [(true, Protocol::ICMPV4), (false, Protocol::ICMPV6)];
        let (own, any, errors) = namespace.run(|| {
            let bound = |address: IpAddr| {
                (address, raw(address.is_ipv4(), Protocol::from(SCTP), Some(address)))
            };
            let own: Vec<_> = addresses.into_iter().map(bound).collect();
            let any = [true, false].map(|ipv4| raw(ipv4, Protocol::from(SCTP), None));
            (own, any, icmp.map(|(ipv4, protocol)| (ipv4, raw(ipv4, protocol, None))))
        });
        let shared = Arc::new(Shared::default());
        let copy = |socket: &std::net::UdpSocket| socket.try_clone().expect("descriptor");
        let copies: Vec<_> = own.iter().map(|(address, socket)| (*address, copy(socket))).collect();
        let told = shared.clone();
        let thread = std::thread::spawn(move || {
            runtime().block_on(async move {
                for (address, socket) in copies {
                    let (told, socket) = (told.clone(), UdpSocket::from_std(socket).expect("raw"));
                    tokio::spawn(async move {
                        let mut buffer = [0; 2048];
                        while let Ok((len, from)) = socket.recv_from(&mut buffer).await {
                            let bytes = payload(address.is_ipv4(), &buffer[..len]);
                            let reply = bytes.and_then(|b| answer(&told, name, from.ip(), b));
                            if let Some(reply) = reply {
                                let _ = socket.send_to(&reply, SocketAddr::new(from.ip(), 0)).await;
                            }
                        }
                    });
                }
                for (ipv4, socket) in errors {
                    let (told, socket) = (told.clone(), UdpSocket::from_std(socket).expect("raw"));
                    tokio::spawn(async move {
                        let mut buffer = [0; 2048];
                        while let Ok((len, _)) = socket.recv_from(&mut buffer).await {
                            if let Some(port) = refused_port(ipv4, &buffer[..len]) {
                                told.heard(port, Heard::Refused);
                            }
                        }
                    });
                }
                let _ = end.wait_for(|end| *end).await;
            });
        });
        (Sctp { shared, any, own }, thread)
    }

    /// Sends a first packet, from a port that none was sent from yet, and waits for what comes of it.
    pub async fn ask(&self, fresh: &AtomicU16, source: Option<IpAddr>, to: SocketAddr) -> Heard {
        let port = fresh.fetch_add(1, Ordering::Relaxed).max(1024);
        let (tell, mut told) = oneshot::channel();
        self.shared.waiting.lock().expect("lock").insert(port, tell);
        let bound = self.own.iter().find(|(address, _)| Some(*address) == source);
        let socket = bound.map_or(&self.any[usize::from(to.is_ipv6())], |(_, socket)| socket);
        let first = packet([port, to.port()], 0, INIT, &beginning(fastrand::u32(1..)));
        loop {
            // What is rejected or dropped on its way out fails at once; an ICMP error tells which.
            let _ = socket.send_to(&first, SocketAddr::new(to.ip(), 0));
            if let Ok(heard) = tokio::time::timeout(AGAIN, &mut told).await {
                return heard.expect("who waits is told once");
            }
        }
    }
}

#[test]
fn the_checksum_is_the_one_of_the_standard() {
    // RFC 9260 names the polynomial; the check value is the usual one of CRC-32C.
    assert_eq!(crc32c(b"123456789"), 0xe306_9283);
}
