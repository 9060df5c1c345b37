//! `longshore join`: joins this machine to a cluster by bootstrap token.
//!
//! kubeadm's `JoinConfiguration` may say what the flags do not.

use std::io::{Read, Write};
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context as _;
use clap::Args;
use serde_json::json;

use super::{Output, UsageError, flags};
use crate::doctor::processes;
use crate::join::adopt::{self, AdoptRequest};
use crate::join::error::EXIT_CODES;
use crate::join::files::Paths;
use crate::join::kubeadm::JoinConfiguration;
use crate::join::systemd::{self, UnitOutcome};
use crate::join::token::BootstrapToken;
use crate::join::verify::CaPin;
use crate::join::{Discovery, JoinError, JoinRequest, Joined, Progress, discover, join};

/// Longest token file that is read; a token has 23 characters.
const TOKEN_FILE_LIMIT: u64 = 4096;

/// Arguments of `longshore join`, under kubeadm's names.
#[derive(Debug, Args)]
#[command(after_help = EXIT_CODES)]
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
    /// kubeconfig with the cluster's address and CA, instead of HOST:PORT and hashes: a file or an
    /// https:// address
    #[arg(long, value_name = "FILE|URL", conflicts_with_all = ["address", "discovery_token", "discovery_token_ca_cert_hash"])]
    discovery_file: Option<String>,
    /// File with kubeadm's JoinConfiguration; flags win over it
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Folder of kubeadm's patches (kubeletconfiguration*.yaml) to the cluster's KubeletConfiguration
    #[arg(long, value_name = "DIR")]
    patches: Option<PathBuf>,
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
    /// Take over the node of the kubeadm worker that this machine is: same credentials, same Node
    /// object, same runtime, pods untouched
    #[arg(long, conflicts_with_all = ["address", "token", "token_file", "discovery_token", "discovery_file", "tls_bootstrap_token", "config", "patches", "node_name", "node_ip"])]
    adopt: bool,
    /// Only write the files; `longshore run` starts from them
    #[arg(long)]
    no_start: bool,
    /// How long to wait for an API server that is away or not ready, in seconds [default: 15]
    #[arg(long, value_name = "SECONDS")]
    discovery_timeout: Option<u64>,
    /// How long to wait for the certificate, in seconds [default: 300]
    #[arg(long, value_name = "SECONDS")]
    timeout: Option<u64>,
}

/// How long the certificate is waited for.
const TIMEOUT: Duration = Duration::from_secs(300);

/// Runs `longshore join`.
pub(super) fn run(args: JoinArgs, output: Output) -> anyhow::Result<()> {
    let no_start = args.no_start;
    let progress = |line: &str| {
        if output == Output::Text {
            eprintln!("[join] {line}");
        }
    };
    if args.adopt {
        return super::command_runtime()?.block_on(take_over(args, output, &progress));
    }
    let mut request = request(args)?;
    request.warnings.extend(rivals(request.container_runtime_endpoint.as_deref()));
    super::command_runtime()?.block_on(async {
        let joined = tokio::select! {
            joined = join(&request, &progress) => joined.map_err(failed)?,
            _ = tokio::signal::ctrl_c() => anyhow::bail!("interrupted; nothing is half done: run the same join again"),
        };
        start(&joined, &request.paths, no_start, output, &progress).await
    })
}

/// Programs on this machine that a node would clash with; `endpoint` is the runtime in use.
fn rivals(endpoint: Option<&str>) -> Vec<String> {
    let found = processes::plan_processes(&processes::gather(), endpoint, false);
    let clashing = found.into_iter().filter_map(|f| Some(format!("{}; {}", f.message, f.remedy?)));
    clashing.collect()
}

fn failed(error: JoinError) -> anyhow::Error {
    let code = error.exit_code();
    anyhow::Error::new(error).context(super::Exit(code))
}

/// Starts the unit unless it is not to be, and tells what was done.
async fn start(
    joined: &Joined,
    paths: &Paths,
    no_start: bool,
    output: Output,
    progress: Progress<'_>,
) -> anyhow::Result<()> {
    let unit = if no_start {
        None
    } else {
        progress("enabling and starting the systemd unit");
        Some(systemd::enable_and_start().await)
    };
    report(paths, joined, unit.as_ref(), output)?;
    match unit {
        Some(UnitOutcome::Failed(cause)) => Err(anyhow::anyhow!(
            "the node has its credentials, but its service did not start: {cause}; see \
             `journalctl -u {}`",
            systemd::UNIT
        )),
        _ => Ok(()),
    }
}

