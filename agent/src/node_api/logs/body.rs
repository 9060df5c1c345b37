//! A log on its way to a client, chunk by chunk, as fast as the client takes it.
//!
//! A state machine by hand, not a stream of an `async` block: it lies there a thousand times over
//! and waits, and must not keep the room for what it does when it reads.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use axum::body::HttpBody;
use hyper::body::{Bytes, Frame};
use tokio::sync::Semaphore;

use super::file::{LogFile, Read};
use super::follow::Wake;
use super::line::Shaper;
use super::options::LogOptions;

/// Logs that are read at once. A line that a thousand follow must not make a thousand threads.
const READS: usize = 8;
static READING: Semaphore = Semaphore::const_new(READS);

type Reading = Pin<Box<dyn Future<Output = io::Result<(Read, LogFile)>> + Send>>;

/// One log for one client.
pub(super) struct LogBody {
    stage: Stage,
    shaper: Shaper,
    lines_left: u64,
    wake: Option<Wake>,
}

enum Stage {
    Ready(LogFile),
    /// With whether the container had ended before.
    Reading(Reading, bool),
    /// Nothing more was there.
    Waiting(LogFile),
    Over,
}

impl LogBody {
    pub(super) fn new(file: LogFile, options: &LogOptions, wake: Option<Wake>) -> Self {
        Self {
            stage: Stage::Ready(file),
            shaper: Shaper::new(options),
            // A tail that is not followed is so many lines and no more.
            lines_left: options.tail.filter(|_| !options.follow).unwrap_or(u64::MAX),
            wake,
        }
    }

    fn is_done(&self) -> bool {
        self.shaper.is_done() || self.lines_left == 0
    }

    /// What the client is to see of `lines`.
    fn shape(&mut self, lines: &[u8]) -> Vec<u8> {
        let mut out = Vec::with_capacity(lines.len());
        let whole = lines.strip_suffix(b"\n").unwrap_or(lines);
        for line in whole.split(|byte| *byte == b'\n') {
            self.shaper.push(line, true, &mut out);
            self.lines_left = self.lines_left.saturating_sub(1);
            if self.is_done() {
                break;
            }
        }
        out
    }

    fn poll_chunk(&mut self, cx: &mut Context<'_>) -> Poll<Option<io::Result<Bytes>>> {
        loop {
            match std::mem::replace(&mut self.stage, Stage::Over) {
                Stage::Over => return Poll::Ready(None),
                Stage::Ready(_) if self.is_done() => return Poll::Ready(None),
                Stage::Ready(file) => {
                    let ended = self.wake.as_mut().is_none_or(Wake::look);
                    self.stage = Stage::Reading(Box::pin(read(file)), ended);
                }
                Stage::Reading(mut reading, ended) => {
                    let Poll::Ready(done) = reading.as_mut().poll(cx) else {
                        self.stage = Stage::Reading(reading, ended);
                        return Poll::Pending;
                    };
                    let out = match done {
                        Ok((Read::Lines(lines), file)) => {
                            self.stage = Stage::Ready(file);
                            self.shape(&lines)
                        }
                        // It had ended before this read, so there is no more.
                        Ok((Read::End, mut file)) if ended => {
                            let (rest, mut out) = (file.take_rest(), Vec::new());
                            if !rest.is_empty() {
                                self.shaper.push(&rest, false, &mut out);
                            }
                            out
                        }
                        Ok((Read::End, file)) => {
                            self.stage = Stage::Waiting(file);
                            continue;
                        }
                        Err(error) => {
                            tracing::warn!(%error, "cannot read a container's log");
                            return Poll::Ready(Some(Err(error)));
                        }
                    };
                    if !out.is_empty() {
                        return Poll::Ready(Some(Ok(out.into())));
                    }
                }
                Stage::Waiting(file) => {
                    let news = self.wake.as_mut().map(|wake| wake.poll_news(cx));
                    if news == Some(Poll::Pending) {
                        self.stage = Stage::Waiting(file);
                        return Poll::Pending;
                    }
                    self.stage = Stage::Ready(file);
                }
            }
        }
    }
}

