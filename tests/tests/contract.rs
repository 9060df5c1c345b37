//! The contract of the API that the suites rely on, held against the test control plane, and
//! against a real kube-apiserver where `LONGSHORE_TEST_KUBECONFIG` names a cluster-admin
//! kubeconfig: what passes on both is what a node really meets.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stderr,
    reason = "tests: a panic is how they report"
)]

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use kube::config::Kubeconfig;
use serde_json::{Value, json};
use tests::control_plane::serve::Endpoint;
use tests::control_plane::{self, ControlPlane};
use tests::harness::caller::{Caller, JSON_PATCH, MERGE, STRATEGIC};
use tests::harness::eventually;

/// The API under test, with an own namespace in it.
struct Target {
    admin: Caller,
    kubeconfig: Kubeconfig,
    namespace: String,
    /// A Node object that no agent stands behind.
    ghost: String,
    fake: Option<(ControlPlane, Endpoint)>,
}

impl Target {
    async fn new() -> Self {
        let (text, fake) = match std::env::var("LONGSHORE_TEST_KUBECONFIG") {
            Ok(path) => (std::fs::read_to_string(path).unwrap(), None),
            Err(_) => {
                let plane = ControlPlane::new().unwrap();
                let endpoint = plane.serve_loopback(0).unwrap();
                plane.publish(endpoint.address()).unwrap();
                (plane.admin_kubeconfig(endpoint.address()), Some((plane, endpoint)))
            }
        };
        let admin = Caller(control_plane::client(&text).await.unwrap());
        let (code, made) = admin
            .post("/api/v1/namespaces", json!({"metadata": {"generateName": "contract-"}}))
            .await;
        assert_eq!(code, 201, "{made}");
        let namespace = made["metadata"]["name"].as_str().unwrap().to_owned();
        let ghost = format!("{namespace}-ghost");
        let (code, made) = admin.post("/api/v1/nodes", json!({"metadata": {"name": ghost}})).await;
        assert_eq!(code, 201, "{made}");
        let kubeconfig = Kubeconfig::from_yaml(&text).unwrap();
        let target = Self { admin, kubeconfig, namespace, ghost, fake };
        let account = target.path("serviceaccounts/default");
        eventually("the default ServiceAccount is there", async || {
            match target.admin.get(&account).await {
                (200, _) => Ok(()),
                (code, _) => Err(code),
            }
        })
        .await;
        target
    }

    fn path(&self, rest: &str) -> String {
        format!("/api/v1/namespaces/{}/{rest}", self.namespace)
    }

    /// A client of the same server with other credentials.
    async fn caller(&self, user: Value) -> Caller {
        let mut config = serde_json::to_value(&self.kubeconfig).unwrap();
        let context = &config["contexts"][0]["context"];
        config["users"] = json!([{"name": context["user"], "user": user}]);
        Caller(control_plane::client(&config.to_string()).await.unwrap())
    }

    async fn end(self) {
        self.admin.delete(&format!("/api/v1/nodes/{}", self.ghost), Value::Null).await;
        self.admin.delete(&format!("/api/v1/namespaces/{}", self.namespace), Value::Null).await;
        drop(self.fake);
    }

    /// A pod that nobody runs, bound to the ghost or to no node.
    async fn pod(&self, name: &str, bound: bool) -> Value {
        let mut pod = json!({"metadata": {"name": name, "labels": {"app": name}},
            "spec": {"terminationGracePeriodSeconds": 7, "containers": [{"name": "c", "image": "x:1",
                "ports": [{"containerPort": 8080, "name": "http"}]}],
                // Never chosen by a scheduler.
                "nodeSelector": {"no": "where"}}});
        if bound {
            pod["spec"]["nodeName"] = self.ghost.clone().into();
        }
        let (code, pod) = self.admin.post(&self.path("pods"), pod).await;
        assert_eq!(code, 201, "{pod}");
        pod
    }
}

fn version(object: &Value) -> u64 {
    object["metadata"]["resourceVersion"].as_str().unwrap().parse().unwrap()
}

fn types(events: &[Value]) -> Vec<&str> {
    events.iter().map(|e| e["type"].as_str().unwrap()).collect()
}

