//! Finished outcomes kept at hand: duplicates that cost the store nothing, and what must not follow from that.

#![allow(clippy::unwrap_used, reason = "a test panics where it fails")]

mod common;

use std::time::Duration;

use futures_util::future::join_all;
use tokio::time::sleep;
use tower_idempotency::key::{Key, header};
use tower_idempotency::store::Forgotten;
use tower_idempotency::{IdempotencyLayer, Ledger, caller};

use common::app::{App, answer, attempt, counting, event, order};
use common::stores::{Fault, Step, Stores};

const LIFE: Duration = Duration::from_secs(5);

fn process(stores: &Stores) -> Ledger {
    stores.ledger().near_cache(64 << 10, LIFE)
}

fn webhook(ledger: &Ledger) -> IdempotencyLayer {
    IdempotencyLayer::webhook(ledger, header("X-Id"))
}

/// A handler that answers with the key of its event.
fn telling_keys(layer: &IdempotencyLayer) -> App {
    App::new(layer, |request, _| async move { answer(200, attempt(&request).key().to_string()) })
}

async fn key_of(app: &App, id: &str) -> Key {
    let told = app.send(event(id)).await;
    std::str::from_utf8(&told.body).unwrap().parse().unwrap()
}

#[tokio::test(start_paused = true)]
async fn a_duplicate_of_what_ran_here_or_was_told_here_asks_nobody() {
    let stores = Stores::memory();
    let (here, there) = (counting(&webhook(&process(&stores)), 201), counting(&webhook(&process(&stores)), 201));
    let first = here.send(event("e")).await;
    assert_eq!((stores.calls(Step::Claim), first.body.as_ref()), (1, &b"run 1"[..]));
    for told in join_all((0..100).map(|_| here.send(event("e")))).await {
        assert!(told.is_replayed());
        assert_eq!((told.status.as_u16(), &told.body), (200, &first.body));
    }
    assert_eq!(stores.calls(Step::Claim), 1);
    for _ in 0..3 {
        assert_eq!(there.send(event("e")).await.body, first.body);
    }
    assert_eq!((stores.calls(Step::Claim), there.runs()), (2, 0));
}

#[tokio::test(start_paused = true)]
async fn without_it_each_duplicate_asks() {
    let stores = Stores::memory();
    let app = counting(&webhook(&stores.ledger()), 200);
    for _ in 0..3 {
        app.send(event("e")).await;
    }
    assert_eq!(stores.calls(Step::Claim), 3);
}

#[tokio::test(start_paused = true)]
async fn what_is_at_hand_is_told_while_the_store_is_down() {
    let stores = Stores::memory();
    let app = counting(&webhook(&process(&stores)), 200);
    app.send(event("e")).await;
    stores.fail(Step::Claim, Fault::Hang, 100);
    assert!(app.send(event("e")).await.is_replayed());
    sleep(LIFE).await;
    assert_eq!(app.send(event("e")).await.status, 503);
}

#[tokio::test(start_paused = true)]
async fn what_failed_or_is_not_kept_is_not_at_hand() {
    for status in [500, 400] {
        let app = counting(&webhook(&process(&Stores::memory())), status);
        app.send(event("e")).await;
        assert_eq!(app.send(event("e")).await.body, "run 2");
    }
}

#[tokio::test(start_paused = true)]
async fn the_same_key_with_another_payload_is_refused_from_here_as_from_the_store() {
    let stores = Stores::memory();
    let app = counting(&IdempotencyLayer::api(&process(&stores), caller::shared()), 201);
    app.send(order("k", "one book")).await;
    assert_eq!(app.send(order("k", "two books")).await.code().as_deref(), Some("key_reused"));
    assert!(app.send(order("k", "one book")).await.is_replayed());
    assert_eq!((stores.calls(Step::Claim), app.runs()), (1, 1));
}

#[tokio::test(start_paused = true)]
async fn what_is_forgotten_here_runs_and_what_is_forgotten_elsewhere_does_after_its_life() {
    let stores = Stores::memory();
    let (here, there) = (process(&stores), process(&stores));
    let app = telling_keys(&webhook(&here));
    let key = key_of(&app, "e").await;
    assert_eq!(here.forget(&key, false).await.unwrap(), Forgotten::Forgotten);
    assert!(!app.send(event("e")).await.is_replayed());

    assert_eq!(there.forget(&key, false).await.unwrap(), Forgotten::Forgotten);
    assert!(app.send(event("e")).await.is_replayed());
    sleep(LIFE).await;
    assert!(!app.send(event("e")).await.is_replayed());
    assert_eq!(app.runs(), 3);
}

#[tokio::test(start_paused = true)]
async fn an_outcome_is_at_hand_no_longer_than_it_is_kept() {
    let stores = Stores::memory();
    let app = App::new(&webhook(&process(&stores)), |request, run| async move {
        attempt(&request).keep_for(LIFE / 5);
        answer(200, format!("run {run}"))
    });
    app.send(event("e")).await;
    sleep(LIFE / 5 - Duration::from_millis(1)).await;
    assert!(app.send(event("e")).await.is_replayed());
    sleep(Duration::from_millis(1)).await;
    assert_eq!(app.send(event("e")).await.body, "run 2");
}
