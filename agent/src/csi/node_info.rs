//! What the API knows of this node's drivers: the CSINode object, and on the Node the annotation
//! with the drivers' names of it and the labels that say where it is.
//!
//! Level-triggered: whenever a driver comes or goes, or the Node is another one, all is compared
//! anew. A driver that is merely not there (yet) stays listed, as under kubelet: volumes are
//! attached by what is said here while its pod is replaced.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::Node;
use k8s_openapi::api::storage::v1::{CSINode, CSINodeDriver, CSINodeSpec, VolumeNodeResources};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};
use kube::Client;
use kube::api::{DeleteParams, Patch, PatchParams, PostParams, Preconditions};
use serde_json::{Map, Value, json};
use tokio::sync::watch;

use super::drivers::{Infos, NodeInfo};
use crate::api::backoff::Backoff;
use crate::api::{self, ApiError, REQUEST_TIMEOUT};

const NODE_ID: &str = "csi.volume.kubernetes.io/nodeid";
const MIGRATED: &str = "storage.alpha.kubernetes.io/migrated-plugins";
/// Volumes of these kinds are CSI's everywhere in Kubernetes 1.36; in the order of their names.
const MIGRATED_PLUGINS: &str = "kubernetes.io/aws-ebs,kubernetes.io/azure-disk,\
    kubernetes.io/azure-file,kubernetes.io/cinder,kubernetes.io/gce-pd,\
    kubernetes.io/portworx-volume,kubernetes.io/vsphere-volume";
/// Steps from whatever there is to what shall be: an object of an earlier node goes first.
const STEPS: usize = 4;

/// What the API has been told.
#[derive(Clone, Debug, Default)]
pub(super) struct Published {
    pub(super) infos: Arc<Infos>,
    /// Drivers that cannot be told of, and why.
    pub(super) refused: BTreeMap<String, String>,
}

/// Keeps the API informed.
pub(super) struct Publisher {
    client: Client,
    name: String,
    node: watch::Receiver<Option<Arc<Node>>>,
    infos: watch::Receiver<Arc<Infos>>,
    published: watch::Sender<Published>,
}

/// What to do about the CSINode.
#[derive(Debug, PartialEq)]
enum Step {
    Create(CSINode),
    Replace(CSINode),
    /// It is of an earlier node of the same name.
    Delete,
}

impl Publisher {
    pub(super) fn new(
        client: Client,
        name: &str,
        node: watch::Receiver<Option<Arc<Node>>>,
        infos: watch::Receiver<Arc<Infos>>,
        published: watch::Sender<Published>,
    ) -> Self {
        Self { client, name: name.to_owned(), node, infos, published }
    }

