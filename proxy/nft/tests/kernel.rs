//! Against the real kernel, in a network namespace of each test's own.

use std::process::Command;

use nft::{
    Address, BaseChain, ChainType, Client, Data, DataType, DynsetOp, Element, Error, Expr, Family,
    Hook, Key, NatKind, REG, RejectKind, Set, Table, Transaction, Verdict,
};
use nix::sched::{CloneFlags, unshare};

fn own_namespace() -> Client {
    unshare(CloneFlags::CLONE_NEWNET).expect("these tests need root: a network namespace");
    Client::new().expect("nfnetlink")
}

/// What `nft` prints; it must understand everything.
fn listing() -> String {
    let out = Command::new("nft").args(["list", "ruleset"]).output().expect("run nft");
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    let errors = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success() && errors.is_empty(), "{text}\n{errors}");
    text
}

const NAT_OUTPUT: BaseChain =
    BaseChain { chain_type: ChainType::Nat, hook: Hook::Output, priority: -100 };

#[test]
fn masquerade_and_dnat_are_what_nft_prints() {
    let mut client = own_namespace();
    let table = Table::new(Family::Ip, "longshore-test");
    let mut tx = Transaction::new(table.clone());
    tx.add_table();
    tx.add_chain(
        "postrouting",
        Some(BaseChain { chain_type: ChainType::Nat, hook: Hook::Postrouting, priority: 100 }),
    );
    tx.add_chain("output", Some(NAT_OUTPUT));
    let mut masquerade = Expr::in_network(Address::Source, "10.88.0.0".parse().unwrap(), 24, false);
    masquerade.extend(Expr::in_network(
        Address::Destination,
        "10.88.0.0".parse().unwrap(),
        24,
        true,
    ));
    masquerade.push(Expr::Masquerade { fully_random: true });
    tx.add_rule("postrouting", masquerade);
    let anybody = Expr::in_network(Address::Source, "0.0.0.0".parse().unwrap(), 0, false);
    assert!(anybody.is_empty());
    let mut nobody = Expr::in_network(Address::Source, "0.0.0.0".parse().unwrap(), 0, true);
    nobody.push(Expr::Verdict(Verdict::Drop));
    tx.add_rule("postrouting", nobody);
    let mut dnat: Vec<Expr> = Expr::is_local(Address::Destination, false).to_vec();
    dnat.extend(Expr::is_l4proto(6));
    dnat.extend(Expr::is_dport(8080));
    dnat.extend(Expr::dnat_to("10.88.0.5:80".parse().unwrap()));
    tx.add_rule("output", dnat);
    client.apply(&tx).unwrap();
    let text = listing();
    assert!(
        text.contains("ip saddr 10.88.0.0/24 ip daddr != 10.88.0.0/24 masquerade fully-random"),
        "{text}"
    );
    assert!(text.contains("fib daddr type local"), "{text}");
    assert!(text.contains("dnat to 10.88.0.5:80"), "{text}");
    let state = client.read_table(&table).unwrap().unwrap();
    assert_eq!(state.chains["output"].0, Some(NAT_OUTPUT));
    assert_eq!(state.chains["output"].1.len(), 1);

    let mut gone = Transaction::new(table.clone());
    gone.ensure_no_table();
    client.apply(&gone).unwrap();
    client.apply(&gone).unwrap();
    assert_eq!(client.read_table(&table).unwrap(), None);
    assert_eq!(listing(), "");
}

