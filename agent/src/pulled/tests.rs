//! Records over real files, with crashes between any two steps.

use super::record::PullSecret;
use super::*;

const IMAGE: &str = "r.io/team/app:1";

fn records(dir: &Path) -> PullRecords {
    PullRecords::new(dir, Policy::default())
}

fn secret(name: &str, hash: &str) -> PullSecret {
    PullSecret {
        uid: format!("uid-{name}"),
        namespace: "ns".into(),
        name: name.into(),
        credential_hash: hash.into(),
    }
}

fn with(secret: PullSecret) -> PullCredentials {
    PullCredentials { kubernetes_secrets: vec![secret], ..PullCredentials::default() }
}

fn shows(secret: PullSecret) -> Shown {
    Shown { secrets: vec![secret], account: None }
}

fn image(id: &str, tag: &str) -> api::Image {
    api::Image { id: id.into(), repo_tags: vec![tag.into()], ..Default::default() }
}

async fn may(records: &PullRecords, shown: &Shown) -> bool {
    match records.check(IMAGE, "id").await {
        Check::Allowed(_) => true,
        Check::MustPull(_) => false,
        Check::Compare(of) => records.compare((IMAGE, "id"), &of, shown).await,
    }
}

fn left(dir: &Path, folder: &str) -> usize {
    count(&dir.join("image_manager").join(folder))
}

#[tokio::test]
async fn who_pulled_may_use_it_and_others_must_show_what_they_have() {
    let dir = tempfile::tempdir().unwrap();
    let records = records(dir.path());
    let (own, other) = (shows(secret("s", "h")), shows(secret("t", "g")));
    assert!(may(&records, &other).await, "nobody pulled it here");
    assert!(!dir.path().join("image_manager").exists(), "looking leaves nothing");
    let intent = records.intend(IMAGE).await.unwrap();
    assert!(!may(&records, &own).await, "it is being pulled");
    assert_eq!(left(dir.path(), "pulling"), 1);
    records.pulled(intent, "id", with(secret("s", "h"))).await;
    assert_eq!((left(dir.path(), "pulling"), left(dir.path(), "pulled")), (0, 1));
    assert!(may(&records, &own).await && !may(&records, &other).await);
    assert!(!may(&records, &Shown::default()).await);
    // A copy of the Secret is noted, and good by its own name from then on.
    assert!(may(&records, &shows(secret("copy", "h"))).await);
    assert!(may(&records, &shows(secret("copy", "changed"))).await);
    // The next agent knows it all.
    let again = self::records(dir.path());
    again.recover(vec![]).await;
    assert!(may(&again, &own).await && !may(&again, &other).await);
    let mode = |path: &str| {
        use std::os::unix::fs::PermissionsExt as _;
        fs::metadata(dir.path().join(path)).unwrap().permissions().mode() & 0o777
    };
    assert_eq!(mode("image_manager/pulled"), 0o700);
}

#[tokio::test]
async fn a_pull_that_fails_leaves_nothing_unless_another_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let records = records(dir.path());
    let one = records.intend(IMAGE).await.unwrap();
    let other = records.intend(IMAGE).await.unwrap();
    records.failed(one).await;
    assert_eq!(left(dir.path(), "pulling"), 1);
    records.failed(other).await;
    assert_eq!(left(dir.path(), "pulling"), 0);
    assert!(may(&records, &Shown::default()).await);
    // One that is given up may still bring the image; the next to end takes its file away.
    drop(records.intend(IMAGE).await.unwrap());
    assert_eq!(left(dir.path(), "pulling"), 1);
    assert!(!may(&records, &Shown::default()).await);
    let next = records.intend(IMAGE).await.unwrap();
    records.failed(next).await;
    assert_eq!(left(dir.path(), "pulling"), 0);
}

#[tokio::test]
async fn an_agent_killed_while_it_pulled_lets_nobody_in_unseen() {
    let dir = tempfile::tempdir().unwrap();
    drop(records(dir.path()).intend(IMAGE).await.unwrap());
    let again = records(dir.path());
    // Not there (yet): the intent stays.
    again.recover(vec![image("id", "r.io/other:1")]).await;
    assert_eq!(left(dir.path(), "pulling"), 1);
    assert!(!may(&again, &shows(secret("s", "h"))).await);
    again.recover(vec![image("id", IMAGE)]).await;
    assert_eq!((left(dir.path(), "pulling"), left(dir.path(), "pulled")), (0, 1));
    assert!(!may(&again, &shows(secret("s", "h"))).await, "nobody in particular pulled it");
    // Killed between record and intent: both are there, and the record counts.
    let intent = again.intend(IMAGE).await.unwrap();
    again.pulled(intent, "id", with(secret("s", "h"))).await;
    drop(records(dir.path()).intend(IMAGE).await.unwrap());
    assert!(may(&records(dir.path()), &shows(secret("s", "h"))).await);
    // Half written files are nobody's.
    let torn = dir.path().join("image_manager/pulled/sha256-00.tmp");
    fs::write(&torn, "{").unwrap();
    assert_eq!(left(dir.path(), "pulled"), 1);
}

#[tokio::test]
async fn a_record_that_cannot_be_read_costs_a_pull_and_is_made_anew() {
    let dir = tempfile::tempdir().unwrap();
    let records = records(dir.path());
    let intent = records.intend(IMAGE).await.unwrap();
    records.pulled(intent, "id", with(secret("s", "h"))).await;
    let path = dir.path().join("image_manager/pulled").join(file_name("id"));
    for broken in ["", "{\"kind\":\"ImagePulledRecord\"", "\u{0}\u{0}"] {
        fs::write(&path, broken).unwrap();
        assert!(!may(&records, &shows(secret("s", "h"))).await, "{broken:?}");
    }
    let intent = records.intend(IMAGE).await.unwrap();
    records.pulled(intent, "id", with(secret("s", "h"))).await;
    assert!(may(&records, &shows(secret("s", "h"))).await);
}

#[tokio::test]
async fn images_that_are_gone_are_forgotten() {
    let dir = tempfile::tempdir().unwrap();
    let records = records(dir.path());
    for id in ["one", "two"] {
        let intent = records.intend(id).await.unwrap();
        records.pulled(intent, id, with(secret("s", "h"))).await;
    }
    let later = Timestamp::now() + jiff::SignedDuration::from_secs(5);
    let earlier = Timestamp::now() - jiff::SignedDuration::from_secs(5);
    records.prune(HashSet::new(), earlier).await;
    assert_eq!(left(dir.path(), "pulled"), 2, "pulled since the images were listed");
    records.prune(HashSet::from(["one".to_owned()]), later).await;
    assert_eq!(left(dir.path(), "pulled"), 1);
    assert!(matches!(records.check("one:1", "one").await, Check::Compare(_)));
    assert!(matches!(records.check("two:1", "two").await, Check::Allowed(_)));
}

#[tokio::test]
async fn a_full_disk_is_told_before_anything_is_pulled() {
    let dir = tempfile::tempdir().unwrap();
    // Root writes anywhere; a file in the folder's place stops it too.
    fs::write(dir.path().join("image_manager"), "").unwrap();
    let records = records(dir.path());
    let error = records.intend(IMAGE).await.err().unwrap().to_string();
    assert!(error.contains("image_manager/pulling"), "{error}");
}
