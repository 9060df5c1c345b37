use proptest::prelude::*;

use super::super::tests::pod_of;
use super::super::topology::tests::machine;
use super::*;

const GIB: u64 = 1 << 30;

/// A Guaranteed pod of containers such as `i:2` (init), `s:1` (sidecar), `a:1+1` (GiB and GiB of huge
/// pages).
fn pod(uid: &str, containers: &str) -> Pod {
    pod_of(uid, containers, |memory| {
        let (memory, huge) = memory.split_once('+').unwrap_or((memory, "0"));
        let huge = match huge {
            "0" => String::new(),
            huge => format!(r#","hugepages-2Mi":"{huge}Gi""#),
        };
        format!(r#""cpu":"1","memory":"{memory}Gi"{huge}"#)
    })
}

/// Of two nodes with 4 GiB, of which 1 is huge pages; 1 of the first is reserved.
fn policy() -> MemoryPolicy {
    let reserved = [(0, [("memory".to_owned(), GIB)].into())].into();
    let kept = [("memory".to_owned(), GIB)].into();
    MemoryPolicy::new(&machine([2, 1, 2, 1], 1), &reserved, &kept).unwrap()
}

fn on(nodes: &[u32]) -> Hint {
    Hint { nodes: Some(nodes.iter().copied().collect()), preferred: true }
}

/// What the pod has, as `a=0 b=01`; or why not.
fn give(memory: &mut Memory, pod: &Pod, hint: Hint) -> String {
    for container in containers(pod) {
        if let Err(error) = policy().allocate(memory, pod, container, hint) {
            return error.to_string();
        }
    }
    let own = memory.assigned.get(&PodUid::of(pod)).into_iter().flatten();
    let text = own.map(|(name, blocks)| {
        let nodes = blocks.iter().map(|b| b.nodes.iter().map(u32::to_string).collect::<String>());
        format!("{name}={}", nodes.collect::<Vec<_>>().join(","))
    });
    text.collect::<Vec<_>>().join(" ")
}

fn free(memory: &Memory) -> Vec<u64> {
    memory.nodes.values().map(|node| node.table("memory").free / GIB).collect()
}

#[test]
fn memory_is_counted_node_by_node_and_comes_back() {
    let mut memory = policy().initial();
    assert_eq!(free(&memory), [2, 3]);
    assert_eq!(give(&mut memory, &pod("1", "a:1 b:1"), Hint::default()), "a=0 b=0");
    assert_eq!(give(&mut memory, &pod("2", "a:1+1"), on(&[1])), "a=1,1");
    assert_eq!(free(&memory), [0, 2]);
    assert_eq!(memory.nodes[&1].assignments, 2);
    assert_eq!(give(&mut memory, &pod("2", "a:1+1"), on(&[1])), "a=1,1", "again");
    let said = give(&mut memory, &pod("3", "a:3"), Hint::default());
    assert!(said.contains("no NUMA nodes with enough memory is available"), "{said}");
    assert_eq!(policy().check(&memory), Ok(()));
    assert!(memory.release(&PodUid::from("1")) && memory.release(&PodUid::from("2")));
    assert_eq!(memory, policy().initial());
}

#[test]
fn nodes_serve_alone_or_together_with_the_same() {
    let mut memory = policy().initial();
    assert_eq!(give(&mut memory, &pod("1", "a:4"), Hint::default()), "a=01");
    assert_eq!(free(&memory), [0, 1]);
    assert_eq!(memory.nodes[&0].cells, [0, 1]);
    // The second node has enough, but serves with the first.
    assert_eq!(give(&mut memory, &pod("2", "a:1"), Hint::default()), "a=01");
    memory.retain(&HashSet::new());
    give(&mut memory, &pod("1", "a:1"), on(&[0]));
    let said = give(&mut memory, &pod("2", "a:4"), on(&[0, 1]));
    assert_eq!(said, "[memorymanager] preferred hint violates NUMA node allocation");
    // A hint that has not enough is extended.
    memory.retain(&HashSet::new());
    let loose = Hint { preferred: false, ..on(&[0]) };
    assert_eq!(give(&mut memory, &pod("1", "a:3"), loose), "a=01");
    memory.retain(&HashSet::new());
    let said = give(&mut memory, &pod("1", "a:3"), on(&[0]));
    assert_eq!(said, "[memorymanager] failed to find the extended preferred hint");
}

#[test]
fn init_containers_hand_on_their_memory() {
    let mut memory = policy().initial();
    assert_eq!(
        give(&mut memory, &pod("1", "i:1 s:1 i2:2 a:1 b:1"), on(&[1])),
        "a=1 b=1 i=1 i2=1 s=1"
    );
    assert_eq!(free(&memory), [2, 0]);
    assert_eq!(policy().check(&memory), Ok(()));
    memory.release(&PodUid::from("1"));
    assert_eq!(memory, policy().initial());
}

#[test]
fn hints_name_the_nodes_that_have_as_much() {
    let told = |hints: Hints| -> String {
        let one = |hint: Hint| {
            let nodes = hint.nodes.unwrap_or_default().nodes().map(|n| n.to_string());
            format!("{}{}", nodes.collect::<String>(), if hint.preferred { "!" } else { "" })
        };
        let list = hints.get("memory").cloned().flatten().into_iter().flatten();
        list.map(one).collect::<Vec<_>>().join(" ")
    };
    let mut memory = policy().initial();
    for (containers, expected) in
        [("a:1", "0! 1! 01"), ("a:3", "1! 01"), ("a:4", "01!"), ("a:6", "")]
    {
        assert_eq!(told(policy().hints(&memory, &pod("1", containers), None)), expected);
    }
    let both = policy().hints(&memory, &pod("1", "a:1+1"), None);
    assert_eq!(both.keys().collect::<Vec<_>>(), ["hugepages-2Mi", "memory"]);
    give(&mut memory, &pod("1", "a:1"), on(&[1]));
    assert_eq!(told(policy().hints(&memory, &pod("1", "a:1"), None)), "1!");
    assert_eq!(told(policy().hints(&memory, &pod("2", "a:4"), None)), "", "it cannot be shared");
}

#[test]
fn what_is_reserved_must_add_up() {
    let new = |reserved: Reserved, kept: u64| {
        let kept = [("memory".to_owned(), kept)].into();
        MemoryPolicy::new(&machine([2, 1, 2, 1], 1), &reserved, &kept).map(drop)
    };
    let of = |node: u32, bytes: u64| (node, Amounts::from([("memory".to_owned(), bytes)]));
    assert_eq!(new([of(0, GIB), of(1, GIB)].into(), 2 * GIB), Ok(()));
    for (reserved, kept, said) in [
        (vec![of(0, GIB)], 2 * GIB, "is not equal to the value \"2147483648\""),
        (vec![of(2, GIB)], GIB, "references a NUMA node 2 that does not exist"),
        (vec![], 0, "you should specify the system reserved memory"),
        (
            vec![of(0, 4 * GIB)],
            4 * GIB,
            "reservedMemory keeps 4294967296 bytes of memory on NUMA node 0",
        ),
    ] {
        let error = new(reserved.into_iter().collect(), kept).unwrap_err();
        assert!(error.contains(said), "{error}");
    }
    let told = policy().allocatable();
    let sizes: Vec<_> = told.iter().map(|b| (b.nodes[0], &*b.kind, b.size / GIB)).collect();
    assert_eq!(
        sizes,
        [(0, "hugepages-2Mi", 1), (0, "memory", 2), (1, "hugepages-2Mi", 1), (1, "memory", 3)]
    );
}

#[test]
fn what_is_on_disk_must_be_of_this_machine() {
    let mut memory = policy().initial();
    give(&mut memory, &pod("1", "a:1"), on(&[1]));
    let mut other = memory.clone();
    other.nodes.get_mut(&0).unwrap().tables.get_mut("memory").unwrap().total += 1;
    let mut more = memory.clone();
    more.assigned.values_mut().for_each(|own| own.get_mut("a").unwrap()[0].size += 1);
    let mut nowhere = memory.clone();
    nowhere.assigned.values_mut().for_each(|own| own.get_mut("a").unwrap()[0].nodes = vec![7]);
    for (state, said) in [
        (other, "is different from the real one"),
        (more, "is different from the real one"),
        (nowhere, "(pod: 1, container: a) the memory assignment uses the NUMA that does not exist"),
    ] {
        let error = policy().check(&state).unwrap_err();
        assert!(error.contains(said), "{error}");
    }
}

proptest! {
    #[test]
    fn memory_is_promised_once_and_comes_back_whole(
        steps in prop::collection::vec((0u8..5, prop::sample::select(vec!["a:1", "a:1+1", "a:4", "i:2 a:1", "i:1 s:1 a:1 b:1", "a:9"]), any::<bool>(), prop::option::of(0u32..2)), 1..20),
    ) {
        let mut memory = policy().initial();
        for (who, containers, leaves, node) in steps {
            let uid = PodUid::from(format!("{who}").as_str());
            if leaves {
                memory.release(&uid);
            } else if !memory.assigned.contains_key(&uid) {
                let hint = node.map(|node| Hint { preferred: false, ..on(&[node]) });
                let pod = pod(uid.as_str(), containers);
                let hint = hint.unwrap_or_default();
                let before = memory.clone();
                let policy = policy();
                if crate::numa::requests::containers(&pod).any(|c| policy.allocate(&mut memory, &pod, c, hint).is_err()) {
                    memory.release(&uid);
                    // Nodes of one group may give back what another one gave.
                    prop_assert_eq!(free(&memory).iter().sum::<u64>(), free(&before).iter().sum::<u64>());
                }
            }
            prop_assert_eq!(policy().check(&memory), Ok(()));
            for node in memory.nodes.values() {
                for table in node.tables.values() {
                    prop_assert_eq!(table.free + table.reserved, table.allocatable);
                }
            }
        }
        memory.retain(&HashSet::new());
        prop_assert_eq!(memory, policy().initial());
    }
}
