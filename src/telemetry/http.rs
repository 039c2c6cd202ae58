//! The HTTP port for those who run a node: `/healthz`, `/readyz`, `/metrics`. Read only, and
//! bounded: connections, and the time in which one must have asked and taken its answer.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::serve::Listener;
use metrics_exporter_prometheus::PrometheusHandle;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, Sleep, sleep, sleep_until};

use super::metrics;

/// Connections served at once; more wait in the listen queue.
const CONNECTIONS_MAX: usize = 64;
/// A connection is closed when it has sent no whole request for this long, or doesn't take an
/// answer. Longer than the usual pace of a scraper, so that it can keep its connection.
const IDLE: Duration = Duration::from_secs(65);
/// At a stop, answers under way get this long.
const STOP: Duration = Duration::from_millis(500);
/// Pause after a connection couldn't be accepted, mostly for want of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);

/// What a node says of its health. Called on a thread of the node for each request: must not block.
pub trait HealthView: Send + Sync {
    /// Whether the process works. An orchestrator restarts it on `Err`, which tells why.
    fn alive(&self) -> Result<(), String>;
    /// Whether it serves. A load balancer avoids it on `Err`, which tells why.
    fn ready(&self) -> Result<(), String>;
}

/// Serves until `shutdown` is done, on the tokio runtime it is called in.
///
/// # Errors
/// The listener can't be used.
pub async fn serve(
    listener: std::net::TcpListener,
    health: Arc<dyn HealthView>,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> io::Result<()> {
    listener.set_nonblocking(true)?;
    let listener = BoundedListener {
        listener: TcpListener::from_std(listener)?,
        permits: Arc::new(Semaphore::new(CONNECTIONS_MAX)),
        idle: IDLE,
    };
    serve_on(listener, health, shutdown).await
}

async fn serve_on(
    listener: BoundedListener,
    health: Arc<dyn HealthView>,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> io::Result<()> {
    let metrics = metrics::install().map_err(|error| error.to_string());
    let routes = Router::new()
        .route("/healthz", get(healthz))
        .route("/readyz", get(readyz))
        .route("/metrics", get(page))
        .fallback(async || (StatusCode::NOT_FOUND, "try /healthz, /readyz or /metrics\n"))
        .with_state(Arc::new(View { health, metrics }));
    let (stopping, stopped) = tokio::sync::oneshot::channel();
    let server = axum::serve(listener, routes).with_graceful_shutdown(async move {
        shutdown.await;
        // The receiver lives as long as the server that polls this.
        let _ = stopping.send(());
    });
    // A connection in the midst of a request would hold a graceful stop for as long as it likes.
    let cut = async {
        match stopped.await {
            Ok(()) => sleep(STOP).await,
            Err(_) => std::future::pending().await,
        }
    };
    tokio::select! {
        served = server.into_future() => served,
        () = cut => Ok(()),
    }
}

struct View {
    health: Arc<dyn HealthView>,
    metrics: Result<PrometheusHandle, String>,
}

fn verdict(verdict: Result<(), String>) -> Response {
    match verdict {
        Ok(()) => (StatusCode::OK, "ok\n").into_response(),
        Err(reason) => (StatusCode::SERVICE_UNAVAILABLE, reason + "\n").into_response(),
    }
}

async fn healthz(State(view): State<Arc<View>>) -> Response {
    verdict(view.health.alive())
}

async fn readyz(State(view): State<Arc<View>>) -> Response {
    // What is broken isn't ready either.
    verdict(view.health.alive().and_then(|()| view.health.ready()))
}

async fn page(State(view): State<Arc<View>>) -> Response {
    match &view.metrics {
        Ok(metrics) => {
            let format = [(CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")];
            (format, metrics.render()).into_response()
        }
        Err(reason) => verdict(Err(reason.clone())),
    }
}

/// Accepts no more connections than there are permits.
struct BoundedListener {
    listener: TcpListener,
    permits: Arc<Semaphore>,
    idle: Duration,
}

impl Listener for BoundedListener {
    type Io = BoundedStream;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (BoundedStream, SocketAddr) {
        loop {
            let Ok(permit) = self.permits.clone().acquire_owned().await else {
                // Nobody closes the semaphore.
                std::future::pending::<()>().await;
                continue;
            };
            match self.listener.accept().await {
                Ok((stream, address)) => {
                    let stream = BoundedStream {
                        stream,
                        idle: self.idle,
                        deadline: Box::pin(sleep(self.idle)),
                        _permit: permit,
                    };
                    return (stream, address);
                }
                Err(error) => {
                    tracing::warn!(%error, "the http port can't accept a connection");
                    sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }
}

/// A connection that fails when nothing was written to it for a while: a client that sends its
/// request byte by byte, or doesn't read the answer, doesn't hold it for long.
struct BoundedStream {
    stream: TcpStream,
    idle: Duration,
    deadline: Pin<Box<Sleep>>,
    _permit: OwnedSemaphorePermit,
}

impl BoundedStream {
    fn check(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        match self.deadline.as_mut().poll(cx) {
            Poll::Ready(()) => Err(io::ErrorKind::TimedOut.into()),
            Poll::Pending => Ok(()),
        }
    }
}

impl AsyncRead for BoundedStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.check(cx)?;
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl AsyncWrite for BoundedStream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.check(cx)?;
        let written = ready!(Pin::new(&mut self.stream).poll_write(cx, bytes))?;
        let deadline = Instant::now() + self.idle;
        self.deadline.set(sleep_until(deadline));
        Poll::Ready(Ok(written))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::sync::oneshot;

    struct Fixed(Mutex<(Result<(), String>, Result<(), String>)>);

    impl HealthView for Fixed {
        fn alive(&self) -> Result<(), String> {
            self.0.lock().unwrap().0.clone()
        }
        fn ready(&self) -> Result<(), String> {
            self.0.lock().unwrap().1.clone()
        }
    }

    async fn ask(address: SocketAddr, path: &str) -> String {
        let mut stream = TcpStream::connect(address).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }

    fn run(test: impl AsyncFnOnce(SocketAddr, Arc<Fixed>), idle: Duration) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let health = Arc::new(Fixed(Mutex::new((Ok(()), Ok(())))));
            let listener = BoundedListener {
                listener: TcpListener::bind("127.0.0.1:0").await.unwrap(),
                permits: Arc::new(Semaphore::new(2)),
                idle,
            };
            let address = listener.local_addr().unwrap();
            let (stop, stopped) = oneshot::channel::<()>();
            let server = tokio::spawn(serve_on(listener, health.clone(), async {
                let _ = stopped.await;
            }));
            test(address, health).await;
            stop.send(()).unwrap();
            let served = tokio::time::timeout(IDLE / 2, server).await;
            served.expect("stops in time").unwrap().unwrap();
        });
    }

    #[test]
    fn answers_tell_health() {
        run(
            async |address, health| {
                let answer = ask(address, "/healthz").await;
                assert!(answer.starts_with("HTTP/1.1 200") && answer.ends_with("\r\n\r\nok\n"));
                assert!(ask(address, "/readyz").await.starts_with("HTTP/1.1 200"));
                health.0.lock().unwrap().1 = Err("joining the cluster".into());
                let answer = ask(address, "/readyz").await;
                assert!(answer.starts_with("HTTP/1.1 503"), "{answer}");
                assert!(answer.ends_with("joining the cluster\n"), "{answer}");
                assert!(ask(address, "/healthz").await.starts_with("HTTP/1.1 200"));
                health.0.lock().unwrap().0 = Err("a thread failed".into());
                for path in ["/healthz", "/readyz"] {
                    assert!(ask(address, path).await.ends_with("a thread failed\n"));
                }
                assert!(ask(address, "/").await.starts_with("HTTP/1.1 404"));
                let answer = ask(address, "/metrics").await;
                assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
                assert!(answer.contains("# TYPE pontoon_build_info gauge"), "{answer}");
            },
            IDLE,
        );
    }

    #[test]
    fn the_listener_of_std_is_taken_over() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
            let address = listener.local_addr().unwrap();
            let health = Arc::new(Fixed(Mutex::new((Ok(()), Ok(())))));
            let (stop, stopped) = oneshot::channel::<()>();
            let server = tokio::spawn(serve(listener, health, async {
                let _ = stopped.await;
            }));
            assert!(ask(address, "/healthz").await.starts_with("HTTP/1.1 200"));
            drop(stop);
            server.await.unwrap().unwrap();
        });
    }

    #[test]
    fn silent_connections_are_closed_and_make_room() {
        let idle = Duration::from_millis(300);
        run(
            async |address, _| {
                // As many as there are permits; half a request each.
                let started = Instant::now();
                let mut silent = Vec::new();
                for _ in 0..2 {
                    let mut stream = TcpStream::connect(address).await.unwrap();
                    stream.write_all(b"GET /healthz HT").await.unwrap();
                    silent.push(stream);
                }
                // Served once the silent ones have timed out.
                assert!(ask(address, "/healthz").await.starts_with("HTTP/1.1 200"));
                assert!(started.elapsed() >= idle / 2);
                for mut stream in silent {
                    let mut rest = Vec::new();
                    // Closed, with a reset where bytes were unread.
                    let _ = stream.read_to_end(&mut rest).await;
                    assert!(rest.is_empty());
                }
            },
            idle,
        );
    }

    #[test]
    fn a_stop_waits_for_nobody() {
        let silent = std::cell::RefCell::new(None);
        run(
            async |address, _| {
                let mut stream = TcpStream::connect(address).await.unwrap();
                stream.write_all(b"GET /healthz HT").await.unwrap();
                sleep(Duration::from_millis(50)).await;
                *silent.borrow_mut() = Some(stream);
            },
            IDLE,
        );
    }
}
