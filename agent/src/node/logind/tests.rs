//! Over a message bus of its own, with a logind that answers as systemd's does.

use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};

use zbus::zvariant::Value;

use super::*;

/// What the bus allows: everything.
const BUS_CONFIG: &str = r#"<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig><listen>unix:path=SOCKET</listen><auth>EXTERNAL</auth><policy context="default">
<allow send_destination="*" eavesdrop="true"/><allow eavesdrop="true"/><allow own="*"/></policy></busconfig>"#;

/// A running dbus-daemon.
struct Daemon(Child);

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

async fn start_bus(dir: &Path) -> (Daemon, String) {
    let socket = dir.join("bus");
    let config = dir.join("bus.conf");
    std::fs::write(&config, BUS_CONFIG.replace("SOCKET", &socket.display().to_string())).unwrap();
    let child = Command::new("dbus-daemon")
        .arg(format!("--config-file={}", config.display()))
        .args(["--nofork", "--nopidfile", "--print-address"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("dbus-daemon, of the package dbus-daemon (tests/setup.sh test)");
    let daemon = Daemon(child);
    for _ in 0..1000 {
        if std::os::unix::net::UnixStream::connect(&socket).is_ok() {
            return (daemon, format!("unix:path={}", socket.display()));
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("dbus-daemon does not listen");
}

/// What a logind holds.
#[derive(Default)]
struct Login {
    delay: Duration,
    preparing: bool,
    /// Ends of the locks that it gave out.
    locks: Vec<std::os::unix::net::UnixStream>,
    asked: Vec<(String, String, String)>,
    /// Whether it heeds its drop-ins.
    stubborn: bool,
    reloads: u32,
}

/// logind, and the bit of systemd that reloads it.
#[derive(Clone)]
struct Double {
    login: Arc<Mutex<Login>>,
    drop_ins: PathBuf,
    connection: Connection,
}

impl Double {
    async fn start(bus: &str, drop_ins: &Path, login: Arc<Mutex<Login>>) -> Self {
        let connection = connection::Builder::address(bus).unwrap().build().await.unwrap();
        let double = Self { login, drop_ins: drop_ins.into(), connection: connection.clone() };
        let mut calls = MessageStream::from(&connection);
        connection.request_name(LOGIN).await.unwrap();
        connection.request_name(SYSTEMD).await.unwrap();
        let answering = double.clone();
        tokio::spawn(async move {
            while let Some(Ok(message)) = calls.next().await {
                if message.message_type() == zbus::message::Type::MethodCall {
                    answering.answer(&message).await;
                }
            }
        });
        double
    }

    async fn answer(&self, message: &zbus::Message) {
        let header = message.header();
        let member = header.member().map(|member| member.to_string()).unwrap_or_default();
        let body = message.body();
        match member.as_str() {
            "Get" => {
                let (interface, name): (&str, &str) = body.deserialize().unwrap();
                assert_eq!(interface, "org.freedesktop.login1.Manager");
                let value = {
                    let login = self.login.lock().unwrap();
                    match name {
                        "InhibitDelayMaxUSec" => {
                            Value::U64(u64::try_from(login.delay.as_micros()).unwrap())
                        }
                        "PreparingForShutdown" => Value::Bool(login.preparing),
                        other => panic!("property {other}"),
                    }
                };
                self.connection.reply(&header, &value).await.unwrap();
            }
            "Inhibit" => {
                let (what, who, why, mode): (String, String, String, String) =
                    body.deserialize().unwrap();
                assert!(!why.is_empty());
                if self.login.lock().unwrap().preparing {
                    let name = "org.freedesktop.login1.OperationInProgress";
                    let name = zbus::names::ErrorName::try_from(name).unwrap();
                    self.connection.reply_error(&header, name, &"in progress").await.unwrap();
                    return;
                }
                let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
                ours.set_nonblocking(true).unwrap();
                {
                    let mut login = self.login.lock().unwrap();
                    login.locks.push(ours);
                    login.asked.push((what, who, mode));
                }
                let lock = zbus::zvariant::OwnedFd::from(OwnedFd::from(theirs));
                self.connection.reply(&header, &lock).await.unwrap();
            }
            "KillUnit" => {
                let (unit, who, signal): (&str, &str, i32) = body.deserialize().unwrap();
                assert_eq!((unit, who, signal), ("systemd-logind.service", "all", 1));
                self.reload();
                self.connection.reply(&header, &()).await.unwrap();
            }
            other => panic!("call of {other}"),
        }
    }

    fn reload(&self) {
        let text = std::fs::read_to_string(self.drop_ins.join("99-kubelet.conf")).unwrap();
        let set = text.lines().find_map(|line| line.strip_prefix("InhibitDelayMaxSec="));
        assert!(text.contains("[Login]\n"), "{text}");
        let mut login = self.login.lock().unwrap();
        login.reloads += 1;
        if !login.stubborn {
            login.delay = Duration::from_secs(set.unwrap().parse().unwrap());
        }
    }

    async fn signal(&self, begins: bool) {
        let none: Option<&str> = None;
        let to = (LOGIN_PATH, LOGIN_MANAGER, "PrepareForShutdown");
        self.connection.emit_signal(none, to.0, to.1, to.2, &(begins,)).await.unwrap();
    }

    /// Locks that are still held.
    fn held(&self) -> usize {
        use std::io::Read;
        let mut login = self.login.lock().unwrap();
        let held =
            |lock: &mut std::os::unix::net::UnixStream| !matches!(lock.read(&mut [0]), Ok(0));
        login.locks.iter_mut().map(held).filter(|held| *held).count()
    }

    async fn until_held(&self, count: usize) {
        for _ in 0..2000 {
            if self.held() == count {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("{} locks are held, not {count}", self.held());
    }
}

/// A bus with a logind on it, and who watches it.
struct Rig {
    dir: tempfile::TempDir,
    bus: Option<(Daemon, String)>,
    login: Arc<Mutex<Login>>,
    double: Double,
    told: mpsc::Receiver<Told>,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Rig {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Rig {
    async fn new(login: Login, wanted: Duration) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let bus = start_bus(dir.path()).await;
        let drop_ins = dir.path().join("etc/logind.conf.d");
        let login = Arc::new(Mutex::new(login));
        let double = Double::start(&bus.1, &drop_ins, login.clone()).await;
        let (tell, told) = mpsc::channel(1);
        let task = tokio::spawn(watch(Place { bus: bus.1.clone(), drop_ins }, wanted, tell));
        Self { dir, bus: Some(bus), login, double, told, task }
    }

    async fn heard(&mut self) -> Told {
        let heard = tokio::time::timeout(Duration::from_secs(60), self.told.recv()).await;
        heard.expect("nothing is told").expect("the watch has ended")
    }

    fn drop_in(&self) -> PathBuf {
        self.dir.path().join("etc/logind.conf.d/99-kubelet.conf")
    }
}

fn secs(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

#[tokio::test]
async fn a_shutdown_waits_until_the_lock_is_dropped() {
    let mut rig = Rig::new(Login { delay: secs(5), ..Login::default() }, secs(30)).await;
    rig.double.until_held(1).await;
    let asked = rig.login.lock().unwrap().asked.clone();
    assert_eq!(asked, [("shutdown".to_owned(), "kubelet".to_owned(), "delay".to_owned())]);
    assert_eq!(rig.login.lock().unwrap().delay, secs(30));
    let text = std::fs::read_to_string(rig.drop_in()).unwrap();
    assert!(text.ends_with("[Login]\nInhibitDelayMaxSec=30\n"), "{text}");
    rig.double.signal(true).await;
    let Told::Shutdown(lock) = rig.heard().await else { panic!("cancelled") };
    assert_eq!(rig.double.held(), 1);
    drop(lock);
    rig.double.until_held(0).await;
    // Called off: the next one waits again.
    rig.double.signal(false).await;
    assert!(matches!(rig.heard().await, Told::Cancelled));
    rig.double.until_held(1).await;
}

#[tokio::test]
async fn a_delay_that_is_long_enough_is_left_alone() {
    let rig = Rig::new(Login { delay: secs(60), ..Login::default() }, secs(30)).await;
    rig.double.until_held(1).await;
    assert!(!rig.drop_in().exists());
    assert_eq!(rig.login.lock().unwrap().reloads, 0);
}

#[tokio::test]
async fn a_logind_that_keeps_its_limit_is_held_up_for_that_long() {
    let login = Login { delay: secs(5), stubborn: true, ..Login::default() };
    let mut rig = Rig::new(login, secs(30)).await;
    rig.double.until_held(1).await;
    rig.double.signal(true).await;
    assert!(matches!(rig.heard().await, Told::Shutdown(_)));
}

#[tokio::test]
async fn a_restarted_logind_is_asked_again() {
    let mut rig = Rig::new(Login { delay: secs(60), ..Login::default() }, secs(30)).await;
    rig.double.until_held(1).await;
    rig.double.connection.clone().close().await.unwrap();
    *rig.login.lock().unwrap() = Login { delay: secs(5), ..Login::default() };
    let (bus, drop_ins) = (&rig.bus.as_ref().unwrap().1, rig.double.drop_ins.clone());
    rig.double = Double::start(bus, &drop_ins, rig.login.clone()).await;
    rig.double.until_held(1).await;
    assert_eq!(rig.login.lock().unwrap().delay, secs(30));
    rig.double.signal(true).await;
    assert!(matches!(rig.heard().await, Told::Shutdown(_)));
}

#[tokio::test]
async fn a_restarted_bus_is_found_again() {
    let mut rig = Rig::new(Login { delay: secs(60), ..Login::default() }, secs(30)).await;
    rig.double.until_held(1).await;
    drop(rig.bus.take());
    let bus = start_bus(rig.dir.path()).await;
    rig.double = Double::start(&bus.1, &rig.double.drop_ins.clone(), rig.login.clone()).await;
    rig.bus = Some(bus);
    // The old lock is held until there is a new one.
    for _ in 0..2000 {
        if rig.login.lock().unwrap().asked.len() == 2 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    rig.double.until_held(1).await;
    rig.double.signal(true).await;
    assert!(matches!(rig.heard().await, Told::Shutdown(_)));
}

#[tokio::test]
async fn a_shutdown_that_has_begun_is_told_at_the_start() {
    let login = Login { delay: secs(60), preparing: true, ..Login::default() };
    let mut rig = Rig::new(login, secs(30)).await;
    assert!(matches!(rig.heard().await, Told::Shutdown(Lock(None))));
}
