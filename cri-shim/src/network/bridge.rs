//! The built-in network: a bridge, veth pairs, reserved addresses, masquerade and host ports.
//!
//! What is wanted is in the records; links and rules follow from them and can be made again at any
//! time. The mutex guards the records only and is never held over netlink requests, but for the
//! rules, which the kernel takes within one system call.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::{
    Cidr, NetworkConfig, NetworkError, NetworkResult, Protocol, SandboxNetwork,
    allocate::{Cursors, allocate, gateway},
    bandwidth::Bandwidth,
    cni, forward,
    links::{Bridged, IFB_PREFIX, Links, VETH_PREFIX, has_ipv6, mac_for},
    ports::{check_ports, lasting, plan_add, plan_remove, plan_table, stale_after, stale_before},
    records::{self, Kind, Record, Records},
};

/// How long the host's other firewalls are not looked at again.
const LOOK_AGAIN: Duration = Duration::from_secs(30);

/// By when an address that is being given back is looked for again.
const FREED_IN: Duration = Duration::from_secs(1);

/// What the bridges and CNI share: all records.
pub(crate) struct Shared {
    pub(crate) records: Records,
    pub(crate) known: Mutex<BTreeMap<String, Record>>,
}

impl Shared {
    pub(crate) fn known(&self) -> MutexGuard<'_, BTreeMap<String, Record>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes a record, on disk and in memory.
    pub(crate) fn put(&self, record: Record) -> Result<(), NetworkError> {
        self.records.put(&record)?;
        self.known().insert(record.id.clone(), record);
        Ok(())
    }

    pub(crate) fn forget(&self, id: &str) -> Result<(), NetworkError> {
        self.records.remove(id)?;
        self.known().remove(id);
        Ok(())
    }
}

pub(crate) struct Bridge {
    shared: Arc<Shared>,
    links: Links,
    name: String,
    mtu: Option<u32>,
    cursor_path: PathBuf,
    state: Mutex<State>,
    /// The kernel's tables; blocking, but its calls take microseconds.
    nft: Mutex<Option<nft::Client>>,
    forwards: Mutex<Forwards>,
    /// An address was given back.
    freed: tokio::sync::Notify,
    /// How many sandboxes are just being taken away.
    pub(crate) leaving: AtomicUsize,
    /// Held while the bridge and the table are made.
    making: tokio::sync::Mutex<Option<Bridged>>,
}

/// When other firewalls were looked at, and what was said of them.
#[derive(Default)]
struct Forwards {
    looked: Option<Instant>,
    said: Option<String>,
}

struct State {
    cidrs: Vec<Cidr>,
    /// Those and the blocks of sandboxes from earlier, as they were last looked up.
    all: Vec<Cidr>,
    cursors: Cursors,
    /// Why the bridge could not be made at the last try.
    failure: Option<String>,
}

impl Bridge {
    /// Opens the network in the calling thread's network namespace. Nothing is made before the
    /// first sandbox needs it.
    pub(crate) fn open(config: &NetworkConfig, shared: Arc<Shared>) -> Result<Self, NetworkError> {
        let cursor_path = config.state_dir.join("addresses.json");
        let state = State {
            cidrs: usable(config.pod_cidrs.clone()),
            all: Vec::new(),
            cursors: records::read(&cursor_path).unwrap_or_default(),
            failure: None,
        };
        Ok(Self {
            shared,
            links: Links::open()?,
            name: config.bridge.clone(),
            mtu: config.mtu,
            cursor_path,
            state: Mutex::new(state),
            nft: Mutex::new(None),
            forwards: Mutex::default(),
            freed: tokio::sync::Notify::new(),
            leaving: AtomicUsize::new(0),
            making: tokio::sync::Mutex::new(None),
        })
    }