/// The shapes that the proxy programs: a random index as part of a map's key, affinity records
/// that are looked up, checked and refreshed in one rule.
#[test]
fn keyed_maps_and_affinity_are_taken_and_printed() {
    let mut client = own_namespace();
    for family in [Family::Ip, Family::Ip6] {
        let (number, address_type, load): (u8, _, fn(Address, u32) -> Expr) = match family {
            Family::Ip => (2, DataType::Ipv4Addr, Expr::ip4),
            _ => (10, DataType::Ipv6Addr, Expr::ip6),
        };
        let vip = [address_type, DataType::InetProto, DataType::InetService];
        let target = [address_type, DataType::InetService];
        let mut tx = Transaction::new(Table::new(family, "longshore-test"));
        tx.add_table();
        tx.add_chain("output", Some(NAT_OUTPUT));
        tx.add_chain("pick-4", None);
        tx.add_chain("sticky-4", None);
        tx.add_set(Set::verdict_map("services", &vip));
        tx.add_set(Set::map("endpoints", &[&vip[..], &[DataType::Mark]].concat(), &target));
        let index = [&vip[..], &[DataType::Mark]].concat();
        tx.add_set(Set::verdict_map("picks", &index));
        tx.add_set(Set {
            dynamic: true,
            timeout: true,
            size: Some(65536),
            ..Set::plain("affinity-0", &[&[address_type], &vip[..]].concat())
        });
        let words = if family == Family::Ip { 1 } else { 4 };
        let a = REG + words;
        let key = vec![load(Address::Destination, REG), Expr::l4proto(a), Expr::dport(a + 1)];
        let mut dispatch = key.clone();
        dispatch.push(Expr::LookupVerdict { set: "services".into(), sreg: REG });
        tx.add_rule("output", dispatch);
        let nat =
            Expr::Nat { kind: NatKind::Dnat, family: number, address: Some(REG), port: Some(a) };
        let map = Expr::LookupMap { set: "endpoints".into(), sreg: REG, dreg: REG };
        let mut pick = key.clone();
        pick.extend([
            Expr::NumgenRandom { modulus: 4, offset: 0, dreg: a + 2 },
            map.clone(),
            nat.clone(),
        ]);
        tx.add_rule("pick-4", pick);

        tx.add_chain("slot-0", None);
        let record = REG + words + 1;
        let client_key = |first: u32| {
            vec![
                load(Address::Source, first),
                load(Address::Destination, first + words),
                Expr::l4proto(first + 2 * words),
                Expr::dport(first + 2 * words + 1),
            ]
        };
        let mut known = client_key(REG);
        known.extend([
            Expr::Lookup { set: "affinity-0".into(), sreg: REG, invert: false },
            Expr::Verdict(Verdict::Jump("slot-0".into())),
        ]);
        tx.add_rule("sticky-4", known);
        let mut fresh = key.clone();
        fresh.extend([
            Expr::NumgenRandom { modulus: 4, offset: 0, dreg: a + 2 },
            Expr::LookupVerdict { set: "picks".into(), sreg: REG },
        ]);
        tx.add_rule("sticky-4", fresh);
        let mut slot = key.clone();
        slot.extend([Expr::NumgenRandom { modulus: 1, offset: 3, dreg: a + 2 }, map]);
        slot.extend(client_key(record));
        slot.extend([
            Expr::Dynset {
                set: "affinity-0".into(),
                op: DynsetOp::Update,
                key: record,
                data: None,
                timeout: Some(10_800_000),
            },
            nat,
        ]);
        tx.add_rule("slot-0", slot);
        client.apply(&tx).unwrap();
    }
    let text = listing();
    for part in [
        "dnat ip to ip daddr . meta l4proto . th dport . numgen random mod 4 map @endpoints",
        "ip6 saddr . ip6 daddr . meta l4proto . th dport @affinity-0 jump slot-0",
        "numgen random mod 1 offset 3 map @endpoints",
    ] {
        assert!(text.contains(part), "{part} is not in\n{text}");
    }
}

