//! Clients of the streaming server for the tests: SPDY as kubectl and crictl speak it, WebSocket as
//! kubectl and browsers do. Both give the same [`Session`].

use std::collections::HashMap;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use bytes::BytesMut;
use cri_shim::streaming::spdy::frame as spdy;
use cri_shim::streaming::spdy::headers::{Deflater, Headers};
use cri_shim::streaming::websocket::{accept_key, frame as websocket};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

const PATIENCE: Duration = Duration::from_secs(120);
const MASK: [u8; 4] = [0xa5, 0x0f, 0x33, 0xc4];

/// How to speak with the server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dialect {
    Spdy(&'static str),
    WebSocket(&'static str),
    /// SPDY within WebSocket.
    Tunnel,
}

/// A connection after its upgrade.
pub struct Session {
    stream: TcpStream,
    dialect: Dialect,
    deflater: Deflater,
    spdy: spdy::Decoder,
    websocket: websocket::Decoder,
    raw: BytesMut,
    inner: BytesMut,
    next: u32,
    /// SPDY's streams by name.
    names: HashMap<u32, String>,
    /// What came, by stream name or channel number, and which streams have ended.
    pub received: HashMap<String, Vec<u8>>,
    pub ended: Vec<String>,
    /// The channel of the message under way.
    channel: Option<(String, Vec<u8>)>,
    pub closed: bool,
}

/// Sends a request by hand; the status and the headers of its answer.
pub async fn request(url: &str, headers: &str) -> anyhow::Result<(u16, String, TcpStream)> {
    let rest = url.strip_prefix("http://").context("not http")?;
    let (address, path) = rest.split_once('/').context("no path")?;
    let mut stream = TcpStream::connect(address).await?;
    let request = format!("POST /{path} HTTP/1.1\r\nHost: {address}\r\n{headers}\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut answer = Vec::new();
    while !answer.ends_with(b"\r\n\r\n") {
        let byte = tokio::time::timeout(PATIENCE, stream.read_u8()).await??;
        answer.push(byte);
    }
    let answer = String::from_utf8(answer)?;
    let status = answer.split(' ').nth(1).context("no status")?.parse()?;
    Ok((status, answer.to_lowercase(), stream))
}

/// The headers that ask for a dialect.
pub fn upgrade(dialect: Dialect) -> String {
    let web = |protocol: &str| {
        let named = match protocol {
            "" => String::new(),
            protocol => format!("Sec-WebSocket-Protocol: {protocol}\r\n"),
        };
        format!(
            "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n\
             Sec-WebSocket-Key: a2V5\r\n{named}"
        )
    };
    match dialect {
        Dialect::Spdy(protocol) => format!(
            "Connection: Upgrade\r\nUpgrade: SPDY/3.1\r\nX-Stream-Protocol-Version: {protocol}\r\n"
        ),
        Dialect::WebSocket(protocol) => web(protocol),
        Dialect::Tunnel => web("SPDY/3.1+portforward.k8s.io"),
    }
}

impl Session {
    /// Connects and upgrades.
    pub async fn open(url: &str, dialect: Dialect) -> anyhow::Result<Session> {
        let (status, answer, stream) = request(url, &upgrade(dialect)).await?;
        ensure!(status == 101, "{answer}");
        if !matches!(dialect, Dialect::Spdy(_)) {
            let accepted = format!("sec-websocket-accept: {}", accept_key("a2V5").to_lowercase());
            ensure!(answer.contains(&accepted), "{answer}");
        }
        Ok(Session {
            stream,
            dialect,
            deflater: Deflater::default(),
            spdy: spdy::Decoder::default(),
            websocket: websocket::Decoder::client(),
            raw: BytesMut::new(),
            inner: BytesMut::new(),
            next: 1,
            names: HashMap::new(),
            received: HashMap::new(),
            ended: Vec::new(),
            channel: None,
            closed: false,
        })
    }

    /// Opens the streams of a command (SPDY; channels are there already).
    pub async fn command_streams(&mut self, kinds: &[&str]) -> anyhow::Result<()> {
        if let Dialect::Spdy(_) = self.dialect {
            for kind in kinds {
                self.open_stream(kind, &[("streamtype", kind)]).await?;
            }
        }
        Ok(())
    }

    /// Opens a SPDY stream.
    pub async fn open_stream(
        &mut self,
        name: &str,
        headers: &[(&str, &str)],
    ) -> anyhow::Result<()> {
        let headers = headers.iter().map(|(n, v)| ((*n).to_owned(), (*v).to_owned())).collect();
        let (id, headers) = (self.next, Headers(headers));
        self.next += 2;
        self.names.insert(id, name.to_owned());
        let frame = spdy::syn_stream(id, &headers, false, &mut self.deflater);
        self.write(&frame).await
    }

    async fn write(&mut self, frame: &[u8]) -> anyhow::Result<()> {
        match self.dialect {
            Dialect::Tunnel => {
                let frame = websocket::masked(websocket::BINARY, true, frame, MASK);
                self.stream.write_all(&frame).await?;
            }
            _ => self.stream.write_all(frame).await?,
        }
        Ok(())
    }

    /// Writes bytes as they are.
    pub async fn write_raw(&mut self, bytes: &[u8]) -> anyhow::Result<()> {
        Ok(self.stream.write_all(bytes).await?)
    }

    fn id(&self, name: &str) -> anyhow::Result<u32> {
        if let Dialect::WebSocket(_) = self.dialect {
            let channels = ["stdin", "stdout", "stderr", "error", "resize"];
            return match channels.iter().position(|channel| *channel == name) {
                Some(channel) => Ok(channel as u32),
                None => Ok(name.parse()?),
            };
        }
        let found = self.names.iter().find(|(_, n)| *n == name);
        found.map(|(id, _)| *id).with_context(|| format!("no stream {name}"))
    }

    pub async fn send(&mut self, name: &str, data: &[u8]) -> anyhow::Result<()> {
        let id = self.id(name)?;
        match self.dialect {
            Dialect::WebSocket(protocol) if protocol.contains("base64") => {
                use base64::Engine;
                let text = base64::engine::general_purpose::STANDARD.encode(data);
                let message = format!("{id}{text}");
                let frame = websocket::masked(websocket::TEXT, true, message.as_bytes(), MASK);
                self.stream.write_all(&frame).await?;
            }
            Dialect::WebSocket(_) => {
                let message = [&[id as u8], data].concat();
                let frame = websocket::masked(websocket::BINARY, true, &message, MASK);
                self.stream.write_all(&frame).await?;
            }
            _ => {
                for piece in data.chunks(32 << 10) {
                    let head = spdy::data_head(id, piece.len(), false);
                    self.write(&[&head[..], piece].concat()).await?;
                }
            }
        }
        Ok(())
    }

    /// Ends a stream in this direction.
    pub async fn end(&mut self, name: &str) -> anyhow::Result<()> {
        let id = self.id(name)?;
        match self.dialect {
            Dialect::WebSocket(_) => {
                let frame = websocket::masked(websocket::BINARY, true, &[255, id as u8], MASK);
                self.stream.write_all(&frame).await?;
                Ok(())
            }
            _ => self.write(&spdy::data_head(id, 0, true)).await,
        }
    }

    /// Reads once; `false` at the connection's end.
    pub async fn read(&mut self) -> anyhow::Result<bool> {
        let read = tokio::time::timeout(PATIENCE, self.stream.read_buf(&mut self.raw)).await;
        match read.context("the server says nothing")? {
            Ok(0) | Err(_) => {
                self.closed = true;
                return Ok(false);
            }
            Ok(_) => {}
        }
        if let Dialect::Spdy(_) = self.dialect {
            self.inner.unsplit(self.raw.split());
        } else {
            while let Some(frame) = self.websocket.next(&mut self.raw)? {
                match frame {
                    websocket::Frame::Data { bytes, .. } if self.dialect == Dialect::Tunnel => {
                        self.inner.extend_from_slice(&bytes);
                    }
                    websocket::Frame::Data { bytes, last, .. } => self.message(&bytes, last)?,
                    websocket::Frame::Pong => self.ended.push("pong".to_owned()),
                    websocket::Frame::Close(code) => {
                        self.ended.push(format!("close {}", code.unwrap_or_default()));
                    }
                    websocket::Frame::Ping(_) => bail!("a ping of the server"),
                }
            }
        }
        while let Some(frame) = self.spdy.next(&mut self.inner)? {
            match frame {
                spdy::Frame::Data { stream, bytes, fin } => {
                    let name = self.names.get(&stream).cloned().unwrap_or_default();
                    self.received.entry(name.clone()).or_default().extend_from_slice(&bytes);
                    if fin {
                        self.ended.push(name);
                    }
                }
                spdy::Frame::RstStream { stream, status } => {
                    let name = self.names.get(&stream).cloned().unwrap_or_default();
                    self.ended.push(format!("reset {name} {status}"));
                }
                spdy::Frame::Ping { id } => self.ended.push(format!("ping {id}")),
                _ => {}
            }
        }
        Ok(true)
    }

    fn message(&mut self, bytes: &[u8], last: bool) -> anyhow::Result<()> {
        let Dialect::WebSocket(protocol) = self.dialect else { return Ok(()) };
        let base64 = protocol.contains("base64");
        let (name, data) = match self.channel.take() {
            Some((name, data)) => (name, [data.as_slice(), bytes].concat()),
            None => {
                let first = bytes.first().context("an empty message")?;
                let number = if base64 { first - b'0' } else { *first };
                let names = ["stdin", "stdout", "stderr", "error", "resize"];
                let name = names.get(usize::from(number)).context("channel")?;
                ((*name).to_owned(), bytes[1..].to_vec())
            }
        };
        if !last {
            self.channel = Some((name, data));
            return Ok(());
        }
        let data = if base64 {
            use base64::Engine;
            base64::engine::general_purpose::STANDARD.decode(data)?
        } else {
            data
        };
        self.received.entry(name).or_default().extend_from_slice(&data);
        Ok(())
    }

    /// What a stream has said so far.
    pub fn text(&self, name: &str) -> String {
        let bytes = self.received.get(name).map(Vec::as_slice).unwrap_or_default();
        String::from_utf8_lossy(bytes).into_owned()
    }

    /// Reads until a stream has said `wanted`.
    pub async fn expect(&mut self, name: &str, wanted: &str) -> anyhow::Result<()> {
        while !self.text(name).contains(wanted) {
            ensure!(self.read().await?, "the end before {wanted:?}: {:?}", self.text(name));
        }
        Ok(())
    }

    /// Reads to the connection's end.
    pub async fn finish(&mut self) -> anyhow::Result<()> {
        while self.read().await? {}
        Ok(())
    }

    /// The exit code that the error stream tells.
    pub fn exit_code(&self) -> anyhow::Result<i32> {
        let status: serde_json::Value = serde_json::from_str(&self.text("error"))?;
        if status["status"] == "Success" {
            return Ok(0);
        }
        let cause = &status["details"]["causes"][0];
        ensure!(cause["reason"] == "ExitCode", "{status}");
        Ok(cause["message"].as_str().context("no code")?.parse()?)
    }
}
