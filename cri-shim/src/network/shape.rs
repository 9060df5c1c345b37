//! Limits of a pod's traffic on its link, by token buckets (tc-tbf(8)).
//!
//! The host's end sends what the pod receives, so the bucket for that hangs on it. What the pod
//! sends is turned over to a device of its own (ifb) first, because only sending can be delayed; in
//! the pod a bucket would be for its processes to take off.

use rtnetlink::packet_route::{
    RouteNetlinkMessage,
    tc::{TcAttribute, TcHandle, TcMessage, TcOption},
};
use rtnetlink::{
    packet_core::DefaultNla,
    packet_core::{NLM_F_CREATE, NLM_F_REPLACE},
};

use super::{bandwidth::burst, rtnl::Batch};

const TCA_TBF_PARMS: u16 = 1;
const TCA_TBF_RATE64: u16 = 4;
const TCA_TBF_BURST: u16 = 6;
/// Ethernet, so that the kernel counts packets' lengths itself.
const LINKLAYER_ETHERNET: u8 = 1;
/// Milliseconds that packets may wait in the bucket's queue, beyond what may go at once.
const LATENCY: u64 = 25;

/// Adds the request that lets link `index` send no more than `rate` bits per second.
pub(super) fn add_bucket(batch: &mut Batch, operation: &'static str, index: u32, rate: u64) {
    let mut message = TcMessage::with_index(index.cast_signed());
    message.header.parent = TcHandle::ROOT;
    message.header.handle = TcHandle { major: 1, minor: 0 };
    message.attributes = vec![
        TcAttribute::Kind("tbf".to_owned()),
        TcAttribute::Options(
            plan_bucket(rate)
                .into_iter()
                .map(|(kind, value)| TcOption::Other(DefaultNla::new(kind, value)))
                .collect(),
        ),
    ];
    let request = RouteNetlinkMessage::NewQueueDiscipline(message);
    batch.add(operation, request, NLM_F_CREATE | NLM_F_REPLACE);
}

/// The bucket's attributes: `struct tc_tbf_qopt` of linux/pkt_sched.h and what does not fit it.
fn plan_bucket(rate: u64) -> Vec<(u16, Vec<u8>)> {
    let bytes = (rate / 8).max(1);
    let burst = u32::try_from(burst(rate) / 8).unwrap_or(u32::MAX);
    let waiting = bytes.saturating_mul(LATENCY) / 1000;
    let limit = u32::try_from(waiting.saturating_add(u64::from(burst))).unwrap_or(u32::MAX);
    let mut parameters = Vec::with_capacity(36);
    // The rate, then no rate for peaks, each as `struct tc_ratespec`.
    parameters.extend([0, LINKLAYER_ETHERNET, 0, 0, 0, 0, 0, 0]);
    parameters.extend(u32::try_from(bytes).unwrap_or(u32::MAX).to_ne_bytes());
    parameters.extend([0; 12]);
    parameters.extend(limit.to_ne_bytes());
    // Buffer and MTU in ticks of a clock of the kernel's; the attribute says it in bytes.
    parameters.extend([0; 8]);
    let mut attributes = vec![(TCA_TBF_PARMS, parameters)];
    if bytes > u64::from(u32::MAX) {
        attributes.push((TCA_TBF_RATE64, bytes.to_ne_bytes().to_vec()));
    }
    attributes.push((TCA_TBF_BURST, burst.to_ne_bytes().to_vec()));
    attributes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bucket_holds_rate_burst_and_queue_in_bytes() {
        let bucket = plan_bucket(8_000_000);
        assert_eq!(bucket.iter().map(|(kind, _)| *kind).collect::<Vec<_>>(), [1, 6]);
        let word = |at: usize| u32::from_ne_bytes(bucket[0].1[at..at + 4].try_into().unwrap());
        assert_eq!((bucket[0].1.len(), word(8), word(24)), (36, 1_000_000, 1_025_000));
        assert_eq!(bucket[1].1, 1_000_000u32.to_ne_bytes());
        let fast = plan_bucket(80_000_000_000);
        assert_eq!(fast[1], (TCA_TBF_RATE64, 10_000_000_000u64.to_ne_bytes().to_vec()));
    }
}
