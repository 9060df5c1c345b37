//! Pods with user namespaces (`hostUsers: false`), with real containers: needs Linux 6.3.

#[path = "streaming/client.rs"]
#[allow(dead_code, reason = "each test binary uses its part of it")]
mod client;
mod node;

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use anyhow::Context;
use client::{Dialect, Session};
use cri_shim::api::*;
use node::{Entry, Node};

/// The ids of a pod.
fn ids(first: u32) -> Vec<IdMapping> {
    vec![IdMapping { host_id: first, container_id: 0, length: 65_536 }]
}

fn userns(first: u32) -> NamespaceOption {
    let users =
        UserNamespace { mode: NamespaceMode::Pod as i32, uids: ids(first), gids: ids(first) };
    NamespaceOption {
        pid: NamespaceMode::Container as i32,
        userns_options: Some(users),
        ..Default::default()
    }
}

fn volume(host: &Path, container: &str, first: u32) -> Mount {
    Mount {
        host_path: host.display().to_string(),
        container_path: container.into(),
        uid_mappings: ids(first),
        gid_mappings: ids(first),
        ..Default::default()
    }
}

fn security(config: &mut ContainerConfig) -> &mut LinuxContainerSecurityContext {
    let linux = config.linux.get_or_insert_default();
    linux.security_context.get_or_insert_default()
}

async fn said(node: &mut Node, id: &str, script: &str) -> anyhow::Result<String> {
    let answer = node.exec(id, &["sh", "-c", script], 0).await?;
    let error = String::from_utf8_lossy(&answer.stderr).into_owned();
    anyhow::ensure!(answer.exit_code == 0, "{script}: {} {error}", answer.exit_code);
    Ok(String::from_utf8_lossy(&answer.stdout).trim().to_owned())
}

/// A file of `/proc/<pid>` of a container's first process, as the node sees it.
fn proc(node: &Node, container: &str, file: &str) -> anyhow::Result<String> {
    let record = node.root.path().join("state/containers").join(container).join("started.json");
    let started: serde_json::Value = serde_json::from_slice(&fs::read(record)?)?;
    Ok(fs::read_to_string(format!("/proc/{}/{file}", started["pid"]))?)
}

fn owner(path: &Path) -> anyhow::Result<(u32, u32)> {
    let meta = fs::symlink_metadata(path).with_context(|| path.display().to_string())?;
    Ok((meta.uid(), meta.gid()))
}

async fn remove(node: &mut Node, sandbox: &str) -> anyhow::Result<()> {
    let request = RemovePodSandboxRequest { pod_sandbox_id: sandbox.into() };
    node.runtime.remove_pod_sandbox(request).await?;
    Ok(())
}

/// Nothing of any sandbox is left, and no namespace is pinned any more.
fn nothing_left(node: &Node) {
    assert_eq!(node.leftovers(), Vec::<PathBuf>::new());
    let mounts = node.mounts();
    let run = node.root.path().join("run");
    let own = |line: &&str| line.contains(&format!("{}/", run.display()));
    let left: Vec<&str> = mounts.lines().filter(own).collect();
    assert!(left.len() == 1 && left[0].contains("/run/mnt "), "{left:#?}");
}

