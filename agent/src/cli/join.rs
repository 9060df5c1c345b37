//! `longshore join`: joins this machine to a cluster by bootstrap token.

use std::io::{Read, Write};
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use serde_json::json;

use super::{Output, UsageError};
use crate::join::files::Paths;
use crate::join::systemd::{self, UnitOutcome};
use crate::join::token::BootstrapToken;
use crate::join::verify::CaPin;
use crate::join::{Discovery, JoinRequest, Joined, join};

/// Longest token file that is read; a token has 23 characters.
const TOKEN_FILE_LIMIT: u64 = 4096;

/// Arguments of `longshore join`, under kubeadm's names.
#[derive(Debug, Args)]
pub struct JoinArgs {
    /// Address of the API server
    #[arg(value_name = "HOST:PORT")]
    address: Option<String>,
    /// Bootstrap token, for discovery and for the certificate request (`-` reads it from stdin)
    #[arg(long, value_name = "TOKEN", hide_env_values = true)]
    token: Option<String>,
    /// File with the bootstrap token, so that it is not on the command line (`-` reads stdin)
    #[arg(long, value_name = "FILE", conflicts_with = "token")]
    token_file: Option<PathBuf>,
    /// Token for discovery only
    #[arg(long, value_name = "TOKEN")]
    discovery_token: Option<String>,
    /// Token for the certificate request only
    #[arg(long, value_name = "TOKEN")]
    tls_bootstrap_token: Option<String>,
    /// Pinned public key of the cluster's CA, sha256:<hex> (may be given several times)
    #[arg(long, value_name = "HASH", value_delimiter = ',')]
    discovery_token_ca_cert_hash: Vec<String>,
    /// Join without pinning the CA: whoever knows the token could pose as the control plane
    #[arg(long)]
    discovery_token_unsafe_skip_ca_verification: bool,
    /// kubeconfig with the cluster's address and CA, instead of HOST:PORT and hashes
    #[arg(long, value_name = "FILE", conflicts_with_all = ["address", "discovery_token", "discovery_token_ca_cert_hash"])]
    discovery_file: Option<PathBuf>,
    /// Name of the node [default: the hostname]
    #[arg(long, value_name = "NAME", visible_alias = "hostname-override")]
    node_name: Option<String>,
    /// Address (or one of each family) that the node is known by
    #[arg(long, value_name = "IP", value_delimiter = ',')]
    node_ip: Vec<IpAddr>,
    /// Directory of pods and certificates
    #[arg(long, value_name = "DIR", default_value = "/var/lib/kubelet")]
    root_dir: PathBuf,
    /// Directory of kubelet.conf
    #[arg(long, value_name = "DIR", default_value = "/etc/kubernetes")]
    kubernetes_dir: PathBuf,
    /// CRI endpoint to use instead of the built-in runtime
    #[arg(long, value_name = "ENDPOINT", visible_alias = "cri-socket")]
    container_runtime_endpoint: Option<String>,
    /// Only write the files; `longshore run` starts from them
    #[arg(long)]
    no_start: bool,
    /// How long to wait for the certificate, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 300)]
    timeout: u64,
}

/// Runs `longshore join`.
pub(super) fn run(args: JoinArgs, output: Output) -> anyhow::Result<()> {
    let no_start = args.no_start;
    let request = request(args)?;
    let progress = |line: &str| {
        if output == Output::Text {
            eprintln!("[join] {line}");
        }
    };
    super::command_runtime()?.block_on(async {
        let joined = tokio::select! {
            joined = join(&request, &progress) => joined?,
            _ = tokio::signal::ctrl_c() => anyhow::bail!("interrupted; nothing is half done: run the same join again"),
        };
        let unit = if no_start {
            None
        } else {
            progress("enabling and starting the systemd unit");
            Some(systemd::enable_and_start().await)
        };
        report(&request, &joined, unit.as_ref(), output)?;
        match unit {
            Some(UnitOutcome::Failed(cause)) => Err(anyhow::anyhow!(
                "the node has its credentials, but its service did not start: {cause}; see \
                 `journalctl -u {}`", systemd::UNIT
            )),
            _ => Ok(()),
        }
    })
}

fn usage(text: impl Into<String>) -> anyhow::Error {
    UsageError(text.into()).into()
}

