//! CPU and memory of the node and its pods for `longshore top`.
//!
//! Apart from what the node API's scrapers read: a rate is one since the reader's own last look.

use std::collections::HashMap;
use std::sync::{Arc, OnceLock};

use super::gather::{Depth, Gatherer, Sample};
use crate::health::UsageLine;
use crate::ids::PodUid;
use crate::node_context::NodeContext;
use crate::pod::table::PodTable;
use crate::runtime::Runtime;

/// What is used now, for whoever asks.
pub struct LiveUsage {
    node: Arc<NodeContext>,
    table: PodTable,
    runtime: Arc<dyn Runtime>,
    /// Made for the first who asks: most nodes are never asked.
    gatherer: OnceLock<Arc<Gatherer>>,
}

impl LiveUsage {
    /// Of the pods in `table`.
    pub fn new(node: Arc<NodeContext>, table: PodTable, runtime: Arc<dyn Runtime>) -> Self {
        Self { node, table, runtime, gatherer: OnceLock::new() }
    }

    /// The node's usage and each pod's that has a cgroup. Rates are `None` in the first answer.
    pub async fn now(&self) -> (UsageLine, HashMap<PodUid, UsageLine>) {
        let gatherer = self.gatherer.get_or_init(|| {
            let (node, runtime) = (self.node.clone(), self.runtime.clone());
            Arc::new(Gatherer::new(node, self.table.clone(), runtime, None))
        });
        let snapshot = gatherer.gather(Depth::Usage).await;
        let pods = snapshot.pods.iter().filter_map(|pod| {
            Some((PodUid::from(pod.uid.as_str()), line(&pod.cgroup.as_ref()?.1)))
        });
        (line(&snapshot.node.sample), pods.collect())
    }
}

fn line(sample: &Sample) -> UsageLine {
    UsageLine { cpu_nano_cores: sample.nano_cores, memory_bytes: sample.usage.working_set() }
}
