//! Connection tracking entries over ctnetlink (`linux/netfilter/nfnetlink_conntrack.h`): listed and
//! deleted one by one, so that a datagram's next packet is translated anew.

use std::cell::RefCell;
use std::net::{IpAddr, SocketAddr};

use nix::errno::Errno;

use crate::client::{Client, Error};
use crate::object::Family;
use crate::wire::{Attributes, Writer};

const CT_SUBSYSTEM: u16 = 1;
const CT_NEW: u16 = 0;
const CT_GET: u16 = 1;
const CT_DELETE: u16 = 2;

/// A tracked flow.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Flow {
    /// Protocol number.
    pub protocol: u8,
    /// Who began it.
    pub source: SocketAddr,
    /// To whom, before translation.
    pub destination: SocketAddr,
    /// Who answers: the destination after translation.
    pub answering: SocketAddr,
    /// Zone, 0 if none.
    zone: u16,
    id: Option<[u8; 4]>,
}

impl Client {
    /// All flows of one family and protocol.
    ///
    /// # Errors
    /// If the kernel cannot be read.
    pub fn flows(&mut self, family: Family, protocol: u8) -> Result<Vec<Flow>, Error> {
        let found = RefCell::new(Vec::new());
        let list = |client: &mut Client, filtered: bool| {
            client.dump_of(
                CT_SUBSYSTEM << 8 | CT_GET,
                family,
                "tracked connections",
                |out| {
                    if filtered {
                        out.nest(1, |out| out.nest(2, |out| out.bytes(1, &[protocol])));
                        // CTA_FILTER_FLAG of the protocol number, in host byte order.
                        out.nest(25, |out| {
                            out.bytes(1, &8u32.to_ne_bytes());
                            out.bytes(2, &0u32.to_ne_bytes());
                        });
                    }
                },
                || found.borrow_mut().clear(),
                |message| {
                    if message.kind == CT_SUBSYSTEM << 8 | CT_NEW
                        && let Some(flow) = flow(message.attributes())
                        && flow.protocol == protocol
                    {
                        found.borrow_mut().push(flow);
                    }
                },
            )
        };
        // Kernels before 5.9 cannot filter.
        match list(self, true) {
            Err(Error::Dump { .. }) => list(self, false)?,
            other => other?,
        }
        Ok(found.into_inner())
    }

    /// Deletes a flow; one that is gone already is fine.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn delete_flow(&mut self, flow: &Flow) -> Result<(), Error> {
        let family = if flow.source.is_ipv4() { Family::Ip } else { Family::Ip6 };
        let answer = self.request(CT_SUBSYSTEM << 8 | CT_DELETE, family, |out| {
            out.nest(1, |out| write_tuple(out, flow));
            if flow.zone != 0 {
                out.bytes(18, &flow.zone.to_be_bytes());
            }
            if let Some(id) = flow.id {
                out.bytes(12, &id);
            }
        })?;
        match answer {
            None | Some(Errno::ENOENT) => Ok(()),
            Some(errno) => {
                Err(Error::Dump { what: format!("flow to {}", flow.destination), errno })
            }
        }
    }
}

fn write_tuple(out: &mut Writer, flow: &Flow) {
    out.nest(1, |out| {
        for (v4, v6, address) in [(1, 3, flow.source.ip()), (2, 4, flow.destination.ip())] {
            match address {
                IpAddr::V4(a) => out.bytes(v4, &a.octets()),
                IpAddr::V6(a) => out.bytes(v6, &a.octets()),
            }
        }
    });
    out.nest(2, |out| {
        out.bytes(1, &[flow.protocol]);
        out.bytes(2, &flow.source.port().to_be_bytes());
        out.bytes(3, &flow.destination.port().to_be_bytes());
    });
}

fn address(tuple: Attributes<'_>, v4: u16, v6: u16) -> Option<IpAddr> {
    let ip = tuple.nested(1);
    if let Some(bytes) = ip.get(v4) {
        return Some(<[u8; 4]>::try_from(bytes).ok()?.into());
    }
    Some(<[u8; 16]>::try_from(ip.get(v6)?).ok()?.into())
}

fn port(tuple: Attributes<'_>, kind: u16) -> Option<u16> {
    Some(u16::from_be_bytes(tuple.nested(2).get(kind)?.try_into().ok()?))
}

fn flow(attributes: Attributes<'_>) -> Option<Flow> {
    let (original, reply) = (attributes.nested(1), attributes.nested(2));
    Some(Flow {
        protocol: *original.nested(2).get(1)?.first()?,
        source: SocketAddr::new(address(original, 1, 3)?, port(original, 2)?),
        destination: SocketAddr::new(address(original, 2, 4)?, port(original, 3)?),
        answering: SocketAddr::new(address(reply, 1, 3)?, port(reply, 2)?),
        zone: attributes
            .get(18)
            .and_then(|b| b.try_into().ok())
            .map(u16::from_be_bytes)
            .unwrap_or_default(),
        id: attributes.get(12).and_then(|b| b.try_into().ok()),
    })
}
