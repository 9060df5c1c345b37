//! ExecSync: a process in a container, its exit code and what it wrote.

use std::os::fd::OwnedFd;
use std::time::Duration;

use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe::Receiver;
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

        let reading =
            async { tokio::spawn(async move { tokio::join!(read(stdout), read(stderr)) }).await };
        tokio::pin!(reading);
        let limit = match u64::try_from(request.timeout) {
            Ok(seconds) if seconds > 0 => Duration::from_secs(seconds),
            _ => Duration::MAX,
        };
        let ended = async {
            let ended = tokio::time::timeout(limit, end(&mut conversation)).await;
            // Closing the conversation kills the process and what it started.
            drop(conversation);
            ended
        };
        tokio::pin!(ended);
        // The output has to be read while the process runs, or it would wait for us.
        let mut read = None;
        let code = loop {
            tokio::select! {
                result = &mut reading, if read.is_none() => read = Some(result),
                result = &mut ended => break result,
            }
        };
        let code = code.map_err(|_| {
            Status::deadline_exceeded(format!(
                "command timed out after {} s and was killed",
                request.timeout
            ))
        })??;
        let read = match read {
            Some(read) => Some(read),
            None => tokio::time::timeout(DRAIN, &mut reading).await.ok(),
        };
        let (stdout, stderr) = match read {
            Some(read) => read.map_err(|e| internal("reading output", e))?,
            None => Default::default(),
        };
        Ok(api::ExecSyncResponse { stdout, stderr, exit_code: code })
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

async fn read(mut stream: Receiver) -> Vec<u8> {
    let mut kept = Vec::new();
    let mut buffer = vec![0u8; 16 << 10];
    while let Ok(read @ 1..) = stream.read(&mut buffer).await {
        let room = MAX_OUTPUT - kept.len();
        kept.extend_from_slice(&buffer[..read.min(room)]);
    }
    kept
}
