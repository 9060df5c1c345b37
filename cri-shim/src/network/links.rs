//! The built-in network's links, addresses and routes, over one kept rtnetlink connection.

use std::{
    collections::BTreeSet,
    fs, io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::fd::{AsRawFd, RawFd},
    path::Path,
    sync::{Arc, Mutex, PoisonError},
};

use futures::TryStreamExt;
use rtnetlink::{
    AddressMessageBuilder, Error, Handle, LinkBridge, LinkBridgePort, LinkIfb, LinkMessageBuilder,
    LinkUnspec, LinkVeth, RouteMessageBuilder,
    packet_core::{ErrorMessage, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE},
    packet_route::{
        RouteNetlinkMessage,
        address::{AddressAttribute, AddressFlags, AddressHeaderFlags, AddressMessage},
        link::{InfoData, InfoPortKind, InfoVeth, LinkAttribute, LinkMessage},
        route::{RouteAttribute, RouteScope},
    },
};
use tokio::sync::{mpsc, oneshot};

use super::{
    Cidr, NetworkError,
    allocate::gateway,
    bandwidth::Bandwidth,
    netns,
    rtnl::{Batch, Connection, Refused},
    shape,
};

/// Names of the host's ends start with this; `collect` goes by it.
pub(crate) const VETH_PREFIX: &str = "lsv";
/// Names of devices for bandwidth limits start with this, and end as the link they belong to.
pub(crate) const IFB_PREFIX: &str = "lsi";
/// The link group of links about to be removed together.
const DOOMED: u32 = 0x4c53_4e44;
/// The pods' end, as CNI names it.
const POD_LINK: &str = "eth0";

/// A connection to the host's links.
#[derive(Clone)]
pub(crate) struct Links {
    handle: Handle,
    /// For batches. Locked for the time of a few system calls, in which the kernel's own lock on
    /// links is held anyhow.
    host: Arc<Mutex<Connection>>,
    removals: mpsc::UnboundedSender<Removal>,
}

/// The bridge as pods' links are put on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Bridged {
    pub(crate) index: u32,
    /// The links' MTU; the kernel's default when absent.
    pub(crate) mtu: Option<u32>,
}

/// A link to be removed, and who waits for it.
type Removal = (String, oneshot::Sender<Result<(), Error>>);

impl Links {
    /// Connects in the network namespace of the calling thread, which runs in a tokio runtime.
    pub(crate) fn open() -> Result<Self, NetworkError> {
        let (connection, handle, _) = rtnetlink::new_connection()
            .map_err(NetworkError::io("open netlink socket for", "links"))?;
        tokio::spawn(connection);
        let (removals, queue) = mpsc::unbounded_channel();
        tokio::spawn(remove_queued(handle.clone(), queue));
        let host =
            Connection::open().map_err(NetworkError::io("open netlink socket for", "links"))?;
        Ok(Self { handle, host: Arc::new(Mutex::new(host)), removals })
    }

