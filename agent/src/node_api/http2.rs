//! HTTP/2 connections of the node API, on the `h2` crate itself.
//!
//! The API server has one connection to a node and asks all over it; what lasts are logs that are
//! followed, by the thousand. hyper gives each stream a task of its own for as long as its answer
//! lasts. Here a request has a task until its answer begins; after that it is a small entry in the
//! connection's own task, and an answer that waits costs its body and what HTTP/2 keeps of a stream.

use std::convert::Infallible;
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::{Duration, SystemTime};

use axum::body::{Body, HttpBody};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Request, Response, header};
use futures::StreamExt;
use futures::stream::FuturesUnordered;
use h2::server::SendResponse;
use h2::{PingPong, Reason, RecvStream, SendStream};
use hyper::body::{Bytes, Frame, SizeHint};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::task::JoinHandle;

/// Longest header list: no command line travels over HTTP/2.
const MAX_HEADERS: u32 = 64 << 10;
/// Streams at once on one connection (Go's server: 250).
const STREAMS: u32 = 1000;
/// Bytes of one answer that wait for the client at most.
const MAX_BUFFERED: usize = 64 << 10;
/// What a client may send ahead, on a stream and on the connection.
const WINDOW: u32 = 1 << 20;
/// A peer is asked so often whether it lives, and has as long to say so.
const KEEPALIVE: Duration = Duration::from_secs(30);

/// Headers that are of a connection of HTTP/1.1 and have no place here (RFC 9113, 8.2.2).
const OF_CONNECTIONS: [HeaderName; 5] = [
    header::CONNECTION,
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-connection"),
    header::TRANSFER_ENCODING,
    header::UPGRADE,
];

/// Serves the requests of one connection until it ends; `answer` is called for each.
pub(super) async fn serve<S, F, A>(stream: S, answer: F) -> io::Result<()>
where
    S: AsyncRead + AsyncWrite + Unpin,
    F: Fn(Request<Body>) -> A,
    A: Future<Output = Result<Response<Body>, Infallible>> + Send + 'static,
{
    let mut connection = h2::server::Builder::new()
        .max_concurrent_streams(STREAMS)
        .max_header_list_size(MAX_HEADERS)
        .max_send_buffer_size(MAX_BUFFERED)
        .initial_window_size(WINDOW)
        .initial_connection_window_size(WINDOW)
        .handshake::<_, Bytes>(stream)
        .await
        .map_err(io::Error::other)?;
    let mut silence = Box::pin(silence(connection.ping_pong()));
    let mut exchanges = FuturesUnordered::new();
    loop {
        tokio::select! {
            // Also what moves the frames of all streams.
            accepted = connection.accept() => match accepted {
                Some(Ok((request, reply))) => {
                    let request = request.map(|stream| Body::new(Incoming(stream)));
                    let task = Task(tokio::spawn(answer(request)));
                    exchanges.push(Exchange::Asked { task, reply });
                }
                Some(Err(error)) => return Err(io::Error::other(error)),
                None => return Ok(()),
            },
            Some(()) = exchanges.next() => {}
            () = &mut silence => {
                return Err(io::Error::new(io::ErrorKind::TimedOut, "the client answers no PING"));
            }
        }
    }
}

/// Returns when the peer does not answer any more.
async fn silence(ping: Option<PingPong>) {
    let Some(mut ping) = ping else { return std::future::pending().await };
    loop {
        tokio::time::sleep(KEEPALIVE).await;
        match tokio::time::timeout(KEEPALIVE, ping.ping(h2::Ping::opaque())).await {
            Ok(Ok(_)) => {}
            // The connection says itself what became of it.
            Ok(Err(_)) => return std::future::pending().await,
            Err(_) => return,
        }
    }
}

/// What makes an answer; ended where nobody waits for it any more.
struct Task(JoinHandle<Result<Response<Body>, Infallible>>);

impl Drop for Task {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// One request and its answer. Dropped with the connection, and ended when the client resets it.
enum Exchange {
    Asked {
        task: Task,
        reply: SendResponse<Bytes>,
    },
    /// With what the client has had no room for yet; boxed, as most have none.
    Sending {
        stream: SendStream<Bytes>,
        body: Body,
        left: Option<Box<Bytes>>,
    },
}

impl Future for Exchange {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        if let Self::Asked { task, reply } = &mut *self {
            if reply.poll_reset(cx).is_ready() {
                return Poll::Ready(());
            }
            let Ok(Ok(answer)) = ready!(Pin::new(&mut task.0).poll(cx)) else {
                reply.send_reset(Reason::INTERNAL_ERROR);
                return Poll::Ready(());
            };
            let (head, body) = split(answer);
            let last = body.is_end_stream();
            match reply.send_response(head, last) {
                Ok(stream) if !last => {
                    *self = Self::Sending { stream, body, left: None };
                }
                _ => return Poll::Ready(()),
            }
        }
        match &mut *self {
            Self::Sending { stream, body, left } => send(stream, body, left, cx),
            Self::Asked { .. } => Poll::Ready(()),
        }
    }
}