#[tokio::test]
async fn objects_get_their_identity_and_refusals_their_reason() {
    let t = Target::new().await;
    let maps = t.path("configmaps");
    let (code, a) =
        t.admin.post(&maps, json!({"metadata": {"name": "a"}, "data": {"k": "1"}})).await;
    assert_eq!(code, 201);
    assert_eq!(a["metadata"]["uid"].as_str().unwrap().len(), 36);
    assert!(a["metadata"]["creationTimestamp"].as_str().unwrap().ends_with('Z'));
    assert_eq!((a["kind"].as_str(), a["apiVersion"].as_str()), (Some("ConfigMap"), Some("v1")));
    let (code, generated) = t.admin.post(&maps, json!({"metadata": {"generateName": "g-"}})).await;
    assert_eq!((code, generated["metadata"]["name"].as_str().unwrap().len()), (201, 7));
    for (body, code, reason) in [
        (json!({"metadata": {"name": "a"}}), 409, "AlreadyExists"),
        (json!({"metadata": {"name": "A b"}}), 422, "Invalid"),
        (json!({"metadata": {}}), 422, "Invalid"),
        (json!({"metadata": {"name": "b", "namespace": "other"}}), 400, "BadRequest"),
        (
            json!({"kind": "Secret", "apiVersion": "v1", "metadata": {"name": "b"}}),
            400,
            "BadRequest",
        ),
    ] {
        let (got, status) = t.admin.post(&maps, body.clone()).await;
        assert_eq!((got, status["reason"].as_str()), (code, Some(reason)), "{body} {status}");
        assert_eq!(status["kind"], "Status");
    }
    let versioned = json!({"metadata": {"name": "b", "resourceVersion": "1"}});
    assert_eq!(t.admin.post(&maps, versioned).await.0, 500);
    let (code, status) = t
        .admin
        .post("/api/v1/namespaces/nowhere/configmaps", json!({"metadata": {"name": "a"}}))
        .await;
    assert_eq!((code, status["reason"].as_str()), (404, Some("NotFound")));
    let (code, status) = t.admin.get(&t.path("configmaps/none")).await;
    assert_eq!((code, status["message"].as_str()), (404, Some("configmaps \"none\" not found")));
    assert_eq!(t.admin.get("/api/v1/nonsense").await.0, 404);
    t.end().await;
}

#[tokio::test]
async fn writes_conflict_and_no_ops_make_no_version() {
    let t = Target::new().await;
    let (_, first) = t
        .admin
        .post(&t.path("configmaps"), json!({"metadata": {"name": "a"}, "data": {"k": "1"}}))
        .await;
    let path = t.path("configmaps/a");
    let mut second = first.clone();
    second["data"]["k"] = "2".into();
    let (code, second) = t.admin.put(&path, second).await;
    assert_eq!(code, 200);
    assert!(version(&second) > version(&first));
    let (code, same) = t.admin.put(&path, second.clone()).await;
    assert_eq!((code, version(&same)), (200, version(&second)));
    let (code, status) = t.admin.put(&path, first.clone()).await;
    assert_eq!((code, status["reason"].as_str()), (409, Some("Conflict")));
    assert!(
        status["message"]
            .as_str()
            .unwrap()
            .contains("please apply your changes to the latest version")
    );
    let mut foreign = second.clone();
    foreign["metadata"]["uid"] = "00000000-0000-4000-8000-000000000000".into();
    assert_eq!(t.admin.put(&path, foreign).await.0, 409);
    let mut blind = second.clone();
    blind["metadata"].as_object_mut().unwrap().remove("resourceVersion");
    blind["data"]["k"] = "3".into();
    assert_eq!(t.admin.put(&path, blind).await.0, 200);
    assert_eq!(
        t.admin.put(&t.path("configmaps/none"), json!({"metadata": {"name": "none"}})).await.0,
        404
    );
    t.end().await;
}

#[tokio::test]
async fn patches_merge_as_their_kind_says() {
    let t = Target::new().await;
    let pod = t.pod("p", true).await;
    let (path, status) = (t.path("pods/p"), t.path("pods/p/status"));
    let condition = |kind: &str, value: &str| json!({"type": kind, "status": value});
    let (code, _) = t
        .admin
        .patch(&status, STRATEGIC, json!({"status": {"phase": "Running", "conditions":
            [condition("Ready", "False"), condition("Initialized", "True")],
            "podIPs": [{"ip": "10.0.0.1"}], "podIP": "10.0.0.1",
            "containerStatuses": [{"name": "c", "ready": false, "restartCount": 0, "image": "x:1", "imageID": ""}]}}))
        .await;
    assert_eq!(code, 200);
    let (code, patched) = t
        .admin
        .patch(
            &status,
            STRATEGIC,
            json!({"metadata": {"uid": pod["metadata"]["uid"]},
            "status": {"$setElementOrder/conditions": [{"type": "Ready"}, {"type": "Initialized"}],
                "conditions": [condition("Ready", "True")]}}),
        )
        .await;
    assert_eq!(code, 200, "{patched}");
    let conditions = patched["status"]["conditions"].as_array().unwrap();
    assert_eq!(conditions.len(), 2, "{conditions:?}");
    assert!(conditions.iter().any(|c| c["type"] == "Ready" && c["status"] == "True"));
    let wrong_uid =
        json!({"metadata": {"uid": "00000000-0000-4000-8000-000000000000"}, "status": {}});
    assert_eq!(t.admin.patch(&status, STRATEGIC, wrong_uid).await.0, 422);
    // The object's own path leaves the status alone, and the status's the rest.
    let (_, kept) = t
        .admin
        .patch(
            &path,
            MERGE,
            json!({"metadata": {"labels": {"x": "y"}}, "status": {"phase": "Failed"}}),
        )
        .await;
    assert_eq!(
        (kept["status"]["phase"].as_str(), kept["metadata"]["labels"]["x"].as_str()),
        (Some("Running"), Some("y"))
    );
    let (_, gone) = t.admin.patch(&path, MERGE, json!({"metadata": {"labels": {"x": null}}})).await;
    assert!(gone["metadata"]["labels"]["x"].is_null());
    let (code, _) = t
        .admin
        .patch(
            &path,
            JSON_PATCH,
            json!([{"op": "add", "path": "/metadata/annotations", "value": {"a": "b"}}]),
        )
        .await;
    assert_eq!(code, 200);
    let (code, _) = t.admin.patch(&path, "application/nonsense", json!({})).await;
    assert_eq!(code, 415);
    let (code, refused) = t.admin.patch(&path, MERGE, json!({"spec": {"hostname": "other"}})).await;
    assert_eq!((code, refused["reason"].as_str()), (422, Some("Invalid")));
    t.end().await;
}

