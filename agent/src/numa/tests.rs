//! The policies together, on made-up machines.

use super::options::{Alignment, AlignmentOptions, CpuOptions};
use super::topology::tests::machine;
use super::*;
use crate::config::Scope;
use crate::device::NoDevices;
use crate::pod::testing::pod as parse;
use crate::pod_resources::Exclusive as _;

/// CPU 0 is reserved, and a GiB of the first node's memory.
fn kept() -> Kept {
    let memory = [("memory".to_owned(), 1 << 30)].into();
    Kept { cpus: "0".parse().unwrap(), milli_cpu: 1000, memory }
}

pub(crate) fn all_on(alignment: Alignment, scope: Scope) -> NumaConfig {
    NumaConfig {
        cpu: Some(CpuOptions::default()),
        memory: Some([(0, kept().memory)].into()),
        alignment,
        scope,
        reconcile_period: Duration::from_secs(10),
        ..NumaConfig::default()
    }
}

pub(crate) fn on(folder: &Path, shape: [u32; 4], config: &NumaConfig) -> Arc<Numa> {
    Arc::new(Numa::on(folder, machine(shape, 1), config, &kept()).unwrap())
}

/// A pod of containers such as `i:2` (init), `s:1` (sidecar), `a:4`; `limits` makes theirs of what
/// follows the colon.
pub(crate) fn pod_of(uid: &str, containers: &str, limits: impl Fn(&str) -> String) -> Pod {
    let (mut inits, mut mains) = (Vec::new(), Vec::new());
    for text in containers.split_whitespace() {
        let (name, amount) = text.split_once(':').unwrap();
        let policy = if name.starts_with('s') { r#","restartPolicy":"Always""# } else { "" };
        let container = format!(
            r#"{{"name":"{name}","resources":{{"limits":{{{}}}}}{policy}}}"#,
            limits(amount)
        );
        let list = if name.starts_with(['i', 's']) { &mut inits } else { &mut mains };
        list.push(container);
    }
    let mut pod = parse(&format!(
        r#"{{"initContainers":[{}],"containers":[{}]}}"#,
        inits.join(","),
        mains.join(",")
    ));
    pod.metadata.uid = Some(uid.to_owned());
    pod
}

fn pod(uid: &str, cpus: &[u32]) -> Pod {
    let container = |(at, cpus): (usize, &u32)| {
        format!(r#"{{"name":"c{at}","resources":{{"limits":{{"cpu":"{cpus}","memory":"1Gi"}}}}}}"#)
    };
    let containers: Vec<String> = cpus.iter().enumerate().map(container).collect();
    let mut pod = parse(&format!(r#"{{"containers":[{}]}}"#, containers.join(",")));
    pod.metadata.uid = Some(uid.to_owned());
    pod
}

/// Where each of its containers runs, as `1-2@0`; or why it is refused.
async fn admit(numa: &Arc<Numa>, pod: &Pod) -> String {
    if let Err(refusal) = numa.admit(pod, &NoDevices::default()).await {
        return format!("{}: {}", refusal.reason, refusal.message);
    }
    let place = |container: &k8s_openapi::api::core::v1::Container| {
        let Placement { cpus, mems } = numa.placement(&PodUid::of(pod), &container.name);
        format!("{cpus}@{mems}")
    };
    requests::containers(pod).map(place).collect::<Vec<_>>().join(" ")
}

#[tokio::test]
async fn scopes_and_policies_decide_what_is_brought_together() {
    const REFUSED: &str =
        "TopologyAffinityError: Resources cannot be allocated with Topology locality";
    for (alignment, scope, cpus, expected) in [
        (Alignment::None, Scope::Container, &[2, 2][..], "1-2@0 3-4@0"),
        (Alignment::BestEffort, Scope::Container, &[2, 2], "1-2@0 4-5@1"),
        (Alignment::BestEffort, Scope::Pod, &[2, 2], "4-5@1 6-7@1"),
        (Alignment::BestEffort, Scope::Container, &[5], "1,4-7@0-1"),
        (Alignment::SingleNode, Scope::Container, &[4], "4-7@1"),
        (Alignment::SingleNode, Scope::Pod, &[4, 1], REFUSED),
        (Alignment::SingleNode, Scope::Container, &[4, 1], "4-7@1 1@0"),
        (Alignment::SingleNode, Scope::Container, &[5], REFUSED),
        (Alignment::Restricted, Scope::Container, &[4, 4], REFUSED),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let numa = on(folder.path(), [2, 1, 4, 1], &all_on(alignment, scope));
        let found = admit(&numa, &pod("1", cpus)).await;
        assert_eq!(found, expected, "{alignment:?} {scope:?} {cpus:?}");
        if expected == REFUSED {
            let state = lock(&numa.state);
            let none = state.cpus.assigned.is_empty() && state.memory.assigned.is_empty();
            assert!(none, "it has nothing of what was given before");
        }
    }
}

#[tokio::test]
async fn what_was_given_is_there_after_a_crash_and_told() {
    let folder = tempfile::tempdir().unwrap();
    let config = all_on(Alignment::None, Scope::Container);
    let numa = on(folder.path(), [2, 1, 4, 1], &config);
    let pod = pod("1", &[2]);
    let mut pool = numa.pool();
    assert_eq!(admit(&numa, &pod).await, "1-2@0");
    assert!(pool.has_changed().unwrap());
    pool.mark_unchanged();
    let uid = PodUid::from("1");
    assert_eq!(numa.placement(&PodUid::from("2"), "c").cpus, "0,3-7");
    assert_eq!((numa.cpu_ids(&uid, "c0"), numa.cpu_ids(&uid, "c1")), (vec![1, 2], vec![]));
    assert_eq!(numa.allocatable_cpu_ids(), (1..8).collect::<Vec<_>>());
    let told = numa.memory(&uid, "c0");
    assert_eq!((told.len(), told[0].bytes, &told[0].numa), (1, 1 << 30, &[0].into()));
    assert_eq!(numa.allocatable_memory().len(), 4);
    assert!(numa.frees_of_quota(&uid, Some("c0")) && numa.frees_of_quota(&uid, None));
    assert!(!numa.frees_of_quota(&uid, Some("c1")));

    let again = on(folder.path(), [2, 1, 4, 1], &config);
    assert_eq!(again.cpu_ids(&uid, "c0"), [1, 2]);
    assert_eq!(admit(&again, &pod).await, "1-2@0", "it keeps them");
    again.retain(&HashSet::new());
    assert_eq!(again.placement(&uid, "c0").cpus, "0-7");
    again.save().await.unwrap();
    assert_eq!(on(folder.path(), [2, 1, 4, 1], &config).cpu_ids(&uid, "c0"), Vec::<i64>::new());

    numa.release(&uid);
    assert!(pool.has_changed().unwrap());
}

#[test]
fn another_policy_finds_the_file_of_the_one_before() {
    let folder = tempfile::tempdir().unwrap();
    let open = |config: &NumaConfig| {
        let opened = Numa::open(folder.path(), Path::new("/sys"), config, &kept());
        opened.map(|numa| numa.is_some()).map_err(|error| error.to_string())
    };
    assert_eq!(open(&NumaConfig::default()), Ok(false));
    let file = std::fs::read_to_string(folder.path().join(CPU_FILE)).unwrap();
    assert!(file.contains(r#""policyName":"none""#), "{file}");
    let cpu = NumaConfig { cpu: Some(CpuOptions::default()), ..NumaConfig::default() };
    let error = open(&cpu).unwrap_err();
    assert!(error.contains("policy \"static\" differs from state checkpoint policy \"none\""));
    assert!(error.contains("cpu_manager_state"), "{error}");
    std::fs::remove_file(folder.path().join(CPU_FILE)).unwrap();
    assert_eq!(open(&cpu), Ok(true));
    assert_eq!(open(&cpu), Ok(true));
    assert!(open(&NumaConfig::default()).is_err());
}

#[test]
fn machines_that_are_not_fit_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let new = |shape, config: &NumaConfig, kept: &Kept| {
        let numa = Numa::on(folder.path(), machine(shape, 1), config, kept);
        numa.map(drop).map_err(|error| error.to_string())
    };
    let aligned = all_on(Alignment::BestEffort, Scope::Pod);
    let error = new([3, 3, 1, 1], &aligned, &kept()).unwrap_err();
    assert!(error.contains("unsupported on machines with more than 8 NUMA Nodes"), "{error}");
    let options = AlignmentOptions { max_nodes: 9, closest: true };
    let more = NumaConfig { alignment_options: options, ..aligned };
    assert_eq!(new([3, 3, 1, 1], &more, &kept()), Ok(()));
    let nothing = Kept { milli_cpu: 0, cpus: CpuSet::default(), ..kept() };
    let error = new([1, 1, 2, 1], &more, &nothing).unwrap_err();
    assert!(error.starts_with("cpuManagerPolicy: [cpumanager] the static policy requires"));
}

#[test]
fn guaranteed_pods_are_not_resized() {
    let folder = tempfile::tempdir().unwrap();
    let numa = on(folder.path(), [1, 1, 4, 1], &all_on(Alignment::None, Scope::Container));
    let why = numa.refuses_resize(&pod("1", &[1]), &pod("1", &[2])).unwrap();
    assert_eq!(
        why,
        "Resize is infeasible for Guaranteed Pods alongside CPU Manager policy \"static\""
    );
    assert_eq!(numa.refuses_resize(&pod("1", &[1]), &pod("1", &[1])), None);
    let mut more = pod("1", &[1]);
    let container = &mut more.spec.as_mut().unwrap().containers[0];
    let limits = container.resources.as_mut().unwrap().limits.as_mut().unwrap();
    limits.get_mut("memory").unwrap().0 = "2Gi".to_owned();
    let why = numa.refuses_resize(&pod("1", &[1]), &more).unwrap();
    assert!(why.contains("Memory Manager policy \"Static\""), "{why}");
}