async fn read(mut file: LogFile) -> io::Result<(Read, LogFile)> {
    let permit = READING.acquire().await;
    let work = tokio::task::spawn_blocking(move || file.read().map(|read| (read, file)));
    let done = work.await;
    drop(permit);
    done.map_err(io::Error::other)?
}

impl HttpBody for LogBody {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        let chunk = ready!(self.poll_chunk(cx));
        Poll::Ready(chunk.map(|chunk| chunk.map(Frame::data)))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use http_body_util::BodyExt;
    use k8s_openapi::api::core::v1::{
        ContainerState, ContainerStateRunning, ContainerStateTerminated, ContainerStatus, PodStatus,
    };

    use super::*;
    use crate::node_api::logs::follow::{Followers, Instance};
    use crate::pod::table::{PodTable, PodView};

    fn view(state: ContainerState) -> PodView {
        let status = ContainerStatus {
            name: "c".into(),
            container_id: Some("cri://x".into()),
            state: Some(state),
            ..ContainerStatus::default()
        };
        PodView {
            finished: false,
            pod: Arc::new(crate::pod::testing::pod(r#"{"containers": [{"name": "c"}]}"#)),
            status: PodStatus { container_statuses: Some(vec![status]), ..PodStatus::default() },
            source: None,
            containers: Default::default(),
            sandbox: None,
        }
    }

    fn runs() -> ContainerState {
        ContainerState {
            running: Some(ContainerStateRunning::default()),
            ..ContainerState::default()
        }
    }

    #[test]
    fn a_log_that_waits_is_small() {
        assert!(size_of::<LogBody>() <= 128, "{}", size_of::<LogBody>());
    }

    #[tokio::test]
    async fn a_thousand_followers_see_every_line_across_rotations_until_the_end() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("0.log");
        let write = |text: &str| {
            use std::io::Write;
            let mut file =
                std::fs::OpenOptions::new().create(true).append(true).open(&path).unwrap();
            let line = format!("2026-01-02T03:04:05.000000000Z stdout F {text}\n");
            file.write_all(line.as_bytes()).unwrap();
        };
        write("first");
        let table = PodTable::default();
        table.put(view(runs()));
        let followers = Followers::new(table.clone());
        let mut tasks = tokio::task::JoinSet::new();
        for _ in 0..1000 {
            let instance = Instance { uid: "u".into(), name: "c".into(), id: "x".into() };
            let options = LogOptions { follow: true, ..LogOptions::default() };
            let wake = followers.follow(&path, instance).unwrap();
            let log = LogBody::new(
                LogFile::open(path.clone().into(), None).unwrap(),
                &options,
                Some(wake),
            );
            tasks.spawn(async move { log.collect().await.unwrap().to_bytes() });
        }
        let mut expected = String::from("first\n");
        for n in 0..20 {
            write(&n.to_string());
            expected += &format!("{n}\n");
            if n % 5 == 4 {
                let rotated = dir.path().join(format!("0.log.20260101-0000{n:02}"));
                std::fs::rename(&path, rotated).unwrap();
                tokio::time::sleep(std::time::Duration::from_millis(5)).await;
            }
        }
        write("last words");
        expected += "last words\n";
        let ended = ContainerStateTerminated {
            container_id: Some("cri://x".into()),
            ..ContainerStateTerminated::default()
        };
        table.put(view(ContainerState { terminated: Some(ended), ..ContainerState::default() }));
        while let Some(seen) = tasks.join_next().await {
            assert_eq!(String::from_utf8_lossy(&seen.unwrap()), expected);
        }
        assert!(followers.is_empty(), "nobody follows any more, and something is kept for them");
    }
}
