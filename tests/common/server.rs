//! A server that is watched while its clients do it harm.

use std::collections::HashMap;
use std::convert::Infallible;
use std::fs;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode};
use axum::routing::post;
use futures_util::stream;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use hyper_util::service::TowerToHyperService;
use metrics_exporter_prometheus::{PrometheusHandle, PrometheusRecorder};
use tokio::net::TcpListener;
use tokio::runtime::Handle;
use tokio::sync::Semaphore;
use tokio::time::sleep;
use tower_idempotency::store::Store;
use tower_idempotency::{IdempotencyLayer, Ledger, MemoryStore, key};

use super::metrics::Metrics;
use super::until;

pub const MAX_IN_FLIGHT: usize = 8;
pub const MAX_OVERDUE: usize = 4;
pub const MAX_WAITING: usize = 16;
pub const MAX_GIVEN_UP: usize = 4;

/// How long a large response is: more than the buffers of a connection hold.
pub const LARGE: usize = 32 << 20;
const FRAME: usize = 64 << 10;

/// By how much the process may grow: all tests of a file share it.
const MAX_GROWTH: usize = 128 << 20;

pub struct Server {
    pub addr: SocketAddr,
    pub ledger: Ledger,
    page: PrometheusHandle,
    inside: Arc<Inside>,
    most: Mutex<Most>,
    own_tasks: usize,
    resident: Option<usize>,
}

/// The most that was seen at once.
#[derive(Clone, Debug, Default)]
pub struct Most {
    pub running: usize,
    pub overdue: usize,
    pub waiting: usize,
    pub given_up: usize,
    pub handlers: usize,
    pub bytes: usize,
}

/// What goes on in the handlers.
struct Inside {
    handlers: Level,
    bytes: Level,
    gate: Semaphore,
    runs: Mutex<HashMap<String, u32>>,
}

/// How many there are, and how many there have been at once.
#[derive(Clone, Default)]
struct Level(Arc<[AtomicUsize; 2]>);

/// Counts until it is dropped.
struct Counted(Level, usize);

/// A piece of a response that is counted as long as somebody keeps it.
struct Piece(Vec<u8>, Counted);

// === impl Server ===

impl Server {
    pub async fn start(recorder: &PrometheusRecorder, set: impl FnOnce(IdempotencyLayer) -> IdempotencyLayer) -> Self {
        Self::start_on(MemoryStore::new(), recorder, set).await
    }

    pub async fn start_on(
        store: impl Store,
        recorder: &PrometheusRecorder,
        set: impl FnOnce(IdempotencyLayer) -> IdempotencyLayer,
    ) -> Self {
        let ledger = Ledger::new(store).max_in_flight(MAX_IN_FLIGHT).max_overdue(MAX_OVERDUE);
        let ledger = ledger.max_waiting(MAX_WAITING).max_given_up(MAX_GIVEN_UP);
        let layer = set(IdempotencyLayer::webhook(&ledger, key::header("X-Id")));
        let inside = Arc::new(Inside {
            handlers: Level::default(),
            bytes: Level::default(),
            gate: Semaphore::new(0),
            runs: Mutex::default(),
        });
        let app = Router::new()
            .route("/quick", post(quick))
            .route("/gated", post(gated))
            .route("/reads", post(reads))
            .route("/large", post(large))
            .route("/endless", post(endless))
            .layer(layer)
            .with_state(Arc::clone(&inside));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        tokio::spawn(serve(listener, app));
        let (own_tasks, page) = (Handle::current().metrics().num_alive_tasks(), recorder.handle());
        Self { addr, ledger, page, inside, most: Mutex::default(), own_tasks, resident: resident() }
    }

    /// Does something, looks at all bounds meanwhile, and tells how close they came.
    pub async fn watching(&self, work: impl Future<Output = ()>) -> Most {
        let watch = async {
            loop {
                self.look();
                sleep(Duration::from_millis(1)).await;
            }
        };
        tokio::select! {
            () = work => {}
            () = watch => {}
        }
        self.look();
        let most = Most {
            handlers: self.inside.handlers.most(),
            bytes: self.inside.bytes.most(),
            ..self.most.lock().unwrap().clone()
        };
        let grown = resident().zip(self.resident).map(|(now, before)| now.saturating_sub(before) >> 20);
        eprintln!("{most:?}, {} requests, {grown:?} MiB more than before", self.requests());
        most
    }

