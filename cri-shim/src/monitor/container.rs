//! A container as its monitor sees it: a process, its output, its log, who follows it.

use std::io::{self, PipeReader};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::unistd::Pid;

use super::follower::Follower;
use super::launch::Stdio;
use super::log::{Lines, Log, Source};
use super::protocol::StartContainer;
use super::{record, sys};
use crate::spec::userns::IdMap;

/// The most that is read at once, in bytes: what a pipe holds.
const CHUNK: usize = 64 << 10;

/// A stream that gives so much at once, in bytes, is asked again at once...
const BUSY: usize = 4 << 10;

/// ... so often, before the other streams have their turn.
const TURNS: usize = 16;

/// One stream of output.
struct Output {
    source: Source,
    reader: std::fs::File,
    lines: Lines,
}

/// A running container.
pub(super) struct Container {
    pub(super) id: String,
    pub(super) pid: Pid,
    pub(super) bundle: PathBuf,
    pub(super) cgroup: PathBuf,
    pub(super) records: PathBuf,
    /// The ids of the pod's user namespace.
    pub(super) userns: Option<IdMap>,
    /// Those of its pod that were killed for want of memory before it was made.
    pub(super) oom_kills_before: Option<u64>,
    /// The last signal somebody asked to send it; zero when none.
    pub(super) asked: i32,
    log: Log,
    outputs: [Option<Output>; 2],
    /// Attached clients.
    pub(super) followers: Vec<Follower>,
    /// The other end of its standard input, or its terminal: held so that reads wait instead of
    /// ending.
    input: Option<OwnedFd>,
    tty: bool,
}

impl Container {
    /// Opens the log and makes the streams of a container that is about to be started.
    pub(super) fn new(start: &StartContainer) -> io::Result<(Self, Stdio)> {
        let log = Log::open(start.log.clone(), start.rotation).map_err(|e| {
            let path = start.log.clone().unwrap_or_default();
            io::Error::new(e.kind(), format!("opening the log {}: {e}", path.display()))
        })?;
        let mut container = Container {
            id: start.id.clone(),
            pid: Pid::from_raw(0),
            bundle: start.bundle.clone(),
            cgroup: start.cgroup.clone(),
            records: start.records.clone(),
            userns: start.userns.as_ref().map(|userns| userns.map),
            oom_kills_before: None,
            asked: 0,
            log,
            outputs: [None, None],
            followers: Vec::new(),
            input: None,
            tty: start.tty,
        };
        let mut stdio = Stdio { stdin: None, stdout: None, stderr: None };
        if !start.tty {
            if start.stdin {
                let (reader, writer) = io::pipe()?;
                stdio.stdin = Some(reader.into());
                container.input = Some(writer.into());
            } else {
                stdio.stdin = Some(std::fs::File::open("/dev/null")?.into());
            }
            let (stdout, writer) = output(Source::Stdout)?;
            stdio.stdout = Some(writer);
            let (stderr, writer) = output(Source::Stderr)?;
            stdio.stderr = Some(writer);
            container.outputs = [Some(stdout), Some(stderr)];
        }
        Ok((container, stdio))
    }

    /// The terminal replaces all three streams; everything it shows is standard output.
    pub(super) fn take_terminal(&mut self, terminal: OwnedFd) {
        if let Ok(reader) = terminal.try_clone()
            && nonblocking(&reader).is_ok()
        {
            self.outputs[0] = Some(Output {
                source: Source::Stdout,
                reader: reader.into(),
                lines: Lines::default(),
            });
        }
        self.input = Some(terminal);
    }

    /// The streams to wait for: not those with a follower that has not taken the last piece yet.
    pub(super) fn outputs(&self) -> impl Iterator<Item = (usize, BorrowedFd<'_>)> {
        let waits = |at| self.followers.iter().any(|f| f.stream == at && f.is_behind());
        self.outputs
            .iter()
            .enumerate()
            .filter(move |(at, _)| !waits(*at))
            .filter_map(|(at, output)| output.as_ref().map(|o| (at, o.reader.as_fd())))
    }

    /// Copies output to a client's pipes from now on: standard output first, then error, as asked.
    pub(super) fn attach(
        &mut self,
        connection: u64,
        stdout: bool,
        stderr: bool,
        pipes: Vec<OwnedFd>,
    ) -> io::Result<()> {
        let asked = [stdout, stderr];
        let streams: Vec<usize> = (0..asked.len()).filter(|at| asked[*at]).collect();
        if streams.len() != pipes.len() {
            return Err(io::Error::other("a pipe for each stream is needed"));
        }
        for (stream, pipe) in streams.into_iter().zip(pipes) {
            nonblocking(&pipe)?;
            // A stream that has ended already is told by the pipe's end.
            if self.outputs[stream].is_some() {
                self.followers.push(Follower::new(connection, stream, pipe));
            }
        }
        Ok(())
    }

    /// The terminal, or the other end of the standard input while that is open.
    pub(super) fn input(&self) -> Option<&OwnedFd> {
        self.input.as_ref()
    }

    /// Ends the standard input. A terminal has no end.
    pub(super) fn close_stdin(&mut self) {
        if !self.tty {
            self.input = None;
        }
    }

    /// Copies what a stream has into the log.
    pub(super) fn copy_output(&mut self, at: usize) {
        for _ in 0..TURNS {
            let waits = self.followers.iter().any(|f| f.stream == at && f.is_behind());
            if waits || self.copy_once(at) < BUSY {
                return;
            }
        }
    }

    /// How much was there.
    fn copy_once(&mut self, at: usize) -> usize {
        let Some(output) = &mut self.outputs[at] else { return 0 };
        // Only the part that is filled becomes memory.
        let mut piece = Vec::with_capacity(CHUNK);
        let stamp = || record::rfc3339(record::now());
        match sys::read(&output.reader, &mut piece) {
            Ok(()) if !piece.is_empty() => {
                output.lines.push(&mut self.log, output.source, &stamp(), &piece);
                self.followers.retain_mut(|f| f.stream != at || f.give(&piece));
                piece.len()
            }
            Err(e)
                if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) =>
            {
                0
            }
            // The end; a terminal says so with EIO.
            _ => {
                output.lines.finish(&mut self.log, output.source, &stamp());
                self.outputs[at] = None;
                self.followers.retain(|f| f.stream != at || f.is_behind());
                0
            }
        }
    }

    /// Takes all output that is there, at the end of the container.
    pub(super) fn drain(&mut self) {
        for at in 0..self.outputs.len() {
            // Bounded, as a process that left the container may hold the other end and write on.
            for _ in 0..4096 {
                if self.copy_once(at) == 0 {
                    break;
                }
            }
            if let Some(output) = &mut self.outputs[at] {
                let stamp = record::rfc3339(record::now());
                output.lines.finish(&mut self.log, output.source, &stamp);
            }
        }
    }

    /// It was given up before it ran.
    pub(super) fn never_ran(&self) {
        self.log.forget();
    }

    pub(super) fn reopen_log(&mut self) -> io::Result<()> {
        self.log.reopen()
    }
}

fn output(source: Source) -> io::Result<(Output, OwnedFd)> {
    let (reader, writer): (PipeReader, _) = io::pipe()?;
    let reader = OwnedFd::from(reader);
    nonblocking(&reader)?;
    Ok((Output { source, reader: reader.into(), lines: Lines::default() }, writer.into()))
}

fn nonblocking(fd: &OwnedFd) -> io::Result<()> {
    let flags = OFlag::from_bits_truncate(fcntl(fd, FcntlArg::F_GETFL)?);
    fcntl(fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    Ok(())
}
