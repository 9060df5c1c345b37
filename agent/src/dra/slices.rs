//! ResourceSlices of drivers that are gone: deleted, so that no pod is sent here for what nobody gives.
//!
//! At the start all drivers are taken to be gone, as under kubelet: those that are not publish theirs
//! again.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::Node;
use k8s_openapi::api::resource::v1::ResourceSlice;
use kube::Client;
use kube::api::{DeleteParams, ListParams};
use tokio::sync::watch;
use tokio::task::AbortHandle;
use tokio::time::Instant;

use super::drivers::{Away, Drivers};
use crate::api::backoff::Backoff;
use crate::api::{self, REQUEST_TIMEOUT};

/// Whose ResourceSlices they are, and where.
#[derive(Clone)]
pub struct Slices {
    client: Client,
    node_name: String,
    node: watch::Receiver<Option<Arc<Node>>>,
}

/// What to do now about drivers that are away. Pure.
#[derive(Debug, Default, PartialEq, Eq)]
struct Plan {
    /// Drivers whose deletion is called off.
    back: Vec<String>,
    /// Drivers whose ResourceSlices go.
    gone: Vec<String>,
    /// When to look again.
    wake: Option<Instant>,
}

fn plan<T>(away: &Away, under_way: &BTreeMap<String, T>, now: Instant) -> Plan {
    let waiting = || away.iter().filter(|(driver, _)| !under_way.contains_key(*driver));
    Plan {
        back: under_way.keys().filter(|driver| !away.contains_key(*driver)).cloned().collect(),
        gone: waiting().filter(|(_, at)| **at <= now).map(|(driver, _)| driver.clone()).collect(),
        wake: waiting().map(|(_, at)| *at).filter(|at| *at > now).min(),
    }
}

/// Which ResourceSlices go.
fn selector(node: &str, driver: Option<&str>) -> String {
    match driver {
        Some(driver) => format!("spec.driver={driver},spec.nodeName={node}"),
        None => format!("spec.nodeName={node}"),
    }
}

impl Slices {
    /// Those of this node.
    pub fn new(client: Client, node_name: &str, node: watch::Receiver<Option<Arc<Node>>>) -> Self {
        Self { client, node_name: node_name.to_owned(), node }
    }

    /// Deletes those of drivers that stay away. Runs for ever.
    pub(super) async fn run(self, drivers: Arc<Drivers>) {
        let mut away = drivers.away();
        let all = self.clone();
        tokio::spawn(async move { all.delete(None).await });
        let mut under_way: BTreeMap<String, AbortHandle> = BTreeMap::new();
        loop {
            let now = away.borrow_and_update().clone();
            let Plan { back, gone, wake } = plan(&now, &under_way, Instant::now());
            for driver in back {
                if let Some(deleting) = under_way.remove(&driver) {
                    deleting.abort();
                }
            }
            for driver in gone {
                let (slices, drivers, name) = (self.clone(), drivers.clone(), driver.clone());
                let deleting = tokio::spawn(async move {
                    slices.delete(Some(&name)).await;
                    drivers.forget(&name);
                });
                under_way.insert(driver, deleting.abort_handle());
            }
            let wake = async {
                match wake {
                    Some(at) => tokio::time::sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                changed = away.changed() => if changed.is_err() { return },
                () = wake => {}
            }
        }
    }

    /// Deletes those of the driver, or all, until that has been done.
    async fn delete(mut self, driver: Option<&str>) {
        let mut backoff = Backoff::new(Duration::from_secs(1), Duration::from_secs(300));
        // Only a node that there is has some.
        if self.node.wait_for(Option::is_some).await.is_err() {
            return;
        }
        let selector = selector(&self.node_name, driver);
        let slices: kube::Api<ResourceSlice> = kube::Api::all(self.client.clone());
        let (how, which) = (DeleteParams::default(), ListParams::default().fields(&selector));
        loop {
            let what = format!("delete ResourceSlices with {selector}");
            let deleting = slices.delete_collection(&how, &which);
            match api::timed(what, REQUEST_TIMEOUT, deleting).await {
                Ok(_) => {
                    tracing::info!(
                        selector,
                        "deleted the ResourceSlices of drivers that are not here"
                    );
                    return;
                }
                // Without the API group there are none.
                Err(error) if error.code() == Some(404) => return,
                Err(error) => tracing::debug!(%error, "cannot delete ResourceSlices yet"),
            }
            tokio::time::sleep(backoff.next_delay()).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn drivers_that_stay_away_lose_their_slices_once() {
        let now = Instant::now();
        let later = now + Duration::from_secs(5);
        let away = Away::from([("a".to_owned(), now), ("b".to_owned(), later)]);
        let none = BTreeMap::<String, ()>::new();
        let expected = Plan { gone: vec!["a".into()], wake: Some(later), ..Plan::default() };
        assert_eq!(plan(&away, &none, now), expected);
        let under_way = BTreeMap::from([("a".to_owned(), ()), ("c".to_owned(), ())]);
        let expected = Plan { back: vec!["c".into()], wake: Some(later), ..Plan::default() };
        assert_eq!(plan(&away, &under_way, now), expected);
        assert_eq!(plan(&Away::new(), &none, now), Plan::default());
    }

    #[test]
    fn they_are_chosen_by_node_and_driver() {
        assert_eq!(selector("n", None), "spec.nodeName=n");
        assert_eq!(selector("n", Some("d.example")), "spec.driver=d.example,spec.nodeName=n");
    }
}
