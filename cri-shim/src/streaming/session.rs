//! A client's session with a process: the streams it asked for, whichever protocol they came by.

use std::sync::Arc;
use std::time::Duration;

use serde::Deserialize;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::descriptor::Descriptor;
use super::spdy::NewStream;
use super::status::{Outcome, encode};
use super::wire::{self, Input, Item, Output, Wire};

/// How much of a process's output is sent at once, in bytes.
const CHUNK: usize = 64 << 10;

/// How long the last output of a process that has ended is waited for, where something that the
/// process left behind may hold its terminal for ever.
const LAST_WORDS: Duration = Duration::from_millis(200);

/// The channels of a WebSocket session, by number.
const STDIN: u32 = 0;
const STDOUT: u32 = 1;
const STDERR: u32 = 2;
const ERROR: u32 = 3;
const RESIZE: u32 = 4;

/// The longest text that is searched for a terminal's size, in bytes.
const MAX_RESIZE: usize = 1024;

/// The streams that the CRI call asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Wanted {
    pub stdin: bool,
    pub stdout: bool,
    pub stderr: bool,
    pub tty: bool,
}

/// The streams that the client opened.
pub struct Streams {
    pub version: u8,
    pub stdin: Option<Input>,
    pub stdout: Option<Output>,
    pub stderr: Option<Output>,
    pub error: Output,
    pub resize: Option<Input>,
}

impl Streams {
    /// Takes a SPDY client's streams as they are opened; `None` when not all come within `limit`.
    pub async fn gather(
        mut opened: mpsc::Receiver<NewStream>,
        wanted: Wanted,
        version: u8,
        limit: Duration,
    ) -> Option<Streams> {
        let (mut error, mut stdin, mut stdout, mut stderr, mut resize) =
            (None, None, None, None, None);
        let all = async {
            let missing = |error: &Option<Output>,
                           stdin: &Option<Input>,
                           stdout: &Option<Output>,
                           stderr: &Option<Output>,
                           resize: &Option<Input>| {
                error.is_none()
                    || wanted.stdin && stdin.is_none()
                    || wanted.stdout && stdout.is_none()
                    || wanted.stderr && stderr.is_none()
                    || wanted.tty && version >= 3 && resize.is_none()
            };
            while missing(&error, &stdin, &stdout, &stderr, &resize) {
                let stream = opened.recv().await?;
                match stream.headers.get("streamtype") {
                    Some("error") => error = Some(stream.output),
                    Some("stdin") => stdin = Some(stream.input),
                    Some("stdout") => stdout = Some(stream.output),
                    Some("stderr") => stderr = Some(stream.output),
                    Some("resize") => resize = Some(stream.input),
                    _ => stream.output.reset().await,
                }
            }
            Some(())
        };
        tokio::time::timeout(limit, all).await.ok()??;
        Some(Streams {
            version,
            stdin: stdin.filter(|_| wanted.stdin),
            stdout: stdout.filter(|_| wanted.stdout),
            stderr: stderr.filter(|_| wanted.stderr),
            error: error?,
            resize: resize.filter(|_| wanted.tty),
        })
    }

    /// The streams of a WebSocket client, which are there from the beginning, and where the client's
    /// data of each channel goes.
    pub fn channels(
        wire: &Arc<Wire>,
        wanted: Wanted,
        version: u8,
    ) -> (Streams, Vec<Option<mpsc::Sender<Item>>>) {
        let mut senders = vec![None; 5];
        let mut input = |channel: u32, wanted: bool| {
            wanted.then(|| {
                let (sender, input) = wire::queue();
                senders[channel as usize] = Some(sender);
                input
            })
        };
        let output = |channel, wanted: bool| wanted.then(|| Output::new(wire.clone(), channel));
        let streams = Streams {
            version,
            stdin: input(STDIN, wanted.stdin),
            stdout: output(STDOUT, wanted.stdout),
            stderr: output(STDERR, wanted.stderr),
            error: Output::new(wire.clone(), ERROR),
            resize: input(RESIZE, wanted.tty),
        };
        (streams, senders)
    }