    /// Looks whether all bounds hold.
    pub fn look(&self) {
        let (running, waiting) = (self.ledger.in_flight(), self.ledger.waiting());
        let metrics = self.metrics();
        let shown = metrics.get(r#"idempotency_attempts{state="running"}"#);
        assert_eq!((running as f64, waiting as f64), (shown, metrics.get("idempotency_waiters")));
        let (overdue, given_up) = (self.overdue(), self.given_up());
        assert!(running <= MAX_IN_FLIGHT, "{running} run");
        assert!(overdue <= MAX_OVERDUE, "{overdue} are overdue");
        assert!(waiting <= MAX_WAITING, "{waiting} wait");
        assert!(given_up <= MAX_GIVEN_UP, "{given_up} claims are given up");
        assert!(self.inside.handlers.now() <= running + overdue, "{} handlers", self.inside.handlers.now());
        if let (Some(before), Some(now)) = (self.resident, resident()) {
            assert!(now < before + MAX_GROWTH, "{before} bytes were in memory, and now {now}");
        }
        let mut most = self.most.lock().unwrap();
        most.running = most.running.max(running);
        most.overdue = most.overdue.max(overdue);
        most.waiting = most.waiting.max(waiting);
        most.given_up = most.given_up.max(given_up);
    }

    /// Returns when nothing is left of what the clients have brought about, not even a task. They have to have left.
    pub async fn is_idle(&self) {
        until(async || {
            let held = [self.ledger.in_flight(), self.overdue(), self.ledger.waiting(), self.given_up()];
            let inside = [self.inside.handlers.now(), self.inside.bytes.now()];
            held == [0; 4] && inside == [0; 2] && self.tasks() == 0
        })
        .await;
    }

    pub fn metrics(&self) -> Metrics {
        Metrics::parse(&self.page.render())
    }

    pub fn overdue(&self) -> usize {
        self.metrics().get(r#"idempotency_attempts{state="overdue"}"#) as usize
    }

    fn given_up(&self) -> usize {
        self.metrics().get("idempotency_claims_given_up") as usize
    }

    /// How many tasks there are beside the server's own.
    pub fn tasks(&self) -> usize {
        Handle::current().metrics().num_alive_tasks().saturating_sub(self.own_tasks)
    }

    /// How many requests have ended.
    pub fn requests(&self) -> usize {
        self.metrics().sum("idempotency_requests_total") as usize
    }

    /// Whether no handler gets on with its response.
    pub async fn stalls(&self) -> bool {
        let before = self.inside.bytes.now();
        sleep(Duration::from_millis(100)).await;
        before > 0 && before == self.inside.bytes.now()
    }

    /// Lets the handlers behind the gate go on.
    pub fn open(&self) {
        self.inside.gate.close();
    }

    pub fn runs(&self) -> HashMap<String, u32> {
        self.inside.runs.lock().unwrap().clone()
    }

    pub fn has_run_nothing_twice(&self) {
        assert!(self.runs().values().all(|&runs| runs == 1), "{:?}", self.runs());
    }
}

/// Serves without the defences of the server itself, which closes a connection whose streams are reset too often.
async fn serve(listener: TcpListener, app: Router) {
    loop {
        let (stream, _) = listener.accept().await.unwrap();
        let app = TowerToHyperService::new(app.clone());
        tokio::spawn(async move {
            let mut server = auto::Builder::new(TokioExecutor::new());
            server.http2().max_pending_accept_reset_streams(usize::MAX).max_local_error_reset_streams(usize::MAX);
            let _ = server.serve_connection(TokioIo::new(stream), app).await;
        });
    }
}

/// How much of the process is in memory, where that can be known.
fn resident() -> Option<usize> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    Some(line.trim().strip_suffix(" kB")?.parse::<usize>().ok()? << 10)
}

// The handlers.

async fn quick(State(inside): State<Arc<Inside>>, head: HeaderMap) -> &'static str {
    let _inside = inside.enter(&head);
    sleep(Duration::from_millis(2)).await;
    "done"
}

async fn gated(State(inside): State<Arc<Inside>>, head: HeaderMap) -> &'static str {
    let _inside = inside.enter(&head);
    // It is closed when it opens.
    let _ = inside.gate.acquire().await;
    "done"
}

async fn reads(State(inside): State<Arc<Inside>>, head: HeaderMap, body: Body) -> Result<String, StatusCode> {
    let _inside = inside.enter(&head);
    let read = axum::body::to_bytes(body, usize::MAX).await;
    read.map(|body| format!("{} bytes", body.len())).map_err(|_| StatusCode::BAD_REQUEST)
}

async fn large(State(inside): State<Arc<Inside>>, head: HeaderMap) -> Body {
    inside.stream(&head, LARGE / FRAME)
}

async fn endless(State(inside): State<Arc<Inside>>, head: HeaderMap) -> Body {
    inside.stream(&head, usize::MAX)
}

// === impl Inside ===

impl Inside {
    fn enter(&self, head: &HeaderMap) -> Counted {
        *self.runs.lock().unwrap().entry(head["x-id"].to_str().unwrap().to_owned()).or_default() += 1;
        self.handlers.count(1)
    }

    /// A body whose frames are made when they are asked for.
    fn stream(&self, head: &HeaderMap, frames: usize) -> Body {
        let state = (self.enter(head), self.bytes.clone(), frames);
        Body::from_stream(stream::unfold(state, async |(handler, bytes, left)| {
            let left = left.checked_sub(1)?;
            let piece = Bytes::from_owner(Piece(vec![b'x'; FRAME], bytes.count(FRAME)));
            Some((Ok::<_, Infallible>(piece), (handler, bytes, left)))
        }))
    }
}

// === impl Level ===

impl Level {
    fn count(&self, more: usize) -> Counted {
        let [now, most] = &*self.0;
        most.fetch_max(now.fetch_add(more, Ordering::SeqCst) + more, Ordering::SeqCst);
        Counted(self.clone(), more)
    }

    fn now(&self) -> usize {
        self.0[0].load(Ordering::SeqCst)
    }

    fn most(&self) -> usize {
        self.0[1].load(Ordering::SeqCst)
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.0[0].fetch_sub(self.1, Ordering::SeqCst);
    }
}

// === impl Piece ===

impl AsRef<[u8]> for Piece {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}
