//! One event, three effects, and a claim for each of them: a failure at the third repeats the third alone.
//!
//! ```text
//! cargo run --example stages
//! ```
//!
//! An order event is written down, invoiced, and taken from stock, and each of that may be another system: no transaction
//! spans them. With one claim for the whole event, a failure of the stock would invoice again. Here each stage is a service behind a
//! layer of its own, which stands on any tower service, not only on those that listen.
//!
//! ```text
//! for i in 1 2 3; do curl -i -X POST 'http://127.0.0.1:3000/webhooks/shop?fail=stock' -H 'X-Event-Id: e-1'; done
//! curl http://127.0.0.1:3000/
//! ```
//!
//! `fail=order`, `fail=invoice` or `fail=stock` fails that stage the first time it runs for an event. Settings, from the
//! environment: `ADDR` (`127.0.0.1:3000`).

use std::collections::{BTreeMap, BTreeSet};
use std::convert::Infallible;
use std::env;
use std::error::Error;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::Router;
use axum::extract::{Query, State};
use axum::http::{HeaderMap, StatusCode};
use axum::routing::{get, post};
use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt as _, Full};
use serde::Deserialize;
use tokio::net::TcpListener;
use tower::util::BoxCloneSyncService;
use tower::{Layer as _, ServiceExt as _, service_fn};
use tower_idempotency::{IdempotencyLayer, Ledger, MemoryStore, RequestBody, ResponseBody, key};

const STAGES: [&str; 3] = ["order", "invoice", "stock"];

type Stage = BoxCloneSyncService<Request<Full<Bytes>>, Response<ResponseBody<Full<Bytes>>>, Infallible>;

/// What has been done, by stage, and what has failed once.
#[derive(Clone, Debug, Default)]
struct Books(Arc<Mutex<Pages>>);

#[derive(Debug, Default)]
struct Pages {
    effects: BTreeMap<&'static str, u32>,
    failed: BTreeSet<String>,
}

#[derive(Clone)]
struct Shop {
    stages: [Stage; 3],
    books: Books,
}

#[derive(Debug, Deserialize)]
struct Trouble {
    fail: Option<String>,
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let ledger = Ledger::new(MemoryStore::new());
    // The same key for all stages, each unique within its path.
    let layer = IdempotencyLayer::webhook(&ledger, key::header("x-event-id"));
    let books = Books::default();
    let stages = STAGES.map(|name| stage(name, &layer, books.clone()));
    let app =
        Router::new().route("/webhooks/shop", post(receive)).route("/", get(show)).with_state(Shop { stages, books });

    let addr = env::var("ADDR").unwrap_or_else(|_| "127.0.0.1:3000".to_owned());
    let listener = TcpListener::bind(&addr).await.map_err(|error| format!("{addr}: {error}"))?;
    introduce(&listener.local_addr()?.to_string());
    let stop = async { drop(tokio::signal::ctrl_c().await) };
    axum::serve(listener, app).with_graceful_shutdown(stop).await?;
    ledger.drain(Duration::from_secs(10)).await?;
    Ok(())
}

/// A stage as a service of its own, behind the layer.
fn stage(name: &'static str, layer: &IdempotencyLayer, books: Books) -> Stage {
    let service = service_fn(move |request: Request<RequestBody<Full<Bytes>>>| {
        let done = books.take_stage(name, request.uri().query() == Some("fail"), event_of(request.headers()));
        let (status, text) = if done { (StatusCode::OK, "done") } else { (StatusCode::BAD_GATEWAY, "failed") };
        let mut response = Response::new(Full::from(format!("{name}: {text}\n")));
        *response.status_mut() = status;
        async { Ok::<_, Infallible>(response) }
    });
    BoxCloneSyncService::new(layer.clone().layer(service))
}

impl Books {
    /// Makes the effect of a stage, unless it is to fail and has not yet for this event.
    fn take_stage(&self, name: &'static str, fails: bool, event: &str) -> bool {
        let mut pages = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if fails && pages.failed.insert(format!("{name} {event}")) {
            return false;
        }
        *pages.effects.entry(name).or_default() += 1;
        true
    }
}

fn event_of(headers: &HeaderMap) -> &str {
    headers.get("x-event-id").and_then(|id| id.to_str().ok()).unwrap_or_default()
}

/// `POST /webhooks/shop`: one stage after the other, as far as they go. The sender comes again until all are done.
async fn receive(
    State(shop): State<Shop>,
    Query(trouble): Query<Trouble>,
    headers: HeaderMap,
) -> Result<String, (StatusCode, String)> {
    let mut told = String::new();
    for (name, stage) in STAGES.into_iter().zip(shop.stages) {
        let fails = if trouble.fail.as_deref() == Some(name) { "?fail" } else { "" };
        let request = Request::post(format!("/{name}{fails}")).header("x-event-id", event_of(&headers));
        let request = request.body(Full::default()).map_err(|error| (StatusCode::BAD_REQUEST, error.to_string()))?;
        let Ok(response) = stage.oneshot(request).await;
        let status = response.status();
        let body = response.into_body().collect().await.map(|body| body.to_bytes()).unwrap_or_default();
        told.push_str(&String::from_utf8_lossy(&body));
        if !status.is_success() {
            return Err((status, told));
        }
    }
    Ok(told)
}

/// `GET /`: how often each effect was made.
async fn show(State(shop): State<Shop>) -> String {
    let pages = shop.books.0.lock().unwrap_or_else(PoisonError::into_inner);
    let count = |name: &&str| format!("{name}: {}\n", pages.effects.get(name).copied().unwrap_or_default());
    STAGES.iter().map(count).collect()
}

#[allow(clippy::print_stdout, reason = "it talks to whoever started it")]
fn introduce(addr: &str) {
    println!("The shop is open at http://{addr} (POST /webhooks/shop)");
}
