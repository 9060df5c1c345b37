//! What test pods run where busybox does not do: servers that say who asked whom.
//!
//! `workload http PORT`, `workload tcp PORT` (echoes), `workload udp PORT` (echoes, with the host's
//! name and the client's address). Only the standard library, so that the binary stays small.

#![allow(clippy::print_stderr, reason = "a tool for tests")]

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{IpAddr, Ipv6Addr, TcpListener, TcpStream, UdpSocket};
use std::process::ExitCode;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().collect();
    let (Some(mode), Some(Ok(port))) = (arguments.get(1), arguments.get(2).map(|p| p.parse()))
    else {
        eprintln!("usage: workload http|tcp|udp PORT");
        return ExitCode::from(64);
    };
    let result = match mode.as_str() {
        "http" => tcp(port, http),
        "tcp" => tcp(port, echo),
        "udp" => udp(port),
        other => {
            eprintln!("workload: unknown mode {other}");
            return ExitCode::from(64);
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("workload {mode} {port}: {error}");
            ExitCode::FAILURE
        }
    }
}

fn host() -> String {
    std::fs::read_to_string("/etc/hostname")
        .or_else(|_| std::fs::read_to_string("/proc/sys/kernel/hostname"))
        .unwrap_or_default()
        .trim()
        .to_owned()
}

fn plain(ip: IpAddr) -> IpAddr {
    ip.to_canonical()
}

fn tcp(port: u16, serve: fn(TcpStream) -> std::io::Result<()>) -> std::io::Result<()> {
    let listener = TcpListener::bind((Ipv6Addr::UNSPECIFIED, port))
        .or_else(|_| TcpListener::bind(("0.0.0.0", port)))?;
    for stream in listener.incoming() {
        let stream = stream?;
        std::thread::spawn(move || serve(stream));
    }
    Ok(())
}

fn http(mut stream: TcpStream) -> std::io::Result<()> {
    let peer = plain(stream.peer_addr()?.ip());
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut line = String::new();
    while reader.read_line(&mut line)? > 2 {
        line.clear();
    }
    let body = format!("{} {peer}\n", host());
    write!(
        stream,
        "HTTP/1.0 200 OK\r\nContent-Length: {}\r\nContent-Type: text/plain\r\n\r\n{body}",
        body.len()
    )
}

fn echo(mut stream: TcpStream) -> std::io::Result<()> {
    let mut buffer = [0; 4096];
    loop {
        let n = stream.read(&mut buffer)?;
        if n == 0 {
            return Ok(());
        }
        stream.write_all(&buffer[..n])?;
    }
}

fn udp(port: u16) -> std::io::Result<()> {
    let socket = UdpSocket::bind((Ipv6Addr::UNSPECIFIED, port))
        .or_else(|_| UdpSocket::bind(("0.0.0.0", port)))?;
    let mut buffer = [0; 2048];
    loop {
        let (n, peer) = socket.recv_from(&mut buffer)?;
        let text = String::from_utf8_lossy(&buffer[..n]).into_owned();
        let answer = format!("{} {} {text}", host(), plain(peer.ip()));
        // A client that is gone is no reason to end.
        let _ = socket.send_to(answer.as_bytes(), peer);
    }
}
