//! Laws of the nftables rulesets, on a fake kernel that refuses what the real one would refuse:
//! whatever changes, the table is what its Services ask for, and a change costs its own size.
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]

mod common;

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

use common::{endpoint, pod_ip, service, slice};
use nft::{Data, Fake, Family, Key, Verdict};
use proptest::prelude::*;
use proxy::backend::Environment;
use proxy::config::LocalTraffic;
use proxy::model::{Model, PlanChange};
use proxy::nftables::base::Structure;
use proxy::nftables::entries::{Slots, Target};
use proxy::nftables::kinds::{Kind, number_of};
use proxy::nftables::names::{Dispatch, MapId, Pool};
use proxy::nftables::ruleset::{Observed, Ruleset};
use proxy::object::{Change, Service, TrafficPolicy};

fn structure(family: Family) -> Structure {
    let environment = Environment {
        masquerade_bit: 0x4000,
        masquerade_all: false,
        local: LocalTraffic::Cidrs(vec![
            "10.88.0.0/16".parse().unwrap(),
            "fd88::/64".parse().unwrap(),
        ]),
        service_cidrs: vec!["10.96.0.0/12".parse().unwrap()],
        node_ports: None,
        localhost: true,
        drop_invalid: true,
        counters: false,
    };
    Structure { family, environment }
}

/// A family's ruleset with its fake kernel.
struct Side {
    ruleset: Ruleset,
    kernel: Fake,
}

impl Side {
    fn new(family: Family) -> Side {
        let ruleset = Ruleset::new(structure(family));
        let mut side = Side { ruleset, kernel: Fake::new() };
        for planned in side.ruleset.plan_repair(None, &Observed::new(), false) {
            side.apply(&planned.transaction);
            side.ruleset.commit_repair(planned);
        }
        side
    }

    fn apply(&mut self, transaction: &nft::Transaction) {
        assert_eq!(self.kernel.apply(transaction), Ok(()), "{transaction:#?}");
    }

    fn change(&mut self, changes: &[PlanChange]) -> usize {
        let changes = changes.iter().map(|c| (&c.service, c.new.as_ref()));
        let planned = self.ruleset.plan_changes(changes);
        let elements = planned.elements();
        if !planned.transaction.is_empty() {
            self.apply(&planned.transaction);
        }
        self.ruleset.commit(planned);
        elements
    }

    /// What the kernel has is what the ruleset thinks that it has.
    fn check(&self) {
        let mut wanted: BTreeMap<(MapId, Key), Option<Data>> = BTreeMap::new();
        let numbers: BTreeMap<Kind, u32> = self.ruleset.kinds().into_iter().collect();
        for entry in self.ruleset.entries() {
            let data = entry.data(|kind| numbers[&kind]);
            wanted.insert((entry.map, entry.key), data);
        }
        for (kind, number) in numbers {
            let key = Key::new().number(number);
            wanted.insert((kind.map(), key), Some(Data::Verdict(kind.verdict())));
        }
        let mut found = BTreeMap::new();
        for map in MapId::all() {
            for element in self.kernel.elements(&self.ruleset.table(), &map.to_string()) {
                found.insert((map, element.key), element.data);
            }
        }
        assert_eq!(found, wanted);
    }

    /// The endpoints of each key, whatever their slots; and all keys of the other maps.
    fn meaning(&self) -> BTreeMap<(MapId, Vec<u8>), Vec<Option<Data>>> {
        let mut all: BTreeMap<(MapId, Vec<u8>), Vec<Option<Data>>> = BTreeMap::new();
        for entry in self.ruleset.entries() {
            let indexed =
                matches!(entry.map, MapId::Endpoints(_) | MapId::Kept(_) | MapId::Picks(_));
            let len = entry.key.bytes().len() - if indexed { 4 } else { 0 };
            // With affinity, verdicts tell slots, which history decides.
            let history = |verdict: Verdict| {
                let text = format!("{verdict:?}");
                let told = text.contains("sticky") || text.contains("slot-");
                (!told).then_some(Data::Verdict(verdict))
            };
            let data = match entry.target {
                Some(Target::Data(Data::Value(value))) => Some(Data::Value(value)),
                Some(Target::Data(Data::Verdict(verdict))) => history(verdict),
                Some(Target::Kind(kind)) => history(kind.verdict()),
                None => None,
            };
            all.entry((entry.map, entry.key.bytes()[..len].to_vec())).or_default().push(data);
        }
        all.values_mut().for_each(|values| values.sort());
        all
    }
}

