//! Port forwarding: each forwarded connection is a stream of data and a stream for an error, joined
//! with a connection to the pod's loopback.

use std::collections::HashMap;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::runtime::Runtime;
use super::session::Tasks;
use super::spdy::NewStream;
use super::spdy::headers::Headers;
use super::wire::{self, Input, Item, Output, Wire};

/// How much is read from a pod at once, in bytes.
const CHUNK: usize = 64 << 10;

/// Whether a stream can be one of a forwarded connection.
pub fn acceptable(headers: &Headers) -> bool {
    port(headers).is_some() && matches!(headers.get("streamtype"), Some("data" | "error"))
}

fn port(headers: &Headers) -> Option<u16> {
    headers.get("port")?.parse().ok().filter(|port| *port > 0)
}

/// The two streams of a connection, as far as they have come.
#[derive(Default)]
struct Pair {
    data: Option<NewStream>,
    error: Option<NewStream>,
    /// When it must be complete.
    until: Option<Instant>,
}

/// Serves a SPDY client until it is gone; its connections end with it.
pub async fn streams(
    runtime: &Arc<dyn Runtime>,
    sandbox: &str,
    mut opened: mpsc::Receiver<NewStream>,
    limit: Duration,
) {
    let mut pairs: HashMap<String, Pair> = HashMap::new();
    let mut connections = Tasks::new();
    loop {
        let overdue = pairs.values().filter_map(|pair| pair.until).min();
        let expired = async {
            match overdue {
                Some(at) => tokio::time::sleep_until(at).await,
                None => std::future::pending().await,
            }
        };
        let stream = tokio::select! {
            stream = opened.recv() => stream,
            _ = connections.join_next(), if !connections.is_empty() => continue,
            () = expired => {
                expire(&mut pairs).await;
                continue;
            }
        };
        let Some(stream) = stream else { break };
        let id = request_id(&stream);
        let pair = pairs.entry(id.clone()).or_default();
        pair.until.get_or_insert(Instant::now() + limit);
        let slot = match stream.headers.get("streamtype") {
            Some("data") => &mut pair.data,
            _ => &mut pair.error,
        };
        if slot.is_some() {
            stream.output.reset().await;
            continue;
        }
        *slot = Some(stream);
        if pair.data.is_some()
            && pair.error.is_some()
            && let Some(Pair { data: Some(data), error: Some(error), .. }) = pairs.remove(&id)
        {
            let (runtime, sandbox) = (runtime.clone(), sandbox.to_owned());
            connections.spawn(async move {
                let port = port(&data.headers).unwrap_or_default();
                let forwarding = forward(&runtime, &sandbox, port, data.input, &data.output, true);
                if let Err(why) = forwarding.await {
                    let _ = error.output.send(why.as_bytes()).await;
                    let _ = error.output.finish().await;
                    data.output.reset().await;
                } else {
                    let _ = error.output.finish().await;
                }
            });
        }
    }
}

/// Clients from before request ids open the error stream first, and the data stream next.
fn request_id(stream: &NewStream) -> String {
    match (stream.headers.get("requestid"), stream.headers.get("streamtype")) {
        (Some(id), _) => id.to_owned(),
        (None, Some("data")) => stream.id.wrapping_sub(2).to_string(),
        (None, _) => stream.id.to_string(),
    }
}

async fn expire(pairs: &mut HashMap<String, Pair>) {
    let now = Instant::now();
    let overdue = pairs.extract_if(|_, pair| pair.until.is_some_and(|until| until <= now));
    for (_, pair) in overdue.collect::<Vec<_>>() {
        if let Some(error) = &pair.error {
            let _ = error.output.send(b"timed out waiting for the data stream").await;
            let _ = error.output.finish().await;
        }
        if let Some(data) = &pair.data {
            data.output.reset().await;
        }
    }
}

/// A WebSocket client's connections, two channels for each port in order, and where the client's
/// data goes.
pub struct Channels {
    ports: Vec<(u16, Input, Output, Output)>,
}

impl Channels {
    /// One connection for each of `ports`.
    pub fn new(wire: &Arc<Wire>, ports: &[u16]) -> (Self, Vec<Option<mpsc::Sender<Item>>>) {
        let mut senders = Vec::new();
        let ports = ports.iter().zip((0u32..).step_by(2)).map(|(port, data)| {
            let (sender, input) = wire::queue();
            senders.extend([Some(sender), None]);
            (*port, input, Output::new(wire.clone(), data), Output::new(wire.clone(), data + 1))
        });
        (Channels { ports: ports.collect() }, senders)
    }

    /// Serves until all connections have ended.
    pub async fn serve(self, runtime: &Arc<dyn Runtime>, sandbox: &str) {
        let mut connections = Tasks::new();
        for (port, input, data, error) in self.ports {
            let (runtime, sandbox) = (runtime.clone(), sandbox.to_owned());
            connections.spawn(async move {
                // Each channel begins with the port it is for.
                for output in [&data, &error] {
                    if output.send(&port.to_le_bytes()).await.is_err() {
                        return;
                    }
                }
                if let Err(why) = forward(&runtime, &sandbox, port, input, &data, false).await {
                    let _ = error.send(why.as_bytes()).await;
                }
            });
        }
        while connections.join_next().await.is_some() {}
    }
}

/// Connects to a port of the pod and copies both ways. Where streams can be half-closed each end's
/// is passed on; elsewhere the pod's end is the end.
async fn forward(
    runtime: &Arc<dyn Runtime>,
    sandbox: &str,
    port: u16,
    input: Input,
    output: &Output,
    half_closes: bool,
) -> Result<(), String> {
    let said = |error: io::Error| format!("error forwarding port {port} to pod {sandbox}: {error}");
    let connection = runtime.connect(sandbox, port).await.map_err(said)?;
    let _ = connection.set_nodelay(true);
    copy(connection, input, output, half_closes).await.map_err(said)
}

async fn copy(
    connection: TcpStream,
    mut input: Input,
    output: &Output,
    half_closes: bool,
) -> io::Result<()> {
    let (mut reader, mut writer) = connection.into_split();
    // Whether the client gave the stream up.
    let upward = async move {
        while let Some(item) = input.recv().await {
            let Item::Data(bytes) = item else { return true };
            if writer.write_all(&bytes).await.is_err() {
                return false;
            }
        }
        let _ = writer.shutdown().await;
        false
    };
    let downward = async {
        let mut buffer = vec![0u8; CHUNK];
        loop {
            match reader.read(&mut buffer).await? {
                0 => break,
                read => output.send(&buffer[..read]).await?,
            }
        }
        output.finish().await
    };
    tokio::pin!(upward, downward);
    tokio::select! {
        given_up = &mut upward => if given_up { Ok(()) } else { downward.await },
        copied = &mut downward => {
            copied?;
            // What the client still sends may be of use to the pod, or be refused by it.
            if half_closes {
                upward.await;
            }
            Ok(())
        }
    }
}
