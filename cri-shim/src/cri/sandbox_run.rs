//! RunPodSandbox: a name, files, namespaces, the network, a monitor.
//!
//! The record is written last: a crash before that leaves a directory without one, which recovery
//! takes away with all that belongs to its id.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use nix::mount::{MsFlags, mount};
use tonic::Status;

use super::store::{Sandbox, SandboxName};
use super::{PATIENCE, Shim, blocking, internal, sandbox_files};
use crate::api::{self, ContainerEventType, NamespaceMode};
use crate::client::MonitorClient;
use crate::crash::point;
use crate::monitor::protocol::{SpawnMonitor, Userns};
use crate::network::{Dns, PortMapping, Protocol, SandboxNetwork};
use crate::spec::userns::IdMap;
use crate::spec::{cgroup_path, sysctl, userns};
use crate::state::{SandboxRecord, new_id};

impl Shim {
    pub(super) async fn run_pod_sandbox(
        self: &Arc<Self>,
        request: api::RunPodSandboxRequest,
    ) -> Result<api::RunPodSandboxResponse, Status> {
        let config = request.config.ok_or_else(|| Status::invalid_argument("no config"))?;
        let metadata = config.metadata.clone().unwrap_or_default();
        if metadata.name.is_empty() || metadata.namespace.is_empty() {
            return Err(Status::invalid_argument("a sandbox needs a name and a namespace"));
        }
        let handler = request.runtime_handler;
        if !self.config.has_handler(&handler) {
            let known: Vec<&str> = self.config.handlers().collect();
            return Err(Status::invalid_argument(format!(
                "runtime handler {handler:?} is not configured, only {known:?}; change the \
                 RuntimeClass or install the runtime"
            )));
        }
        let id = new_id();
        let name = SandboxName::from(&metadata);
        if let Err(other) = self.store.reserve_sandbox(name.clone(), &id) {
            // The same attempt again is a call whose answer was lost.
            return match self.store.find_sandbox(&other).filter(|s| s.is_ready()) {
                Some(sandbox) => {
                    Ok(api::RunPodSandboxResponse { pod_sandbox_id: sandbox.id.clone() })
                }
                None => Err(Status::already_exists(format!(
                    "sandbox {}/{} attempt {} exists as {other}; remove it first",
                    metadata.namespace, metadata.name, metadata.attempt
                ))),
            };
        }
        // On a task of its own: a caller that goes away must not leave half a sandbox.
        let this = self.clone();
        let made = tokio::spawn(async move {
            let made = this.make_sandbox(&id, config, handler).await;
            if made.is_err() {
                this.clear_sandbox(&id).await;
                this.store.release_sandbox(&name);
            }
            made.map(|()| id)
        });
        let id = made.await.map_err(|e| internal("making the sandbox", e))??;
        Ok(api::RunPodSandboxResponse { pod_sandbox_id: id })
    }