    /// The channel on which a WebSocket client is told that the session begins.
    pub fn first_channel(wanted: Wanted) -> u32 {
        match wanted {
            Wanted { stdout: true, .. } => STDOUT,
            Wanted { stderr: true, .. } => STDERR,
            _ => ERROR,
        }
    }

    /// Tells the client how the session ended and ends its streams.
    pub async fn finish(&self, outcome: &Outcome) {
        // A client that is gone needs not be told; the first failure marks it as gone.
        for output in [&self.stdout, &self.stderr].into_iter().flatten() {
            let _ = output.finish().await;
        }
        let status = encode(outcome, self.version);
        if !status.is_empty() {
            let _ = self.error.send(&status).await;
        }
        let _ = self.error.finish().await;
    }
}

/// Copies what the client sends into a process's input, until one of them ends.
pub async fn copy_in(mut input: Input, into: &Descriptor) {
    while let Some(Item::Data(bytes)) = input.recv().await {
        if into.write_all(&bytes).await.is_err() {
            break;
        }
    }
}

/// Copies a process's output to the client, until one of them ends. Once `stopped`, only what comes
/// within [`LAST_WORDS`] of each other is waited for.
pub async fn copy_out(from: &Descriptor, output: &Output, stopped: impl Future<Output = ()>) {
    let mut buffer = vec![0u8; CHUNK];
    let mut last_words = false;
    tokio::pin!(stopped);
    loop {
        let read = tokio::select! {
            // A frame once begun is sent whole: only reading is given up.
            read = from.read(&mut buffer) => read,
            () = &mut stopped, if !last_words => {
                last_words = true;
                continue;
            }
            () = tokio::time::sleep(LAST_WORDS), if last_words => return,
        };
        match read {
            Ok(read @ 1..) if output.send(&buffer[..read]).await.is_ok() => {}
            _ => return,
        }
    }
}

/// Applies the sizes that the client's terminal takes.
pub async fn follow_size(mut resize: Input, terminal: Arc<Descriptor>) {
    let mut text = Vec::new();
    while let Some(Item::Data(bytes)) = resize.recv().await {
        text.extend_from_slice(&bytes);
        for size in sizes(&mut text) {
            terminal.resize(size.width, size.height);
        }
    }
}

/// A terminal's size as clients send it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Size {
    #[serde(default)]
    width: u16,
    #[serde(default)]
    height: u16,
}

/// Takes the whole sizes out of `text`, JSON objects one after the other; what is none is dropped.
fn sizes(text: &mut Vec<u8>) -> Vec<Size> {
    let mut found = Vec::new();
    let mut stream = serde_json::Deserializer::from_slice(text).into_iter::<Size>();
    let mut taken = 0;
    let broken = loop {
        match stream.next() {
            Some(Ok(size)) => {
                taken = stream.byte_offset();
                found.push(size);
            }
            Some(Err(error)) => break !error.is_eof(),
            None => break true,
        }
    };
    if broken || text.len() - taken > MAX_RESIZE {
        text.clear();
    } else {
        text.drain(..taken);
    }
    found
}

/// Tasks that end with the session.
pub type Tasks = JoinSet<()>;

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn sizes_are_found_however_they_come() {
        let mut text = br#"{"Width":80,"Height":24}
{"Width":1"#
            .to_vec();
        assert_eq!(sizes(&mut text), [Size { width: 80, height: 24 }]);
        text.extend_from_slice(br#"00,"Height":30}"#);
        assert_eq!(sizes(&mut text), [Size { width: 100, height: 30 }]);
        assert!(text.is_empty());
        let mut nonsense = b"nonsense".to_vec();
        assert!(sizes(&mut nonsense).is_empty() && nonsense.is_empty());
    }

    proptest! {
        #[test]
        fn any_text_is_bounded(pieces in proptest::collection::vec(".{0,200}", 0..40)) {
            let mut text = Vec::new();
            for piece in pieces {
                text.extend_from_slice(piece.as_bytes());
                let _ = sizes(&mut text);
                prop_assert!(text.len() <= MAX_RESIZE);
            }
        }
    }
}
