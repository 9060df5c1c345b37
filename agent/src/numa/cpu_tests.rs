use proptest::prelude::*;

use super::super::tests::pod_of;
use super::super::topology::tests::machine;
use super::*;

/// A Guaranteed pod of containers such as `i:2` (init), `s:1` (sidecar), `a:4`.
fn pod(uid: &str, containers: &str) -> Pod {
    pod_of(uid, containers, |cpus| format!(r#""cpu":"{cpus}","memory":"1Gi""#))
}

fn policy(shape: [u32; 4], reserved: &str, options: CpuOptions) -> CpuPolicy {
    let reserved: CpuSet = reserved.parse().unwrap();
    CpuPolicy::new(machine(shape, 1), options, &reserved, reserved.len() as u64 * 1000).unwrap()
}

/// Gives all containers of the pod their CPUs; what the pod has, as `a=1-2`.
fn give(policy: &CpuPolicy, cpus: &mut Cpus, pod: &Pod, hint: Hint) -> String {
    for container in requests::containers(pod) {
        if let Err(error) = policy.allocate(cpus, pod, container, hint) {
            return error.to_string();
        }
    }
    let own = cpus.assigned.get(&PodUid::of(pod));
    let text = own.into_iter().flatten().map(|(name, cpus)| format!("{name}={cpus}"));
    text.collect::<Vec<_>>().join(" ")
}

fn on(nodes: &[u32]) -> Hint {
    Hint { nodes: Some(nodes.iter().copied().collect()), preferred: true }
}

#[test]
fn whole_cpus_leave_the_pool_and_come_back_whole() {
    let policy = policy([1, 1, 4, 2], "0", CpuOptions::default());
    let mut cpus = policy.initial();
    assert_eq!(cpus.shared.to_string(), "0-7");
    let (one, two) = (pod("1", "a:2 b:1"), pod("2", "a:1500m"));
    assert_eq!(give(&policy, &mut cpus, &one, Hint::default()), "a=1,5 b=4");
    assert_eq!(give(&policy, &mut cpus, &one, Hint::default()), "a=1,5 b=4", "again");
    assert_eq!(give(&policy, &mut cpus, &two, Hint::default()), "", "shares");
    assert_eq!(cpus.shared.to_string(), "0,2-3,6-7");
    let many = pod("3", "a:5");
    let said = "not enough cpus available to satisfy request: requested=5, available=4";
    assert_eq!(give(&policy, &mut cpus, &many, Hint::default()), said);
    assert_eq!(policy.by_node(&cpus), [(0, 3)].into());
    assert!(cpus.release(&PodUid::from("1")) && !cpus.release(&PodUid::from("1")));
    assert_eq!(cpus, policy.initial());
}

#[test]
fn init_containers_hand_on_their_cpus_and_sidecars_keep_theirs() {
    let policy = policy([1, 1, 8, 1], "0", CpuOptions::default());
    let mut cpus = policy.initial();
    let pod = pod("1", "i:2 s:1 i2:3 a:2 b:1");
    let given = give(&policy, &mut cpus, &pod, Hint::default());
    assert_eq!(given, "a=2-3 b=4 i=1-2 i2=2-4 s=1");
    assert_eq!(cpus.exclusive().len(), requests::pod_cpus(&pod));
    cpus.release(&PodUid::of(&pod));
    assert_eq!(cpus, policy.initial());
}

#[test]
fn cpus_come_from_the_nodes_of_the_hint_first() {
    let plain = policy([2, 1, 4, 1], "0", CpuOptions::default());
    for (containers, hint, expected) in [
        ("a:2", on(&[1]), "a=4-5"),
        ("a:5", on(&[1]), "a=1,4-7"),
        ("a:2 b:2", on(&[1]), "a=4-5 b=6-7"),
    ] {
        let given = give(&plain, &mut plain.initial(), &pod("1", containers), hint);
        assert_eq!(given, expected, "{containers}");
    }
    let by_socket = CpuOptions { by_socket: true, ..CpuOptions::default() };
    let sockets = policy([2, 2, 2, 1], "0", by_socket);
    let given = give(&sockets, &mut sockets.initial(), &pod("1", "a:3"), on(&[3]));
    assert_eq!(given, "a=4-6", "all of the socket is near");
}

#[test]
fn hints_are_where_there_are_enough() {
    let told = |hints: Hints| -> String {
        let Some(list) = hints.get("cpu") else { return "any".into() };
        let one = |hint: &Hint| {
            let nodes = hint.nodes.unwrap_or_default().nodes().map(|n| n.to_string());
            format!("{}{}", nodes.collect::<String>(), if hint.preferred { "!" } else { "" })
        };
        list.iter().flatten().map(one).collect::<Vec<_>>().join(" ")
    };
    let policy = policy([2, 1, 4, 1], "0", CpuOptions::default());
    let mut cpus = policy.initial();
    for (containers, of_container, of_pod) in [
        ("a:2 b:2", "0! 1! 01", "1! 01"),
        ("a:4", "1! 01", "1! 01"),
        ("a:5", "01!", "01!"),
        ("a:8", "", ""),
        ("a:500m", "any", "any"),
    ] {
        let pod = pod("1", containers);
        let first = requests::containers(&pod).next();
        let hints = [first, None].map(|c| told(policy.hints(&cpus, &pod, c)));
        assert_eq!(hints, [of_container, of_pod], "{containers}");
    }
    // What is there already is told again, by whoever asks for as much.
    let had = pod("1", "a:2");
    give(&policy, &mut cpus, &had, on(&[1]));
    let again = |text: &str| {
        told(policy.hints(&cpus, &pod("1", text), requests::containers(&pod("1", text)).next()))
    };
    assert_eq!((again("a:2"), again("a:3")), ("1! 01".into(), String::new()));
}

#[test]
fn whole_cores_only_where_that_is_asked_for() {
    let options = CpuOptions { full_cores: true, ..CpuOptions::default() };
    let policy = policy([1, 1, 4, 2], "0", options);
    let mut cpus = policy.initial();
    for (containers, expected) in [
        ("a:3", "SMT Alignment Error: requested 3 cpus not multiple cpus per core = 2"),
        (
            "a:8",
            "SMT Alignment Error: not enough free physical CPUs: available physical CPUs = 6, \
             requested CPUs = 8, CPUs per core = 2",
        ),
        ("a:6", "a=1-3,5-7"),
    ] {
        assert_eq!(give(&policy, &mut cpus, &pod("1", containers), Hint::default()), expected);
    }
}

#[test]
fn something_is_reserved_or_nothing_is_given() {
    let new = |reserved: &str, milli| {
        let topology = machine([1, 1, 4, 2], 1);
        let reserved = reserved.parse().unwrap();
        CpuPolicy::new(topology, CpuOptions::default(), &reserved, milli)
            .map(|policy| policy.reserved.to_string())
    };
    assert_eq!(new("", 500), Ok("0".into()));
    assert_eq!(new("", 1001), Ok("0,4".into()), "a whole core");
    assert_eq!(new("3", 1000), Ok("3".into()));
    assert!(new("", 0).unwrap_err().contains("to be greater than zero"));
    let said = new("", 9000).unwrap_err();
    assert!(said.contains("unable to reserve the required amount of CPUs (size of "), "{said}");
    let strict = CpuOptions { strict: true, ..CpuOptions::default() };
    let policy = policy([1, 1, 4, 1], "1", strict);
    assert_eq!(policy.initial().shared.to_string(), "0,2-3");
    assert_eq!(policy.allocatable().to_string(), "0,2-3");
    assert_eq!(policy.check(&policy.initial()), Ok(()));
}

#[test]
fn what_is_on_disk_must_be_of_this_machine() {
    let plain = policy([1, 1, 4, 1], "0", CpuOptions::default());
    let state = |shared: &str, own: &str| Cpus {
        shared: shared.parse().unwrap(),
        assigned: match own {
            "" => Assigned::new(),
            own => [(PodUid::from("u"), [("c".to_owned(), own.parse().unwrap())].into())].into(),
        },
    };
    assert_eq!(plain.check(&state("0-1", "2-3")), Ok(()));
    for (shared, own, said) in [
        ("", "1", "default cpuset cannot be empty"),
        ("1-3", "", "not all reserved cpus: \"0\" are present in defaultCpuSet: \"1-3\""),
        ("0-3", "3", "pod: u, container: c cpuset: \"3\" overlaps with default cpuset \"0-3\""),
        (
            "0-1",
            "3",
            "current set of available CPUs \"0-3\" doesn't match with CPUs in state \"0-1,3\"",
        ),
    ] {
        assert_eq!(plain.check(&state(shared, own)).unwrap_err(), said);
    }
    let strict = policy([1, 1, 4, 1], "0", CpuOptions { strict: true, ..CpuOptions::default() });
    assert!(strict.check(&state("0-3", "")).unwrap_err().contains("strictly reserved cpus: \"0\""));
}

proptest! {
    #[test]
    fn no_cpu_is_given_twice_nor_a_reserved_one_and_all_come_back(
        shape in prop::sample::select(vec![[1, 1, 4, 1], [1, 1, 4, 2], [2, 1, 4, 2], [2, 2, 2, 2]]),
        options in any::<[bool; 6]>(),
        steps in prop::collection::vec((0u8..5, prop::sample::select(vec!["a:1", "a:2", "a:3 b:1", "i:3 a:2", "i:1 s:1 a:1 b:2", "a:500m", "a:9"]), any::<bool>(), 0u32..4), 1..20),
    ) {
        let [full_cores, across_nodes, by_socket, across_cores, strict, by_cache] = options;
        let options = CpuOptions { full_cores, across_nodes, by_socket, across_cores, strict, by_cache };
        let policy = policy(shape, "0", options);
        let initial = policy.initial();
        let mut cpus = initial.clone();
        for (who, containers, leaves, node) in steps {
            let uid = PodUid::from(format!("{who}").as_str());
            if leaves {
                cpus.release(&uid);
            } else if !cpus.assigned.contains_key(&uid) {
                let pod = pod(uid.as_str(), containers);
                let before = cpus.clone();
                let fails = requests::containers(&pod)
                    .any(|c| policy.allocate(&mut cpus, &pod, c, on(&[node])).is_err());
                if fails {
                    cpus.release(&uid);
                    prop_assert_eq!(&cpus, &before);
                } else {
                    for c in requests::containers(&pod) {
                        let own = cpus.of(&uid, &c.name).map_or(0, CpuSet::len);
                        prop_assert_eq!(own, requests::cpus(&pod, c));
                    }
                }
            }
            prop_assert_eq!(policy.check(&cpus), Ok(()));
            prop_assert!(!cpus.exclusive().contains(0));
            // Pods never share what is their own.
            let of_pods: usize = cpus.assigned.values().map(|own| {
                own.values().fold(CpuSet::default(), |sum, cpus| sum.union(cpus)).len()
            }).sum();
            prop_assert_eq!(of_pods, cpus.exclusive().len());
        }
        cpus.retain(&HashSet::new());
        prop_assert_eq!(cpus, initial);
    }
}
