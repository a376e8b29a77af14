//! A shop: an order event arrives, an invoice is made, stock goes down. Once, whatever happens.
//!
//! ```text
//! cargo run --example orders
//! ```
//!
//! Settings, from the environment: `ADDR` (`127.0.0.1:3000`), `REDIS_URL` or `DATABASE_URL` (both unset: the store is in memory), and
//! `LEASE_MS`, `RETENTION_MS` and `PATIENCE_MS`, which override the defaults of all routes. `DATABASE_URL` is
//! `sqlite://shop.db`, a file that needs no server, or `postgres://…`.
//!
//! To rehearse trouble, the three POST routes take query parameters: `delay_ms` sleeps before the effect, `after_ms` after
//! it, and `fail=500` or `fail=panic` fails the first run for a key before its effect, or the first `times` runs.

use std::collections::BTreeMap;
use std::env;
use std::error::Error;
use std::str::FromStr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use axum::body::Bytes;
use axum::extract::{Query, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::serve::ListenerExt as _;
use axum::{Extension, Json, Router};
use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusHandle};
use serde::{Deserialize, Serialize};
use tokio::net::TcpListener;
use tokio::time::{interval, sleep};
use tower_http::catch_panic::CatchPanicLayer;
use tower_idempotency::store::{MAX_DURATION, MIN_DURATION};
use tower_idempotency::{
    Attempt, IdempotencyLayer, Ledger, MemoryStore, PostgresStore, RedisStore, SqliteStore, caller, key,
};

const INITIAL_STOCK: i64 = 1000;

/// From what a store in memory takes to a handler that is slow, in seconds.
const BUCKETS: [f64; 12] = [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0];

/// What happened in this process.
#[derive(Clone, Debug, Default)]
struct Books(Arc<Mutex<Pages>>);

#[derive(Clone, Debug, Default, Serialize)]
struct Pages {
    orders: u64,
    invoices: u64,
    /// Below zero, it is on order.
    stock: BTreeMap<String, i64>,
    deliveries: u64,
    /// How often a protected handler was entered.
    runs: u64,
}

#[derive(Debug, Deserialize)]
struct Order {
    sku: String,
    quantity: u32,
}

/// An order that was placed.
#[derive(Debug, Serialize)]
struct Placed {
    order: u64,
    invoice: u64,
    sku: String,
    quantity: u32,
}

/// A delivery that was counted.
#[derive(Debug, Serialize)]
struct Counted {
    delivery: u64,
}

/// What is to go wrong.
#[derive(Debug, Deserialize)]
#[serde(default)]
struct Trouble {
    delay_ms: u64,
    after_ms: u64,
    fail: Option<Failure>,
    times: u32,
}

#[derive(Debug, Deserialize)]
enum Failure {
    #[serde(rename = "500")]
    Status,
    #[serde(rename = "panic")]
    Panic,
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let filter = tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| "warn".into());
    tracing_subscriber::fmt().with_env_filter(filter).init();
    // Before the layer is at work: what happens without a recorder is not counted.
    let metrics = PrometheusBuilder::new().set_buckets(&BUCKETS)?.install_recorder()?;
    tokio::spawn(keep_up(metrics.clone()));

    // One store, one ledger, and on it a layer for each rule.
    let (ledger, store) = open_store().await?;
    let orders = IdempotencyLayer::api(&ledger, caller::authorization()).require_key();
    let shop = IdempotencyLayer::webhook(&ledger, key::header("X-Idempotency-Key").or(key::json("$.event_id")));
    // Postmark delivers, opens and clicks one message, for each of its recipients.
    let postmark = IdempotencyLayer::webhook(
        &ledger,
        key::json("$.MessageID")
            .and(key::json("$.Recipient"))
            .and_optional(key::json("$.RecordType"))
            .and_optional(key::json("$.ReceivedAt")),
    );

    let app = Router::new()
        .route("/orders", post(place_order).layer(configured(orders)?))
        .route("/webhooks/shop", post(receive_order).layer(configured(shop)?))
        .route("/webhooks/postmark", post(count_delivery).layer(configured(postmark)?))
        .route("/books", get(show_books))
        .route("/metrics", get(async move || show_metrics(&metrics)))
        // A panic goes through the layer, which lets the next delivery run; here it becomes a 500.
        .layer(CatchPanicLayer::new())
        .with_state(Books::default());

    let addr = env::var("ADDR").unwrap_or_else(|_| "127.0.0.1:3000".to_owned());
    let listener = TcpListener::bind(&addr).await.map_err(|error| format!("{addr}: {error}"))?;
    introduce(&listener.local_addr()?.to_string(), store);
    let listener = listener.tap_io(|connection| {
        // Without it small answers may wait for the acknowledgement of what went before.
        let _ = connection.set_nodelay(true);
    });
    axum::serve(listener, app).with_graceful_shutdown(asked_to_stop()).await?;
    ledger.drain(Duration::from_secs(10)).await?;
    Ok(())
}

