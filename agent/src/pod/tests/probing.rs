use super::*;
use crate::runtime::ExecOutput;

fn exec(code: i32) -> ExecOutput {
    ExecOutput { exit_code: code, stdout: b"said".to_vec(), stderr: Vec::new() }
}

fn probed(probes: &str) -> Arc<Pod> {
    named(
        "a",
        &format!(
            r#"{{"terminationGracePeriodSeconds":3,"containers":[{{"name":"c","image":"img:1","imagePullPolicy":"Never",{probes}}}]}}"#
        ),
    )
}

#[tokio::test(start_paused = true)]
async fn readiness_follows_its_probe() {
    let mut rig = Rig::new().await;
    rig.runtime.on_exec("ready", exec(1));
    let pod = probed(
        r#""readinessProbe":{"exec":{"command":["ready"]},"periodSeconds":2,"failureThreshold":2,"successThreshold":2}"#,
    );
    rig.set(&pod).await;
    rig.until_phase("a", "Running").await;
    rig.sleep(10).await;
    assert!(!is_ready(&rig.status("a").unwrap()));
    assert!(
        rig.events().contains(&("Unhealthy".into(), "Readiness probe failed: said".into())),
        "{:?}",
        rig.events()
    );
    rig.runtime.on_exec("ready", exec(0));
    rig.until_ready("a").await;
    let saved = rig.dir.path().join("kubelet/longshore/pod-status/a.json");
    rig.until("saved", |_| {
        std::fs::read_to_string(&saved).is_ok_and(|s| s.contains("\"ready\":true"))
    })
    .await;
    // A restart of the agent leaves it ready, without asking first. The file takes real time, in which
    // the paused clock runs through many probes.
    rig.runtime.on_exec("ready", exec(1));
    let told = rig.world.recorded.lock().unwrap().statuses.len();
    rig.restart(&[pod]).await;
    rig.sleep(1).await;
    let since = rig.world.recorded.lock().unwrap().statuses[told..].to_vec();
    assert!(since.iter().all(|(_, s)| is_ready(s)), "{since:#?}");
    rig.until("not ready", |r| !is_ready(&r.status("a").unwrap())).await;
}

#[tokio::test(start_paused = true)]
async fn a_failed_liveness_probe_restarts_the_container() {
    let rig = Rig::new().await;
    rig.runtime.on_exec("alive", exec(0));
    let pod = probed(
        r#""livenessProbe":{"exec":{"command":["alive"]},"periodSeconds":1,"failureThreshold":3}"#,
    );
    rig.set(&pod).await;
    rig.until_ready("a").await;
    rig.sleep(20).await;
    assert_eq!(rig.container("a", "c").restart_count, 0);
    rig.runtime.on_exec("alive", exec(1));
    rig.until("restart", |r| r.container("a", "c").restart_count == 1).await;
    assert!(rig.events().contains(&(
        "Killing".into(),
        "Container c failed liveness probe, will be restarted".into()
    )));
}

#[tokio::test(start_paused = true)]
async fn a_startup_probe_holds_the_others_back() {
    let rig = Rig::new().await;
    rig.runtime.on_exec("started", exec(1));
    rig.runtime.on_exec("alive", exec(1));
    rig.runtime.on_exec("ready", exec(0));
    let pod = probed(
        r#""startupProbe":{"exec":{"command":["started"]},"periodSeconds":1,"failureThreshold":30},
           "livenessProbe":{"exec":{"command":["alive"]},"periodSeconds":1,"failureThreshold":2},
           "readinessProbe":{"exec":{"command":["ready"]}}"#,
    );
    rig.set(&pod).await;
    rig.until_phase("a", "Running").await;
    rig.sleep(15).await;
    let c = rig.container("a", "c");
    assert_eq!((c.started, c.ready, c.restart_count), (Some(false), false, 0));
    rig.runtime.on_exec("alive", exec(0));
    rig.runtime.on_exec("started", exec(0));
    rig.until_ready("a").await;
    assert_eq!(rig.container("a", "c").started, Some(true));
}

#[tokio::test(start_paused = true)]
async fn a_failed_startup_probe_restarts_the_container() {
    let rig = Rig::new().await;
    rig.runtime.on_exec("started", exec(1));
    let pod = probed(
        r#""startupProbe":{"exec":{"command":["started"]},"periodSeconds":1,"failureThreshold":3}"#,
    );
    rig.set(&pod).await;
    rig.until("restart", |r| r.status("a").is_some() && r.container("a", "c").restart_count == 1)
        .await;
}
