//! Version, Status, RuntimeConfig, UpdateRuntimeConfig: what the runtime is and whether it works.

use std::collections::HashMap;

use tonic::Status;

use super::Shim;
use crate::api;
use crate::config::CgroupDriver;
use crate::network::Cidr;

impl Shim {
    pub(super) fn version(&self) -> api::VersionResponse {
        api::VersionResponse {
            version: "0.1.0".to_owned(),
            runtime_name: "longshore".to_owned(),
            runtime_version: env!("CARGO_PKG_VERSION").to_owned(),
            runtime_api_version: "v1".to_owned(),
        }
    }

    pub(super) async fn runtime_status(&self, request: &api::StatusRequest) -> api::StatusResponse {
        let userns = self.userns_support().await;
        let network = self.network.status().await;
        let conditions = vec![condition("RuntimeReady", "", Ok(())), {
            // The word that containerd has for it, which people look for in a node's conditions.
            condition("NetworkReady", "NetworkPluginNotReady", network)
        }];
        let mut info = HashMap::new();
        if request.verbose {
            let text = serde_json::json!({
                "stateDir": self.layout.state,
                "runDir": self.layout.run,
                "cgroupV2": self.cgroups.v2,
                "swapAccounting": self.host.swap_accounting,
                "appArmor": self.apparmor.enabled(),
                "seLinux": self.selinux.enabled,
                "userNamespaces": userns.as_ref().err().map_or("supported", String::as_str),
            });
            info.insert("config".to_owned(), text.to_string());
            let network = self.network.describe();
            info.insert("cniconfig".to_owned(), network.cni.to_string());
            let last = network.last_load.err().unwrap_or_else(|| "OK".to_owned());
            info.insert("lastCNILoadStatus".to_owned(), last.clone());
            info.insert("lastCNILoadStatus.default".to_owned(), last);
        }
        api::StatusResponse {
            status: Some(api::RuntimeStatus { conditions }),
            info,
            runtime_handlers: std::iter::once("")
                .chain(self.config.handlers())
                .map(|name| api::RuntimeHandler {
                    name: name.to_owned(),
                    features: Some(api::RuntimeHandlerFeatures {
                        recursive_read_only_mounts: self.host.recursive_read_only,
                        user_namespaces: userns.is_ok() && self.handler_userns(name).is_ok(),
                    }),
                })
                .collect(),
            features: Some(api::RuntimeFeatures {
                supplemental_groups_policy: true,
                user_namespaces_host_network: false,
            }),
        }
    }

    pub(super) fn runtime_config(&self) -> api::RuntimeConfigResponse {
        let driver = match self.config.cgroup_driver {
            CgroupDriver::Cgroupfs => api::CgroupDriver::Cgroupfs,
            CgroupDriver::Systemd => api::CgroupDriver::Systemd,
        };
        api::RuntimeConfigResponse {
            linux: Some(api::LinuxRuntimeConfiguration { cgroup_driver: driver as i32 }),
        }
    }

    pub(super) fn update_runtime_config(
        &self,
        request: api::UpdateRuntimeConfigRequest,
    ) -> Result<api::UpdateRuntimeConfigResponse, Status> {
        let network = request.runtime_config.and_then(|c| c.network_config).unwrap_or_default();
        let mut cidrs = Vec::new();
        for text in network.pod_cidr.split(',').map(str::trim).filter(|t| !t.is_empty()) {
            let cidr: Cidr = text.parse().map_err(|e| {
                Status::invalid_argument(format!("pod CIDR {text:?} is not a CIDR: {e}"))
            })?;
            cidrs.push(cidr);
        }
        if !cidrs.is_empty() {
            self.network.set_pod_cidrs(cidrs);
        }
        Ok(api::UpdateRuntimeConfigResponse {})
    }
}

fn condition(kind: &str, reason: &str, state: Result<(), String>) -> api::RuntimeCondition {
    let (status, reason, message) = match state {
        Ok(()) => (true, String::new(), String::new()),
        Err(message) => (false, reason.to_owned(), message),
    };
    api::RuntimeCondition { r#type: kind.to_owned(), status, reason, message }
}
