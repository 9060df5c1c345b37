//! The shim's end of the zygote: starts it, asks it for monitors, starts another when it is gone.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crate::monitor::frame;
use crate::monitor::protocol::{Reply, Request, SpawnMonitor, Spawned, ZygoteRequest};

/// How long a monitor may take to end that has no container yet.
const PATIENCE: Duration = Duration::from_secs(5);

/// The zygote of this shim.
#[derive(Clone)]
pub struct Zygote {
    exe: PathBuf,
    process: Arc<Mutex<Option<Process>>>,
}

struct Process {
    child: Child,
    requests: UnixStream,
}

impl Drop for Process {
    fn drop(&mut self) {
        // The end of its standard input ends it; wait, so that it leaves no zombie.
        let _ = self.requests.shutdown(std::net::Shutdown::Both);
        let _ = self.child.wait();
    }
}

impl Zygote {
    /// Starts the zygote.
    pub fn start(exe: PathBuf) -> io::Result<Self> {
        let process = execute(&exe)?;
        Ok(Zygote { exe, process: Arc::new(Mutex::new(Some(process))) })
    }

    /// Forks a monitor and returns once it listens.
    pub async fn spawn(&self, spawn: SpawnMonitor) -> io::Result<()> {
        self.ask(ZygoteRequest::Spawn(Box::new(spawn))).await
    }

    /// Tries whether pods can have user namespaces.
    ///
    /// # Errors
    /// What is missing.
    pub async fn probe_userns(&self, layers: PathBuf, area: PathBuf) -> io::Result<()> {
        self.ask(ZygoteRequest::ProbeUserns { layers, area }).await
    }

    async fn ask(&self, request: ZygoteRequest) -> io::Result<()> {
        let this = self.clone();
        tokio::task::spawn_blocking(move || this.ask_blocking(&request))
            .await
            .map_err(io::Error::other)?
    }

    fn ask_blocking(&self, request: &ZygoteRequest) -> io::Result<()> {
        let mut process = self.process.lock().unwrap_or_else(PoisonError::into_inner);
        let mut last = None;
        for _ in 0..2 {
            if process.is_none() {
                *process = Some(execute(&self.exe)?);
            }
            let Some(running) = process.as_ref() else { continue };
            let answer = frame::send(&running.requests, request, &[])
                .and_then(|()| frame::receive::<Spawned>(&running.requests));
            match answer {
                Ok(Some(spawned)) if spawned.error.is_empty() => return Ok(()),
                Ok(Some(spawned)) => return Err(io::Error::other(spawned.error)),
                Ok(None) => last = Some(io::Error::other("the zygote ended")),
                Err(error) => last = Some(error),
            }
            *process = None;
            if let ZygoteRequest::Spawn(spawn) = request {
                end_untold(&spawn.socket);
            }
        }
        Err(last.unwrap_or_else(|| io::Error::other("no zygote")))
    }
}

/// Ends the monitor that a zygote forked and did not live to tell of: the next one's socket takes
/// the place of its own, and nobody could reach it any more.
fn end_untold(socket: &Path) {
    // Nobody listens unless the zygote died between the two.
    let Ok(monitor) = UnixStream::connect(socket) else { return };
    let _ = monitor.set_read_timeout(Some(PATIENCE));
    let _ = frame::send(&monitor, &Request::Exit { force: true }, &[]);
    while let Ok(Some(_)) = frame::receive::<Reply>(&monitor) {}
}

fn execute(exe: &PathBuf) -> io::Result<Process> {
    let (requests, theirs) = UnixStream::pair()?;
    let child = Command::new(exe)
        .arg0("longshore")
        .arg("monitor")
        .stdin(Stdio::from(OwnedFd::from(theirs)))
        .spawn()?;
    Ok(Process { child, requests })
}