    pub(crate) async fn setup(
        &self,
        sandbox: &SandboxNetwork,
    ) -> Result<NetworkResult, NetworkError> {
        let existing = self.shared.known().get(&sandbox.id).cloned();
        if let Some(record) = existing {
            if record.ready && super::netns::exists(&sandbox.netns) {
                return Ok(self.given(&record));
            }
            // An earlier try was interrupted.
            self.teardown(&record).await?;
        }
        let made = self.ensure().await;
        self.state().failure = made.as_ref().err().map(ToString::to_string);
        let bridge = made?;
        let (mut record, gateways) = loop {
            let freed = self.freed.notified();
            match self.reserve(sandbox) {
                // One that is just being taken away gives its address back.
                Err(NetworkError::Exhausted { .. }) if self.leaving.load(Ordering::Relaxed) > 0 => {
                    let _ = tokio::time::timeout(FREED_IN, freed).await;
                }
                other => break other?,
            }
        };
        crate::crash::point("network: addresses reserved");
        let addresses: Vec<_> = record.ips.iter().copied().zip(gateways).collect();
        let connected = self.connect(bridge, sandbox, &addresses, &record).await;
        if let Err(error) = connected {
            if let Err(second) = self.teardown(&record).await {
                return Err(NetworkError::Several(vec![error, second]));
            }
            return Err(error);
        }
        crate::crash::point("network: connected");
        record.ready = true;
        let given = self.given(&record);
        self.shared.put(record)?;
        Ok(given)
    }

    /// What a sandbox got, also as containerd would show it of a bridge plugin.
    fn given(&self, record: &Record) -> NetworkResult {
        let mut cidrs = self.state().all.clone();
        if cidrs.is_empty() {
            cidrs = self.look_up_cidrs();
        }
        let gateway_of = |ip: &IpAddr| {
            cidrs.iter().find(|c| c.contains(*ip)).and_then(gateway).map(|g| g.to_string())
        };
        let mac = |ip: Option<&IpAddr>| {
            let bytes = ip.map(mac_for).unwrap_or_default();
            bytes.map(|byte| format!("{byte:02x}")).join(":")
        };
        let inside = record.netns.display().to_string();
        let Kind::Bridge { veth, .. } = &record.kind else {
            return NetworkResult { ips: record.ips.clone(), dns: None, shown: Value::Null };
        };
        let mut eth0 =
            cni::show_interface(&json!({"mac": mac(record.ips.first()), "sandbox": inside}));
        let configs: Vec<_> = record
            .ips
            .iter()
            .map(|ip| json!({"IP": ip.to_string(), "Gateway": gateway_of(ip).unwrap_or_default()}))
            .collect();
        eth0["IPConfigs"] = configs.into();
        let mut lo = cni::show_interface(&json!({"mac": "00:00:00:00:00:00", "sandbox": inside}));
        lo["IPConfigs"] = json!([{"IP": "127.0.0.1", "Gateway": ""}, {"IP": "::1", "Gateway": ""}]);
        let routes: Vec<_> = record
            .ips
            .iter()
            .map(|ip| {
                let any = if ip.is_ipv4() { "0.0.0.0/0" } else { "::/0" };
                json!({"dst": any, "gw": gateway_of(ip).unwrap_or_default()})
            })
            .collect();
        let interfaces = json!({
            self.name.as_str(): cni::show_interface(&Value::Null),
            veth.as_str(): cni::show_interface(&Value::Null),
            cni::INTERFACE: eth0,
            "lo": lo,
        });
        let shown = json!({"Interfaces": interfaces, "DNS": [{}], "Routes": routes});
        NetworkResult { ips: record.ips.clone(), dns: None, shown }
    }

