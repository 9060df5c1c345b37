//! The fate of packets, read off real connections: who answers, whom the answerer saw, or how the
//! connection fails.

use std::collections::{BTreeMap, BTreeSet};
use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::io::AsyncReadExt;
use tokio::net::{TcpSocket, UdpSocket};
use tokio::sync::Semaphore;
use tokio::time::timeout;

use crate::net::{Net, Place, runtime};
use crate::sctp::Heard;

/// Nobody who answers takes so long, but for a SYN that comes again after a second.
const PATIENCE: Duration = Duration::from_millis(1400);
/// With three endpoints one is missed in five of a thousand looks; what differs is looked at again.
const TRIES: usize = 16;
/// Connections at once from a place.
const AT_ONCE: usize = 200;

/// A protocol with ports.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[allow(missing_docs, reason = "they are what they are called")]
pub enum Transport {
    Tcp,
    Udp,
    Sctp,
}

/// Where a packet comes from and goes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Target {
    /// From.
    pub place: Place,
    /// By.
    pub by: Transport,
    /// To.
    pub to: SocketAddr,
    /// The Service has affinity: a number that its addresses of one port and family have together.
    /// Two first connections at once could each be given an endpoint.
    pub sticky: Option<u16>,
}

/// What became of packets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fate {
    /// By an ICMP error or a reset.
    Rejected,
    /// Nothing was heard of them.
    Dropped,
    /// Who answered, each with the client's address that it saw; "refused" and "silence" stand for
    /// endpoints that nobody serves at.
    Answered(BTreeSet<String>),
    /// One answered all the time; which, chance decided.
    Sticky(String),
}

/// What was seen of a target.
#[derive(Clone, Debug, Default)]
pub struct Seen {
    answers: BTreeSet<String>,
    tries: usize,
    refused: usize,
    silent: usize,
}

impl Seen {
    /// With what another look saw.
    pub fn and(mut self, other: &Seen) -> Seen {
        self.answers.extend(other.answers.iter().cloned());
        self.tries += other.tries;
        self.refused += other.refused;
        self.silent += other.silent;
        self
    }

    /// What it comes to.
    pub fn fate(&self, target: &Target) -> Fate {
        // A busy machine loses a packet now and then.
        let often = |count: usize| count * 10 >= self.tries;
        if self.answers.is_empty() {
            return if self.refused > 0 { Fate::Rejected } else { Fate::Dropped };
        }
        if target.sticky.is_some() && self.answers.len() == 1 {
            let answer = self.answers.first().map_or("", String::as_str);
            // A pod that chance leads to itself is masqueraded.
            let client = answer.split_once(' ').filter(|_| target.place != Place::Pod);
            return Fate::Sticky(client.map_or("", |(_, client)| client).to_owned());
        }
        let mut answers = self.answers.clone();
        answers.extend(often(self.refused).then(|| "refused".to_owned()));
        answers.extend(often(self.silent).then(|| "silence".to_owned()));
        Fate::Answered(answers)
    }
}

enum Try {
    Answer(String),
    Refused,
    Silence,
}

async fn ask_tcp(target: &Target, source: Option<IpAddr>) -> std::io::Result<Vec<u8>> {
    let socket = if target.to.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    if let Some(source) = source {
        socket.bind((source, 0).into())?;
    }
    socket.set_zero_linger()?;
    let mut stream = socket.connect(target.to).await?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await?;
    Ok(answer)
}

async fn ask_udp(net: &Net, target: &Target, source: Option<IpAddr>) -> std::io::Result<Vec<u8>> {
    let any: IpAddr = if target.to.is_ipv4() { [0; 4].into() } else { [0; 16].into() };
    let socket = loop {
        let port = net.fresh.fetch_add(1, Ordering::Relaxed).max(1024);
        match UdpSocket::bind((source.unwrap_or(any), port)).await {
            Err(error) if error.kind() == ErrorKind::AddrInUse => {}
            other => break other?,
        }
    };
    socket.connect(target.to).await?;
    // What is rejected on its way out fails at once; the answer to it tells it from a drop.
    let _ = socket.send(b"?").await;
    let mut buffer = vec![0; 100];
    let len = socket.recv(&mut buffer).await?;
    buffer.truncate(len);
    Ok(buffer)
}