fn request(args: JoinArgs) -> anyhow::Result<JoinRequest> {
    let shared = match (&args.token, &args.token_file) {
        (Some(token), _) if token == "-" => Some(read_token(&PathBuf::from("-"))?),
        (Some(token), _) => Some(token.clone()),
        (None, Some(file)) => Some(read_token(file)?),
        (None, None) => None,
    };
    let parse = |text: Option<String>| -> anyhow::Result<Option<BootstrapToken>> {
        text.map(|t| BootstrapToken::parse(&t).map_err(|e| usage(e.to_string()))).transpose()
    };
    let bootstrap_token = parse(args.tls_bootstrap_token.or_else(|| shared.clone()))?;
    let discovery = match args.discovery_file {
        Some(file) => Discovery::File(file),
        None => {
            let Some(address) = args.address else {
                return Err(usage(
                    "say where the API server is: longshore join HOST:PORT --token ...",
                ));
            };
            let Some(token) = parse(args.discovery_token.or(shared))? else {
                return Err(usage(
                    "a bootstrap token is needed: --token, --token-file, or `--token -` to read it \
                     from stdin; `kubeadm token create --print-join-command` prints one",
                ));
            };
            let pins = args
                .discovery_token_ca_cert_hash
                .iter()
                .map(|hash| CaPin::parse(hash).map_err(|e| usage(e.to_string())))
                .collect::<Result<Vec<_>, _>>()?;
            if pins.is_empty() && !args.discovery_token_unsafe_skip_ca_verification {
                return Err(usage(
                    "pin the cluster's CA with --discovery-token-ca-cert-hash sha256:<hash> (printed \
                     by `kubeadm token create --print-join-command`), or say \
                     --discovery-token-unsafe-skip-ca-verification",
                ));
            }
            Discovery::Token { address: checked_address(&address)?, token, pins }
        }
    };
    let node_name = match args.node_name {
        Some(name) => name,
        None => nix::unistd::gethostname()?.to_string_lossy().into_owned(),
    };
    let node_name = node_name.trim().to_lowercase();
    if !is_dns_subdomain(&node_name) {
        return Err(usage(format!(
            "`{node_name}` cannot be a node's name (lower-case letters, digits, `-` and `.`, at \
             most 253 characters): give --node-name"
        )));
    }
    Ok(JoinRequest {
        discovery,
        bootstrap_token,
        node_name,
        node_ips: args.node_ip,
        container_runtime_endpoint: args.container_runtime_endpoint,
        paths: Paths {
            kubernetes_dir: std::path::absolute(args.kubernetes_dir)?,
            root_dir: std::path::absolute(args.root_dir)?,
        },
        timeout: Duration::from_secs(args.timeout),
    })
}

/// `HOST:PORT`, also with `https://` before it; the port defaults to 6443.
fn checked_address(text: &str) -> anyhow::Result<String> {
    let host = text.strip_prefix("https://").unwrap_or(text).trim_end_matches('/');
    let bare_v6 = host.parse::<std::net::Ipv6Addr>().is_ok();
    let with_port = match host.rsplit_once(':') {
        _ if bare_v6 => format!("[{host}]:6443"),
        Some((_, port)) if !host.ends_with(']') => {
            port.parse::<u16>().map_err(|_| usage(format!("`{text}` is not HOST:PORT")))?;
            host.to_owned()
        }
        _ => format!("{host}:6443"),
    };
    let fits = format!("https://{with_port}")
        .parse::<hyper::Uri>()
        .is_ok_and(|uri| uri.host().is_some_and(|h| !h.is_empty()) && uri.path() == "/");
    if fits { Ok(with_port) } else { Err(usage(format!("`{text}` is not HOST:PORT"))) }
}

fn is_dns_subdomain(name: &str) -> bool {
    let label = |l: &str| {
        !l.is_empty()
            && l.len() <= 63
            && l.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
            && !l.starts_with('-')
            && !l.ends_with('-')
    };
    name.len() <= 253 && name.split('.').all(label)
}

fn read_token(file: &PathBuf) -> anyhow::Result<String> {
    let mut text = String::new();
    if file.as_os_str() == "-" {
        std::io::stdin().lock().take(TOKEN_FILE_LIMIT).read_to_string(&mut text)?;
    } else {
        std::fs::File::open(file)
            .and_then(|f| f.take(TOKEN_FILE_LIMIT).read_to_string(&mut text))
            .map_err(|e| anyhow::anyhow!("cannot read the token from {}: {e}", file.display()))?;
    }
    Ok(text.trim().to_owned())
}

