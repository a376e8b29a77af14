//! A service behind the layer, and what it answers.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use bytes::Bytes;
use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use futures_util::stream;
use http::{HeaderMap, Request, Response, StatusCode};
use http_body::Frame;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt as _, Full, StreamBody};
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;
use tower::util::BoxCloneSyncService;
use tower::{BoxError, Layer as _, ServiceExt as _, service_fn};
use tower_idempotency::key::Key;
use tower_idempotency::{Attempt, IdempotencyLayer, RequestBody, ResponseBody};

pub type Body = UnsyncBoxBody<Bytes, io::Error>;
pub type Incoming = Request<RequestBody<Body>>;
type Service = BoxCloneSyncService<Request<Body>, Response<ResponseBody<Body>>, BoxError>;

/// One process's service. Clones are the same.
#[derive(Clone)]
pub struct App {
    service: Service,
    runs: Arc<AtomicU32>,
}

/// A response, read to its end.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Answer {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub body: Bytes,
    pub trailers: Option<HeaderMap>,
}

impl App {
    /// The handler gets the request and the number of its run, counted in this process.
    pub fn new<F, R>(layer: &IdempotencyLayer, handler: F) -> Self
    where
        F: Fn(Incoming, u32) -> R + Clone + Send + Sync + 'static,
        R: Future<Output = Result<Response<Body>, BoxError>> + Send + 'static,
    {
        let runs = Arc::new(AtomicU32::new(0));
        let count = Arc::clone(&runs);
        let handler = service_fn(move |request| handler(request, count.fetch_add(1, Ordering::SeqCst) + 1));
        Self { service: BoxCloneSyncService::new(layer.layer(handler)), runs }
    }

    pub fn runs(&self) -> u32 {
        self.runs.load(Ordering::SeqCst)
    }

    // Boxed, because the compiler loses the lifetime of the error's type in a future it has to look into.
    pub fn call(&self, request: Request<Body>) -> BoxFuture<'static, Result<Response<ResponseBody<Body>>, BoxError>> {
        self.service.clone().oneshot(request).boxed()
    }

    pub fn send(&self, request: Request<Body>) -> BoxFuture<'static, Answer> {
        let response = self.call(request);
        async { Answer::read(response.await.expect("a response")).await }.boxed()
    }
}

impl Answer {
    pub async fn read(response: Response<ResponseBody<Body>>) -> Self {
        let (head, body) = response.into_parts();
        let body = body.collect().await.expect("a whole body");
        let trailers = body.trailers().cloned();
        Self { status: head.status, headers: head.headers, body: body.to_bytes(), trailers }
    }

    pub fn is_replayed(&self) -> bool {
        self.headers.get("idempotent-replayed").is_some_and(|value| value == "true")
    }

    pub fn is_stored(&self) -> bool {
        self.headers.get("idempotency-stored").is_none_or(|value| value != "false")
    }

    /// The code of a refusal.
    pub fn code(&self) -> Option<String> {
        let problem: serde_json::Value = serde_json::from_slice(&self.body).ok()?;
        problem["code"].as_str().map(str::to_owned)
    }
}

pub fn body(bytes: impl Into<Bytes>) -> Body {
    Full::new(bytes.into()).map_err(|never| match never {}).boxed_unsync()
}

/// A delivery of a webhook, with its id in a header.
pub fn event(id: &str) -> Request<Body> {
    Request::post("/hooks").header("x-id", id).body(body("event")).unwrap()
}

/// A request of an API.
pub fn order(key: &str, payload: &'static str) -> Request<Body> {
    Request::post("/orders").header("idempotency-key", key).body(body(payload)).unwrap()
}

/// What a handler answers.
pub fn answer(status: u16, text: impl Into<String>) -> Result<Response<Body>, BoxError> {
    Ok(Response::builder().status(status).body(body(text.into())).unwrap())
}

/// The handle of the attempt that a handler runs in.
pub fn attempt(request: &Incoming) -> Attempt {
    request.extensions().get::<Attempt>().expect("an attempt").clone()
}

/// A handler that waits until it is let go.
pub fn gated(layer: &IdempotencyLayer) -> (App, Arc<Semaphore>) {
    let gate = Arc::new(Semaphore::new(0));
    let opened = Arc::clone(&gate);
    let app = App::new(layer, move |_, run| {
        let opened = Arc::clone(&opened);
        async move {
            opened.acquire().await?.forget();
            answer(200, format!("run {run}"))
        }
    });
    (app, gate)
}

/// Sends a delivery from a client of its own.
pub fn deliver(app: &App, request: Request<Body>) -> JoinHandle<Answer> {
    tokio::spawn(app.send(request))
}

/// A handler that answers with this status, and the number of its run.
pub fn counting(layer: &IdempotencyLayer, status: u16) -> App {
    App::new(layer, move |_, run| async move { answer(status, format!("run {run}")) })
}

/// A handler that answers with the request body as it saw it.
pub fn echoing(layer: &IdempotencyLayer) -> App {
    App::new(layer, |request: Incoming, _| async move {
        let seen = request.into_body().collect().await?.to_bytes();
        Ok(Response::new(body(seen)))
    })
}

/// A body of these frames.
pub fn frames(frames: Vec<io::Result<Frame<Bytes>>>) -> Body {
    StreamBody::new(stream::iter(frames)).boxed_unsync()
}

pub fn chunk(text: &'static str) -> io::Result<Frame<Bytes>> {
    Ok(Frame::data(Bytes::from_static(text.as_bytes())))
}

/// What a layer sees of a request, for the key under which a store knows it.
pub fn key_of(layer: &IdempotencyLayer, request: Request<Body>) -> Key {
    let (head, _) = request.into_parts();
    layer.key_of(&head, &Bytes::new()).expect("a key in the head")
}