async fn ask(net: &Net, target: &Target) -> Try {
    let source = target.place.source(target.to.is_ipv4());
    let asked = async {
        match target.by {
            Transport::Tcp => ask_tcp(target, source).await,
            Transport::Udp => ask_udp(net, target, source).await,
            Transport::Sctp => {
                match net.sctp(target.place).ask(&net.fresh, source, target.to).await {
                    Heard::Answer(text) => Ok(text.into_bytes()),
                    Heard::Refused => Err(ErrorKind::ConnectionRefused.into()),
                }
            }
        }
    };
    match timeout(PATIENCE, asked).await {
        Ok(Ok(answer)) if !answer.is_empty() => {
            Try::Answer(String::from_utf8_lossy(&answer).into_owned())
        }
        Ok(Err(error))
            if [ErrorKind::ConnectionRefused, ErrorKind::ConnectionReset]
                .contains(&error.kind()) =>
        {
            Try::Refused
        }
        Ok(_) | Err(_) => Try::Silence,
    }
}

async fn look_from(net: Arc<Net>, targets: Vec<Target>) -> Vec<(Target, Seen)> {
    let permits = Arc::new(Semaphore::new(AT_ONCE));
    let one = |target: Target| {
        let (net, permits) = (net.clone(), permits.clone());
        async move {
            let tries = if target.sticky.is_some() { TRIES / 4 } else { TRIES };
            let mut seen = Seen::default();
            let mut note = |outcome: Try| {
                seen.tries += 1;
                match outcome {
                    Try::Answer(answer) => drop(seen.answers.insert(answer)),
                    Try::Refused => seen.refused += 1,
                    Try::Silence => seen.silent += 1,
                }
                !seen.answers.is_empty()
            };
            let permitted = async || {
                let _permit = permits.acquire().await;
                ask(&net, &target).await
            };
            // Two that nobody answers are enough.
            let mut answered = note(permitted().await);
            if !answered && target.sticky.is_none() {
                answered = note(permitted().await);
            }
            if !answered {
                return (target, seen);
            }
            for _ in 0..tries {
                note(permitted().await);
            }
            (target, seen)
        }
    };
    let mut together: BTreeMap<Option<u16>, Vec<Target>> = BTreeMap::new();
    for target in targets {
        together.entry(target.sticky).or_default().push(target);
    }
    let mut tasks = Vec::new();
    for (sticky, targets) in together {
        let looks = targets.into_iter().map(one);
        if sticky.is_none() {
            tasks.extend(looks.map(|look| tokio::spawn(async { vec![look.await] })));
            continue;
        }
        let looks: Vec<_> = looks.collect();
        tasks.push(tokio::spawn(async {
            let mut all = Vec::new();
            for look in looks {
                all.push(look.await);
            }
            all
        }));
    }
    let mut all = Vec::new();
    for task in tasks {
        all.extend(task.await.expect("a look"));
    }
    all
}

/// Looks at targets, from all places at once.
pub fn look(net: &Arc<Net>, targets: &[Target]) -> Vec<(Target, Seen)> {
    let from = |place: Place| {
        let targets: Vec<Target> = targets.iter().filter(|t| t.place == place).copied().collect();
        let net = net.clone();
        move || {
            net.at(place).enter();
            runtime().block_on(look_from(net, targets))
        }
    };
    let threads: Vec<_> =
        Place::ALL.into_iter().map(|place| std::thread::spawn(from(place))).collect();
    threads.into_iter().flat_map(|thread| thread.join().expect("a place")).collect()
}