    async fn connect(
        &self,
        bridge: Bridged,
        sandbox: &SandboxNetwork,
        addresses: &[(IpAddr, IpAddr)],
        record: &Record,
    ) -> Result<(), NetworkError> {
        let Kind::Bridge { veth, bandwidth, .. } = &record.kind else {
            return Ok(());
        };
        let connect = |bridge| self.links.connect(bridge, veth, &sandbox.netns, addresses);
        match connect(bridge).await {
            // Someone removed the bridge under us, or a link of that name was left.
            Err(NetworkError::Io { source, .. })
                if matches!(
                    source.raw_os_error(),
                    Some(libc::ENODEV | libc::EINVAL | libc::EEXIST)
                ) =>
            {
                self.links.remove(veth).await?;
                *self.making.lock().await = None;
                connect(self.ensure().await?).await?;
            }
            other => other?,
        }
        if !bandwidth.is_none() {
            self.links.limit(veth, &ifb_name(veth), bandwidth).await?;
        }
        if record.ports().is_empty() {
            return Ok(());
        }
        self.open_ports(record)?;
        self.forget_flows(record, stale_before);
        Ok(())
    }

    /// Reserves addresses and host ports and writes them down, before anything is made.
    fn reserve(&self, sandbox: &SandboxNetwork) -> Result<(Record, Vec<IpAddr>), NetworkError> {
        records::check_id(&sandbox.id)?;
        let bandwidth = Bandwidth::from_annotations(&sandbox.annotations)?;
        let mut known = self.shared.known();
        check_ports(&sandbox.port_mappings, known.values())?;
        let mut used: BTreeSet<IpAddr> =
            known.values().flat_map(|record| record.ips.iter().copied()).collect();
        let mut state = self.state();
        let (mut ips, mut gateways) = (Vec::new(), Vec::new());
        for cidr in state.cidrs.clone() {
            let address = allocate(&cidr, &used, &mut state.cursors)
                .ok_or(NetworkError::Exhausted { cidr, used: used.len() })?;
            used.insert(address);
            ips.push(address);
            gateways.extend(gateway(&cidr));
        }
        records::write(&self.cursor_path, &state.cursors)?;
        let kind = Kind::Bridge {
            veth: veth_name(&sandbox.id),
            ports: sandbox.port_mappings.clone(),
            bandwidth,
        };
        let record = Record::new(sandbox, ips, kind);
        self.shared.records.put(&record)?;
        known.insert(record.id.clone(), record.clone());
        Ok((record, gateways))
    }

    /// Takes a sandbox's ports, link, addresses and record away, as far as they are there.
    pub(crate) async fn teardown(&self, record: &Record) -> Result<(), NetworkError> {
        self.close(record)?;
        self.finish(record).await
    }

    /// Closes a sandbox's ports: from here on another one may have them.
    pub(crate) fn close(&self, record: &Record) -> Result<(), NetworkError> {
        if record.ports().is_empty() {
            return Ok(());
        }
        self.close_ports(record)?;
        self.forget_flows(record, stale_after);
        crate::crash::point("network: ports closed");
        let mut closed = record.clone();
        if let Kind::Bridge { ports, .. } = &mut closed.kind {
            ports.clear();
        }
        closed.ready = false;
        self.shared.put(closed)
    }

    /// Takes the rest away. That takes the kernel some 20 ms, in which nothing but its own clocks
    /// is waited for.
    pub(crate) async fn finish(&self, record: &Record) -> Result<(), NetworkError> {
        if let Kind::Bridge { veth, bandwidth, .. } = &record.kind {
            let ifb = bandwidth.egress.map(|_| ifb_name(veth));
            let links = ifb.iter().chain([veth]).map(|link| self.links.remove(link));
            futures::future::try_join_all(links).await?;
        }
        let forgotten = self.shared.forget(&record.id);
        self.freed.notify_waiters();
        forgotten
    }