/// A store as it is configured, with its name.
async fn open_store() -> Result<(Ledger, &'static str), Box<dyn Error>> {
    let set = |name| env::var(name).ok().filter(|url| !url.is_empty());
    Ok(match (set("REDIS_URL"), set("DATABASE_URL")) {
        (Some(_), Some(_)) => return Err("REDIS_URL and DATABASE_URL: which?".into()),
        (Some(url), None) => (Ledger::new(RedisStore::new(&url)?), "Redis"),
        (None, Some(url)) => match url.strip_prefix("sqlite://") {
            Some(path) => (Ledger::new(SqliteStore::open(path).await?), "SQLite"),
            None => {
                let store = PostgresStore::open(&url)?;
                store.migrate().await?;
                (Ledger::new(store), "PostgreSQL")
            }
        },
        (None, None) => (Ledger::new(MemoryStore::new()), "memory"),
    })
}

/// `POST /orders`: a client of the shop's API.
async fn place_order(
    State(books): State<Books>,
    Query(trouble): Query<Trouble>,
    attempt: Option<Extension<Attempt>>,
    body: Bytes,
) -> Response {
    match order(&books, &trouble, attempt, &body).await {
        Ok(order) => {
            let location = format!("/orders/{}", order.order);
            (StatusCode::CREATED, [(header::LOCATION, location)], Json(order)).into_response()
        }
        Err(refusal) => refusal.into_response(),
    }
}

/// `POST /webhooks/shop`: the shop's platform tells of an order.
async fn receive_order(
    State(books): State<Books>,
    Query(trouble): Query<Trouble>,
    attempt: Option<Extension<Attempt>>,
    body: Bytes,
) -> Response {
    match order(&books, &trouble, attempt, &body).await {
        Ok(order) => Json(order).into_response(),
        Err(refusal) => refusal.into_response(),
    }
}

/// `POST /webhooks/postmark`: a mail was delivered, opened or clicked.
async fn count_delivery(
    State(books): State<Books>,
    Query(trouble): Query<Trouble>,
    attempt: Option<Extension<Attempt>>,
) -> Result<Json<Counted>, StatusCode> {
    enter(&books, &trouble, attempt).await?;
    let delivery = {
        let mut pages = books.open();
        pages.deliveries += 1;
        pages.deliveries
    };
    pause(trouble.after_ms).await;
    Ok(Json(Counted { delivery }))
}

async fn show_books(State(books): State<Books>) -> Json<Pages> {
    Json(books.open().clone())
}

/// What has been counted and timed, as Prometheus reads it.
fn show_metrics(metrics: &PrometheusHandle) -> impl IntoResponse + use<> {
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], metrics.render())
}

/// Sorts durations into their buckets, also when nobody looks: until then each of them takes up memory.
async fn keep_up(metrics: PrometheusHandle) {
    let mut ticks = interval(Duration::from_secs(5));
    loop {
        ticks.tick().await;
        metrics.run_upkeep();
    }
}

/// The order, its invoice and its stock.
async fn order(
    books: &Books,
    trouble: &Trouble,
    attempt: Option<Extension<Attempt>>,
    body: &[u8],
) -> Result<Placed, StatusCode> {
    enter(books, trouble, attempt).await?;
    let Order { sku, quantity } = serde_json::from_slice(body).map_err(|_| StatusCode::BAD_REQUEST)?;
    let placed = {
        let mut pages = books.open();
        *pages.stock.entry(sku.clone()).or_insert(INITIAL_STOCK) -= i64::from(quantity);
        pages.orders += 1;
        pages.invoices += 1;
        Placed { order: pages.orders, invoice: pages.invoices, sku, quantity }
    };
    pause(trouble.after_ms).await;
    Ok(placed)
}

