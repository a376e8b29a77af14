//! F: duplicates of a request that is running.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::join_all;
use futures_util::stream;
use http::{Request, StatusCode};
use http_body_util::{BodyExt as _, StreamBody};
use tokio::sync::Semaphore;
use tokio::time::{Instant, sleep, timeout};
use tower_idempotency::key::header;
use tower_idempotency::store::{Forgotten, State};
use tower_idempotency::{IdempotencyLayer, Ledger, MemoryStore, caller, fingerprint};

use crate::common::app::{Answer, App, Body, answer, counting, deliver, event, gated, key_of, order};
use crate::common::stores::{Step, Stores};
use crate::common::until;

on_every_store! {
    f01_a_duplicate_of_a_running_request_is_told_to_come_again
    f03_a_hundred_that_wait_get_one_outcome
    f04_who_has_waited_long_enough_is_refused_and_never_run
    f06_a_claim_that_vanishes_is_claimed_again_by_one_who_waits
    f07_those_who_wait_in_one_process_ask_the_store_once
    f09_other_keys_are_not_kept_waiting
    f11_a_retry_after_a_failure_runs_with_its_own_answer
    f15_the_state_of_a_key_can_be_shown
    when_to_come_again_is_when_the_lease_of_a_dead_process_ends
}

type Duplicate = fn() -> Request<Body>;

const TICK: Duration = Duration::from_millis(100);

fn api(ledger: &Ledger) -> IdempotencyLayer {
    IdempotencyLayer::api(ledger, caller::shared())
}

fn webhook(ledger: &Ledger) -> IdempotencyLayer {
    IdempotencyLayer::webhook(ledger, header("X-Id"))
}

fn retry_after(answer: &Answer) -> u64 {
    answer.headers["retry-after"].to_str().unwrap().parse().unwrap()
}

async fn f01_a_duplicate_of_a_running_request_is_told_to_come_again(stores: Stores) {
    let duplicates: [(_, Duplicate, _); 2] =
        [(api(&stores.ledger()), || order("k", "1"), 409), (webhook(&stores.ledger()), || event("e"), 503)];
    for (layer, request, status) in duplicates {
        let (app, gate) = gated(&layer.patience(Duration::ZERO));
        let first = deliver(&app, request());
        until(async || app.runs() == 1).await;
        let refused = app.send(request()).await;
        assert_eq!((refused.status.as_u16(), refused.code().as_deref()), (status, Some("running")));
        assert!(retry_after(&refused) >= 1);
        gate.add_permits(1);
        assert_eq!((first.await.unwrap().status.as_u16(), app.runs()), (200, 1));
    }
}

async fn f03_a_hundred_that_wait_get_one_outcome(stores: Stores) {
    let layer = api(&stores.ledger()).patience(Duration::from_secs(20));
    let (app, gate) = gated(&layer);
    let answers: Vec<_> = (0..100).map(|_| deliver(&app, order("k", "1"))).collect();
    until(async || app.runs() == 1).await;
    gate.add_permits(1);
    let answers: Vec<Answer> = join_all(answers).await.into_iter().map(Result::unwrap).collect();
    assert!(answers.iter().all(|answer| answer.body == "run 1"));
    assert_eq!((answers.iter().filter(|answer| answer.is_replayed()).count(), app.runs()), (99, 1));
}

async fn f04_who_has_waited_long_enough_is_refused_and_never_run(stores: Stores) {
    let (app, gate) = gated(&api(&stores.ledger()).patience(TICK));
    let first = deliver(&app, order("k", "1"));
    until(async || app.runs() == 1).await;
    let started = Instant::now();
    let refused = app.send(order("k", "1")).await;
    assert_eq!(refused.status, 409);
    assert!(retry_after(&refused) >= 1 && started.elapsed() >= TICK);
    gate.add_permits(1);
    assert_eq!((first.await.unwrap().body, app.runs()), (Bytes::from_static(b"run 1"), 1));
}

async fn f06_a_claim_that_vanishes_is_claimed_again_by_one_who_waits(stores: Stores) {
    let ledger = stores.ledger();
    let layer = webhook(&ledger).patience(Duration::from_secs(20));
    let (gone, _gate) = gated(&layer);
    let (app, gate) = gated(&webhook(&stores.ledger()).patience(Duration::from_secs(20)));
    let _gone = deliver(&gone, event("e"));
    until(async || gone.runs() == 1).await;
    let waiting = [deliver(&app, event("e")), deliver(&app, event("e"))];
    sleep(TICK).await;
    assert_eq!(ledger.forget(&key_of(&layer, event("e")), true).await.unwrap(), Forgotten::Forgotten);
    gate.add_permits(1);
    for answer in join_all(waiting).await {
        assert_eq!(answer.unwrap().body, "run 1");
    }
    assert_eq!(app.runs(), 1);
}