    /// Runs for ever.
    pub(super) async fn run(mut self) {
        let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(30));
        let mut told = String::new();
        loop {
            let infos = self.infos.borrow_and_update().clone();
            let node = self.node.borrow_and_update().clone();
            let known = node.as_deref().map(relevant).filter(|(uid, _)| !uid.is_empty());
            let mut wait = None;
            if let Some((uid, _)) = &known {
                match self.publish(uid, &infos).await {
                    Ok(refused) => {
                        backoff.reset();
                        told.clear();
                        self.published.send_replace(Published { infos, refused });
                    }
                    Err(error) => {
                        let error = error.to_string();
                        if error != told {
                            tracing::warn!(
                                error,
                                "the API does not know this node's CSI drivers yet"
                            );
                            told = error;
                        }
                        wait = Some(backoff.next_delay());
                    }
                }
            }
            let changed = async {
                loop {
                    tokio::select! {
                        changed = self.infos.changed() => return changed,
                        changed = self.node.changed() => {
                            changed?;
                            if self.node.borrow_and_update().as_deref().map(relevant) != known {
                                return Ok(());
                            }
                        }
                    }
                }
            };
            let ended = match wait {
                Some(wait) => tokio::select! {
                    changed = changed => changed.is_err(),
                    () = tokio::time::sleep(wait) => false,
                },
                None => changed.await.is_err(),
            };
            if ended {
                return;
            }
        }
    }

    /// Brings the objects about; the drivers that cannot be told of.
    async fn publish(
        &self,
        uid: &str,
        infos: &Infos,
    ) -> Result<BTreeMap<String, String>, ApiError> {
        let nodes: kube::Api<Node> = kube::Api::all(self.client.clone());
        let what = format!("get node {}", self.name);
        let node = api::timed(what, REQUEST_TIMEOUT, nodes.get(&self.name)).await?;
        let (patch, refused) = plan_node(&node, infos);
        if let Some(patch) = patch {
            let (params, patch) = (PatchParams::default(), Patch::Merge(patch));
            let what = format!("patch the CSI drivers of node {}", self.name);
            api::timed(what, REQUEST_TIMEOUT, nodes.patch(&self.name, &params, &patch)).await?;
        }
        let told: Infos = infos
            .iter()
            .filter(|(driver, _)| !refused.contains_key(*driver))
            .map(|(driver, info)| (driver.clone(), info.clone()))
            .collect();
        let objects: kube::Api<CSINode> = kube::Api::all(self.client.clone());
        for _ in 0..STEPS {
            let what = format!("get CSINode {}", self.name);
            let found = api::timed(what, REQUEST_TIMEOUT, objects.get_opt(&self.name)).await?;
            let Some(step) = plan_csi_node(found.as_ref(), &self.name, uid, &told) else { break };
            self.apply(&objects, step, found.as_ref()).await?;
        }
        Ok(refused)
    }

    async fn apply(
        &self,
        objects: &kube::Api<CSINode>,
        step: Step,
        found: Option<&CSINode>,
    ) -> Result<(), ApiError> {
        let (name, params) = (&self.name, PostParams::default());
        match step {
            Step::Create(object) => {
                let request = objects.create(&params, &object);
                api::timed(format!("create CSINode {name}"), REQUEST_TIMEOUT, request).await?;
            }
            Step::Replace(object) => {
                let request = objects.replace(name, &params, &object);
                api::timed(format!("update CSINode {name}"), REQUEST_TIMEOUT, request).await?;
            }
            Step::Delete => {
                let preconditions = Preconditions {
                    uid: found.and_then(|found| found.metadata.uid.clone()),
                    resource_version: None,
                };
                let params = DeleteParams::default().preconditions(preconditions);
                let request = objects.delete(name, &params);
                let what = format!("delete CSINode {name} of an earlier node");
                api::timed(what, REQUEST_TIMEOUT, request).await?;
            }
        }
        Ok(())
    }
}

/// What of the Node matters here: which one it is, and what it says of drivers.
fn relevant(node: &Node) -> (String, Option<String>) {
    let uid = node.metadata.uid.clone().unwrap_or_default();
    let note = node.metadata.annotations.as_ref().and_then(|notes| notes.get(NODE_ID));
    (uid, note.cloned())
}

/// The patch that makes the Node say what it shall, and the drivers whose labels contradict it.
fn plan_node(node: &Node, infos: &Infos) -> (Option<Value>, BTreeMap<String, String>) {
    let none = BTreeMap::new();
    let have = node.metadata.labels.as_ref().unwrap_or(&none);
    let note = node.metadata.annotations.as_ref().and_then(|notes| notes.get(NODE_ID));
    let before: BTreeMap<String, String> =
        note.and_then(|text| serde_json::from_str(text).ok()).unwrap_or_default();
    let (mut ids, mut labels, mut refused) = (before.clone(), Map::new(), BTreeMap::new());
    for (driver, info) in infos {
        let Some(info) = info else {
            ids.remove(driver);
            continue;
        };
        let collision = info.topology.iter().find_map(|(key, value)| {
            let had = have.get(key).filter(|had| *had != value)?;
            Some(format!(
                "detected topology value collision: driver reported {key:?}:{value:?} but existing \
                 label is {key:?}:{had:?}"
            ))
        });
        if let Some(reason) = collision {
            refused.insert(driver.clone(), reason);
            continue;
        }
        ids.insert(driver.clone(), info.node_id.clone());
        let lacking = info.topology.iter().filter(|(key, _)| !have.contains_key(*key));
        labels.extend(lacking.map(|(key, value)| (key.clone(), json!(value))));
    }
    let mut metadata = Map::new();
    if ids != before {
        let text = (!ids.is_empty()).then(|| serde_json::to_string(&ids).unwrap_or_default());
        metadata.insert("annotations".into(), json!({NODE_ID: text}));
    }
    if !labels.is_empty() {
        metadata.insert("labels".into(), Value::Object(labels));
    }
    if metadata.is_empty() {
        return (None, refused);
    }
    // Somebody else's change in between is not written over.
    metadata.insert("resourceVersion".into(), json!(node.metadata.resource_version));
    (Some(json!({"metadata": metadata})), refused)
}

