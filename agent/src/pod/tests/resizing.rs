//! Resizes that wait, fail, and go through; over restarts of the agent.

use k8s_openapi::api::core::v1::PodCondition;

use super::super::PodQuery;
use super::*;
use crate::pod::allocation::{IN_PROGRESS, PENDING};

fn spec(cpu: &str, memory: &str) -> String {
    format!(
        r#"{{"containers":[{{"name":"c","image":"img:1","imagePullPolicy":"Never","resources":{{"requests":{{"cpu":"{cpu}"}},"limits":{{"memory":"{memory}"}}}}}}]}}"#
    )
}

fn asks(uid: &str, cpu: &str, memory: &str, generation: i64) -> Arc<Pod> {
    let mut pod = Pod::clone(&named(uid, &spec(cpu, memory)));
    pod.metadata.generation = Some(generation);
    Arc::new(pod)
}

fn told(rig: &Rig, uid: &str, kind: &str) -> Option<PodCondition> {
    rig.status(uid)?.conditions?.into_iter().find(|c| c.type_ == kind)
}

fn resizes(rig: &Rig) -> usize {
    rig.runtime.calls().iter().filter(|c| c.starts_with("UpdateContainerResources")).count()
}

fn allocated(rig: &Rig, uid: &str) -> String {
    let list = rig.container(uid, "c").allocated_resources.unwrap();
    assert_eq!(rig.status(uid).unwrap().allocated_resources.unwrap()["cpu"], list["cpu"]);
    list["cpu"].0.clone()
}

#[tokio::test(start_paused = true)]
async fn a_resize_waits_until_there_is_room() {
    let mut rig = Rig::new().await;
    let (other, small) = (asks("b", "2", "64Mi", 1), asks("a", "1", "64Mi", 1));
    rig.set(&other).await;
    rig.set(&small).await;
    rig.until_ready("a").await;
    rig.until_ready("b").await;
    assert_eq!(allocated(&rig, "a"), "1");
    let large = asks("a", "3", "64Mi", 2);
    rig.set(&large).await;
    rig.until("pending", |r| told(r, "a", PENDING).is_some()).await;
    let pending = told(&rig, "a", PENDING).unwrap();
    assert_eq!((pending.status.as_str(), pending.reason.as_deref()), ("True", Some("Deferred")));
    assert_eq!(
        pending.message.as_deref(),
        Some("Node didn't have enough resource: cpu, requested: 3000, used: 2000, capacity: 4000")
    );
    assert_eq!(pending.observed_generation, Some(2));
    assert_eq!((allocated(&rig, "a"), resizes(&rig)), ("1".to_owned(), 0));
    assert_eq!(rig.status("a").unwrap().observed_generation, Some(2));

    let query = PodQuery { key: NamespacedName::new("default", "pod-a"), uid: None };
    let why = rig.handle.explain(query, Duration::from_secs(5)).await.unwrap();
    assert!(why.ready, "{why:#?}");
    let [reason] = &why.reasons[..] else { panic!("{why:#?}") };
    assert_eq!(reason.object, "resize");
    assert!(reason.cause.starts_with("Deferred: Node didn't have"), "{}", reason.cause);

    // A restart changes nothing, whichever pod is told first.
    let saved = rig.dir.path().join("kubelet/longshore/pod-status/a.json");
    while !std::fs::read_to_string(&saved).is_ok_and(|text| text.contains(PENDING)) {
        std::thread::yield_now();
    }
    rig.restart(&[large.clone(), other.clone()]).await;
    rig.sleep(400).await;
    assert_eq!(told(&rig, "a", PENDING).as_ref(), Some(&pending));
    assert_eq!((allocated(&rig, "a"), resizes(&rig)), ("1".to_owned(), 0));
    let of = |r: &Rig, reason: &str| r.reasons().iter().filter(|r| *r == reason).count();
    assert_eq!(of(&rig, "ResizeDeferred"), 1);

    // A runtime that does not know the call stops no resize.
    rig.runtime.fail_next("UpdatePodSandboxResources", "not implemented yet");
    rig.set(&deleted(&other, 1)).await;
    rig.until("resized", |r| {
        told(r, "a", PENDING).is_none()
            && told(r, "a", IN_PROGRESS).is_none()
            && allocated(r, "a") == "3"
    })
    .await;
    assert_eq!(resizes(&rig), 1);
    assert_eq!((of(&rig, "ResizeStarted"), of(&rig, "ResizeCompleted")), (1, 1));
    assert_eq!(rig.container("a", "c").restart_count, 0);
    // What nobody asks for any more is not waited for.
    rig.set(&asks("a", "5", "64Mi", 3)).await;
    rig.until("pending", |r| told(r, "a", PENDING).is_some()).await;
    rig.set(&asks("a", "3", "64Mi", 4)).await;
    rig.until("not pending", |r| told(r, "a", PENDING).is_none()).await;
    assert_eq!(resizes(&rig), 1);
}