#[tokio::test]
async fn root_in_a_container_is_nobody_on_the_node() -> anyhow::Result<()> {
    let mut node = Node::start_networked().await?;
    let status = node.runtime.status(StatusRequest::default()).await?.into_inner();
    let features = status.runtime_handlers.iter().map(|h| h.features.unwrap_or_default());
    assert!(features.clone().count() > 0 && features.clone().all(|f| f.user_namespaces));

    let first = 20 * 65_536;
    let disk = node.root.path().join("disk");
    fs::create_dir(&disk)?;
    fs::write(disk.join("secret"), "of root\n")?;
    fs::set_permissions(disk.join("secret"), fs::Permissions::from_mode(0o600))?;
    // Volumes are below directories that only the node's root may pass.
    let closed = node.root.path().join("closed/below");
    fs::create_dir_all(&closed)?;
    fs::set_permissions(closed.parent().context("parent")?, fs::Permissions::from_mode(0o700))?;
    fs::write(closed.join("file"), "reached")?;

    let sysctls = [("net.ipv4.ip_unprivileged_port_start", "99"), ("kernel.shm_rmid_forced", "1")];
    let pod = node
        .sandbox_of("pod", userns(first), "", |linux| {
            linux.sysctls =
                sysctls.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        })
        .await?;
    let script =
        "echo out; echo err >&2; echo mine > /root-file; echo log > /dev/stdout; sleep 1000";
    let id = node
        .create_with(&pod, "a", script, |config| {
            config.mounts.push(volume(&disk, "/disk", first));
            config.mounts.push(volume(&closed.join("file"), "/one", first));
            config.devices.push(Device {
                container_path: "/dev/other".into(),
                host_path: "/dev/zero".into(),
                permissions: "r".into(),
            });
        })
        .await?;
    node.runtime.start_container(StartContainerRequest { container_id: id.clone() }).await?;

    // Its processes.
    let map = proc(&node, &id, "uid_map")?;
    let numbers: Vec<&str> = map.split_whitespace().collect();
    assert_eq!(numbers, ["0", &first.to_string(), "65536"]);
    let status = proc(&node, &id, "status")?;
    assert!(status.contains(&format!("Uid:\t{first}\t{first}")), "{status}");
    assert_eq!(said(&mut node, &id, "id -u; id -g").await?, "0\n0");

    // Its files: those of a volume belong to the same ids, those of its own file system do not.
    let listed =
        said(&mut node, &id, "cat /disk/secret; busybox stat -c %u:%g /disk/secret").await?;
    assert_eq!(listed, "of root\n0:0");
    said(&mut node, &id, "echo new > /disk/new; busybox chown 1000:2000 /disk/new").await?;
    assert_eq!(owner(&disk.join("new"))?, (1000, 2000));
    assert_eq!(said(&mut node, &id, "cat /one").await?, "reached");
    let upper = node.root.path().join("state/snapshots").join(&id).join("upper");
    assert_eq!(owner(&upper.join("root-file"))?, (first, first));
    assert_eq!(owner(&upper.join("work/here"))?, (first, first));
    let image = said(&mut node, &id, "busybox stat -c %u:%g / /bin/busybox /dev/shm").await?;
    assert_eq!(image, "0:0\n0:0\n0:0");
    let layers = node.root.path().join("state/images/layers");
    let layer = fs::read_dir(layers)?.flatten().map(|e| e.path().join("d/bin/busybox"));
    assert!(layer.filter(|path| path.exists()).all(|path| owner(&path).unwrap() == (0, 0)));
    assert_eq!(said(&mut node, &id, "busybox stat -c %u:%a /etc/hosts").await?, "0:644");
    said(&mut node, &id, "echo x > /dev/shm/x && cat /etc/resolv.conf /etc/hostname").await?;

    // What the namespace owns.
    for (name, value) in sysctls {
        let path = name.replace('.', "/");
        assert_eq!(said(&mut node, &id, &format!("cat /proc/sys/{path}")).await?, value);
    }
    said(&mut node, &id, "busybox ls /sys/class/net/eth0 && busybox ping -c 1 127.0.0.1").await?;
    said(&mut node, &id, "head -c 8 /dev/other | wc -c; echo > /dev/null").await?;
    // And what it does not.
    let refused = node.exec(&id, &["busybox", "mknod", "/n", "b", "7", "0"], 0).await?;
    assert_ne!(refused.exit_code, 0);

    let log = node.log("a");
    for line in [" stdout F out\n", " stderr F err\n", " stdout F log\n"] {
        assert!(log.contains(line), "{log}");
    }
    remove(&mut node, &pod.0).await?;
    nothing_left(&node);
    Ok(())
}

