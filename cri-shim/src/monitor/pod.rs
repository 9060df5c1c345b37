//! The monitor's loop: one `poll(2)` over its socket, its connections, its containers' output and
//! the signal descriptor. Nothing has a timer, so an idle pod costs nothing.

mod clients;

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::time::Instant;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal, kill, killpg};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::unistd::Pid;

use super::container::Container;
use super::exec::Streams;
use super::follower::Follower;
use super::frame::{self, Inbox};
use super::launch::{self, Progress};
use super::protocol::{Reply, Request, StartContainer, Started, VERSION};
use super::{exec, record, sys, tree};
use crate::cgroup::Hierarchies;
use crate::crash::point;

mod reap;
mod shutdown;
mod unwritten;

/// A monitor that nobody has ever connected to within this many milliseconds was forked for a shim
/// that died meanwhile; there is no record of its sandbox.
const UNGREETED: u16 = 60_000;

/// Exit statuses of children nobody has claimed yet are kept up to this many: a container may end
/// before the launch that made it has said which process it is.
const MAX_UNCLAIMED: usize = 64;

struct Connection {
    id: u64,
    stream: UnixStream,
    inbox: Inbox,
    subscribed: bool,
    broken: bool,
}

/// A child that makes a container or an exec, and reports on the way.
struct Launch {
    child: Pid,
    progress: UnixStream,
    inbox: Inbox,
    connection: u64,
    kind: Kind,
    process: Option<Started>,
    /// The terminal of an exec that asked for one.
    terminal: Option<OwnedFd>,
    done: bool,
}

enum Kind {
    Container(Box<Container>),
    Exec { container: String, group: PathBuf },
}

struct Exec {
    connection: u64,
    pid: Pid,
    container: String,
    /// The cgroup of what it started.
    group: PathBuf,
}

struct Pod {
    init: Option<i32>,
    cgroups: Hierarchies,
    connections: Vec<Connection>,
    next_connection: u64,
    launches: Vec<Launch>,
    containers: Vec<Container>,
    /// Clients of containers that have ended, who have not taken the last words yet.
    followers: Vec<Follower>,
    execs: Vec<Exec>,
    /// Cgroups of execs that have ended, to be removed with the last that they left behind.
    spent: Vec<PathBuf>,
    unclaimed: Vec<(Pid, i32, i32)>,
    unwritten: Vec<unwritten::Unwritten>,
    /// When the containers of a machine that shuts down are killed.
    deadline: Option<Instant>,
    ending: bool,
}

/// What a descriptor in the poll set belongs to.
#[derive(Clone, Copy)]
enum Source {
    Signal,
    Listener,
    Connection(usize),
    Launch(usize),
    Output(usize, usize),
    /// A client of a container.
    Follower(usize, usize),
    /// A client of a container that has ended.
    LastWords(usize),
}

/// Runs until told to exit.
pub(super) fn run(listener: UnixListener, init: Option<i32>) -> i32 {
    match serve(listener, init) {
        Ok(()) => 0,
        Err(_) => 1,
    }
}

fn serve(listener: UnixListener, init: Option<i32>) -> io::Result<()> {
    let mut set = SigSet::empty();
    set.add(Signal::SIGCHLD);
    set.add(Signal::SIGTERM);
    set.thread_block()?;
    let signals = SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?;
    listener.set_nonblocking(true)?;
    let mut pod = Pod {
        init,
        cgroups: Hierarchies::find()?,
        connections: Vec::new(),
        next_connection: 0,
        launches: Vec::new(),
        containers: Vec::new(),
        followers: Vec::new(),
        execs: Vec::new(),
        spent: Vec::new(),
        unclaimed: Vec::new(),
        unwritten: Vec::new(),
        deadline: None,
        ending: false,
    };
    while !pod.ending {
        for source in pod.wait(&signals, &listener)? {
            match source {
                Source::Signal => {
                    while let Ok(Some(signal)) = signals.read_signal() {
                        if signal.ssi_signo == Signal::SIGTERM as u32 {
                            pod.shut_down();
                        }
                    }
                    pod.reap();
                }
                Source::Listener => pod.accept(&listener),
                Source::Connection(at) => pod.serve_connection(at),
                Source::Launch(at) => pod.serve_launch(at),
                Source::Output(container, stream) => pod.containers[container].copy_output(stream),
                Source::Follower(container, at) => pod.catch_up(container, at),
                Source::LastWords(at) => pod.last_words(at),
            }
        }
        pod.sweep();
        pod.write_again();
        pod.kill_at_deadline();
    }
    if let Some(init) = pod.init {
        let _ = kill(Pid::from_raw(init), Signal::SIGKILL);
    }
    Ok(())
}