/// What a map tells is the key of another map. `nft` knows no length of it and shows what it saw put
/// into the register before, so the number is the second part of the value.
#[test]
fn a_verdict_is_found_by_way_of_a_number() {
    let mut client = own_namespace();
    let vip = [DataType::Ipv4Addr, DataType::InetProto, DataType::InetService];
    let table = Table::new(Family::Ip, "longshore-test");
    let mut tx = Transaction::new(table.clone());
    tx.add_table();
    tx.add_chain("output", Some(NAT_OUTPUT));
    tx.add_chain("refuse", Some(BaseChain { chain_type: ChainType::Filter, ..NAT_OUTPUT }));
    tx.add_chain("pick-4", None);
    tx.add_set(Set::map("services", &vip, &[DataType::Mark, DataType::Mark]));
    tx.add_set(Set::verdict_map("kinds", &[DataType::Mark]));
    let key =
        [Expr::ip4(Address::Destination, REG + 1), Expr::l4proto(REG + 2), Expr::dport(REG + 3)];
    let lookups = [
        Expr::LookupMap { set: "services".into(), sreg: REG + 1, dreg: REG },
        Expr::LookupVerdict { set: "kinds".into(), sreg: REG + 1 },
    ];
    tx.add_rule("refuse", [&key[..], &lookups[..]].concat());
    let to = |port: u16| Key::new().address([127, 0, 0, 1].into()).protocol(6).port(port);
    let value = |number: u32| Key::new().number(0).number(number);
    tx.add_element("kinds", Element::verdict(Key::new().number(4), Verdict::Goto("pick-4".into())));
    tx.add_element("kinds", Element::verdict(Key::new().number(5), Verdict::Drop));
    tx.add_rule("pick-4", vec![Expr::Reject(RejectKind::TcpReset)]);
    tx.add_element("services", Element::value(to(80), value(4)));
    tx.add_element("services", Element::value(to(81), value(5)));
    tx.add_element("services", Element::value(to(82), value(6)));
    client.apply(&tx).unwrap();
    let text = listing();
    for part in
        ["ip daddr vmap @kinds", "0x00000004 : goto pick-4", "tcp . 81 : 0x00000000 . 0x00000005"]
    {
        assert!(text.contains(part), "{part} is not in\n{text}");
    }
    let sets = [Set::map("services", &vip, &[DataType::Mark, DataType::Mark])];
    let words = nft::commands(&tx, &sets);
    let whole = "ip daddr . meta l4proto . th dport map @services vmap @kinds";
    assert!(words.contains(whole), "{words}");
    // What packets meet, on the namespace's own loopback.
    assert!(Command::new("ip").args(["link", "set", "lo", "up"]).status().unwrap().success());
    let listen = |port| std::net::TcpListener::bind(("127.0.0.1", port)).unwrap();
    let _kept = [80, 81, 82, 83].map(listen);
    let met = |port: u16| {
        let to = std::net::SocketAddr::from(([127, 0, 0, 1], port));
        let wait = std::time::Duration::from_millis(500);
        std::net::TcpStream::connect_timeout(&to, wait).map(|_| ()).map_err(|e| e.kind())
    };
    use std::io::ErrorKind::{ConnectionRefused, TimedOut};
    assert_eq!(met(80), Err(ConnectionRefused));
    assert_eq!(met(81), Err(TimedOut));
    // A number without a verdict, and a port without a number.
    assert_eq!([met(82), met(83)], [Ok(()), Ok(())]);
}

fn ports_set(client: &mut Client) -> Table {
    let table = Table::new(Family::Ip, "longshore-test");
    let mut tx = Transaction::new(table.clone());
    tx.add_table()
        .add_chain("drop-it", None)
        .add_set(Set::verdict_map("ports", &[DataType::InetProto, DataType::InetService]));
    client.apply(&tx).expect("a table of ports");
    table
}

fn port(number: u16) -> Key {
    Key::new().protocol(6).port(number)
}

