//! What is measured: an endpoint that takes an order, bare and behind each of the layers.

use std::io::Write as _;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Result, ensure};
use axum::body::{Body, Bytes, to_bytes};
use axum::extract::{Request, State};
use axum::http::{StatusCode, header};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse as _, Response};
use axum::routing::post;
use axum::serve::ListenerExt as _;
use axum::{Router, serve};
use futures_util::future::BoxFuture;
use redis::aio::MultiplexedConnection;
use redis::{Client, RedisResult, Script, cmd};
use tokio::net::TcpListener;
use tower_idempotency::{IdempotencyLayer, Ledger, MemoryStore, RedisStore, SqliteStore, caller, fingerprint};

/// A server of the comparison.
pub struct Server {
    /// Names it on the command line.
    pub name: &'static str,
    /// Names it in the report.
    pub title: &'static str,
    pub role: Role,
    build: Build,
}

type Build = Box<dyn Fn(Place) -> BoxFuture<'static, Result<Router>>>;

#[derive(Clone, Copy, Eq, PartialEq)]
pub enum Role {
    /// Does nothing but the order.
    Bare,
    /// Written by hand, to know what cannot be had for less.
    Bound,
    Ours,
    #[cfg_attr(not(feature = "rivals"), expect(dead_code, reason = "there are none"))]
    Rival {
        /// Whether a client needs a session, from `/session`, before its requests are told apart.
        signs_in: bool,
    },
}

/// Where a server keeps what it keeps.
#[derive(Clone)]
pub struct Place {
    pub redis: String,
    pub dir: PathBuf,
}

/// All of them, in the order of the report.
pub fn all() -> Vec<Server> {
    #[cfg_attr(not(feature = "rivals"), expect(unused_mut, reason = "nothing is added"))]
    let mut all = vec![
        Server::new("bare", "bare axum", Role::Bare, async |_| Ok(orders())),
        Server::new("floor", "floor", Role::Bound, |place| floor(place, None)),
        Server::new("fenced", "fenced floor", Role::Bound, |place| floor(place, Some(Script::new(FENCE)))),
        Server::new("redis", "ours on Redis", Role::Ours, async |place| {
            Ok(ours(&Ledger::new(RedisStore::new(&place.redis)?)))
        }),
        Server::new("near", "ours on Redis, near cache", Role::Ours, async |place| {
            Ok(ours(&Ledger::new(RedisStore::new(&place.redis)?).near_cache(64 << 20, Duration::from_secs(60))))
        }),
        Server::new("near-unprinted", "the same, no fingerprint", Role::Ours, async |place| {
            let ledger = Ledger::new(RedisStore::new(&place.redis)?).near_cache(64 << 20, Duration::from_secs(60));
            Ok(orders().layer(IdempotencyLayer::api(&ledger, caller::shared()).fingerprint(fingerprint::ignored())))
        }),
        Server::new("memory", "ours on memory", Role::Ours, async |_| Ok(ours(&Ledger::new(MemoryStore::new())))),
        Server::new("sqlite", "ours on SQLite", Role::Ours, async |place| {
            let store = SqliteStore::open(place.dir.join("orders.db")).await?;
            // A disk that syncs each write of 128 clients answers the last of them late.
            Ok(ours(&Ledger::new(store).store_timeout(Duration::from_secs(5))))
        }),
    ];
    #[cfg(feature = "rivals")]
    all.extend(crate::rivals::all());
    all
}

// === impl Server ===

