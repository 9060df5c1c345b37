//! CheckpointContainer, with CRIU's part played by scripts: what it needs of the kernel no test can
//! count on. The archive around it is the shim's own.

mod node;

use std::collections::BTreeMap;
use std::fs;
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use cri_shim::api::*;
use node::{Node, Setup};

/// runc, but for its checkpoints: it "dumps" a page, or fails while there is a file `refuse`.
const RUNTIME: &str = r#"#!/bin/sh
here=$(dirname "$0")
case " $* " in *" checkpoint "*) ;; *) exec runc "$@" ;; esac
echo "$@" > "$here/arguments"
while [ $# -gt 1 ]; do
    case "$1" in
    --image-path) images=$2 ;;
    --work-path) work=$2 ;;
    --log) log=$2 ;;
    esac
    shift
done
if [ -e "$here/refuse" ]; then
    echo '(00.1) Error (criu/x.c:1): cannot seize' > "$work/dump.log"
    echo '{"level":"error","msg":"criu failed: type NOTIFY errno 0"}' > "$log"
    exit 1
fi
echo page > "$images/pages-1.img"
echo fine > "$work/dump.log"
"#;

async fn node(criu: &'static str) -> anyhow::Result<Node> {
    Node::start_with(Setup {
        arguments: Some(Box::new(move |root: &Path| {
            let handler = format!("dumps={}", root.join("runtime").display());
            ["--runtime", &handler, "--criu", criu].map(str::to_owned).to_vec()
        })),
        ..Setup::default()
    })
    .await
}

fn archive(path: &Path) -> anyhow::Result<BTreeMap<String, String>> {
    let mut files = BTreeMap::new();
    for entry in tar::Archive::new(fs::File::open(path)?).entries()? {
        let mut entry = entry?;
        let (name, mut bytes) = (entry.path()?.display().to_string(), Vec::new());
        entry.read_to_end(&mut bytes)?;
        files.insert(name, String::from_utf8_lossy(&bytes).into_owned());
    }
    Ok(files)
}