#[tokio::test]
async fn lists_page_and_know_their_version() {
    let t = Target::new().await;
    let maps = t.path("configmaps");
    for name in ["a", "b", "c"] {
        t.admin.post(&maps, json!({"metadata": {"name": name, "labels": {"own": "yes"}}})).await;
    }
    let own = format!("{maps}?labelSelector=own%3Dyes");
    let names = |list: &Value| -> Vec<String> {
        list["items"]
            .as_array()
            .unwrap()
            .iter()
            .map(|o| o["metadata"]["name"].as_str().unwrap().to_owned())
            .collect()
    };
    let (_, all) = t.admin.get(&own).await;
    assert_eq!(names(&all), ["a", "b", "c"]);
    assert_eq!(all["kind"], "ConfigMapList");
    let (_, page) = t.admin.get(&format!("{own}&limit=2")).await;
    assert_eq!(names(&page), ["a", "b"]);
    t.admin.delete(&t.path("configmaps/c"), Value::Null).await;
    let token = page["metadata"]["continue"].as_str().unwrap();
    let (_, rest) = t.admin.get(&format!("{own}&limit=2&continue={token}")).await;
    assert_eq!(names(&rest), ["c"], "a continued list shows its first page's version");
    let at = version(&all);
    let (_, exact) =
        t.admin.get(&format!("{own}&resourceVersion={at}&resourceVersionMatch=Exact")).await;
    assert_eq!(names(&exact), ["a", "b", "c"]);
    let (_, newer) =
        t.admin.get(&format!("{own}&resourceVersion={at}&resourceVersionMatch=NotOlderThan")).await;
    assert!(version(&newer) >= at);
    let (_, one) = t.admin.get(&format!("{maps}?fieldSelector=metadata.name%3Da")).await;
    assert_eq!(names(&one), ["a"]);
    for (query, code) in [
        ("resourceVersion=nonsense", 400),
        ("labelSelector=a%20b", 400),
        ("resourceVersionMatch=Exact", 422),
        ("resourceVersion=0&resourceVersionMatch=Exact", 422),
        ("resourceVersion=1&resourceVersionMatch=Nonsense", 422),
        ("continue=nonsense", 400),
        ("resourceVersion=99999999999", 504),
    ] {
        let (got, status) = t.admin.get(&format!("{maps}?{query}")).await;
        assert_eq!(got, code, "{query} {status}");
    }
    t.end().await;
}

#[tokio::test]
async fn watches_tell_every_change_once_and_selectors_decide_what_it_was() {
    let t = Target::new().await;
    let maps = t.path("configmaps");
    let (_, start) = t.admin.get(&maps).await;
    let at = version(&start);
    let labels = |value: &str| json!({"metadata": {"labels": {"show": value}}});
    t.admin.post(&maps, json!({"metadata": {"name": "a", "labels": {"show": "no"}}})).await;
    t.admin.patch(&t.path("configmaps/a"), MERGE, labels("yes")).await;
    t.admin.patch(&t.path("configmaps/a"), MERGE, json!({"data": {"k": "v"}})).await;
    t.admin.patch(&t.path("configmaps/a"), MERGE, labels("no")).await;
    t.admin.delete(&t.path("configmaps/a"), Value::Null).await;
    let all = t
        .admin
        .watch(
            &format!("{maps}?watch=1&resourceVersion={at}&fieldSelector=metadata.name%3Da"),
            |e| e.len() >= 5,
        )
        .await;
    assert_eq!(types(&all), ["ADDED", "MODIFIED", "MODIFIED", "MODIFIED", "DELETED"]);
    let versions: Vec<u64> = all.iter().map(|e| version(&e["object"])).collect();
    assert!(versions.is_sorted_by(|a, b| a < b), "{versions:?}");
    let shown = t
        .admin
        .watch(&format!("{maps}?watch=1&resourceVersion={at}&labelSelector=show%3Dyes"), |e| {
            e.len() >= 3
        })
        .await;
    assert_eq!(types(&shown), ["ADDED", "MODIFIED", "DELETED"]);
    assert_eq!(shown[2]["object"]["metadata"]["labels"]["show"], "yes");
    t.end().await;
}

