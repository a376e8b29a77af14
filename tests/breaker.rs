//! A store that does not answer costs a few requests their patience, and the rest nothing.

#![allow(clippy::expect_used, clippy::unwrap_used, reason = "a test panics where it fails")]

mod common;

use std::time::Duration;

use futures_util::future::join_all;
use tokio::time::{Instant, sleep};
use tower_idempotency::key::header;
use tower_idempotency::{IdempotencyLayer, Ledger, OnStoreError};

use common::app::{App, answer, event, order};
use common::stores::{Fault, Step, Stores};

/// So many failures open the circuit, and so long it stays open at most.
const FAILURES: u32 = 3;
const LAST_PAUSE: Duration = Duration::from_millis(250);

const ALWAYS: u32 = 1_000_000;

fn app(ledger: &Ledger) -> App {
    let layer = IdempotencyLayer::webhook(ledger, header("X-Id"));
    App::new(&layer, |_, run| async move { answer(200, format!("run {run}")) })
}

async fn outage(app: &App) {
    for n in 0..FAILURES {
        assert_eq!(app.send(event(&format!("opens {n}"))).await.status, 503);
    }
}

#[tokio::test(start_paused = true)]
async fn from_the_fourth_claim_on_nobody_waits_and_the_store_is_spared() {
    let stores = Stores::memory();
    let app = app(&stores.ledger());
    stores.fail(Step::Claim, Fault::Hang, ALWAYS);
    outage(&app).await;
    let (opened, calls) = (Instant::now(), stores.calls(Step::Claim));
    for n in 0..1000 {
        let refused = app.send(event(&n.to_string())).await;
        assert_eq!((refused.status.as_u16(), refused.code().as_deref()), (503, Some("store_unavailable")));
        assert!(refused.headers.contains_key("retry-after"));
    }
    assert_eq!((opened.elapsed(), stores.calls(Step::Claim)), (Duration::ZERO, calls));
}

#[tokio::test(start_paused = true)]
async fn traffic_is_back_with_the_first_probe_that_is_answered() {
    let stores = Stores::memory();
    let app = app(&stores.ledger());
    stores.fail(Step::Claim, Fault::Hang, ALWAYS);
    outage(&app).await;
    // Long enough for the pauses to have grown.
    for n in 0..100 {
        assert_eq!(app.send(event(&format!("during {n}"))).await.status, 503);
        sleep(Duration::from_millis(20)).await;
    }
    stores.heal();
    sleep(LAST_PAUSE).await;
    assert_eq!(app.send(event("probe")).await.status, 200);
    let all = join_all((0..100).map(|n| app.send(event(&n.to_string())))).await;
    assert!(all.iter().all(|answer| answer.status == 200));
}

#[tokio::test(start_paused = true)]
async fn a_probe_is_one_request_and_the_others_do_not_wait_for_it() {
    let stores = Stores::memory();
    let app = app(&stores.ledger());
    stores.fail(Step::Claim, Fault::Hang, ALWAYS);
    outage(&app).await;
    sleep(LAST_PAUSE).await;
    let before = stores.calls(Step::Claim);
    let probe = tokio::spawn(app.send(event("probe")));
    sleep(Duration::from_millis(1)).await;
    let started = Instant::now();
    assert_eq!(app.send(event("other")).await.status, 503);
    assert_eq!((started.elapsed(), stores.calls(Step::Claim)), (Duration::ZERO, before + 1));
    // Its client leaves: that says nothing about the store, and before long the next one tries.
    probe.abort();
    let _ = probe.await;
    stores.heal();
    sleep(LAST_PAUSE).await;
    assert_eq!(app.send(event("next")).await.status, 200);
}

#[tokio::test(start_paused = true)]
async fn a_layer_that_bypasses_the_store_bypasses_it_at_once() {
    let stores = Stores::memory();
    let layer = IdempotencyLayer::webhook(&stores.ledger(), header("X-Id")).on_store_error(OnStoreError::Bypass);
    let app = App::new(&layer, |_, _| async { answer(200, "ran") });
    stores.fail(Step::Claim, Fault::Hang, ALWAYS);
    for n in 0..FAILURES {
        app.send(event(&n.to_string())).await;
    }
    let opened = Instant::now();
    assert_eq!(app.send(event("e")).await.status, 200);
    assert_eq!(opened.elapsed(), Duration::ZERO);
}

#[tokio::test(start_paused = true)]
async fn conflicts_mismatches_and_replays_never_open_it() {
    let stores = Stores::memory();
    let layer = || {
        let layer = IdempotencyLayer::api(&stores.ledger(), tower_idempotency::caller::shared());
        layer.patience(Duration::ZERO)
    };
    let large = "x".repeat(1 << 20);
    let app = App::new(&layer(), move |_, run| {
        let large = large.clone();
        async move { answer(200, if run == 1 { large } else { std::future::pending().await }) }
    });
    assert_eq!(app.send(order("done", "1")).await.status, 200);
    let running = tokio::spawn(app.send(order("running", "1")));
    sleep(Duration::from_millis(1)).await;
    // Another process, for the first knows of its own attempts without the store.
    let other = App::new(&layer(), |_, _| async { answer(200, "ran") });
    for _ in 0..10 {
        assert_eq!(other.send(order("running", "1")).await.status, 409);
        assert_eq!(other.send(order("done", "2")).await.status, 422);
        assert!(other.send(order("done", "1")).await.is_replayed());
    }
    assert_eq!(other.send(order("new", "1")).await.status, 200);
    running.abort();
}

#[tokio::test(start_paused = true)]
async fn completions_are_pursued_through_an_outage() {
    let stores = Stores::memory();
    let ledger = stores.ledger();
    let app = app(&ledger);
    stores.fail(Step::Complete, Fault::LoseRequest, 5);
    let first = app.send(event("e")).await;
    assert_eq!(first.status, 200);
    stores.fail(Step::Claim, Fault::Hang, ALWAYS);
    outage(&app).await;
    stores.heal();
    ledger.drain(Duration::from_secs(60)).await.unwrap();
    assert_eq!(app.runs(), 1);
}