#[test]
fn many_elements_go_in_one_batch_and_are_read_back() {
    let mut client = own_namespace();
    let table = ports_set(&mut client);
    let mut tx = Transaction::new(table.clone());
    for number in 1..=20_000 {
        tx.add_element("ports", Element::verdict(port(number), Verdict::Goto("drop-it".into())));
    }
    assert_eq!(tx.ops.len(), 1);
    client.apply(&tx).unwrap();
    let read = settled(&mut client, &table, 20_000);
    assert_eq!(read[0].key, port(1));
    assert_eq!(read[0].data, Some(Data::Verdict(Verdict::Goto("drop-it".into()))));
    let mut tx = Transaction::new(table.clone());
    // Data of an element changes by deleting and adding it in one batch.
    tx.delete_element("ports", Element::new(port(1)));
    tx.add_element("ports", Element::verdict(port(1), Verdict::Drop));
    for number in 2..=20_000 {
        tx.delete_element("ports", Element::new(port(number)));
    }
    client.apply(&tx).unwrap();
    let read = settled(&mut client, &table, 1);
    assert_eq!(read[0].data, Some(Data::Verdict(Verdict::Drop)));
}

/// The elements once `count` are seen. The kernel resizes its hash table after a large batch, and a
/// listing that meets the resizing misses some (nft_rhash_walk, net/netfilter/nft_set_hash.c).
fn settled(client: &mut Client, table: &Table, count: usize) -> Vec<nft::ElementEntry> {
    let began = std::time::Instant::now();
    loop {
        let read = client.elements(table, "ports").expect("a listing");
        if read.len() == count {
            return read;
        }
        assert!(began.elapsed().as_secs() < 10, "{} elements, not {count}", read.len());
        std::thread::yield_now();
    }
}

#[test]
fn a_refused_batch_names_the_element_and_leaves_nothing() {
    let mut client = own_namespace();
    let table = ports_set(&mut client);
    let mut tx = Transaction::new(table.clone());
    for number in 1..=5000 {
        let chain = if number == 4321 { "no-such-chain" } else { "drop-it" };
        tx.add_element("ports", Element::verdict(port(number), Verdict::Goto(chain.into())));
    }
    tx.push(nft::Op::FlushChain("no-such-chain".into()));
    let error = client.apply(&tx).unwrap_err();
    let Error::Refused { failures, .. } = &error else { panic!("{error}") };
    assert_eq!(failures[0].op, Some(0));
    assert_eq!(failures[0].element, Some(4320), "{error}");
    assert_eq!(failures[1].op, Some(1));
    assert!(error.to_string().contains("new element of set ports"), "{error}");
    assert_eq!(client.elements(&table, "ports").unwrap(), []);
}