#[tokio::test]
async fn watches_can_begin_with_the_list() {
    let t = Target::new().await;
    let maps = t.path("configmaps");
    t.admin.post(&maps, json!({"metadata": {"name": "a", "labels": {"own": "yes"}}})).await;
    let own = format!("{maps}?watch=1&labelSelector=own%3Dyes");
    let legacy = t.admin.watch(&format!("{own}&resourceVersion=0"), |e| !e.is_empty()).await;
    assert_eq!(types(&legacy), ["ADDED"]);
    let streamed = t
        .admin
        .watch(&format!("{own}&sendInitialEvents=true&resourceVersionMatch=NotOlderThan&allowWatchBookmarks=true"), |e| e.len() >= 2)
        .await;
    if streamed[0]["object"]["message"].as_str().is_some_and(|m| m.contains("RequestWatchProgress"))
    {
        // An etcd before 3.4.25 behind a real server: clients fall back to list and watch.
        return t.end().await;
    }
    assert_eq!(types(&streamed), ["ADDED", "BOOKMARK"], "{streamed:?}");
    assert_eq!(
        streamed[1]["object"]["metadata"]["annotations"]["k8s.io/initial-events-end"],
        "true"
    );
    assert!(version(&streamed[1]["object"]) >= version(&streamed[0]["object"]));
    for query in [
        "sendInitialEvents=true&allowWatchBookmarks=true",
        "sendInitialEvents=true&resourceVersionMatch=NotOlderThan",
        "resourceVersionMatch=NotOlderThan&resourceVersion=1",
    ] {
        let (code, status) = t.admin.get(&format!("{own}&{query}")).await;
        assert_eq!((code, status["reason"].as_str()), (422, Some("Invalid")), "{query}");
    }
    t.end().await;
}

#[tokio::test]
async fn a_compacted_version_is_an_error_event() {
    let t = Target::new().await;
    // A real server compacts when it pleases.
    let Some((plane, _)) = &t.fake else { return t.end().await };
    plane.compact();
    let events = t
        .admin
        .watch(&format!("{}?watch=1&resourceVersion=1", t.path("pods")), |e| !e.is_empty())
        .await;
    assert_eq!(types(&events), ["ERROR"]);
    assert_eq!(
        (events[0]["object"]["code"].as_u64(), events[0]["object"]["reason"].as_str()),
        (Some(410), Some("Expired"))
    );
    t.end().await;
}

#[tokio::test]
async fn pods_are_deleted_with_grace() {
    let t = Target::new().await;
    let pod = t.pod("bound", true).await;
    assert_eq!(pod["metadata"]["generation"], 1);
    let path = t.path("pods/bound");
    let other = json!({"preconditions": {"uid": "00000000-0000-4000-8000-000000000000"}});
    assert_eq!(t.admin.delete(&path, other).await.0, 409);
    let (code, deleting) = t.admin.delete(&path, Value::Null).await;
    assert_eq!((code, deleting["kind"].as_str()), (200, Some("Pod")));
    assert_eq!(deleting["metadata"]["deletionGracePeriodSeconds"], 7);
    assert_eq!(deleting["metadata"]["generation"], 2);
    let (_, again) = t.admin.delete(&path, json!({"gracePeriodSeconds": 20})).await;
    assert_eq!(
        again["metadata"]["deletionGracePeriodSeconds"], 7,
        "a grace period only gets shorter"
    );
    let (_, shorter) = t.admin.delete(&path, json!({"gracePeriodSeconds": 3})).await;
    assert_eq!(shorter["metadata"]["deletionGracePeriodSeconds"], 3);
    let last = json!({"gracePeriodSeconds": 0, "preconditions": {"uid": pod["metadata"]["uid"]}});
    assert_eq!(t.admin.delete(&path, last).await.0, 200);
    assert_eq!(t.admin.get(&path).await.0, 404);
    t.pod("free", false).await;
    assert_eq!(t.admin.delete(&t.path("pods/free"), Value::Null).await.0, 200);
    assert_eq!(t.admin.get(&t.path("pods/free")).await.0, 404, "no node runs it");
    t.pod("done", true).await;
    t.admin
        .patch(&t.path("pods/done/status"), MERGE, json!({"status": {"phase": "Succeeded"}}))
        .await;
    t.admin.delete(&t.path("pods/done"), Value::Null).await;
    assert_eq!(t.admin.get(&t.path("pods/done")).await.0, 404, "it has ended");
    t.end().await;
}

#[tokio::test]
async fn finalizers_hold_an_object() {
    let t = Target::new().await;
    let maps = t.path("configmaps");
    t.admin.post(&maps, json!({"metadata": {"name": "a", "finalizers": ["test/x"]}})).await;
    let path = t.path("configmaps/a");
    assert_eq!(t.admin.delete(&path, Value::Null).await.0, 200);
    let (_, held) = t.admin.get(&path).await;
    assert!(held["metadata"]["deletionTimestamp"].is_string());
    t.admin.patch(&path, MERGE, json!({"metadata": {"finalizers": null}})).await;
    assert_eq!(t.admin.get(&path).await.0, 404);
    t.end().await;
}