/// `--adopt`.
async fn take_over(args: JoinArgs, output: Output, progress: Progress<'_>) -> anyhow::Result<()> {
    let request = AdoptRequest {
        paths: Paths {
            kubernetes_dir: std::path::absolute(args.kubernetes_dir)?,
            root_dir: std::path::absolute(args.root_dir)?,
        },
        extra_args: ["/etc/default/kubelet", "/etc/sysconfig/kubelet"].map(PathBuf::from).into(),
        container_runtime_endpoint: args.container_runtime_endpoint,
        discovery_timeout: args.discovery_timeout.map_or(discover::PATIENCE, Duration::from_secs),
    };
    let processes = processes::gather();
    let stop = adopt::plan_takeover(&processes, systemd::booted()).map_err(failed)?;
    let joined = adopt::adopt(&request, flags::of_kubelet, progress).await.map_err(failed)?;
    // Last, so that the node is without an agent for a moment only.
    if stop && !args.no_start {
        progress("stopping kubelet");
        if let UnitOutcome::Failed(cause) = systemd::retire_kubelet().await {
            anyhow::bail!("kubelet does not stop: {cause}; stop it and run the same again");
        }
    }
    start(&joined, &request.paths, args.no_start, output, progress).await
}

fn usage(text: impl Into<String>) -> anyhow::Error {
    UsageError(text.into()).into()
}

