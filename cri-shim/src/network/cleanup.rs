//! Takes the built-in network away as a whole: for `longshore reset`, after the sandboxes are gone.

use std::path::Path;

use futures::TryStreamExt;
use nft::{Client, Family, Table, Transaction};

use super::netns;

/// The table of host ports and masquerading.
const TABLE: &str = "longshore-pods";

/// Removes the bridge with what is left on it, the table of host ports and masquerading, and every
/// namespace pinned in `netns_dir`. Goes on after a failure; returns all failures, one line each.
pub async fn cleanup(bridge: &str, netns_dir: &Path) -> Vec<String> {
    let mut failures = Vec::new();
    for entry in std::fs::read_dir(netns_dir).into_iter().flatten().flatten() {
        let path = entry.path();
        if let Err(error) = netns::delete(&path) {
            failures.push(format!("network namespace {}: {error}", path.display()));
        }
    }
    if let Err(error) = remove_bridge(bridge).await {
        failures.push(format!("bridge {bridge}: {error}"));
    }
    let removed = tokio::task::spawn_blocking(|| {
        let mut transaction = Transaction::new(Table::new(Family::Inet, TABLE));
        transaction.ensure_no_table();
        Client::new().and_then(|mut client| client.apply(&transaction))
    });
    failures.extend(tokio::task::spawn_blocking(super::forward::remove).await.unwrap_or_default());
    match removed.await {
        Ok(Ok(())) => {}
        // A kernel without nf_tables has none of ours.
        Ok(Err(error)) if !nf_tables_exists() => {
            tracing::debug!(%error, "this kernel has no nf_tables");
        }
        Ok(Err(error)) => failures.push(format!("nftables table {}: {error}", TABLE)),
        Err(error) => failures.push(format!("nftables table {}: {error}", TABLE)),
    }
    failures
}

fn nf_tables_exists() -> bool {
    std::fs::read_to_string("/proc/modules").is_ok_and(|m| m.contains("nf_tables "))
        || Path::new("/proc/sys/net/netfilter").exists()
}

async fn remove_bridge(name: &str) -> Result<(), rtnetlink::Error> {
    let (connection, handle, _) =
        rtnetlink::new_connection().map_err(|_| rtnetlink::Error::RequestFailed)?;
    let connection = tokio::spawn(connection);
    let result = async {
        let mut links = handle.link().get().match_name(name.to_owned()).execute();
        match links.try_next().await {
            Ok(Some(link)) => handle.link().del(link.header.index).execute().await,
            Ok(None) => Ok(()),
            // Not there.
            Err(rtnetlink::Error::NetlinkError(error)) if error.raw_code() == -libc::ENODEV => {
                Ok(())
            }
            Err(error) => Err(error),
        }
    }
    .await;
    connection.abort();
    result
}
