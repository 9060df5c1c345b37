//! Behaviours as rules.

use nft::{Address, DynsetOp, Expr, Family, FibResult, MetaKey, NatKind, REG, Verdict};

use super::names::{Behaviour, Choice, MapId, Masquerade, Origin, Pool, affinity_name};

/// A rule has at most 128 expressions (`NFT_RULE_MAXEXPRS`).
const FORGET_AT_ONCE: usize = 100;

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

/// The chains that a behaviour jumps to; they must be there before it.
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

/// Loads the client's address and the key.
fn client(pool: Pool, family: Family, first: u32) -> Vec<Expr> {
    let mut exprs = vec![load(family, Address::Source, first)];
    exprs.extend(key(pool.origin, family, first + words(family)).0);
    exprs
}

fn recall_rules(family: Family, pool: Pool, timeout: u32, slots: u32) -> Vec<Vec<Expr>> {
    let mut rules: Vec<Vec<Expr>> = (0..slots)
        .map(|slot| {
            let mut exprs = client(pool, family, REG);
            let chain = Behaviour::Slot { pool, timeout, slot }.to_string();
            exprs.extend([
                Expr::Lookup { set: affinity_name(pool, slot), sreg: REG, invert: false },
                // It comes back if the slot has become empty.
                Expr::Verdict(Verdict::Jump(chain)),
            ]);
            exprs
        })
        .collect();
    // Whoever comes here has no endpoint: what is left of it in slots that became empty goes, lest it
    // counts again when such a slot gets another endpoint.
    let all: Vec<u32> = (0..slots).collect();
    for some in all.chunks(FORGET_AT_ONCE) {
        let mut exprs = client(pool, family, REG);
        exprs.extend(some.iter().map(|slot| Expr::Dynset {
            set: affinity_name(pool, *slot),
            op: DynsetOp::Delete,
            key: REG,
            data: None,
            timeout: None,
        }));
        rules.push(exprs);
    }
    rules
}

fn sticky_rules(
    family: Family,
    pool: Pool,
    timeout: u32,
    count: u32,
    slots: u32,
) -> Vec<Vec<Expr>> {
    let recall = Behaviour::Recall { pool, timeout, slots }.to_string();
    let (mut fresh, index) = key(pool.origin, family, REG);
    fresh.extend([
        Expr::NumgenRandom { modulus: count, offset: 0, dreg: index },
        Expr::LookupVerdict { set: MapId::Picks(pool).to_string(), sreg: REG },
    ]);
    vec![vec![Expr::Verdict(Verdict::Jump(recall))], fresh]
}

fn slot_rules(family: Family, pool: Pool, timeout: u32, slot: u32) -> Vec<Vec<Expr>> {
    let (mut found, index) = key(pool.origin, family, REG);
    found.extend([
        Expr::NumgenRandom { modulus: 1, offset: slot, dreg: index },
        Expr::LookupMap { set: MapId::Endpoints(pool).to_string(), sreg: REG, dreg: REG },
    ]);
    let record = REG + words(family) + 1;
    let mut remembered = found.clone();
    remembered.extend(client(pool, family, record));
    remembered.extend([
        Expr::Dynset {
            set: affinity_name(pool, slot),
            op: DynsetOp::Update,
            key: record,
            data: None,
            timeout: Some(u64::from(timeout) * 1000),
        },
        dnat(family, REG),
    ]);
    // If the set of clients is full, the connection is served nevertheless.
    let mut unremembered = found;
    unremembered.push(dnat(family, REG));
    vec![remembered, unremembered]
}