impl Pod {
    fn wait(&self, signals: &SignalFd, listener: &UnixListener) -> io::Result<Vec<Source>> {
        // In this order they are dealt with: output before exits, so that a log is whole when the
        // exit is told, and what removes containers last, so that indices stay right.
        let mut sources = Vec::new();
        let mut fds: Vec<BorrowedFd<'_>> = Vec::new();
        // Clients first, from the last to the first, as one that is gone is removed at once.
        for (at, container) in self.containers.iter().enumerate() {
            for (client, follower) in container.followers.iter().enumerate().rev() {
                if follower.is_behind() {
                    sources.push(Source::Follower(at, client));
                    fds.push(follower.pipe());
                }
            }
        }
        for (at, follower) in self.followers.iter().enumerate().rev() {
            sources.push(Source::LastWords(at));
            fds.push(follower.pipe());
        }
        let writers = fds.len();
        for (at, container) in self.containers.iter().enumerate() {
            for (stream, fd) in container.outputs() {
                sources.push(Source::Output(at, stream));
                fds.push(fd);
            }
        }
        for (at, launch) in self.launches.iter().enumerate() {
            sources.push(Source::Launch(at));
            fds.push(launch.progress.as_fd());
        }
        for (at, connection) in self.connections.iter().enumerate() {
            sources.push(Source::Connection(at));
            fds.push(connection.stream.as_fd());
        }
        sources.extend([Source::Listener, Source::Signal]);
        fds.extend([listener.as_fd(), signals.as_fd()]);
        let wanted = |at| if at < writers { PollFlags::POLLOUT } else { PollFlags::POLLIN };
        let mut polled: Vec<PollFd<'_>> =
            fds.into_iter().enumerate().map(|(at, fd)| PollFd::new(fd, wanted(at))).collect();
        let timeout = match (self.time_left(), self.next_connection) {
            (Some(left), _) => left,
            (None, 0) => PollTimeout::from(UNGREETED),
            (None, _) => PollTimeout::NONE,
        };
        match poll(&mut polled, timeout) {
            Ok(0) if self.time_left().is_some() => return Ok(Vec::new()),
            Ok(0) => return Err(io::ErrorKind::TimedOut.into()),
            Ok(_) => {}
            Err(Errno::EINTR) => return Ok(Vec::new()),
            Err(errno) => return Err(errno.into()),
        }
        let ready = polled.iter().map(|p| p.revents().is_some_and(|r| !r.is_empty()));
        Ok(sources.into_iter().zip(ready).filter(|(_, ready)| *ready).map(|(s, _)| s).collect())
    }

    fn accept(&mut self, listener: &UnixListener) {
        while let Ok((stream, _)) = listener.accept() {
            if stream.set_nonblocking(true).is_err() {
                continue;
            }
            self.connections.push(Connection {
                id: self.next_connection,
                stream,
                inbox: Inbox::default(),
                subscribed: false,
                broken: false,
            });
            self.next_connection += 1;
        }
    }

    fn serve_connection(&mut self, at: usize) {
        let connection = &mut self.connections[at];
        match connection.inbox.fill(&connection.stream) {
            Ok(true) => {}
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return,
            Ok(false) | Err(_) => {
                connection.broken = true;
                return;
            }
        }
        loop {
            let connection = &mut self.connections[at];
            match connection.inbox.take_frame::<Request>() {
                Ok(Some(request)) => self.answer(at, request),
                Ok(None) => return,
                Err(e) => {
                    let message = format!("not understood: {e}");
                    reply(connection, &Reply::Failed { message });
                    connection.broken = true;
                    return;
                }
            }
        }
    }

