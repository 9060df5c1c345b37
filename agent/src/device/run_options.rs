//! What a container is given with its devices: what their plugins said, put together. Pure.

use std::collections::{BTreeMap, BTreeSet};

use cri_shim::api;

use super::assignments::OfContainer;

/// Parts of a container's CRI configuration.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RunOptions {
    /// Environment; the container's own goes over it.
    pub envs: Vec<(String, String)>,
    /// Bind mounts.
    pub mounts: Vec<api::Mount>,
    /// Device files.
    pub devices: Vec<api::Device>,
    /// Annotations.
    pub annotations: BTreeMap<String, String>,
    /// Devices by their names in CDI.
    pub cdi_devices: Vec<api::CdiDevice>,
}

/// Puts together what the plugins of `own` said. Of two that say different things of the same path or
/// name, the first resource by name counts.
pub fn run_options(own: &OfContainer) -> RunOptions {
    let mut options = RunOptions::default();
    let (mut envs, mut mounts, mut devices) = (BTreeMap::new(), BTreeSet::new(), BTreeSet::new());
    let mut cdi = BTreeSet::new();
    for assigned in own.values() {
        let told = &assigned.response;
        for (name, value) in &told.envs {
            envs.entry(name.clone()).or_insert_with(|| value.clone());
        }
        for mount in &told.mounts {
            if mounts.insert(&mount.container_path) {
                options.mounts.push(api::Mount {
                    container_path: mount.container_path.clone(),
                    host_path: mount.host_path.clone(),
                    readonly: mount.read_only,
                    ..api::Mount::default()
                });
            }
        }
        for device in &told.devices {
            if devices.insert(&device.container_path) {
                options.devices.push(api::Device {
                    container_path: device.container_path.clone(),
                    host_path: device.host_path.clone(),
                    permissions: device.permissions.clone(),
                });
            }
        }
        for (name, value) in &told.annotations {
            options.annotations.entry(name.clone()).or_insert_with(|| value.clone());
        }
        for device in &told.cdi_devices {
            if cdi.insert(&device.name) {
                options.cdi_devices.push(api::CdiDevice { name: device.name.clone() });
            }
        }
    }
    options.envs = envs.into_iter().collect();
    options
}

#[cfg(test)]
mod tests {
    use super::super::assignments::Assigned;
    use super::super::wire;
    use super::*;

    #[test]
    fn the_first_of_two_resources_counts() {
        let response = |env: &str, host: &str| wire::ContainerAllocateResponse {
            envs: [("E".into(), env.into()), (env.into(), "x".into())].into(),
            mounts: vec![wire::Mount {
                container_path: "/m".into(),
                host_path: host.into(),
                read_only: true,
            }],
            devices: vec![wire::DeviceSpec {
                container_path: "/dev/d".into(),
                host_path: host.into(),
                permissions: "rw".into(),
            }],
            annotations: [("a".into(), env.into())].into(),
            cdi_devices: ["v/c=1", host].map(|n| wire::CdiDevice { name: n.into() }).into(),
        };
        let own = |response| Assigned { response, ..Assigned::default() };
        let own = OfContainer::from([
            ("example.com/b".into(), own(response("two", "/two"))),
            ("example.com/a".into(), own(response("one", "/one"))),
        ]);
        let options = run_options(&own);
        let pair = |a: &str, b: &str| (a.to_owned(), b.to_owned());
        assert_eq!(options.envs, [pair("E", "one"), pair("one", "x"), pair("two", "x")]);
        assert_eq!(options.mounts.len(), 1);
        assert!(options.mounts[0].host_path == "/one" && options.mounts[0].readonly);
        assert!(!options.mounts[0].selinux_relabel);
        assert_eq!(options.devices.len(), 1);
        assert_eq!(options.devices[0].permissions, "rw");
        assert_eq!(options.annotations, [pair("a", "one")].into());
        let names: Vec<_> = options.cdi_devices.iter().map(|d| &*d.name).collect();
        assert_eq!(names, ["v/c=1", "/one", "/two"]);
    }
}
