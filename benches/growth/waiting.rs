//! Duplicates of running attempts: what one takes while it waits, and how soon all are answered.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::join_all;
use http::{Request, Response, StatusCode};
use http_body_util::Full;
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tower::{Layer as _, Service, service_fn};
use tower_idempotency::{IdempotencyLayer, Ledger, MemoryStore, RequestBody, key};

use super::common::until;
use super::{live, nanos_each};

const ROUNDS: usize = 7;

pub async fn grow() {
    println!("\nDuplicates that wait, each in a task of its own:\n");
    println!("| keys | duplicates | bytes a duplicate | answered after | each |\n|---|---|---|---|---|");
    for (keys, duplicates) in [(1, 1), (1, 10), (1, 100), (1, 1000), (1, 10_000), (10_000, 10_000)] {
        let mut rounds = Vec::new();
        for _ in 0..ROUNDS {
            rounds.push(wait(keys, duplicates).await);
        }
        rounds.sort_unstable_by_key(|(_, took)| *took);
        let (bytes, took) = rounds[ROUNDS / 2];
        let each = nanos_each(took, duplicates);
        println!("| {keys} | {duplicates} | {bytes} | {:.2} ms | {each:.0} ns |", took.as_secs_f64() * 1000.0);
    }
}

/// What each of so many takes that are spread over the keys, and in what time they are answered once the handlers go on.
async fn wait(keys: usize, duplicates: usize) -> (usize, Duration) {
    let ledger = Ledger::new(MemoryStore::new()).max_in_flight(keys);
    let ledger = ledger.max_waiting(duplicates).max_waiting_per_key(duplicates);
    let layer = IdempotencyLayer::webhook(&ledger, key::header("x-id")).patience(Duration::from_secs(60));
    let gate = Arc::new(Semaphore::new(0));
    let opened = Arc::clone(&gate);
    let service = layer.layer(service_fn(move |_: Request<RequestBody<Full<Bytes>>>| {
        let opened = Arc::clone(&opened);
        async move {
            opened.acquire().await.unwrap().forget();
            Ok::<_, Infallible>(Response::new(Full::new(Bytes::from_static(b"done"))))
        }
    }));
    let send = |count: usize| -> Vec<JoinHandle<()>> {
        let send = |n: usize| {
            let request = Request::post("/hooks").header("x-id", n % keys).body(Full::default()).unwrap();
            let response = service.clone().call(request);
            tokio::spawn(async move { assert_eq!(response.await.unwrap().status(), StatusCode::OK) })
        };
        (0..count).map(send).collect()
    };
    let runs = send(keys);
    until(async || ledger.in_flight() == keys).await;
    let before = live();
    let waiting = send(duplicates);
    until(async || ledger.waiting() == duplicates).await;
    let bytes = (live() - before) / duplicates;

    let started = Instant::now();
    gate.add_permits(keys);
    join_all(waiting).await;
    let took = started.elapsed();
    join_all(runs).await;
    (bytes, took)
}