    fn answer(&mut self, at: usize, request: Request) {
        match request {
            Request::Hello { .. } => {
                let pid = std::process::id() as i32;
                let hello = Reply::Hello { version: VERSION, pid, init: self.init };
                reply(&mut self.connections[at], &hello);
            }
            Request::Subscribe => {
                self.connections[at].subscribed = true;
                reply(&mut self.connections[at], &Reply::Done);
                self.tell_unwritten(at);
            }
            Request::Start(start) => self.start(at, *start),
            Request::Kill { container, signal, all } => {
                self.kill(&container, signal, all);
                reply(&mut self.connections[at], &Reply::Done);
            }
            Request::Exec { container, arguments, tty } => {
                self.exec(at, container, &arguments, tty);
            }
            Request::Attach { container, stdout, stderr } => {
                self.attach(at, &container, stdout, stderr);
            }
            Request::CloseStdin { container } => {
                if let Some(found) = self.containers.iter_mut().find(|c| c.id == container) {
                    found.close_stdin();
                }
                reply(&mut self.connections[at], &Reply::Done);
            }
            Request::ReopenLog { container } => {
                let found = self.containers.iter_mut().find(|c| c.id == container);
                let answer = match found.map(|c| c.reopen_log()) {
                    Some(Ok(())) => Reply::Done,
                    Some(Err(e)) => Reply::Failed { message: format!("reopening the log: {e}") },
                    None => Reply::Failed { message: "the container is not running".to_owned() },
                };
                reply(&mut self.connections[at], &answer);
            }
            Request::Exit { force } => {
                if self.containers.is_empty() && self.launches.is_empty() {
                    self.ending = true;
                    reply(&mut self.connections[at], &Reply::Done);
                } else if force {
                    self.end_all();
                    reply(&mut self.connections[at], &Reply::Done);
                } else {
                    let message = "containers are running; stop them first".to_owned();
                    reply(&mut self.connections[at], &Reply::Failed { message });
                }
            }
        }
    }

    fn start(&mut self, at: usize, start: StartContainer) {
        let connection = self.connections[at].id;
        let busy = self.containers.iter().any(|c| c.id == start.id)
            || self
                .launches
                .iter()
                .any(|l| matches!(&l.kind, Kind::Container(container) if container.id == start.id));
        let started = if self.deadline.is_some() {
            Err(io::Error::other("the machine shuts down"))
        } else if busy {
            Err(io::Error::other("the container is running already"))
        } else {
            self.fork_container(connection, start)
        };
        if let Err(error) = started {
            let message = format!("starting the container: {error}");
            reply(&mut self.connections[at], &Reply::Failed { message });
        }
    }

    fn fork_container(&mut self, connection: u64, start: StartContainer) -> io::Result<()> {
        let (mut container, stdio) = Container::new(&start)?;
        container.oom_kills_before = self.cgroups.oom_kills_around(&start.cgroup);
        let (progress, theirs) = UnixStream::pair()?;
        let Some(child) = sys::fork()? else {
            launch::run(&start, stdio, theirs);
        };
        drop((theirs, stdio));
        point("monitor: maker forked");
        progress.set_nonblocking(true)?;
        self.launches.push(Launch {
            child,
            progress,
            inbox: Inbox::default(),
            connection,
            kind: Kind::Container(Box::new(container)),
            process: None,
            terminal: None,
            done: false,
        });
        Ok(())
    }

