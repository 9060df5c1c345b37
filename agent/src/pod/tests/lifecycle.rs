use cri_shim::api;

use super::*;
use crate::runtime::fake::Behaviour;

fn state(status: &ContainerStatus) -> &k8s_openapi::api::core::v1::ContainerState {
    status.state.as_ref().unwrap()
}

fn waiting(status: &ContainerStatus) -> Option<String> {
    state(status).waiting.as_ref().and_then(|w| w.reason.clone())
}

#[tokio::test(start_paused = true)]
async fn a_pod_runs_and_goes() {
    let rig = Rig::new().await;
    let pod = named("a", ONE);
    rig.set(&pod).await;
    rig.until_ready("a").await;
    let status = rig.status("a").unwrap();
    assert_eq!(status.phase.as_deref(), Some("Running"));
    assert!(status.pod_ip.unwrap().starts_with("10.88.0."));
    assert_eq!(rig.container("a", "c").container_id.unwrap().split("://").next(), Some("fake"));
    assert_eq!(rig.reasons(), ["Pulled", "Created", "Started"]);
    assert!(rig.handle.alive(Duration::from_secs(1)).await);

    rig.set(&deleted(&pod, 30)).await;
    rig.until("gone", |r| r.gone("a")).await;
    assert_eq!(rig.status("a").unwrap().phase.as_deref(), Some("Failed"));
    assert_eq!(rig.runtime.held(), (0, 0));
    assert!(rig.world.recorded.lock().unwrap().mounted.is_empty());
    assert_eq!(rig.reasons()[3..], ["Killing"]);
    assert!(rig.handle.table().is_empty());
    assert_eq!(std::fs::read_dir(rig.dir.path().join("logs")).unwrap().count(), 0);
    assert_eq!(std::fs::read_dir(rig.dir.path().join("links")).unwrap().count(), 0);
}

/// The answer that says that it runs was on its way when it ended.
#[tokio::test(start_paused = true)]
async fn a_container_that_ends_before_its_start_is_told_has_ended() {
    let rig = Rig::new().await;
    rig.runtime.delay("ContainerStatus", Duration::from_secs(2));
    let once = r#"{"restartPolicy":"Never","containers":[{"name":"c","image":"img:1",
        "imagePullPolicy":"IfNotPresent"}]}"#;
    rig.set(&named("a", once)).await;
    rig.until("running", |r| !r.runtime.running().is_empty()).await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    rig.runtime.exit("c", 0);
    let ended = tokio::time::Instant::now();
    rig.until_phase("a", "Succeeded").await;
    // Not by the next listing.
    assert!(ended.elapsed() < Duration::from_secs(5), "{:?}", ended.elapsed());
}

/// Its own policy, its own failure, and no start before it is there.
#[tokio::test(start_paused = true)]
async fn an_image_volume_is_pulled_before_the_container_that_mounts_it() {
    let rig = Rig::new().await;
    let spec = r#"{"containers":[
        {"name":"c","image":"img:1","imagePullPolicy":"Never","volumeMounts":[{"name":"v","mountPath":"/v"}]},
        {"name":"other","image":"img:1","imagePullPolicy":"Never"}],
        "volumes":[{"name":"v","image":{"reference":"vol:1"}}]}"#;
    rig.set(&named("a", spec)).await;
    let stuck = |r: &Rig| {
        let waits = waiting(&r.container("a", "c"));
        matches!(waits.as_deref(), Some("ErrImagePull" | "ImagePullBackOff"))
    };
    rig.until("stuck", |r| {
        r.status("a").is_some_and(|s| s.container_statuses.is_some()) && stuck(r)
    })
    .await;
    rig.until("the other runs", |r| r.runtime.running().len() == 1).await;
    assert!(rig.events().iter().any(|(_, m)| m.starts_with("Failed to pull image \"vol:1\"")));
    rig.runtime.publish_image("vol:1");
    // The runtime refuses a container whose volume's image it does not have.
    rig.until_ready("a").await;
    assert!(rig.runtime.calls().contains(&"PullImage vol:1".to_owned()));
}

