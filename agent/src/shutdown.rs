//! How every loop learns that the node ends.

use tokio::sync::watch;

/// Returns once `shutdown` is true or its sender is gone. Holds nothing across an await, so that a
/// loop that selects over it stays `Send`.
pub async fn requested(shutdown: &mut watch::Receiver<bool>) {
    let _ = shutdown.wait_for(|stop| *stop).await;
}