/// Counts the run, and fails it where that is to be rehearsed.
async fn enter(books: &Books, trouble: &Trouble, attempt: Option<Extension<Attempt>>) -> Result<(), StatusCode> {
    books.open().runs += 1;
    pause(trouble.delay_ms).await;
    // Without a key there is no attempt, and every run is the first.
    let number = attempt.map_or(1, |Extension(attempt)| attempt.number());
    match trouble.fail {
        Some(Failure::Status) if number <= trouble.times => Err(StatusCode::INTERNAL_SERVER_ERROR),
        Some(Failure::Panic) if number <= trouble.times => panic!("run {number} was asked to panic"),
        _ => Ok(()),
    }
}

/// Sleeps, unless for no time at all: the timer's own tick takes a millisecond.
async fn pause(millis: u64) {
    if millis > 0 {
        sleep(Duration::from_millis(millis)).await;
    }
}

/// The layer with what the environment says.
fn configured(mut layer: IdempotencyLayer) -> Result<IdempotencyLayer, Box<dyn Error>> {
    if let Some(lease) = millis("LEASE_MS", MIN_DURATION)? {
        layer = layer.lease(lease);
    }
    if let Some(retention) = millis("RETENTION_MS", MIN_DURATION)? {
        layer = layer.retention(retention);
    }
    if let Some(patience) = millis("PATIENCE_MS", Duration::ZERO)? {
        layer = layer.patience(patience);
    }
    Ok(layer)
}

fn millis(name: &str, least: Duration) -> Result<Option<Duration>, Box<dyn Error>> {
    let Ok(text) = env::var(name) else { return Ok(None) };
    let duration = u64::from_str(&text).map(Duration::from_millis).map_err(|error| format!("{name}: {error}"))?;
    match (least..=MAX_DURATION).contains(&duration) {
        true => Ok(Some(duration)),
        false => Err(format!("{name}: from {} to {} ms", least.as_millis(), MAX_DURATION.as_millis()).into()),
    }
}

/// Returns at Ctrl-C, or when a supervisor asks.
async fn asked_to_stop() {
    #[cfg(unix)]
    {
        use tokio::signal::unix::{SignalKind, signal};
        if let Ok(mut terminated) = signal(SignalKind::terminate()) {
            tokio::select! {
                _ = tokio::signal::ctrl_c() => {}
                _ = terminated.recv() => {}
            }
            return;
        }
    }
    let _ = tokio::signal::ctrl_c().await;
}

#[allow(clippy::print_stdout, reason = "it talks to whoever started it")]
fn introduce(addr: &str, store: &str) {
    println!(
        r#"The shop is open at http://{addr} (store: {store}).

Send each of these twice:

  curl -i http://{addr}/orders -H 'Idempotency-Key: o-1' -H 'Authorization: Bearer me' -d '{{"sku":"tea","quantity":2}}'
  curl -i http://{addr}/webhooks/shop -d '{{"event_id":"e-1","sku":"tea","quantity":3}}'
  curl -i http://{addr}/webhooks/postmark -d '{{"MessageID":"m-1","Recipient":"a@example.com","RecordType":"Delivery"}}'

Hang up after a second, and ask again with more patience:

  curl -m 1 'http://{addr}/webhooks/shop?delay_ms=2000' -d '{{"event_id":"e-2","sku":"tea","quantity":3}}'
  curl -i 'http://{addr}/webhooks/shop?delay_ms=2000' -d '{{"event_id":"e-2","sku":"tea","quantity":3}}'

Send these four times: two runs fail, the third makes the order, and its outcome is replayed:

  curl -i 'http://{addr}/webhooks/shop?fail=500&times=2' -d '{{"event_id":"e-3","sku":"tea","quantity":3}}'
  curl -i 'http://{addr}/webhooks/shop?fail=panic&times=2' -d '{{"event_id":"e-4","sku":"tea","quantity":3}}'

What happened:

  curl http://{addr}/books
  curl http://{addr}/metrics
"#
    );
}

// === impl Books ===

impl Books {
    fn open(&self) -> MutexGuard<'_, Pages> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

// === impl Trouble ===

impl Default for Trouble {
    fn default() -> Self {
        Self { delay_ms: 0, after_ms: 0, fail: None, times: 1 }
    }
}
