//! Fields of the CRI's container and sandbox configs, seen from inside real containers: of the
//! built-in runtime, and of runc where the fields go through another program.

mod node;

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, Instant};

use anyhow::Context;
use cri_shim::api::image_service_client::ImageServiceClient;
use cri_shim::api::*;
use node::{Entry, Node, Setup};

type Pod = (String, PodSandboxConfig);

fn security(config: &mut ContainerConfig) -> &mut LinuxContainerSecurityContext {
    config.linux.get_or_insert_default().security_context.get_or_insert_default()
}

fn resources(config: &mut ContainerConfig) -> &mut LinuxContainerResources {
    config.linux.get_or_insert_default().resources.get_or_insert_default()
}

/// What a script in a container says on standard output; its exit code must be 0.
async fn output(
    node: &mut Node,
    pod: &Pod,
    name: &str,
    script: &str,
    change: impl FnOnce(&mut ContainerConfig),
) -> anyhow::Result<String> {
    let id = node.create_with(pod, name, &format!("exec 2>&1; {script}"), change).await?;
    node.runtime.start_container(StartContainerRequest { container_id: id.clone() }).await?;
    let status = node.exited(&id).await?;
    let said: String = node
        .log(name)
        .lines()
        .filter_map(|line| line.splitn(4, ' ').nth(3))
        .map(|line| format!("{line}\n"))
        .collect();
    anyhow::ensure!(status.exit_code == 0, "{name} exited with {}: {said}", status.exit_code);
    Ok(said)
}

async fn inside(node: &mut Node, id: &str, script: &str) -> anyhow::Result<String> {
    let answer = node.exec(id, &["sh", "-c", script], 0).await?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    anyhow::ensure!(answer.exit_code == 0, "{script}: {}", text(&answer.stderr));
    Ok(text(&answer.stdout))
}

fn volume(host: &str, container: &str) -> Mount {
    Mount { host_path: host.into(), container_path: container.into(), ..Default::default() }
}