#[tokio::test]
async fn pods_are_defaulted_and_given_a_token() {
    let t = Target::new().await;
    let pod = json!({"metadata": {"name": "p"}, "spec": {"nodeName": t.ghost,
        "volumes": [{"name": "v"}, {"name": "c", "configMap": {"name": "x"}}, {"name": "h", "hostPath": {"path": "/x"}}],
        "containers": [{"name": "c", "image": "x", "livenessProbe": {"httpGet": {"port": 80}},
            "resources": {"limits": {"cpu": "1"}}, "ports": [{"containerPort": 1}],
            "env": [{"name": "N", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}}]}]}});
    let (code, pod) = t.admin.post(&t.path("pods"), pod).await;
    assert_eq!(code, 201, "{pod}");
    let spec = &pod["spec"];
    let volumes = spec["volumes"].as_array().unwrap();
    assert_eq!(volumes[0]["emptyDir"], json!({}));
    assert_eq!(volumes[1]["configMap"], json!({"name": "x", "defaultMode": 420}));
    assert_eq!(volumes[2]["hostPath"], json!({"path": "/x", "type": ""}));
    assert!(volumes[3]["name"].as_str().unwrap().starts_with("kube-api-access-"));
    assert_eq!(volumes[3]["projected"]["defaultMode"], 420);
    // Some distributions add optional bundles of their own.
    assert_eq!(
        volumes[3]["projected"]["sources"].as_array().unwrap()[..3],
        [
            json!({"serviceAccountToken": {"expirationSeconds": 3607, "path": "token"}}),
            json!({"configMap": {"name": "kube-root-ca.crt", "items": [{"key": "ca.crt", "path": "ca.crt"}]}}),
            json!({"downwardAPI": {"items": [{"path": "namespace", "fieldRef": {"apiVersion": "v1", "fieldPath": "metadata.namespace"}}]}})
        ]
    );
    let mut container = spec["containers"][0].clone();
    assert_eq!(
        container["volumeMounts"][0]["mountPath"],
        "/var/run/secrets/kubernetes.io/serviceaccount"
    );
    container["volumeMounts"].take();
    assert_eq!(
        container,
        json!({"name": "c", "image": "x", "imagePullPolicy": "Always", "volumeMounts": null,
        "terminationMessagePath": "/dev/termination-log", "terminationMessagePolicy": "File",
        "resources": {"limits": {"cpu": "1"}, "requests": {"cpu": "1"}},
        "ports": [{"containerPort": 1, "protocol": "TCP"}],
        "env": [{"name": "N", "valueFrom": {"fieldRef": {"apiVersion": "v1", "fieldPath": "spec.nodeName"}}}],
        "livenessProbe": {"httpGet": {"path": "/", "port": 80, "scheme": "HTTP"}, "timeoutSeconds": 1,
            "periodSeconds": 10, "successThreshold": 1, "failureThreshold": 3}})
    );
    for (field, value) in [
        ("restartPolicy", json!("Always")),
        ("dnsPolicy", json!("ClusterFirst")),
        ("serviceAccountName", json!("default")),
        ("terminationGracePeriodSeconds", json!(30)),
        ("securityContext", json!({})),
        ("enableServiceLinks", json!(true)),
    ] {
        assert_eq!(spec[field], value, "{field}");
    }
    assert_eq!(
        (pod["status"]["phase"].as_str(), pod["status"]["qosClass"].as_str()),
        (Some("Pending"), Some("Burstable"))
    );
    for bad in [
        json!([]),
        json!([{"name": "c"}]),
        json!([{"image": "x"}]),
        json!([{"name": "c", "image": "x"}, {"name": "c", "image": "y"}]),
    ] {
        let (code, status) = t
            .admin
            .post(&t.path("pods"), json!({"metadata": {"name": "q"}, "spec": {"containers": bad}}))
            .await;
        assert_eq!((code, status["reason"].as_str()), (422, Some("Invalid")), "{status}");
    }
    t.end().await;
}