    /// Makes sure that the bridge is there, up, with the gateways of `cidrs`. Without an `mtu` that of
    /// the way out of the host is taken: larger packets would have to be broken up there.
    pub(crate) async fn ensure_bridge(
        &self,
        name: &str,
        cidrs: &[Cidr],
        mtu: Option<u32>,
    ) -> Result<Bridged, NetworkError> {
        let mtu = match mtu {
            Some(mtu) => Some(mtu),
            None => self.uplink_mtu(cidrs).await,
        };
        let mut link = self.find(name).await?;
        if link.is_none() {
            let mut bridge = LinkBridge::new(name).up();
            if let Some(mtu) = mtu {
                bridge = bridge.mtu(mtu);
            }
            if let Some(gateway) = cidrs.first().and_then(gateway) {
                bridge = bridge.address(mac_for(&gateway).to_vec());
            }
            let made = self.handle.link().add(bridge.build()).execute().await;
            ignore(made, libc::EEXIST).map_err(refused("create bridge", name))?;
            link = self.find(name).await?;
        }
        let link =
            link.ok_or_else(|| refused("create bridge", name)(Error::NetlinkError(gone())))?;
        let index = link.header.index;
        let mut up = LinkUnspec::new_with_index(index).up();
        // A bridge takes over addresses of its ports as they come and go, unless it was given one;
        // pods would send to one that is no more.
        if let Some(mac) = link.attributes.iter().find_map(|attribute| match attribute {
            LinkAttribute::Address(mac) => Some(mac.clone()),
            _ => None,
        }) {
            up = up.address(mac);
        }
        let set = self.handle.link().change(up.build()).execute().await;
        set.map_err(refused("bring up bridge", name))?;
        let wanted: BTreeSet<(IpAddr, u8)> =
            cidrs.iter().filter_map(|c| Some((gateway(c)?, c.prefix()))).collect();
        for (address, prefix) in &wanted {
            add_address(&self.handle, index, *address, *prefix)
                .await
                .map_err(refused("add gateway address to bridge", name))?;
        }
        let mut have = self.handle.address().get().set_link_index_filter(index).execute();
        while let Some(message) =
            have.try_next().await.map_err(refused("list addresses of bridge", name))?
        {
            let address = message.attributes.iter().find_map(|attribute| match attribute {
                AddressAttribute::Address(address) => Some(*address),
                _ => None,
            });
            let Some(address) = address.filter(|address| !is_link_local(address)) else {
                continue;
            };
            if !wanted.contains(&(address, message.header.prefix_len)) {
                let removed = self.handle.address().del(message).execute().await;
                ignore(removed, libc::EADDRNOTAVAIL)
                    .map_err(refused("remove old gateway address of bridge", name))?;
            }
        }
        sysctls(name, cidrs)?;
        Ok(Bridged { index, mtu })
    }

    /// The MTU of the link by which the host reaches what lies outside; the least of both families'.
    async fn uplink_mtu(&self, cidrs: &[Cidr]) -> Option<u32> {
        let mut least = None;
        for cidr in cidrs {
            // Any address that no host has a route of its own to (TEST-NET-3, documentation).
            let (outside, width): (IpAddr, u8) = if cidr.is_ipv4() {
                (Ipv4Addr::new(203, 0, 113, 1).into(), 32)
            } else {
                (Ipv6Addr::new(0x2001, 0xdb8, 0xffff, 0, 0, 0, 0, 1).into(), 128)
            };
            let route = RouteMessageBuilder::<IpAddr>::new().destination_prefix(outside, width);
            let Ok(route) = route else { continue };
            let mut found = self.handle.route().get(route.build()).execute();
            let Ok(Some(route)) = found.try_next().await else { continue };
            let index = route.attributes.iter().find_map(|attribute| match attribute {
                RouteAttribute::Oif(index) => Some(*index),
                _ => None,
            });
            let Some(index) = index else { continue };
            let mut links = self.handle.link().get().match_index(index).execute();
            let Ok(Some(link)) = links.try_next().await else { continue };
            let mtu = link.attributes.iter().find_map(|attribute| match attribute {
                LinkAttribute::Mtu(mtu) => Some(*mtu),
                _ => None,
            });
            // Loopback's is beyond what a veth takes; IPv6 needs 1280.
            let mtu = mtu.filter(|mtu| (1280..=65535).contains(mtu));
            least = [least, mtu].into_iter().flatten().min();
        }
        least
    }

