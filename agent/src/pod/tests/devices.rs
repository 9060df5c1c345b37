//! Devices come before all else, and go when nothing of the pod runs.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use k8s_openapi::api::core::v1::ResourceStatus;

use super::*;
use crate::device::{DeviceError, PodDevices, RunOptions, Statuses};
use crate::numa::hints::Hints;

const DEV: &str = "example.com/dev";
const USES: &str = r#"{"restartPolicy":"Never","containers":[{"name":"c","image":"img:1",
    "imagePullPolicy":"Never","resources":{"limits":{"example.com/dev":"1"},
    "requests":{"example.com/dev":"1"}}}]}"#;

/// Two devices, which are given without asking which.
#[derive(Default)]
pub(super) struct Given {
    fails: bool,
    hangs: bool,
    asked: Vec<PodUid>,
    has: HashSet<PodUid>,
    sick: bool,
    news: Option<broadcast::Sender<PodUid>>,
}

#[async_trait]
impl PodDevices for World {
    fn allocatable(&self, _: &PodUid, resource: &str) -> Option<i64> {
        (resource == DEV).then_some(2)
    }

    async fn allocate(&self, pod: &Pod) -> Result<(), DeviceError> {
        let (uid, hangs) = {
            let given = &mut self.recorded.lock().unwrap().devices;
            let uid = PodUid::of(pod);
            given.asked.push(uid.clone());
            if given.fails {
                return Err(DeviceError::NoneHealthy(DEV.into()));
            }
            (uid, given.hangs)
        };
        if hangs {
            std::future::pending::<()>().await;
        }
        self.recorded.lock().unwrap().devices.has.insert(uid);
        Ok(())
    }

    async fn allocate_container(&self, pod: &Pod, _: &Container) -> Result<(), DeviceError> {
        self.allocate(pod).await
    }

    fn hints(&self, _: &Pod, _: Option<&Container>, _: &BTreeSet<u32>) -> Hints {
        Hints::new()
    }

    async fn run_options(&self, pod: &Pod, c: &Container) -> Result<RunOptions, DeviceError> {
        let envs = crate::device::wanted(pod, c).into_keys().map(|name| (name.into(), "1".into()));
        Ok(RunOptions { envs: envs.collect(), ..RunOptions::default() })
    }

    fn release(&self, uid: &PodUid) {
        self.recorded.lock().unwrap().devices.has.remove(uid);
    }

    fn retain(&self, pods: &HashSet<PodUid>) {
        self.recorded.lock().unwrap().devices.has.retain(|uid| pods.contains(uid));
    }

    fn statuses(&self, uid: &PodUid) -> Statuses {
        let given = &self.recorded.lock().unwrap().devices;
        let name = if given.sick { "sick" } else { "well" };
        let status = ResourceStatus { name: name.into(), resources: None };
        if !given.has.contains(uid) {
            return Statuses::default();
        }
        BTreeMap::from([("c".to_owned(), vec![status])])
    }

    fn news(&self) -> broadcast::Receiver<PodUid> {
        let given = &mut self.recorded.lock().unwrap().devices;
        given.news.get_or_insert_with(|| broadcast::Sender::new(8)).subscribe()
    }
}

fn given<T>(rig: &Rig, of: impl FnOnce(&mut Given) -> T) -> T {
    of(&mut rig.world.recorded.lock().unwrap().devices)
}

#[tokio::test(start_paused = true)]
async fn without_its_devices_a_pod_fails_and_nothing_is_made() {
    let rig = Rig::new().await;
    given(&rig, |given| given.fails = true);
    rig.set(&named("a", USES)).await;
    rig.until_phase("a", "Failed").await;
    let status = rig.status("a").unwrap();
    assert_eq!(status.reason.as_deref(), Some("UnexpectedAdmissionError"));
    let message = status.message.unwrap();
    let words = "Pod was rejected: Allocate failed due to no healthy devices present; cannot \
                 allocate unhealthy devices example.com/dev, which is unexpected";
    assert_eq!(message, words);
    assert!(!rig.runtime.calls().iter().any(|c| c.starts_with("RunPodSandbox")));
    // A pod without devices is not asked for any.
    rig.set(&named("b", ONE)).await;
    rig.until_ready("b").await;
    assert_eq!(given(&rig, |given| given.asked.len()), 1);
}

#[tokio::test(start_paused = true)]
async fn a_pod_that_waits_for_devices_can_be_deleted() {
    let rig = Rig::new().await;
    given(&rig, |given| given.hangs = true);
    let pod = named("a", USES);
    rig.set(&pod).await;
    rig.until("asked", |r| given(r, |given| given.asked.len() == 1)).await;
    rig.set(&named("b", ONE)).await;
    rig.until_ready("b").await;
    rig.set(&deleted(&pod, 30)).await;
    rig.until("gone", |r| r.gone("a")).await;
    given(&rig, |given| given.hangs = false);
    rig.set(&named("c", USES)).await;
    rig.until_ready("c").await;
}

#[tokio::test(start_paused = true)]
async fn more_than_there_are_is_refused_until_a_pod_is_over() {
    let rig = Rig::new().await;
    for uid in ["a", "b"] {
        rig.set(&named(uid, USES)).await;
        rig.until_ready(uid).await;
    }
    rig.set(&named("c", USES)).await;
    rig.until_phase("c", "Failed").await;
    assert_eq!(rig.status("c").unwrap().reason.as_deref(), Some("OutOfexample.com/dev"));
    rig.runtime.exit("c", 0);
    rig.until("one is over", |r| given(r, |given| given.has.len() < 2)).await;
    rig.set(&named("d", USES)).await;
    rig.until_ready("d").await;
}

#[tokio::test(start_paused = true)]
async fn a_restart_asks_nobody_for_pods_that_are_there_and_health_is_told() {
    let mut rig = Rig::new().await;
    let pod = named("a", USES);
    rig.set(&pod).await;
    rig.until_ready("a").await;
    given(&rig, |given| {
        given.fails = true;
        given.has.insert(PodUid::from("of-nobody"));
    });
    rig.restart(std::slice::from_ref(&pod)).await;
    rig.until("synced", |r| r.handle.table().health().synced).await;
    rig.sleep(5).await;
    rig.until_ready("a").await;
    assert_eq!(given(&rig, |given| given.asked.len()), 1);
    assert_eq!(given(&rig, |given| given.has.len()), 1);
    let told = |r: &Rig| r.container("a", "c").allocated_resources_status.unwrap()[0].name.clone();
    assert_eq!(told(&rig), "well");
    let news = given(&rig, |given| {
        given.sick = true;
        given.news.clone().unwrap()
    });
    news.send(PodUid::from("a")).unwrap();
    rig.until("the news are told", |r| told(r) == "sick").await;
    // What it had stays told when it is over.
    rig.runtime.exit("c", 0);
    rig.until_phase("a", "Succeeded").await;
    assert_eq!(told(&rig), "sick");
    assert!(given(&rig, |given| given.has.is_empty()));
}