#[tokio::test]
async fn pods_keep_apart_and_a_killed_server_finds_them_again() -> anyhow::Result<()> {
    let mut node = Node::start_networked().await?;
    let shared = NamespaceOption { pid: NamespaceMode::Pod as i32, ..userns(65_536) };
    let one = node.sandbox_of("one", shared, "", |_| {}).await?;
    let two = node.sandbox_of("two", userns(2 * 65_536), "", |_| {}).await?;
    let mut ran = Vec::new();
    for (name, pod) in [("a", &one), ("b", &one), ("c", &two)] {
        let user = |config: &mut ContainerConfig| {
            let security = security(config);
            security.run_as_user = Some(Int64Value { value: 1000 });
            security.supplemental_groups = vec![3000];
        };
        let id = node.create_with(pod, name, "echo up > /dev/stdout; sleep 1000", user).await?;
        node.runtime.start_container(StartContainerRequest { container_id: id.clone() }).await?;
        ran.push(id);
    }
    node.restart().await?;
    for (id, first) in ran.iter().zip([65_536, 65_536, 2 * 65_536]) {
        assert_eq!(node.status(id).await?.state(), ContainerState::ContainerRunning);
        let status = proc(&node, id, "status")?;
        assert!(status.contains(&format!("Uid:\t{}\t", first + 1000)), "{status}");
        assert_eq!(said(&mut node, id, "id -u; id -G").await?, "1000\n0 3000");
    }
    // The first two share processes; the third sees none of theirs.
    assert!(said(&mut node, &ran[1], "ps").await?.contains("longshore-init"));
    let seen = said(&mut node, &ran[0], "ps | grep -c 'sleep 1000'").await?;
    assert!(seen.parse::<u32>()? >= 2, "{seen}");
    // Another container may still be started in the namespace that was found again.
    let late = node.run(&one, "late", "sleep 1000").await?;
    assert_eq!(proc(&node, &late, "uid_map")?.split_whitespace().nth(1), Some("65536"));
    for name in ["a", "b", "c"] {
        assert!(node.log(name).contains(" stdout F up\n"), "{}", node.log(name));
    }
    remove(&mut node, &one.0).await?;
    assert_eq!(said(&mut node, &ran[2], "id -u").await?, "1000");
    remove(&mut node, &two.0).await?;
    nothing_left(&node);
    Ok(())
}

#[tokio::test]
async fn terminals_and_forwarded_ports_reach_the_namespace() -> anyhow::Result<()> {
    let mut node = Node::start_networked().await?;
    let pod = node.sandbox_of("pod", userns(65_536), "", |_| {}).await?;
    let script = "tty; echo hello | nc -l -p 80";
    let id = node.create_with(&pod, "a", script, |config| config.tty = true).await?;
    node.runtime.start_container(StartContainerRequest { container_id: id.clone() }).await?;

    let request = ExecRequest {
        container_id: id.clone(),
        cmd: ["sh", "-c", "tty; busybox stat -c %u:%g $(tty); exec cat"].map(str::to_owned).into(),
        stdin: true,
        stdout: true,
        tty: true,
        ..Default::default()
    };
    let url = node.runtime.exec(request).await?.into_inner().url;
    let mut session = Session::open(&url, Dialect::Spdy("v4.channel.k8s.io")).await?;
    session.command_streams(&["error", "stdin", "stdout", "resize"]).await?;
    let shown = session.expect("stdout", "\n0:5").await;
    shown.with_context(|| session.text("error"))?;
    assert!(session.text("stdout").contains("/dev/pts/"), "{}", session.text("stdout"));
    drop(session);

    let forward = PortForwardRequest { pod_sandbox_id: pod.0.clone(), port: vec![80] };
    let url = node.runtime.port_forward(forward).await?.into_inner().url;
    let mut session = Session::open(&url, Dialect::Spdy("portforward.k8s.io")).await?;
    for kind in ["error", "data"] {
        let headers = [("streamtype", kind), ("port", "80"), ("requestid", "0")];
        session.open_stream(kind, &headers).await?;
    }
    session.expect("data", "hello\n").await?;
    drop(session);
    node.exited(&id).await?;
    assert!(node.log("a").contains(" stdout F /dev/pts/0"), "{}", node.log("a"));
    remove(&mut node, &pod.0).await?;
    nothing_left(&node);
    Ok(())
}

#[tokio::test]
async fn files_of_image_volumes_belong_to_whom_they_belong_in_the_image() -> anyhow::Result<()> {
    let mut node = Node::start_networked().await?;
    let one = vec![Entry::File("data/file", "lower")];
    node.add_image("localhost/one:1", std::slice::from_ref(&one)).await?;
    node.add_image("localhost/two:1", &[one, vec![Entry::File("data/more", "upper")]]).await?;
    for (at, handler) in ["", "runc"].into_iter().enumerate() {
        let first = 65_536 * (at as u32 + 1);
        let name = format!("pod{handler}");
        let pod = node.sandbox_of(&name, userns(first), handler, |_| {}).await?;
        let image = |name: &str, path: &str, sub_path: &str| Mount {
            container_path: path.into(),
            readonly: true,
            image: Some(ImageSpec { image: name.into(), ..Default::default() }),
            image_sub_path: sub_path.into(),
            // As the kubelet sends them with every mount of such a pod.
            uid_mappings: ids(first),
            gid_mappings: ids(first),
            ..Default::default()
        };
        let mounts = vec![
            image("localhost/one:1", "/one", ""),
            image("localhost/two:1", "/two", ""),
            image("localhost/two:1", "/part", "data"),
        ];
        let id = node.create_with(&pod, "a", "sleep 1000", |c| c.mounts = mounts).await?;
        node.runtime.start_container(StartContainerRequest { container_id: id.clone() }).await?;
        let script = "cat /one/data/file /two/data/more /part/file; \
            busybox stat -c ' %u:%g' /one/data/file /two/data/more /part/more | tr -d '\\n'";
        let expected = "lowerupperlower 0:0 0:0 0:0";
        assert_eq!(said(&mut node, &id, script).await?, expected, "{handler:?}");
        assert!(said(&mut node, &id, "busybox touch /two/x 2>&1").await.is_err());
        remove(&mut node, &pod.0).await?;
    }
    nothing_left(&node);
    Ok(())
}

