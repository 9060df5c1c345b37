//! Containers move to the CPUs that are theirs as others come and go.

use super::*;
use crate::config::Scope;
use crate::numa::options::Alignment;
use crate::numa::tests::{all_on, on};

fn guaranteed(uid: &str, cpus: u32) -> Arc<Pod> {
    let spec = format!(
        r#"{{"restartPolicy":"Never","containers":[{{"name":"{uid}","image":"img:1","imagePullPolicy":"Never",
            "resources":{{"limits":{{"cpu":"{cpus}","memory":"1Gi"}}}}}}]}}"#
    );
    named(uid, &spec)
}

/// The CPUs that containers were moved to.
fn moves(rig: &Rig) -> Vec<String> {
    let calls = rig.runtime.calls();
    calls.iter().filter_map(|c| Some(c.split_once(" on ")?.1.to_owned())).collect()
}

/// CPUs, memory nodes and CPU quota that the container was made with.
fn made(rig: &Rig, name: &str) -> (String, String, i64) {
    let config = rig.runtime.config_of(name).unwrap();
    let r = config.linux.unwrap().resources.unwrap();
    (r.cpuset_cpus, r.cpuset_mems, r.cpu_quota)
}

#[tokio::test(start_paused = true)]
async fn who_shares_cpus_makes_room_and_gets_it_back() {
    let mut rig = Rig::new().await;
    let folder = tempfile::tempdir().unwrap();
    let config = all_on(Alignment::None, Scope::Container);
    let machine = [1, 1, 4, 1];
    rig.world.recorded.lock().unwrap().numa = Some(on(folder.path(), machine, &config));
    rig.restart(&[]).await;
    let shares = named("s", ONE);
    rig.set(&shares).await;
    rig.until_ready("s").await;
    assert_eq!(made(&rig, "c"), ("0-3".into(), String::new(), 0));
    let alone = guaranteed("a", 2);
    rig.set(&alone).await;
    rig.until_ready("a").await;
    assert_eq!(made(&rig, "a"), ("1-2".into(), "0".into(), -1));
    rig.until("room is made", |r| moves(r) == ["0,3"]).await;
    rig.sleep(60).await;
    assert_eq!(moves(&rig), ["0,3"], "once");

    // More than there is.
    rig.set(&guaranteed("b", 2)).await;
    rig.until_phase("b", "Failed").await;
    let status = rig.status("b").unwrap();
    assert_eq!(status.reason.as_deref(), Some("UnexpectedAdmissionError"));
    let words = "Pod was rejected: Allocate failed due to not enough cpus available to satisfy \
                 request: requested=2, available=1, which is unexpected";
    assert_eq!(status.message.as_deref(), Some(words));

    // What an earlier agent made may run anywhere: it is told once.
    rig.world.recorded.lock().unwrap().numa = Some(on(folder.path(), machine, &config));
    rig.restart(&[shares.clone(), alone.clone()]).await;
    rig.until("told again", |r| moves(r).len() == 3).await;
    let mut again = moves(&rig).split_off(1);
    again.sort();
    assert_eq!(again, ["0,3", "1-2"]);

    rig.runtime.exit("a", 0);
    rig.until_phase("a", "Succeeded").await;
    rig.until("given back", |r| moves(r).len() == 4).await;
    assert_eq!(moves(&rig)[3], "0-3");
}

#[tokio::test(start_paused = true)]
async fn a_pod_with_cpus_of_its_own_is_not_resized() {
    let mut rig = Rig::new().await;
    let folder = tempfile::tempdir().unwrap();
    let config = all_on(Alignment::None, Scope::Container);
    rig.world.recorded.lock().unwrap().numa = Some(on(folder.path(), [1, 1, 4, 1], &config));
    rig.restart(&[]).await;
    rig.set(&guaranteed("a", 1)).await;
    rig.until_ready("a").await;
    rig.set(&guaranteed("a", 2)).await;
    let pending = |r: &Rig| {
        let conditions = r.status("a").and_then(|status| status.conditions).unwrap_or_default();
        conditions.into_iter().find(|c| c.type_ == crate::pod::allocation::PENDING)
    };
    rig.until("told", |r| pending(r).is_some()).await;
    let told = pending(&rig).unwrap();
    assert_eq!(told.reason.as_deref(), Some("Infeasible"));
    let words = "Resize is infeasible for Guaranteed Pods alongside CPU Manager policy \"static\"";
    assert_eq!(told.message.as_deref(), Some(words));
    assert!(rig.reasons().contains(&"ResizeInfeasible".to_owned()));
}
