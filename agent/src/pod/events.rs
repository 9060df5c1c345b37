//! The runtime's event stream, held open.

use std::sync::Arc;
use std::time::Duration;

use cri_shim::api::ContainerEventResponse;
use futures::StreamExt;
use tokio::sync::mpsc;

use crate::runtime::{Runtime, RuntimeErrorKind};

/// How long the stream may stay silent after it was asked for, before it is taken for open. A
/// server need not say that it is.
const SETTLE: Duration = Duration::from_millis(500);
/// Waits between tries, at first and at most; and for a runtime without events.
const RETRY: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));
const RETRY_UNIMPLEMENTED: Duration = Duration::from_secs(600);

/// What the stream tells.
#[derive(Debug)]
pub(super) enum News {
    /// Something happened.
    Event(Box<ContainerEventResponse>),
    /// Events come now.
    Connected,
    /// No events come.
    Lost,
}

/// Passes on events until nobody listens any more.
pub(super) async fn watch_events(runtime: Arc<dyn Runtime>, news: mpsc::Sender<News>) {
    let mut wait = RETRY.0;
    loop {
        let mut pause = wait;
        match runtime.container_events().await {
            Ok(mut stream) => {
                let mut told = false;
                loop {
                    let item = if told {
                        stream.next().await
                    } else {
                        match tokio::time::timeout(SETTLE, stream.next()).await {
                            Ok(item) => item,
                            Err(_) => {
                                told = true;
                                wait = RETRY.0;
                                if news.send(News::Connected).await.is_err() {
                                    return;
                                }
                                continue;
                            }
                        }
                    };
                    match item {
                        Some(Ok(event)) => {
                            wait = RETRY.0;
                            if !told {
                                told = true;
                                if news.send(News::Connected).await.is_err() {
                                    return;
                                }
                            }
                            if news.send(News::Event(Box::new(event))).await.is_err() {
                                return;
                            }
                        }
                        Some(Err(error)) => {
                            pause = pause_after(&error, wait);
                            break;
                        }
                        None => break,
                    }
                }
            }
            Err(error) => pause = pause_after(&error, wait),
        }
        if news.send(News::Lost).await.is_err() {
            return;
        }
        tokio::time::sleep(pause).await;
        wait = (wait * 2).min(RETRY.1);
    }
}

fn pause_after(error: &crate::runtime::RuntimeError, wait: Duration) -> Duration {
    if error.kind == RuntimeErrorKind::Unimplemented {
        tracing::info!("the container runtime sends no events: it is listed every second");
        return RETRY_UNIMPLEMENTED;
    }
    tracing::warn!(%error, "container events");
    wait
}
