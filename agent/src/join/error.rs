//! Why a machine does not join: for each reason its words, its remedy and its exit code.

use std::path::PathBuf;

use super::{csr, files, kubeadm, patches, token, verify};
use crate::api::{ApiError, tls};

/// Why a node did not join.
#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    /// The token has the wrong form.
    #[error(transparent)]
    Token(#[from] token::BadToken),
    /// Not the right cluster.
    #[error(transparent)]
    Verify(#[from] verify::VerifyError),
    /// No certificate.
    #[error(transparent)]
    Csr(#[from] csr::CsrError),
    /// Something on disk.
    #[error(transparent)]
    File(#[from] files::FileError),
    /// A document of kubeadm's.
    #[error(transparent)]
    Document(#[from] kubeadm::DocumentError),
    /// A patch of this node's own.
    #[error(transparent)]
    Patch(#[from] patches::PatchError),
    /// The API server.
    #[error(transparent)]
    Api(#[from] ApiError),
    /// No connection.
    #[error(
        "cannot reach the API server at {server}: {cause}; check the address, the network and \
         that the control plane runs (curl -k {server}/version)"
    )]
    Unreachable {
        /// Its URL.
        server: String,
        /// What the last try said.
        cause: String,
    },
    /// It answers, and cannot serve yet.
    #[error(
        "the API server at {server} answers but is not ready: {said}; wait until \
         `curl -k {server}/readyz` says ok and join again, or look at the logs of kube-apiserver \
         and etcd on the control plane"
    )]
    NotReady {
        /// Its URL.
        server: String,
        /// What it answers, with the checks that fail.
        said: String,
    },
    /// The clocks differ.
    #[error(
        "the clock of this machine is {} {} that of {server}: certificates and tokens would count \
         as expired or not yet valid; set the clock (timedatectl set-ntp true, or chronyc makestep) \
         and join again", span(*.seconds), if *.seconds > 0 { "behind" } else { "ahead of" }
    )]
    ClockSkew {
        /// Its URL.
        server: String,
        /// By how much the server is ahead.
        seconds: i64,
    },
    /// The server's certificate is not one to trust.
    #[error(
        "the certificate of the API server at {server} is not to be trusted: {cause}; {}",
        server_remedy(.fault)
    )]
    ServerCertificate {
        /// Its URL.
        server: String,
        /// What is wrong with it.
        fault: tls::Fault,
        /// In words.
        cause: String,
    },
    /// `cluster-info` may not be read.
    #[error(
        "{server} does not let anonymous clients read kube-public/cluster-info ({code}); join with \
         --discovery-file instead, or run `kubeadm init phase bootstrap-token` on the control plane"
    )]
    NoAnonymous {
        /// Its URL.
        server: String,
        /// HTTP status.
        code: u16,
    },
    /// There is no `cluster-info`.
    #[error(
        "{server} has no ConfigMap kube-public/cluster-info; run `kubeadm init phase \
         bootstrap-token` on the control plane, or join with --discovery-file"
    )]
    NoClusterInfo {
        /// Its URL.
        server: String,
    },
    /// Two reads of `cluster-info` differ.
    #[error(
        "cluster-info changed between two reads: try again; if it stays, somebody stands between"
    )]
    Changed,
    /// The discovery document cannot be had.
    #[error(
        "cannot read the discovery file from {url}: {cause}; check the address with `curl {url}`"
    )]
    DiscoveryUrl {
        /// Where it should be.
        url: String,
        /// Why not.
        cause: String,
    },
    /// The token does not authenticate.
    #[error(
        "the API server refused the bootstrap token (401): it has expired or is not for \
         authentication; `kubeadm token create --print-join-command` on the control plane makes a \
         new one"
    )]
    TokenRefused,
    /// The token may not ask for certificates.
    #[error(
        "{cause}; the token's group may not request node certificates: run `kubeadm init phase \
         bootstrap-token` on the control plane"
    )]
    MayNotRequest {
        /// What the server said.
        cause: ApiError,
    },
    /// Nobody approved in time.
    #[error(
        "certificate request {name} was not approved and issued within {seconds} s; approve it \
         with `kubectl certificate approve {name}` and run the same join again"
    )]
    NotIssued {
        /// CSR object.
        name: String,
        /// How long was waited.
        seconds: u64,
    },
    /// Somebody deleted the request.
    #[error("certificate request {name} was deleted before it was answered; run the join again")]
    RequestGone {
        /// CSR object.
        name: String,
    },
    /// A node of that name lives.
    #[error(
        "a node named {name} is in the cluster and Ready (at {address}): two machines under one \
         name would fight over its pods; give this machine another --node-name, or, if the node is \
         to be replaced, stop it and `kubectl delete node {name}` first"
    )]
    NameTaken {
        /// Node.
        name: String,
        /// Where it says it is.
        address: String,
    },
    /// This node belongs to another cluster or name.
    #[error("{} already holds credentials {of}; run `longshore reset` first", path.display())]
    AlreadyJoined {
        /// kubelet.conf.
        path: PathBuf,
        /// Whose.
        of: String,
    },
    /// Neither token nor file tells which cluster.
    #[error(
        "there is no token to authenticate with: give --token, --token-file or --tls-bootstrap-token"
    )]
    NoToken,
    /// There is nothing to adopt, or not in a state to be adopted.
    #[error("cannot adopt this machine's node: {cause}; {remedy}")]
    CannotAdopt {
        /// What is missing.
        cause: String,
        /// What to do.
        remedy: String,
    },
}