#[tokio::test]
async fn services_get_addresses_and_endpoints() {
    let t = Target::new().await;
    let services = t.path("services");
    let service = json!({"metadata": {"name": "s"}, "spec": {"type": "NodePort", "selector": {"app": "p"},
        "ports": [{"port": 80, "targetPort": "http"}]}});
    let (code, made) = t.admin.post(&services, service).await;
    assert_eq!(code, 201, "{made}");
    let ip = made["spec"]["clusterIP"].as_str().unwrap().to_owned();
    assert_eq!(made["spec"]["clusterIPs"][0], ip.as_str());
    let node_port = made["spec"]["ports"][0]["nodePort"].as_u64().unwrap();
    assert!((30000..=32767).contains(&node_port));
    assert_eq!(made["spec"]["externalTrafficPolicy"], "Cluster");
    for spec in [
        json!({"clusterIP": ip, "ports": [{"port": 1}]}),
        json!({"ports": [{"port": 0}]}),
        json!({"ports": [{"port": 70000}]}),
        json!({"ports": [{"port": 1}, {"port": 2}]}),
        json!({"type": "NodePort", "ports": [{"port": 1, "nodePort": node_port}]}),
        json!({"type": "NodePort", "ports": [{"port": 1, "nodePort": 80}]}),
        json!({"ports": []}),
    ] {
        let (code, status) =
            t.admin.post(&services, json!({"metadata": {"name": "bad"}, "spec": spec})).await;
        assert_eq!((code, status["reason"].as_str()), (422, Some("Invalid")), "{spec} {status}");
    }
    t.pod("p", true).await;
    let slices = format!(
        "/apis/discovery.k8s.io/v1/namespaces/{}/endpointslices?labelSelector=kubernetes.io%2Fservice-name%3Ds",
        t.namespace
    );
    for (ready, expected) in [("False", false), ("True", true)] {
        t.admin
            .patch(
                &t.path("pods/p/status"),
                STRATEGIC,
                json!({"status": {"phase": "Running", "podIP": "10.1.2.3",
            "podIPs": [{"ip": "10.1.2.3"}], "conditions": [{"type": "Ready", "status": ready}]}}),
            )
            .await;
        eventually("the pod is an endpoint", async || {
            let (_, list) = t.admin.get(&slices).await;
            let items = list["items"].as_array().unwrap();
            let found = items.iter().find_map(|s| Some((s, s["endpoints"].as_array()?.first()?)));
            let Some((slice, endpoint)) = found else { return Err(list) };
            let good = endpoint["conditions"]["ready"] == expected
                && endpoint["addresses"] == json!(["10.1.2.3"])
                && endpoint["nodeName"] == t.ghost.as_str()
                && slice["ports"][0]["port"] == 8080
                && slice["addressType"] == "IPv4";
            if good { Ok(()) } else { Err(list) }
        })
        .await;
    }
    t.end().await;
}

#[tokio::test]
async fn tokens_are_bound_to_pods() {
    let t = Target::new().await;
    let pod = t.pod("p", true).await;
    let path = t.path("serviceaccounts/default/token");
    let request = |uid: &Value| {
        json!({"spec": {"audiences": ["a"], "expirationSeconds": 3607,
        "boundObjectRef": {"kind": "Pod", "apiVersion": "v1", "name": "p", "uid": uid}}})
    };
    let (code, made) = t.admin.post(&path, request(&pod["metadata"]["uid"])).await;
    assert_eq!(code, 201, "{made}");
    assert_eq!(made["status"]["token"].as_str().unwrap().split('.').count(), 3);
    assert!(made["status"]["expirationTimestamp"].is_string());
    assert_eq!(
        t.admin.post(&path, request(&json!("00000000-0000-4000-8000-000000000000"))).await.0,
        409
    );
    assert_eq!(t.admin.post(&path, json!({"spec": {"expirationSeconds": 10}})).await.0, 422);
    assert_eq!(
        t.admin.post(&t.path("serviceaccounts/none/token"), json!({"spec": {}})).await.0,
        404
    );
    // A token with the server's own audience is who it says.
    let (_, own) = t.admin.post(&path, json!({"spec": {}})).await;
    let caller = t.caller(json!({"token": own["status"]["token"]})).await;
    let (code, refused) = caller.get(&t.path("secrets")).await;
    assert_eq!(code, 403);
    assert!(
        refused["message"]
            .as_str()
            .unwrap()
            .contains(&format!("system:serviceaccount:{}:default", t.namespace))
    );
    t.end().await;
}

#[tokio::test]
async fn pods_are_bound_and_evicted() {
    let t = Target::new().await;
    t.pod("p", false).await;
    let binding = json!({"metadata": {"name": "p"}, "target": {"kind": "Node", "name": t.ghost}});
    assert_eq!(t.admin.post(&t.path("pods/p/binding"), binding.clone()).await.0, 201);
    assert_eq!(t.admin.get(&t.path("pods/p")).await.1["spec"]["nodeName"], t.ghost.as_str());
    assert_eq!(t.admin.post(&t.path("pods/p/binding"), binding).await.0, 409);
    let eviction =
        json!({"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": "p"}});
    assert_eq!(t.admin.post(&t.path("pods/p/eviction"), eviction).await.0, 201);
    assert!(t.admin.get(&t.path("pods/p")).await.1["metadata"]["deletionTimestamp"].is_string());
    t.end().await;
}

#[tokio::test]
async fn strangers_read_cluster_info_and_nothing_else() {
    let t = Target::new().await;
    let anonymous = t.caller(json!({})).await;
    let (code, info) =
        anonymous.get("/api/v1/namespaces/kube-public/configmaps/cluster-info").await;
    assert_eq!(code, 200, "{info}");
    assert!(info["data"]["kubeconfig"].as_str().unwrap().contains("certificate-authority-data"));
    for path in ["/api/v1/namespaces/kube-public/configmaps", "/api/v1/nodes", "/apis"] {
        let (code, refused) = anonymous.get(path).await;
        assert_eq!((code, refused["reason"].as_str()), (403, Some("Forbidden")), "{path}");
    }
    assert_eq!(anonymous.get("/version").await.0, 200);
    let liar = t.caller(json!({"token": "abcdef.0123456789abcdef"})).await;
    assert_eq!(liar.get("/version").await.0, 401);
    t.end().await;
}

