//! How things grow: with keys, with outcomes, with duplicates that wait, and with events per second.
//!
//! `cargo bench --bench growth` starts a `redis-server` of its own, and takes two minutes. It fills the memory store with up to a million keys;
//! `-- 10000000` with ten times as many, which takes 5 GB. Bytes are those that the allocator was asked for: what its blocks are
//! rounded up to is not counted.

#![allow(clippy::expect_used, clippy::unwrap_used, reason = "a benchmark panics where it fails")]
#![allow(clippy::print_stdout, reason = "it measures")]
#![allow(unreachable_pub, reason = "nothing reaches a benchmark")]

#[path = "../../tests/common/mod.rs"]
mod common;

mod cluster;
mod expiry;
mod memory_store;
mod redis_memory;
mod waiting;

use std::alloc::System;
use std::env;
use std::time::Duration;

use bytes::Bytes;
use stats_alloc::{INSTRUMENTED_SYSTEM, StatsAlloc};
use tower_idempotency::key::{self, Key};
use tower_idempotency::store::{Claim, Claimed, State, Store};
use tower_idempotency::{IdempotencyLayer, Ledger, MemoryStore};

use common::app::{App, answer, event, key_of};
use common::redis::RedisServer;

#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

const DAY: Duration = Duration::from_secs(24 * 60 * 60);
const LEASE: Duration = Duration::from_secs(30);

/// The usual outcome of a webhook is JSON of about that many bytes.
const USUAL: usize = 90;

#[tokio::main]
async fn main() {
    let largest = env::args().find_map(|arg| arg.parse().ok()).unwrap_or(1_000_000);
    let record = record(USUAL).await;
    memory_store::grow(largest, &record).await;
    expiry::in_memory(&record).await;
    waiting::grow().await;
    let server = RedisServer::start();
    let per_key = redis_memory::grow(&server).await;
    cluster::estimate(&server, &record, per_key).await;
    expiry::in_redis(&server, &record).await;
}

/// How many bytes are allocated now.
fn live() -> usize {
    let stats = ALLOCATOR.stats();
    stats.bytes_allocated - stats.bytes_deallocated
}

fn random_key() -> Key {
    Key::from(rand::random::<[u8; 24]>())
}

/// A service that answers with so much JSON.
fn answering(ledger: &Ledger, length: usize) -> (IdempotencyLayer, App) {
    let layer = IdempotencyLayer::webhook(ledger, key::header("x-id"));
    let app = App::new(&layer, move |_, _| async move {
        let mut response = answer(200, "-".repeat(length))?;
        response.headers_mut().insert("content-type", "application/json".parse()?);
        Ok(response)
    });
    (layer, app)
}

/// What a store is given to keep of such an answer.
async fn record(length: usize) -> Bytes {
    let ledger = Ledger::new(MemoryStore::new());
    let (layer, app) = answering(&ledger, length);
    app.send(event("1")).await;
    let entry = ledger.lookup(&key_of(&layer, event("1"))).await.unwrap().expect("an outcome");
    let State::Done(record) = entry.state else { panic!("it is not done") };
    record
}

/// One first delivery.
async fn deliver(store: &impl Store, key: &Key, retention: Duration, record: &[u8]) {
    let mut claim = Claim::new(LEASE, retention);
    let Claimed::Acquired { attempt } = store.claim(key, &claim).await.unwrap() else { panic!("a new key") };
    claim.attempt = attempt;
    store.complete(key, &claim, Bytes::copy_from_slice(record)).await.unwrap();
}

fn nanos_each(took: Duration, count: usize) -> f64 {
    took.as_nanos() as f64 / count as f64
}
