//! `longshore explain`: what happens to packets of a Service, why a pod does not run or is not ready.
//! The running node answers both.

use std::io::Write;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use anyhow::Context;
use clap::{Args, Subcommand};

use super::{Output, UsageError, socket, unimplemented};
use crate::health::{EXPLAIN_PATH, PodQuestion, STATUS_SOCKET};
use crate::pod::explain::{Explanation, render};
use crate::proxy_api::{self, ExplainQuery};

/// Arguments of `longshore explain`.
#[derive(Debug, Args)]
pub struct ExplainArgs {
    #[command(subcommand)]
    topic: Topic,
}

#[derive(Debug, Subcommand)]
enum Topic {
    /// Which rule and which endpoints packets of a Service take, and why an endpoint is not used
    Service(ServiceArgs),
    /// Why a pod does not run or is not ready, from the agent's own plan
    Pod(PodArgs),
    /// A field or a reason
    #[command(external_subcommand)]
    Other(Vec<String>),
}

#[derive(Debug, Args)]
struct PodArgs {
    /// The pod; without a namespace, in `default`, or its UID
    #[arg(value_name = "NAMESPACE/NAME")]
    pod: String,
    /// The node's run directory
    #[arg(long, value_name = "DIR", default_value = "/run/longshore")]
    run_dir: PathBuf,
}

#[derive(Debug, Args)]
struct ServiceArgs {
    /// The Service; without a namespace, in `default`
    #[arg(value_name = "NAMESPACE/NAME")]
    service: String,
    /// Only for this client
    #[arg(long, value_name = "IP")]
    from: Option<IpAddr>,
    /// Only for this destination: a cluster, external or load-balancer IP, or a NodePort of the node
    #[arg(long, value_name = "IP:PORT")]
    to: Option<SocketAddr>,
    /// The node's run directory
    #[arg(long, value_name = "DIR", default_value = "/run/longshore")]
    run_dir: PathBuf,
}

/// Runs `longshore explain`.
pub(super) fn run(args: ExplainArgs, output: Output) -> anyhow::Result<()> {
    match args.topic {
        Topic::Service(args) => service(args, output),
        Topic::Pod(args) => pod(args, output),
        Topic::Other(topic) => Err(unimplemented(&format!("explain {}", topic.join(" ")))),
    }
}

/// Namespace and name of what is asked about; `complaint` says what it is not, if it is neither.
fn named<'a>(text: &'a str, complaint: &str) -> Result<(&'a str, &'a str), UsageError> {
    let (namespace, name) = text.split_once('/').unwrap_or(("default", text));
    if namespace.is_empty() || name.is_empty() || name.contains('/') {
        return Err(UsageError(format!("{text:?} {complaint}")));
    }
    Ok((namespace, name))
}

fn pod(args: PodArgs, output: Output) -> anyhow::Result<()> {
    let (namespace, name) = named(&args.pod, "is neither NAMESPACE/NAME nor the UID of a pod")?;
    let question = PodQuestion {
        namespace: namespace.to_owned(),
        name: name.to_owned(),
        maybe_uid: !args.pod.contains('/'),
    };
    let socket = args.run_dir.join(STATUS_SOCKET);
    let text = socket::post(&socket, EXPLAIN_PATH, serde_json::to_vec(&question)?)?;
    let mut out = std::io::stdout().lock();
    match output {
        Output::Json => writeln!(out, "{text}")?,
        Output::Text => {
            let explanation: Explanation =
                serde_json::from_str(&text).context("read the node's answer")?;
            out.write_all(render(&explanation).as_bytes())?;
        }
    }
    Ok(())
}

fn service(args: ServiceArgs, output: Output) -> anyhow::Result<()> {
    let (namespace, name) = named(&args.service, "is not NAMESPACE/NAME of a Service")?;
    let query = ExplainQuery {
        namespace: namespace.to_owned(),
        name: name.to_owned(),
        from: args.from,
        to: args.to,
        json: output == Output::Json,
    };
    let query = serde_json::to_vec(&query)?;
    let text = socket::post(&proxy_api::path(&args.run_dir), "/explain", query)?;
    writeln!(std::io::stdout().lock(), "{}", text.trim_end())?;
    Ok(())
}
