//! A [`tower::Layer`] that makes any axum, tonic or hyper service run each event or request **once**, however often it is
//! delivered.
//!
//! Senders of webhooks and clients that retry deliver *at least once*. Behind this layer the first delivery runs, a
//! duplicate is answered with the outcome of the first, a duplicate of one that is running waits for it, and one that
//! failed runs again.
//!
//! ```
//! use axum::{Router, routing::post};
//! use tower_idempotency::{IdempotencyLayer, Ledger, MemoryStore, caller, key};
//!
//! // What a process knows of its attempts. Make one, and share it between layers.
//! let ledger = Ledger::new(MemoryStore::new());
//!
//! // A sender of webhooks looks only at whether the answer is 2xx.
//! let shop = IdempotencyLayer::webhook(&ledger, key::header("X-Event-Id").or(key::json("$.event.id")));
//! // A client of an API sends an `Idempotency-Key`, and reads the answer.
//! let api = IdempotencyLayer::api(&ledger, caller::authorization());
//!
//! let app: Router = Router::new()
//!     .route("/webhooks/shop", post(|| async { "invoiced" }).layer(shop))
//!     .route("/orders", post(|| async { "ordered" }).layer(api));
//! # let _ = app;
//! ```
//!
//! # What a retry gets
//!
//! | when a request comes again and the first … | [`webhook`](IdempotencyLayer::webhook) | [`api`](IdempotencyLayer::api) |
//! |---|---|---|
//! | has finished, and its outcome was kept | 200, the kept headers and body | the kept status, headers and body |
//! | is running | waits ≤ 2 s, then 503 + `Retry-After` | waits ≤ 1 s, then 409 + `Retry-After` |
//! | failed: an unkept status, an error, a panic | runs again | runs again |
//! | died with its process | runs again when the lease is over | the same |
//! | finished, but its body was not kept | 200, empty | 409 |
//! | had another payload | as above | 422 |
//! | and the store does not answer | 503 + `Retry-After` | the same |
//!
//! A replay says `Idempotent-Replayed: true`. A response that a retry will not get again, although its status is one that is
//! kept, says `Idempotency-Stored: false`: it is not in the store, not with its body, or the handler did not want it kept. What passes through (no key, a method that the layer does not
//! protect, an upgrade, a call of gRPC that is not named) says neither. Every refusal is a response with a stable [code](Rejection::code); the layer's error is the
//! inner service's.
//!
#![doc = include_str!("situations.md")]
//! # What is promised, and what is not
//!
//! An attempt runs under a *claim*, which has a lease that is renewed while it runs, up to
//! [`max_attempt`](IdempotencyLayer::max_attempt). Its outcome is in the store before the first byte of its response leaves.
//! Where that takes longer than [`complete_wait`](IdempotencyLayer::complete_wait), the response leaves with
//! `Idempotency-Stored: false`, and so does one that is too large or too slow to be kept: it streams, and a tombstone is stored
//! before its last byte. Its head is then out before it is known that the body ends well; if it does not, the next delivery
//! runs. A declared `text/event-stream` has no end to wait for, and counts as finished at its head.
//!
//! As long as the store keeps what it acknowledged:
//!
//! - at most one attempt for a key is alive within its lease,
//! - a duplicate is acknowledged only when an attempt has finished and its outcome is kept,
//! - an attempt that failed, panicked or died leaves a key that the next delivery can run,
//! - an attempt that lost its claim cannot overwrite, extend or delete its successor's.
//!
//! What no store beside the database can promise is that a run which died *between its effect and the record of it* does not
//! happen again. Nor can it after the store lost its data, or when a process was paused for longer than its lease:
//!
//! | | a crash after the effect | a pause past the lease | the store loses data | several processes |
//! |---|---|---|---|---|
//! | [`MemoryStore`] | runs again | – | with its process | each for itself |
//! | `RedisStore` | runs again | may run again | may run again | safe |
//! | `PostgresStore` | runs again | may run again | may run again | safe |
//! | `SqliteStore` | runs again | may run again | may run again | safe, on one machine |
//!
//! The remedy is a row in the transaction that makes the effect, with [`Attempt::key`] as its primary key. A handler that
//! finds the row calls [`Attempt::already_applied`]. `store::Dedup` (features `postgres` and `sqlite`) does both, and says what holds at which
//! level of isolation.
//!
//! # Keys and scope
//!
//! A key is unique within contract, method and path, for an api also within its [`caller`]; `scope` adds to that. *Path*
//! is what the layer sees: a layer inside of axum's `Router::nest` does not see the prefix, and two nests would share keys
//! unless [`scope`](IdempotencyLayer::scope) adds axum's `OriginalUri`. A store never sees a raw key, only a [digest](key::Key).
//!
//! # Where it stands among layers
//!
//! Outside in: trace, timeout, CORS, compression, authentication or the check of a signature, this layer, the handler. A
//! forged request must not reach it, and an outcome must be kept as the handler made it. A handler that
//! takes longer than 100 ms, or whose client leaves, goes on in a task of its own, with the caller's tracing span and without
//! the task-locals of the layers outside.
//!
//! # gRPC
//!
//! Unary methods of gRPC are protected where they are [named](IdempotencyLayer::unary). There the status of the call decides,
//! which stands in its trailers, and refusals are statuses: the page of [`grpc`] has the rules.
//!
//! # Differences from a response cache
//!
//! A cache may drop what it holds and run the handler again; this layer must not. It claims before it runs, it counts
//! attempts, and when it cannot know whether an event was seen it refuses, unless it is told to
//! [bypass](OnStoreError::Bypass).
//!
//! # Feature flags
//!
//! - `redis`: `RedisStore`, for services of more than one process. `redis-tls`: the same over TLS, with rustls.
//! - `postgres`, `sqlite`: `PostgresStore` and `SqliteStore`, for services without Redis. They need Rust 1.94.
//! - `gzip`: [`key::protobuf`] reads compressed messages of gRPC.
//! - `metrics`: counters, durations and gauges for the recorder of the crate `metrics`. The [`telemetry`] page has them all.
//! - `conformance`: `store::conformance`, the suite for authors of stores.
//!
//! Features add, and `gzip` adds keys where there were none. The layer runs on tokio: it starts tasks and keeps time there. While
//! attempts run in a runtime of several threads, a thread of its own looks twenty times a second whether one has taken long, so that a
//! handler that blocks a thread of the runtime keeps its lease.

