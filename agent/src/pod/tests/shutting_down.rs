//! The node shuts down.

use std::io::Read;
use std::os::unix::net::UnixStream;

use super::*;
use crate::node::logind::Lock;
use crate::runtime::fake::Behaviour;

/// Whether the shutdown is still held up.
fn held(lock: &mut UnixStream) -> bool {
    !matches!(lock.read(&mut [0]), Ok(0))
}

/// Told by logind.
async fn begin_shutdown(rig: &Rig) -> UnixStream {
    let (lock, held) = Lock::of_its_own();
    rig.shutdowns.send(Told::Shutdown(lock)).await.unwrap();
    held
}

fn of(uid: &str, container: &str, more: &str) -> Arc<Pod> {
    let containers = format!(
        r#""containers":[{{"name":"{container}","image":"img:1","imagePullPolicy":"Never"}}]"#
    );
    named(uid, &format!("{{{more}{containers}}}"))
}

/// Seconds from `since` on.
fn elapsed(since: tokio::time::Instant) -> u64 {
    since.elapsed().as_secs()
}

#[tokio::test(start_paused = true)]
async fn pods_end_before_the_node_does_the_critical_ones_last() {
    let rig = Rig::new().await;
    let slow = Behaviour { ends_in: Duration::from_secs(300), ..Behaviour::default() };
    rig.runtime.behave("slow", slow);
    rig.runtime.behave("slow-critical", slow);
    let grace = r#""terminationGracePeriodSeconds":120,"#;
    rig.set(&of("quick", "c", "")).await;
    rig.set(&of("slow", "slow", grace)).await;
    rig.set(&of("short", "slow", r#""terminationGracePeriodSeconds":5,"#)).await;
    let critical = format!(r#"{grace}"priority":2000001000,"#);
    rig.set(&of("critical", "slow-critical", &critical)).await;
    for uid in ["quick", "slow", "short", "critical"] {
        rig.until_ready(uid).await;
    }
    let began = tokio::time::Instant::now();
    let mut lock = begin_shutdown(&rig).await;
    rig.until_phase("quick", "Failed").await;
    assert!(elapsed(began) < 2);
    rig.until_phase("short", "Failed").await;
    assert!((5..8).contains(&elapsed(began)), "{}", elapsed(began));
    rig.until_phase("slow", "Failed").await;
    assert!((20..23).contains(&elapsed(began)), "{}", elapsed(began));
    assert!(*rig.shutting_down.borrow());
    assert!(held(&mut lock));
    assert!(is_ready(&rig.status("critical").unwrap()));
    let status = rig.status("slow").unwrap();
    assert_eq!(status.reason.as_deref(), Some("Terminated"));
    let message = "Pod was terminated in response to imminent node shutdown.";
    assert_eq!(status.message.as_deref(), Some(message));
    let disrupted = status.conditions.unwrap();
    let disrupted = disrupted.iter().find(|c| c.type_ == "DisruptionTarget").unwrap();
    assert_eq!(disrupted.reason.as_deref(), Some("TerminationByKubelet"));
    // Who comes now is not let in, whatever its priority.
    rig.set(&of("new", "c", r#""priority":2000001000,"#)).await;
    rig.until_phase("new", "Failed").await;
    let refused = rig.status("new").unwrap();
    assert_eq!(refused.reason.as_deref(), Some("NodeShutdown"));
    let said = "Pod was rejected as the node is shutting down.";
    assert_eq!(refused.message, Some(format!("Pod was rejected: {said}")));
    rig.until_phase("critical", "Failed").await;
    assert!((30..34).contains(&elapsed(began)), "{}", elapsed(began));
    while held(&mut lock) {
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert!(elapsed(began) < 36);
    let reasons = rig.reasons();
    assert!(reasons.contains(&"NodeShutdown".to_owned()), "{reasons:?}");
    assert!(!reasons.contains(&"Terminated".to_owned()), "{reasons:?}");
    let state = rig.dir.path().join("kubelet/graceful_node_shutdown_state");
    let state = std::fs::read_to_string(state).unwrap();
    assert!(state.contains("startTime") && !state.contains("0001-01-01"), "{state}");
}

#[tokio::test(start_paused = true)]
async fn a_node_without_pods_waits_for_nothing() {
    let rig = Rig::new().await;
    let began = tokio::time::Instant::now();
    let mut lock = begin_shutdown(&rig).await;
    while held(&mut lock) {
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert!(elapsed(began) < 2);
}

#[tokio::test(start_paused = true)]
async fn a_pod_that_is_being_deleted_has_no_longer_than_its_group() {
    let rig = Rig::new().await;
    let slow = Behaviour { ends_in: Duration::from_secs(300), ..Behaviour::default() };
    rig.runtime.behave("slow", slow);
    let pod = of("a", "slow", r#""terminationGracePeriodSeconds":200,"#);
    rig.set(&pod).await;
    rig.until_ready("a").await;
    rig.set(&deleted(&pod, 200)).await;
    rig.sleep(2).await;
    let began = tokio::time::Instant::now();
    let _lock = begin_shutdown(&rig).await;
    rig.until("gone", |r| r.gone("a")).await;
    assert!((19..24).contains(&elapsed(began)), "{}", elapsed(began));
}

#[tokio::test(start_paused = true)]
async fn a_shutdown_that_is_called_off_spares_who_is_left() {
    let rig = Rig::new().await;
    let slow = Behaviour { ends_in: Duration::from_secs(300), ..Behaviour::default() };
    rig.runtime.behave("slow", slow);
    rig.set(&of("a", "slow", r#""terminationGracePeriodSeconds":120,"#)).await;
    rig.set(&of("critical", "c", r#""priority":2000001000,"#)).await;
    rig.until_ready("a").await;
    rig.until_ready("critical").await;
    let mut lock = begin_shutdown(&rig).await;
    rig.until("seen", |r| *r.shutting_down.borrow()).await;
    // Told twice: the first lock is held on to.
    let mut second = begin_shutdown(&rig).await;
    rig.sleep(3).await;
    assert!(held(&mut lock) && held(&mut second));
    rig.shutdowns.send(Told::Cancelled).await.unwrap();
    rig.until("seen", |r| !*r.shutting_down.borrow()).await;
    assert!(!held(&mut lock) && !held(&mut second));
    rig.set(&of("new", "c", "")).await;
    rig.until_ready("new").await;
    rig.until_phase("a", "Failed").await;
    rig.sleep(60).await;
    assert!(is_ready(&rig.status("critical").unwrap()));
}

#[tokio::test(start_paused = true)]
async fn static_pods_run_again_after_the_boot() {
    let mut rig = Rig::new().await;
    let pod = of("a", "c", "");
    rig.set(&pod).await;
    rig.until_ready("a").await;
    let _lock = begin_shutdown(&rig).await;
    rig.until_phase("a", "Failed").await;
    rig.sleep(60).await;
    // The status goes to disk in a thread of real time.
    let saved = rig.dir.path().join("kubelet/longshore/pod-status/a.json");
    while !std::fs::read_to_string(&saved).is_ok_and(|text| text.contains("imminent")) {
        std::thread::yield_now();
    }
    rig.restart(std::slice::from_ref(&pod)).await;
    rig.until_ready("a").await;
    let status = rig.status("a").unwrap();
    assert_eq!((status.reason, status.message), (None, None));
    assert_eq!(rig.container("a", "c").restart_count, 1);
}