#[tokio::test(start_paused = true)]
async fn a_resize_that_fails_says_why_and_is_tried_again() {
    let mut rig = Rig::new().await;
    rig.set(&asks("a", "1", "64Mi", 1)).await;
    rig.until_ready("a").await;
    // Less than is in use is not even tried.
    rig.runtime.use_memory("c", 48 << 20);
    let less = asks("a", "1", "32Mi", 2);
    rig.set(&less).await;
    rig.until("an error", |r| told(r, "a", IN_PROGRESS).is_some_and(|c| c.message.is_some())).await;
    let error = told(&rig, "a", IN_PROGRESS).unwrap();
    assert_eq!(error.reason.as_deref(), Some("Error"));
    let message = error.message.unwrap();
    assert!(
        message.contains("container \"c\" memory limit (33554432) below current usage (50331648)"),
        "{message}"
    );
    let memory = |r: &Rig| {
        let resources = r.container("a", "c").resources.unwrap();
        resources.limits.unwrap()["memory"].0.clone()
    };
    assert_eq!((memory(&rig), resizes(&rig)), ("64Mi".to_owned(), 0));

    // In the midst of it, an agent that comes knows only what is to be.
    let saved = rig.dir.path().join("kubelet/longshore/pod-status/a.json");
    while !std::fs::read_to_string(&saved).is_ok_and(|text| text.contains("33554432")) {
        std::thread::yield_now();
    }
    rig.runtime.use_memory("c", 1 << 20);
    rig.runtime.fail_next("UpdateContainerResources", "busy");
    rig.restart(&[less]).await;
    // Nor is one done that the runtime cannot follow.
    rig.runtime.fail_next("UpdatePodSandboxResources", "no more slots");
    rig.until("done", |r| told(r, "a", IN_PROGRESS).is_none() && resizes(r) == 2).await;
    assert_eq!(memory(&rig), "32Mi");
    assert!(rig.reasons().contains(&"ResizeCompleted".to_owned()));
    assert_eq!(rig.container("a", "c").restart_count, 0);
    let told = rig.runtime.calls();
    let told = told.iter().filter(|c| c.starts_with("UpdatePodSandboxResources"));
    assert!(told.clone().count() > 1 && told.into_iter().all(|c| c.ends_with(" 33554432")));
}

#[tokio::test(start_paused = true)]
async fn a_pod_that_starts_meanwhile_gets_what_it_asks_for_in_the_end() {
    let rig = Rig::new().await;
    rig.runtime.delay("StartContainer", Duration::from_secs(5));
    rig.set(&asks("a", "1", "64Mi", 1)).await;
    rig.until("starting", |r| r.runtime.calls().iter().any(|c| c.starts_with("StartContainer")))
        .await;
    rig.set(&asks("a", "1", "128Mi", 2)).await;
    rig.until_ready("a").await;
    rig.until("resized", |r| resizes(r) == 1 && told(r, "a", IN_PROGRESS).is_none()).await;
}