/// A bootstrap token made as kubeadm makes one.
async fn bootstrap_token(t: &Target, expiration: &str) -> (String, String) {
    let random = |n: usize| -> String {
        (0..n).map(|_| fastrand::alphanumeric().to_ascii_lowercase()).collect()
    };
    let (id, secret) = (random(6), random(16));
    let (code, made) = t.admin.post("/api/v1/namespaces/kube-system/secrets", json!({
        "metadata": {"name": format!("bootstrap-token-{id}")}, "type": "bootstrap.kubernetes.io/token",
        "stringData": {"token-id": id, "token-secret": secret, "expiration": expiration,
            "usage-bootstrap-authentication": "true", "usage-bootstrap-signing": "true",
            "auth-extra-groups": "system:bootstrappers:kubeadm:default-node-token"}})).await;
    assert_eq!(code, 201, "{made}");
    (id.clone(), format!("{id}.{secret}"))
}

#[tokio::test]
async fn bootstrap_tokens_sign_cluster_info_and_ask_for_certificates() {
    let t = Target::new().await;
    let (id, token) = bootstrap_token(&t, "2099-01-01T00:00:00Z").await;
    let jws = eventually("cluster-info is signed", async || {
        let (_, info) = t.admin.get("/api/v1/namespaces/kube-public/configmaps/cluster-info").await;
        info["data"][format!("jws-kubeconfig-{id}")]
            .as_str()
            .map(str::to_owned)
            .ok_or(info["data"].to_string())
    })
    .await;
    assert_eq!(jws.split("..").count(), 2);
    let joining = t.caller(json!({"token": token})).await;
    assert_eq!(joining.get(&t.path("secrets")).await.0, 403);
    assert_eq!(joining.get("/api/v1/pods").await.0, 403);
    let node = format!("contract-{id}");
    let (code, request) =
        joining.post("/apis/certificates.k8s.io/v1/certificatesigningrequests", csr(&node).0).await;
    assert_eq!(code, 201, "{request}");
    assert_eq!(request["spec"]["username"], format!("system:bootstrap:{id}"));
    let name = request["metadata"]["name"].as_str().unwrap();
    let path = format!("/apis/certificates.k8s.io/v1/certificatesigningrequests/{name}");
    eventually("kubeadm's bindings approve it and the signer signs", async || {
        let (code, now) = joining.get(&path).await;
        assert_eq!(code, 200);
        if now["status"]["certificate"].is_string() { Ok(()) } else { Err(now) }
    })
    .await;
    t.admin.delete(&path, Value::Null).await;
    let secret = format!("/api/v1/namespaces/kube-system/secrets/bootstrap-token-{id}");
    t.admin.delete(&secret, Value::Null).await;
    // A real server may remember for some seconds that it was good.
    eventually("a token that is gone is refused", async || match joining.get("/version").await {
        (401, _) => Ok(()),
        (code, _) => Err(code),
    })
    .await;
    t.end().await;
}

/// A CSR object for a node's client certificate, and its key.
fn csr(node: &str) -> (Value, String) {
    let key = rcgen::KeyPair::generate().unwrap();
    let mut params = rcgen::CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(rcgen::DnType::OrganizationName, "system:nodes");
    params.distinguished_name.push(rcgen::DnType::CommonName, format!("system:node:{node}"));
    let pem = params.serialize_request(&key).unwrap().pem().unwrap();
    let object = json!({"metadata": {"generateName": "node-csr-"}, "spec": {"request": STANDARD.encode(pem),
        "signerName": "kubernetes.io/kube-apiserver-client-kubelet", "usages": ["digital signature", "client auth"]}});
    (object, key.serialize_pem())
}

