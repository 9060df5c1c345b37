//! Behaviours as rules.

use nft::{Address, DynsetOp, Expr, Family, FibResult, MetaKey, NatKind, REG, Verdict};

use super::names::{Behaviour, Choice, MapId, Masquerade, Origin, Policy, Pool, affinity_name};

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
        Behaviour::Recall { id, policy, timeout, slots } => {
            (0..slots).map(|slot| Behaviour::Slot { id, policy, timeout, slot }).collect()
        }
        Behaviour::Pick { pool, choice, masquerade } => match (masquerade, choice) {
            (Masquerade::Never, Choice::Random { .. }) => Vec::new(),
            (Masquerade::Never, Choice::Sticky { id, timeout, slots, .. }) => {
                let recall = Behaviour::Recall { id, policy: pool.policy, timeout, slots };
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
        Behaviour::Slot { id, policy, timeout, slot } => {
            slot_rules(family, id, policy, timeout, slot)
        }
        Behaviour::Recall { id, policy, timeout, slots } => {
            recall_rules(family, id, policy, timeout, slots)
        }
        Behaviour::Pick { pool, choice, masquerade: Masquerade::Never } => match choice {
            Choice::Random { count } => vec![pick_rule(family, pool, count)],
            Choice::Sticky { id, count, slots, timeout } => {
                sticky_rules(id, pool.policy, timeout, count, slots)
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

/// Loads the client's address and the number of the port.
fn client(family: Family, id: u32, first: u32) -> Vec<Expr> {
    vec![load(family, Address::Source, first), constant(id, first + words(family))]
}

fn recall_rules(
    family: Family,
    id: u32,
    policy: Policy,
    timeout: u32,
    slots: u32,
) -> Vec<Vec<Expr>> {
    (0..slots)
        .map(|slot| {
            let mut exprs = client(family, id, REG);
            let chain = Behaviour::Slot { id, policy, timeout, slot }.to_string();
            exprs.extend([
                Expr::Lookup { set: affinity_name(slot), sreg: REG, invert: false },
                // It comes back if the slot has become empty.
                Expr::Verdict(Verdict::Jump(chain)),
            ]);
            exprs
        })
        .collect()
}

fn sticky_rules(id: u32, policy: Policy, timeout: u32, count: u32, slots: u32) -> Vec<Vec<Expr>> {
    let recall = Behaviour::Recall { id, policy, timeout, slots }.to_string();
    let fresh = vec![
        constant(id, REG),
        Expr::NumgenRandom { modulus: count, offset: 0, dreg: REG + 1 },
        Expr::LookupVerdict { set: MapId::Picks(policy).to_string(), sreg: REG },
    ];
    vec![vec![Expr::Verdict(Verdict::Jump(recall))], fresh]
}

fn slot_rules(family: Family, id: u32, policy: Policy, timeout: u32, slot: u32) -> Vec<Vec<Expr>> {
    let found = vec![
        constant(id, REG),
        constant(slot, REG + 1),
        Expr::LookupMap { set: MapId::Kept(policy).to_string(), sreg: REG, dreg: REG },
    ];
    let record = REG + words(family) + 1;
    let mut remembered = found.clone();
    remembered.extend(client(family, id, record));
    remembered.extend([
        Expr::Dynset {
            set: affinity_name(slot),
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
    // The slot is empty: the client is no longer with it, also when another endpoint gets it.
    let mut forget = client(family, id, REG);
    forget.push(Expr::Dynset {
        set: affinity_name(slot),
        op: DynsetOp::Delete,
        key: REG,
        data: None,
        timeout: None,
    });
    vec![remembered, unremembered, forget]
}
