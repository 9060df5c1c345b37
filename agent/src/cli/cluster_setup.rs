//! `longshore cluster-setup`: prints what an administrator applies once.
//!
//! A kubeadm cluster lets its nodes read Services (ClusterRole `system:node`) but not
//! EndpointSlices, because there kube-proxy has a service account of its own.

use std::io::Write;

use clap::Args;
use serde_json::{Value, json};

use super::Output;

/// Name of the ClusterRole and of its binding.
const NAME: &str = "longshore:node-proxier";

/// Arguments of `longshore cluster-setup`.
#[derive(Debug, Args)]
pub struct ClusterSetupArgs {}

/// Prints the manifest, as YAML or as a JSON list.
pub(super) fn run(_args: ClusterSetupArgs, output: Output) -> anyhow::Result<()> {
    let text = match output {
        Output::Json => {
            let list = json!({"apiVersion": "v1", "kind": "List", "items": objects()});
            serde_json::to_string_pretty(&list)? + "\n"
        }
        Output::Text => yaml()?,
    };
    std::io::stdout().lock().write_all(text.as_bytes())?;
    Ok(())
}

fn yaml() -> anyhow::Result<String> {
    let mut text = "# What longshore nodes need beyond what a kubeadm cluster grants: reading \
                    EndpointSlices\n# and ServiceCIDRs, to serve Services. Apply once, as an administrator:\n#   \
                    longshore cluster-setup | kubectl apply -f -\n"
        .to_owned();
    for object in objects() {
        text.push_str("---\n");
        text.push_str(serde_saphyr::to_string(&object)?.trim_end());
        text.push('\n');
    }
    Ok(text)
}

fn objects() -> [Value; 2] {
    [
        json!({
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "ClusterRole",
            "metadata": {"name": NAME},
            "rules": [{
                "apiGroups": ["discovery.k8s.io"],
                "resources": ["endpointslices"],
                "verbs": ["get", "list", "watch"],
            }, {
                "apiGroups": ["networking.k8s.io"],
                "resources": ["servicecidrs"],
                "verbs": ["get", "list", "watch"],
            }],
        }),
        json!({
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "ClusterRoleBinding",
            "metadata": {"name": NAME},
            "roleRef": {
                "apiGroup": "rbac.authorization.k8s.io",
                "kind": "ClusterRole",
                "name": NAME,
            },
            "subjects": [{
                "apiGroup": "rbac.authorization.k8s.io",
                "kind": "Group",
                "name": "system:nodes",
            }],
        }),
    ]
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use k8s_openapi::api::rbac::v1::{ClusterRole, ClusterRoleBinding};

    use super::*;

    #[test]
    fn the_manifest_grants_nodes_what_services_need_to_read_and_nothing_else() {
        let text = yaml().unwrap();
        let documents: Vec<&str> = text.split("---\n").skip(1).collect();
        let role: ClusterRole = serde_saphyr::from_str(documents[0]).unwrap();
        let binding: ClusterRoleBinding = serde_saphyr::from_str(documents[1]).unwrap();
        let rules = role.rules.unwrap();
        assert_eq!(rules.len(), 2);
        assert_eq!(rules[1].resources.as_ref().unwrap(), &["servicecidrs"]);
        assert_eq!(rules[1].verbs, ["get", "list", "watch"]);
        assert_eq!(rules[0].resources.as_ref().unwrap(), &["endpointslices"]);
        assert_eq!(rules[0].verbs, ["get", "list", "watch"]);
        assert_eq!(binding.role_ref.name, role.metadata.name.unwrap());
        assert_eq!(binding.subjects.unwrap()[0].name, "system:nodes");
    }
}
