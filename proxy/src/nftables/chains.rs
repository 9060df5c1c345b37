//! Behaviours as rules.

use nft::{Address, DynsetOp, Expr, Family, FibResult, MetaKey, NatKind, REG, Verdict};

use super::names::{Behaviour, Choice, MapId, Masquerade, Origin, Pool, affinity_name};

/// 32-bit registers that an address fills.
pub fn words(family: Family) -> u32 {
    if family == Family::Ip { 1 } else { 4 }
}

/// Loads an address.
pub fn load(family: Family, address: Address, dreg: u32) -> Expr {
    if family == Family::Ip { Expr::ip4(address, dreg) } else { Expr::ip6(address, dreg) }
}

/// Loads a key: tells the register after it.
pub fn key(origin: Origin, family: Family, first: u32) -> (Vec<Expr>, u32) {
    match origin {
        Origin::Vip => {
            let after = first + words(family);
            let exprs = vec![
                load(family, Address::Destination, first),
                Expr::l4proto(after),
                Expr::dport(after + 1),
            ];
            (exprs, after + 2)
        }
        Origin::NodePort => (vec![Expr::l4proto(first), Expr::dport(first + 1)], first + 2),
    }
}

/// Sets the masquerade bit of the packet's mark.
pub fn mark(bit: u32) -> [Expr; 3] {
    let op =
        nft::BitwiseOp { mask: (!bit).to_ne_bytes().to_vec(), xor: bit.to_ne_bytes().to_vec() };
    [
        Expr::Meta { key: MetaKey::Mark, dreg: REG },
        Expr::Bitwise { sreg: REG, dreg: REG, op },
        Expr::MetaSet { key: MetaKey::Mark, sreg: REG },
    ]
}

fn dnat(family: Family, address: u32) -> Expr {
    Expr::Nat {
        kind: NatKind::Dnat,
        family: family as u8,
        address: Some(address),
        port: Some(address + words(family)),
    }
}

/// The chains that a behaviour leads to; they must be there before it.
pub fn needed(behaviour: Behaviour) -> Vec<Behaviour> {
    match behaviour {
        Behaviour::Slot { .. } => Vec::new(),
        Behaviour::Recall { pool, timeout, slots } => {
            (0..slots).map(|slot| Behaviour::Slot { pool, timeout, slot }).collect()
        }
        Behaviour::Pick { pool, choice, masquerade } => match (masquerade, choice) {
            (Masquerade::Never, Choice::Random { .. }) => Vec::new(),
            (Masquerade::Never, Choice::Sticky { timeout, slots, .. }) => {
                let recall = Behaviour::Recall { pool, timeout, slots };
                let mut all = needed(recall);
                all.push(recall);
                all
            }
            _ => {
                let inner = Behaviour::Pick { pool, choice, masquerade: Masquerade::Never };
                let mut all = needed(inner);
                all.push(inner);
                all
            }
        },
    }
}

/// The rules of a behaviour's chain.
pub fn rules(behaviour: Behaviour, family: Family, masquerade_bit: u32) -> Vec<Vec<Expr>> {
    match behaviour {
        Behaviour::Slot { pool, timeout, slot } => slot_rules(family, pool, timeout, slot),
        Behaviour::Recall { pool, timeout, slots } => recall_rules(family, pool, timeout, slots),
        Behaviour::Pick { pool, choice, masquerade: Masquerade::Never } => match choice {
            Choice::Random { count } => vec![pick_rule(family, pool, count)],
            Choice::Sticky { count, slots, timeout } => {
                sticky_rules(family, pool, timeout, count, slots)
            }
        },
        Behaviour::Pick { pool, choice, masquerade } => {
            let inner = Behaviour::Pick { pool, choice, masquerade: Masquerade::Never };
            let mut first = Vec::new();
            if masquerade == Masquerade::IfNode {
                first.push(Expr::Fib {
                    address: Address::Source,
                    result: FibResult::AddressType,
                    dreg: REG,
                });
                first.push(Expr::cmp(REG, nft::CmpOp::Eq, &2u32.to_ne_bytes()));
            }
            first.extend(mark(masquerade_bit));
            vec![first, vec![Expr::Verdict(Verdict::Goto(inner.to_string()))]]
        }
    }
}

