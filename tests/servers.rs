//! The layer where it will stand: on axum routers and routes, nested, and on a bare hyper server, over TCP.

#![allow(clippy::expect_used, clippy::unwrap_used, reason = "a test panics where it fails")]

mod common;

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use axum::extract::{OriginalUri, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Request, Response};
use axum::routing::{get, post};
use axum::{Extension, Router};
use bytes::Bytes;
use futures_util::stream;
use http_body::Frame;
use http_body_util::{BodyExt as _, Full, StreamBody};
use hyper::body::Incoming;
use hyper_util::client::legacy::Client;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use hyper_util::service::TowerToHyperService;
use tokio::net::TcpListener;
use tokio::time::{sleep, timeout};
use tower::ServiceBuilder;
use tower_http::catch_panic::CatchPanicLayer;
use tower_idempotency::{Attempt, IdempotencyLayer, Ledger, MemoryStore, RequestBody, caller, key};

type Runs = Arc<AtomicU32>;

fn ledger() -> Ledger {
    Ledger::new(MemoryStore::new())
}

fn webhook(ledger: &Ledger) -> IdempotencyLayer {
    IdempotencyLayer::webhook(ledger, key::json("$.id"))
}

async fn count(State(runs): State<Runs>, attempt: Option<Extension<Attempt>>, body: String) -> String {
    let run = runs.fetch_add(1, Ordering::SeqCst) + 1;
    format!("run {run}, attempt {:?}: {body}", attempt.map(|Extension(attempt)| attempt.number()))
}

async fn serve(app: Router) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    tokio::spawn(async move { axum::serve(listener, app).await });
    addr
}

async fn post_to(addr: SocketAddr, path: &str, body: &'static str) -> (u16, bool, String) {
    let client = Client::builder(TokioExecutor::new()).build_http();
    let request = Request::post(format!("http://{addr}{path}")).body(Full::new(Bytes::from_static(body.as_bytes())));
    let response: Response<Incoming> = client.request(request.unwrap()).await.unwrap();
    let status = response.status().as_u16();
    let replayed = response.headers().contains_key("idempotent-replayed");
    let body = response.into_body().collect().await.unwrap().to_bytes();
    (status, replayed, String::from_utf8(body.to_vec()).unwrap())
}