    async fn make_sandbox(
        self: &Arc<Self>,
        id: &str,
        config: api::PodSandboxConfig,
        handler: String,
    ) -> Result<(), Status> {
        let linux = config.linux.clone().unwrap_or_default();
        let selinux = linux.security_context.as_ref().and_then(|s| s.selinux_options.clone());
        // The level is kept from others until this sandbox is in the store.
        let (labels, _level) = self.sandbox_labels(selinux.as_ref())?;
        let options = linux.security_context.and_then(|s| s.namespace_options).unwrap_or_default();
        let users =
            userns::plan(Some(&options)).map_err(|e| Status::invalid_argument(e.to_string()))?;
        if users.is_some() {
            self.can_have_userns(&handler).await?;
        }
        let sysctls = sysctl::plan(&linux.sysctls, &options)
            .map_err(|e| Status::invalid_argument(e.to_string()))?;
        let host_network = options.network() == NamespaceMode::Node;
        let host_ipc = options.ipc() == NamespaceMode::Node;
        let shared_pid = options.pid() == NamespaceMode::Pod;
        let (cgroup, own_cgroup) = self.sandbox_cgroup(id, &linux.cgroup_parent)?;
        let hostname = self.sandbox_hostname(&config, host_network);

        let (layout, sandbox_id, files) = (self.layout.clone(), id.to_owned(), config.clone());
        let (name, netns) = (hostname.clone(), self.layout.netns(id));
        let files_label = labels.as_ref().map(|labels| labels.file.to_string());
        let pinned = netns.clone();
        blocking(move || {
            let directory = layout.sandbox(&sandbox_id);
            std::fs::create_dir_all(&directory)
                .map_err(|e| internal("making the sandbox directory", e))?;
            point("run sandbox: directory made");
            sandbox_files::write(&directory, &files, &name, host_network)
                .map_err(|e| internal("writing the sandbox's files", e))?;
            point("run sandbox: files written");
            if !host_ipc {
                mount_shm(&layout.shm(&sandbox_id), users.as_ref(), files_label.as_deref())?;
            }
            point("run sandbox: shm mounted");
            // That of a user namespace can only be made in it, which the monitor does.
            if !host_network && users.is_none() {
                crate::network::netns::create(&pinned)
                    .map_err(|e| internal("making the network namespace", e))?;
            }
            point("run sandbox: netns pinned");
            Ok::<(), Status>(())
        })
        .await??;

        let spawn = SpawnMonitor {
            socket: self.layout.monitor(id),
            hostname: (!host_network).then(|| hostname.clone()),
            ipc: !host_ipc,
            shared_pid,
            userns: users.map(|map| Userns { path: self.layout.userns(id), map }),
            netns: (!host_network).then(|| netns.clone()),
            sysctls,
            cgroup_procs: self.monitor_cgroup(id, &cgroup, own_cgroup),
        };
        let network = async {
            if host_network {
                return Ok(None);
            }
            let request = sandbox_network(id, &config, netns)?;
            let result = self.network.setup(&request).await;
            point("run sandbox: network set up");
            result.map(Some).map_err(|e| internal("setting up the pod's network", e))
        };
        let monitor = async {
            self.zygote
                .spawn(spawn)
                .await
                .map_err(|e| internal("starting the pod's monitor", e))?;
            point("run sandbox: monitor listens");
            self.scope_monitor(id, &cgroup).await
        };
        let network = if users.is_some() {
            // The monitor makes the namespace.
            monitor.await?;
            network.await?
        } else {
            // Both run to their end, so that what is cleared after a failure has stopped growing.
            let (network, monitor) = tokio::join!(network, monitor);
            monitor.and(network)?
        };
        if let Some(dns) = network.as_ref().and_then(|network| network.dns.as_ref()) {
            sandbox_files::take_dns(&self.layout.sandbox(id), &config, dns)
                .map_err(|e| internal("writing the sandbox's resolv.conf", e))?;
        }
        let monitor = MonitorClient::new(self.layout.monitor(id));
        let init = if shared_pid { greet(&monitor).await? } else { None };

        let mut record = SandboxRecord::new(id, &config);
        record.boot_id = self.boot_id.clone();
        record.runtime_handler = handler;
        record.selinux_label = labels.map(|labels| labels.process.to_string());
        if let Some(network) = network {
            record.ips = network.ips.iter().map(ToString::to_string).collect();
            record.network = network.shown;
        }
        record.cgroup = cgroup;
        record.own_cgroup = own_cgroup;
        let directory = self.layout.sandbox(id);
        point("run sandbox: all but recorded");
        record.write(&directory).map_err(|e| internal("recording the sandbox", e))?;
        point("run sandbox: recorded");
        self.durability.sync(directory);
        let sandbox = Arc::new(Sandbox::new(record, config, monitor, init, true));
        self.watch_monitor(&sandbox).await?;
        self.store.add_sandbox(sandbox);
        point("run sandbox: followed");
        self.emit(ContainerEventType::ContainerCreatedEvent, id, id);
        self.emit(ContainerEventType::ContainerStartedEvent, id, id);
        Ok(())
    }

    fn sandbox_cgroup(&self, id: &str, parent: &str) -> Result<(PathBuf, bool), Status> {
        if parent.is_empty() {
            let default = cgroup_path::parent(
                &self.config.default_cgroup_parent,
                crate::config::CgroupDriver::Cgroupfs,
            )
            .map_err(|e| Status::invalid_argument(e.to_string()))?;
            return Ok((default.join(id), true));
        }
        let path = cgroup_path::parent(parent, self.config.cgroup_driver)
            .map_err(|e| Status::invalid_argument(e.to_string()))?;
        Ok((path, false))
    }

    fn sandbox_hostname(&self, config: &api::PodSandboxConfig, host_network: bool) -> String {
        if host_network || config.hostname.is_empty() {
            let own = nix::unistd::gethostname().ok().and_then(|h| h.into_string().ok());
            return own.unwrap_or_default();
        }
        config.hostname.clone()
    }

    /// The `cgroup.procs` files that take the monitor out of the service's cgroup and into its
    /// pod's. On v2 it gets a leaf, as a cgroup with children may not hold processes.
    fn monitor_cgroup(&self, id: &str, cgroup: &std::path::Path, own: bool) -> Vec<PathBuf> {
        if own {
            for controller in ["cpu", "memory", "pids"] {
                let _ = std::fs::create_dir_all(self.cgroups.controller(controller, cgroup));
            }
        }
        if self.cgroups.v2 {
            let leaf = self.cgroups.controller("", &cgroup_path::monitor(cgroup, id));
            let _ = std::fs::create_dir(&leaf);
            return vec![leaf.join("cgroup.procs")];
        }
        self.cgroups
            .directories(cgroup)
            // A new v1 cpuset is empty and takes nobody until it is filled.
            .filter(|d| !d.to_string_lossy().contains("/cpuset/"))
            .map(|d| d.join("cgroup.procs"))
            .collect()
    }
}

