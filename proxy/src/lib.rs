//! Services and EndpointSlices -> netfilter: the work of kube-proxy.

pub mod object;