/// The exit codes of `longshore join`, for its help text.
pub const EXIT_CODES: &str = "\
Exit codes:
  0   joined, or joined already
  1   anything else (a file that cannot be written, ...)
  10  the API server cannot be reached
  11  the API server answers but is not ready
  12  the token has expired or is not known
  13  the signature is not this token's: wrong secret, or another cluster
  14  no CA matches the pins
  15  the clocks differ by more than 5 minutes
  16  the certificate request was denied, or the signer failed
  17  the certificate request was not answered in time
  18  a live node has this name
  19  this machine holds credentials of another node or cluster
  20  the cluster offers no cluster-info, or the discovery file cannot be used
  21  the API server's certificate is not to be trusted
  22  the token may not request certificates
  23  there is no node here that could be adopted
  64  bad usage";

impl JoinError {
    /// Exit code of `longshore join`; each reason that calls for another remedy has its own.
    pub fn exit_code(&self) -> u8 {
        use csr::CsrError;
        use verify::VerifyError;
        match self {
            Self::Unreachable { .. } => 10,
            Self::NotReady { .. } => 11,
            Self::TokenRefused | Self::Verify(VerifyError::UnknownToken { .. }) => 12,
            Self::Verify(VerifyError::BadSignature { .. }) | Self::Changed => 13,
            Self::Verify(VerifyError::PinMismatch { .. } | VerifyError::BadAuthority(_)) => 14,
            Self::ClockSkew { .. } => 15,
            Self::Csr(CsrError::Denied { .. } | CsrError::Failed { .. }) => 16,
            Self::NotIssued { .. } | Self::RequestGone { .. } => 17,
            Self::NameTaken { .. } => 18,
            Self::AlreadyJoined { .. } => 19,
            Self::NoAnonymous { .. }
            | Self::NoClusterInfo { .. }
            | Self::DiscoveryUrl { .. }
            | Self::Verify(VerifyError::NoKubeconfig) => 20,
            Self::ServerCertificate { .. } => 21,
            Self::MayNotRequest { .. } => 22,
            Self::CannotAdopt { .. } => 23,
            Self::Token(_) | Self::Verify(VerifyError::BadPin(_)) | Self::NoToken => 64,
            Self::Api(error) if error.code() == Some(401) => 12,
            Self::Api(error) if error.is_retryable() => 10,
            Self::Csr(CsrError::Make(_) | CsrError::Unusable { .. })
            | Self::File(_)
            | Self::Document(_)
            | Self::Patch(_)
            | Self::Api(_) => 1,
        }
    }
}

/// A span of time as people say it; the sign is left out.
fn span(seconds: i64) -> String {
    match seconds.unsigned_abs() {
        s @ ..120 => format!("{s} s"),
        s @ 120..7200 => format!("{} min", s / 60),
        s @ 7200..172_800 => format!("{} h", s / 3600),
        s => format!("{} days", s / 86_400),
    }
}

fn server_remedy(fault: &tls::Fault) -> &'static str {
    match fault {
        tls::Fault::Expired | tls::Fault::NotYetValid => {
            "renew it on the control plane (kubeadm certs renew apiserver) and restart kube-apiserver"
        }
        tls::Fault::WrongName => {
            "join by an address that the certificate is for, or add this one to apiServer.certSANs \
             (kubeadm init phase certs apiserver)"
        }
        tls::Fault::UnknownIssuer | tls::Fault::Other => {
            "this is not the cluster that the token or the discovery file is for, or somebody stands \
             between"
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn each_reason_has_its_own_code_and_every_code_is_explained() {
        let server = || "https://h:6443".to_owned();
        let name = || "n".to_owned();
        let errors = [
            JoinError::Unreachable { server: server(), cause: name() },
            JoinError::NotReady { server: server(), said: name() },
            JoinError::TokenRefused,
            verify::VerifyError::BadSignature { id: name() }.into(),
            verify::VerifyError::PinMismatch { found: name() }.into(),
            JoinError::ClockSkew { server: server(), seconds: -7200 },
            csr::CsrError::Denied { name: name(), message: name() }.into(),
            JoinError::NotIssued { name: name(), seconds: 1 },
            JoinError::NameTaken { name: name(), address: name() },
            JoinError::AlreadyJoined { path: "/x".into(), of: name() },
            JoinError::NoClusterInfo { server: server() },
            JoinError::ServerCertificate {
                server: server(),
                fault: tls::Fault::Expired,
                cause: name(),
            },
            JoinError::CannotAdopt { cause: name(), remedy: name() },
        ];
        let codes: Vec<u8> = errors.iter().map(JoinError::exit_code).collect();
        let mut unique = codes.clone();
        unique.dedup();
        assert_eq!(codes, unique);
        for code in codes {
            assert!(EXIT_CODES.contains(&format!("\n  {code}  ")), "{code}");
        }
        let unknown = verify::VerifyError::UnknownToken { id: name() };
        assert_eq!(JoinError::from(unknown).exit_code(), 12);
    }

    #[test]
    fn a_skew_says_which_clock_is_where() {
        let skew = |seconds| JoinError::ClockSkew { server: "s".to_owned(), seconds }.to_string();
        assert!(skew(600).contains("is 10 min behind that of s"), "{}", skew(600));
        assert!(skew(-259_200).contains("is 3 days ahead of that of s"), "{}", skew(-259_200));
    }
}
