//! The shim alone: for its own tests, and to put it under another kubelet or a CRI tool.
//!
//! `longshore-cri [STATE_DIR RUN_DIR [LOG_MAX_SIZE LOG_MAX_FILES]] [--cdi-dir DIR]...
//! [--base-spec HANDLER=FILE]... [--runtime HANDLER=PROGRAM]... [--criu PROGRAM]` serves until
//! SIGTERM or SIGINT. Logs are left to the kubelet to rotate unless their size, in bytes, and number
//! are given.

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
    let (result, usage) = match configuration(arguments) {
        Ok(config) => (run(config), false),
        Err(error) => (Err(error.into()), true),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            #[allow(clippy::print_stderr, reason = "a command's last word")]
            {
                eprintln!("longshore-cri: {error}");
            }
            if usage { ExitCode::from(64) } else { ExitCode::FAILURE }
        }
    }
}

fn configuration(arguments: impl Iterator<Item = OsString>) -> Result<Config, String> {
    let mut arguments = arguments.peekable();
    let folder = |argument: &OsString| !argument.to_string_lossy().starts_with("--");
    let state = arguments.next_if(folder).map(PathBuf::from);
    let mut config = match (state, arguments.next_if(folder)) {
        (Some(state), Some(run)) => Config::at(state, PathBuf::from(run)),
        (None, None) => Config::default(),
        _ => return Err("give both STATE_DIR and RUN_DIR, or none".to_owned()),
    };
    let number = |text: Option<OsString>| text?.to_str()?.parse::<u32>().ok();
    let size = number(arguments.next_if(folder));
    if let (Some(size), Some(max_files)) = (size, number(arguments.next_if(folder))) {
        config.log_rotation = Some(LogRotation { max_size: size.into(), max_files });
    }
    let mut cdi_dirs = Vec::new();
    while let Some(flag) = arguments.next() {
        let value = arguments.next().unwrap_or_default();
        let text = value.to_string_lossy().into_owned();
        match (flag.to_str(), text.split_once('=')) {
            (Some("--cdi-dir"), _) if !text.is_empty() => cdi_dirs.push(PathBuf::from(value)),
            (Some("--base-spec"), Some((handler, path))) => {
                config.base_specs.insert(handler.to_owned(), PathBuf::from(path));
            }
            (Some("--runtime"), Some((handler, path))) => {
                config.runtime_handlers.insert(handler.to_owned(), PathBuf::from(path));
            }
            // Nothing where there is none.
            (Some("--criu"), _) => config.criu = Some(PathBuf::from(value)).filter(|p| p.is_file()),
            _ => return Err(format!("{flag:?} {text:?}: not understood")),
        }
    }
    if !cdi_dirs.is_empty() {
        config.cdi_dirs = cdi_dirs;
    }
    Ok(config)
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