    fn exec(&mut self, at: usize, container: String, arguments: &[String], tty: bool) {
        let stdio = std::mem::take(&mut self.connections[at].inbox.fds);
        let connection = self.connections[at].id;
        let forked = match self.containers.iter().find(|c| c.id == container) {
            None => Err(io::Error::other("the container is not running")),
            Some(found) if tty => fork_exec(found, arguments, Streams::Terminal),
            Some(_) if !exec::complete(&stdio) => {
                Err(io::Error::other("three descriptors are needed"))
            }
            Some(found) => fork_exec(found, arguments, Streams::Given(stdio)),
        };
        match forked {
            Ok((child, progress, cgroup)) => self.launches.push(Launch {
                child,
                progress,
                inbox: Inbox::default(),
                connection,
                kind: Kind::Exec { container, group: cgroup.join(exec::group(child)) },
                process: None,
                terminal: None,
                done: false,
            }),
            Err(error) => {
                let message = format!("running a process in the container: {error}");
                reply(&mut self.connections[at], &Reply::Failed { message });
            }
        }
    }

    fn kill(&mut self, container: &str, signal: i32, all: bool) {
        let Some(found) = self.containers.iter_mut().find(|c| c.id == container) else { return };
        found.asked = signal;
        if all && signal == libc::SIGKILL {
            self.cgroups.kill(&found.cgroup);
        }
        send_signal(found.pid, signal);
        if all && signal != libc::SIGKILL {
            for pid in self.cgroups.processes(&found.cgroup) {
                if pid != found.pid {
                    send_signal(pid, signal);
                }
            }
        }
    }

    fn serve_launch(&mut self, at: usize) {
        let launch = &mut self.launches[at];
        let open = match launch.inbox.fill(&launch.progress) {
            Ok(open) => open,
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return,
            Err(_) => false,
        };
        while !self.launches[at].done {
            match self.launches[at].inbox.take_frame::<Progress>() {
                Ok(Some(progress)) => self.advance(at, progress),
                Ok(None) if open => return,
                Ok(None) | Err(_) => {
                    let message = "the launching process died; see the kernel log".to_owned();
                    self.advance(at, Progress::Failed { message });
                }
            }
        }
    }

    fn advance(&mut self, at: usize, progress: Progress) {
        let launch = &mut self.launches[at];
        match progress {
            Progress::Created { pid, user } => {
                point("monitor: process made");
                launch.process = Some(Started { pid, at: 0, user });
                let terminal = launch.inbox.fds.pop();
                match &mut launch.kind {
                    Kind::Container(container) => {
                        container.pid = Pid::from_raw(pid);
                        if let Some(terminal) = terminal {
                            container.take_terminal(terminal);
                        }
                    }
                    Kind::Exec { .. } => launch.terminal = terminal,
                }
            }
            Progress::Running => {
                launch.done = true;
                let Some(mut started) = launch.process.take() else { return };
                started.at = record::now();
                let connection = launch.connection;
                let terminal = launch.terminal.take();
                let nothing = Kind::Exec { container: String::new(), group: PathBuf::new() };
                let kind = std::mem::replace(&mut launch.kind, nothing);
                self.running(connection, kind, started, terminal);
            }
            Progress::Failed { message } => {
                launch.done = true;
                self.end_launch(at);
                let connection = self.launches[at].connection;
                self.tell(connection, &Reply::Failed { message });
            }
        }
    }

    /// Ends everything of a launch that failed or was abandoned. Whatever the maker has forked is
    /// still in the launch's process group, or has left it as the container's first process, which
    /// is in the container's cgroup by then: so first the group, then the cgroup.
    fn end_launch(&mut self, at: usize) {
        let launch = &self.launches[at];
        let _ = kill(launch.child, Signal::SIGKILL);
        match &launch.kind {
            Kind::Container(container) => {
                let _ = killpg(launch.child, Signal::SIGKILL);
                self.cgroups.kill(&container.cgroup);
                let _ = self.cgroups.remove(&container.cgroup);
            }
            Kind::Exec { group, .. } => {
                self.cgroups.kill(group);
                self.spent.push(group.clone());
            }
        }
        if let Some(process) = &launch.process {
            sys::kill(Pid::from_raw(process.pid), libc::SIGKILL);
        }
    }