/// The head of an answer as HTTP/2 has it.
fn split(answer: Response<Body>) -> (Response<()>, Body) {
    let (mut head, body) = answer.into_parts();
    for name in OF_CONNECTIONS {
        head.headers.remove(name);
    }
    if !head.headers.contains_key(header::DATE)
        && let Ok(date) = HeaderValue::from_str(&httpdate::fmt_http_date(SystemTime::now()))
    {
        head.headers.insert(header::DATE, date);
    }
    if !body.is_end_stream()
        && let Some(length) = body.size_hint().exact()
    {
        head.headers.entry(header::CONTENT_LENGTH).or_insert(length.into());
    }
    (Response::from_parts(head, ()), body)
}

/// Sends `body` as fast as the client takes it.
fn send(
    stream: &mut SendStream<Bytes>,
    body: &mut Body,
    left: &mut Option<Box<Bytes>>,
    cx: &mut Context<'_>,
) -> Poll<()> {
    loop {
        if stream.poll_reset(cx).is_ready() {
            return Poll::Ready(());
        }
        let Some(chunk) = left else {
            match ready!(Pin::new(&mut *body).poll_frame(cx)) {
                None => {
                    let _ = stream.send_data(Bytes::new(), true);
                    return Poll::Ready(());
                }
                Some(Err(error)) => {
                    tracing::debug!(%error, "an answer of the node API broke off");
                    stream.send_reset(Reason::INTERNAL_ERROR);
                    return Poll::Ready(());
                }
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(data) if data.is_empty() => {}
                    Ok(data) => *left = Some(Box::new(data)),
                    Err(frame) => {
                        let _ = stream.send_trailers(frame.into_trailers().unwrap_or_default());
                        return Poll::Ready(());
                    }
                },
            }
            continue;
        };
        stream.reserve_capacity(chunk.len());
        while stream.capacity() == 0 {
            if !matches!(ready!(stream.poll_capacity(cx)), Some(Ok(_))) {
                return Poll::Ready(());
            }
        }
        let part = chunk.split_to(stream.capacity().min(chunk.len()));
        if chunk.is_empty() {
            *left = None;
        }
        let last = left.is_none() && body.is_end_stream();
        if stream.send_data(part, last).is_err() || last {
            return Poll::Ready(());
        }
    }
}

/// The body of a request.
struct Incoming(RecvStream);

impl HttpBody for Incoming {
    type Data = Bytes;
    type Error = h2::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, h2::Error>>> {
        if let Some(data) = ready!(self.0.poll_data(cx)) {
            return Poll::Ready(Some(data.and_then(|data| {
                self.0.flow_control().release_capacity(data.len())?;
                Ok(Frame::data(data))
            })));
        }
        let trailers: Option<HeaderMap> = ready!(self.0.poll_trailers(cx)?);
        Poll::Ready(trailers.map(|trailers| Ok(Frame::trailers(trailers))))
    }

