//! Bytes between two pods of the node, each in a network namespace of its own behind a veth pair:
//! what a Service costs where its traffic really goes. A process of the node itself pays the kernel
//! for one more route lookup a packet when its packets are redirected, whoever wrote the rules.

use std::io::Read as _;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::mpsc;

use anyhow::{Context as _, Result};
use nix::sched::{CloneFlags, unshare};

use crate::measure::sh;

/// The pod that serves; within the cluster's range, so that nothing is masqueraded.
pub const SERVER: Ipv4Addr = Ipv4Addr::new(10, 200, 0, 6);
const CLIENT: Ipv4Addr = Ipv4Addr::new(10, 200, 0, 2);

/// A thread in a network namespace of its own, with an end of a veth pair whose other end is the
/// node's; what `body` returns there.
fn pod<T: Send + 'static>(
    name: &str,
    address: Ipv4Addr,
    body: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    let node = Ipv4Addr::from(u32::from(address) - 1);
    let (told, tell) = mpsc::channel();
    let (go, wait) = mpsc::channel::<()>();
    let thread = std::thread::spawn(move || -> Result<T> {
        unshare(CloneFlags::CLONE_NEWNET).context("a network namespace for a pod")?;
        told.send(nix::unistd::gettid())?;
        wait.recv()?;
        sh(&format!(
            "ip link set lo up; ip addr add {address}/30 dev eth0; ip link set eth0 up
             ip route add default via {node}"
        ))?;
        body()
    });
    let tid = tell.recv()?;
    // The node holds all of 10.128.0.0/9 as its own addresses; these it does not.
    let net = Ipv4Addr::from(u32::from(address) & !3);
    sh(&format!(
        "ip link add {name} type veth peer name eth0 netns {tid}; ip link set {name} up
         ip addr add {node}/30 dev {name}; ip route add {net}/30 dev {name} table local
         ip route add local {node} dev {name} table local 2>/dev/null || true
         echo 1 > /proc/sys/net/ipv4/ip_forward"
    ))?;
    go.send(())?;
    thread.join().map_err(|_| anyhow::anyhow!("the pod {name} panicked"))?
}

/// Starts the pod that serves: it reads what comes.
///
/// # Errors
/// If its namespace cannot be made.
pub fn serve(port: u16) -> Result<()> {
    pod("server", SERVER, move || {
        let listener = TcpListener::bind((SERVER, port))?;
        std::thread::spawn(move || {
            for mut stream in listener.incoming().flatten() {
                std::thread::spawn(move || {
                    let mut block = vec![0; 1 << 18];
                    while stream.read(&mut block).is_ok_and(|read| read > 0) {}
                });
            }
        });
        Ok(())
    })
}

/// Connections from the pod that asks.
///
/// # Errors
/// If one cannot be made.
pub fn connect(to: [SocketAddr; 2]) -> Result<[TcpStream; 2]> {
    pod("client", CLIENT, move || {
        Ok([
            TcpStream::connect(to[0]).with_context(|| to[0].to_string())?,
            TcpStream::connect(to[1]).with_context(|| to[1].to_string())?,
        ])
    })
}
