//! Volumes on the real kernel, as root, in a mount namespace of each test's own.

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use base64::Engine as _;
use k8s_openapi::api::authentication::v1::{TokenRequestSpec, TokenRequestStatus};
use k8s_openapi::api::core::v1::{ConfigMap, Node, Pod, Secret, Service};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use tokio::sync::broadcast;

use super::mounts::mounts_below;
use super::{NodeVolumes, Volumes, run_refresh};
use crate::ids::{NamespacedName, PodUid};
use crate::node_context::NodeContext;
use crate::objects::{ObjectError, ObjectRef, Objects};

/// Objects that the test holds in its hand.
struct Held {
    config_maps: Mutex<HashMap<NamespacedName, Arc<ConfigMap>>>,
    secrets: Mutex<HashMap<NamespacedName, Arc<Secret>>>,
    tokens: AtomicUsize,
    token_life: Mutex<Option<i64>>,
    changes: broadcast::Sender<ObjectRef>,
}

#[async_trait]
impl Objects for Held {
    async fn config_map(
        &self,
        key: &NamespacedName,
    ) -> Result<Option<Arc<ConfigMap>>, ObjectError> {
        Ok(self.config_maps.lock().unwrap().get(key).cloned())
    }

    async fn secret(&self, key: &NamespacedName) -> Result<Option<Arc<Secret>>, ObjectError> {
        Ok(self.secrets.lock().unwrap().get(key).cloned())
    }

    async fn service_account_token(
        &self,
        key: &NamespacedName,
        spec: TokenRequestSpec,
    ) -> Result<TokenRequestStatus, ObjectError> {
        assert_eq!(spec.bound_object_ref.and_then(|bound| bound.uid).as_deref(), Some("uid-1"));
        let Some(life) = *self.token_life.lock().unwrap() else {
            let cause = "connection refused".into();
            let key = key.clone();
            return Err(ObjectError::Unavailable { kind: "ServiceAccount token", key, cause });
        };
        let number = self.tokens.fetch_add(1, Ordering::SeqCst);
        let now = jiff::Timestamp::now().as_second();
        let claims = format!(r#"{{"iat":{now},"exp":{},"n":{number}}}"#, now + life);
        let encoded = base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(claims);
        let expires = jiff::Timestamp::from_second(now + life).unwrap();
        Ok(TokenRequestStatus {
            token: Some(format!("h.{encoded}.s")),
            expiration_timestamp: Some(k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(
                expires,
            )),
        })
    }

    fn services(&self, _: &str) -> Vec<Arc<Service>> {
        Vec::new()
    }

    fn node(&self) -> Option<Arc<Node>> {
        None
    }

    fn retain(&self, _: &Pod) {}

    fn release(&self, _: &PodUid) {}

    fn changes(&self) -> broadcast::Receiver<ObjectRef> {
        self.changes.subscribe()
    }
}

impl Held {
    fn set_config_map(&self, name: &str, data: &[(&str, &str)]) {
        let key = NamespacedName::new("ns", name);
        let data = data.iter().map(|(k, v)| ((*k).into(), (*v).into())).collect();
        let map = ConfigMap { data: Some(data), ..Default::default() };
        self.config_maps.lock().unwrap().insert(key.clone(), Arc::new(map));
        let _ = self.changes.send(ObjectRef::ConfigMap(key));
    }
}

struct Bench {
    _root: tempfile::TempDir,
    root: PathBuf,
    objects: Arc<Held>,
    volumes: Arc<NodeVolumes>,
}

impl Bench {
    fn pod_dir(&self) -> PathBuf {
        self.root.join("pods/uid-1")
    }

    fn volume(&self, plugin: &str, name: &str) -> PathBuf {
        self.pod_dir().join("volumes").join(format!("kubernetes.io~{plugin}")).join(name)
    }

