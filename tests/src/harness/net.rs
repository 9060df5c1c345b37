//! Small blocking clients, to be run in a namespace: what a user of a Service does.

use std::io::{self, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::path::Path;
use std::time::Duration;

use super::lab::within;

/// An HTTP answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// Status code.
    pub code: u16,
    /// Body.
    pub body: String,
}

/// How long one exchange may take.
pub const TIMEOUT: Duration = Duration::from_secs(2);

/// GETs `path` from `to`, from the namespace at `from`.
///
/// # Errors
/// What the socket says, or an answer that is no HTTP.
pub fn http_get(from: &Path, to: SocketAddr, path: &str) -> io::Result<Answer> {
    let request = format!("GET {path} HTTP/1.0\r\nHost: {to}\r\n\r\n");
    let text = within(from, || {
        let mut stream = TcpStream::connect_timeout(&to, TIMEOUT)?;
        stream.set_read_timeout(Some(TIMEOUT))?;
        stream.set_write_timeout(Some(TIMEOUT))?;
        stream.write_all(request.as_bytes())?;
        let mut text = Vec::new();
        stream.read_to_end(&mut text)?;
        Ok(String::from_utf8_lossy(&text).into_owned())
    })?;
    let bad = || io::Error::other(format!("no HTTP answer: {text:?}"));
    let (head, body) = text.split_once("\r\n\r\n").ok_or_else(bad)?;
    let code = head.split(' ').nth(1).and_then(|c| c.parse().ok()).ok_or_else(bad)?;
    Ok(Answer { code, body: body.to_owned() })
}

/// Sends `text` by UDP and returns the answer.
///
/// # Errors
/// What the socket says; a refusal arrives as ConnectionRefused.
pub fn udp_exchange(from: &Path, to: SocketAddr, text: &str) -> io::Result<String> {
    within(from, || {
        let any: SocketAddr =
            if to.is_ipv4() { ([0, 0, 0, 0], 0).into() } else { ([0u16; 8], 0).into() };
        let socket = UdpSocket::bind(any)?;
        socket.connect(to)?;
        socket.set_read_timeout(Some(TIMEOUT))?;
        socket.send(text.as_bytes())?;
        let mut buffer = [0; 2048];
        let n = socket.recv(&mut buffer)?;
        Ok(String::from_utf8_lossy(&buffer[..n]).into_owned())
    })
}