    /// Connects the namespace `netns` by a veth pair: `veth` on the bridge, `eth0` in the pod with
    /// `addresses`, whose gateways are `gateways`.
    ///
    /// The pod's addresses have no on-link neighbours: everything goes by the gateway, so that
    /// connections between pods of the node pass the host's netfilter too, which Services need
    /// and which bridging alone would not give without the br_netfilter module.
    pub(crate) async fn connect(
        &self,
        bridge: Bridged,
        veth: &str,
        netns: &Path,
        addresses: &[(IpAddr, IpAddr)],
    ) -> Result<(), NetworkError> {
        let (veth, netns, addresses) = (veth.to_owned(), netns.to_owned(), addresses.to_owned());
        let host = Arc::clone(&self.host);
        // Some milliseconds of system calls.
        let done = tokio::task::spawn_blocking(move || {
            let place = fs::File::open(&netns)
                .map_err(NetworkError::io("open network namespace", netns.display()))?;
            let batch = plan_veth(bridge, &veth, place.as_raw_fd(), &addresses);
            let done = host.lock().unwrap_or_else(PoisonError::into_inner).run(batch);
            done.map_err(|refused| refused.of(&veth))?;
            configure_pod(&place, &netns, &addresses)
        });
        done.await.map_err(|error| {
            NetworkError::io("configure", POD_LINK)(io::Error::other(error.to_string()))
        })?
    }

    /// Lets no more than `limits` pass a pod's link. `ifb` is the device for what the pod sends.
    pub(crate) async fn limit(
        &self,
        veth: &str,
        ifb: &str,
        limits: &Bandwidth,
    ) -> Result<(), NetworkError> {
        let find = async |name: &str| {
            self.index(name)
                .await?
                .ok_or_else(|| refused("limit bandwidth of", name)(Error::NetlinkError(gone())))
        };
        let link = find(veth).await?;
        let mut batch = Batch::default();
        if let Some(rate) = limits.ingress {
            shape::add_bucket(&mut batch, "limit what the pod receives on", link, rate);
        }
        if let Some(rate) = limits.egress {
            let made = self.handle.link().add(LinkIfb::new(ifb).up().build()).execute().await;
            ignore(made, libc::EEXIST)
                .map_err(refused("create device for bandwidth limit", ifb))?;
            let device = find(ifb).await?;
            shape::add_bucket(&mut batch, "limit what the pod sends on", device, rate);
            let own = link.cast_signed();
            let entry = self.handle.qdisc().add(own).ingress().execute().await;
            ignore(entry, libc::EEXIST).map_err(refused("limit bandwidth of", veth))?;
            self.handle
                .traffic_filter(own)
                .add()
                .parent(0xffff_0000)
                .priority(1)
                .protocol((libc::ETH_P_ALL as u16).to_be())
                .redirect(device)
                .map_err(refused("limit bandwidth of", veth))?
                .execute()
                .await
                .map_err(refused("redirect for its bandwidth limit", veth))?;
        }
        let done = self.host.lock().unwrap_or_else(PoisonError::into_inner).run(batch);
        done.map_err(|refused| refused.of(veth))
    }

    /// Removes a link by name; one that is not there is a success.
    pub(crate) async fn remove(&self, name: &str) -> Result<(), NetworkError> {
        let (done, removed) = oneshot::channel();
        // A closed channel means that the runtime ends.
        let _ = self.removals.send((name.to_owned(), done));
        removed.await.unwrap_or(Err(Error::RequestFailed)).map_err(refused("remove link", name))
    }

    /// The host's ends of pods' links, and their devices for bandwidth limits.
    pub(crate) async fn own(&self) -> Result<Vec<String>, NetworkError> {
        let mut names = Vec::new();
        let mut links = self.handle.link().get().execute();
        while let Some(link) =
            links.try_next().await.map_err(refused("list links", "of the host"))?
        {
            names.extend(link.attributes.into_iter().find_map(|attribute| match attribute {
                LinkAttribute::IfName(name)
                    if name.starts_with(VETH_PREFIX) || name.starts_with(IFB_PREFIX) =>
                {
                    Some(name)
                }
                _ => None,
            }));
        }
        Ok(names)
    }

    async fn index(&self, name: &str) -> Result<Option<u32>, NetworkError> {
        Ok(self.find(name).await?.map(|link| link.header.index))
    }

