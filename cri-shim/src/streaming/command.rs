//! Exec and attach: the client's streams and the process's, joined until one of them ends.

use std::future::pending;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use super::runtime::{Attachment, Process, Runtime};
use super::session::{Streams, Tasks, copy_in, copy_out, follow_size};
use super::status::Outcome;
use super::wire::Wire;
use crate::api;

/// How long an attached client may take nothing while the container waits with output: a client
/// that stalls must not hold a container up for ever.
const STALL: Duration = Duration::from_secs(10);

/// Runs a process for a client. A client that is gone before the process's end ends it.
pub async fn exec(
    runtime: &Arc<dyn Runtime>,
    wire: &Arc<Wire>,
    request: &api::ExecRequest,
    mut streams: Streams,
) {
    let failed = |why| Outcome::Failed(format!("error executing command in container: {why}"));
    let session = async {
        match runtime.exec(request).await {
            Err(why) => failed(why),
            Ok(process) => match run(process, &mut streams).await {
                Ok(0) => Outcome::Success,
                Ok(code) => Outcome::ExitCode { command: request.cmd.clone(), code },
                Err(why) => failed(why),
            },
        }
    };
    let outcome = tokio::select! {
        outcome = session => outcome,
        () = wire.gone() => return,
    };
    streams.finish(&outcome).await;
}

async fn run(process: Process, streams: &mut Streams) -> Result<i32, String> {
    let Process { stdin, stdout, stderr, tty, exit } = process;
    let mut inputs = Tasks::new();
    if let (Some(resize), Some(terminal)) = (streams.resize.take(), stdout.clone().filter(|_| tty))
    {
        inputs.spawn(follow_size(resize, terminal));
    }
    if let (Some(input), Some(stdin)) = (streams.stdin.take(), stdin) {
        // The process's input ends with this task.
        inputs.spawn(async move { copy_in(input, &stdin).await });
    }
    let mut outputs = Tasks::new();
    let (stop, stopped) = tokio::sync::watch::channel(false);
    for (from, to) in [(stdout, &streams.stdout), (stderr, &streams.stderr)] {
        let (Some(from), Some(to)) = (from, to.clone()) else { continue };
        let mut stopped = stopped.clone();
        outputs.spawn(async move {
            let stopped = async {
                let _ = stopped.wait_for(|stopped| *stopped).await;
            };
            copy_out(&from, &to, stopped).await;
        });
    }
    let ended = exit.await;
    // As with other runtimes: a pipe is read to its end, which a process in the background may
    // delay; a terminal ends with its process.
    if tty {
        stop.send_replace(true);
    }
    while outputs.join_next().await.is_some() {}
    ended
}

/// Joins a client to a container's own streams, until the container ends or the client leaves.
pub async fn attach(
    runtime: &Arc<dyn Runtime>,
    wire: &Arc<Wire>,
    request: &api::AttachRequest,
    mut streams: Streams,
) {
    let ends_input = AtomicBool::new(false);
    let session = async {
        match runtime.attach(request).await {
            Err(why) => Outcome::Failed(format!("error attaching to container: {why}")),
            Ok(attachment) => {
                let once = attachment.stdin_once && !attachment.tty && streams.stdin.is_some();
                ends_input.store(once, Ordering::Relaxed);
                join(runtime, &request.container_id, attachment, &mut streams).await;
                Outcome::Success
            }
        }
    };
    let outcome = tokio::select! {
        outcome = session => outcome,
        () = wire.gone() => {
            if ends_input.into_inner() {
                runtime.close_stdin(&request.container_id).await;
            }
            return;
        }
    };
    streams.finish(&outcome).await;
}

async fn join(
    runtime: &Arc<dyn Runtime>,
    container: &str,
    attachment: Attachment,
    streams: &mut Streams,
) {
    let Attachment { stdin, stdout, stderr, tty, stdin_once, stdin_ended, exit } = attachment;
    let mut inputs = Tasks::new();
    if let (Some(resize), Some(terminal)) = (streams.resize.take(), stdin.clone().filter(|_| tty)) {
        inputs.spawn(follow_size(resize, terminal));
    }
    let mut outputs = Tasks::new();
    for (from, to) in [(stdout, &streams.stdout), (stderr, &streams.stderr)] {
        let (Some(from), Some(to)) = (from, to.clone()) else { continue };
        let to = to.patient(STALL);
        outputs.spawn(async move { copy_out(&from, &to, pending()).await });
    }
    let input = async {
        let (Some(input), Some(stdin)) = (streams.stdin.take(), stdin) else {
            return pending().await;
        };
        tokio::select! {
            () = copy_in(input, &stdin) => {}
            () = stdin_ended => {}
        }
        drop(stdin);
        if stdin_once && !tty {
            runtime.close_stdin(container).await;
            pending().await
        }
    };
    let ends = !outputs.is_empty();
    let output = async {
        while outputs.join_next().await.is_some() {}
        if !ends {
            pending::<()>().await;
        }
    };
    tokio::select! {
        // Whoever ends an input that stays open for others leaves; as with other runtimes.
        () = input => {}
        () = output => {}
        () = async { exit.await; if ends { pending::<()>().await } } => {}
    }
}
