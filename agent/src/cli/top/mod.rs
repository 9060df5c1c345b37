//! `longshore top`: pods, Services and Events of the running node, live or as one snapshot.
//!
//! Pure: `view`; effects: `screen` (the terminal). The node measures only when it is asked, so that
//! nobody pays for a view that nobody looks at.

use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context;
use clap::Args;

use self::view::Sort;
use super::{Output, command_runtime, status};
use crate::health::{STATUS_SOCKET, Status};

mod screen;
mod view;

/// Arguments of `longshore top`.
#[derive(Debug, Args)]
pub struct TopArgs {
    /// Seconds between two looks
    #[arg(
        short = 'd', long, value_name = "SECONDS", default_value_t = 2,
        value_parser = clap::value_parser!(u64).range(1..=3600)
    )]
    interval: u64,
    /// Print one snapshot and end; so it is without a terminal and with `-o json`, too
    #[arg(long)]
    once: bool,
    /// Order of the pods
    #[arg(long, value_enum, default_value_t = Sort::Cpu)]
    sort: Sort,
    /// The node's run directory
    #[arg(long, value_name = "DIR", default_value = "/run/longshore")]
    run_dir: PathBuf,
}

/// A CPU rate needs two looks with so much time between them.
const BETWEEN: Duration = Duration::from_millis(1100);

/// The node that is looked at.
#[derive(Clone)]
struct Source {
    socket: PathBuf,
}

impl Source {
    async fn ask(&self) -> anyhow::Result<Vec<u8>> {
        Ok(status::tell(&self.socket, "/top").await?.to_vec())
    }

    async fn look(&self) -> anyhow::Result<Status> {
        serde_json::from_slice(&self.ask().await?).context(
            "read the node's answer; is the running node of another version than this command?",
        )
    }
}

/// Runs `longshore top`.
pub(super) fn run(args: TopArgs, output: Output) -> anyhow::Result<()> {
    let source = Source { socket: args.run_dir.join(STATUS_SOCKET) };
    let terminal = std::io::stdout().is_terminal() && std::io::stdin().is_terminal();
    let runtime = command_runtime()?;
    if terminal && !args.once && output == Output::Text {
        let every = Duration::from_secs(args.interval);
        return runtime.block_on(screen::live(source, every, args.sort));
    }
    let text = runtime.block_on(async {
        source.ask().await?;
        tokio::time::sleep(BETWEEN).await;
        anyhow::Ok(match output {
            Output::Json => String::from_utf8_lossy(&source.ask().await?).into_owned() + "\n",
            Output::Text => view::snapshot(&source.look().await?, args.sort),
        })
    })?;
    match std::io::stdout().lock().write_all(text.as_bytes()) {
        // A closed pipe is the reader's business.
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        written => Ok(written?),
    }
}