    async fn find(&self, name: &str) -> Result<Option<LinkMessage>, NetworkError> {
        let mut links = self.handle.link().get().match_name(name).execute();
        match links.try_next().await {
            Ok(link) => Ok(link),
            Err(error) if errno(&error) == Some(libc::ENODEV) => Ok(None),
            Err(error) => Err(refused("look up link", name)(error)),
        }
    }
}

/// Removes links as they are asked for; those that pile up meanwhile go together. The kernel waits
/// for a grace period of RCU per removal, some 20 ms during which no other link can change, and a
/// group of links is one removal.
async fn remove_queued(handle: Handle, mut queue: mpsc::UnboundedReceiver<Removal>) {
    let mut batch = Vec::new();
    while queue.recv_many(&mut batch, 256).await > 0 {
        if let [(name, _)] = batch.as_slice() {
            let message = LinkUnspec::new_with_name(name).build();
            let removed = handle.link().del_with_message(message).execute().await;
            for (_, done) in batch.drain(..) {
                let _ = done.send(ignore(removed.clone(), libc::ENODEV));
            }
            continue;
        }
        let mut grouped = Vec::new();
        for (name, done) in batch.drain(..) {
            let message = LinkUnspec::new_with_name(&name)
                .append_extra_attribute(LinkAttribute::Group(DOOMED))
                .build();
            match handle.link().change(message).execute().await {
                Ok(()) => grouped.push(done),
                Err(error) => drop(done.send(ignore(Err(error), libc::ENODEV))),
            }
        }
        let mut message = LinkMessage::default();
        message.attributes.push(LinkAttribute::Group(DOOMED));
        let removed = handle.link().del_with_message(message).execute().await;
        for done in grouped {
            let _ = done.send(ignore(removed.clone(), libc::ENODEV));
        }
    }
}

/// The requests on the host: the pair, and that what a pod sends to itself by a Service comes back.
fn plan_veth(bridge: Bridged, veth: &str, netns: RawFd, addresses: &[(IpAddr, IpAddr)]) -> Batch {
    let mut pod = LinkMessageBuilder::<LinkUnspec>::new().name(POD_LINK).setns_by_fd(netns);
    let mut own = LinkVeth::new(veth, POD_LINK).controller(bridge.index).up();
    if let Some(mac) = addresses.first().map(|(ip, _)| mac_for(ip)) {
        // Bound to the address, so that neighbours' caches stay right when it is given again.
        pod = pod.address(mac.to_vec());
    }
    if let Some(mtu) = bridge.mtu {
        (pod, own) = (pod.mtu(mtu), own.mtu(mtu));
    }
    let own = own.set_info_data(InfoData::Veth(InfoVeth::Peer(pod.build()))).build();
    let port = LinkMessageBuilder::<LinkBridgePort>::default()
        .name(veth)
        .set_port_kind(InfoPortKind::Bridge)
        .hairpin(true)
        .build();
    let mut batch = Batch::default();
    let request = RouteNetlinkMessage::NewLink(own);
    batch.add("create veth pair", request, NLM_F_CREATE | NLM_F_EXCL);
    batch.add("set hairpin mode of", RouteNetlinkMessage::NewLink(port), 0);
    batch
}

/// Addresses and routes of the pod's end, from a thread in its namespace.
fn configure_pod(
    place: &fs::File,
    netns: &Path,
    addresses: &[(IpAddr, IpAddr)],
) -> Result<(), NetworkError> {
    let fail = |operation| NetworkError::io(operation, netns.display());
    let done = netns::inside(place, || {
        if addresses.iter().any(|(ip, _)| ip.is_ipv6()) {
            let base = format!("/proc/sys/net/ipv6/conf/{POD_LINK}");
            // A pod's routes come from here, never from what another pod advertises; its addresses
            // are reserved on this node: no need to wait whether someone else has them.
            for (name, value) in [("accept_ra", "0"), ("accept_dad", "0"), ("disable_ipv6", "0")] {
                let path = format!("{base}/{name}");
                fs::write(&path, value).map_err(NetworkError::io("set", path))?;
            }
        }
        let index = nix::net::if_::if_nametoindex(POD_LINK)
            .map_err(NetworkError::errno("look up link", POD_LINK))?;
        let batch = plan_pod(index, addresses).map_err(refused("configure", POD_LINK))?;
        let mut connection = Connection::open().map_err(fail("open netlink socket in"))?;
        connection.run(batch).map_err(|refused| refused.of(POD_LINK))
    });
    done.map_err(fail("enter network namespace"))?
}

