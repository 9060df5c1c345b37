//! The shim alone: for its own tests, and to put it under another kubelet or a CRI tool.
//!
//! `longshore-cri [STATE_DIR RUN_DIR [LOG_MAX_SIZE LOG_MAX_FILES]]` serves until SIGTERM or SIGINT.
//! Logs are left to the kubelet to rotate unless their size, in bytes, and number are given.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

use cri_shim::Config;
use cri_shim::config::LogRotation;
use tokio::signal::unix::{SignalKind, signal};

fn main() -> ExitCode {
    let mut arguments = std::env::args_os().skip(1).peekable();
    if arguments.next_if(|a| a == "monitor").is_some() {
        return cri_shim::monitor::main(arguments);
    }
    let mut config = match (arguments.next(), arguments.next()) {
        (Some(state), Some(run)) => Config::at(PathBuf::from(state), PathBuf::from(run)),
        _ => Config::default(),
    };
    let number = |text: Option<OsString>| text?.to_str()?.parse::<u32>().ok();
    if let (Some(size), Some(max_files)) = (number(arguments.next()), number(arguments.next())) {
        config.log_rotation = Some(LogRotation { max_size: size.into(), max_files });
    }
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
