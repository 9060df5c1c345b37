//! What the tests' drivers (a CSI driver, a device plugin, a DRA driver) have in common: files in their folder tell
//! them to misbehave, they write down what they were asked, and they answer in the registry of plugins.

use std::fs;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context as _;
use serde_json::{Value, json};
use tokio::net::UnixListener;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::{Code, Request, Response, Status};

use registration::registration_server::{Registration, RegistrationServer};

/// The generated messages of plugin registration.
#[allow(clippy::all, clippy::pedantic, missing_docs, dead_code, reason = "generated code")]
pub mod registration {
    tonic::include_proto!("pluginregistration");
}

/// How often a driver looks at its files.
pub const TICK: Duration = Duration::from_millis(20);

/// A driver's folder.
#[derive(Clone, Debug)]
pub struct Script(pub PathBuf);

impl Script {
    /// Writes down a call, then fails or hangs as a file `fail-VERB` (a gRPC code and words) or
    /// `hang-VERB` says.
    ///
    /// # Errors
    /// What the file says, or the file system.
    pub async fn begin(&self, verb: &str, mut call: Value) -> Result<(), Status> {
        call["verb"] = verb.into();
        let mut log =
            fs::OpenOptions::new().create(true).append(true).open(self.0.join("calls.jsonl"))?;
        writeln!(log, "{call}")?;
        while self.0.join(format!("hang-{verb}")).exists() {
            tokio::time::sleep(TICK).await;
        }
        if let Ok(text) = fs::read_to_string(self.0.join(format!("fail-{verb}"))) {
            let (code, words) = text.split_once(' ').unwrap_or((&text, ""));
            let code = Code::from_i32(code.trim().parse().unwrap_or(13));
            return Err(Status::new(code, words.trim()));
        }
        Ok(())
    }
}

/// Listens at `socket`, in the place of whoever did before.
///
/// # Errors
/// What the file system says.
pub fn listen(socket: &Path) -> anyhow::Result<UnixListenerStream> {
    match fs::remove_file(socket) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error.into()),
        _ => {}
    }
    let listener =
        UnixListener::bind(socket).with_context(|| format!("bind {}", socket.display()))?;
    Ok(UnixListenerStream::new(listener))
}

/// Answers in the registry of plugins.
#[derive(Debug)]
pub struct Registrar {
    script: Script,
    info: registration::PluginInfo,
}

impl Registrar {
    /// A service that says `info` of the driver.
    pub fn service(script: Script, info: registration::PluginInfo) -> RegistrationServer<Self> {
        RegistrationServer::new(Self { script, info })
    }
}

#[tonic::async_trait]
impl Registration for Registrar {
    async fn get_info(
        &self,
        _: Request<registration::InfoRequest>,
    ) -> Result<Response<registration::PluginInfo>, Status> {
        Ok(Response::new(self.info.clone()))
    }

    async fn notify_registration_status(
        &self,
        request: Request<registration::RegistrationStatus>,
    ) -> Result<Response<registration::RegistrationStatusResponse>, Status> {
        let status = request.into_inner();
        let told = json!({"registered": status.plugin_registered, "error": status.error});
        self.script.begin("notify", told).await?;
        Ok(Response::new(registration::RegistrationStatusResponse {}))
    }
}
