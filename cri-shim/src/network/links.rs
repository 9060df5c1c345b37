//! The built-in network's links, addresses and routes, over one kept rtnetlink connection.

use std::{collections::BTreeSet, fs, io, net::IpAddr, os::fd::AsRawFd, path::Path};

use futures::TryStreamExt;
use rtnetlink::{
    Error, Handle, LinkBridge, LinkBridgePort, LinkMessageBuilder, LinkUnspec, LinkVeth,
    RouteMessageBuilder,
    packet_route::{
        address::{AddressAttribute, AddressFlags, AddressHeaderFlags},
        link::{InfoData, InfoVeth, LinkAttribute, LinkMessage},
        route::RouteScope,
    },
};

use tokio::sync::{mpsc, oneshot};

use super::{Cidr, NetworkError, allocate::gateway, netns};

/// Names of the host's ends start with this; `collect` goes by it.
pub(crate) const VETH_PREFIX: &str = "lsv";
/// The link group of links about to be removed together.
const DOOMED: u32 = 0x4c53_4e44;
/// The pods' end, as CNI names it.
const POD_LINK: &str = "eth0";

/// A connection to the host's links.
#[derive(Clone)]
pub(crate) struct Links {
    handle: Handle,
    removals: mpsc::UnboundedSender<Removal>,
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
        Ok(Self { handle, removals })
    }

    /// Makes sure that the bridge is there, up, with the gateways of `cidrs`; returns its index.
    pub(crate) async fn ensure_bridge(
        &self,
        name: &str,
        cidrs: &[Cidr],
        mtu: Option<u32>,
    ) -> Result<u32, NetworkError> {
        let index = match self.index(name).await? {
            Some(index) => index,
            None => {
                let mut bridge = LinkBridge::new(name).up();
                if let Some(mtu) = mtu {
                    bridge = bridge.mtu(mtu);
                }
                let made = self.handle.link().add(bridge.build()).execute().await;
                ignore(made, libc::EEXIST).map_err(refused("create bridge", name))?;
                self.index(name).await?.ok_or_else(|| NetworkError::Netlink {
                    operation: "create bridge",
                    object: name.to_owned(),
                    reason: "it is not there".to_owned(),
                })?
            }
        };
        let up = LinkUnspec::new_with_index(index).up().build();
        self.handle.link().change(up).execute().await.map_err(refused("bring up bridge", name))?;
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
        Ok(index)
    }

    /// Connects the namespace `netns` by a veth pair: `veth` on the bridge, `eth0` in the pod with
    /// `addresses`, whose gateways are `gateways`.
    ///
    /// The pod's addresses have no on-link neighbours: everything goes by the gateway, so that
    /// connections between pods of the node pass the host's netfilter too, which Services need
    /// and which bridging alone would not give without the br_netfilter module.
    pub(crate) async fn connect(
        &self,
        bridge: u32,
        veth: &str,
        netns: &Path,
        addresses: &[(IpAddr, IpAddr)],
        mtu: Option<u32>,
    ) -> Result<(), NetworkError> {
        let place = fs::File::open(netns)
            .map_err(NetworkError::io("open network namespace", netns.display()))?;
        let mut pod =
            LinkMessageBuilder::<LinkUnspec>::new().name(POD_LINK).setns_by_fd(place.as_raw_fd());
        let mut own = LinkVeth::new(veth, POD_LINK).controller(bridge).up();
        if let Some(mac) = addresses.iter().find_map(|(ip, _)| mac_for(ip)) {
            // Bound to the address, so that neighbours' caches stay right when it is given again.
            pod = pod.address(mac.to_vec());
        }
        if let Some(mtu) = mtu {
            (pod, own) = (pod.mtu(mtu), own.mtu(mtu));
        }
        let own = own.set_info_data(InfoData::Veth(InfoVeth::Peer(pod.build()))).build();
        let made = self.handle.link().add(own).execute().await;
        made.map_err(refused("create veth pair", veth))?;
        let port = LinkMessageBuilder::<LinkBridgePort>::default()
            .name(veth)
            .set_port_kind(rtnetlink::packet_route::link::InfoPortKind::Bridge)
            .hairpin(true)
            .build();
        let set = self.handle.link().set_port(port).execute().await;
        set.map_err(refused("set hairpin mode of", veth))?;
        self.configure_pod(netns, addresses).await
    }

    async fn configure_pod(
        &self,
        netns: &Path,
        addresses: &[(IpAddr, IpAddr)],
    ) -> Result<(), NetworkError> {
        let runtime = tokio::runtime::Handle::current();
        // The socket belongs to the namespace it is opened in, wherever it is used.
        let opened = netns::within(netns, || {
            let _context = runtime.enter();
            // A pod's routes come from here, never from what another pod advertises.
            let _ = fs::write(format!("/proc/sys/net/ipv6/conf/{POD_LINK}/accept_ra"), "0");
            rtnetlink::new_connection()
        });
        let object = netns.display();
        let (connection, handle, _) = opened
            .and_then(|opened| opened)
            .map_err(NetworkError::io("enter network namespace", &object))?;
        let connection = tokio::spawn(connection);
        let done =
            configure(&handle, addresses).await.map_err(refused("configure eth0 in", &object));
        connection.abort();
        done
    }

    /// Removes a link by name; one that is not there is a success.
    pub(crate) async fn remove(&self, name: &str) -> Result<(), NetworkError> {
        let (done, removed) = oneshot::channel();
        // A closed channel means that the runtime ends.
        let _ = self.removals.send((name.to_owned(), done));
        removed.await.unwrap_or(Err(Error::RequestFailed)).map_err(refused("remove link", name))
    }

    /// The host's ends of pods' links.
    pub(crate) async fn veths(&self) -> Result<Vec<String>, NetworkError> {
        let mut names = Vec::new();
        let mut links = self.handle.link().get().execute();
        while let Some(link) =
            links.try_next().await.map_err(refused("list links", "of the host"))?
        {
            names.extend(link.attributes.into_iter().find_map(|attribute| match attribute {
                LinkAttribute::IfName(name) if name.starts_with(VETH_PREFIX) => Some(name),
                _ => None,
            }));
        }
        Ok(names)
    }

    async fn index(&self, name: &str) -> Result<Option<u32>, NetworkError> {
        index(&self.handle, name).await.map_err(refused("look up link", name))
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

async fn configure(handle: &Handle, addresses: &[(IpAddr, IpAddr)]) -> Result<(), Error> {
    let index = index(handle, POD_LINK).await?.ok_or(Error::RequestFailed)?;
    // A veth can be opened only once its peer is there, so not at its creation.
    handle.link().change(LinkUnspec::new_with_index(index).up().build()).execute().await?;
    for (address, gateway) in addresses {
        let width = if address.is_ipv4() { 32 } else { 128 };
        add_address(handle, index, *address, width).await?;
        let on_link = RouteMessageBuilder::<IpAddr>::new()
            .destination_prefix(*gateway, width)
            .map_err(|error| Error::InvalidNla(error.to_string()))?
            .scope(RouteScope::Link)
            .output_interface(index);
        handle.route().add(on_link.build()).replace().execute().await?;
        let any: IpAddr = if address.is_ipv4() {
            std::net::Ipv4Addr::UNSPECIFIED.into()
        } else {
            std::net::Ipv6Addr::UNSPECIFIED.into()
        };
        let default = RouteMessageBuilder::<IpAddr>::new()
            .destination_prefix(any, 0)
            .and_then(|route| route.gateway(*gateway))
            .map_err(|error| Error::InvalidNla(error.to_string()))?
            .output_interface(index);
        handle.route().add(default.build()).replace().execute().await?;
    }
    Ok(())
}

async fn add_address(
    handle: &Handle,
    index: u32,
    address: IpAddr,
    prefix: u8,
) -> Result<(), Error> {
    let mut request = handle.address().add(index, address, prefix);
    if address.is_ipv6() {
        // Reserved on this node: no need to wait a second for whether someone else has it.
        let message = request.message_mut();
        message.header.flags |= AddressHeaderFlags::Nodad;
        message.attributes.push(AddressAttribute::Flags(AddressFlags::Nodad));
    }
    ignore(request.execute().await, libc::EEXIST)
}

async fn index(handle: &Handle, name: &str) -> Result<Option<u32>, Error> {
    let mut links = handle.link().get().match_name(name).execute();
    match links.try_next().await {
        Ok(link) => Ok(link.map(|link| link.header.index)),
        Err(error) if errno(&error) == Some(libc::ENODEV) => Ok(None),
        Err(error) => Err(error),
    }
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

/// A locally administered MAC address made of an IPv4 address.
fn mac_for(ip: &IpAddr) -> Option<[u8; 6]> {
    match ip {
        IpAddr::V4(ip) => {
            let [a, b, c, d] = ip.octets();
            Some([0x0a, 0x58, a, b, c, d])
        }
        IpAddr::V6(_) => None,
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