/// The requests in the pod. A veth can be opened only once its peer is there, so not at its creation.
fn plan_pod(index: u32, addresses: &[(IpAddr, IpAddr)]) -> Result<Batch, Error> {
    let mut batch = Batch::default();
    let up = LinkUnspec::new_with_index(index).up().build();
    batch.add("bring up", RouteNetlinkMessage::SetLink(up), 0);
    for (address, gateway) in addresses {
        let width = if address.is_ipv4() { 32 } else { 128 };
        let invalid = |error: &dyn std::error::Error| Error::InvalidNla(error.to_string());
        let new = RouteNetlinkMessage::NewAddress(address_message(index, *address, width));
        batch.add("add address to", new, NLM_F_CREATE | NLM_F_EXCL).accepting(libc::EEXIST);
        let on_link = RouteMessageBuilder::<IpAddr>::new()
            .destination_prefix(*gateway, width)
            .map_err(|error| invalid(&error))?
            .scope(RouteScope::Link)
            .output_interface(index);
        let any: IpAddr = if address.is_ipv4() {
            std::net::Ipv4Addr::UNSPECIFIED.into()
        } else {
            std::net::Ipv6Addr::UNSPECIFIED.into()
        };
        let default = RouteMessageBuilder::<IpAddr>::new()
            .destination_prefix(any, 0)
            .and_then(|route| route.gateway(*gateway))
            .map_err(|error| invalid(&error))?
            .output_interface(index);
        for route in [on_link.build(), default.build()] {
            let route = RouteNetlinkMessage::NewRoute(route);
            batch.add("add route of", route, NLM_F_CREATE | NLM_F_REPLACE);
        }
    }
    Ok(batch)
}

fn address_message(index: u32, address: IpAddr, prefix: u8) -> AddressMessage {
    match address {
        IpAddr::V4(address) => {
            AddressMessageBuilder::<Ipv4Addr>::new().index(index).address(address, prefix).build()
        }
        IpAddr::V6(address) => {
            let mut message = AddressMessageBuilder::<Ipv6Addr>::new()
                .index(index)
                .address(address, prefix)
                .build();
            // Reserved on this node: no need to wait a second for whether someone else has it.
            message.header.flags |= AddressHeaderFlags::Nodad;
            message.attributes.push(AddressAttribute::Flags(AddressFlags::Nodad));
            message
        }
    }
}

fn gone() -> ErrorMessage {
    let mut message = ErrorMessage::default();
    message.code = std::num::NonZeroI32::new(-libc::ENODEV);
    message
}

async fn add_address(
    handle: &Handle,
    index: u32,
    address: IpAddr,
    prefix: u8,
) -> Result<(), Error> {
    let mut request = handle.address().add(index, address, prefix);
    *request.message_mut() = address_message(index, address, prefix);
    ignore(request.execute().await, libc::EEXIST)
}