fn report(
    request: &JoinRequest,
    joined: &Joined,
    unit: Option<&UnitOutcome>,
    output: Output,
) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    if output == Output::Json {
        let unit = match unit {
            None => "not asked",
            Some(UnitOutcome::Done) => "started",
            Some(UnitOutcome::NoSystemd) => "no systemd",
            Some(UnitOutcome::NoUnit) => "not installed",
            Some(UnitOutcome::Failed(_)) => "failed",
        };
        let value = json!({
            "node": joined.node_name, "server": joined.server, "alreadyJoined": joined.already,
            "kubeconfig": request.paths.kubelet_conf(), "warnings": joined.warnings, "unit": unit,
        });
        writeln!(out, "{value}")?;
        return Ok(());
    }
    for warning in &joined.warnings {
        eprintln!("[join] warning: {warning}");
    }
    let (node, server) = (&joined.node_name, &joined.server);
    if joined.already {
        writeln!(out, "node {node} has joined {server} already; its credentials are valid")?;
    } else {
        writeln!(out, "node {node} has joined {server}")?;
    }
    match unit {
        Some(UnitOutcome::Done) => writeln!(out, "{} runs; see `longshore status`", systemd::UNIT)?,
        Some(UnitOutcome::Failed(_)) => {}
        _ => {
            let (default, dir) = (PathBuf::from("/etc/kubernetes"), &request.paths.kubernetes_dir);
            if *dir == default {
                writeln!(out, "start it with: longshore run")?;
            } else {
                let conf = request.paths.kubelet_conf();
                writeln!(out, "start it with: longshore run --kubeconfig {}", conf.display())?;
            }
        }
    }
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        args: JoinArgs,
    }

    fn parsed(line: &str) -> anyhow::Result<JoinRequest> {
        let line = format!("join {line}").replace("TOKEN", "abcdef.0123456789abcdef");
        request(Line::try_parse_from(line.split_whitespace())?.args)
    }

    const PIN: &str = "sha256:ea993333e16bec1031d492f76ec6e98c01f4389f9a3c04914f0805f712678bb8";

    #[test]
    fn the_line_that_kubeadm_prints_is_taken() {
        let line = format!("10.0.0.1:6443 --token TOKEN --discovery-token-ca-cert-hash {PIN}");
        let request = parsed(&line).unwrap();
        let Discovery::Token { address, pins, .. } = request.discovery else { unreachable!() };
        assert_eq!((address.as_str(), pins.len()), ("10.0.0.1:6443", 1));
        assert!(request.bootstrap_token.is_some());
    }

    #[test]
    fn what_is_missing_or_malformed_is_named() {
        for (line, says) in [
            ("--token TOKEN", "where the API server is"),
            ("h:1 --token TOKEN", "pin the cluster's CA"),
            ("h:1", "a bootstrap token is needed"),
            ("h:1 --token nonsense", "not of the form"),
            ("h:1 --token TOKEN --discovery-token-ca-cert-hash sha256:12", "sha256:<64 hex"),
            ("h:99999 --token TOKEN --discovery-token-unsafe-skip-ca-verification", "HOST:PORT"),
            (
                "h:1 --token TOKEN --discovery-token-unsafe-skip-ca-verification --node-name a_b",
                "cannot be a node's name",
            ),
        ] {
            let error = parsed(line).err().unwrap();
            assert!(error.to_string().contains(says), "{line}: {error}");
            assert!(error.is::<UsageError>(), "{line}");
        }
    }

    #[test]
    fn addresses_may_leave_out_the_port() {
        for (text, address) in [
            ("h", "h:6443"),
            ("https://h:1/", "h:1"),
            ("fd00::1", "[fd00::1]:6443"),
            ("[fd00::1]:7", "[fd00::1]:7"),
            ("[fd00::1]", "[fd00::1]:6443"),
        ] {
            assert_eq!(checked_address(text).unwrap(), address);
        }
        for bad in ["", ":6443", "h:x", "a b:1", "h:1/path"] {
            assert!(checked_address(bad).is_err(), "{bad}");
        }
    }
}