async fn greet(monitor: &MonitorClient) -> Result<Option<i32>, Status> {
    match tokio::time::timeout(PATIENCE, monitor.greet()).await {
        Ok(Ok(greeting)) => Ok(greeting.init),
        Ok(Err(error)) => Err(internal("greeting the pod's monitor", error)),
        Err(_) => Err(Status::deadline_exceeded("the pod's monitor does not answer")),
    }
}

/// It belongs to root of the pod.
fn mount_shm(
    path: &std::path::Path,
    users: Option<&IdMap>,
    label: Option<&str>,
) -> Result<(), Status> {
    let (uid, gid) = users
        .map_or(Ok((0, 0)), IdMap::root)
        .map_err(|e| Status::invalid_argument(e.to_string()))?;
    let mut options = format!("mode=1777,size=65536k,uid={uid},gid={gid}");
    if let Some(label) = label {
        options.push_str(&crate::mount::context_option(label));
    }
    std::fs::create_dir_all(path).map_err(|e| internal("making the shm directory", e))?;
    mount(
        Some("shm"),
        path,
        Some("tmpfs"),
        MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC,
        Some(options.as_str()),
    )
    .map_err(|e| internal("mounting the sandbox's /dev/shm", e))
}

fn sandbox_network(
    id: &str,
    config: &api::PodSandboxConfig,
    netns: PathBuf,
) -> Result<SandboxNetwork, Status> {
    let metadata = config.metadata.clone().unwrap_or_default();
    let used = config.port_mappings.iter().filter(|port| port.host_port > 0);
    let port_mappings = used.map(port_mapping).collect::<Result<_, _>>()?;
    Ok(SandboxNetwork {
        id: id.to_owned(),
        netns,
        namespace: metadata.namespace,
        name: metadata.name,
        uid: metadata.uid,
        cgroup_parent: config.linux.as_ref().map(|l| l.cgroup_parent.clone()).unwrap_or_default(),
        dns: config.dns_config.as_ref().map(|dns| Dns {
            servers: dns.servers.clone(),
            searches: dns.searches.clone(),
            options: dns.options.clone(),
        }),
        port_mappings,
        annotations: config.annotations.clone().into_iter().collect::<BTreeMap<_, _>>(),
    })
}

/// A host port. What is none is refused: left out, or opened on all addresses, it would be another
/// pod than was asked for.
fn port_mapping(port: &api::PortMapping) -> Result<PortMapping, Status> {
    let bad = |what: &str| {
        let api::PortMapping { host_ip, host_port, container_port, .. } = port;
        Status::invalid_argument(format!(
            "host port {host_port} on {host_ip:?} to container port {container_port}: {what}"
        ))
    };
    let number = |port: i32| u16::try_from(port).ok().filter(|port| *port > 0);
    Ok(PortMapping {
        protocol: match api::Protocol::try_from(port.protocol) {
            Ok(api::Protocol::Tcp) => Protocol::Tcp,
            Ok(api::Protocol::Udp) => Protocol::Udp,
            Ok(api::Protocol::Sctp) => Protocol::Sctp,
            Err(_) => return Err(bad("the protocol is not known")),
        },
        host_ip: match port.host_ip.as_str() {
            "" => None,
            text => Some(text.parse().map_err(|_| bad("the host's address is none"))?),
        },
        host_port: number(port.host_port).ok_or_else(|| bad("ports are between 1 and 65535"))?,
        container_port: number(port.container_port)
            .ok_or_else(|| bad("ports are between 1 and 65535"))?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn host_ports_that_are_none_are_refused_not_widened() {
        let port = |host_ip: &str, host_port, container_port| api::PortMapping {
            protocol: api::Protocol::Udp as i32,
            host_ip: host_ip.to_owned(),
            host_port,
            container_port,
        };
        let good = port_mapping(&port("::1", 80, 8080)).unwrap();
        assert_eq!((good.host_ip, good.container_port), ("::1".parse().ok(), 8080));
        assert_eq!(port_mapping(&port("", 80, 8080)).unwrap().host_ip, None);
        for bad in [port("localhost", 80, 80), port("", 70_000, 80), port("", 80, 0)] {
            let error = port_mapping(&bad).unwrap_err();
            assert_eq!(error.code(), tonic::Code::InvalidArgument, "{error}");
        }
        let config = api::PodSandboxConfig {
            port_mappings: vec![port("", 0, 80), port("", 81, 81)],
            ..Default::default()
        };
        let network = sandbox_network("id", &config, PathBuf::new()).unwrap();
        assert_eq!(network.port_mappings.len(), 1);
    }
}