fn observe(kernel: &Fake, table: &nft::Table) -> Observed {
    let of = |map: MapId| {
        let elements = kernel.elements(table, &map.to_string());
        (map, elements.into_iter().map(|e| (e.key, (e.key_end, e.data))).collect())
    };
    MapId::all().into_iter().map(of).collect()
}

/// What packets to an address or port meet: the verdict, and the endpoints that it chooses from.
type Served = BTreeMap<(Dispatch, Key), (Option<Data>, BTreeMap<String, Vec<Data>>)>;

fn served(kernel: &Fake, ruleset: &Ruleset) -> Served {
    let table = ruleset.table();
    let observed = observe(kernel, &table);
    let mut served = Served::new();
    for dispatch in Dispatch::ALL {
        let origin = dispatch.origin();
        let mut verdicts: BTreeMap<&Key, Data> = BTreeMap::new();
        for (key, (_, data)) in &observed[&MapId::Numbers(dispatch)] {
            let number = Key::new().number(number_of(data.as_ref().unwrap()).unwrap());
            let (_, verdict) = &observed[&dispatch.leads_by()][&number];
            verdicts.insert(key, verdict.clone().unwrap());
        }
        for (key, verdict) in verdicts {
            let mut endpoints: BTreeMap<String, Vec<Data>> = BTreeMap::new();
            let mut look = |map: MapId, key: &Key| {
                let mut slots: Vec<_> = observed[&map]
                    .iter()
                    .filter(|(k, _)| k.bytes()[..k.bytes().len() - 4] == *key.bytes())
                    .map(|(k, (_, data))| (k.clone(), data.clone().unwrap()))
                    .collect();
                slots.sort();
                let data = slots.into_iter().map(|(_, data)| data).collect();
                endpoints.insert(map.to_string(), data);
            };
            let text = format!("{verdict:?}");
            if text.contains("sticky") {
                let (_, id) = &observed[&MapId::Ids(origin)][key];
                let id = Key::new().number(number_of(id.as_ref().unwrap()).unwrap());
                for pool in Pool::ALL.into_iter().filter(|pool| pool.origin == origin) {
                    look(MapId::Kept(pool.policy), &id);
                    look(MapId::Picks(pool), &id);
                }
                // Each index leads to a slot.
                let of_port = |key: &&Key| key.bytes().starts_with(id.bytes());
                for pool in Pool::ALL {
                    let picks = &observed[&MapId::Picks(pool)];
                    for (_, data) in picks.keys().filter(of_port).map(|key| &picks[key]) {
                        let number = number_of(data.as_ref().unwrap()).unwrap();
                        let number = Key::new().number(number);
                        assert!(observed[&MapId::SlotKinds].contains_key(&number));
                    }
                }
            } else if !matches!(dispatch, Dispatch::NoEndpoints(_)) {
                for pool in Pool::ALL.into_iter().filter(|pool| pool.origin == origin) {
                    look(MapId::Endpoints(pool), key);
                }
            }
            served.insert((dispatch, key.clone()), (Some(verdict), endpoints));
        }
    }
    served
}

#[derive(Clone, Debug)]
struct Wish {
    number: u16,
    node_port: bool,
    external: bool,
    load_balancer: bool,
    ranges: bool,
    sticky: Option<u8>,
    internal_local: bool,
    external_local: bool,
    endpoints: Vec<(usize, bool, bool)>,
    gone: bool,
}