#[tokio::test(start_paused = true)]
async fn a_removed_manifest_ends_its_pod() {
    let rig = Rig::new().await;
    let pod = named("a", ONE);
    rig.set(&pod).await;
    rig.until_ready("a").await;
    rig.send(PodChange::Removed(PodSource::File, PodUid::from("a"))).await;
    // It comes back while it goes.
    rig.set(&pod).await;
    rig.until("gone", |r| r.gone("a")).await;
    rig.until("again", |r| r.runtime.running().len() == 1).await;
}

#[tokio::test(start_paused = true)]
async fn no_pod_has_an_address_before_the_node_has_a_range_of_them() {
    let rig = Rig::new().await;
    rig.network.send_replace(false);
    rig.set(&named("a", ONE)).await;
    rig.set(&named("h", &ONE.replacen('{', r#"{"hostNetwork":true,"#, 1))).await;
    rig.set(&named("b", ONE)).await;
    rig.until_ready("h").await;
    rig.sleep(3).await;
    assert_eq!(rig.runtime.held(), (1, 1));
    // One that waits can go.
    rig.send(PodChange::Removed(PodSource::File, PodUid::from("b"))).await;
    rig.until("gone", |r| r.gone("b")).await;
    rig.network.send_replace(true);
    rig.until_ready("a").await;
    assert_eq!(rig.runtime.held(), (2, 2));
}

#[tokio::test(start_paused = true)]
async fn a_runtime_class_names_the_handler() {
    let rig = Rig::new().await;
    let of_class =
        |class: &str| ONE.replacen('{', &format!(r#"{{"runtimeClassName":"{class}","#), 1);
    rig.set(&named("a", &of_class("sandboxed"))).await;
    rig.until_ready("a").await;
    assert!(rig.runtime.calls().contains(&"RunPodSandbox pod-a 0 kata".to_owned()));
    rig.set(&named("b", &of_class("none"))).await;
    rig.until("told", |r| {
        r.events().iter().any(|(reason, message)| {
            reason == "FailedCreatePodSandBox"
                && message.contains("RuntimeClass \"none\" not found")
        })
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn a_crash_loop_backs_off_and_survives_an_agent_restart() {
    let mut rig = Rig::new().await;
    rig.runtime.behave(
        "c",
        Behaviour { runs_for: Some(Duration::from_secs(1)), exit_code: 3, ..Default::default() },
    );
    let pod = named("a", ONE);
    rig.set(&pod).await;
    rig.until("second crash", |r| {
        r.status("a").is_some_and(|s| {
            s.container_statuses
                .iter()
                .flatten()
                .any(|c| c.restart_count == 1 && waiting(c).as_deref() == Some("CrashLoopBackOff"))
        })
    })
    .await;
    let c = rig.container("a", "c");
    let last = c.last_state.as_ref().unwrap().terminated.as_ref().unwrap();
    assert_eq!((last.exit_code, last.reason.as_deref()), (3, Some("Error")));
    assert_eq!(rig.status("a").unwrap().phase.as_deref(), Some("Running"));
    assert!(rig.events().iter().any(|(r, m)| r == "BackOff"
        && m == "Back-off restarting failed container c in pod pod-a_default(a)"));
    // Half-way through a wait of 10 s.
    rig.sleep(5).await;
    rig.restart(std::slice::from_ref(&pod)).await;
    rig.sleep(4).await;
    assert_eq!(rig.container("a", "c").restart_count, 1);
    rig.until("third start", |r| r.container("a", "c").restart_count == 2).await;
    // At most the one before is kept.
    rig.until("collected", |r| r.runtime.held() == (1, 2)).await;
}

#[tokio::test(start_paused = true)]
async fn init_containers_run_in_order_and_sidecars_beside() {
    let rig = Rig::new().await;
    let short = Behaviour { runs_for: Some(Duration::from_secs(1)), ..Default::default() };
    for name in ["one", "two", "main"] {
        rig.runtime.behave(name, short);
    }
    let image = r#""image":"img:1","imagePullPolicy":"Never""#;
    let pod = named(
        "a",
        &format!(
            r#"{{"restartPolicy":"Never","initContainers":[{{"name":"one",{image}}},
            {{"name":"side","restartPolicy":"Always",{image}}},{{"name":"two",{image}}}],
            "containers":[{{"name":"main",{image}}}]}}"#
        ),
    );
    rig.set(&pod).await;
    rig.until("initializing", |r| {
        r.status("a").is_some_and(|s| condition(&s, "Initialized") == Some("False"))
    })
    .await;
    rig.until_phase("a", "Succeeded").await;
    let created: Vec<String> = rig
        .runtime
        .calls()
        .into_iter()
        .filter_map(|c| c.strip_prefix("CreateContainer ").map(str::to_owned))
        .collect();
    assert_eq!(created, ["one 0", "side 0", "two 0", "main 0"]);
    rig.until("torn down", |r| r.world.recorded.lock().unwrap().mounted.is_empty()).await;
    // Its dead containers stay for their logs until the object goes.
    assert_eq!(rig.runtime.held(), (1, 4));
    assert!(!rig.gone("a"));
    rig.set(&deleted(&pod, 0)).await;
    rig.until("gone", |r| r.gone("a")).await;
    assert_eq!(rig.runtime.held(), (0, 0));
}

#[tokio::test(start_paused = true)]
async fn a_failed_init_container_ends_a_pod_that_never_restarts() {
    let rig = Rig::new().await;
    rig.runtime.behave(
        "setup",
        Behaviour { runs_for: Some(Duration::ZERO), exit_code: 1, ..Default::default() },
    );
    let image = r#""image":"img:1","imagePullPolicy":"Never""#;
    let pod = named(
        "a",
        &format!(
            r#"{{"restartPolicy":"Never","initContainers":[{{"name":"setup",{image}}}],"containers":[{{"name":"main",{image}}}]}}"#
        ),
    );
    rig.set(&pod).await;
    rig.until_phase("a", "Failed").await;
    assert_eq!(rig.runtime.running(), []);
    assert!(!rig.runtime.calls().iter().any(|c| c.starts_with("CreateContainer main")));
}

#[tokio::test(start_paused = true)]
async fn grace_is_kept_and_can_be_shortened() {
    let rig = Rig::new().await;
    rig.runtime.behave("c", Behaviour { ends_in: Duration::from_secs(1000), ..Default::default() });
    let pod = named("a", ONE);
    rig.set(&pod).await;
    rig.until_ready("a").await;
    rig.set(&deleted(&pod, 600)).await;
    rig.sleep(100).await;
    assert!(!rig.gone("a"));
    rig.set(&deleted(&pod, 5)).await;
    rig.sleep(10).await;
    assert!(rig.gone("a"), "{:#?}", rig.runtime.calls());
}

#[tokio::test(start_paused = true)]
async fn an_agent_restart_restarts_nothing_and_flips_nothing() {
    let mut rig = Rig::new().await;
    let pod = named("a", ONE);
    rig.set(&pod).await;
    rig.until_ready("a").await;
    let before = rig.status("a").unwrap();
    let calls = rig.runtime.calls().len();
    // What is saved in the background must be on disk before the kill.
    let saved = rig.dir.path().join("kubelet/longshore/pod-status/a.json");
    rig.until("saved", |_| {
        std::fs::read_to_string(&saved).is_ok_and(|s| s.contains("\"ready\":true"))
    })
    .await;
    rig.sleep(100).await;
    rig.restart(std::slice::from_ref(&pod)).await;
    rig.sleep(100).await;
    assert_eq!(rig.status("a").unwrap(), before);
    assert_eq!(rig.runtime.calls().len(), calls, "{:#?}", rig.runtime.calls());
}

#[tokio::test(start_paused = true)]
async fn starts_given_up_by_two_kills_are_no_restart() {
    let mut rig = Rig::new().await;
    let pod = named("a", ONE);
    let long = Duration::from_secs(3600);
    rig.runtime.delay("StartContainer", long);
    rig.set(&pod).await;
    rig.until("starting", |r| r.runtime.calls().iter().any(|c| c.starts_with("StartContainer")))
        .await;
    // What the runtime had done of it when it was given up.
    let log = rig.dir.path().join("logs/default_pod-a_a/c/0.log");
    std::fs::write(&log, "").unwrap();
    rig.runtime.delay("StartContainer", Duration::ZERO);
    rig.runtime.delay("CreateContainer", long);
    rig.restart(std::slice::from_ref(&pod)).await;
    rig.until("taken away", |r| r.runtime.held().1 == 0).await;
    rig.runtime.delay("CreateContainer", Duration::ZERO);
    rig.restart(std::slice::from_ref(&pod)).await;
    rig.until_ready("a").await;
    assert_eq!(rig.container("a", "c").restart_count, 0);
}

#[tokio::test(start_paused = true)]
async fn what_no_source_names_is_ended() {
    let mut rig = Rig::new().await;
    rig.set(&named("a", ONE)).await;
    rig.set(&named("b", ONE)).await;
    rig.until_ready("a").await;
    rig.until_ready("b").await;
    rig.restart(&[named("b", ONE)]).await;
    rig.until("orphan ended", |r| r.runtime.held() == (1, 1)).await;
    rig.sleep(10).await;
    assert_eq!(rig.runtime.running().len(), 1);
    let mounted = rig.world.recorded.lock().unwrap().mounted.clone();
    assert!(mounted.iter().all(|uid| uid.as_str() == "b"), "{mounted:?}");
}

#[tokio::test(start_paused = true)]
async fn a_lost_sandbox_is_made_anew() {
    for events in [true, false] {
        let rig = Rig::with(events).await;
        rig.set(&named("a", ONE)).await;
        rig.until_ready("a").await;
        let ip = rig.status("a").unwrap().pod_ip;
        rig.sleep(20).await;
        rig.runtime.lose_sandboxes();
        rig.until("new sandbox", |r| r.status("a").is_some_and(|s| is_ready(&s) && s.pod_ip != ip))
            .await;
        assert_eq!(rig.container("a", "c").restart_count, 1);
        assert!(rig.reasons().contains(&"SandboxChanged".to_owned()));
    }
}

#[tokio::test(start_paused = true)]
async fn a_pull_that_fails_backs_off() {
    let rig = Rig::new().await;
    rig.set(&named("a", r#"{"containers":[{"name":"c","image":"other:1"}]}"#)).await;
    let reason = |reason: &'static str| {
        move |r: &Rig| {
            r.status("a").is_some() && waiting(&r.container("a", "c")).as_deref() == Some(reason)
        }
    };
    rig.until("ErrImagePull", reason("ErrImagePull")).await;
    rig.until("ImagePullBackOff", reason("ImagePullBackOff")).await;
    rig.runtime.publish_image("other:1");
    rig.until_ready("a").await;
    let reasons = rig.reasons();
    assert_eq!(reasons[..3], ["Pulling", "Failed", "Failed"], "{reasons:?}");
    rig.set(&named("b", r#"{"containers":[{"name":"c","image":"Bad Name"}]}"#)).await;
    rig.until("bad name", |r| {
        r.status("b").is_some()
            && waiting(&r.container("b", "c")).as_deref() == Some("InvalidImageName")
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn one_failure_holds_up_nobody_else_and_is_overcome() {
    let rig = Rig::new().await;
    rig.runtime.fail_next("RunPodSandbox", "no network");
    rig.set(&named("a", ONE)).await;
    rig.set(&named("b", ONE)).await;
    rig.until_ready("a").await;
    rig.until_ready("b").await;
    assert!(rig.events().contains(&(
        "FailedCreatePodSandBox".into(),
        "Failed to create pod sandbox: no network".into()
    )));
    rig.runtime.fail_next("StartContainer", "no such file");
    rig.set(&named("d", ONE)).await;
    rig.until("RunContainerError", |r| {
        let recorded = r.world.recorded.lock().unwrap();
        recorded.statuses.iter().any(|(uid, s)| {
            uid.as_str() == "d"
                && s.container_statuses
                    .iter()
                    .flatten()
                    .any(|c| waiting(c).as_deref() == Some("RunContainerError"))
        })
    })
    .await;
    rig.until_ready("d").await;
}

#[tokio::test(start_paused = true)]
async fn a_config_map_that_comes_later_lets_the_container_start_at_once() {
    let rig = Rig::new().await;
    rig.set(&named(
        "a",
        r#"{"containers":[{"name":"c","image":"img:1","imagePullPolicy":"Never","envFrom":[{"configMapRef":{"name":"m"}}]}]}"#,
    ))
    .await;
    rig.until("config error", |r| {
        r.status("a").is_some()
            && waiting(&r.container("a", "c")).as_deref() == Some("CreateContainerConfigError")
    })
    .await;
    let map: ConfigMap = serde_json::from_str(r#"{"data":{"K":"v"}}"#).unwrap();
    rig.world.recorded.lock().unwrap().config_maps.insert("m".into(), Arc::new(map));
    let _ = rig.world.objects.send(ObjectRef::ConfigMap(NamespacedName::new("default", "m")));
    let asked = tokio::time::Instant::now();
    rig.until_ready("a").await;
    assert!(asked.elapsed() < Duration::from_secs(1));
    let env = rig.runtime.config_of("c").unwrap().envs;
    assert_eq!((&*env[0].key, &*env[0].value), ("K", &b"v"[..]));
}

#[tokio::test(start_paused = true)]
async fn a_deadline_fails_the_pod() {
    let rig = Rig::new().await;
    let spec = ONE.replacen('{', r#"{"activeDeadlineSeconds":30,"#, 1);
    rig.set(&named("a", &spec)).await;
    rig.until_ready("a").await;
    rig.until_phase("a", "Failed").await;
    let status = rig.status("a").unwrap();
    assert_eq!(status.reason.as_deref(), Some("DeadlineExceeded"));
    rig.until("ended", |r| r.runtime.running().is_empty()).await;
}

#[tokio::test(start_paused = true)]
async fn a_pod_that_asks_for_too_much_is_rejected() {
    let rig = Rig::new().await;
    let spec = r#"{"hostUsers":false,"hostIPC":true,"containers":[{"name":"c","image":"img:1"}]}"#;
    rig.set(&named("a", spec)).await;
    rig.until_phase("a", "Failed").await;
    let status = rig.status("a").unwrap();
    assert_eq!(status.reason.as_deref(), Some("UnsupportedField"));
    assert!(status.message.unwrap().starts_with("Pod was rejected: spec.hostUsers"));
    rig.set(&deleted(&named("a", "{}"), 0)).await;
    rig.until("gone", |r| r.gone("a")).await;
    assert_eq!(rig.runtime.calls(), Vec::<String>::new());
}

/// The ids of the node that container `name` has.
fn range(rig: &Rig, name: &str) -> api::IdMapping {
    let config = rig.runtime.config_of(name).unwrap();
    let security = config.linux.unwrap().security_context.unwrap();
    let userns = security.namespace_options.unwrap().userns_options.unwrap();
    assert_eq!(userns.mode(), api::NamespaceMode::Pod);
    assert_eq!((userns.uids.len(), &userns.uids), (1, &userns.gids));
    assert!(!config.mounts.is_empty());
    assert!(config.mounts.iter().all(|m| m.uid_mappings == userns.uids));
    assert!(config.mounts.iter().all(|m| m.gid_mappings == userns.gids));
    userns.uids[0]
}

#[tokio::test(start_paused = true)]
async fn pods_with_users_of_their_own_have_a_range_each_while_they_run() {
    let mut rig = Rig::new().await;
    let with = |name: &str| {
        let spec = ONE.replacen('{', r#"{"hostUsers":false,"#, 1);
        named(name, &spec.replace(r#""name":"c""#, &format!(r#""name":"{name}""#)))
    };
    let (a, b) = (with("a"), with("b"));
    rig.set(&a).await;
    rig.until_ready("a").await;
    rig.set(&b).await;
    rig.until_ready("b").await;
    let (of_a, of_b) = (range(&rig, "a"), range(&rig, "b"));
    assert_eq!((of_a.container_id, of_a.host_id, of_a.length), (0, 65_536, 65_536));
    assert_eq!(of_b.host_id, 2 * 65_536);

    // Another agent, and a container made anew by it.
    rig.restart(&[a.clone(), b.clone()]).await;
    rig.runtime.exit("a", 1);
    rig.until("again", |r| {
        let again = r.runtime.config_of("a").and_then(|c| c.metadata);
        again.is_some_and(|m| m.attempt == 1)
    })
    .await;
    assert_eq!(range(&rig, "a"), of_a);
    let file = |uid: &str| rig.dir.path().join("kubelet/pods").join(uid).join("userns");
    assert!(file("a").exists() && file("b").exists());
    rig.set(&deleted(&a, 0)).await;
    rig.until("gone", |r| r.gone("a")).await;
    assert!(!file("a").exists() && file("b").exists());
    // An ordinary pod is of the node's users, and says so.
    rig.set(&named("c", ONE)).await;
    rig.until_ready("c").await;
    let config = rig.runtime.config_of("c").unwrap();
    let security = config.linux.unwrap().security_context.unwrap();
    let userns = security.namespace_options.unwrap().userns_options.unwrap();
    assert_eq!((userns.mode(), userns.uids.len()), (api::NamespaceMode::Node, 0));
}

#[tokio::test(start_paused = true)]
async fn a_runtime_that_has_no_user_namespaces_is_not_asked_for_them() {
    let rig = Rig::new().await;
    let spec = ONE.replacen('{', r#"{"hostUsers":false,"runtimeClassName":"sandboxed","#, 1);
    rig.set(&named("a", &spec)).await;
    let said = r#"can't set `spec.hostUsers: false`, RuntimeClass handler "kata" does not support user namespaces"#;
    rig.until("told", |r| r.events().iter().any(|(_, message)| message.contains(said))).await;
    assert_eq!(rig.runtime.held(), (0, 0));
    assert!(!rig.dir.path().join("kubelet/pods/a/userns").exists());
}

#[tokio::test(start_paused = true)]
async fn another_image_restarts_just_that_container() {
    let rig = Rig::new().await;
    rig.runtime.add_image("img:2");
    let two = r#"{"containers":[{"name":"c","image":"img:1","imagePullPolicy":"Never"},{"name":"d","image":"img:1","imagePullPolicy":"Never"}]}"#;
    rig.set(&named("a", two)).await;
    rig.until_ready("a").await;
    rig.set(&named("a", &two.replacen("img:1", "img:2", 1))).await;
    rig.until("restarted", |r| {
        r.status("a").is_some_and(|s| is_ready(&s)) && r.container("a", "c").restart_count == 1
    })
    .await;
    assert_eq!(rig.container("a", "d").restart_count, 0);
}

#[tokio::test(start_paused = true)]
async fn hooks_run_and_a_failed_one_restarts() {
    let rig = Rig::new().await;
    rig.runtime.on_exec("hi", Default::default());
    let hook = |start: &str, stop: &str| {
        format!(
            r#"{{"containers":[{{"name":"c","image":"img:1","imagePullPolicy":"Never","lifecycle":{{"postStart":{{"exec":{{"command":["{start}"]}}}},"preStop":{{{stop}}}}}}}]}}"#
        )
    };
    let pod = named("a", &hook("hi", r#""sleep":{"seconds":7}"#));
    rig.set(&pod).await;
    rig.until_ready("a").await;
    let begun = tokio::time::Instant::now();
    rig.set(&deleted(&pod, 30)).await;
    rig.until("gone", |r| r.gone("a")).await;
    assert!(begun.elapsed() >= Duration::from_secs(7));
    assert!(
        rig.runtime.calls().iter().any(|c| c.starts_with("StopContainer") && c.ends_with(" 23"))
    );

    rig.set(&named("b", &hook("missing", r#""exec":{"command":["hi"]}"#))).await;
    rig.until("hook failed", |r| r.reasons().contains(&"FailedPostStartHook".to_owned())).await;
    rig.until("restarts", |r| r.status("b").is_some() && r.container("b", "c").restart_count > 0)
        .await;
}

#[tokio::test(start_paused = true)]
async fn a_sandbox_that_hangs_does_not_keep_a_deleted_pod() {
    let rig = Rig::new().await;
    rig.runtime.delay("RunPodSandbox", Duration::from_secs(10_000));
    let pod = named("a", ONE);
    rig.set(&pod).await;
    rig.until_phase("a", "Pending").await;
    rig.set(&deleted(&pod, 30)).await;
    let begun = tokio::time::Instant::now();
    rig.until("gone", |r| r.gone("a")).await;
    assert!(begun.elapsed() < Duration::from_secs(10));
}

#[tokio::test(start_paused = true)]
async fn an_init_container_is_resized_while_it_runs() {
    let rig = Rig::new().await;
    let long = Behaviour { runs_for: Some(Duration::from_secs(100)), ..Behaviour::default() };
    rig.runtime.behave("i", long);
    let spec = |cpu: &str, memory: &str| {
        format!(
            r#"{{"initContainers":[{{"name":"i","image":"img:1","imagePullPolicy":"Never","resizePolicy":[{{"resourceName":"memory","restartPolicy":"RestartContainer"}}],"resources":{{"limits":{{"cpu":"{cpu}","memory":"{memory}"}}}}}}],"containers":[{{"name":"c","image":"img:1","imagePullPolicy":"Never"}}]}}"#
        )
    };
    rig.set(&named("a", &spec("1", "64Mi"))).await;
    let runs = |r: &Rig, restarts: i32| {
        r.status("a").is_some() && {
            let i = r.container("a", "i");
            i.state.is_some_and(|s| s.running.is_some()) && i.restart_count == restarts
        }
    };
    rig.until("runs", |r| runs(r, 0)).await;
    rig.set(&named("a", &spec("2", "64Mi"))).await;
    rig.until("resized", |r| {
        r.runtime.calls().iter().any(|c| c.starts_with("UpdateContainerResources"))
    })
    .await;
    assert!(runs(&rig, 0));
    // Not over because it ended on request: it runs again, and only then the next.
    rig.set(&named("a", &spec("2", "128Mi"))).await;
    rig.until("restarted", |r| runs(r, 1)).await;
    assert!(rig.container("a", "c").container_id.is_none());
    rig.until_ready("a").await;
}

#[tokio::test(start_paused = true)]
async fn resources_change_in_place_or_by_a_restart() {
    let rig = Rig::new().await;
    let spec = |cpu: &str, memory: &str| {
        format!(
            r#"{{"containers":[{{"name":"c","image":"img:1","imagePullPolicy":"Never","resizePolicy":[{{"resourceName":"memory","restartPolicy":"RestartContainer"}}],"resources":{{"limits":{{"cpu":"{cpu}","memory":"{memory}"}}}}}}]}}"#
        )
    };
    rig.set(&named("a", &spec("1", "64Mi"))).await;
    rig.until_ready("a").await;
    rig.set(&named("a", &spec("2", "64Mi"))).await;
    rig.until("resized", |r| {
        r.runtime.calls().iter().any(|c| c.starts_with("UpdateContainerResources"))
    })
    .await;
    rig.sleep(60).await;
    assert_eq!(rig.container("a", "c").restart_count, 0);
    rig.set(&named("a", &spec("2", "128Mi"))).await;
    rig.until("restarted", |r| r.container("a", "c").restart_count == 1).await;
}

#[tokio::test(start_paused = true)]
async fn pressure_keeps_out_new_pods_and_no_others() {
    let mut rig = Rig::new().await;
    let runs = named("a", ONE);
    // One that was let in and has nothing in the runtime yet.
    let waits = named("b", &ONE.replace("img:1", "missing:1"));
    rig.set(&runs).await;
    rig.set(&waits).await;
    rig.until_ready("a").await;
    rig.until("b waits", |r| {
        r.status("b").is_some_and(|s| s.container_statuses.is_some())
            && waiting(&r.container("b", "c")).is_some_and(|w| w.contains("Image"))
    })
    .await;
    rig.pressure.send_replace(Pressure { disk: true, ..Pressure::default() });
    // The status goes to disk in a thread of real time.
    let saved = rig.dir.path().join("kubelet/longshore/pod-status/b.json");
    while !saved.exists() {
        std::thread::yield_now();
    }
    rig.restart(&[runs.clone(), waits.clone()]).await;
    let new = named("c", ONE);
    rig.set(&new).await;
    rig.until_phase("c", "Failed").await;
    let status = rig.status("c").unwrap();
    assert_eq!(status.reason.as_deref(), Some("Evicted"));
    let said = "The node had condition: [DiskPressure]. ";
    assert_eq!(status.message, Some(format!("Pod was rejected: {said}")));
    assert!(rig.events().contains(&("Evicted".to_owned(), said.to_owned())), "{:?}", rig.events());
    rig.runtime.publish_image("missing:1");
    rig.until_ready("b").await;
    assert!(is_ready(&rig.status("a").unwrap()));
    rig.pressure.send_replace(Pressure::default());
    rig.set(&named("d", ONE)).await;
    rig.until_ready("d").await;
}

#[tokio::test(start_paused = true)]
async fn a_pod_has_not_failed_before_its_containers_have_ended() {
    let rig = Rig::new().await;
    let slow = Behaviour { ends_in: Duration::from_secs(20), ..Behaviour::default() };
    rig.runtime.behave("c", slow);
    let spec = r#"{"activeDeadlineSeconds":5,"containers":[
        {"name":"c","image":"img:1","imagePullPolicy":"Never"}]}"#;
    rig.set(&named("a", spec)).await;
    rig.until_ready("a").await;
    rig.until("told", |r| r.reasons().contains(&"DeadlineExceeded".to_owned())).await;
    rig.sleep(10).await;
    let ending = rig.status("a").unwrap();
    assert_eq!((ending.phase.as_deref(), ending.reason), (Some("Running"), None));
    rig.until_phase("a", "Failed").await;
    assert!(rig.runtime.running().is_empty());
    assert_eq!(rig.status("a").unwrap().reason.as_deref(), Some("DeadlineExceeded"));
}

#[tokio::test(start_paused = true)]
async fn volumes_are_told_of_a_changed_pod() {
    let rig = Rig::new().await;
    let noted = |note: &str| {
        let mut pod = Pod::clone(&named("a", ONE));
        pod.metadata.annotations = Some([("note".to_owned(), note.to_owned())].into());
        Arc::new(pod)
    };
    rig.set(&noted("one")).await;
    rig.until_ready("a").await;
    rig.set(&noted("two")).await;
    rig.until("told", |r| r.world.recorded.lock().unwrap().shown.contains(&noted("two"))).await;
    // Once they were made as well: it may have changed meanwhile.
    let shown = |r: &Rig| r.world.recorded.lock().unwrap().shown.clone();
    assert_eq!(shown(&rig).first(), Some(&noted("one")));
}

#[tokio::test(start_paused = true)]
async fn what_a_pod_had_is_anothers_as_soon_as_it_has_ended() {
    let rig = Rig::new().await;
    let big = r#"{"restartPolicy":"Never","containers":[{"name":"c","image":"img:1",
        "imagePullPolicy":"Never","resources":{"requests":{"cpu":"3"}}}]}"#;
    rig.set(&named("a", big)).await;
    rig.until_ready("a").await;
    // The network plugin takes its time; the scheduler does not wait for it.
    rig.runtime.delay("StopPodSandbox", Duration::from_secs(3600));
    rig.runtime.exit("c", 0);
    rig.until_phase("a", "Succeeded").await;
    rig.set(&named("b", big)).await;
    rig.until_ready("b").await;
    rig.set(&named("c", big)).await;
    rig.until_phase("c", "Failed").await;
    assert_eq!(rig.status("c").unwrap().reason.as_deref(), Some("OutOfcpu"));
}