fn pick_rule(family: Family, pool: Pool, count: u32) -> Vec<Expr> {
    let (mut exprs, index) = key(pool.origin, family, REG);
    exprs.extend([
        Expr::NumgenRandom { modulus: count, offset: 0, dreg: index },
        Expr::LookupMap { set: MapId::Endpoints(pool).to_string(), sreg: REG, dreg: REG },
        dnat(family, REG),
    ]);
    exprs
}

/// Loads a constant. As a random number below one it is part of a key that `nft` can print, which
/// an immediate value, or what a map tells, is not.
fn constant(number: u32, dreg: u32) -> Expr {
    Expr::NumgenRandom { modulus: 1, offset: number, dreg }
}

/// The register that [`id`] fills: an address fits before it.
fn id_register(family: Family) -> u32 {
    REG + words(family)
}

/// Loads the number of the port that the packet is for. Every rule does, as a rule must not read what
/// another has loaded. The number is the second part of the value (see [`super::kinds::value`]), and
/// lies where the key's protocol was, which `nft` takes it for.
fn id(origin: Origin, family: Family) -> Vec<Expr> {
    let first = if origin == Origin::Vip { REG } else { id_register(family) };
    let (mut exprs, _) = key(origin, family, first);
    let (set, dreg) = (MapId::Ids(origin).to_string(), id_register(family) - 1);
    exprs.push(Expr::LookupMap { set, sreg: first, dreg });
    exprs
}

/// Loads the number of the port, and the client's address before it.
fn client(origin: Origin, family: Family) -> Vec<Expr> {
    let mut exprs = id(origin, family);
    exprs.push(load(family, Address::Source, REG));
    exprs
}

fn recall_rules(family: Family, pool: Pool, timeout: u32, slots: u32) -> Vec<Vec<Expr>> {
    (0..slots)
        .map(|slot| {
            let mut exprs = client(pool.origin, family);
            let chain = Behaviour::Slot { pool, timeout, slot }.to_string();
            exprs.extend([
                Expr::Lookup { set: affinity_name(slot), sreg: REG, invert: false },
                // It comes back if the slot has become empty.
                Expr::Verdict(Verdict::Jump(chain)),
            ]);
            exprs
        })
        .collect()
}

fn sticky_rules(
    family: Family,
    pool: Pool,
    timeout: u32,
    count: u32,
    slots: u32,
) -> Vec<Vec<Expr>> {
    let recall = Behaviour::Recall { pool, timeout, slots }.to_string();
    let number = id_register(family);
    let mut fresh = id(pool.origin, family);
    fresh.extend([
        Expr::NumgenRandom { modulus: count, offset: 0, dreg: number + 1 },
        Expr::LookupMap { set: MapId::Picks(pool).to_string(), sreg: number, dreg: number },
        Expr::LookupVerdict { set: MapId::SlotKinds.to_string(), sreg: number + 1 },
    ]);
    vec![vec![Expr::Verdict(Verdict::Jump(recall))], fresh]
}

fn slot_rules(family: Family, pool: Pool, timeout: u32, slot: u32) -> Vec<Vec<Expr>> {
    let number = id_register(family);
    let endpoint = number + 2;
    let mut found = id(pool.origin, family);
    found.extend([
        constant(slot, number + 1),
        Expr::LookupMap { set: MapId::Kept(pool.policy).to_string(), sreg: number, dreg: endpoint },
    ]);
    let mut remembered = found.clone();
    remembered.extend([
        load(family, Address::Source, REG),
        Expr::Dynset {
            set: affinity_name(slot),
            op: DynsetOp::Update,
            key: REG,
            data: None,
            timeout: Some(u64::from(timeout) * 1000),
        },
        dnat(family, endpoint),
    ]);
    // If the set of clients is full, the connection is served nevertheless.
    let mut unremembered = found;
    unremembered.push(dnat(family, endpoint));
    // The slot is empty: the client is no longer with it, also when another endpoint gets it.
    let mut forget = client(pool.origin, family);
    forget.push(Expr::Dynset {
        set: affinity_name(slot),
        op: DynsetOp::Delete,
        key: REG,
        data: None,
        timeout: None,
    });
    vec![remembered, unremembered, forget]
}