    /// Removes links that belong to no record and to no sandbox in `keep`, and writes the rules anew.
    pub(crate) async fn collect(&self, keep: &BTreeSet<&str>) -> Result<(), NetworkError> {
        let wanted: BTreeSet<String> = self
            .shared
            .known()
            .values()
            .filter_map(|record| match &record.kind {
                Kind::Bridge { veth, .. } => Some([veth.clone(), ifb_name(veth)]),
                Kind::Cni(_) => None,
            })
            .flatten()
            .collect();
        // A sandbox that runs keeps its link also when its record was lost.
        let kept: BTreeSet<String> =
            keep.iter().flat_map(|id| [veth_name(id), ifb_name(&veth_name(id))]).collect();
        let unknown = |link: &String| !wanted.contains(link) && !kept.contains(link);
        let left: Vec<_> = self.links.own().await?.into_iter().filter(unknown).collect();
        for link in &left {
            tracing::info!(link, "removing a link that belongs to no sandbox");
        }
        let removals = left.iter().map(|link| self.links.remove(link));
        futures::future::try_join_all(removals).await?;
        if wanted.is_empty() {
            return Ok(());
        }
        self.ensure_anew().await.map(drop)
    }

    /// Has other firewalls of the host forward what pods send and get, also those that came since.
    fn let_through(&self) {
        let mut last = self.forwards.lock().unwrap_or_else(PoisonError::into_inner);
        if last.looked.is_some_and(|when| when.elapsed() < LOOK_AGAIN) {
            return;
        }
        last.looked = Some(Instant::now());
        let said = forward::accept(&self.name).err();
        if said != last.said
            && let Some(reason) = &said
        {
            tracing::warn!(reason, "a firewall of this host may stop pods' traffic");
        }
        last.said = said;
    }

    pub(crate) fn status(&self) -> Result<(), String> {
        if self.making.try_lock().is_ok_and(|made| made.is_some()) {
            self.let_through();
        }
        self.state().failure.clone().map_or(Ok(()), Err)
    }

    pub(crate) async fn set_pod_cidrs(&self, cidrs: Vec<Cidr>) {
        let cidrs = usable(cidrs);
        if self.state().cidrs == cidrs {
            return;
        }
        self.state().cidrs = cidrs;
        *self.making.lock().await = None;
    }

    /// The bridge; it and the rules are made the first time.
    async fn ensure(&self) -> Result<Bridged, NetworkError> {
        if let Some(bridge) = *self.making.lock().await {
            return Ok(bridge);
        }
        self.ensure_anew().await
    }

    async fn ensure_anew(&self) -> Result<Bridged, NetworkError> {
        let mut making = self.making.lock().await;
        let cidrs = self.all_cidrs();
        let bridge = self.links.ensure_bridge(&self.name, &cidrs, self.mtu).await?;
        self.write_table(&cidrs)?;
        self.let_through();
        *making = Some(bridge);
        Ok(bridge)
    }

    /// The node's blocks, and those that sandboxes from earlier have their addresses of: these keep
    /// their gateway and their masquerade.
    fn all_cidrs(&self) -> Vec<Cidr> {
        let cidrs = self.look_up_cidrs();
        let texts: Vec<_> = cidrs.iter().map(ToString::to_string).collect();
        let path = self.cursor_path.with_file_name("blocks.json");
        if let Err(error) = records::write(&path, &texts) {
            tracing::warn!(%error, "cannot remember the pod CIDRs");
        }
        self.state().all = cidrs.clone();
        cidrs
    }

    fn look_up_cidrs(&self) -> Vec<Cidr> {
        let mut cidrs = self.state().cidrs.clone();
        let old = records::read::<Vec<String>>(&self.cursor_path.with_file_name("blocks.json"))
            .unwrap_or_default();
        let known = self.shared.known();
        for cidr in old.iter().filter_map(|text| text.parse::<Cidr>().ok()) {
            let lives = known.values().any(|r| r.ips.iter().any(|ip| cidr.contains(*ip)));
            if lives && !cidrs.contains(&cidr) {
                cidrs.push(cidr);
            }
        }
        cidrs
    }

