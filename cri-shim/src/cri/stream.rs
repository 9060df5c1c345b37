//! Exec, Attach and PortForward: their URLs, and what is done for the clients that come there.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::sync::Arc;

use tokio::net::{TcpSocket, TcpStream};
use tonic::Status;

use super::container_list::running;
use super::exec::end;
use super::{PATIENCE, Shim, blocking};
use crate::api;
use crate::client::{Conversation, MonitorClient};
use crate::monitor::protocol::{Reply, Request};
use crate::network::netns;
use crate::streaming::Runtime;
use crate::streaming::descriptor::Descriptor;
use crate::streaming::runtime::{Attachment, Process};

impl Shim {
    pub(super) fn exec_url(
        &self,
        mut request: api::ExecRequest,
    ) -> Result<api::ExecResponse, Status> {
        let container = self.store.container(&request.container_id)?;
        running(&container)?;
        request.container_id = container.id.clone();
        Ok(api::ExecResponse { url: self.urls.exec(request)? })
    }

    pub(super) fn attach_url(
        &self,
        mut request: api::AttachRequest,
    ) -> Result<api::AttachResponse, Status> {
        let container = self.store.container(&request.container_id)?;
        running(&container)?;
        request.container_id = container.id.clone();
        Ok(api::AttachResponse { url: self.urls.attach(request)? })
    }

    pub(super) fn port_forward_url(
        &self,
        mut request: api::PortForwardRequest,
    ) -> Result<api::PortForwardResponse, Status> {
        let sandbox = self.store.sandbox(&request.pod_sandbox_id)?;
        if !sandbox.is_ready() {
            return Err(Status::failed_precondition(format!(
                "pod sandbox {} is not running",
                sandbox.id
            )));
        }
        request.pod_sandbox_id = sandbox.id.clone();
        Ok(api::PortForwardResponse { url: self.urls.port_forward(request)? })
    }
}

#[tonic::async_trait]
impl Runtime for Shim {
    async fn exec(&self, request: &api::ExecRequest) -> Result<Process, String> {
        let container = self.store.container(&request.container_id).map_err(message)?;
        running(&container).map_err(message)?;
        let monitor = &container.sandbox.monitor;
        let exec = Request::Exec {
            container: container.id.clone(),
            arguments: request.cmd.clone(),
            tty: request.tty,
        };
        if request.tty {
            let (mut conversation, terminal) = open(monitor, &exec, Vec::new()).await?;
            let terminal = terminal.ok_or("the monitor gave no terminal")?;
            let terminal = Descriptor::new(terminal).map_err(|e| e.to_string())?;
            let terminal = Some(Arc::new(terminal));
            return Ok(Process {
                stdin: terminal.clone(),
                stdout: terminal,
                stderr: None,
                tty: true,
                exit: Box::pin(async move { end(&mut conversation).await.map_err(message) }),
            });
        }
        let stdio = || -> io::Result<_> {
            let null = || io::Result::Ok(OwnedFd::from(std::fs::File::open("/dev/null")?));
            let (stdin, input) = match request.stdin {
                true => Descriptor::input().map(|(ours, theirs)| (Some(ours), theirs))?,
                false => (None, null()?),
            };
            let output = |wanted: bool| match wanted {
                true => Descriptor::output().map(|(ours, theirs)| (Some(ours), theirs)),
                false => {
                    let sink = std::fs::File::options().write(true).open("/dev/null")?;
                    Ok((None, sink.into()))
                }
            };
            let (stdout, out) = output(request.stdout)?;
            let (stderr, err) = output(request.stderr)?;
            Ok(([stdin, stdout, stderr], vec![input, out, err]))
        };
        let (ours, theirs) = stdio().map_err(|e| format!("making pipes: {e}"))?;
        let (mut conversation, _) = open(monitor, &exec, theirs).await?;
        let [stdin, stdout, stderr] = ours.map(|descriptor| descriptor.map(Arc::new));
        Ok(Process {
            stdin,
            stdout,
            stderr,
            tty: false,
            exit: Box::pin(async move { end(&mut conversation).await.map_err(message) }),
        })
    }