#[test]
fn the_fake_refuses_what_the_kernel_refuses() {
    let mut client = own_namespace();
    let mut fake = nft::Fake::new();
    let table = Table::new(Family::Ip6, "longshore-test");
    let mut base = Transaction::new(table.clone());
    base.add_table()
        .add_chain("output", Some(NAT_OUTPUT))
        .add_chain("inner", None)
        .add_set(Set::verdict_map("ports", &[DataType::InetProto, DataType::InetService]))
        .add_set(Set::map("targets", &[DataType::InetService], &[DataType::Ipv6Addr]))
        .add_element("ports", Element::verdict(port(1), Verdict::Drop));
    client.apply(&base).unwrap();
    fake.apply(&base).unwrap();
    let address = Key::new().address("fd00::1".parse().unwrap());
    let add =
        |set: &str, element| nft::Op::AddElements { set: set.into(), elements: vec![element] };
    let rule = |chain: &str, expr| {
        nft::Op::AddRule(nft::Rule { chain: chain.into(), exprs: vec![expr], comment: None })
    };
    let goto = |chain: &str| Verdict::Goto(chain.into());
    let tries = [
        (true, add("ports", Element::verdict(port(1), Verdict::Drop))),
        (false, add("ports", Element::verdict(port(1), Verdict::Accept))),
        (
            false,
            nft::Op::DeleteElements { set: "ports".into(), elements: vec![Element::new(port(2))] },
        ),
        (false, add("ports", Element::new(port(3)))),
        (false, add("none", Element::new(port(3)))),
        (false, add("ports", Element::verdict(port(3), goto("output")))),
        (true, add("ports", Element::verdict(port(4), goto("inner")))),
        (false, nft::Op::DeleteChain("inner".into())),
        (true, add("targets", Element::value(Key::new().port(80), address))),
        (false, add("targets", Element::value(Key::new().port(81), Key::new().port(1)))),
        (false, rule("nowhere", Expr::Counter)),
        (false, rule("output", Expr::LookupVerdict { set: "ports".into(), sreg: REG })),
        (false, rule("output", Expr::Masquerade { fully_random: true })),
        (true, rule("output", Expr::Counter)),
        (
            false,
            nft::Op::AddSet(Set::plain("ports", &[DataType::InetProto, DataType::InetService])),
        ),
        (false, nft::Op::DeleteSet("none".into())),
    ];
    // Old kernels read registers that nothing was loaded into.
    let by_fake_only = 11;
    for (index, (accepted, op)) in tries.iter().enumerate() {
        let mut tx = Transaction::new(table.clone());
        tx.push(op.clone());
        let faked = fake.apply(&tx);
        if index == by_fake_only {
            assert!(faked.is_err());
            continue;
        }
        let kernel = client.apply(&tx);
        assert_eq!(kernel.is_ok(), *accepted, "{index}: kernel {kernel:?}");
        assert_eq!(faked.is_ok(), *accepted, "{index}: fake {faked:?}");
    }
    assert_eq!(
        client.elements(&table, "ports").unwrap().len(),
        fake.elements(&table, "ports").len()
    );
    let reject = {
        let mut tx = Transaction::new(table.clone());
        tx.add_rule("inner", vec![Expr::Reject(RejectKind::PortUnreachable)]);
        tx
    };
    client.apply(&reject).unwrap();
    fake.apply(&reject).unwrap();
    assert!(listing().contains("reject"), "{}", listing());
    assert!(fake.dump().contains("    tcp . 4 : goto inner\n"), "{}", fake.dump());
}

#[test]
fn changes_of_others_are_noticed_and_our_own_are_not() {
    let mut client = own_namespace();
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let mut monitor = nft::Monitor::new(Some(&client)).unwrap();
        let table = ports_set(&mut client);
        let quiet = std::time::Duration::from_millis(100);
        assert!(tokio::time::timeout(quiet, monitor.changed()).await.is_err());
        let mut other = Client::new().unwrap();
        let mut tx = Transaction::new(table);
        tx.add_element("ports", Element::verdict(port(9), Verdict::Drop));
        other.apply(&tx).unwrap();
        let wait = std::time::Duration::from_secs(10);
        let told = tokio::time::timeout(wait, monitor.changed()).await.unwrap().unwrap();
        let change = |object, deleted| nft::ForeignChange {
            table: "longshore-test".into(),
            chain: None,
            object,
            deleted,
        };
        let nft::Notification::Commit { changes, .. } = told else { panic!("{told:?}") };
        assert_eq!(changes, [change(nft::Changed::Other, false)].into());
        assert!(Command::new("nft").args(["flush", "ruleset"]).status().unwrap().success());
        let told = tokio::time::timeout(wait, monitor.changed()).await.unwrap().unwrap();
        let nft::Notification::Commit { by, changes } = told else { panic!("{told:?}") };
        assert_eq!(by, "nft");
        assert!(changes.contains(&change(nft::Changed::Table, true)), "{changes:?}");
        // What was told is there without waiting.
        let script = "add table ip other; add chain ip other gate; add rule ip other gate accept";
        assert!(Command::new("nft").arg(script).status().unwrap().success());
        let told = monitor.told();
        let gate = nft::ForeignChange {
            table: "other".into(),
            chain: Some("gate".into()),
            object: nft::Changed::Rule,
            deleted: false,
        };
        assert!(
            matches!(&told[..], [nft::Notification::Commit { changes, .. }] if changes.contains(&gate)),
            "{told:?}"
        );
        assert_eq!(monitor.told(), []);
    });
}