    fn write_table(&self, cidrs: &[Cidr]) -> Result<(), NetworkError> {
        // Planned while nobody else writes rules: a sandbox is in the records before its ports are
        // opened, so none can be lost in between.
        self.apply(|| {
            let known = self.shared.known();
            let bridged = known.values().filter(|r| matches!(r.kind, Kind::Bridge { .. }));
            plan_table(&self.name, cidrs, bridged)
        })
        .map_err(|error| rules(&error))
    }

    fn open_ports(&self, record: &Record) -> Result<(), NetworkError> {
        let Err(first) = self.apply(|| plan_add(record)) else {
            return Ok(());
        };
        // Someone flushed the ruleset: the record is known by now, so the whole table has its ports.
        tracing::warn!(error = %first, "host port rules are written anew");
        self.write_table(&self.all_cidrs())
    }

    fn close_ports(&self, record: &Record) -> Result<(), NetworkError> {
        for transaction in plan_remove(record) {
            match self.apply(|| transaction) {
                Err(nft::Error::Refused { failures, .. })
                    if failures
                        .iter()
                        .all(|failure| failure.errno == nix::errno::Errno::ENOENT) => {}
                other => other.map_err(|error| rules(&error))?,
            }
        }
        Ok(())
    }

    /// Forgets what the kernel remembers of packets to the host ports of `record`: a client that
    /// keeps its socket would be sent where they went before for as long as it sends.
    fn forget_flows(
        &self,
        record: &Record,
        stale: fn(&Record, Protocol, SocketAddr, SocketAddr) -> bool,
    ) {
        let protocols = lasting(record);
        if protocols.is_empty() {
            return;
        }
        let forget = || {
            let mut client = nft::Client::new()?;
            for family in [nft::Family::Ip, nft::Family::Ip6] {
                if !record.ips.iter().any(|ip| ip.is_ipv4() == (family == nft::Family::Ip)) {
                    continue;
                }
                for protocol in &protocols {
                    for flow in client.flows(family, protocol.number())? {
                        if stale(record, *protocol, flow.destination, flow.answering) {
                            client.delete_flow(&flow)?;
                        }
                    }
                }
            }
            Ok::<_, nft::Error>(())
        };
        if let Err(error) = forget() {
            tracing::warn!(sandbox = record.id, %error, "stale flows of host ports may remain");
        }
    }

    fn apply(&self, plan: impl FnOnce() -> nft::Transaction) -> Result<(), nft::Error> {
        let mut client = self.nft.lock().unwrap_or_else(PoisonError::into_inner);
        if client.is_none() {
            *client = Some(nft::Client::new()?);
        }
        match client.as_mut() {
            Some(client) => client.apply(&plan()),
            None => Ok(()),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// At most one block per family, IPv4 first; the defaults if there are none.
fn usable(cidrs: Vec<Cidr>) -> Vec<Cidr> {
    let mut cidrs = cidrs;
    if cidrs.is_empty() {
        cidrs = ["10.88.0.0/16", "fd00:10:88::/64"].iter().filter_map(|c| c.parse().ok()).collect();
        if !has_ipv6() {
            cidrs.retain(Cidr::is_ipv4);
        }
    }
    let mut seen = BTreeSet::new();
    cidrs.retain(|cidr| seen.insert(cidr.is_ipv4()));
    cidrs
}

/// The host's end of a sandbox's link: as unique as its id, within 15 characters.
fn veth_name(id: &str) -> String {
    use std::fmt::Write as _;
    Sha256::digest(id.as_bytes()).iter().take(6).fold(VETH_PREFIX.to_owned(), |mut name, byte| {
        let _ = write!(name, "{byte:02x}");
        name
    })
}

/// The device for the bandwidth limit of what a pod sends.
fn ifb_name(veth: &str) -> String {
    format!("{IFB_PREFIX}{}", veth.strip_prefix(VETH_PREFIX).unwrap_or(veth))
}

fn rules(error: &nft::Error) -> NetworkError {
    NetworkError::Netlink {
        operation: "write rules of",
        object: "table inet longshore-pods".to_owned(),
        reason: error.to_string(),
    }
}
