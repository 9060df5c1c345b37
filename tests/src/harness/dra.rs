//! The tests' DRA driver on a node, and claims that are allocated to it.

use std::ops::Deref;
use std::path::Path;

use anyhow::{Result, bail};
use serde_json::{Value, json};

use super::caller::MERGE;
use super::cluster::{Cluster, fill_image};
use super::eventually;
use super::node::{Node, built};
use super::scripted::Scripted;

/// A driver that runs on a node.
pub struct DraDriver {
    name: String,
    scripted: Scripted,
    options: Value,
}

impl Deref for DraDriver {
    type Target = Scripted;

    fn deref(&self) -> &Scripted {
        &self.scripted
    }
}

impl DraDriver {
    /// Starts the driver, and waits until the node has taken it.
    ///
    /// # Errors
    /// When it cannot be started.
    pub async fn start(node: &Node, name: &str, options: Value) -> Result<Self> {
        let mut driver = Self::prepare(node, name, options)?;
        driver.spawn(node)?;
        driver.called("notify", 1).await;
        Ok(driver)
    }

    /// One that is not started yet. Instances of a driver have their own folders.
    ///
    /// # Errors
    /// What the file system says.
    pub fn prepare(node: &Node, name: &str, options: Value) -> Result<Self> {
        let instance = options["instance"].as_str().unwrap_or_default();
        let inside = Path::new("/var/lib/dra-test").join(format!("{name}{instance}"));
        let scripted = Scripted::prepare(node, inside);
        std::fs::create_dir_all(scripted.folder.join("claims"))?;
        Ok(Self { name: name.to_owned(), scripted, options })
    }

    /// Starts it (again).
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn spawn(&mut self, node: &Node) -> Result<()> {
        let mut command = node.command(built("dra-driver")?);
        command.arg(&self.name).arg(&self.scripted.inside);
        self.scripted.spawn(command.arg(self.options.to_string()))
    }

    /// Prepares these devices for the claim of this name: requests and devices.
    ///
    /// # Errors
    /// What the file system says.
    pub fn has(&self, claim: &str, devices: &[(&str, &str)]) -> Result<()> {
        let text: String = devices.iter().map(|(r, d)| format!("{r} {d}\n")).collect();
        Ok(std::fs::write(self.folder.join("claims").join(claim), text)?)
    }

    /// Tells this of its devices' health: `DEVICE HEALTH SECONDS WORDS` a line.
    ///
    /// # Errors
    /// What the file system says.
    pub fn health(&self, text: &str) -> Result<()> {
        // Seen whole or not at all.
        std::fs::write(self.folder.join("health.new"), text)?;
        std::fs::rename(self.folder.join("health.new"), self.folder.join("health"))?;
        Ok(())
    }

    /// The claims of each call of `verb`.
    pub fn asked(&self, verb: &str) -> Vec<String> {
        let calls = self.calls().into_iter().filter(|call| call["verb"] == verb);
        calls.map(|call| call["claim"].as_str().unwrap_or_default().to_owned()).collect()
    }

    /// Waits until `verb` was called so often.
    pub async fn called(&self, verb: &str, times: usize) {
        eventually(&format!("{times} calls of {verb}"), async || {
            let calls: Vec<_> =
                self.calls().into_iter().filter(|call| call["verb"] == verb).collect();
            if calls.len() >= times { Ok(()) } else { bail!("{calls:?}") }
        })
        .await;
    }

    /// Kills it; its sockets stay, as after a crash.
    pub fn stop(&mut self) {
        self.scripted.end();
    }
}

