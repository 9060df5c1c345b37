//! ExecSync: a process in a container, its exit code and what it wrote.

use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe::Receiver;
use tokio::task::JoinHandle;
use tonic::Status;

use super::container_list::running;
use super::{Shim, internal};
use crate::api;
use crate::client::Conversation;
use crate::monitor::protocol::{Reply, Request};

/// The most of each stream that is answered with, in bytes; more is read and dropped.
const MAX_OUTPUT: usize = 16 << 20;

/// How long after its end a process's output is waited for when something it left behind still
/// holds the stream.
const DRAIN: Duration = Duration::from_secs(2);

impl Shim {
    pub(super) async fn exec_sync(
        &self,
        request: api::ExecSyncRequest,
    ) -> Result<api::ExecSyncResponse, Status> {
        let container = self.store.container(&request.container_id)?;
        if request.cmd.is_empty() {
            return Err(Status::invalid_argument("no command"));
        }
        running(&container)?;
        let pipes = || -> std::io::Result<_> {
            let input = OwnedFd::from(std::fs::File::open("/dev/null")?);
            let (stdout, out) = std::io::pipe()?;
            let (stderr, err) = std::io::pipe()?;
            let receivers = (
                Receiver::from_owned_fd(OwnedFd::from(stdout))?,
                Receiver::from_owned_fd(OwnedFd::from(stderr))?,
            );
            Ok(([input, out.into(), err.into()], receivers))
        };
        let (given, (stdout, stderr)) = pipes().map_err(|e| internal("making pipes", e))?;
        let exec =
            Request::Exec { container: container.id.clone(), arguments: request.cmd, tty: false };
        let conversation = container.sandbox.monitor.open(&exec, &given).await;
        drop(given);
        let mut conversation = conversation.map_err(|e| internal("asking the monitor", e))?;

        let outputs = [Output::read(stdout), Output::read(stderr)];
        let limit = match u64::try_from(request.timeout) {
            Ok(seconds) if seconds > 0 => Duration::from_secs(seconds),
            _ => Duration::MAX,
        };
        let ended = tokio::time::timeout(limit, end(&mut conversation)).await;
        // Closing the conversation kills the process and what it started.
        drop(conversation);
        let code = ended.map_err(|_| {
            Status::deadline_exceeded(format!(
                "command timed out after {} s and was killed",
                request.timeout
            ))
        })??;
        let [stdout, stderr] = outputs;
        let (stdout, stderr) = tokio::join!(stdout.all(), stderr.all());
        Ok(api::ExecSyncResponse { stdout, stderr, exit_code: code })
    }
}

/// What a process writes. It is read from the beginning, or the process would wait for us, and no
/// longer than somebody wants it: a process that was left behind may hold the stream for ever.
struct Output {
    kept: Arc<Mutex<Vec<u8>>>,
    reading: JoinHandle<()>,
}

impl Output {
    fn read(mut stream: Receiver) -> Self {
        let kept = Arc::new(Mutex::new(Vec::new()));
        let into = kept.clone();
        let reading = tokio::spawn(async move {
            let mut buffer = vec![0u8; 16 << 10];
            while let Ok(read @ 1..) = stream.read(&mut buffer).await {
                let mut kept = into.lock().unwrap_or_else(PoisonError::into_inner);
                let room = MAX_OUTPUT - kept.len();
                kept.extend_from_slice(&buffer[..read.min(room)]);
            }
        });
        Output { kept, reading }
    }

    /// All of it, or what came until [`DRAIN`] after the end of the process.
    async fn all(mut self) -> Vec<u8> {
        let _ = tokio::time::timeout(DRAIN, &mut self.reading).await;
        std::mem::take(&mut *self.kept.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Drop for Output {
    fn drop(&mut self) {
        self.reading.abort();
    }
}

/// The exit code of a process, at its end.
pub(super) async fn end(conversation: &mut Conversation) -> Result<i32, Status> {
    loop {
        match conversation.next().await {
            Ok(Some(Reply::ExecExited { code })) => return Ok(code),
            Ok(Some(Reply::Done)) => {}
            Ok(Some(Reply::Failed { message })) => {
                return Err(Status::unknown(format!("failed to exec in container: {message}")));
            }
            Ok(Some(other)) => {
                return Err(Status::internal(format!("the monitor answered {other:?}")));
            }
            Ok(None) => {
                return Err(Status::unavailable("the container ended during the command"));
            }
            Err(error) => return Err(internal("waiting for the command", error)),
        }
    }
}
