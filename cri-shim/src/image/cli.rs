//! What `longshore image …` does, as data: the binary prints it.
//!
//! Pull, list and remove go over the CRI socket, to whatever runtime serves it. The CRI has no
//! import and no pinning, so those verbs work on the store itself; a running shim looks at the index
//! again with every question and sees the change at once.

use std::{path::Path, time::Duration};

use hyper_util::rt::TokioIo;
use tonic::transport::{Channel, Endpoint};

use super::{ImageError, ImageStore, ImportSource, PullProgress, StoreConfig};
use crate::api::{
    AuthConfig, ImageSpec, ImageStatusRequest, ListImagesRequest, PullImageRequest,
    RemoveImageRequest, image_service_client::ImageServiceClient,
};

/// A verb that failed.
#[derive(Debug, thiserror::Error)]
pub enum CliError {
    /// The store.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The runtime can't be reached.
    #[error("connect to the container runtime at {socket}: {reason}; is `longshore run` running?")]
    Connect {
        /// The endpoint.
        socket: String,
        /// Why.
        reason: String,
    },
    /// The runtime refused.
    #[error("{0}")]
    Runtime(String),
}

/// One image, for a table or JSON.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct ImageRow {
    /// The image's id.
    pub id: String,
    /// Its names.
    pub tags: Vec<String>,
    /// Its names by digest.
    pub digests: Vec<String>,
    /// Bytes on disk.
    pub size: u64,
    /// Never garbage-collected.
    pub pinned: bool,
}

/// Imports an archive (`-` is standard input) into the store in `state_dir`.
///
/// # Errors
/// [`CliError::Image`].
pub async fn import(
    state_dir: &Path,
    archive: &Path,
    name: Option<&str>,
) -> Result<Vec<ImageRow>, CliError> {
    let store = ImageStore::open_shared(StoreConfig::new(state_dir))?;
    let source = if archive == Path::new("-") {
        ImportSource::Reader(Box::new(std::io::stdin()))
    } else {
        ImportSource::File(archive.to_owned())
    };
    let ids = store.import_as(source, name).await?;
    let mut rows = Vec::new();
    for id in ids {
        if let Some(image) = store.status(id.as_str())? {
            rows.push(ImageRow {
                id: image.id.to_string(),
                tags: image.repo_tags.clone(),
                digests: image.repo_digests.clone(),
                size: image.size,
                pinned: image.pinned,
            });
        }
    }
    Ok(rows)
}

/// How often a pull's progress is asked for.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// Pulls `image` through the runtime at `endpoint`; returns the image's id. `watch` hears of the
/// progress now and then, if the runtime is one that tells it.
///
/// # Errors
/// [`CliError::Connect`] and [`CliError::Runtime`].
pub async fn pull(
    endpoint: &str,
    image: &str,
    auth: Option<AuthConfig>,
    mut watch: impl FnMut(&PullProgress),
) -> Result<String, CliError> {
    let request = PullImageRequest { image: Some(spec(image)), auth, ..Default::default() };
    let mut client = connect(endpoint).await?;
    let mut looking = client.clone();
    let mut pulled = std::pin::pin!(client.pull_image(request));
    let answer = loop {
        let looked = async {
            tokio::time::sleep(LOOK_EVERY).await;
            progress(&mut looking, image).await
        };
        tokio::select! {
            answer = &mut pulled => break answer,
            Some(progress) = looked => watch(&progress),
            else => {}
        }
    };
    Ok(answer.map_err(refused)?.into_inner().image_ref)
}

async fn progress(client: &mut ImageServiceClient<Channel>, image: &str) -> Option<PullProgress> {
    let request = ImageStatusRequest { image: Some(spec(image)), verbose: true };
    let answer = client.image_status(request).await.ok()?.into_inner();
    serde_json::from_str(answer.info.get("pull")?).ok()
}

/// Pins `image` of the store in `state_dir`, or unpins it; returns its id.
///
/// # Errors
/// [`CliError::Image`].
pub fn pin(state_dir: &Path, image: &str, pinned: bool) -> Result<String, CliError> {
    let store = ImageStore::open_shared(StoreConfig::new(state_dir))?;
    Ok(store.pin(image, pinned)?.to_string())
}

/// All images of the runtime at `endpoint`, by name.
///
/// # Errors
/// As [`pull`].
pub async fn list(endpoint: &str) -> Result<Vec<ImageRow>, CliError> {
    let request = ListImagesRequest { filter: None };
    let answer = connect(endpoint).await?.list_images(request).await.map_err(refused)?;
    let mut rows: Vec<_> = answer
        .into_inner()
        .images
        .into_iter()
        .map(|image| ImageRow {
            id: image.id,
            tags: image.repo_tags,
            digests: image.repo_digests,
            size: image.size,
            pinned: image.pinned,
        })
        .collect();
    rows.sort_by(|a, b| (&a.tags, &a.id).cmp(&(&b.tags, &b.id)));
    Ok(rows)
}

/// Removes `image` from the runtime at `endpoint`.
///
/// # Errors
/// As [`pull`].
pub async fn remove(endpoint: &str, image: &str) -> Result<(), CliError> {
    let request = RemoveImageRequest { image: Some(spec(image)) };
    connect(endpoint).await?.remove_image(request).await.map_err(refused)?;
    Ok(())
}

fn spec(image: &str) -> ImageSpec {
    ImageSpec { image: image.to_owned(), ..Default::default() }
}

fn refused(status: tonic::Status) -> CliError {
    CliError::Runtime(status.message().to_owned())
}

async fn connect(endpoint: &str) -> Result<ImageServiceClient<Channel>, CliError> {
    let socket = endpoint.strip_prefix("unix://").unwrap_or(endpoint).to_owned();
    let fail = |reason: String| CliError::Connect { socket: endpoint.to_owned(), reason };
    let path = socket.clone();
    let connector = tower::service_fn(move |_: tonic::transport::Uri| {
        let path = path.clone();
        async move { tokio::net::UnixStream::connect(path).await.map(TokioIo::new) }
    });
    let channel = Endpoint::from_static("http://localhost")
        .connect_timeout(Duration::from_secs(5))
        .connect_with_connector(connector)
        .await
        .map_err(|error| {
            use std::error::Error;
            let mut cause: &dyn Error = &error;
            while let Some(next) = cause.source() {
                cause = next;
            }
            fail(cause.to_string())
        })?;
    Ok(ImageServiceClient::new(channel).max_decoding_message_size(16 << 20))
}
