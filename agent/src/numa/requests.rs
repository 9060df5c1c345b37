//! What of CPUs and memory a pod's containers have to themselves. Pure.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{Container, Pod};

use crate::pod::qos::qos_class;
use crate::pod::quantity::{ResourceList, amount, cpu_milli};
use crate::pod::spec::{init_containers, is_sidecar, spec_of};

/// Amounts by resource.
pub type Amounts = BTreeMap<String, u64>;

/// All containers in the order in which they are started.
pub fn containers(pod: &Pod) -> impl Iterator<Item = &Container> {
    let spec = spec_of(pod);
    init_containers(spec).iter().chain(&spec.containers)
}

/// Init containers before `container` that end before it begins.
pub fn ended_before<'a>(pod: &'a Pod, container: &'a str) -> impl Iterator<Item = &'a str> {
    let before = init_containers(spec_of(pod)).iter().take_while(move |c| c.name != container);
    before.filter(|c| !is_sidecar(c)).map(|c| c.name.as_str())
}

/// Whether containers of the pod can have anything to themselves: it is Guaranteed by what they say, not
/// by what it says itself.
pub fn is_exclusive(pod: &Pod) -> bool {
    let own = spec_of(pod).resources.as_ref();
    let own = own.is_some_and(|own| own.requests.is_some() || own.limits.is_some());
    !own && qos_class(pod) == "Guaranteed"
}

/// The request, or the limit, which without one is also the request.
fn request(container: &Container, of: impl Fn(Option<&ResourceList>) -> Option<i64>) -> i64 {
    let resources = container.resources.as_ref();
    let request = of(resources.and_then(|r| r.requests.as_ref()));
    request.or_else(|| of(resources.and_then(|r| r.limits.as_ref()))).unwrap_or(0)
}

/// Requests of CPU in milli-CPUs, container by container.
pub fn milli_cpus(pod: &Pod) -> Vec<i64> {
    containers(pod).map(|c| request(c, cpu_milli)).collect()
}

/// The same of memory, in bytes.
pub fn bytes(pod: &Pod) -> Vec<i64> {
    containers(pod).map(|c| request(c, |list| amount(list, "memory"))).collect()
}

/// CPUs of the container, where it asks for whole ones.
pub fn cpus(pod: &Pod, container: &Container) -> usize {
    let milli = request(container, cpu_milli);
    if milli % 1000 != 0 || !is_exclusive(pod) {
        return 0;
    }
    usize::try_from(milli / 1000).unwrap_or(0)
}

/// Memory and huge pages of the container.
pub fn memory(pod: &Pod, container: &Container) -> Amounts {
    let resources = container.resources.as_ref();
    let lists = resources.map(|r| [r.limits.as_ref(), r.requests.as_ref()]);
    let mut all = Amounts::new();
    if !is_exclusive(pod) {
        return all;
    }
    // A request stands in the place of a limit, which without one is also the request.
    for list in lists.into_iter().flatten().flatten() {
        for name in list.keys().filter(|name| *name == "memory" || name.starts_with("hugepages-")) {
            let bytes = amount(Some(list), name).and_then(|n| u64::try_from(n).ok());
            all.insert(name.clone(), bytes.unwrap_or(0));
        }
    }
    all
}

/// What the pod has at most at once: containers and sidecars, or the largest step of initialization.
pub fn peak(pod: &Pod, of: impl Fn(&Container) -> u64) -> u64 {
    let spec = spec_of(pod);
    let (mut sidecars, mut peak) = (0u64, 0u64);
    for container in init_containers(spec) {
        let own = of(container);
        if is_sidecar(container) {
            sidecars = sidecars.saturating_add(own);
        } else {
            peak = peak.max(sidecars.saturating_add(own));
        }
    }
    spec.containers.iter().map(of).fold(sidecars, u64::saturating_add).max(peak)
}

/// CPUs that the pod has at most at once.
pub fn pod_cpus(pod: &Pod) -> usize {
    let of = |container: &Container| cpus(pod, container) as u64;
    usize::try_from(peak(pod, of)).unwrap_or(usize::MAX)
}

/// Memory that the pod has at most at once, of what its containers after initialization ask for.
pub fn pod_memory(pod: &Pod) -> Amounts {
    let names = spec_of(pod).containers.iter().flat_map(|c| memory(pod, c).into_keys());
    let sum = |name: String| {
        let of = |c: &Container| memory(pod, c).get(&name).copied().unwrap_or(0);
        let sum = peak(pod, of);
        (name, sum)
    };
    names.map(sum).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pod::testing::pod;

    #[test]
    fn whole_cpus_of_guaranteed_pods_are_exclusive() {
        for (resources, more, expected) in [
            (r#"{"limits":{"cpu":"2","memory":"1Gi"}}"#, "", (2, Some(1 << 30))),
            (r#"{"limits":{"cpu":"2000m","memory":"1Gi"}}"#, "", (2, Some(1 << 30))),
            (r#"{"limits":{"cpu":"1500m","memory":"1Gi"}}"#, "", (0, Some(1 << 30))),
            (r#"{"requests":{"cpu":"2"},"limits":{"cpu":"2"}}"#, "", (0, None)),
            (r#"{"requests":{"cpu":"1"},"limits":{"cpu":"2","memory":"1Gi"}}"#, "", (0, None)),
            (
                r#"{"limits":{"cpu":"2","memory":"1Gi"}}"#,
                r#","resources":{"limits":{"cpu":"2","memory":"1Gi"}}"#,
                (0, None),
            ),
        ] {
            let pod =
                pod(&format!(r#"{{"containers":[{{"name":"a","resources":{resources}}}]{more}}}"#));
            let a = &spec_of(&pod).containers[0];
            let found = (cpus(&pod, a), memory(&pod, a).get("memory").copied());
            assert_eq!(found, expected, "{resources}{more}");
        }
    }

    #[test]
    fn a_pod_has_the_largest_step_at_once() {
        let of = |cpu: &str| {
            format!(
                r#""resources":{{"limits":{{"cpu":"{cpu}","memory":"{cpu}Gi","hugepages-2Mi":"2Mi"}}}}"#
            )
        };
        let pod = pod(&format!(
            r#"{{"initContainers":[{{"name":"i",{}}},{{"name":"s","restartPolicy":"Always",{}}},{{"name":"j",{}}}],
                "containers":[{{"name":"a",{}}}]}}"#,
            of("2"),
            of("1"),
            of("4"),
            of("2"),
        ));
        assert_eq!(pod_cpus(&pod), 5);
        let expected = [("hugepages-2Mi".to_owned(), 4 << 20), ("memory".to_owned(), 5 << 30)];
        assert_eq!(pod_memory(&pod), expected.into());
        assert_eq!(ended_before(&pod, "a").collect::<Vec<_>>(), ["i", "j"]);
        assert_eq!(ended_before(&pod, "s").collect::<Vec<_>>(), ["i"]);
    }
}
