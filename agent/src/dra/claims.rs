//! Which ResourceClaims a pod refers to, whether it may have them, and what of them each container
//! gets. Pure.

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::api::core::v1::{Container, Pod, PodResourceClaim};
use k8s_openapi::api::resource::v1::ResourceClaim;

use super::error::DraError;
use crate::device::is_extended;
use crate::ids::{NamespacedName, PodUid};
use crate::pod::quantity;
use crate::pod::spec::spec_of;

/// A device class asked for as a resource by its name.
const CLASS_PREFIX: &str = "deviceclass.resource.kubernetes.io/";

/// A claim that a pod refers to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reference {
    /// The object's name.
    pub name: String,
    /// Whether it was made from a template, for this pod alone.
    pub generated: bool,
}

/// The object behind one entry of `spec.resourceClaims`; `None` if none is needed.
///
/// # Errors
/// The object is not made yet, or the entry names nothing.
pub fn resolve(pod: &Pod, claim: &PodResourceClaim) -> Result<Option<Reference>, DraError> {
    if let Some(name) = &claim.resource_claim_name {
        return Ok(Some(Reference { name: name.clone(), generated: false }));
    }
    if claim.resource_claim_template_name.is_none() {
        let (pod, claim) = (NamespacedName::of_pod(pod), claim.name.clone());
        return Err(DraError::Unsupported { pod, claim });
    }
    let told = pod.status.as_ref().and_then(|s| s.resource_claim_statuses.as_ref());
    match told.into_iter().flatten().find(|told| told.name == claim.name) {
        Some(told) => {
            let named = told.resource_claim_name.clone();
            Ok(named.map(|name| Reference { name, generated: true }))
        }
        None => Err(DraError::NotCreated(NamespacedName::of_pod(pod))),
    }
}

/// All claims of the pod, that for its extended resources among them.
///
/// # Errors
/// As [`resolve`].
pub fn references(pod: &Pod) -> Result<Vec<Reference>, DraError> {
    let mut all = Vec::new();
    for claim in spec_of(pod).resource_claims.iter().flatten() {
        all.extend(resolve(pod, claim)?);
    }
    let status = pod.status.as_ref();
    if let Some(extended) = status.and_then(|s| s.extended_resource_claim_status.as_ref()) {
        let name = extended.resource_claim_name.clone();
        all.push(Reference { name, generated: false });
    }
    Ok(all)
}

/// Whether the pod may have what the claim got.
///
/// # Errors
/// It is another pod's, or not reserved for this one.
pub fn check(pod: &Pod, reference: &Reference, claim: &ResourceClaim) -> Result<(), DraError> {
    let uid = PodUid::of(pod);
    let owned = || {
        let mut owners = claim.metadata.owner_references.iter().flatten();
        owners.any(|owner| owner.controller == Some(true) && owner.uid == uid.as_str())
    };
    let key = NamespacedName::of_pod(pod);
    if reference.generated && !owned() {
        let claim = NamespacedName::new(&key.namespace, &reference.name);
        return Err(DraError::NotOwner { claim, pod: key });
    }
    let reserved = claim.status.as_ref().and_then(|s| s.reserved_for.as_ref());
    if !reserved.into_iter().flatten().any(|consumer| consumer.uid == uid.as_str()) {
        return Err(DraError::NotReserved {
            pod: key.name.to_string(),
            uid: uid.to_string(),
            claim: reference.name.clone(),
            claim_uid: claim.metadata.uid.clone().unwrap_or_default(),
        });
    }
    Ok(())
}

/// The drivers whose devices the claim got.
///
/// # Errors
/// Nothing is allocated.
pub fn drivers(claim: &ResourceClaim) -> Result<BTreeSet<String>, DraError> {
    let status = claim.status.as_ref();
    let Some(allocation) = status.and_then(|s| s.allocation.as_ref()) else {
        let name = claim.metadata.name.clone().unwrap_or_default();
        return Err(DraError::NotAllocated(name));
    };
    let results = allocation.devices.as_ref().and_then(|d| d.results.as_ref());
    Ok(results.into_iter().flatten().map(|result| result.driver.clone()).collect())
}

/// What a container wants of a claim: everything, or what belongs to these requests.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Wanted {
    all: bool,
    requests: BTreeSet<String>,
}

/// The request of which `request` may be one of several alternatives (`request/subrequest`).
pub fn base(request: &str) -> &str {
    request.split('/').next().unwrap_or(request)
}

impl Wanted {
    fn add(&mut self, request: Option<&str>) {
        match request.filter(|request| !request.is_empty()) {
            Some(request) => drop(self.requests.insert(request.to_owned())),
            None => self.all = true,
        }
    }