    async fn attach(&self, request: &api::AttachRequest) -> Result<Attachment, String> {
        let container = self.store.container(&request.container_id).map_err(message)?;
        running(&container).map_err(message)?;
        let monitor = &container.sandbox.monitor;
        let config = container.config();
        let pipe = |wanted: bool| wanted.then(Descriptor::output).transpose();
        let pipes = pipe(request.stdout).and_then(|out| Ok((out, pipe(request.stderr)?)));
        let (stdout, stderr) = pipes.map_err(|e| format!("making pipes: {e}"))?;
        let (stdout, out) = stdout.unzip();
        let (stderr, err) = stderr.unzip();
        let attach = Request::Attach {
            container: container.id.clone(),
            stdout: request.stdout,
            stderr: request.stderr,
        };
        let theirs = [out, err].into_iter().flatten().collect();
        let (conversation, input) = open(monitor, &attach, theirs).await?;
        let stdin = input.filter(|_| request.stdin || config.tty).map(Descriptor::new);
        let stdin = stdin.transpose().map_err(|e| format!("using the container's input: {e}"))?;
        let mut ended = container.stdin_ended.subscribe();
        Ok(Attachment {
            stdin: stdin.map(Arc::new),
            stdout: stdout.map(Arc::new),
            stderr: stderr.map(Arc::new),
            tty: config.tty,
            stdin_once: config.stdin_once,
            stdin_ended: Box::pin(async move {
                if ended.wait_for(|ended| *ended).await.is_err() {
                    std::future::pending().await
                }
            }),
            exit: Box::pin(async move {
                container.exited().await;
                drop(conversation);
            }),
        })
    }

    async fn close_stdin(&self, container: &str) {
        let Some(container) = self.store.find_container(container) else { return };
        container.stdin_ended.send_replace(true);
        let close = Request::CloseStdin { container: container.id.clone() };
        let call = container.sandbox.monitor.call(&close);
        if !matches!(tokio::time::timeout(PATIENCE, call).await, Ok(Ok(_))) {
            tracing::warn!(container = container.id, "the monitor did not end standard input");
        }
    }

    async fn connect(&self, sandbox: &str, port: u16) -> io::Result<TcpStream> {
        let sandbox = self.store.find_sandbox(sandbox).filter(|sandbox| sandbox.is_ready());
        let sandbox = sandbox
            .ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "the pod sandbox is gone"))?;
        let netns = (!sandbox.host_network()).then(|| self.layout.netns(&sandbox.id));
        let loopback: [IpAddr; 2] = [Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()];
        let mut refused = None;
        for address in loopback {
            // A socket belongs to the namespace it was made in, wherever it is used.
            let make = move || match address {
                IpAddr::V4(_) => TcpSocket::new_v4(),
                IpAddr::V6(_) => TcpSocket::new_v6(),
            };
            let socket = match netns.clone() {
                None => make(),
                Some(netns) => blocking(move || netns::within(&netns, make))
                    .await
                    .map_err(|e| io::Error::other(message(e)))?
                    .and_then(|made| made),
            };
            let connected = match socket {
                Ok(socket) => socket.connect(SocketAddr::new(address, port)).await,
                Err(error) => Err(error),
            };
            match connected {
                Ok(stream) => return Ok(stream),
                Err(error) => refused = refused.or(Some(error)),
            }
        }
        Err(refused.unwrap_or_else(|| io::ErrorKind::ConnectionRefused.into()))
    }
}

fn message(status: Status) -> String {
    status.message().to_owned()
}

/// Sends a request that is first answered by Done, and what came with it.
async fn open(
    monitor: &MonitorClient,
    request: &Request,
    theirs: Vec<OwnedFd>,
) -> Result<(Conversation, Option<OwnedFd>), String> {
    let asked = async {
        let mut conversation = monitor.open(request, &theirs).await?;
        // The other ends are the process's alone, so that its end is seen.
        drop(theirs);
        let reply = conversation.next().await?;
        Ok::<_, io::Error>((conversation, reply))
    };
    match tokio::time::timeout(PATIENCE, asked).await {
        Ok(Ok((mut conversation, Some(Reply::Done)))) => {
            let fd = conversation.take_fd();
            Ok((conversation, fd))
        }
        Ok(Ok((_, Some(Reply::Failed { message })))) => Err(message),
        Ok(Ok((_, Some(other)))) => Err(format!("the monitor answered {other:?}")),
        Ok(Ok((_, None))) => Err("the pod's monitor is gone".to_owned()),
        Ok(Err(error)) => Err(format!("asking the pod's monitor: {error}")),
        Err(_) => Err("the pod's monitor does not answer".to_owned()),
    }
}