async fn until(what: &str, mut done: impl FnMut() -> bool) -> anyhow::Result<()> {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !done() {
        anyhow::ensure!(Instant::now() < deadline, "not in time: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    Ok(())
}

#[tokio::test]
async fn cdi_devices_bring_nodes_mounts_variables_groups_and_hooks() -> anyhow::Result<()> {
    let cdi = |root: &std::path::Path| {
        vec!["--cdi-dir".to_owned(), root.join("cdi").display().to_string()]
    };
    let mut node =
        Node::start_with(Setup { arguments: Some(Box::new(cdi)), ..Setup::default() }).await?;
    let root = node.root.path().to_path_buf();
    let here = root.display();
    fs::create_dir(root.join("cdi"))?;
    fs::write(root.join("library"), "of the vendor")?;
    let hook = root.join("hook");
    fs::write(
        &hook,
        "#!/bin/sh\n/bin/readlink /proc/self/ns/pid > \"$1.ns\"; /bin/cat >> \"$1\"; echo >> \"$1\"\n",
    )?;
    fs::set_permissions(&hook, fs::Permissions::from_mode(0o755))?;
    let hooks: String = ["createRuntime", "createContainer", "poststart", "poststop"]
        .iter()
        .map(|name| {
            format!("    - {{hookName: {name}, path: {here}/hook, args: [hook, {here}/{name}]}}\n")
        })
        .collect();
    let file = format!(
        "cdiVersion: 0.7.0
kind: vendor.com/toy
containerEdits:
  env: [\"VENDOR=yes\"]
devices:
- name: one
  containerEdits:
    env: [\"TOY=one\"]
    deviceNodes:
    - {{path: /dev/toy, hostPath: /dev/null, fileMode: 0640, gid: 4242, permissions: rw}}
    mounts:
    - {{hostPath: {here}/library, containerPath: /lib/toy, options: [ro, bind]}}
    additionalGids: [4242]
    hooks:
{hooks}    - {{hookName: startContainer, path: /bin/busybox, args: [sh, -c, \"echo inside > /started\"]}}
- name: two
  containerEdits:
    env: [\"TOY2=two\"]
"
    );
    fs::write(root.join("cdi/toy.yaml"), &file)?;
    for handler in ["", "runc"] {
        let pod = node.sandbox_with(NamespaceMode::Container, handler).await?;
        let name = format!("toy{handler}");
        let script = "echo $VENDOR $TOY $TOY2; cat /lib/toy /started; echo; id -G; \
            busybox stat -c '%F %a %g %t,%T' /dev/toy; echo x > /dev/toy; \
            busybox touch /lib/toy 2>/dev/null || echo read-only";
        let said = output(&mut node, &pod, &name, script, |config| {
            config.cdi_devices = vec![CdiDevice { name: "vendor.com/toy=one".into() }];
            config.annotations.insert("cdi.k8s.io/plugin_1".into(), "vendor.com/toy=two".into());
        })
        .await?;
        let expected = "yes one two\nof the vendorinside\n\n0 4242\n\
            character special file 640 4242 1,3\nread-only\n";
        assert_eq!(said, expected, "handler {handler:?}");
        for name in ["createRuntime", "createContainer", "poststart", "poststop"] {
            let path = root.join(name);
            let text = || fs::read_to_string(&path).unwrap_or_default();
            until(&format!("{name} of {handler:?}"), || text().contains('\n')).await?;
            let text = text();
            let line = text.lines().next().context(name)?;
            let state: serde_json::Value = serde_json::from_str(line)?;
            assert!(state["bundle"].as_str().is_some_and(|b| b.contains("/run/c/")), "{state}");
            assert_eq!(state["annotations"]["io.kubernetes.cri.sandbox-name"], "pod");
            // Hooks of the runtime's are the node's processes, whatever becomes of the container.
            if name != "createContainer" {
                let namespace = fs::read_to_string(root.join(format!("{name}.ns")))?;
                let own = fs::read_link("/proc/self/ns/pid")?;
                assert_eq!(namespace.trim(), own.display().to_string(), "{name} of {handler:?}");
            }
            fs::remove_file(path)?;
        }
        let remove = RemovePodSandboxRequest { pod_sandbox_id: pod.0.clone() };
        node.runtime.remove_pod_sandbox(remove).await?;
    }
    assert!(!root.join("poststop").exists(), "a hook ran twice");
    let pod = node.sandbox(NamespaceMode::Container).await?;
    let ask = |name: &'static str| {
        move |config: &mut ContainerConfig| {
            config.cdi_devices = vec![CdiDevice { name: name.into() }];
        }
    };
    let refused = node.create_with(&pod, "none", "true", ask("vendor.com/toy=none")).await;
    let refused = refused.unwrap_err().to_string();
    assert!(refused.contains("vendor.com/toy=none") && refused.contains("/cdi"), "{refused}");
    fs::write(root.join("cdi/other.yaml"), &file)?;
    let refused = node.create_with(&pod, "both", "true", ask("vendor.com/toy=two")).await;
    let refused = refused.unwrap_err().to_string();
    assert!(refused.contains("other.yaml") && refused.contains("toy.yaml"), "{refused}");
    Ok(())
}

#[tokio::test]
async fn a_handlers_base_spec_is_where_its_containers_start_from() -> anyhow::Result<()> {
    let with_base = |root: &std::path::Path| {
        let base = format!("limited={}", root.join("base.json").display());
        vec!["--base-spec".to_owned(), base]
    };
    let mut node =
        Node::start_with(Setup { arguments: Some(Box::new(with_base)), ..Setup::default() })
            .await?;
    let root = node.root.path().to_path_buf();
    let hook = serde_json::json!({"path": "/bin/sh",
        "args": ["sh", "-c", format!("echo ran > {}", root.join("hook").display())]});
    let base = serde_json::json!({
        "ociVersion": "1.0.2",
        "process": {"cwd": "/", "user": {"uid": 0, "gid": 0},
            "rlimits": [{"type": "RLIMIT_NOFILE", "soft": 77, "hard": 88}]},
        "hooks": {"createRuntime": [hook]},
        "mounts": [{"destination": "/base", "type": "tmpfs", "source": "tmpfs", "options": ["size=1m"]}],
        "linux": {},
    });
    fs::write(root.join("base.json"), base.to_string())?;
    let pod = node.sandbox_with(NamespaceMode::Container, "limited").await?;
    let said =
        output(&mut node, &pod, "c", "ulimit -n; grep -c ' /base tmpfs' /proc/mounts", |_| {})
            .await?;
    assert_eq!(said, "77\n1\n");
    assert_eq!(fs::read_to_string(root.join("hook"))?, "ran\n");
    let id = node.create(&pod, "d", "true").await?;
    fs::write(root.join("base.json"), "{")?;
    let refused = node.create(&pod, "e", "true").await.unwrap_err().to_string();
    assert!(refused.contains("base.json"), "{refused}");
    let start = StartContainerRequest { container_id: id };
    let refused = node.runtime.start_container(start).await.unwrap_err();
    assert!(refused.message().contains("base.json"), "{refused}");
    Ok(())
}

#[tokio::test]
async fn image_volumes_show_an_images_files_and_keep_the_image() -> anyhow::Result<()> {
    use Entry::{File, Link};
    let mut node = Node::start().await?;
    let layers = [
        vec![File("data/deep/file", "old"), File("data/gone", "x"), File("plain", "text")],
        vec![
            File("data/deep/file", "new"),
            File("data/.wh.gone", ""),
            Link("data/within", "deep"),
            Link("data/out", "../../../../../../../../etc"),
        ],
    ];
    node.add_image("localhost/volume:1", &layers).await?;
    node.add_image("localhost/small:1", &[]).await?;
    let mut images = ImageServiceClient::new(node::connect(node.root.path()).await?);
    let mut id_of = HashMap::new();
    for name in ["localhost/volume:1", "localhost/small:1"] {
        let image = Some(ImageSpec { image: name.into(), ..Default::default() });
        let status = images.image_status(ImageStatusRequest { image, verbose: false }).await?;
        id_of.insert(name, status.into_inner().image.context(name)?.id);
    }
    let image_volume = |path: &str, sub_path: &str| Mount {
        container_path: path.into(),
        readonly: true,
        image: Some(ImageSpec { image: id_of["localhost/volume:1"].clone(), ..Default::default() }),
        image_sub_path: sub_path.into(),
        ..Default::default()
    };
    let small = Mount {
        image: Some(ImageSpec { image: id_of["localhost/small:1"].clone(), ..Default::default() }),
        ..image_volume("/small", "")
    };
    let script = "cat /v/data/deep/file /sub/file /one /within/file; echo; \
        busybox ls /v/data | tr '\\n' ' '; busybox ls /small/bin/busybox; busybox ls /out | wc -l; \
        busybox touch /v/new /sub/new /small/new 2>&1 | grep -c Read-only";
    for handler in ["", "runc"] {
        let pod = node.sandbox_with(NamespaceMode::Container, handler).await?;
        let mounts = vec![
            image_volume("/v", ""),
            image_volume("/sub", "data/deep"),
            image_volume("/one", "plain"),
            small.clone(),
            image_volume("/within", "data/within"),
        ];
        for name in ["a", "b"] {
            let name = format!("{name}{handler}");
            // An image's link to the node's /etc ends at the image's own root, where there is none.
            let without_out = script.replace("busybox ls /out | wc -l; ", "");
            let mounts = mounts.clone();
            let said = output(&mut node, &pod, &name, &without_out, |c| c.mounts = mounts).await?;
            assert_eq!(said, "newnewtextnew\ndeep out within /small/bin/busybox\n3\n", "{name}");
        }
        for (name, sub_path) in [("missing", "no/such"), ("out", "data/out")] {
            let name = format!("{name}{handler}");
            let mount = image_volume("/out", sub_path);
            let id = node.create_with(&pod, &name, "true", |c| c.mounts = vec![mount]).await?;
            let start = StartContainerRequest { container_id: id };
            let refused = node.runtime.start_container(start).await.unwrap_err();
            assert!(refused.message().contains(sub_path), "{refused}");
        }
        let remove = RemovePodSandboxRequest { pod_sandbox_id: pod.0.clone() };
        node.runtime.remove_pod_sandbox(remove).await?;
    }

    // One that runs keeps the image, also over a crash, and gives it up when it is removed.
    let pod = node.sandbox(NamespaceMode::Container).await?;
    let mounts = vec![image_volume("/v", "")];
    let id = node.create_with(&pod, "keeps", "exec sleep 1000", |c| c.mounts = mounts).await?;
    node.runtime.start_container(StartContainerRequest { container_id: id.clone() }).await?;
    node.restart().await?;
    assert_eq!(inside(&mut node, &id, "cat /v/plain").await?, "text");
    assert!(!node.shell("cat /proc/self/mountinfo")?.contains("/images/"), "mounts on the node");
    let mut images = ImageServiceClient::new(node::connect(node.root.path()).await?);
    let named = |name: &str| RemoveImageRequest {
        image: Some(ImageSpec { image: name.into(), ..Default::default() }),
    };
    let refused = images.remove_image(named("localhost/volume:1")).await.unwrap_err();
    assert!(refused.message().contains(&id[..12]), "{refused}");
    let status = node.status(&id).await?;
    assert_eq!(
        status.mounts[0].image.as_ref().map(|i| &i.image),
        Some(&id_of["localhost/volume:1"])
    );
    let remove = RemovePodSandboxRequest { pod_sandbox_id: pod.0.clone() };
    node.runtime.remove_pod_sandbox(remove).await?;
    images.remove_image(named("localhost/volume:1")).await?;
    let pod = node.sandbox(NamespaceMode::Container).await?;
    let mounts = vec![image_volume("/v", "")];
    let refused = node.create_with(&pod, "late", "true", |c| c.mounts = mounts).await.unwrap_err();
    assert!(refused.to_string().contains("pull it first"), "{refused}");
    Ok(())
}

#[tokio::test]
async fn mounts_propagate_as_far_as_a_volume_asks() -> anyhow::Result<()> {
    let mut node = Node::start().await?;
    let root = node.root.path().to_path_buf();
    let here = root.display();
    let shared = format!("{here}/shared");
    node.shell(&format!(
        "mkdir {shared} {here}/private; mount -t tmpfs t {shared}; mount --make-shared {shared}; \
         mkdir {shared}/late {shared}/own; mount -t tmpfs p {here}/private"
    ))?;
    for (at, handler) in ["", "runc"].into_iter().enumerate() {
        let mut pod = node.sandbox_with(NamespaceMode::Container, handler).await?;
        // As the pod of a privileged container.
        let linux = pod.1.linux.get_or_insert_default();
        linux.security_context.get_or_insert_default().privileged = true;
        let with = |path: &str, propagation: MountPropagation| Mount {
            propagation: propagation as i32,
            ..volume(&shared, path)
        };
        let mounts = vec![
            with("/private", MountPropagation::PropagationPrivate),
            with("/slave", MountPropagation::PropagationHostToContainer),
        ];
        let name = format!("reads{handler}");
        let reads = node.create_with(&pod, &name, "exec sleep 1000", |c| c.mounts = mounts).await?;
        let mounts = vec![
            with("/both", MountPropagation::PropagationBidirectional),
            with("/private", MountPropagation::PropagationPrivate),
        ];
        let name = format!("mounts{handler}");
        let change = |config: &mut ContainerConfig| {
            config.mounts = mounts;
            security(config).privileged = true;
        };
        let both = node.create_with(&pod, &name, "exec sleep 1000", change).await?;
        for id in [&reads, &both] {
            let start = StartContainerRequest { container_id: id.clone() };
            node.runtime.start_container(start).await?;
        }
        node.shell(&format!("mount -t tmpfs late {shared}/late; echo {at} > {shared}/late/file"))?;
        assert_eq!(inside(&mut node, &reads, "cat /slave/late/file").await?, format!("{at}\n"));
        let hidden = inside(&mut node, &reads, "busybox ls /private/late").await?;
        assert_eq!(hidden, "", "a private volume takes what the node mounts ({handler:?})");
        inside(&mut node, &both, "busybox mount -t tmpfs own /both/own; echo x > /both/own/file")
            .await?;
        assert_eq!(node.shell(&format!("cat {shared}/own/file"))?, "x\n");
        assert_eq!(inside(&mut node, &reads, "cat /slave/own/file").await?, "x\n");
        assert_eq!(inside(&mut node, &both, "busybox ls /private/own").await?, "");
        node.shell(&format!("umount {shared}/own {shared}/late"))?;
        for (propagation, kind) in [
            (MountPropagation::PropagationBidirectional, "not a shared mount"),
            (MountPropagation::PropagationHostToContainer, "not a shared or slave mount"),
        ] {
            let mount = Mount {
                propagation: propagation as i32,
                ..volume(&format!("{here}/private"), "/v")
            };
            let refused = node.create_with(&pod, "refused", "true", |c| c.mounts = vec![mount]);
            let refused = refused.await.unwrap_err().to_string();
            assert!(refused.contains(kind), "{refused}");
        }
        let remove = RemovePodSandboxRequest { pod_sandbox_id: pod.0.clone() };
        node.runtime.remove_pod_sandbox(remove).await?;
    }
    Ok(())
}

#[tokio::test]
async fn volumes_of_every_shape() -> anyhow::Result<()> {
    let mut node = Node::start().await?;
    let root = node.root.path().to_path_buf();
    let here = root.display();
    let layer = vec![
        Entry::Link("escape", "../../../../../../../../../../../../tmp"),
        Entry::Link("inner", "etc/target"),
        Entry::File("etc/target/old", "of the image"),
    ];
    node.add_image("localhost/links:1", &[layer]).await?;
    node.shell(&format!(
        "mkdir -p {here}/v/sub; echo one > {here}/one; ln -s {here}/v {here}/link; \
         mount -t tmpfs t {here}/v/sub"
    ))?;
    let read_only = |recursive| Mount {
        readonly: true,
        recursive_read_only: recursive,
        ..volume(&format!("{here}/v"), if recursive { "/rro" } else { "/ro" })
    };
    let mounts = vec![
        read_only(false),
        read_only(true),
        volume(&format!("{here}/one"), "/file/at/one"),
        volume(&format!("{here}/missing/here"), "/missing"),
        volume(&format!("{here}/link"), "/linked"),
        volume(&format!("{here}/v"), "/escape/spec-test"),
        volume(&format!("{here}/v"), "/inner"),
        volume(&format!("{here}/one"), "/etc/hosts"),
    ];
    let script = "w() { (echo x > $1/w) 2>/dev/null && echo w || echo -; }; \
        w /ro; w /ro/sub; w /rro; w /rro/sub; cat /file/at/one /etc/hosts; w /missing; \
        busybox ls /linked /inner | tr '\\n' ' '";
    for handler in ["", "runc"] {
        let pod = node.sandbox_with(NamespaceMode::Container, handler).await?;
        let mounts = mounts.clone();
        let said = output(&mut node, &pod, &format!("c{handler}"), script, |config| {
            config.image =
                Some(ImageSpec { image: "localhost/links:1".into(), ..Default::default() });
            config.mounts = mounts;
        })
        .await?;
        let expected = "-\nw\n-\n-\none\none\nw\n/inner: sub  /linked: sub ";
        assert_eq!(said.trim_end(), expected.trim_end(), "handler {handler:?}");
        assert!(root.join("missing/here/w").exists());
        assert!(!std::path::Path::new("/tmp/spec-test").exists(), "an image's link led out");
        let remove = RemovePodSandboxRequest { pod_sandbox_id: pod.0.clone() };
        node.runtime.remove_pod_sandbox(remove).await?;
    }
    Ok(())
}

#[tokio::test]
async fn volumes_that_an_image_declares_are_the_containers_own() -> anyhow::Result<()> {
    let mut node = Node::start().await?;
    let layers = [vec![Entry::File("data/deep/file", "of the image")]];
    let volumes = ["/data", "new/../volume", "/given", "/proc"];
    node.add_declaring("localhost/declaring:1", &layers, &volumes).await?;
    let given = node.root.path().join("given");
    fs::create_dir(&given)?;
    fs::write(given.join("file"), "of the pod")?;
    let host = given.display().to_string();
    let declaring = move |config: &mut ContainerConfig| {
        let name = "localhost/declaring:1".to_owned();
        config.image = Some(ImageSpec { image: name, ..Default::default() });
        config.mounts.push(volume(&host, "/given"));
        security(config).readonly_rootfs = true;
    };
    let script = "cat /data/deep/file /given/file; echo; \
        for f in /data/deep/file /new/volume/x /x; do echo changed 2>/dev/null > $f || echo no $f; done; \
        cat /data/deep/file; [ -e /proc/self/status ] && echo proc";
    let expected = "of the imageof the pod\nno /x\nchanged\nproc\n";
    let pod = node.sandbox(NamespaceMode::Container).await?;
    // Each has its own, under an OCI runtime's program too.
    for name in ["first", "second"] {
        let said = output(&mut node, &pod, name, script, declaring.clone()).await?;
        assert_eq!(said, expected, "{name}");
    }
    let pod = node
        .sandbox_of(
            "by-runc",
            NamespaceOption {
                network: NamespaceMode::Node as i32,
                pid: NamespaceMode::Container as i32,
                ..Default::default()
            },
            "runc",
            |_| {},
        )
        .await?;
    assert_eq!(output(&mut node, &pod, "runc", script, declaring).await?, expected);
    for sandbox in
        node.runtime.list_pod_sandbox(ListPodSandboxRequest::default()).await?.into_inner().items
    {
        let request = RemovePodSandboxRequest { pod_sandbox_id: sandbox.id };
        node.runtime.remove_pod_sandbox(request).await?;
    }
    assert_eq!(node.leftovers(), Vec::<std::path::PathBuf>::new());
    Ok(())
}

#[tokio::test]
async fn what_could_never_start_is_not_created() -> anyhow::Result<()> {
    let mut node = Node::start().await?;
    let pod = node.sandbox(NamespaceMode::Container).await?;
    let device = |config: &mut ContainerConfig| {
        config.devices = vec![Device { host_path: "/dev/absent".into(), ..Default::default() }];
    };
    let target = |config: &mut ContainerConfig| {
        security(config).namespace_options = Some(NamespaceOption {
            pid: NamespaceMode::Target as i32,
            target_id: "absent".into(),
            ..Default::default()
        });
    };
    let profile = |config: &mut ContainerConfig| {
        security(config).seccomp = Some(SecurityProfile {
            profile_type: security_profile::ProfileType::Localhost as i32,
            localhost_ref: "/absent.json".into(),
        });
    };
    let refused = [
        node.create_with(&pod, "d", "true", device).await,
        node.create_with(&pod, "t", "true", target).await,
        node.create_with(&pod, "p", "true", profile).await,
    ];
    for refused in refused {
        assert!(refused.unwrap_err().to_string().contains("absent"));
    }
    let left = node.runtime.list_containers(ListContainersRequest::default()).await?;
    assert_eq!(left.into_inner().containers, []);
    Ok(())
}

#[tokio::test]
async fn what_does_not_start_has_exited_and_says_why() -> anyhow::Result<()> {
    let mut node = Node::start().await?;
    let pod = node.sandbox(NamespaceMode::Container).await?;
    let target = node.run(&pod, "target", "exec sleep 1000").await?;
    let beside = |config: &mut ContainerConfig| {
        security(config).namespace_options = Some(NamespaceOption {
            pid: NamespaceMode::Target as i32,
            target_id: target.clone(),
            ..Default::default()
        });
    };
    let id = node.create_with(&pod, "late", "true", beside).await?;
    let stop = StopContainerRequest { container_id: target.clone(), timeout: 0 };
    node.runtime.stop_container(stop).await?;
    let start = StartContainerRequest { container_id: id.clone() };
    let refused = node.runtime.start_container(start).await.unwrap_err();
    assert_eq!(refused.code(), tonic::Code::FailedPrecondition);
    let status = node.exited(&id).await?;
    assert_eq!((status.exit_code, status.reason.as_str()), (128, "StartError"));
    assert_eq!(status.message, refused.message());
    Ok(())
}

#[tokio::test]
async fn calls_that_name_nothing_are_refused() -> anyhow::Result<()> {
    let mut node = Node::start().await?;
    let pod = node.sandbox(NamespaceMode::Container).await?;
    let id = node.create(&pod, "c", "exec sleep 1000").await?;
    let runtime = &mut node.runtime;
    let refused = [
        runtime.stop_container(StopContainerRequest::default()).await.unwrap_err(),
        runtime.remove_container(RemoveContainerRequest::default()).await.unwrap_err(),
        runtime.stop_pod_sandbox(StopPodSandboxRequest::default()).await.unwrap_err(),
        runtime.remove_pod_sandbox(RemovePodSandboxRequest::default()).await.unwrap_err(),
    ];
    assert_eq!(refused.map(|e| e.code()), [tonic::Code::InvalidArgument; 4]);
    let gone = RemoveContainerRequest { container_id: "f".repeat(64) };
    runtime.remove_container(gone).await?;
    assert_eq!(node.status(&id).await?.state(), ContainerState::ContainerCreated);
    Ok(())
}

#[tokio::test]
async fn what_a_container_may_do() -> anyhow::Result<()> {
    let mut node = Node::start().await?;
    let mut pod = node.sandbox(NamespaceMode::Container).await?;
    let privileged = |config: &mut ContainerConfig| security(config).privileged = true;
    let refused = node.create_with(&pod, "p", "true", privileged).await.unwrap_err();
    assert!(refused.to_string().contains("privileged sandbox"), "{refused}");
    pod.1.linux.get_or_insert_default().security_context.get_or_insert_default().privileged = true;

    let script = "busybox ls /dev/loop-control >/dev/null 2>&1 && echo devices; \
        grep -q ' /sys sysfs rw' /proc/mounts && echo sys; \
        grep -q '^Seccomp:.0' /proc/self/status && echo open; \
        busybox mount -t tmpfs t /proc/acpi 2>/dev/null || busybox mount -t tmpfs t /mnt 2>/dev/null || \
        { mkdir -p /m; busybox mount -t tmpfs t /m; } && echo mounts";
    let said = output(&mut node, &pod, "privileged", script, privileged).await?;
    assert!(said.contains("sys\nopen\nmounts\n"), "{said}");

    let layers = [vec![Entry::File("plain/file", "text"), Entry::Link("link", "plain")]];
    node.add_image("localhost/linked:1", &layers).await?;
    let masked = |config: &mut ContainerConfig| {
        config.image = Some(ImageSpec { image: "localhost/linked:1".into(), ..Default::default() });
        let security = security(config);
        security.masked_paths =
            vec!["/proc/interrupts".into(), "/sys/firmware".into(), "/link/file".into()];
        security.readonly_paths = vec!["/proc/sys".into()];
        security.readonly_rootfs = true;
        security.no_new_privs = true;
    };
    let script = "cat /proc/interrupts | wc -c; busybox ls /sys/firmware | wc -l; cat /link/file | wc -c; \
        grep -E '^Sig(Ign|Blk):' /proc/self/status | tr '\\t\\n' '  '; \
        echo x 2>/dev/null > /proc/sys/kernel/sem || echo ro-sys; \
        echo x 2>/dev/null > /x || echo ro-root; \
        grep -E '^(NoNewPrivs|Seccomp):' /proc/self/status | tr '\\t\\n' '  '; \
        busybox unshare -m true 2>/dev/null || echo no-unshare";
    let said = output(&mut node, &pod, "masked", script, masked).await?;
    assert_eq!(
        said,
        "0\n0\n0\nSigBlk: 0000000000000000 SigIgn: 0000000000000000 ro-sys\nro-root\nNoNewPrivs: 1 Seccomp: 2 no-unshare\n"
    );

    // procMount: Unmasked, and an unconfined filter with a capability.
    let unmasked = |config: &mut ContainerConfig| {
        let security = security(config);
        security.seccomp = Some(SecurityProfile {
            profile_type: security_profile::ProfileType::Unconfined as i32,
            ..Default::default()
        });
        security.capabilities = Some(Capability {
            add_capabilities: vec!["SYS_ADMIN".into()],
            drop_capabilities: vec!["ALL".into()],
            add_ambient_capabilities: vec!["NET_ADMIN".into()],
        });
    };
    let script = "head -c1 /proc/interrupts | wc -c; grep -E '^Cap(Bnd|Amb):' /proc/self/status | tr '\\t\\n' '  '; \
        busybox unshare -m true && echo unshared";
    let said = output(&mut node, &pod, "unmasked", script, unmasked).await?;
    let expected = "1\nCapBnd: 0000000000201000 CapAmb: 0000000000001000 unshared\n";
    assert_eq!(said, expected);

    let localhost = node.root.path().join("profile.json");
    fs::write(
        &localhost,
        r#"{"defaultAction": "SCMP_ACT_ALLOW", "archMap": [],
            "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38}]}"#,
    )?;
    let profile = |config: &mut ContainerConfig| {
        security(config).seccomp = Some(SecurityProfile {
            profile_type: security_profile::ProfileType::Localhost as i32,
            localhost_ref: localhost.display().to_string(),
        });
    };
    let said = output(&mut node, &pod, "localhost", "mkdir /d 2>&1 || true", profile).await?;
    assert!(said.contains("Function not implemented"), "{said}");

    let device = |config: &mut ContainerConfig| {
        let device = |path: &str, permissions: &str| Device {
            container_path: path.into(),
            host_path: "/dev/loop-control".into(),
            permissions: permissions.into(),
        };
        config.devices = vec![device("/dev/mine", "r")];
    };
    if std::path::Path::new("/dev/loop-control").exists() {
        let script = "head -c0 /dev/mine && echo r; (echo > /dev/mine) 2>/dev/null || echo not-w";
        let said = output(&mut node, &pod, "device", script, device).await?;
        assert_eq!(said, "r\nnot-w\n");
    }
    Ok(())
}

#[tokio::test]
async fn who_a_container_is() -> anyhow::Result<()> {
    let mut node = Node::start().await?;
    let passwd = "root:x:0:0::/root:/bin/sh\nweb:x:1000:1001::/home/web:/bin/sh\n";
    let layer = vec![
        Entry::File("etc/passwd", passwd),
        Entry::File("etc/group", "www:x:1001:\nextra:x:2000:web\n"),
    ];
    node.add_image("localhost/users:1", &[layer]).await?;
    let pod = node.sandbox(NamespaceMode::Container).await?;
    let script = "id -u; id -G; echo $HOME; busybox stat -c '%u %g' /work/here";
    let number = |value| Some(Int64Value { value });
    type Change = Box<dyn FnOnce(&mut LinuxContainerSecurityContext)>;
    let cases: [(&str, Change, &str); 4] = [
        (
            "name",
            Box::new(|s| s.run_as_username = "web".into()),
            "1000\n1001 2000\n/home/web\n1000 1001\n",
        ),
        (
            "strict",
            Box::new(move |s| {
                s.run_as_user = number(1000);
                s.supplemental_groups = vec![77];
                s.supplemental_groups_policy = SupplementalGroupsPolicy::Strict as i32;
            }),
            "1000\n1001 77\n/home/web\n1000 1001\n",
        ),
        (
            "merge",
            Box::new(move |s| {
                s.run_as_user = number(1000);
                s.run_as_group = number(5);
                s.supplemental_groups = vec![77];
            }),
            "1000\n5 77 2000\n/home/web\n1000 5\n",
        ),
        ("unknown", Box::new(move |s| s.run_as_user = number(4242)), "4242\n0\n/\n4242 0\n"),
    ];
    for (name, change, expected) in cases {
        let said = output(&mut node, &pod, name, script, |config| {
            config.image =
                Some(ImageSpec { image: "localhost/users:1".into(), ..Default::default() });
            change(security(config));
        })
        .await?;
        assert_eq!(said, expected, "{name}");
    }
    let list = ListContainersRequest::default();
    let all = node.runtime.list_containers(list).await?.into_inner().containers;
    let merged = all.iter().find(|c| c.metadata.as_ref().is_some_and(|m| m.name == "merge"));
    let status = node.status(&merged.context("not listed")?.id.clone()).await?;
    let user = status.user.and_then(|u| u.linux).unwrap_or_default();
    assert_eq!((user.uid, user.gid, user.supplemental_groups), (1000, 5, vec![5, 2000, 77]));
    Ok(())
}

#[tokio::test]
async fn limits_are_set_changed_and_remembered() -> anyhow::Result<()> {
    let mut node = Node::start().await?;
    let mut pod = node.sandbox(NamespaceMode::Container).await?;
    let limited = |config: &mut ContainerConfig| {
        *resources(config) = LinuxContainerResources {
            cpu_period: 100_000,
            cpu_quota: 50_000,
            cpu_shares: 512,
            memory_limit_in_bytes: 64 << 20,
            oom_score_adj: 500,
            cpuset_cpus: "0".into(),
            ..Default::default()
        };
    };
    let id = node.create_with(&pod, "c", "exec sleep 1000", limited).await?;
    node.runtime.start_container(StartContainerRequest { container_id: id.clone() }).await?;
    let v2 = std::path::Path::new("/sys/fs/cgroup/cgroup.controllers").exists();
    let read = if v2 {
        "cd /sys/fs/cgroup; cat cpu.max cpu.weight memory.max cpuset.cpus; cat /proc/1/oom_score_adj"
    } else {
        "cd /sys/fs/cgroup; cat cpu/cpu.cfs_quota_us cpu/cpu.shares memory/memory.limit_in_bytes \
         cpuset/cpuset.cpus; cat /proc/1/oom_score_adj"
    };
    let (quota, more) = if v2 { ("50000 100000", "70000 100000") } else { ("50000", "70000") };
    let weight = |shares: &'static str, weight: &'static str| if v2 { weight } else { shares };
    let seen = inside(&mut node, &id, read).await?;
    assert_eq!(seen, format!("{quota}\n{}\n{}\n0\n500\n", weight("512", "59"), 64 << 20));
    let update = UpdateContainerResourcesRequest {
        container_id: id.clone(),
        linux: Some(LinuxContainerResources {
            cpu_period: 100_000,
            cpu_quota: 70_000,
            cpu_shares: 1024,
            memory_limit_in_bytes: 128 << 20,
            ..Default::default()
        }),
        ..Default::default()
    };
    node.runtime.update_container_resources(update).await?;
    let seen = inside(&mut node, &id, read).await?;
    assert_eq!(seen, format!("{more}\n{}\n{}\n0\n500\n", weight("1024", "100"), 128 << 20));
    node.restart().await?;
    let status = node.status(&id).await?;
    let now = status.resources.and_then(|r| r.linux).unwrap_or_default();
    let shown = (now.cpu_quota, now.memory_limit_in_bytes, now.oom_score_adj, now.cpuset_cpus);
    assert_eq!(shown, (70_000, 128 << 20, 500, "0".to_owned()));

    if !v2 {
        let unified = |config: &mut ContainerConfig| {
            resources(config).unified.insert("memory.high".into(), "1048576".into());
        };
        let refused = node.create_with(&pod, "u", "true", unified).await.unwrap_err();
        assert!(refused.to_string().contains("cgroup v2"), "{refused}");
    }

    // A pod's own: remembered over a restart, and set where the cgroup is the shim's.
    pod.1.linux.get_or_insert_default().cgroup_parent.clear();
    pod.1.metadata.get_or_insert_default().attempt = 1;
    let request = RunPodSandboxRequest { config: Some(pod.1.clone()), ..Default::default() };
    let own = node.runtime.run_pod_sandbox(request).await?.into_inner().pod_sandbox_id;
    let update = UpdatePodSandboxResourcesRequest {
        pod_sandbox_id: own.clone(),
        resources: Some(LinuxContainerResources {
            memory_limit_in_bytes: 96 << 20,
            ..Default::default()
        }),
        overhead: Some(LinuxContainerResources { cpu_shares: 7, ..Default::default() }),
    };
    node.runtime.update_pod_sandbox_resources(update).await?;
    let file = if v2 {
        format!("/sys/fs/cgroup/longshore/{own}/memory.max")
    } else {
        format!("/sys/fs/cgroup/memory/longshore/{own}/memory.limit_in_bytes")
    };
    assert_eq!(fs::read_to_string(file)?.trim(), (96 << 20).to_string());
    node.restart().await?;
    let request = PodSandboxStatusRequest { pod_sandbox_id: own.clone(), verbose: true };
    let info = node.runtime.pod_sandbox_status(request).await?.into_inner().info;
    let info: serde_json::Value = serde_json::from_str(&info["info"])?;
    let linux = &info["config"]["linux"];
    assert_eq!(linux["resources"]["memory_limit_in_bytes"], 96 << 20);
    assert_eq!(linux["overhead"]["cpu_shares"], 7);
    let remove = RemovePodSandboxRequest { pod_sandbox_id: own };
    node.runtime.remove_pod_sandbox(remove).await?;
    Ok(())
}

#[tokio::test]
async fn sysctls_are_the_pods_own_or_refused() -> anyhow::Result<()> {
    let mut node = Node::start().await?;
    let pod = node.sandbox(NamespaceMode::Container).await?;
    let with = |name: &str, value: &str, attempt| {
        let mut config = pod.1.clone();
        config.metadata.get_or_insert_default().attempt = attempt;
        let linux = config.linux.get_or_insert_default();
        linux.sysctls.insert(name.to_owned(), value.to_owned());
        RunPodSandboxRequest { config: Some(config), ..Default::default() }
    };
    let before = fs::read_to_string("/proc/sys/kernel/msgmax")?;
    let request = with("kernel.msgmax", "12345", 1);
    let config = request.config.clone().unwrap_or_default();
    let id = node.runtime.run_pod_sandbox(request).await?.into_inner().pod_sandbox_id;
    let script = "cat /proc/sys/kernel/msgmax";
    assert_eq!(output(&mut node, &(id, config), "c", script, |_| {}).await?, "12345\n");
    assert_eq!(fs::read_to_string("/proc/sys/kernel/msgmax")?, before);
    for name in ["net.core.somaxconn", "vm.swappiness", "kernel.hostname"] {
        let refused = node.runtime.run_pod_sandbox(with(name, "1", 2)).await.unwrap_err();
        assert_eq!(refused.code(), tonic::Code::InvalidArgument, "{refused}");
        assert!(refused.message().contains(name), "{refused}");
    }
    Ok(())
}

#[tokio::test]
async fn a_pod_with_its_own_network_may_bind_low_ports_and_set_its_sysctls() -> anyhow::Result<()> {
    let mut node = Node::start_networked().await?;
    let options = NamespaceOption { pid: NamespaceMode::Container as i32, ..Default::default() };
    let pod = node
        .sandbox_of("pod", options, "", |linux| {
            linux.sysctls.insert("net.core.somaxconn".into(), "77".into());
            linux.sysctls.insert("net/ipv4/conf/lo/forwarding".into(), "1".into());
        })
        .await?;
    let script = "cd /proc/sys/net; cat ipv4/ip_unprivileged_port_start ipv4/ping_group_range \
        core/somaxconn ipv4/conf/lo/forwarding | tr '\\t' ' '; id -u";
    let user = |config: &mut ContainerConfig| {
        security(config).run_as_user = Some(Int64Value { value: 1000 });
    };
    let said = output(&mut node, &pod, "c", script, user).await?;
    assert_eq!(said, "0\n0 2147483647\n77\n1\n1000\n");
    Ok(())
}

#[tokio::test]
async fn a_container_is_asked_to_stop_by_its_own_signal() -> anyhow::Result<()> {
    let mut node = Node::start().await?;
    let pod = node.sandbox(NamespaceMode::Container).await?;
    let script =
        "trap 'exit 5' USR2; trap 'exit 6' TERM; echo ready; while true; do sleep 0.1; done";
    let change = |config: &mut ContainerConfig| config.stop_signal = Signal::Sigusr2 as i32;
    let id = node.create_with(&pod, "c", script, change).await?;
    node.runtime.start_container(StartContainerRequest { container_id: id.clone() }).await?;
    until("ready", || node.log("c").contains("ready")).await?;
    let stop = StopContainerRequest { container_id: id.clone(), timeout: 30 };
    node.runtime.stop_container(stop).await?;
    let status = node.status(&id).await?;
    assert_eq!((status.exit_code, status.stop_signal()), (5, Signal::Sigusr2));
    Ok(())
}
