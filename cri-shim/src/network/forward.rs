//! Other firewalls that drop what is forwarded: Docker and others set iptables' FORWARD to DROP, and
//! what our own table accepts still has to pass theirs.
//!
//! As other runtimes do, two rules are added to iptables' chain, where such a chain drops. They stand
//! at its end: what the operator's rules refuse stays refused, and only what no rule decided about is
//! decided. Tables that are not iptables' are the operator's alone; for them there is a warning.

use nft::{Client, Error, Expr, Family, MetaKey, Op, Rule, Table, Transaction, Verdict};

/// Marks our rules, for finding them again.
const COMMENT: &str = "longshore pods";

/// Lets what pods of `bridge` send and get pass.
///
/// # Errors
/// What still drops it, and what to do.
pub(super) fn accept(bridge: &str) -> Result<(), String> {
    let told = |error: Error| format!("looking for chains that drop: {error}");
    let mut client = Client::new().map_err(told)?;
    let mut others = Vec::new();
    for (table, chain) in client.dropping_forwards().map_err(told)? {
        if !is_iptables(&table, &chain) {
            others.push(format!("chain {chain} of table {table}"));
            continue;
        }
        let ours = find(&mut client, &table, &chain).map_err(told)?;
        if ours.is_empty() {
            client.apply(&plan_accept(table.clone(), &chain, bridge)).map_err(|error| {
                format!("accepting pods' traffic in chain {chain} of table {table}: {error}")
            })?;
            tracing::info!(%table, chain, "added rules that accept pods' traffic");
        }
    }
    if others.is_empty() {
        return Ok(());
    }
    Err(format!(
        "{} drops what is forwarded; add rules there that accept iifname {bridge} and oifname \
         {bridge}",
        others.join(", ")
    ))
}

/// Takes the rules away again; what failed.
pub(super) fn remove() -> Vec<String> {
    let remove = || -> Result<(), Error> {
        let mut client = Client::new()?;
        for family in [Family::Ip, Family::Ip6] {
            let table = Table::new(family, "filter");
            let ours = find(&mut client, &table, "FORWARD")?;
            let mut transaction = Transaction::new(table);
            for handle in &ours {
                transaction.push(Op::DeleteRule { chain: "FORWARD".to_owned(), handle: *handle });
            }
            if !ours.is_empty() {
                client.apply(&transaction)?;
            }
        }
        Ok(())
    };
    // A kernel without nf_tables has none of ours.
    remove().err().map(|error| format!("rules in iptables' FORWARD: {error}")).into_iter().collect()
}

fn is_iptables(table: &Table, chain: &str) -> bool {
    matches!(table.family, Family::Ip | Family::Ip6) && table.name == "filter" && chain == "FORWARD"
}

/// Handles of our rules.
fn find(client: &mut Client, table: &Table, chain: &str) -> Result<Vec<u64>, Error> {
    let state = client.read_table(table)?;
    let rules = state.as_ref().and_then(|state| state.chains.get(chain)).map(|(_, rules)| rules);
    let ours = rules.into_iter().flatten().filter(|r| r.comment.as_deref() == Some(COMMENT));
    Ok(ours.map(|rule| rule.handle).collect())
}

fn plan_accept(table: Table, chain: &str, bridge: &str) -> Transaction {
    let mut transaction = Transaction::new(table);
    for key in [MetaKey::Iifname, MetaKey::Oifname] {
        let mut exprs = Expr::is_interface(key, bridge, false).to_vec();
        exprs.push(Expr::Verdict(Verdict::Accept));
        let comment = Some(COMMENT.to_owned());
        transaction.push(Op::AddRule(Rule { chain: chain.to_owned(), exprs, comment }));
    }
    transaction
}
