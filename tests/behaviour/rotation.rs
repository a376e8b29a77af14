//! Secrets that change while processes that know the old one, the new one, or both are at work.

use std::collections::HashSet;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use http::StatusCode;
use tokio::time::sleep;
use tower_idempotency::key::{Key, header};
use tower_idempotency::{IdempotencyLayer, Ledger};

use crate::common::app::{App, answer, attempt, counting, deliver, event, key_of};
use crate::common::stores::{Step, Stores};
use crate::common::until;

on_every_store! {
    processes_that_know_either_secret_run_an_event_once
    a_secret_that_rotates_forgets_nothing
    a_failure_frees_both_keys_and_both_are_renewed
    a_row_under_the_previous_key_is_found
    an_outcome_under_the_current_key_is_handed_on
    an_outcome_that_is_handed_on_is_kept_no_longer
    an_event_is_forgotten_under_both_keys
}

const OLD: &[u8] = b"an old secret of its length";
const NEW: &[u8] = b"a new secret of its length";

fn webhook(ledger: &Ledger) -> IdempotencyLayer {
    IdempotencyLayer::webhook(ledger, header("X-Id"))
}

/// Every process with the layer that its configuration gives it, old to new.
fn rotating(stores: &Stores) -> [App; 3] {
    let layers: [fn(IdempotencyLayer) -> IdempotencyLayer; 3] =
        [|layer| layer.secret(OLD), |layer| layer.secret(NEW).previous_secret(OLD), |layer| layer.secret(NEW)];
    layers.map(|layer| {
        let layer = layer(webhook(&stores.ledger()).patience(Duration::from_secs(20)));
        App::new(&layer, |_, run| async move {
            tokio::time::sleep(Duration::from_millis(50)).await;
            answer(200, format!("run {run}"))
        })
    })
}

async fn processes_that_know_either_secret_run_an_event_once(stores: Stores) {
    let [old, both, new] = rotating(&stores);
    // Either configuration may be there beside the one that knows both, and never without it.
    for (name, other) in [("old", &old), ("new", &new)] {
        for n in 0..5 {
            let id = format!("{name} {n}");
            let before = both.runs() + other.runs();
            let deliveries: Vec<_> =
                (0..10).map(|n| deliver(if n % 2 == 0 { &both } else { other }, event(&id))).collect();
            for delivery in deliveries {
                assert_eq!(delivery.await.unwrap().status, StatusCode::OK, "{id}");
            }
            assert_eq!(both.runs() + other.runs(), before + 1, "{id}");
        }
    }
}

async fn a_secret_that_rotates_forgets_nothing(stores: Stores) {
    let [old, both, new] = rotating(&stores);
    old.send(event("before")).await;
    assert!(both.send(event("before")).await.is_replayed());
    both.send(event("meanwhile")).await;
    assert!(old.send(event("meanwhile")).await.is_replayed());
    assert!(new.send(event("meanwhile")).await.is_replayed());
    new.send(event("after")).await;
    assert!(both.send(event("after")).await.is_replayed());
    assert_eq!([old.runs(), both.runs(), new.runs()], [1, 1, 1]);
    // What was taken in vain has been given back.
    until(async || both.send(event("after")).await.is_replayed()).await;

    let without = counting(&webhook(&stores.ledger()), 200);
    without.send(event("no secret yet")).await;
    let first_secret = counting(&webhook(&stores.ledger()).secret(OLD).previously_without_secret(), 200);
    assert!(first_secret.send(event("no secret yet")).await.is_replayed());
}

async fn a_failure_frees_both_keys_and_both_are_renewed(stores: Stores) {
    let lease = Duration::from_millis(500);
    let layer = || webhook(&stores.ledger()).lease(lease).patience(Duration::ZERO);
    let both = App::new(&layer().secret(NEW).previous_secret(OLD), move |_, run| async move {
        sleep(lease * 3).await;
        answer(if run == 1 { 500 } else { 200 }, "")
    });
    let (old, new) = (counting(&layer().secret(OLD), 200), counting(&layer().secret(NEW), 200));
    for run in 1..=2 {
        let running = deliver(&both, event("e"));
        until(async || both.runs() == run).await;
        sleep(lease * 2).await;
        for other in [&old, &new] {
            assert_eq!((other.send(event("e")).await.status.as_u16(), other.runs()), (503, 0));
        }
        running.await.unwrap();
    }
    assert!(old.send(event("e")).await.is_replayed());
    assert!(new.send(event("e")).await.is_replayed());
}

/// The remedy against what no store can promise has to outlive the rotation, too.
async fn a_row_under_the_previous_key_is_found(stores: Stores) {
    let rows: Arc<Mutex<HashSet<Key>>> = Arc::default();
    let with_row = |layer: &IdempotencyLayer, status: u16| {
        let rows = Arc::clone(&rows);
        App::new(layer, move |request, _| {
            let attempt = attempt(&request);
            let mut rows = rows.lock().unwrap();
            let was_there = attempt.previous_key().is_some_and(|key| rows.contains(&key));
            if was_there || !rows.insert(attempt.key()) {
                attempt.already_applied();
            }
            async move { answer(status, "") }
        })
    };
    let old = with_row(&webhook(&stores.ledger()).secret(OLD), 500);
    let both = with_row(&webhook(&stores.ledger()).secret(NEW).previous_secret(OLD), 200);
    assert_eq!(old.send(event("e")).await.status, 500);
    assert_eq!(both.send(event("e")).await.status, 200);
    assert_eq!(rows.lock().unwrap().len(), 1, "one effect");
}

async fn an_outcome_under_the_current_key_is_handed_on(stores: Stores) {
    let [old, both, new] = rotating(&stores);
    new.send(event("e")).await;
    assert!(both.send(event("e")).await.is_replayed());
    let asked = stores.calls(Step::Claim);
    assert!(both.send(event("e")).await.is_replayed());
    assert_eq!(stores.calls(Step::Claim), asked + 1, "the previous key tells, too");
    assert!(old.send(event("e")).await.is_replayed());
    assert_eq!([old.runs(), both.runs(), new.runs()], [0, 0, 1]);
}

/// It is as old under the one key as under the other.
async fn an_outcome_that_is_handed_on_is_kept_no_longer(stores: Stores) {
    let short = |layer: IdempotencyLayer| layer.retention(Duration::from_secs(2));
    let new = counting(&short(webhook(&stores.ledger()).secret(NEW)), 200);
    let both = counting(&short(webhook(&stores.ledger()).secret(NEW).previous_secret(OLD)), 200);
    new.send(event("e")).await;
    sleep(Duration::from_millis(1500)).await;
    assert!(both.send(event("e")).await.is_replayed());
    sleep(Duration::from_secs(1)).await;
    assert!(!both.send(event("e")).await.is_replayed());
    assert_eq!((new.runs(), both.runs()), (1, 1));
}

async fn an_event_is_forgotten_under_both_keys(stores: Stores) {
    let ledger = stores.ledger();
    let layer = webhook(&ledger).secret(NEW).previous_secret(OLD);
    let app = counting(&layer, 200);
    app.send(event("e")).await;
    let (head, _) = event("e").into_parts();
    let previous = layer.previous_key_of(&head, &bytes::Bytes::new()).unwrap();
    assert_eq!(previous, key_of(&webhook(&ledger).secret(OLD), event("e")));
    for key in [key_of(&layer, event("e")), previous] {
        ledger.forget(&key, false).await.unwrap();
    }
    assert_eq!(app.send(event("e")).await.body, "run 2");
}