/// The next step from the CSINode that there is to the one that shall be; `None` if it is that.
fn plan_csi_node(found: Option<&CSINode>, name: &str, uid: &str, infos: &Infos) -> Option<Step> {
    let entry = |driver: &str, info: &NodeInfo| CSINodeDriver {
        name: driver.to_owned(),
        node_id: info.node_id.clone(),
        topology_keys: Some(info.topology.keys().cloned().collect()),
        allocatable: info.max_volumes.map(|count| VolumeNodeResources { count: Some(count) }),
    };
    let Some(found) = found else {
        let owner = OwnerReference {
            api_version: "v1".into(),
            kind: "Node".into(),
            name: name.to_owned(),
            uid: uid.to_owned(),
            ..OwnerReference::default()
        };
        let drivers = infos.iter().filter_map(|(d, info)| Some(entry(d, info.as_ref()?)));
        return Some(Step::Create(CSINode {
            metadata: ObjectMeta {
                name: Some(name.to_owned()),
                annotations: Some([(MIGRATED.into(), MIGRATED_PLUGINS.into())].into()),
                owner_references: Some(vec![owner]),
                ..ObjectMeta::default()
            },
            spec: CSINodeSpec { drivers: drivers.collect() },
        }));
    };
    let owned = found
        .metadata
        .owner_references
        .iter()
        .flatten()
        .any(|owner| owner.kind == "Node" && owner.name == name && owner.uid == uid);
    if !owned {
        return Some(Step::Delete);
    }
    let mut wanted = found.clone();
    wanted
        .metadata
        .annotations
        .get_or_insert_default()
        .insert(MIGRATED.into(), MIGRATED_PLUGINS.into());
    let same = |a: &CSINodeDriver, b: &CSINodeDriver| {
        let keys = |d: &CSINodeDriver| {
            let mut keys = d.topology_keys.clone().unwrap_or_default();
            keys.sort();
            keys
        };
        let count = |d: &CSINodeDriver| d.allocatable.as_ref().and_then(|a| a.count);
        a.node_id == b.node_id && keys(a) == keys(b) && count(a) == count(b)
    };
    for (driver, info) in infos {
        let at = wanted.spec.drivers.iter().position(|d| d.name == *driver);
        match (info.as_ref().map(|info| entry(driver, info)), at) {
            (Some(entry), Some(at)) if same(&entry, &wanted.spec.drivers[at]) => {}
            (Some(entry), at) => {
                // The API takes no change of an entry, only another one in its place.
                if let Some(at) = at {
                    wanted.spec.drivers.remove(at);
                }
                wanted.spec.drivers.push(entry);
            }
            (None, Some(at)) => {
                wanted.spec.drivers.remove(at);
            }
            (None, None) => {}
        }
    }
    (wanted != *found).then_some(Step::Replace(wanted))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn info(id: &str, topology: &[(&str, &str)], max: Option<i32>) -> Option<NodeInfo> {
        let topology = topology.iter().map(|(k, v)| ((*k).into(), (*v).into())).collect();
        Some(NodeInfo { node_id: id.into(), max_volumes: max, topology })
    }

    fn infos(all: &[(&str, Option<NodeInfo>)]) -> Infos {
        all.iter().map(|(name, info)| ((*name).to_owned(), info.clone())).collect()
    }

    fn node(value: Value) -> Node {
        let mut value = json!({"metadata": value});
        value["metadata"]["resourceVersion"] = json!("7");
        serde_json::from_value(value).unwrap()
    }

    #[test]
    fn the_node_says_who_knows_it_by_which_name_and_where_it_is() {
        let all = infos(&[("a", info("n-a", &[("zone.example", "z1")], None)), ("gone", None)]);
        let (patch, refused) = plan_node(&node(json!({})), &all);
        assert!(refused.is_empty());
        let metadata = &patch.unwrap()["metadata"];
        assert_eq!(metadata["annotations"][NODE_ID], r#"{"a":"n-a"}"#);
        assert_eq!(metadata["labels"], json!({"zone.example": "z1"}));
        assert_eq!(metadata["resourceVersion"], "7");

        let said =
            json!({"annotations": {NODE_ID: r#"{"a":"n-a"}"#}, "labels": {"zone.example": "z1"}});
        assert_eq!(plan_node(&node(said), &all).0, None, "nothing twice");
        let others = json!({"annotations": {NODE_ID: r#"{"gone":"x","other":"y"}"#}});
        let patch = plan_node(&node(others), &infos(&[("gone", None)])).0.unwrap();
        assert_eq!(patch["metadata"]["annotations"][NODE_ID], r#"{"other":"y"}"#);
        let last = json!({"annotations": {NODE_ID: r#"{"gone":"x"}"#}});
        let patch = plan_node(&node(last), &infos(&[("gone", None)])).0.unwrap();
        assert_eq!(patch["metadata"]["annotations"][NODE_ID], Value::Null);
    }

    #[test]
    fn a_driver_that_contradicts_a_label_is_refused_alone() {
        let all = infos(&[
            ("bad", info("n-b", &[("zone.example", "z2")], None)),
            ("good", info("n-g", &[], None)),
        ]);
        let (patch, refused) = plan_node(&node(json!({"labels": {"zone.example": "z1"}})), &all);
        assert!(refused["bad"].contains("collision"), "{refused:?}");
        let patch = patch.unwrap();
        assert_eq!(patch["metadata"]["annotations"][NODE_ID], r#"{"good":"n-g"}"#);
        assert!(patch["metadata"].get("labels").is_none());
    }

    #[test]
    fn the_csinode_is_the_nodes_and_lists_its_drivers() {
        let all = infos(&[("a", info("n-a", &[("k", "v")], Some(3))), ("gone", None)]);
        let Some(Step::Create(made)) = plan_csi_node(None, "n", "uid", &all) else { panic!() };
        assert_eq!(made.metadata.annotations.as_ref().unwrap()[MIGRATED], MIGRATED_PLUGINS);
        assert_eq!(made.metadata.owner_references.as_ref().unwrap()[0].uid, "uid");
        assert_eq!(made.spec.drivers[0].topology_keys.as_deref(), Some(&["k".to_owned()][..]));
        assert_eq!(plan_csi_node(Some(&made), "n", "uid", &all), None, "nothing twice");
        assert_eq!(plan_csi_node(Some(&made), "n", "other", &all), Some(Step::Delete));

        // What is known of another driver stays; what changed is replaced; what went goes.
        let changed = infos(&[("a", info("n-a", &[], Some(3))), ("b", info("n-b", &[], None))]);
        let Some(Step::Replace(next)) = plan_csi_node(Some(&made), "n", "uid", &changed) else {
            panic!()
        };
        let names = |object: &CSINode| {
            object.spec.drivers.iter().map(|d| d.name.clone()).collect::<Vec<_>>().join(" ")
        };
        assert_eq!(names(&next), "a b");
        let Some(Step::Replace(next)) =
            plan_csi_node(Some(&next), "n", "uid", &infos(&[("a", None)]))
        else {
            panic!()
        };
        assert_eq!(names(&next), "b");
        assert_eq!(plan_csi_node(Some(&next), "n", "uid", &Infos::new()), None);
    }
}