fn request(args: JoinArgs) -> anyhow::Result<JoinRequest> {
    let file = match &args.config {
        Some(path) => {
            let text =
                std::fs::read(path).with_context(|| format!("read --config {}", path.display()))?;
            JoinConfiguration::parse(&text, &path.display().to_string())?
        }
        None => JoinConfiguration::default(),
    };
    let by_token = file.discovery.bootstrap_token.clone().unwrap_or_default();
    let shared = match (&args.token, &args.token_file) {
        (Some(token), _) if token == "-" => Some(read_token(&PathBuf::from("-"))?),
        (Some(token), _) => Some(token.clone()),
        (None, Some(file)) => Some(read_token(file)?),
        (None, None) => None,
    };
    let parse = |text: Option<String>| -> anyhow::Result<Option<BootstrapToken>> {
        text.filter(|t| !t.is_empty())
            .map(|t| BootstrapToken::parse(&t).map_err(|e| usage(e.to_string())))
            .transpose()
    };
    let bootstrap_token = parse(
        args.tls_bootstrap_token
            .or_else(|| shared.clone())
            .or(file.discovery.tls_bootstrap_token.clone())
            .or(by_token.token.clone()),
    )?;
    // Where the flags say by which way, the file's other way is not taken.
    let by_file = args.discovery_file.or_else(|| {
        let file = file.discovery.file.as_ref().map(|f| f.kube_config_path.clone());
        file.filter(|_| args.address.is_none())
    });
    let discovery = match by_file {
        Some(url) if url.starts_with("https://") => Discovery::Url(url),
        Some(url) if url.contains("://") => {
            return Err(usage(format!(
                "{url}: a discovery file comes from a path or by https://, where nobody on the way \
                 can change it"
            )));
        }
        Some(file) => Discovery::File(file.into()),
        None => {
            let Some(address) = args.address.or(by_token.api_server_endpoint) else {
                return Err(usage(
                    "say where the API server is: longshore join HOST:PORT --token ...",
                ));
            };
            let Some(token) = parse(args.discovery_token.or(shared).or(by_token.token))? else {
                return Err(usage(
                    "a bootstrap token is needed: --token, --token-file, or `--token -` to read it \
                     from stdin; `kubeadm token create --print-join-command` prints one",
                ));
            };
            let given = &args.discovery_token_ca_cert_hash;
            let hashes = if given.is_empty() { &by_token.ca_cert_hashes } else { given };
            let pins = hashes
                .iter()
                .map(|hash| CaPin::parse(hash).map_err(|e| usage(e.to_string())))
                .collect::<Result<Vec<_>, _>>()?;
            let skip = args.discovery_token_unsafe_skip_ca_verification
                || by_token.unsafe_skip_ca_verification;
            if pins.is_empty() && !skip {
                return Err(usage(
                    "pin the cluster's CA with --discovery-token-ca-cert-hash sha256:<hash> (printed \
                     by `kubeadm token create --print-join-command`), or say \
                     --discovery-token-unsafe-skip-ca-verification",
                ));
            }
            Discovery::Token { address: checked_address(&address)?, token, pins }
        }
    };
    let (kubelet_flags, warnings) = flags::of_kubelet(&file.kubelet_arguments());
    let registration = file.node_registration;
    let node_name = match args.node_name.or(registration.name) {
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
    let folder = args.patches.or(file.patches.and_then(|p| p.directory));
    let patches = match folder.filter(|folder| !folder.as_os_str().is_empty()) {
        Some(folder) => crate::join::patches::read(&folder)?,
        None => Vec::new(),
    };
    let seconds = |flag: Option<u64>, file: Option<kube::core::Duration>, default: Duration| {
        let file = file.map(Duration::from).filter(|time| !time.is_zero());
        flag.map(Duration::from_secs).or(file).unwrap_or(default)
    };
    let timeouts = file.timeouts.unwrap_or_default();
    let discovery_timeout = timeouts.discovery.or(file.discovery.timeout);
    Ok(JoinRequest {
        discovery,
        bootstrap_token,
        node_name,
        node_ips: args.node_ip,
        container_runtime_endpoint: args
            .container_runtime_endpoint
            .or(registration.cri_socket.filter(|socket| !socket.is_empty())),
        paths: Paths {
            kubernetes_dir: std::path::absolute(args.kubernetes_dir)?,
            root_dir: std::path::absolute(args.root_dir)?,
        },
        ca_cert_path: file.ca_cert_path.filter(|path| !path.as_os_str().is_empty()),
        patches,
        kubelet_flags,
        discovery_timeout: seconds(args.discovery_timeout, discovery_timeout, discover::PATIENCE),
        timeout: seconds(args.timeout, timeouts.tls_bootstrap, TIMEOUT),
        warnings,
    })
}

/// `HOST:PORT`, also with `https://` before it; the port defaults to 6443.
pub(super) fn checked_address(text: &str) -> anyhow::Result<String> {
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
    paths: &Paths,
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
            "node": joined.node_name, "server": joined.server, "alreadyJoined": joined.already, "adopted": joined.adopted,
            "kubeconfig": paths.kubelet_conf(), "warnings": joined.warnings, "unit": unit,
        });
        writeln!(out, "{value}")?;
        return Ok(());
    }
    for warning in &joined.warnings {
        eprintln!("[join] warning: {warning}");
    }
    let (node, server) = (&joined.node_name, &joined.server);
    if joined.adopted {
        writeln!(out, "node {node} of {server} is taken over; its pods run on")?;
    } else if joined.already {
        writeln!(out, "node {node} has joined {server} already; its credentials are valid")?;
    } else {
        writeln!(out, "node {node} has joined {server}")?;
    }
    match unit {
        Some(UnitOutcome::Done) => writeln!(out, "{} runs; see `longshore status`", systemd::UNIT)?,
        Some(UnitOutcome::Failed(_)) => {}
        _ => {
            let (default, dir) = (PathBuf::from("/etc/kubernetes"), &paths.kubernetes_dir);
            if *dir == default {
                writeln!(out, "start it with: longshore run")?;
            } else {
                let conf = paths.kubelet_conf();
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
            ("--discovery-file http://h/x", "by https://"),
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
    fn a_join_configuration_says_what_flags_do_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("join.yaml");
        let text = format!(
            "apiVersion: kubeadm.k8s.io/v1beta4\nkind: JoinConfiguration\ndiscovery: {{bootstrapToken: \
             {{apiServerEndpoint: \"10.0.0.1:6443\", token: abcdef.0123456789abcdef, caCertHashes: \
             [\"{PIN}\"]}}, tlsBootstrapToken: fedcba.0123456789abcdef}}\nnodeRegistration: {{name: N1, \
             criSocket: \"unix:///x\", kubeletExtraArgs: [{{name: node-labels, value: a=b}}, {{name: \
             rotate-certificates, value: \"true\"}}, {{name: no-such, value: x}}]}}\ntimeouts: \
             {{tlsBootstrap: 7s}}\n"
        );
        std::fs::write(&path, text).unwrap();
        let request = parsed(&format!("--config {}", path.display())).unwrap();
        let Discovery::Token { address, pins, token } = &request.discovery else { unreachable!() };
        assert_eq!((address.as_str(), pins.len(), token.id()), ("10.0.0.1:6443", 1, "abcdef"));
        assert_eq!(request.bootstrap_token.as_ref().unwrap().id(), "fedcba");
        assert_eq!(request.node_name, "n1");
        assert_eq!(request.container_runtime_endpoint.as_deref(), Some("unix:///x"));
        let noted = ["--node-labels=a=b", "--rotate-certificates=true"];
        assert_eq!(request.kubelet_flags, noted);
        assert!(request.warnings.len() == 1 && request.warnings[0].contains("--no-such"));
        assert_eq!(request.timeout, Duration::from_secs(7));
        let request =
            parsed(&format!("--config {} --node-name n2 --timeout 9", path.display())).unwrap();
        assert_eq!((request.node_name.as_str(), request.timeout.as_secs()), ("n2", 9));
        let request = parsed(&format!("--config {} --discovery-file /d", path.display())).unwrap();
        assert!(matches!(request.discovery, Discovery::File(_)));
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