async fn f07_those_who_wait_in_one_process_ask_the_store_once(stores: Stores) {
    let (app, gate) = gated(&api(&stores.ledger()).patience(Duration::from_secs(20)));
    let answers: Vec<_> = (0..50).map(|_| deliver(&app, order("k", "1"))).collect();
    until(async || app.runs() == 1).await;
    gate.add_permits(1);
    for answer in join_all(answers).await {
        assert_eq!(answer.unwrap().body, "run 1");
    }
    assert_eq!(stores.calls(Step::Claim), 1);
}

async fn f09_other_keys_are_not_kept_waiting(stores: Stores) {
    let (app, gate) = gated(&api(&stores.ledger()));
    let first = deliver(&app, order("k", "1"));
    until(async || app.runs() == 1).await;
    let others: Vec<_> = (0..20).map(|n| deliver(&app, order(&format!("other-{n}"), "1"))).collect();
    until(async || app.runs() == 21).await;
    gate.add_permits(21);
    assert_eq!(first.await.unwrap().status, 200);
    for other in join_all(others).await {
        assert!(!other.unwrap().is_replayed());
    }
}

async fn f11_a_retry_after_a_failure_runs_with_its_own_answer(stores: Stores) {
    let app = App::new(&api(&stores.ledger()), |_, run| async move {
        answer(if run == 1 { 500 } else { 201 }, format!("run {run}"))
    });
    assert_eq!(app.send(order("k", "1")).await.body, "run 1");
    let second = app.send(order("k", "1")).await;
    assert_eq!((second.status.as_u16(), &second.body[..], second.is_replayed()), (201, &b"run 2"[..], false));
}

/// Where only the head makes the key, a duplicate need not send a body that nobody is going to read.
#[tokio::test(start_paused = true)]
async fn f13_a_duplicate_is_refused_before_its_body_is_there() {
    let layer = api(&Ledger::new(MemoryStore::new()));
    let layer = layer.fingerprint(fingerprint::ignored()).stream_request_body().patience(Duration::ZERO);
    let (app, gate) = gated(&layer);
    let first = deliver(&app, order("k", "1"));
    until(async || app.runs() == 1).await;
    let endless = StreamBody::new(stream::pending()).boxed_unsync();
    let request = Request::post("/orders").header("idempotency-key", "k").body(endless).unwrap();
    let refused = timeout(TICK, app.send(request)).await.expect("an answer before the body");
    assert_eq!(refused.status, 409);
    gate.add_permits(1);
    assert_eq!((first.await.unwrap().status, app.runs()), (StatusCode::OK, 1));
}

async fn f15_the_state_of_a_key_can_be_shown(stores: Stores) {
    let ledger = stores.ledger();
    let layer = api(&ledger);
    let key = key_of(&layer, order("k", "1"));
    let shown = async || {
        let Some(entry) = ledger.lookup(&key).await.unwrap() else { return 404 };
        match entry.state {
            State::Running => 202,
            State::Free => 404,
            State::Done(_) => entry.status().map_or(500, |status| status.as_u16()),
        }
    };
    let gate = Arc::new(Semaphore::new(0));
    let opened = Arc::clone(&gate);
    let app = App::new(&layer, move |_, _| {
        let opened = Arc::clone(&opened);
        async move {
            opened.acquire().await?.forget();
            answer(201, "")
        }
    });
    assert_eq!(shown().await, 404);
    let first = deliver(&app, order("k", "1"));
    until(async || app.runs() == 1).await;
    assert_eq!(shown().await, 202);
    gate.add_permits(1);
    first.await.unwrap();
    assert_eq!((shown().await, app.runs()), (201, 1));
}

async fn when_to_come_again_is_when_the_lease_of_a_dead_process_ends(stores: Stores) {
    use tower_idempotency::store::{Claim, Store as _};
    let lease = Duration::from_secs(60);
    let layer = webhook(&stores.ledger()).lease(lease).patience(TICK);
    let key = key_of(&layer, event("e"));
    // A claim that has not been renewed when it should have been: who made it is gone.
    let mut claim = Claim::new(Duration::from_secs(20), lease * 100);
    stores.store().claim(&key, &claim).await.unwrap();
    let refused = counting(&layer, 200).send(event("e")).await;
    assert_eq!(refused.status, 503);
    assert!((18..=20).contains(&retry_after(&refused)), "{}", retry_after(&refused));
    // One that has may be done any moment.
    claim.lease = lease;
    claim.attempt = 1;
    stores.store().renew(&key, &claim).await.unwrap();
    assert_eq!(retry_after(&counting(&layer, 200).send(event("e")).await), 1);
}
