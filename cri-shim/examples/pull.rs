//! Pulls a large image from a registry on loopback by this shim and by containerd, in turns, and
//! prints one table with ratios: `pull SHIM CONTAINERD [ROUNDS] [MB] [LAYERS]`.
//!
//! SHIM is the program `longshore-cri`, CONTAINERD a containerd 1.6 or newer; docker-registry comes
//! from the system. Each round has state folders of its own in `TMPDIR`. Needs root, for the
//! namespaces it works in.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "a tool for developers"
)]
#![allow(dead_code, reason = "the fixture serves the tests")]

#[path = "../tests/images/fixture.rs"]
mod fixture;

use std::{
    fs,
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use cri_shim::api::image_service_client::ImageServiceClient;
use cri_shim::api::{ImageSpec as Wanted, PullImageRequest};
use fixture::{Entry, ImageSpec, Layer, Registry, own_namespaces};
use tonic::transport::{Endpoint, Uri};

/// What one pull took.
#[derive(Clone, Copy)]
struct Figures {
    seconds: f64,
    user: f64,
    system: f64,
    peak_mb: f64,
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [shim, containerd, rest @ ..] = arguments.as_slice() else {
        panic!("usage: pull SHIM CONTAINERD [ROUNDS] [MB] [LAYERS]");
    };
    let number = |at: usize, or: usize| rest.get(at).map_or(or, |text| text.parse().unwrap());
    let (rounds, megabytes, layers) = (number(0, 5), number(1, 300), number(2, 5));
    own_namespaces();
    let registry = Registry::start(None);
    for (tag, zstd) in [("gzip", false), ("zstd", true)] {
        let image = ImageSpec::new(
            (0..layers).map(|n| layer(n, megabytes * 1_000_000 / layers, zstd)).collect(),
        );
        let size = |of: fn(&Layer) -> usize| image.layers.iter().map(of).sum::<usize>() / 1_000_000;
        println!(
            "{layers} layers, {} MB, {} MB as {tag}, {rounds} rounds (median)",
            size(|layer| layer.tar.len()),
            size(|layer| layer.blob.len())
        );
        registry.push("bench", tag, &image);
        let name = registry.name(&format!("bench:{tag}"));
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        for _ in 0..rounds {
            ours.push(measure(&name, |folder| {
                let mut command = Command::new(shim);
                command.arg(folder.join("state")).arg(folder.join("run"));
                (command, folder.join("run/cri.sock"))
            }));
            theirs.push(measure(&name, |folder| {
                let socket = folder.join("run/c.sock");
                let config = folder.join("config.toml");
                fs::write(&config, containerd_config(folder, &socket)).unwrap();
                let mut command = Command::new(containerd);
                command.arg("--config").arg(config);
                (command, socket)
            }));
        }
        print(&ours, &theirs);
    }
}

/// Folders of small files and a few large ones, of bytes that compress as programs do.
fn layer(number: usize, size: usize, zstd: bool) -> Layer {
    let mut random = fastrand::Rng::with_seed(number as u64 + 1);
    let words: Vec<[u8; 16]> = (0..1024).map(|_| std::array::from_fn(|_| random.u8(..))).collect();
    let mut entries = Vec::new();
    let (mut left, mut count) = (size, 0);
    while left > 0 {
        let wanted = if count % 100 == 99 { 2_000_000 } else { random.usize(500..30_000) };
        let length = wanted.min(left);
        let mut data = Vec::with_capacity(length + 16);
        while data.len() < length {
            if random.u8(..5) == 0 {
                data.extend(std::iter::repeat_with(|| random.u8(..)).take(4));
            } else {
                data.extend(words[random.usize(..words.len())]);
            }
        }
        data.truncate(length);
        if count % 50 == 0 {
            entries.push(Entry::Dir(format!("l{number}/d{}", count / 50).leak(), 0o755));
        }
        let path = format!("l{number}/d{}/f{count}", count / 50);
        entries.push(Entry::File(path.leak(), data.leak()));
        left -= length;
        count += 1;
    }
    entries.insert(0, Entry::Dir(format!("l{number}").leak(), 0o755));
    if zstd { Layer::zstd(&entries) } else { Layer::gzip(&entries) }
}

fn containerd_config(folder: &Path, socket: &Path) -> String {
    format!(
        "version = 2\nroot = \"{0}/root\"\nstate = \"{0}/state\"\n\
         disabled_plugins = [\"io.containerd.snapshotter.v1.btrfs\", \
         \"io.containerd.snapshotter.v1.zfs\", \"io.containerd.snapshotter.v1.devmapper\", \
         \"io.containerd.nri.v1.nri\"]\n[grpc]\naddress = \"{1}\"\n\
         [plugins.\"io.containerd.internal.v1.opt\"]\npath = \"{0}/opt\"\n",
        folder.display(),
        socket.display()
    )
}

fn measure(image: &str, command: impl FnOnce(&Path) -> (Command, std::path::PathBuf)) -> Figures {
    let folder = tempfile::tempdir().unwrap();
    fs::create_dir_all(folder.path().join("run")).unwrap();
    let (mut command, socket) = command(folder.path());
    let log = fs::File::create(folder.path().join("log")).unwrap();
    let mut daemon = command.stdout(Stdio::null()).stderr(log).spawn().unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let figures = runtime.block_on(pull(&daemon, &socket, image));
    // SIGTERM, for it to take its mounts down.
    let pid = nix::unistd::Pid::from_raw(i32::try_from(daemon.id()).unwrap());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
    daemon.wait().unwrap();
    let figures = figures.unwrap_or_else(|error| {
        panic!("{error:#}\n{}", fs::read_to_string(folder.path().join("log")).unwrap())
    });
    let _ = nix::mount::umount2(&folder.path().join("run/mnt"), nix::mount::MntFlags::MNT_DETACH);
    // The next round begins with a quiet disk.
    nix::unistd::sync();
    figures
}

async fn pull(daemon: &Child, socket: &Path, image: &str) -> anyhow::Result<Figures> {
    let begun = Instant::now();
    let mut client = loop {
        let path = socket.to_owned();
        let connector = tower::service_fn(move |_: Uri| {
            let path = path.clone();
            async move {
                let stream = tokio::net::UnixStream::connect(path).await?;
                Ok::<_, std::io::Error>(hyper_util::rt::TokioIo::new(stream))
            }
        });
        let endpoint = Endpoint::from_static("http://cri.local");
        if let Ok(channel) = endpoint.connect_with_connector(connector).await {
            let mut client = ImageServiceClient::new(channel);
            // The socket may be there before the service is.
            if client.image_fs_info(cri_shim::api::ImageFsInfoRequest {}).await.is_ok() {
                break client;
            }
        }
        anyhow::ensure!(begun.elapsed() < Duration::from_secs(60), "no CRI at {socket:?}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    };
    let before = cpu(daemon);
    let begun = Instant::now();
    let wanted = Wanted { image: image.to_owned(), ..Default::default() };
    client.pull_image(PullImageRequest { image: Some(wanted), ..Default::default() }).await?;
    let seconds = begun.elapsed().as_secs_f64();
    let status = fs::read_to_string(format!("/proc/{}/status", daemon.id()))?;
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let peak = peak.and_then(|text| text.split_whitespace().next()?.parse::<f64>().ok());
    let [user, system] = std::array::from_fn(|at| cpu(daemon)[at] - before[at]);
    Ok(Figures { seconds, user, system, peak_mb: peak.unwrap_or(0.0) / 1000.0 })
}

/// Seconds of processor time, user and system.
fn cpu(daemon: &Child) -> [f64; 2] {
    let stat = fs::read_to_string(format!("/proc/{}/stat", daemon.id())).unwrap();
    let fields: Vec<_> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
    // The kernel counts in hundredths of a second, on every architecture it shows us.
    [11, 12].map(|at: usize| fields[at].parse::<f64>().unwrap() / 100.0)
}

fn print(ours: &[Figures], theirs: &[Figures]) {
    type Of = fn(&Figures) -> f64;
    let median = |all: &[Figures], of: Of| {
        let mut values: Vec<_> = all.iter().map(of).collect();
        values.sort_by(f64::total_cmp);
        values[values.len() / 2]
    };
    println!("{:<22}{:>10}{:>12}{:>10}", "", "longshore", "containerd", "ratio");
    let rows: [(&str, Of); 4] = [
        ("pull and unpack, s", |f| f.seconds),
        ("processor, user, s", |f| f.user),
        ("processor, system, s", |f| f.system),
        ("peak memory, MB", |f| f.peak_mb),
    ];
    for (name, of) in rows {
        let (own, peer) = (median(ours, of), median(theirs, of));
        println!("{name:<22}{own:>10.2}{peer:>12.2}{:>9.1}x", peer / own.max(1e-9));
    }
}
