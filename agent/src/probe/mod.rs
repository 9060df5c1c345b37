//! Probes: is a container alive, ready, started?
//!
//! `check_*` ask once; `task` asks again and again and tells when the answer changes; `verdict` is
//! the arithmetic of thresholds between them.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::{ContainerPort, Probe};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

use crate::runtime::{Runtime, RuntimeErrorKind};

mod grpc;
pub mod http;
mod task;
pub mod verdict;

pub use task::{LastCheck, ProbeTarget, run_probe};

/// How a check went.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Healthy.
    Success,
    /// Healthy, with a remark for people.
    Warning(String),
    /// Not healthy; what was said.
    Failure(String),
    /// The check itself could not be made; counts for nothing.
    Unknown(String),
}

/// Most of an answer that is kept for a message, in bytes.
const MAX_OUTPUT: usize = 10 << 10;

/// A port by number, or by its name in the container.
pub fn resolve_port(port: &IntOrString, ports: &[ContainerPort]) -> Result<u16, String> {
    let number = match port {
        IntOrString::Int(number) => Some(*number),
        IntOrString::String(name) => match ports.iter().find(|p| p.name.as_ref() == Some(name)) {
            Some(found) => Some(found.container_port),
            None => name.parse().ok(),
        },
    };
    let text = || match port {
        IntOrString::Int(n) => n.to_string(),
        IntOrString::String(s) => format!("{s:?}"),
    };
    number
        .and_then(|n| u16::try_from(n).ok())
        .filter(|n| *n > 0)
        .ok_or_else(|| format!("invalid port: {}", text()))
}

/// Where a check is made.
#[derive(Clone)]
pub struct Place {
    /// The runtime, for exec.
    pub runtime: Arc<dyn Runtime>,
    /// The container's id in it.
    pub container_id: String,
    /// The pod's address.
    pub pod_ip: Option<IpAddr>,
    /// The container's ports, for those that go by name.
    pub ports: Vec<ContainerPort>,
}

/// Makes one check, which ends within the probe's timeout.
pub async fn check(place: &Place, probe: &Probe) -> Outcome {
    let seconds = probe.timeout_seconds.unwrap_or(1).max(1);
    let timeout = Duration::from_secs(u64::try_from(seconds).unwrap_or(1));
    if let Some(exec) = &probe.exec {
        return check_exec(place, exec.command.as_deref().unwrap_or_default(), timeout).await;
    }
    let network = async {
        if let Some(get) = &probe.http_get {
            let port = match resolve_port(&get.port, &place.ports) {
                Ok(port) => port,
                Err(error) => return Outcome::Unknown(error),
            };
            return http::check_http(get, port, place.pod_ip).await;
        }
        if let Some(tcp) = &probe.tcp_socket {
            let port = match resolve_port(&tcp.port, &place.ports) {
                Ok(port) => port,
                Err(error) => return Outcome::Unknown(error),
            };
            return check_tcp(tcp.host.as_deref(), place.pod_ip, port).await;
        }
        if let Some(grpc) = &probe.grpc {
            let service = grpc.service.as_deref().unwrap_or_default();
            return grpc::check_grpc(place.pod_ip, grpc.port, service).await;
        }
        Outcome::Unknown("the probe names no way to check".into())
    };
    match tokio::time::timeout(timeout, network).await {
        Ok(outcome) => outcome,
        Err(_) => Outcome::Failure(timeout_message(place, probe, timeout)),
    }
}

fn timeout_message(place: &Place, probe: &Probe, timeout: Duration) -> String {
    let ip = place.pod_ip.map(|ip| ip.to_string()).unwrap_or_default();
    let seconds = timeout.as_secs();
    match (&probe.http_get, &probe.tcp_socket, &probe.grpc) {
        (Some(get), ..) => {
            let path = get.path.as_deref().unwrap_or("/");
            format!(
                "Get \"{}{path}\": context deadline exceeded (no answer within {seconds}s)",
                http::base_url(get, &place.ports, place.pod_ip)
            )
        }
        (_, Some(_), _) => format!("dial tcp {ip}: i/o timeout ({seconds}s)"),
        (.., Some(grpc)) => {
            format!("timeout: failed to connect service \"{ip}:{}\" within {seconds}s", grpc.port)
        }
        _ => format!("no answer within {seconds}s"),
    }
}

/// Runs `command` in the container: healthy is exit code 0.
async fn check_exec(place: &Place, command: &[String], timeout: Duration) -> Outcome {
    match place.runtime.exec_sync(&place.container_id, command, timeout).await {
        Ok(output) => {
            let mut all = output.stdout;
            all.extend_from_slice(&output.stderr);
            all.truncate(MAX_OUTPUT);
            let text = String::from_utf8_lossy(&all).into_owned();
            if output.exit_code == 0 { Outcome::Success } else { Outcome::Failure(text) }
        }
        Err(error) => match error.kind {
            RuntimeErrorKind::Timeout => Outcome::Failure(format!(
                "command timed out: \"{}\" timed out after {}s",
                command.join(" "),
                timeout.as_secs()
            )),
            // A command that cannot be run is the container's fault, as in kubelet.
            RuntimeErrorKind::Failed => Outcome::Failure(error.message),
            _ => Outcome::Unknown(error.to_string()),
        },
    }
}

/// Healthy is a port that takes connections.
async fn check_tcp(host: Option<&str>, pod_ip: Option<IpAddr>, port: u16) -> Outcome {
    let host = match (host.filter(|h| !h.is_empty()), pod_ip) {
        (Some(host), _) => host.to_owned(),
        (None, Some(ip)) => ip.to_string(),
        (None, None) => return Outcome::Unknown("the pod has no address yet".into()),
    };
    match tokio::net::TcpStream::connect((host.as_str(), port)).await {
        Ok(_) => Outcome::Success,
        Err(error) => {
            let host = if host.contains(':') { format!("[{host}]") } else { host };
            Outcome::Failure(format!("dial tcp {host}:{port}: {error}"))
        }
    }
}