#[tokio::test]
async fn a_node_reads_only_what_its_pods_use() {
    let t = Target::new().await;
    let node_name = format!("{}-node", t.namespace);
    let (object, key) = csr(&node_name);
    let base = "/apis/certificates.k8s.io/v1/certificatesigningrequests";
    let (_, request) = t.admin.post(base, object).await;
    let path = format!("{base}/{}", request["metadata"]["name"].as_str().unwrap());
    eventually("the request is approved, whoever else writes to it", async || {
        let (_, mut approved) = t.admin.get(&path).await;
        approved["status"]["conditions"] =
            json!([{"type": "Approved", "status": "True", "reason": "Test", "message": ""}]);
        match t.admin.put(&format!("{path}/approval"), approved).await {
            (200, _) => Ok(()),
            (_, status) => Err(status),
        }
    })
    .await;
    let certificate = eventually("the request is signed", async || {
        let (_, now) = t.admin.get(&path).await;
        now["status"]["certificate"].as_str().map(str::to_owned).ok_or(now)
    })
    .await;
    t.admin.delete(&path, Value::Null).await;
    let node = t.caller(json!({"client-certificate-data": certificate, "client-key-data": STANDARD.encode(key)})).await;

    let (code, made) = node.post("/api/v1/nodes", json!({"metadata": {"name": node_name, "labels": {"kubernetes.io/hostname": node_name}}})).await;
    assert_eq!(code, 201, "{made}");
    let own = format!("/api/v1/nodes/{node_name}");
    assert_eq!(node.get(&own).await.0, 200);
    assert_eq!(
        node.patch(
            &format!("{own}/status"),
            STRATEGIC,
            json!({"status": {"conditions": [{"type": "Ready", "status": "False"}]}})
        )
        .await
        .0,
        200
    );
    assert_eq!(node.get("/api/v1/nodes").await.0, 403);
    assert_eq!(node.post("/api/v1/nodes", json!({"metadata": {"name": "another"}})).await.0, 403);
    let label = json!({"metadata": {"labels": {"node-restriction.kubernetes.io/x": "y"}}});
    assert_eq!(node.patch(&own, STRATEGIC, label).await.0, 403);

    for name in ["used", "other"] {
        t.admin.post(&t.path("secrets"), json!({"metadata": {"name": name}})).await;
    }
    let pod = json!({"metadata": {"name": "p"}, "spec": {"nodeName": node_name,
        "volumes": [{"name": "s", "secret": {"secretName": "used"}}], "containers": [{"name": "c", "image": "x:1"}]}});
    let (code, pod) = t.admin.post(&t.path("pods"), pod).await;
    assert_eq!(code, 201, "{pod}");
    eventually("the pod's secret may be read", async || {
        match node.get(&t.path("secrets/used")).await {
            (200, _) => Ok(()),
            (_, status) => Err(status),
        }
    })
    .await;
    let (code, refused) = node.get(&t.path("secrets/other")).await;
    assert_eq!(code, 403);
    assert!(
        refused["message"].as_str().unwrap().contains("no relationship found between node"),
        "{refused}"
    );
    assert_eq!(
        node.get(&format!("{}?fieldSelector=metadata.name%3Dused", t.path("secrets"))).await.0,
        200
    );
    assert_eq!(node.get(&t.path("secrets")).await.0, 403);
    assert_eq!(node.get("/api/v1/pods").await.0, 403);
    let (code, mine) =
        node.get(&format!("/api/v1/pods?fieldSelector=spec.nodeName%3D{node_name}")).await;
    assert_eq!((code, mine["items"].as_array().unwrap().len()), (200, 1));
    assert_eq!(node.get("/api/v1/services").await.0, 200);
    let slices = "/apis/discovery.k8s.io/v1/endpointslices?limit=1";
    let open = node.get(slices).await.0;
    // Unless `longshore cluster-setup` was applied to this cluster.
    assert!(open == 403 || t.fake.is_none(), "{open}");

    let status = |phase: &str| json!({"status": {"phase": phase}});
    assert_eq!(node.patch(&t.path("pods/p/status"), STRATEGIC, status("Running")).await.0, 200);
    t.pod("foreign", true).await;
    assert_eq!(
        node.patch(&t.path("pods/foreign/status"), STRATEGIC, status("Running")).await.0,
        403
    );
    let plain = json!({"metadata": {"name": "q"}, "spec": {"nodeName": node_name, "containers": [{"name": "c", "image": "x"}]}});
    assert_eq!(node.post(&t.path("pods"), plain.clone()).await.0, 403);
    let mut mirror = plain;
    mirror["metadata"]["annotations"] = json!({"kubernetes.io/config.mirror": "h", "kubernetes.io/config.hash": "h", "kubernetes.io/config.source": "file"});
    mirror["metadata"]["ownerReferences"] = json!([{"apiVersion": "v1", "kind": "Node", "name": node_name,
        "uid": made["metadata"]["uid"], "controller": true}]);
    let (code, mirrored) = node.post(&t.path("pods"), mirror).await;
    assert_eq!(code, 201, "{mirrored}");
    assert!(mirrored["spec"]["volumes"].is_null(), "a mirror pod gets no token");
    let token = |pod: &Value| {
        json!({"spec": {"boundObjectRef": {"kind": "Pod", "apiVersion": "v1",
        "name": pod["metadata"]["name"], "uid": pod["metadata"]["uid"]}}})
    };
    assert_eq!(node.post(&t.path("serviceaccounts/default/token"), token(&pod)).await.0, 201);
    assert_eq!(
        node.post(&t.path("serviceaccounts/default/token"), json!({"spec": {}})).await.0,
        403
    );
    let leases = "/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases";
    let lease =
        |name: &str| json!({"metadata": {"name": name}, "spec": {"holderIdentity": node_name}});
    assert_eq!(node.post(leases, lease(&node_name)).await.0, 201);
    assert_eq!(node.get(&format!("{leases}/other")).await.0, 403);
    let done = json!({"gracePeriodSeconds": 0});
    assert_eq!(node.delete(&t.path("pods/foreign"), done.clone()).await.0, 403);
    assert_eq!(node.delete(&t.path("pods/p"), done).await.0, 200);
    t.admin.delete(&own, Value::Null).await;
    t.admin.delete(&format!("{leases}/{node_name}"), Value::Null).await;
    t.end().await;
}