    fn running(
        &mut self,
        connection: u64,
        kind: Kind,
        started: Started,
        terminal: Option<OwnedFd>,
    ) {
        let pid = Pid::from_raw(started.pid);
        match kind {
            Kind::Container(container) => {
                match record::write(&container.records, record::STARTED, &started) {
                    Ok(()) => {
                        point("monitor: start recorded");
                        self.containers.push(*container);
                        self.tell(connection, &Reply::Started(started));
                    }
                    // The next shim would not know that it runs.
                    Err(error) => {
                        self.cgroups.kill(&container.cgroup);
                        send_signal(pid, libc::SIGKILL);
                        let _ = self.cgroups.remove(&container.cgroup);
                        let records = container.records.display();
                        let message = format!("recording the start in {records}: {error}");
                        self.tell(connection, &Reply::Failed { message });
                    }
                }
            }
            Kind::Exec { container, group } => {
                self.execs.push(Exec { connection, pid, container, group });
                if let Some(found) = self.connections.iter_mut().find(|c| c.id == connection) {
                    let fds: Vec<_> = terminal.iter().map(|fd| fd.as_raw_fd()).collect();
                    reply_with(found, &Reply::Done, &fds);
                }
            }
        }
        if let Some(at) = self.unclaimed.iter().position(|(p, ..)| *p == pid) {
            let (_, code, signal) = self.unclaimed.swap_remove(at);
            self.ended(pid, code, signal);
        }
    }

    fn tell(&mut self, connection: u64, message: &Reply) {
        if let Some(found) = self.connections.iter_mut().find(|c| c.id == connection) {
            reply(found, message);
        }
    }

    /// Drops what has ended, and with a connection what was being done for it.
    fn sweep(&mut self) {
        for at in 0..self.connections.len() {
            if self.connections[at].broken {
                let id = self.connections[at].id;
                self.abandon(id);
            }
        }
        self.connections.retain(|c| !c.broken);
        self.launches.retain(|l| !l.done);
        self.followers.retain(Follower::is_behind);
        if self.launches.is_empty() {
            self.unclaimed = Vec::new();
        } else if self.unclaimed.len() > MAX_UNCLAIMED {
            self.unclaimed.remove(0);
        }
    }

    fn abandon(&mut self, connection: u64) {
        for at in 0..self.launches.len() {
            if self.launches[at].connection == connection && !self.launches[at].done {
                let message = "abandoned".to_owned();
                self.advance(at, Progress::Failed { message });
                if let Kind::Container(container) = &self.launches[at].kind {
                    container.never_ran();
                }
            }
        }
        self.followers.retain(|f| f.connection != connection);
        for container in &mut self.containers {
            container.followers.retain(|f| f.connection != connection);
        }
        for exec in self.execs.iter().filter(|e| e.connection == connection) {
            let container = self.containers.iter().find(|c| c.id == exec.container);
            tree::kill_tree(exec.pid, || {
                container.map(|c| self.cgroups.processes(&c.cgroup)).unwrap_or_default()
            });
            self.cgroups.kill(&exec.group);
        }
    }
}

fn fork_exec(
    container: &Container,
    arguments: &[String],
    streams: Streams,
) -> io::Result<(Pid, UnixStream, PathBuf)> {
    let (progress, theirs) = UnixStream::pair()?;
    let bundle: &PathBuf = &container.bundle;
    let target = exec::Target {
        init: container.pid.as_raw(),
        bundle,
        cgroup: &container.cgroup,
        userns: container.userns.as_ref(),
    };
    let Some(child) = sys::fork()? else {
        exec::run(&target, arguments, streams, theirs);
    };
    drop((theirs, streams));
    progress.set_nonblocking(true)?;
    Ok((child, progress, container.cgroup.clone()))
}

/// A connection that does not take its frames is dropped: the shim finds what it missed on disk.
fn reply(connection: &mut Connection, message: &Reply) {
    reply_with(connection, message, &[]);
}

fn reply_with(connection: &mut Connection, message: &Reply, fds: &[RawFd]) {
    if frame::send(&connection.stream, message, fds).is_err() {
        connection.broken = true;
    }
}

fn send_signal(pid: Pid, signal: i32) {
    // By number, as real-time signals have no name in nix.
    sys::kill(pid, signal);
}
