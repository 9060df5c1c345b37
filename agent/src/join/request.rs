//! Gets a node's client certificate: creates the CSR and waits until it is approved and issued.

use std::time::Duration;

use k8s_openapi::api::certificates::v1::CertificateSigningRequest;
use kube::api::PostParams;
use kube::{Api, Client};
use tokio::time::Instant;

use super::csr::{self, NodeRequest};
use super::{JoinError, Progress};
use crate::api::backoff::Backoff;
use crate::api::watch::{Seen, Watch};
use crate::api::{self, REQUEST_TIMEOUT};

/// How long creating the request is tried again after a failure that may pass.
const PATIENCE: Duration = Duration::from_secs(20);
/// How often the person waiting is told what is being waited for.
const REMIND: Duration = Duration::from_secs(10);

/// Submits `request` for node `node_name` with `client` and waits up to `timeout`. Returns the
/// certificate chain, PEM.
pub async fn certificate(
    client: Client,
    node_name: &str,
    request: &NodeRequest,
    timeout: Duration,
    progress: Progress<'_>,
) -> Result<Vec<u8>, JoinError> {
    let requests: Api<CertificateSigningRequest> = Api::all(client);
    let name = request.object.metadata.name.clone().unwrap_or_default();
    create(&requests, &name, request, progress).await?;
    let deadline = Instant::now() + timeout;
    let mut watch = Watch::with_backoff(
        requests,
        &format!("metadata.name={name}"),
        Backoff::new(Duration::from_millis(300), Duration::from_secs(5)),
    );
    let mut stage = csr::Progress::WaitsForApproval;
    let mut remind = tokio::time::interval_at(Instant::now() + Duration::from_secs(2), REMIND);
    loop {
        let seen = tokio::select! {
            seen = watch.next() => seen,
            _ = remind.tick() => {
                progress(&waiting_for(&stage, &name));
                continue;
            }
            () = tokio::time::sleep_until(deadline) => {
                return Err(JoinError::NotIssued { name, seconds: timeout.as_secs() });
            }
        };
        match seen {
            Seen::Listed(object) | Seen::Applied(object) => match csr::progress(&object)? {
                csr::Progress::Issued(pem) => {
                    csr::check_issued(&name, &pem, node_name, &request.key_pem)?;
                    return Ok(pem);
                }
                new => stage = new,
            },
            Seen::Deleted(_) => return Err(JoinError::RequestGone { name }),
            Seen::Failed(failure) => progress(&format!("{}; trying again", failure.message)),
            Seen::Restarted | Seen::Complete => {}
        }
    }
}

fn waiting_for(stage: &csr::Progress, name: &str) -> String {
    match stage {
        csr::Progress::WaitsForApproval => format!(
            "waiting for approval of certificate request {name} (by hand: kubectl certificate \
             approve {name})"
        ),
        _ => format!("certificate request {name} is approved; waiting for the certificate"),
    }
}

async fn create(
    requests: &Api<CertificateSigningRequest>,
    name: &str,
    request: &NodeRequest,
    progress: Progress<'_>,
) -> Result<(), JoinError> {
    let started = Instant::now();
    let mut backoff = Backoff::new(Duration::from_millis(300), Duration::from_secs(3));
    let what = format!("create certificate request {name}");
    loop {
        let params = PostParams::default();
        let attempt = requests.create(&params, &request.object);
        let error = match api::timed(&what, REQUEST_TIMEOUT, attempt).await {
            Ok(_) => return Ok(()),
            Err(error) => error,
        };
        match error.code() {
            // Made by an earlier, interrupted join with the same key.
            Some(409) => return Ok(()),
            Some(401) => return Err(JoinError::TokenRefused),
            Some(403) => return Err(JoinError::MayNotRequest { cause: error }),
            Some(code) if code < 500 && code != 429 => return Err(error.into()),
            _ if started.elapsed() >= PATIENCE => return Err(error.into()),
            _ => {
                progress(&format!("{error}; trying again"));
                tokio::time::sleep(backoff.next_delay()).await;
            }
        }
    }
}