/// A claim for which the driver's devices were allocated (`request`, `device`).
pub fn claim(name: &str, driver: &str, devices: &[(&str, &str)]) -> Value {
    let result = |(request, device): &(&str, &str)| json!({"request": request, "driver": driver, "pool": "pool", "device": device});
    let request = |(request, _): &(&str, &str)| match request.split_once('/') {
        Some((name, of_it)) => {
            json!({"name": name, "firstAvailable": [{"name": of_it, "deviceClassName": "test"}]})
        }
        None => json!({"name": request, "exactly": {"deviceClassName": "test"}}),
    };
    json!({
        "metadata": {"name": name},
        "spec": {"devices": {"requests": devices.iter().map(request).collect::<Vec<_>>()}},
        "status": {"allocation": {"devices":
            {"results": devices.iter().map(result).collect::<Vec<_>>()}}},
    })
}

impl Cluster {
    /// Makes a claim with its status.
    ///
    /// # Errors
    /// What the API says.
    pub async fn resource_claim(&self, claim: &Value) -> Result<Value> {
        let name = claim["metadata"]["name"].as_str().unwrap_or_default();
        self.admin.create(&self.claims(""), claim.clone()).await?;
        self.merge_status(&self.claims(name), json!({"status": claim["status"]})).await
    }

    fn claims(&self, name: &str) -> String {
        let path = format!(
            "/apis/resource.k8s.io/v1/namespaces/{}/resourceclaims/{name}",
            self.namespace()
        );
        path.trim_end_matches('/').to_owned()
    }

    async fn merge_status(&self, path: &str, patch: Value) -> Result<Value> {
        match self.admin.patch(&format!("{path}/status"), MERGE, patch).await {
            (200, answer) => Ok(answer),
            (code, answer) => bail!("patch {path}: {code} {answer}"),
        }
    }

    /// Lets the pod have the claim.
    ///
    /// # Errors
    /// What the API says.
    pub async fn reserve(&self, claim: &str, pod: &Value) -> Result<()> {
        let path = self.claims(claim);
        let before = self.admin.read(&path).await?;
        let mut all = before["status"]["reservedFor"].as_array().cloned().unwrap_or_default();
        let metadata = &pod["metadata"];
        all.push(json!({"resource": "pods", "name": metadata["name"], "uid": metadata["uid"]}));
        self.merge_status(&path, json!({"status": {"reservedFor": all}})).await?;
        Ok(())
    }

    /// Creates a pod that has these claims (its name for each and the object's), and binds it to `node`
    /// once they are reserved for it, as the scheduler does.
    ///
    /// # Errors
    /// What the API says.
    pub async fn pod_with_claims(
        &self,
        node: &Node,
        name: &str,
        mut spec: Value,
        claims: &[(&str, &str)],
    ) -> Result<Value> {
        let named =
            |(name, object): &(&str, &str)| json!({"name": name, "resourceClaimName": object});
        spec["resourceClaims"] = claims.iter().map(named).collect();
        let pod = self.unbound_pod(name, spec).await?;
        for (_, claim) in claims {
            self.reserve(claim, &pod).await?;
        }
        self.bind(node, name).await?;
        Ok(pod)
    }

    /// Creates a pod that no node has.
    ///
    /// # Errors
    /// What the API says.
    pub async fn unbound_pod(&self, name: &str, mut spec: Value) -> Result<Value> {
        fill_image(&mut spec);
        let object = json!({"metadata": {"name": name, "labels": {"app": name}}, "spec": spec});
        self.admin.create(&self.path("pods"), object).await
    }

    /// Tells something in the pod's status that others than its node say.
    ///
    /// # Errors
    /// What the API says.
    pub async fn tell_pod(&self, name: &str, status: Value) -> Result<Value> {
        self.merge_status(&self.path(&format!("pods/{name}")), json!({"status": status})).await
    }

    /// Binds the pod to `node`.
    ///
    /// # Errors
    /// What the API says.
    pub async fn bind(&self, node: &Node, name: &str) -> Result<()> {
        let binding = json!({"apiVersion": "v1", "kind": "Binding", "metadata": {"name": name},
            "target": {"apiVersion": "v1", "kind": "Node", "name": node.name()}});
        self.admin.create(&self.path(&format!("pods/{name}/binding")), binding).await?;
        Ok(())
    }
}
