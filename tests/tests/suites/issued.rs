//! What the cluster's signers give to pods in projected volumes: trust bundles, and certificates of
//! their own.

use std::fs;
use std::path::PathBuf;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use nix::sys::signal::Signal;
use rcgen::{CertificateParams, CertificateSigningRequestParams, Issuer, KeyPair};
use serde_json::{Value, json};
use tests::harness::caller::MERGE;
use tests::harness::{Cluster, Lab, Node, NodeOptions, eventually};

use crate::csi::uid;
use crate::support::{World, idle, with};

const BUNDLES: &str = "/apis/certificates.k8s.io/v1beta1/clustertrustbundles";

/// A member whose agent has the feature gates off, until they are turned on.
async fn world(name: &str) -> World {
    let lab = Lab::new(name).unwrap();
    let cluster = Cluster::new(&lab).await.unwrap();
    let mut node = Node::new(&lab, NodeOptions::default()).await.unwrap();
    cluster.join(&mut node, &[]).await.unwrap();
    World::of(lab, cluster, node)
}

async fn turn_on(world: &mut World) {
    let gates = ["ClusterTrustBundle", "ClusterTrustBundleProjection", "PodCertificateRequest"];
    world
        .node
        .configure(|config| {
            for gate in gates {
                config["featureGates"][gate] = true.into();
            }
        })
        .unwrap();
    world.node.end(Signal::SIGTERM).await;
    world.node.restart().await.unwrap();
    world.node.ready().await;
}

fn projecting(sources: Value) -> Value {
    let mount = json!({"volumeMounts": [{"name": "given", "mountPath": "/given"}]});
    json!({"containers": [with(idle("c"), mount)],
        "volumes": [{"name": "given", "projected": {"sources": sources}}]})
}

fn file(world: &World, pod: &Value, name: &str) -> PathBuf {
    let folder =
        format!("/var/lib/kubelet/pods/{}/volumes/kubernetes.io~projected/given", uid(pod));
    world.node.path(&format!("{folder}/{name}"))
}

async fn holds(world: &World, pod: &Value, name: &str, expected: &str) {
    eventually(&format!("{name} holds what it shall"), async || {
        let found = fs::read_to_string(file(world, pod, name)).map_err(|e| e.to_string())?;
        if found == expected { Ok(()) } else { Err(found) }
    })
    .await;
}

fn anchor() -> String {
    let key = KeyPair::generate().unwrap();
    let pem = CertificateParams::default().self_signed(&key).unwrap().pem();
    pem.replace("\r\n", "\n")
}

async fn bundle(world: &World, name: &str, signer: Option<&str>, text: &str) {
    let object = json!({"metadata": {"name": name, "labels": {"live": "yes"}},
        "spec": {"signerName": signer, "trustBundle": text}});
    world.cluster.admin.create(BUNDLES, object).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn trust_bundles_reach_pods_and_follow_their_objects() {
    let mut world = world("issued-bundles").await;
    let (a, b) = (anchor(), anchor());
    bundle(&world, "test.example:roots:one", Some("test.example/roots"), &format!("one\n{a}{a}"))
        .await;
    let sources = json!([
        {"clusterTrustBundle": {"path": "signer.pem", "signerName": "test.example/roots",
            "labelSelector": {"matchLabels": {"live": "yes"}}}},
        {"clusterTrustBundle": {"path": "name.pem", "name": "roots"}},
        {"clusterTrustBundle": {"path": "none.pem", "name": "none", "optional": true}}]);
    world.cluster.pod(&world.node, "one", projecting(sources)).await.unwrap();
    let told = world.event("one", "FailedMount").await;
    assert!(told.contains("ClusterTrustBundleProjection: true"), "{told}");
    turn_on(&mut world).await;
    eventually("the bundle that is missing is named", async || {
        let events = world.cluster.admin.read(&world.cluster.path("events")).await?;
        let text = events.to_string();
        if text.contains("\\\"roots\\\" not found") { Ok(()) } else { anyhow::bail!("{text}") }
    })
    .await;
    bundle(&world, "roots", None, &b).await;
    let pod = world.cluster.pod_ready("one").await;
    holds(&world, &pod, "signer.pem", &a).await;
    holds(&world, &pod, "name.pem", &b).await;
    holds(&world, &pod, "none.pem", "").await;
    let change = json!({"spec": {"trustBundle": &a}});
    assert_eq!(world.cluster.admin.patch(&format!("{BUNDLES}/roots"), MERGE, change).await.0, 200);
    holds(&world, &pod, "name.pem", &a).await;
    // A restart while the control plane is away changes nothing.
    world.cluster.cut().await;
    world.node.end(Signal::SIGKILL).await;
    world.node.restart().await.unwrap();
    tokio::time::sleep(std::time::Duration::from_secs(2)).await;
    holds(&world, &pod, "name.pem", &a).await;
    world.cluster.restore().unwrap();
    world.node.ready().await;
    let change = json!({"spec": {"trustBundle": &b}});
    assert_eq!(world.cluster.admin.patch(&format!("{BUNDLES}/roots"), MERGE, change).await.0, 200);
    holds(&world, &pod, "name.pem", &b).await;
    let now = world.cluster.read_pod("one").await.unwrap();
    assert_eq!(crate::support::restarts(&now, "c"), 0);
    world.end(&["one"]).await;
}

/// A signer of the test's own.
struct Signer<'a> {
    world: &'a World,
    issuer: Issuer<'static, KeyPair>,
}