impl Server {
    pub fn new<F>(name: &'static str, title: &'static str, role: Role, build: impl Fn(Place) -> F + 'static) -> Self
    where
        F: Future<Output = Result<Router>> + Send + 'static,
    {
        Self { name, title, role, build: Box::new(move |place| Box::pin(build(place))) }
    }

    pub fn is_rival(&self) -> bool {
        matches!(self.role, Role::Rival { .. })
    }

    pub fn signs_in(&self) -> bool {
        matches!(self.role, Role::Rival { signs_in: true })
    }

    /// Serves on a free port, which is printed, until the process ends.
    pub async fn serve(&self, place: Place) -> Result<()> {
        let app = (self.build)(place).await?;
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        writeln!(std::io::stdout(), "{}", listener.local_addr()?.port())?;
        let listener = listener.tap_io(|stream| {
            let _ = stream.set_nodelay(true);
        });
        Ok(serve(listener, app).await?)
    }
}

// === the endpoint ===

/// What [`crate::load`] sends. A handler reads it, as one does.
#[derive(serde::Deserialize)]
struct Order {
    order_id: String,
    amount: u64,
}

pub fn orders() -> Router {
    Router::new().route("/orders", post(order))
}

/// The invoice has the number of the run in it, by which a response that is kept is told from one that was made anew.
async fn order(body: Bytes) -> Response {
    static RUNS: AtomicU64 = AtomicU64::new(0);
    let Ok(Order { order_id, amount }) = serde_json::from_slice(&body) else {
        return StatusCode::BAD_REQUEST.into_response();
    };
    let run = RUNS.fetch_add(1, Ordering::Relaxed);
    let invoice =
        format!(r#"{{"invoice":"inv-{order_id}-{run:08}","amount":{amount},"status":"created","currency":"EUR"}}"#);
    created(invoice)
}

fn created(invoice: impl Into<Body>) -> Response {
    (StatusCode::CREATED, [(header::CONTENT_TYPE, "application/json")], invoice.into()).into_response()
}

// === ours ===

fn ours(ledger: &Ledger) -> Router {
    orders().layer(IdempotencyLayer::api(ledger, caller::shared()))
}

// === the bounds ===

/// Completes a claim if it is still one's own.
const FENCE: &str = "if redis.call('GET', KEYS[1]) == ARGV[1] then \
                         redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3]) return 1 \
                     end return 0";
const CLAIM: &str = "running-claim-0123";
const LEASE_MS: u64 = 60_000;
const RETENTION_MS: u64 = 86_400_000;

/// Two round trips for a first request and one for a duplicate, and nothing else: no headers, no fingerprint, nobody who
/// waits for a request that runs, no lease that is renewed, and no fencing but with a script.
#[derive(Clone)]
struct Floor {
    redis: MultiplexedConnection,
    fence: Option<Script>,
}

async fn floor(place: Place, fence: Option<Script>) -> Result<Router> {
    let redis = Client::open(place.redis)?.get_multiplexed_async_connection().await?;
    Ok(orders().layer(from_fn_with_state(Floor { redis, fence }, once)))
}

async fn once(State(floor): State<Floor>, request: Request, next: Next) -> Result<Response, StatusCode> {
    let key = request.headers().get("idempotency-key").and_then(|key| key.to_str().ok());
    let key = key.ok_or(StatusCode::BAD_REQUEST)?.to_owned();
    if let Some(kept) = floor.clone().claim(&key).await.map_err(|_| StatusCode::SERVICE_UNAVAILABLE)? {
        return Ok(created(kept));
    }
    let (head, body) = next.run(request).await.into_parts();
    let body = to_bytes(body, 1 << 20).await.map_err(|_| StatusCode::INTERNAL_SERVER_ERROR)?;
    floor.complete(&key, &body).await.map_err(|_| StatusCode::SERVICE_UNAVAILABLE)?;
    Ok(Response::from_parts(head, body.into()))
}

impl Floor {
    async fn claim(mut self, key: &str) -> RedisResult<Option<Vec<u8>>> {
        let mut set = cmd("SET");
        set.arg(key).arg(CLAIM).arg("NX").arg("GET").arg("PX").arg(LEASE_MS);
        set.query_async(&mut self.redis).await
    }

    async fn complete(mut self, key: &str, body: &[u8]) -> RedisResult<()> {
        let Some(fence) = &self.fence else {
            return cmd("SET").arg(key).arg(body).arg("PX").arg(RETENTION_MS).exec_async(&mut self.redis).await;
        };
        fence.key(key).arg(CLAIM).arg(body).arg(RETENTION_MS).invoke_async::<()>(&mut self.redis).await
    }
}

/// The servers of these names, or all of them.
pub fn named(names: &[String]) -> Result<Vec<Server>> {
    for name in names {
        ensure!(all().iter().any(|server| server.name == name), "no server is named {name}");
    }
    Ok(all().into_iter().filter(|server| names.is_empty() || names.iter().any(|name| name == server.name)).collect())
}
