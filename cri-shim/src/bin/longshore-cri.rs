//! The shim alone: for its own tests, and to put it under another kubelet or a CRI tool.
//!
//! `longshore-cri [STATE_DIR RUN_DIR]` serves until SIGTERM or SIGINT.

use std::path::PathBuf;
use std::process::ExitCode;

use cri_shim::Config;
use tokio::signal::unix::{SignalKind, signal};

fn main() -> ExitCode {
    let mut arguments = std::env::args_os().skip(1).peekable();
    if arguments.next_if(|a| a == "monitor").is_some() {
        return cri_shim::monitor::main(arguments);
    }
    let config = match (arguments.next(), arguments.next()) {
        (Some(state), Some(run)) => Config::at(PathBuf::from(state), PathBuf::from(run)),
        _ => Config::default(),
    };
    match run(config) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            #[allow(clippy::print_stderr, reason = "a command's last word")]
            {
                eprintln!("longshore-cri: {error}");
            }
            ExitCode::FAILURE
        }
    }
}

#[tokio::main]
async fn run(config: Config) -> Result<(), Box<dyn std::error::Error>> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let shutdown = async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    };
    cri_shim::serve(config, shutdown).await?;
    Ok(())
}