impl<'a> Signer<'a> {
    fn new(world: &'a World) -> Self {
        let key = KeyPair::generate().unwrap();
        Self { world, issuer: Issuer::new(CertificateParams::default(), key) }
    }

    fn path(&self) -> String {
        let namespace = self.world.cluster.namespace();
        format!("/apis/certificates.k8s.io/v1beta1/namespaces/{namespace}/podcertificaterequests")
    }

    /// The request of the pod that has no answer yet.
    async fn request(&self, pod: &str) -> Value {
        eventually(&format!("a request of {pod}"), async || {
            let all = self.world.cluster.admin.read(&self.path()).await?;
            let mut open = all["items"].as_array().cloned().unwrap_or_default();
            open.retain(|r| r["spec"]["podName"] == pod && r["status"]["conditions"].is_null());
            if open.len() > 1 {
                anyhow::bail!("more than one: {open:?}");
            }
            open.pop().ok_or_else(|| anyhow::anyhow!("{all}"))
        })
        .await
    }

    async fn answer(&self, request: &Value, mut status: Value, kind: &str) {
        status["conditions"] = json!([{"type": kind, "status": "True", "reason": "Test",
            "message": "as the test says", "lastTransitionTime": jiff::Timestamp::now().to_string()}]);
        let name = request["metadata"]["name"].as_str().unwrap();
        let path = format!("{}/{name}/status", self.path());
        let told = self.world.cluster.admin.patch(&path, MERGE, json!({"status": status})).await;
        assert_eq!(told.0, 200, "{}", told.1);
    }

    /// Issues a certificate that may be renewed so many seconds from now; its chain.
    async fn issue(&self, request: &Value, refresh: i64) -> String {
        let der = STANDARD.decode(request["spec"]["stubPKCS10Request"].as_str().unwrap()).unwrap();
        let mut csr = CertificateSigningRequestParams::from_der(&der.into()).unwrap();
        csr.params.not_after = rcgen::date_time_ymd(2100, 1, 1);
        let chain = csr.signed_by(&self.issuer).unwrap().pem().replace("\r\n", "\n");
        let at = |seconds: i64| {
            (jiff::Timestamp::now() + jiff::SignedDuration::from_secs(seconds)).to_string()
        };
        let status = json!({"certificateChain": chain, "notBefore": at(-3600),
            "beginRefreshAt": at(refresh), "notAfter": at(36_000)});
        self.answer(request, status, "Issued").await;
        chain
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pods_have_certificates_that_are_renewed() {
    let mut world = world("issued-certificates").await;
    turn_on(&mut world).await;
    let sources = |signer: &str| {
        json!([{"podCertificate": {"signerName": signer, "keyType": "ECDSAP256",
            "credentialBundlePath": "bundle.pem", "keyPath": "key.pem",
            "certificateChainPath": "chain.pem", "userAnnotations": {"test.example/a": "b"}}}])
    };
    let spec = projecting(sources("test.example/pods"));
    world.cluster.pod(&world.node, "one", spec).await.unwrap();
    let signer = Signer::new(&world);
    let request = signer.request("one").await;
    let asked = &request["spec"];
    let pod = world.cluster.read_pod("one").await.unwrap();
    assert_eq!(asked["podUID"], pod["metadata"]["uid"]);
    assert_eq!(asked["nodeName"], world.node.name());
    assert_eq!(asked["serviceAccountName"], "default");
    assert_eq!(asked["unverifiedUserAnnotations"], json!({"test.example/a": "b"}));
    let told = world.event("one", "FailedMount").await;
    assert!(told.contains("credential bundle is not issued yet"), "{told}");
    // The pod starts once it is issued; it may be renewed at once.
    let first = signer.issue(&request, -600).await;
    let pod = world.cluster.pod_ready("one").await;
    let read = |name: &str| fs::read_to_string(file(&world, &pod, name)).unwrap();
    assert_eq!(read("chain.pem"), first);
    let key = read("key.pem");
    assert!(key.contains("BEGIN PRIVATE KEY"));
    assert_eq!(read("bundle.pem"), format!("{key}{first}"));
    let request = signer.request("one").await;
    assert_eq!(read("chain.pem"), first, "what was issued serves until the next one is");
    let second = signer.issue(&request, 3600).await;
    holds(&world, &pod, "chain.pem", &second).await;
    let read = |name: &str| fs::read_to_string(file(&world, &pod, name)).unwrap();
    assert_ne!(read("key.pem"), key);

    let spec = projecting(sources("test.example/no"));
    world.cluster.pod(&world.node, "two", spec).await.unwrap();
    let request = signer.request("two").await;
    signer.answer(&request, json!({}), "Denied").await;
    eventually("the pod says that it was denied", async || {
        let events = world.cluster.admin.read(&world.cluster.path("events")).await?;
        let text = events.to_string();
        if text.contains("permanently denied") { Ok(()) } else { anyhow::bail!("{text}") }
    })
    .await;
    world.cluster.delete_pod("two").await.unwrap();

    // After a restart the files are used on, and renewed.
    world.node.end(Signal::SIGKILL).await;
    world.node.restart().await.unwrap();
    world.node.ready().await;
    let signer = Signer::new(&world);
    let request = signer.request("one").await;
    assert_eq!(fs::read_to_string(file(&world, &pod, "chain.pem")).unwrap(), second);
    let third = signer.issue(&request, 3600).await;
    holds(&world, &pod, "chain.pem", &third).await;
    let now = world.cluster.read_pod("one").await.unwrap();
    assert_eq!(crate::support::restarts(&now, "c"), 0);
    world.end(&["one"]).await;
}