#[tokio::test]
async fn runc_joins_the_namespace_too() -> anyhow::Result<()> {
    let mut node = Node::start_networked().await?;
    let first = 3 * 65_536;
    let disk = node.root.path().join("disk");
    fs::create_dir(&disk)?;
    let pod = node.sandbox_of("pod", userns(first), "runc", |_| {}).await?;
    let id = node
        .create_with(&pod, "a", "echo out > /disk/new; sleep 1000", |config| {
            config.mounts.push(volume(&disk, "/disk", first));
        })
        .await?;
    node.runtime.start_container(StartContainerRequest { container_id: id.clone() }).await?;
    assert_eq!(said(&mut node, &id, "cat /disk/new; id -u").await?, "out\n0");
    assert_eq!(owner(&disk.join("new"))?, (0, 0));
    let status = proc(&node, &id, "status")?;
    assert!(status.contains(&format!("Uid:\t{first}\t")), "{status}");
    remove(&mut node, &pod.0).await?;
    nothing_left(&node);
    Ok(())
}

#[tokio::test]
async fn what_cannot_be_is_refused_with_its_reason() -> anyhow::Result<()> {
    let mut node = Node::start_networked().await?;
    let host = NamespaceOption { network: NamespaceMode::Node as i32, ..userns(65_536) };
    let refused = node.sandbox_of("host", host, "", |_| {}).await.unwrap_err();
    assert!(refused.to_string().contains("hostNetwork"), "{refused}");
    let mut two = userns(65_536);
    if let Some(users) = &mut two.userns_options {
        users.uids.extend(ids(1 << 20));
    }
    let refused = node.sandbox_of("two", two, "", |_| {}).await.unwrap_err();
    assert!(refused.to_string().contains("exactly one range"), "{refused}");

    let pod = node.sandbox_of("pod", userns(65_536), "", |_| {}).await?;
    let other = |config: &mut ContainerConfig| {
        security(config).namespace_options = Some(userns(2 * 65_536));
    };
    let refused = node.create_with(&pod, "other", "true", other).await.unwrap_err();
    assert!(refused.to_string().contains("not its sandbox's"), "{refused}");
    let nobody = |config: &mut ContainerConfig| {
        security(config).run_as_user = Some(Int64Value { value: 70_000 });
    };
    let id = node.create_with(&pod, "nobody", "true", nobody).await?;
    let start = StartContainerRequest { container_id: id };
    let refused = node.runtime.start_container(start).await.unwrap_err();
    assert!(refused.message().contains("70000 is not mapped"), "{refused}");
    remove(&mut node, &pod.0).await?;

    // A handler that cannot says so, and of each pod; our own needs no path to be open.
    fs::set_permissions(node.root.path(), fs::Permissions::from_mode(0o700))?;
    node.restart().await?;
    let status = node.runtime.status(StatusRequest::default()).await?.into_inner();
    let can = |name: &str| {
        let handler = status.runtime_handlers.iter().find(|h| h.name == name);
        handler.and_then(|h| h.features).is_some_and(|f| f.user_namespaces)
    };
    assert_eq!((can(""), can("runc")), (true, false));
    let refused = node.sandbox_of("closed", userns(65_536), "runc", |_| {}).await.unwrap_err();
    assert!(refused.to_string().contains("chmod o+x"), "{refused}");
    let pod = node.sandbox_of("closed", userns(65_536), "", |_| {}).await?;
    let id = node.run(&pod, "closed", "exec sleep 1000").await?;
    assert_eq!(said(&mut node, &id, "id -u").await?, "0");
    remove(&mut node, &pod.0).await?;
    nothing_left(&node);
    Ok(())
}