    fn is_end_stream(&self) -> bool {
        self.0.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::default()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use axum::http::StatusCode;
    use futures::stream;
    use h2::client::SendRequest;
    use http_body_util::BodyExt;

    use super::*;

    type Answer = Pin<Box<dyn Future<Output = Result<Response<Body>, Infallible>> + Send>>;

    /// A client of a connection on which `answer` answers.
    async fn client(
        answer: impl Fn(Request<Body>) -> Answer + Send + Sync + 'static,
    ) -> (SendRequest<Bytes>, JoinHandle<io::Result<()>>) {
        let (near, far) = tokio::io::duplex(16 << 10);
        let server = tokio::spawn(async move { serve(far, answer).await });
        let (client, connection) = h2::client::handshake(near).await.unwrap();
        tokio::spawn(connection);
        (client, server)
    }

    async fn all(mut body: RecvStream) -> Result<Vec<u8>, h2::Error> {
        let mut bytes = Vec::new();
        while let Some(data) = body.data().await {
            let data = data?;
            body.flow_control().release_capacity(data.len())?;
            bytes.extend_from_slice(&data);
        }
        Ok(bytes)
    }

    fn get(path: &str) -> Request<()> {
        Request::get(format!("https://node{path}")).body(()).unwrap()
    }

    #[tokio::test]
    async fn bodies_larger_than_every_window_pass_both_ways() {
        let (client, _server) = client(|request| {
            Box::pin(async move {
                let body = request.into_body().collect().await.unwrap().to_bytes();
                Ok(Response::new(Body::from(body)))
            })
        })
        .await;
        let mut asked = client.ready().await.unwrap();
        let request = Request::post("https://node/echo").body(()).unwrap();
        let (answer, mut upload) = asked.send_request(request, false).unwrap();
        let sent: Vec<u8> = (0..5_000_000_u32).map(|n| (n / 7) as u8).collect();
        let mut left = Bytes::from(sent.clone());
        while !left.is_empty() {
            upload.reserve_capacity(left.len());
            let room = std::future::poll_fn(|cx| upload.poll_capacity(cx)).await.unwrap().unwrap();
            upload.send_data(left.split_to(room), left.is_empty()).unwrap();
        }
        let answer = answer.await.unwrap();
        assert_eq!(answer.headers()["content-length"], "5000000");
        assert!(all(answer.into_body()).await.unwrap() == sent);
    }

    #[tokio::test]
    async fn heads_are_of_http2() {
        let (client, _server) = client(|request| {
            let empty = request.uri().path() == "/empty";
            Box::pin(async move {
                let body = if empty { Body::empty() } else { Body::from("text") };
                let answer = Response::builder()
                    .status(if empty { StatusCode::NO_CONTENT } else { StatusCode::OK })
                    .header("connection", "close")
                    .header("transfer-encoding", "chunked");
                Ok(answer.body(body).unwrap())
            })
        })
        .await;
        for (path, length, text) in [("/empty", None, ""), ("/", Some("4"), "text")] {
            let mut client = client.clone().ready().await.unwrap();
            let answer = client.send_request(get(path), true).unwrap().0.await.unwrap();
            let header = |name| answer.headers().get(name).map(|value| value.to_str().unwrap());
            assert_eq!(header("content-length"), length, "{path}");
            assert_eq!((header("connection"), header("transfer-encoding")), (None, None));
            assert!(header("date").is_some_and(|date| date.ends_with(" GMT")));
            assert_eq!(all(answer.into_body()).await.unwrap(), text.as_bytes());
        }
    }

    /// Counts those that are there still.
    struct Guest(Arc<AtomicUsize>);

    impl Guest {
        fn new(of: &Arc<AtomicUsize>) -> Self {
            of.fetch_add(1, Ordering::Relaxed);
            Self(of.clone())
        }
    }

    impl Drop for Guest {
        fn drop(&mut self) {
            self.0.fetch_sub(1, Ordering::Relaxed);
        }
    }

    async fn becomes(count: &AtomicUsize, wanted: usize) {
        while count.load(Ordering::Relaxed) != wanted {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    #[tokio::test]
    async fn what_a_client_gives_up_is_ended_before_and_in_its_answer() {
        let guests = Arc::new(AtomicUsize::new(0));
        let counted = guests.clone();
        let (client, server) = client(move |request| {
            let guest = Guest::new(&counted);
            Box::pin(async move {
                if request.uri().path() == "/late" {
                    std::future::pending::<()>().await;
                }
                let first = stream::iter([Ok::<_, io::Error>(Bytes::from("first"))]);
                let rest = stream::once(async move {
                    let _guest = guest;
                    std::future::pending().await
                });
                Ok(Response::new(Body::from_stream(first.chain(rest))))
            })
        })
        .await;
        let mut client = client.ready().await.unwrap();
        let (late, mut late_stream) = client.send_request(get("/late"), true).unwrap();
        let mut follows = Vec::new();
        for _ in 0..200 {
            let mut client = client.clone().ready().await.unwrap();
            let answer = client.send_request(get("/follow"), true).unwrap().0.await.unwrap();
            let mut body = answer.into_body();
            assert_eq!(body.data().await.unwrap().unwrap(), "first");
            follows.push(body);
        }
        becomes(&guests, 201).await;
        late_stream.send_reset(Reason::CANCEL);
        assert!(late.await.is_err());
        becomes(&guests, 200).await;
        follows.truncate(50);
        becomes(&guests, 50).await;
        drop((client, follows, late_stream));
        becomes(&guests, 0).await;
        server.await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn an_answer_that_breaks_off_does_not_look_whole() {
        let (client, _server) = client(|_| {
            let parts = [Ok(Bytes::from("half")), Err(io::Error::other("disk"))];
            Box::pin(async move { Ok(Response::new(Body::from_stream(stream::iter(parts)))) })
        })
        .await;
        let mut client = client.ready().await.unwrap();
        // The head may be overtaken by the end.
        let error = match client.send_request(get("/"), true).unwrap().0.await {
            Ok(answer) => all(answer.into_body()).await.unwrap_err(),
            Err(error) => error,
        };
        assert_eq!(error.reason(), Some(Reason::INTERNAL_ERROR));
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_answers_no_ping_is_given_up() {
        let (near, far) = tokio::io::duplex(16 << 10);
        let answer = |_| async { Ok(Response::new(Body::empty())) };
        let server = tokio::spawn(serve(far, answer));
        let (_client, connection) = h2::client::handshake::<_>(near).await.unwrap();
        // Not polled any more: a peer that has gone without a word.
        let error = server.await.unwrap().unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut, "{error}");
        drop(connection);
    }

    #[test]
    fn an_answer_that_waits_is_small() {
        assert!(size_of::<Exchange>() <= 48, "{}", size_of::<Exchange>());
    }
}