mod alarms;
mod attempt;
mod body;
mod breaker;
pub mod caller;
mod canonical;
mod collect;
mod connection;
mod digest;
pub mod fingerprint;
mod flight;
mod gauge;
pub mod grpc;
mod intake;
mod kept;
pub mod key;
mod layer;
mod ledger;
mod media_type;
mod near;
mod policy;
#[cfg(all(test, shuttle))]
mod races;
mod record;
mod rejection;
mod service;
mod slot;
pub mod store;
mod sync;
pub mod telemetry;
mod terms;
mod ticker;
mod wire;
mod within;

pub use self::attempt::Attempt;
pub use self::body::{RequestBody, ResponseBody};
pub use self::kept::Kept;
pub use self::layer::IdempotencyLayer;
pub use self::ledger::{Ledger, StillRunning};
pub use self::policy::{OnBadKey, OnOtherPayload, OnStoreError, OverLimit, Replay};
pub use self::rejection::Rejection;
pub use self::service::{Idempotency, ResponseFuture};
pub use self::store::memory::MemoryStore;
#[cfg(feature = "postgres")]
pub use self::store::postgres::PostgresStore;
#[cfg(feature = "redis")]
pub use self::store::redis::RedisStore;
#[cfg(feature = "sqlite")]
pub use self::store::sqlite::SqliteStore;

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
mod readme {}