/// What forwarding for pods needs of the host.
fn sysctls(bridge: &str, cidrs: &[Cidr]) -> Result<(), NetworkError> {
    let set = |path: String, value: &str| -> Result<(), NetworkError> {
        let path = format!("/proc/sys/net/{path}");
        // Written only when it differs: /proc/sys is often read-only where it is right already.
        if fs::read_to_string(&path).is_ok_and(|have| have.trim() == value) {
            return Ok(());
        }
        fs::write(&path, value).map_err(NetworkError::io("set", path))
    };
    if cidrs.iter().any(Cidr::is_ipv4) {
        set("ipv4/ip_forward".to_owned(), "1")?;
        // For host ports on 127.0.0.1; the `localnet` chain keeps pods out.
        set(format!("ipv4/conf/{bridge}/route_localnet"), "1")?;
        // Pods reach one another by the gateway; it need not tell them of a shorter way.
        set(format!("ipv4/conf/{bridge}/send_redirects"), "0")?;
    }
    if cidrs.iter().any(|cidr| !cidr.is_ipv4()) {
        keep_advertised_routes();
        set("ipv6/conf/all/forwarding".to_owned(), "1")?;
        // What is forwarded to a pod waits for its link address, which the kernel asks for under the
        // bridge's link-local address, and not before that has been found to be unique.
        set(format!("ipv6/conf/{bridge}/accept_dad"), "0")?;
    }
    Ok(())
}

/// A forwarding host takes no router advertisements unless it is told to (accept_ra 2): one whose
/// own default route comes from them would lose it.
fn keep_advertised_routes() {
    let base = "/proc/sys/net/ipv6/conf";
    let forwards = fs::read_to_string(format!("{base}/all/forwarding"));
    if forwards.is_ok_and(|forwards| forwards.trim() != "0") {
        return;
    }
    for link in fs::read_dir(base).into_iter().flatten().flatten() {
        let path = link.path().join("accept_ra");
        if fs::read_to_string(&path).is_ok_and(|accept| accept.trim() == "1")
            && let Err(error) = fs::write(&path, "2")
        {
            tracing::warn!(path = %path.display(), %error, "cannot keep advertised routes");
        }
    }
}

/// Whether this host can do IPv6 at all.
pub(crate) fn has_ipv6() -> bool {
    fs::read_to_string("/proc/sys/net/ipv6/conf/all/disable_ipv6")
        .is_ok_and(|disabled| disabled.trim() == "0")
}

/// A locally administered MAC address made of an IP address.
pub(crate) fn mac_for(ip: &IpAddr) -> [u8; 6] {
    match ip {
        IpAddr::V4(ip) => {
            let [a, b, c, d] = ip.octets();
            [0x0a, 0x58, a, b, c, d]
        }
        // A block's addresses differ in their ends.
        IpAddr::V6(ip) => {
            let [.., a, b, c, d] = ip.octets();
            [0x0a, 0x59, a, b, c, d]
        }
    }
}

fn is_link_local(address: &IpAddr) -> bool {
    matches!(address, IpAddr::V6(address) if address.is_unicast_link_local())
}

fn errno(error: &Error) -> Option<i32> {
    match error {
        Error::NetlinkError(message) => Some(-message.raw_code()),
        _ => None,
    }
}

fn ignore(result: Result<(), Error>, accepted: i32) -> Result<(), Error> {
    match result {
        Err(error) if errno(&error) == Some(accepted) => Ok(()),
        other => other,
    }
}

impl Refused {
    fn of(self, object: &str) -> NetworkError {
        let Self { operation, source, message } = self;
        let object = object.to_owned();
        match message {
            // The number is looked at elsewhere.
            Some(message)
                if !matches!(
                    source.raw_os_error(),
                    Some(libc::ENODEV | libc::EINVAL | libc::EEXIST)
                ) =>
            {
                NetworkError::Netlink { operation, object, reason: format!("{source}: {message}") }
            }
            _ => NetworkError::Io { operation, object, source },
        }
    }
}

fn refused(
    operation: &'static str,
    object: impl std::fmt::Display,
) -> impl FnOnce(Error) -> NetworkError {
    let object = object.to_string();
    move |error| match errno(&error) {
        Some(errno) => {
            NetworkError::Io { operation, object, source: io::Error::from_raw_os_error(errno) }
        }
        None => NetworkError::Netlink { operation, object, reason: error.to_string() },
    }
}