    /// As after a restart of the agent.
    fn restarted(&self) -> Arc<NodeVolumes> {
        let node = NodeContext { root_dir: self.root.clone(), ..NodeContext::new("n", vec![]) };
        NodeVolumes::new(Arc::new(node), self.objects.clone(), None)
    }
}

/// Runs `test` in a mount namespace that nobody else sees.
fn in_namespace<F: Future<Output = ()>>(test: impl FnOnce(Bench) -> F) {
    unshare(CloneFlags::CLONE_NEWNS).expect("these tests need root (CAP_SYS_ADMIN)");
    let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    mount(None::<&str>, "/", None::<&str>, private, None::<&str>).unwrap();
    let root = tempfile::tempdir().unwrap();
    let objects = Arc::new(Held {
        config_maps: Mutex::default(),
        secrets: Mutex::default(),
        tokens: AtomicUsize::new(0),
        token_life: Mutex::new(Some(3600)),
        changes: broadcast::channel(16).0,
    });
    let path = root.path().join("kubelet");
    let node = NodeContext { root_dir: path.clone(), ..NodeContext::new("n", vec![]) };
    let volumes = NodeVolumes::new(Arc::new(node), objects.clone(), None);
    // Built here: its threads inherit this thread's namespace.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(test(Bench { _root: root, root: path, objects, volumes }));
}

fn pod(spec: serde_json::Value) -> Arc<Pod> {
    let pod = serde_json::json!({
        "metadata": {"name": "p", "namespace": "ns", "uid": "uid-1", "labels": {"app": "x"}},
        "spec": spec,
    });
    Arc::new(serde_json::from_value(pod).unwrap())
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().mode() & 0o7777
}

#[test]
fn every_kind_is_put_in_place_found_again_and_taken_away() {
    in_namespace(|bench| async move {
        bench.objects.set_config_map("conf", &[("a", "1"), ("b", "2")]);
        let secret = Secret {
            data: Some([("k".into(), k8s_openapi::ByteString(b"s3".to_vec()))].into()),
            ..Default::default()
        };
        let key = NamespacedName::new("ns", "sec");
        bench.objects.secrets.lock().unwrap().insert(key, Arc::new(secret));
        let host = bench.root.join("host");
        let pod = pod(serde_json::json!({
            "serviceAccountName": "sa",
            "securityContext": {"fsGroup": 4242},
            "containers": [{"name": "c", "image": "i"}],
            "volumes": [
                {"name": "disk", "emptyDir": {}},
                {"name": "mem", "emptyDir": {"medium": "Memory", "sizeLimit": "1Mi"}},
                {"name": "host", "hostPath": {"path": host, "type": "DirectoryOrCreate"}},
                {"name": "conf", "configMap": {"name": "conf", "items": [{"key": "b", "path": "x/y", "mode": 0o400}]}},
                {"name": "sec", "secret": {"secretName": "sec", "defaultMode": 0o600}},
                {"name": "down", "downwardAPI": {"items": [{"path": "labels", "fieldRef": {"fieldPath": "metadata.labels"}}]}},
                {"name": "api", "projected": {"sources": [
                    {"serviceAccountToken": {"path": "token"}},
                    {"configMap": {"name": "conf", "items": [{"key": "a", "path": "ca.crt"}]}},
                    {"downwardAPI": {"items": [{"path": "namespace", "fieldRef": {"fieldPath": "metadata.namespace"}}]}},
                ]}},
            ],
        }));
        bench.volumes.mount(&pod).await.unwrap();
        let disk = bench.volume("empty-dir", "disk");
        assert_eq!((mode(&disk), fs::metadata(&disk).unwrap().gid()), (0o2777, 4242));
        let mem = bench.volume("empty-dir", "mem");
        assert!(fs::write(mem.join("big"), vec![0; 2 << 20]).is_err(), "the size limit holds");
        fs::remove_file(mem.join("big")).unwrap();
        assert!(host.is_dir());
        let file = bench.volume("configmap", "conf").join("x/y");
        assert_eq!(fs::read_to_string(&file).unwrap(), "2");
        assert_eq!((mode(&file), fs::metadata(&file).unwrap().gid()), (0o440, 4242));
        let file = bench.volume("secret", "sec").join("k");
        assert_eq!((fs::read_to_string(&file).unwrap().as_str(), mode(&file)), ("s3", 0o640));
        let file = bench.volume("downward-api", "down").join("labels");
        assert_eq!(fs::read_to_string(file).unwrap(), "app=\"x\"");
        let api = bench.volume("projected", "api");
        assert_eq!(fs::read_to_string(api.join("ca.crt")).unwrap(), "1");
        assert_eq!(fs::read_to_string(api.join("namespace")).unwrap(), "ns");
        assert_eq!(mode(&api.join("token")), 0o640);
        assert_eq!(mounts_below(&bench.pod_dir()).unwrap().len(), 4);

        // Once more, by a new agent: what containers wrote stays, the token too, nothing doubles.
        fs::write(disk.join("kept"), "x").unwrap();
        fs::write(mem.join("kept"), "x").unwrap();
        let token = fs::read(api.join("token")).unwrap();
        *bench.objects.token_life.lock().unwrap() = None;
        let again = bench.restarted();
        assert_eq!(again.on_disk().await.unwrap(), [PodUid::from("uid-1")]);
        again.mount(&pod).await.unwrap();
        assert!(disk.join("kept").exists() && mem.join("kept").exists());
        assert_eq!(fs::read(api.join("token")).unwrap(), token);
        assert_eq!(mounts_below(&bench.pod_dir()).unwrap().len(), 4);

        // A stray mount of a driver goes with the pod; what it shows does not.
        let stray = disk.join("stray");
        fs::create_dir(&stray).unwrap();
        fs::write(host.join("precious"), "x").unwrap();
        mount(Some(&host), &stray, None::<&str>, MsFlags::MS_BIND, None::<&str>).unwrap();
        let uid = PodUid::from("uid-1");
        again.unmount(&uid).await.unwrap();
        assert!(!bench.pod_dir().exists());
        assert!(mounts_below(&bench.root).unwrap().is_empty());
        assert!(host.join("precious").exists());
        again.unmount(&uid).await.unwrap();
        assert!(again.on_disk().await.unwrap().is_empty());
    });
}

#[test]
fn a_changed_config_map_shows_and_tokens_are_renewed() {
    in_namespace(|bench| async move {
        bench.objects.set_config_map("conf", &[("a", "1")]);
        *bench.objects.token_life.lock().unwrap() = Some(2);
        let pod = pod(serde_json::json!({
            "containers": [],
            "volumes": [
                {"name": "conf", "configMap": {"name": "conf"}},
                {"name": "api", "projected": {"sources": [{"serviceAccountToken": {"path": "token"}}]}},
            ],
        }));
        bench.volumes.mount(&pod).await.unwrap();
        let token = bench.volume("projected", "api").join("token");
        let first = fs::read(&token).unwrap();
        let (stop, stopped) = tokio::sync::watch::channel(false);
        let refresh = tokio::spawn(run_refresh(bench.volumes.clone(), stopped));
        tokio::task::yield_now().await;
        bench.objects.set_config_map("conf", &[("a", "2"), ("b", "3")]);
        let conf = bench.volume("configmap", "conf");
        let deadline = tokio::time::Instant::now() + Duration::from_secs(20);
        while !conf.join("b").exists() || fs::read(&token).unwrap() == first {
            assert!(tokio::time::Instant::now() < deadline, "not refreshed");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        assert_eq!(fs::read_to_string(conf.join("a")).unwrap(), "2");
        stop.send(true).unwrap();
        refresh.await.unwrap();
        bench.volumes.unmount(&PodUid::from("uid-1")).await.unwrap();
    });
}

#[test]
fn a_changed_pod_shows_in_its_downward_api_volumes() {
    in_namespace(|bench| async move {
        let described = |note: &str, cpu: &str| {
            let mut pod = Pod::clone(&pod(serde_json::json!({
                "containers": [{"name": "c", "resources": {"limits": {"cpu": cpu}}}],
                "volumes": [
                    {"name": "down", "downwardAPI": {"items": [
                        {"path": "notes", "fieldRef": {"fieldPath": "metadata.annotations"}},
                        {"path": "cpu", "resourceFieldRef": {"containerName": "c", "resource": "limits.cpu"}},
                    ]}},
                    {"name": "api", "projected": {"sources": [{"downwardAPI": {"items": [
                        {"path": "notes", "fieldRef": {"fieldPath": "metadata.annotations"}},
                    ]}}]}},
                ],
            })));
            pod.metadata.annotations = Some([("note".to_owned(), note.to_owned())].into());
            Arc::new(pod)
        };
        let first = described("one", "1");
        // Of a pod that has no volumes yet there is nothing to show.
        bench.volumes.pod_changed(&first);
        bench.volumes.mount(&first).await.unwrap();
        let (stop, stopped) = tokio::sync::watch::channel(false);
        let refresh = tokio::spawn(run_refresh(bench.volumes.clone(), stopped));
        let (down, api) = (bench.volume("downward-api", "down"), bench.volume("projected", "api"));
        let read = |path: PathBuf| fs::read_to_string(path).unwrap();
        for (note, cpu) in [("two", "1"), ("three", "3"), ("three", "4")] {
            bench.volumes.pod_changed(&described(note, cpu));
            let expected = format!("note=\"{note}\"");
            let deadline = tokio::time::Instant::now() + Duration::from_secs(20);
            while read(down.join("notes")) != expected
                || read(api.join("notes")) != expected
                || read(down.join("cpu")) != cpu
            {
                assert!(tokio::time::Instant::now() < deadline, "not shown: {note} {cpu}");
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
        assert_eq!(bench.volumes.next_due(), None, "nothing is left to do");
        stop.send(true).unwrap();
        refresh.await.unwrap();
        bench.volumes.unmount(&PodUid::from("uid-1")).await.unwrap();
    });
}

#[test]
fn an_image_is_mounted_by_the_runtime() {
    in_namespace(|bench| async move {
        let with = |image: serde_json::Value| {
            pod(serde_json::json!({
                "containers": [{
                    "name": "c",
                    "env": [{"name": "POD", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}}],
                    "volumeMounts": [
                        {"name": "v", "mountPath": "/all"},
                        {"name": "v", "mountPath": "part", "subPathExpr": "$(POD)/x"},
                    ],
                }],
                "volumes": [{"name": "v", "image": image}],
            }))
        };
        let good = with(serde_json::json!({"reference": "vol:1", "pullPolicy": "Never"}));
        bench.volumes.mount(&good).await.unwrap();
        let container = good.spec.as_ref().unwrap().containers[0].clone();
        let made = bench.volumes.container_mounts(&good, &container, 0).await.unwrap();
        let shown: Vec<_> = made
            .iter()
            .map(|m| {
                let image = m.image.as_ref().unwrap();
                assert!(m.readonly && m.host_path.is_empty() && image.image.is_empty());
                assert_eq!(image.user_specified_image, "vol:1");
                (m.container_path.as_str(), m.image_sub_path.as_str())
            })
            .collect();
        assert_eq!(shown, [("/all", ""), ("/part", "p/x")]);
        bench.volumes.unmount(&PodUid::from("uid-1")).await.unwrap();
        let nameless = with(serde_json::json!({}));
        let refused = bench.volumes.mount(&nameless).await.unwrap_err();
        assert!(refused.to_string().contains("names no image"), "{refused}");
    });
}

#[test]
fn sub_paths_stay_in_their_volume() {
    in_namespace(|bench| async move {
        let mounts = |paths: &[(&str, &str)]| -> serde_json::Value {
            let mounts = paths.iter().enumerate().map(|(i, (field, path))| {
                serde_json::json!({"name": "v", "mountPath": format!("/m{i}"), *field: path})
            });
            mounts.collect::<Vec<_>>().into()
        };
        let with = |paths: &[(&str, &str)]| {
            pod(serde_json::json!({
                "containers": [{
                    "name": "c",
                    "env": [{"name": "POD", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}}],
                    "volumeMounts": mounts(paths),
                }],
                "volumes": [{"name": "v", "emptyDir": {}}],
            }))
        };
        let good = with(&[
            ("subPath", "made/deep"),
            ("subPath", "file"),
            ("subPath", "in/file"),
            ("subPathExpr", "$(POD)/x"),
        ]);
        bench.volumes.mount(&good).await.unwrap();
        let volume = bench.volume("empty-dir", "v");
        fs::write(volume.join("file"), "inside").unwrap();
        symlink(".", volume.join("in")).unwrap();
        symlink("/etc", volume.join("out")).unwrap();
        symlink("../../../../..", volume.join("up")).unwrap();
        let container = |pod: &Pod| pod.spec.as_ref().unwrap().containers[0].clone();
        let made = bench.volumes.container_mounts(&good, &container(&good), 0).await.unwrap();
        let sources: Vec<_> = made.iter().map(|m| PathBuf::from(&m.host_path)).collect();
        assert!(volume.join("made/deep").is_dir() && volume.join("p/x").is_dir());
        fs::write(sources[0].join("through"), "x").unwrap();
        assert!(volume.join("made/deep/through").exists());
        assert_eq!(fs::read_to_string(&sources[1]).unwrap(), "inside");
        assert_eq!(fs::read_to_string(&sources[2]).unwrap(), "inside");
        // A new attempt uses what is bound, and binds anew what was replaced.
        fs::remove_file(volume.join("file")).unwrap();
        fs::create_dir(volume.join("file")).unwrap();
        let again = bench.volumes.container_mounts(&good, &container(&good), 1).await.unwrap();
        assert_eq!(again.len(), 4);
        assert!(sources[1].is_dir());
        assert_eq!(mounts_below(&bench.pod_dir()).unwrap().len(), 4);
        for path in ["out/passwd", "out", "up", "up/etc", "../x", "out/new"] {
            let bad = with(&[("subPath", path)]);
            let result = bench.volumes.container_mounts(&bad, &container(&bad), 0).await;
            assert!(result.is_err(), "{path} was mounted");
        }
        let bad = with(&[("subPathExpr", "$(NONE)")]);
        assert!(bench.volumes.container_mounts(&bad, &container(&bad), 0).await.is_err());
        bench.volumes.unmount(&PodUid::from("uid-1")).await.unwrap();
        assert!(mounts_below(&bench.root).unwrap().is_empty());
    });
}

#[test]
fn what_cannot_be_had_is_refused_by_name() {
    in_namespace(|bench| async move {
        for (volume, expected) in [
            (
                serde_json::json!({"name": "v", "fc": {"lun": 1}}),
                "unimplemented: volume \"v\" is of kind fc",
            ),
            (
                serde_json::json!({"name": "v", "persistentVolumeClaim": {"claimName": "c"}}),
                "a PersistentVolumeClaim needs a control plane",
            ),
            (
                serde_json::json!({"name": "v", "csi": {"driver": "d"}}),
                "a CSI volume needs a control plane",
            ),
            (
                serde_json::json!({"name": "v", "configMap": {"name": "none"}}),
                "configmap \"none\" not found",
            ),
            (
                serde_json::json!({"name": "v", "secret": {"secretName": "none"}}),
                "secret \"none\" not found",
            ),
            (
                serde_json::json!({"name": "v", "projected": {"sources": [{"clusterTrustBundle": {"path": "p", "name": "n"}}]}}),
                "featureGates: {ClusterTrustBundle: true",
            ),
            (
                serde_json::json!({"name": "v", "hostPath": {"path": "/nonexistent", "type": "File"}}),
                "hostPath type check failed",
            ),
        ] {
            let mount = serde_json::json!([{"name": "v", "mountPath": "/v"}]);
            let containers = serde_json::json!([{"name": "c", "volumeMounts": mount}]);
            let pod = pod(serde_json::json!({"containers": containers, "volumes": [volume]}));
            let error = bench.volumes.mount(&pod).await.unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
        let mut evil = Pod::clone(&pod(serde_json::json!({"containers": []})));
        evil.metadata.uid = Some("../../etc".into());
        assert!(bench.volumes.mount(&Arc::new(evil)).await.is_err());
        assert!(bench.volumes.unmount(&PodUid::from("..")).await.is_err());
    });
}