#[tokio::test]
async fn a_checkpoint_holds_the_dump_the_log_and_what_was_changed() -> anyhow::Result<()> {
    let mut node = node("/bin/true").await?;
    let root = node.root.path().to_path_buf();
    fs::write(root.join("runtime"), RUNTIME)?;
    fs::set_permissions(root.join("runtime"), fs::Permissions::from_mode(0o755))?;
    let pod = node.sandbox_with(NamespaceMode::Container, "dumps").await?;
    let id = node.run(&pod, "c", "echo said; echo changed > /file; exec sleep 1000").await?;
    let location = root.join("dump.tar");
    let request = |timeout| CheckpointContainerRequest {
        container_id: id.clone(),
        location: location.display().to_string(),
        timeout,
    };
    while !node.log("c").contains("said") {
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    node.exec(&id, &["sh", "-c", "until [ -s /file ]; do sleep 0.1; done"], 10).await?;
    node.runtime.checkpoint_container(request(0)).await?;
    assert_eq!(fs::metadata(&location)?.permissions().mode() & 0o777, 0o600);
    let files = archive(&location)?;
    assert_eq!(files["checkpoint/pages-1.img"], "page\n");
    assert_eq!(files["dump.log"], "fine\n");
    assert!(files["container.log"].contains(" stdout F said\n"));
    let json = |name: &str| serde_json::from_str::<serde_json::Value>(&files[name]);
    let config = json("config.dump")?;
    assert_eq!((&config["id"], &config["runtime"]), (&id.clone().into(), &"runtime".into()));
    assert_eq!(config["name"], "c_pod_default_uid_0");
    assert_eq!(json("status.dump")?["metadata"]["name"], "c");
    assert_eq!(json("spec.dump")?["process"]["args"][0], "sh");
    fs::write(root.join("diff.tar"), files["rootfs-diff.tar"].as_bytes())?;
    assert_eq!(archive(&root.join("diff.tar"))?["file"], "changed\n");
    let arguments = fs::read_to_string(root.join("arguments"))?;
    assert!(arguments.contains(" checkpoint --leave-running "), "{arguments}");
    assert!(arguments.trim_end().ends_with(&id), "{arguments}");
    assert_eq!(node.status(&id).await?.state(), ContainerState::ContainerRunning);

    // One that fails says why and leaves nothing.
    fs::write(root.join("refuse"), "")?;
    fs::remove_file(&location)?;
    let refused = node.runtime.checkpoint_container(request(0)).await.unwrap_err();
    let message = refused.message();
    assert!(message.contains("criu failed") && message.contains("cannot seize"), "{message}");
    assert!(!location.exists());
    assert!(!root.join("state/containers").join(&id).join("checkpoint").exists());
    let relative = CheckpointContainerRequest { location: "x.tar".into(), ..request(0) };
    let refused = node.runtime.checkpoint_container(relative).await.unwrap_err();
    assert_eq!(refused.code(), tonic::Code::InvalidArgument);

    Ok(())
}

/// CRIU's worker: it takes one request and answers that it is done, or that it failed while there is
/// a file `refuse` (a `Response`, see `proto/criu.proto`).
const CRIU: &str = r#"#!/bin/sh
here=$(dirname "$0")
dd bs=65536 count=1 of="$here/request" 2> /dev/null
[ "$*" = "swrk 0" ] || exit 2
if [ -e "$here/refuse" ]; then printf '\010\001\020\000\112\006denied' >&0; exit 1; fi
printf '\010\001\020\001' >&0
"#;

#[tokio::test]
async fn the_built_in_runtime_asks_criu_itself() -> anyhow::Result<()> {
    let mut node = Node::start_with(Setup {
        arguments: Some(Box::new(|root: &Path| {
            let criu = root.join("criu");
            fs::write(&criu, CRIU).unwrap();
            fs::set_permissions(&criu, fs::Permissions::from_mode(0o755)).unwrap();
            vec!["--criu".to_owned(), criu.display().to_string()]
        })),
        ..Setup::default()
    })
    .await?;
    let root = node.root.path().to_path_buf();
    let pod = node.sandbox(NamespaceMode::Container).await?;
    let id = node.run(&pod, "c", "echo changed > /file; exec sleep 1000").await?;
    node.exec(&id, &["sh", "-c", "until [ -s /file ]; do sleep 0.1; done"], 10).await?;
    let location = root.join("dump.tar");
    let request = CheckpointContainerRequest {
        container_id: id.clone(),
        location: location.display().to_string(),
        timeout: 60,
    };
    node.runtime.checkpoint_container(request.clone()).await?;
    let asked = fs::read(root.join("request"))?;
    let asked = String::from_utf8_lossy(&asked);
    assert!(asked.contains("dump.log") && asked.contains("/etc/hosts"), "{asked:?}");
    let files = archive(&location)?;
    let config: serde_json::Value = serde_json::from_str(&files["config.dump"])?;
    assert_eq!(config["runtime"], "longshore");
    // Its streams are the container's own: CRIU could not dump the node's /dev/null.
    let streams: Vec<String> = serde_json::from_str(&files["checkpoint/descriptors.json"])?;
    assert_eq!(streams[0], "/dev/null");
    assert!(streams[1].starts_with("pipe:["), "{streams:?}");
    let device = |path: &str| ["busybox", "stat", "-L", "-c", "%d", path].map(str::to_owned);
    let mut devices = Vec::new();
    for path in ["/proc/1/fd/0", "/dev/null"] {
        let command = device(path);
        let command: Vec<&str> = command.iter().map(String::as_str).collect();
        devices.push(node.exec(&id, &command, 10).await?.stdout);
    }
    assert_eq!(devices[0], devices[1]);
    assert_eq!(node.status(&id).await?.state(), ContainerState::ContainerRunning);

    fs::write(root.join("refuse"), "")?;
    fs::remove_file(&location)?;
    let refused = node.runtime.checkpoint_container(request).await.unwrap_err();
    assert!(refused.message().contains("denied"), "{refused}");
    assert!(!location.exists());
    Ok(())
}

#[tokio::test]
async fn without_criu_there_are_no_checkpoints() -> anyhow::Result<()> {
    let mut node = node("/no/such/criu").await?;
    let pod = node.sandbox(NamespaceMode::Container).await?;
    let id = node.run(&pod, "c", "exec sleep 1000").await?;
    let request = CheckpointContainerRequest {
        container_id: id,
        location: "/tmp/never.tar".into(),
        timeout: 0,
    };
    let refused = node.runtime.checkpoint_container(request).await.unwrap_err();
    assert_eq!(refused.code(), tonic::Code::Unimplemented);
    assert!(refused.message().contains("CRIU"), "{refused}");
    Ok(())
}
