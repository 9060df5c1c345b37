//! What containers get and what is told of it, from claims that are prepared.

use std::collections::BTreeSet;

use k8s_openapi::api::core::v1::{ResourceHealth, ResourceStatus};
use serde_json::{Value, json};

use super::claim_store::tests::device;
use super::health::Health;
use super::statuses::statuses;
use super::*;

/// A pod with a claim `c`, of which it calls the object `one`.
fn pod(containers: Value) -> Pod {
    let spec = json!({"containers": containers,
        "resourceClaims": [{"name": "c", "resourceClaimName": "one"}]});
    let metadata = json!({"name": "p", "namespace": "n", "uid": "u"});
    serde_json::from_value(json!({"metadata": metadata, "spec": spec})).unwrap()
}

fn container(name: &str, claims: Value) -> Value {
    json!({"name": name, "resources": {"claims": claims}})
}

fn prepared() -> ClaimStore {
    let mut store = ClaimStore::default();
    let (key, drivers) = (NamespacedName::new("n", "one"), BTreeSet::from(["d".to_owned()]));
    store.reserve(&key, "cu", &drivers, &PodUid::from("u")).unwrap();
    let devices = vec![
        device("1", &["a"], &["v/k=1", "v/k=all"]),
        device("2", &["b/big"], &["v/k=2", "v/k=all"]),
        device("3", &["b"], &[]),
    ];
    store.put(&key, "d", devices);
    store
}

struct Nothing;

#[async_trait]
impl Objects for Nothing {
    async fn config_map(
        &self,
        _: &NamespacedName,
    ) -> Result<Option<Arc<k8s_openapi::api::core::v1::ConfigMap>>, ObjectError> {
        Ok(None)
    }

    async fn secret(
        &self,
        _: &NamespacedName,
    ) -> Result<Option<Arc<k8s_openapi::api::core::v1::Secret>>, ObjectError> {
        Ok(None)
    }

    async fn service_account_token(
        &self,
        _: &NamespacedName,
        _: k8s_openapi::api::authentication::v1::TokenRequestSpec,
    ) -> Result<k8s_openapi::api::authentication::v1::TokenRequestStatus, ObjectError> {
        Err(ObjectError::Standalone { what: "a token" })
    }

    fn services(&self, _: &str) -> Vec<Arc<k8s_openapi::api::core::v1::Service>> {
        Vec::new()
    }

    fn node(&self) -> Option<Arc<k8s_openapi::api::core::v1::Node>> {
        None
    }

    fn retain(&self, _: &Pod) {}

    fn release(&self, _: &PodUid) {}

    fn changes(&self) -> broadcast::Receiver<crate::objects::ObjectRef> {
        broadcast::Sender::new(1).subscribe()
    }
}

#[tokio::test]
async fn containers_get_each_name_once_and_only_what_is_prepared() {
    let root = tempfile::tempdir().unwrap();
    checkpoint::write(root.path(), &checkpoint::encode(&prepared())).unwrap();
    let dra = Dra::open(root.path(), Arc::new(Nothing)).unwrap();
    let pod = pod(json!([
        container("all", json!([{"name": "c"}])),
        container("b", json!([{"name": "c", "request": "b"}])),
        container("none", json!([])),
    ]));
    let names = |n: usize| {
        dra.cdi_devices(&pod, &pod.spec.as_ref().unwrap().containers[n]).map(|all| all.join(" "))
    };
    assert_eq!(names(0).unwrap(), "v/k=1 v/k=all v/k=2");
    assert_eq!(names(1).unwrap(), "v/k=2 v/k=all");
    assert_eq!(names(2).unwrap(), "");
    assert!(dra.holds(&PodUid::from("u")));
    let told = dra.of_container(&pod, &pod.spec.as_ref().unwrap().containers[1]);
    assert_eq!(
        (told.len(), told[0].devices.len()),
        (1, 3),
        "as kubelet tells it, of the whole claim"
    );
    // Nobody could take it back.
    let error = dra.unprepare(&PodUid::from("u")).await.unwrap_err();
    assert!(error.to_string().contains("DRA driver d is not registered"), "{error}");
    assert!(dra.holds(&PodUid::from("u")));

    let empty = tempfile::tempdir().unwrap();
    let dra = Dra::open(empty.path(), Arc::new(Nothing)).unwrap();
    let error = dra.cdi_devices(&pod, &pod.spec.as_ref().unwrap().containers[0]).unwrap_err();
    assert!(error.to_string().contains("ResourceClaim one in namespace n"), "{error}");
    let error = dra.prepare(&pod).await.unwrap_err();
    assert!(error.to_string().contains("needs a control plane"), "{error}");
}

#[test]
fn health_is_told_by_claim_and_request() {
    let pod = pod(json!([
        container("all", json!([{"name": "c"}])),
        container("b", json!([{"name": "c", "request": "b"}])),
        container("none", json!([])),
    ]));
    let mut health = Health::default();
    let told = wire::health::DeviceHealth {
        device: Some(wire::health::DeviceIdentifier {
            pool_name: "p".into(),
            device_name: "3".into(),
        }),
        health: wire::health::HealthStatus::Unhealthy.into(),
        message: "hot".into(),
        ..Default::default()
    };
    let now = Timestamp::UNIX_EPOCH;
    health.told("d", &[told], now);
    let all = statuses(&pod, &prepared(), &health, now);
    let show = |name: &str| {
        let resource = |r: &ResourceHealth| {
            let state = r.health.as_deref().unwrap_or_default();
            format!("{} {state} {}", r.resource_id, r.message.as_deref().unwrap_or_default())
        };
        let status = |s: &ResourceStatus| {
            let all: Vec<_> = s.resources.iter().flatten().map(resource).collect();
            format!("{}: {}", s.name, all.join(","))
        };
        all.get(name).map(|own| own.iter().map(status).collect::<Vec<_>>().join("; "))
    };
    let expected = "claim:c: v/k=1 Unknown ,v/k=2 Unknown ,d/p/3 Unhealthy hot";
    assert_eq!(show("all").unwrap(), expected);
    assert_eq!(show("b").unwrap(), "claim:c/b: v/k=2 Unknown ,d/p/3 Unhealthy hot");
    assert_eq!(show("none"), None);
}