    /// Whether a device of these requests is among it. One that names none belongs to all.
    pub fn takes(&self, requests: &[String]) -> bool {
        self.all
            || requests.is_empty()
            || requests.iter().any(|r| self.requests.contains(r) || self.requests.contains(base(r)))
    }
}

/// What the container wants, by the claim's name.
///
/// # Errors
/// As [`resolve`].
pub fn wanted(pod: &Pod, container: &Container) -> Result<BTreeMap<String, Wanted>, DraError> {
    let mut all: BTreeMap<String, Wanted> = BTreeMap::new();
    let resources = container.resources.as_ref();
    let asked: Vec<_> = resources.and_then(|r| r.claims.as_ref()).into_iter().flatten().collect();
    for claim in spec_of(pod).resource_claims.iter().flatten() {
        let mut of = asked.iter().filter(|asked| asked.name == claim.name).peekable();
        if of.peek().is_none() {
            continue;
        }
        let Some(reference) = resolve(pod, claim)? else { continue };
        let entry = all.entry(reference.name).or_default();
        of.for_each(|asked| entry.add(asked.request.as_deref()));
    }
    let status = pod.status.as_ref();
    let Some(extended) = status.and_then(|s| s.extended_resource_claim_status.as_ref()) else {
        return Ok(all);
    };
    let requested = resources.and_then(|r| r.requests.as_ref());
    for mapping in &extended.request_mappings {
        let name = &mapping.resource_name;
        let some = || {
            let amount = requested.and_then(|all| all.get(name)).and_then(quantity::value);
            amount.is_some_and(|amount| amount > 0)
        };
        if mapping.container_name == container.name && may_be_claimed(name) && some() {
            let entry = all.entry(extended.resource_claim_name.clone()).or_default();
            entry.add(Some(&mapping.request_name));
        }
    }
    Ok(all)
}

/// Whether `resource` is one that the scheduler may have claimed: an extended one, or a device class.
pub fn may_be_claimed(resource: &str) -> bool {
    is_extended(resource) || resource.starts_with(CLASS_PREFIX)
}