fn wish() -> impl Strategy<Value = Wish> {
    let endpoints = proptest::collection::vec((0..6_usize, any::<bool>(), any::<bool>()), 0..7);
    let flags = proptest::collection::vec(any::<bool>(), 6);
    (1..5_u16, flags, proptest::option::of(1..3_u8), endpoints, 0..5_u8).prop_map(
        |(number, flags, sticky, endpoints, gone)| Wish {
            number,
            node_port: flags[0],
            external: flags[1],
            load_balancer: flags[2],
            ranges: flags[3],
            sticky,
            internal_local: flags[4],
            external_local: flags[5],
            endpoints,
            gone: gone == 0,
        },
    )
}

fn tell(model: &mut Model, wish: &Wish) {
    let mut svc: Service = service(wish.number);
    if wish.gone {
        model.apply(Change::ServiceGone(svc.key));
        return;
    }
    let policy = |local| if local { TrafficPolicy::Local } else { TrafficPolicy::Cluster };
    svc.ports[0].node_port = if wish.node_port { 30000 + wish.number } else { 0 };
    if wish.external {
        // Two Services may ask for the same one.
        svc.external_ips = vec![IpAddr::from([203, 0, 113, (wish.number / 2) as u8 + 1])];
    }
    if wish.load_balancer {
        svc.load_balancer_ips = vec![IpAddr::from([198, 51, 100, wish.number as u8])];
    }
    if wish.ranges {
        svc.load_balancer_source_ranges =
            ["10.0.0.0/8", "10.1.0.0/16", "192.168.1.1/32"].map(|c| c.parse().unwrap()).to_vec();
    }
    svc.session_affinity = wish.sticky.map(|s| Duration::from_secs(u64::from(s) * 60));
    svc.internal_traffic_policy = policy(wish.internal_local);
    svc.external_traffic_policy = policy(wish.external_local);
    model.apply(Change::Service(svc));
    for v6 in [false, true] {
        let mut slice = slice(wish.number, v6, &[]);
        slice.endpoints = wish
            .endpoints
            .iter()
            .map(|(pod, ready, local)| proxy::object::Endpoint {
                ready: *ready,
                terminating: !*ready,
                local: *local,
                ..endpoint(pod_ip(*pod, v6))
            })
            .collect();
        model.apply(Change::Slice(slice));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn applying_the_difference_leads_to_what_is_asked_for(
        rounds in proptest::collection::vec(proptest::collection::vec(wish(), 1..4), 1..6),
    ) {
        for family in [Family::Ip, Family::Ip6] {
            let mut model = Model::new("node");
            let mut side = Side::new(family);
            for round in &rounds {
                round.iter().for_each(|wish| tell(&mut model, wish));
                side.change(&model.take_changes());
                side.check();
                // Nothing is planned twice.
                prop_assert!(model.take_changes().is_empty());
            }
            // As if it had all been told at once.
            let mut cold = Side::new(family);
            let plans: Vec<PlanChange> = model
                .plans()
                .map(|(service, plan)| PlanChange {
                    service: service.clone(),
                    old: None,
                    new: Some(plan.clone()),
                })
                .collect();
            cold.change(&plans);
            cold.check();
            prop_assert_eq!(side.meaning(), cold.meaning());
            // And all away again.
            let away: Vec<PlanChange> =
                plans.into_iter().map(|p| PlanChange { old: p.new, new: None, ..p }).collect();
            side.change(&away);
            prop_assert!(side.ruleset.entries().is_empty());
            side.check();
        }
    }

    #[test]
    fn a_repair_in_small_batches_keeps_every_service_whole(
        before in proptest::collection::vec(wish(), 1..6),
        after in proptest::collection::vec(wish(), 1..6),
        // After how many batches the process dies and another one begins.
        dies in 0..12_usize,
    ) {
        for family in [Family::Ip, Family::Ip6] {
            let mut side = Side::new(family);
            let mut model = Model::new("node");
            before.iter().for_each(|wish| tell(&mut model, wish));
            side.change(&model.take_changes());
            let mut model = Model::new("node");
            after.iter().for_each(|wish| tell(&mut model, wish));
            model.take_changes();
            // The next process finds what this one left, and is told something else.
            let mut kernel = side.kernel;
            let start = |kernel: &Fake| {
                let mut ruleset = Ruleset::new(structure(family));
                ruleset.batch = 1;
                ruleset.take_hints(&observe(kernel, &ruleset.table()));
                model.plans().for_each(|(name, plan)| ruleset.adopt(name, Some(plan)));
                ruleset
            };
            let mut ruleset = start(&kernel);
            let table = ruleset.table();
            let was = served(&kernel, &ruleset);
            let mut steps = vec![was.clone()];
            let mut state = kernel.read_table(&table);
            let first = ruleset.plan_repair(state.as_ref(), &observe(&kernel, &table), false);
            let cut = first.len() > dies;
            for planned in first.into_iter().take(dies) {
                prop_assert_eq!(kernel.apply(&planned.transaction), Ok(()));
                ruleset.commit_repair(planned);
                steps.push(served(&kernel, &ruleset));
            }
            if cut {
                ruleset = start(&kernel);
                state = kernel.read_table(&table);
                for planned in ruleset.plan_repair(state.as_ref(), &observe(&kernel, &table), false) {
                    prop_assert_eq!(kernel.apply(&planned.transaction), Ok(()));
                    ruleset.commit_repair(planned);
                    steps.push(served(&kernel, &ruleset));
                }
            }
            let will = served(&kernel, &ruleset);
            for step in &steps {
                for key in was.keys().chain(will.keys()).chain(step.keys()) {
                    let now = step.get(key);
                    prop_assert!(
                        now == was.get(key) || now == will.get(key),
                        "{:?}: {:?}, then {:?}, then {:?}", key, was.get(key), now, will.get(key)
                    );
                }
            }
            for tx in ruleset.plan_sweep(&state.unwrap()) {
                prop_assert_eq!(kernel.apply(&tx), Ok(()));
            }
            let side = Side { ruleset, kernel };
            side.check();
            prop_assert_eq!(served(&side.kernel, &side.ruleset), will);
        }
    }

    #[test]
    fn a_table_from_nothing_grows_by_whole_services(
        wishes in proptest::collection::vec(wish(), 1..8),
        // After how many batches the process dies and another one begins.
        dies in 0..12_usize,
        // A foreign table is in the way.
        replace in any::<bool>(),
    ) {
        for family in [Family::Ip, Family::Ip6] {
            let mut model = Model::new("node");
            wishes.iter().for_each(|wish| tell(&mut model, wish));
            model.take_changes();
            let start = |batch: usize| {
                let mut ruleset = Ruleset::new(structure(family));
                ruleset.batch = batch;
                model.plans().for_each(|(name, plan)| ruleset.adopt(name, Some(plan)));
                ruleset
            };
            let mut whole = Side { ruleset: start(usize::MAX), kernel: Fake::new() };
            for planned in whole.ruleset.plan_repair(None, &Observed::new(), false) {
                whole.apply(&planned.transaction);
                whole.ruleset.commit_repair(planned);
            }
            whole.check();
            let will = served(&whole.kernel, &whole.ruleset);
            let mut kernel = Fake::new();
            if replace {
                let mut tx = nft::Transaction::new(whole.ruleset.table());
                tx.add_table().add_chain("services", None);
                prop_assert_eq!(kernel.apply(&tx), Ok(()));
            }
            let mut ruleset = start(1);
            ruleset.begin_anew();
            let (mut batches, mut steps) = (Vec::new(), 0);
            ruleset.plan_anew(replace, |planned| {
                batches.push(planned);
                steps += 1;
                steps < dies
            });
            prop_assert!(steps <= dies.max(1));
            prop_assert!(!replace || steps == 1);
            for planned in batches {
                prop_assert_eq!(kernel.apply(&planned.transaction), Ok(()));
                ruleset.commit_repair(planned.without_elements());
                let now = served(&kernel, &ruleset);
                prop_assert!(now.iter().all(|(key, found)| will.get(key) == Some(found)));
            }
            let table = ruleset.table();
            let mut ruleset = start(1);
            let state = kernel.read_table(&table);
            for planned in ruleset.plan_repair(state.as_ref(), &observe(&kernel, &table), false) {
                prop_assert_eq!(kernel.apply(&planned.transaction), Ok(()));
                ruleset.commit_repair(planned);
            }
            let side = Side { ruleset, kernel };
            side.check();
            prop_assert_eq!(served(&side.kernel, &side.ruleset), will);
        }
    }

    #[test]
    fn slots_hold_every_endpoint_once_and_move_few(
        old in proptest::collection::btree_set(1..20_u8, 0..12),
        new in proptest::collection::btree_set(1..20_u8, 0..12),
        sticky in any::<bool>(),
    ) {
        let addresses = |set: &std::collections::BTreeSet<u8>| -> Vec<std::net::SocketAddr> {
            set.iter().map(|n| (IpAddr::from([10, 0, 0, *n]), 80).into()).collect()
        };
        let (old, new) = (addresses(&old), addresses(&new));
        let before = Slots::assign(&Slots::default(), &old, sticky);
        let after = Slots::assign(&before, &new, sticky);
        let mut held: Vec<_> = after.0.iter().flatten().copied().collect();
        held.sort();
        prop_assert_eq!(&held, &new);
        if sticky {
            for (slot, endpoint) in before.0.iter().enumerate() {
                if endpoint.is_some_and(|e| new.contains(&e)) {
                    prop_assert_eq!(after.0.get(slot), Some(endpoint));
                }
            }
        } else {
            prop_assert_eq!(after.0.len(), new.len());
        }
    }
}

#[test]
fn one_endpoint_among_5000_services_is_a_small_batch() {
    let mut model = Model::new("node");
    for number in 1..=5000 {
        model.apply(Change::Service(service(number)));
        model.apply(Change::Slice(slice(number, false, &[0, 1, 2, 3])));
    }
    let mut side = Side::new(Family::Ip);
    side.change(&model.take_changes());
    model.apply(Change::Slice(slice(2500, false, &[0, 1, 2, 4])));
    let changes = model.take_changes();
    assert_eq!(changes.len(), 1);
    // One element of two ports goes and comes; the old endpoint is local, and others have it too.
    let elements = side.change(&changes);
    assert!(elements <= 8, "{elements}");
    assert_eq!(
        side.kernel
            .elements(&side.ruleset.table(), &MapId::Endpoints(Pool::ALL[0]).to_string())
            .len(),
        40_000
    );
    side.check();
}

#[test]
fn the_whole_table_of_a_few_services() {
    let mut model = Model::new("node");
    let wish = Wish {
        number: 1,
        node_port: true,
        external: true,
        load_balancer: false,
        ranges: false,
        sticky: None,
        internal_local: false,
        external_local: false,
        endpoints: vec![(0, true, true), (1, true, false)],
        gone: false,
    };
    tell(&mut model, &wish);
    tell(
        &mut model,
        &Wish {
            number: 2,
            sticky: Some(1),
            external: false,
            load_balancer: true,
            ranges: true,
            external_local: true,
            ..wish.clone()
        },
    );
    tell(&mut model, &Wish { number: 3, endpoints: vec![], ..wish });
    let mut side = Side::new(Family::Ip);
    side.change(&model.take_changes());
    insta::assert_snapshot!("table_ip", side.kernel.dump());
    let mut side = Side::new(Family::Ip6);
    side.change(
        &model
            .plans()
            .map(|(s, p)| PlanChange { service: s.clone(), old: None, new: Some(p.clone()) })
            .collect::<Vec<_>>(),
    );
    insta::assert_snapshot!("table_ip6", side.kernel.dump());
}