#[tokio::test]
async fn routes_have_rules_of_their_own_on_one_ledger() {
    let ledger = ledger();
    let runs = Runs::default();
    let app = Router::new()
        .route("/a", post(count).layer(webhook(&ledger)))
        .route("/b", post(count).layer(IdempotencyLayer::webhook(&ledger, key::json("$.other"))))
        .route("/plain", get(count).post(count))
        .with_state(runs.clone());
    let addr = serve(app).await;
    assert_eq!(post_to(addr, "/a", r#"{"id":1}"#).await.2, r#"run 1, attempt Some(1): {"id":1}"#);
    assert!(post_to(addr, "/a", r#"{"id":1}"#).await.1);
    assert!(!post_to(addr, "/b", r#"{"id":1,"other":1}"#).await.1);
    assert!(post_to(addr, "/b", r#"{"id":2,"other":1}"#).await.1);
    for _ in 0..2 {
        assert!(!post_to(addr, "/plain", r#"{"id":1}"#).await.1);
    }
    assert_eq!(runs.load(Ordering::SeqCst), 4);
}

#[tokio::test]
async fn a_router_takes_the_layer_whole() {
    let runs = Runs::default();
    let app = Router::new().route("/a", post(count)).route("/b", post(count)).with_state(runs.clone());
    let addr = serve(app.layer(webhook(&ledger()))).await;
    for path in ["/a", "/b", "/a", "/b"] {
        assert_eq!(post_to(addr, path, r#"{"id":1}"#).await.0, 200);
    }
    assert_eq!(runs.load(Ordering::SeqCst), 2);
    assert_eq!(post_to(addr, "/nowhere", r#"{"id":1}"#).await.0, 404);
}

#[tokio::test]
async fn nested_routers_share_keys_unless_the_scope_tells_them_apart() {
    let runs = Runs::default();
    let original = |head: &axum::http::request::Parts| {
        head.extensions.get::<OriginalUri>().map(|OriginalUri(uri)| uri.path().to_owned())
    };
    let nest = |layer: IdempotencyLayer| Router::new().route("/hook", post(count).layer(layer));
    let ledger = ledger();
    let scoped = webhook(&ledger).scope(original);
    let app = Router::new()
        .nest("/stripped/a", nest(webhook(&ledger)))
        .nest("/stripped/b", nest(webhook(&ledger)))
        .nest("/a", nest(scoped.clone()))
        .nest("/b", nest(scoped))
        .with_state(runs.clone());
    let addr = serve(app).await;
    post_to(addr, "/stripped/a/hook", r#"{"id":1}"#).await;
    assert!(post_to(addr, "/stripped/b/hook", r#"{"id":1}"#).await.1, "the layer sees one path");
    assert!(!post_to(addr, "/a/hook", r#"{"id":1}"#).await.1);
    assert!(!post_to(addr, "/b/hook", r#"{"id":1}"#).await.1);
    assert!(post_to(addr, "/a/hook", r#"{"id":1}"#).await.1);
    assert_eq!(runs.load(Ordering::SeqCst), 3);
}

#[tokio::test]
async fn a_panic_goes_on_to_the_layer_outside() {
    async fn panics_once(State(runs): State<Runs>) -> &'static str {
        assert!(runs.fetch_add(1, Ordering::SeqCst) > 0, "the first run panics");
        "done"
    }
    let app = Router::new().route("/a", post(panics_once)).with_state(Runs::default());
    let addr = serve(app.layer(webhook(&ledger())).layer(CatchPanicLayer::new())).await;
    assert_eq!(post_to(addr, "/a", r#"{"id":1}"#).await.0, 500);
    assert_eq!(post_to(addr, "/a", r#"{"id":1}"#).await, (200, false, "done".to_owned()));
    assert!(post_to(addr, "/a", r#"{"id":1}"#).await.1);
}

#[tokio::test]
async fn p7_a_connection_that_closes_changes_nothing() {
    async fn slow(State(runs): State<Runs>) -> String {
        let run = runs.fetch_add(1, Ordering::SeqCst) + 1;
        sleep(Duration::from_millis(500)).await;
        format!("run {run}")
    }
    let runs = Runs::default();
    let app = Router::new().route("/a", post(slow)).with_state(runs.clone());
    let addr = serve(app.layer(webhook(&ledger()))).await;
    assert!(timeout(Duration::from_millis(200), post_to(addr, "/a", r#"{"id":1}"#)).await.is_err());
    assert_eq!(post_to(addr, "/a", r#"{"id":1}"#).await, (200, true, "run 1".to_owned()));
    assert_eq!(runs.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn a_bare_hyper_server_takes_the_layer() {
    let runs = Runs::default();
    let handler = {
        let runs = runs.clone();
        tower::service_fn(move |request: Request<RequestBody<Incoming>>| {
            let run = runs.fetch_add(1, Ordering::SeqCst) + 1;
            async move {
                let body = request.into_body().collect().await.unwrap().to_bytes();
                Ok::<_, Infallible>(Response::new(Full::new(Bytes::from(format!("run {run}: {} bytes", body.len())))))
            }
        })
    };
    let layer = IdempotencyLayer::api(&ledger(), caller::shared()).key(key::json("$.id"));
    let service = ServiceBuilder::new().layer(layer).service(handler);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let service = TowerToHyperService::new(service.clone());
            tokio::spawn(async move {
                let server = auto::Builder::new(TokioExecutor::new());
                let _ = server.serve_connection(TokioIo::new(stream), service).await;
            });
        }
    });
    assert_eq!(post_to(addr, "/", r#"{"id":1}"#).await, (200, false, "run 1: 8 bytes".to_owned()));
    assert_eq!(post_to(addr, "/", r#"{"id":1}"#).await, (200, true, "run 1: 8 bytes".to_owned()));
    assert_eq!(post_to(addr, "/", r#"{"id":1} "#).await.0, 422);
    assert_eq!(post_to(addr, "/", "rubbish").await.0, 400);
}

#[tokio::test]
async fn trailers_are_replayed_over_http_1() {
    async fn with_trailers() -> Response<axum::body::Body> {
        let trailers = HeaderMap::from_iter([(HeaderName::from_static("x-sum"), HeaderValue::from_static("7"))]);
        let frames = [Ok::<_, Infallible>(Frame::data(Bytes::from_static(b"body"))), Ok(Frame::trailers(trailers))];
        let body = axum::body::Body::new(StreamBody::new(stream::iter(frames)));
        Response::builder().header("trailer", "x-sum").body(body).unwrap()
    }
    let addr = serve(Router::new().route("/a", post(with_trailers).layer(webhook(&ledger())))).await;
    let client = Client::builder(TokioExecutor::new()).build_http();
    for replayed in [false, true] {
        let request = Request::post(format!("http://{addr}/a")).header("te", "trailers");
        let request = request.body(Full::new(Bytes::from_static(br#"{"id":1}"#))).unwrap();
        let response: Response<Incoming> = client.request(request).await.unwrap();
        assert_eq!(response.headers().contains_key("idempotent-replayed"), replayed);
        let body = response.into_body().collect().await.unwrap();
        assert_eq!(body.trailers().unwrap()["x-sum"], "7");
    }
}
