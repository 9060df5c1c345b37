//! The reading task of a SPDY connection: opens streams and hands on their data.

use std::collections::HashMap;
use std::io;
use std::sync::Arc;

use tokio::sync::mpsc;

use super::frame::{self, Decoder, Frame};
use super::headers::{Deflater, Headers};
use crate::streaming::wire::{self, Input, Item, Output, Source, Wire};

/// The most streams that may be open on one connection: 500 forwarded connections.
const MAX_STREAMS: usize = 1000;

/// A stream that the client has opened.
pub struct NewStream {
    pub id: u32,
    pub headers: Headers,
    pub input: Input,
    pub output: Output,
}

/// Reads until the client is gone or breaks the protocol. New streams go to `opened`; those that
/// `acceptable` refuses are reset.
///
/// # Errors
/// Of the connection or its frames.
pub async fn serve(
    source: &mut Source,
    wire: &Arc<Wire>,
    opened: mpsc::Sender<NewStream>,
    acceptable: fn(&Headers) -> bool,
) -> io::Result<()> {
    let mut connection = Connection {
        wire: wire.clone(),
        opened,
        acceptable,
        streams: HashMap::new(),
        last: 0,
        deflater: Deflater::default(),
    };
    let mut decoder = Decoder::default();
    loop {
        while let Some(frame) = decoder.next(&mut source.buffer).map_err(io::Error::other)? {
            connection.take(source, frame).await?;
        }
        if !source.fill(wire).await? {
            return Ok(());
        }
    }
}

struct Connection {
    wire: Arc<Wire>,
    opened: mpsc::Sender<NewStream>,
    acceptable: fn(&Headers) -> bool,
    /// Streams on which the client may still send.
    streams: HashMap<u32, mpsc::Sender<Item>>,
    /// The last stream opened; ids only grow.
    last: u32,
    deflater: Deflater,
}

impl Connection {
    /// A client may end all its streams and still wait for what they bring: only the connection's
    /// end is its end.
    async fn take(&mut self, source: &Source, frame: Frame) -> io::Result<()> {
        match frame {
            Frame::SynStream { stream, headers, fin } => self.open(stream, headers, fin).await?,
            Frame::Data { stream, bytes, fin } => {
                if let Some(sender) = self.streams.get(&stream) {
                    if !bytes.is_empty() {
                        source.deliver(&self.wire, stream, sender, Item::Data(bytes)).await?;
                    }
                    if fin {
                        self.streams.remove(&stream);
                    }
                }
            }
            Frame::RstStream { stream, .. } => {
                if let Some(sender) = self.streams.remove(&stream) {
                    source.deliver(&self.wire, stream, &sender, Item::Reset).await?;
                }
            }
            // Even ids would be pings of our own, and there are none.
            Frame::Ping { id } if id % 2 == 1 => self.wire.control(&frame::ping(id)).await?,
            // No more streams will come, those open go on; the connection's end follows.
            Frame::GoAway | Frame::Ping { .. } | Frame::SynReply { .. } | Frame::Other => {}
        }
        Ok(())
    }

    async fn open(&mut self, stream: u32, headers: Headers, fin: bool) -> io::Result<()> {
        if stream.is_multiple_of(2) || stream <= self.last {
            return self.wire.control(&frame::rst_stream(stream, frame::PROTOCOL_ERROR)).await;
        }
        self.last = stream;
        // Streams that nobody reads any more and the client has not ended.
        if self.streams.len() >= MAX_STREAMS {
            self.streams.retain(|_, sender| !sender.is_closed());
        }
        if self.streams.len() >= MAX_STREAMS || !(self.acceptable)(&headers) {
            return self.wire.control(&frame::rst_stream(stream, frame::REFUSED_STREAM)).await;
        }
        let (sender, input) = wire::queue();
        if !fin {
            self.streams.insert(stream, sender);
        }
        self.wire.control(&frame::syn_reply(stream, &mut self.deflater)).await?;
        let output = Output::new(self.wire.clone(), stream);
        let new = NewStream { id: stream, headers, input, output };
        // A session that has all its streams does not look at more of them.
        let _ = self.opened.send(new).await;
        Ok(())
    }
}
