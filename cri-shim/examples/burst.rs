//! Times sandboxes and containers over a CRI socket, one by one and all at once.
//!
//! `burst SOCKET IMAGE COUNT [pod|node]` makes COUNT pods of one `sleep` container, prints the
//! median of each verb and the time for all of them at once, and removes them again.

use std::time::{Duration, Instant};

use cri_shim::api::runtime_service_client::RuntimeServiceClient;
use cri_shim::api::*;
use tonic::transport::{Channel, Endpoint, Uri};

#[derive(Clone)]
struct Bench {
    runtime: RuntimeServiceClient<Channel>,
    image: String,
    network: NamespaceMode,
}

#[derive(Default)]
struct Times {
    run: Vec<Duration>,
    create: Vec<Duration>,
    start: Vec<Duration>,
    remove: Vec<Duration>,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [socket, image, count, rest @ ..] = arguments.as_slice() else {
        anyhow::bail!("usage: burst SOCKET IMAGE COUNT [pod|node]");
    };
    let count: usize = count.parse()?;
    let network = match rest.first().map(String::as_str) {
        Some("pod") => NamespaceMode::Pod,
        _ => NamespaceMode::Node,
    };
    let path = socket.clone();
    let connector = tower::service_fn(move |_: Uri| {
        let path = path.clone();
        async move {
            let stream = tokio::net::UnixStream::connect(path).await?;
            Ok::<_, std::io::Error>(hyper_util::rt::TokioIo::new(stream))
        }
    });
    let channel =
        Endpoint::from_static("http://cri.local").connect_with_connector(connector).await?;
    let runtime = RuntimeServiceClient::new(channel);
    let bench = Bench { runtime, image: image.clone(), network };

    let mut times = Times::default();
    for n in 0..count {
        let id = bench.clone().pod(n, 0, &mut times).await?;
        let begin = Instant::now();
        bench.clone().remove(&id).await?;
        times.remove.push(begin.elapsed());
    }
    report("one by one", &mut times);

    let begin = Instant::now();
    let pods = (0..count).map(|n| {
        let bench = bench.clone();
        tokio::spawn(async move {
            let mut times = Times::default();
            bench.pod(n, 1, &mut times).await.map(|id| (id, times))
        })
    });
    let mut all = Times::default();
    let mut ids = Vec::new();
    for pod in pods.collect::<Vec<_>>() {
        let (id, times) = pod.await??;
        ids.push(id);
        all.run.extend(times.run);
        all.create.extend(times.create);
        all.start.extend(times.start);
    }
    let took = begin.elapsed();
    let begin = Instant::now();
    let removals = ids.into_iter().map(|id| {
        let bench = bench.clone();
        tokio::spawn(async move { bench.remove(&id).await })
    });
    for removal in removals.collect::<Vec<_>>() {
        removal.await??;
    }
    report("at once", &mut all);
    #[allow(clippy::print_stdout, reason = "a benchmark's result")]
    {
        println!("{count} pods at once: up in {took:?}, gone in {:?}", begin.elapsed());
    }
    Ok(())
}

impl Bench {
    async fn pod(mut self, n: usize, round: usize, times: &mut Times) -> anyhow::Result<String> {
        let options =
            NamespaceOption { network: self.network as i32, pid: 1, ..Default::default() };
        let config = PodSandboxConfig {
            metadata: Some(PodSandboxMetadata {
                name: format!("burst-{n}"),
                namespace: "default".into(),
                uid: format!("burst-{round}-{n}"),
                attempt: 0,
            }),
            hostname: format!("burst-{n}"),
            linux: Some(LinuxPodSandboxConfig {
                security_context: Some(LinuxSandboxSecurityContext {
                    namespace_options: Some(options.clone()),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        };
        let begin = Instant::now();
        let request = RunPodSandboxRequest { config: Some(config.clone()), ..Default::default() };
        let id = self.runtime.run_pod_sandbox(request).await?.into_inner().pod_sandbox_id;
        times.run.push(begin.elapsed());
        let container = ContainerConfig {
            metadata: Some(ContainerMetadata { name: "sleep".into(), attempt: 0 }),
            image: Some(ImageSpec { image: self.image.clone(), ..Default::default() }),
            command: vec!["sleep".into(), "1000".into()],
            linux: Some(LinuxContainerConfig {
                security_context: Some(LinuxContainerSecurityContext {
                    namespace_options: Some(options),
                    seccomp: std::env::var_os("SECCOMP").map(|_| SecurityProfile::default()),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        };
        let begin = Instant::now();
        let request = CreateContainerRequest {
            pod_sandbox_id: id.clone(),
            config: Some(container),
            sandbox_config: Some(config),
        };
        let container_id = self.runtime.create_container(request).await?.into_inner().container_id;
        times.create.push(begin.elapsed());
        let begin = Instant::now();
        self.runtime.start_container(StartContainerRequest { container_id }).await?;
        times.start.push(begin.elapsed());
        Ok(id)
    }

    async fn remove(mut self, id: &str) -> anyhow::Result<()> {
        let stop = StopPodSandboxRequest { pod_sandbox_id: id.to_owned() };
        self.runtime.stop_pod_sandbox(stop).await?;
        let remove = RemovePodSandboxRequest { pod_sandbox_id: id.to_owned() };
        self.runtime.remove_pod_sandbox(remove).await?;
        Ok(())
    }
}

#[allow(clippy::print_stdout, reason = "a benchmark's result")]
fn report(title: &str, times: &mut Times) {
    let all = [
        ("RunPodSandbox", &mut times.run),
        ("CreateContainer", &mut times.create),
        ("StartContainer", &mut times.start),
        ("Stop+RemovePodSandbox", &mut times.remove),
    ];
    println!("{title}:");
    for (verb, samples) in all {
        samples.sort();
        if let (Some(median), Some(last)) = (samples.get(samples.len() / 2), samples.last()) {
            println!("  {verb:24} p50 {median:?} max {last:?}");
        }
    }
}