/// Whether the container has `resource` of a claim that the scheduler made: no device plugin is asked
/// for it then.
pub fn is_claimed(pod: &Pod, container: &str, resource: &str) -> bool {
    let status = pod.status.as_ref();
    let extended = status.and_then(|s| s.extended_resource_claim_status.as_ref());
    extended.is_some_and(|extended| {
        let mut all = extended.request_mappings.iter();
        all.any(|m| m.container_name == container && m.resource_name == resource)
    })
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn pod(spec: Value, status: Value) -> Pod {
        serde_json::from_value(json!({
            "metadata": {"name": "p", "namespace": "n", "uid": "u"}, "spec": spec, "status": status,
        }))
        .unwrap()
    }

    fn claim(metadata: Value, status: Value) -> ResourceClaim {
        serde_json::from_value(json!({"metadata": metadata, "spec": {}, "status": status})).unwrap()
    }

    #[test]
    fn claims_are_found_by_name_by_template_and_for_extended_resources() {
        let spec = |claims: Value| json!({"containers": [], "resourceClaims": claims});
        let template = json!([{"name": "t", "resourceClaimTemplateName": "x"}]);
        let told = json!({"resourceClaimStatuses": [{"name": "t", "resourceClaimName": "p-t-1"}]});
        for (claims, status, expected) in [
            (json!([]), json!({}), Ok("")),
            (json!([{"name": "a", "resourceClaimName": "shared"}]), json!({}), Ok("shared")),
            (template.clone(), told.clone(), Ok("p-t-1*")),
            (template.clone(), json!({"resourceClaimStatuses": [{"name": "t"}]}), Ok("")),
            (
                template.clone(),
                json!({}),
                Err("pod \"n/p\": ResourceClaim not created yet".to_owned()),
            ),
            (
                json!([{"name": "a"}]),
                json!({}),
                Err("pod \"n/p\", spec.resourceClaim \"a\": none of the supported fields are set"
                    .to_owned()),
            ),
            (
                json!([{"name": "a", "resourceClaimName": "shared"}]),
                json!({"extendedResourceClaimStatus":
                    {"resourceClaimName": "ext", "requestMappings": []}}),
                Ok("shared ext"),
            ),
        ] {
            let found = references(&pod(spec(claims), status)).map(|all| {
                let show =
                    |r: &Reference| format!("{}{}", r.name, if r.generated { "*" } else { "" });
                all.iter().map(show).collect::<Vec<_>>().join(" ")
            });
            assert_eq!(found.map_err(|e| e.to_string()), expected.map(str::to_owned));
        }
    }

    #[test]
    fn a_claim_must_be_the_pods_and_reserved_for_it() {
        let pod = pod(json!({"containers": []}), json!({}));
        let owner = |uid: &str, controller: bool| {
            json!({"name": "c", "uid": "cu", "ownerReferences": [{"apiVersion": "v1", "kind": "Pod",
                "name": "p", "uid": uid, "controller": controller}]})
        };
        let reserved =
            |uid: &str| json!({"reservedFor": [{"resource": "pods", "name": "p", "uid": uid}]});
        let unowned = "ResourceClaim n/c was not created for Pod n/p (Pod is not owner)";
        let unreserved = "pod p (u) is not allowed to use ResourceClaim c (cu)";
        for (generated, metadata, status, expected) in [
            (true, owner("u", true), reserved("u"), Ok(())),
            (true, owner("u", false), reserved("u"), Err(unowned)),
            (true, owner("other", true), reserved("u"), Err(unowned)),
            (false, owner("other", true), reserved("u"), Ok(())),
            (false, owner("u", true), reserved("other"), Err(unreserved)),
            (false, owner("u", true), json!({}), Err(unreserved)),
        ] {
            let reference = Reference { name: "c".into(), generated };
            let found = check(&pod, &reference, &claim(metadata, status));
            assert_eq!(found.map_err(|e| e.to_string()), expected.map_err(str::to_owned));
        }
    }

    #[test]
    fn drivers_are_those_of_the_allocation() {
        let of = |status: Value| {
            drivers(&claim(json!({"name": "c"}), status))
                .map(|all| all.into_iter().collect::<Vec<_>>().join(" "))
                .map_err(|e| e.to_string())
        };
        let result =
            |driver: &str| json!({"driver": driver, "pool": "p", "device": "d", "request": "r"});
        assert_eq!(of(json!({})), Err("ResourceClaim c: not allocated".to_owned()));
        assert_eq!(of(json!({"allocation": {}})), Ok(String::new()));
        let all = [result("b.example"), result("a.example"), result("b.example")];
        let allocation = json!({"allocation": {"devices": {"results": all}}});
        assert_eq!(of(allocation), Ok("a.example b.example".into()));
    }

    #[test]
    fn containers_get_what_they_ask_for() {
        let container = |name: &str, claims: Value| {
            json!({"name": name, "resources": {"claims": claims,
                "requests": {"example.com/gpu": "1", "example.com/none": "0"}}})
        };
        let mapping = |container: &str, resource: &str, request: &str| json!({"containerName": container, "resourceName": resource, "requestName": request});
        let pod = pod(
            json!({
                "resourceClaims": [{"name": "a", "resourceClaimName": "ca"},
                    {"name": "b", "resourceClaimTemplateName": "t"},
                    {"name": "none", "resourceClaimTemplateName": "t"}],
                "containers": [
                    container("all", json!([{"name": "a"}, {"name": "a", "request": "r1"}])),
                    container("one", json!([{"name": "b", "request": "r2"}, {"name": "none"}])),
                    container("ext", json!([])),
                ],
            }),
            json!({
                "resourceClaimStatuses": [{"name": "b", "resourceClaimName": "cb"}, {"name": "none"}],
                "extendedResourceClaimStatus": {"resourceClaimName": "ce", "requestMappings": [
                    mapping("ext", "example.com/gpu", "container-0-request-0"),
                    mapping("ext", "example.com/none", "container-0-request-1"),
                    mapping("ext", "cpu", "container-0-request-2"),
                ]},
            }),
        );
        let of = |name: &str| {
            let container = pod.spec.as_ref().unwrap().containers.iter().find(|c| c.name == name);
            wanted(&pod, container.unwrap()).unwrap()
        };
        let set = |all: bool, requests: &[&str]| Wanted {
            all,
            requests: requests.iter().map(|r| (*r).to_owned()).collect(),
        };
        assert_eq!(of("all"), [("ca".to_owned(), set(true, &["r1"]))].into());
        assert_eq!(of("one"), [("cb".to_owned(), set(false, &["r2"]))].into());
        assert_eq!(of("ext"), [("ce".to_owned(), set(false, &["container-0-request-0"]))].into());
        assert!(
            is_claimed(&pod, "ext", "example.com/gpu")
                && !is_claimed(&pod, "all", "example.com/gpu")
        );
    }

    #[test]
    fn devices_go_by_their_requests() {
        let names = |list: &[&str]| list.iter().map(|r| (*r).to_owned()).collect::<Vec<_>>();
        let want = |request: &str| {
            let mut wanted = Wanted::default();
            wanted.add(Some(request));
            wanted
        };
        for (wanted, requests, expected) in [
            (want(""), names(&["r1"]), true),
            (want("r1"), names(&["r1", "r2"]), true),
            (want("r1"), names(&["r2"]), false),
            (want("r1"), names(&[]), true),
            (want("r1"), names(&["r1/big"]), true),
            (want("r1"), names(&["r10/big"]), false),
        ] {
            assert_eq!(wanted.takes(&requests), expected, "{wanted:?} {requests:?}");
        }
    }
}
