//! D: the same key with another payload.

use http::{Request, StatusCode};
use tower_idempotency::key::header;
use tower_idempotency::{IdempotencyLayer, Ledger, MemoryStore, OnOtherPayload, Rejection, caller, fingerprint};

use crate::common::app::{App, Body, answer, body, counting, deliver, event, gated, order};
use crate::common::stores::Stores;
use crate::common::until;

on_every_store! {
    d01_another_payload_is_refused_and_the_first_outcome_stays
    d02_a_webhooks_other_payload_is_a_duplicate
    d03_another_payload_is_refused_as_such_while_the_first_runs
    d13_no_body_is_a_payload_like_any_other
    d15_what_a_process_remembers_refuses_and_replays_as_the_store_does
    a_record_with_a_fingerprint_and_a_request_without_one_do_not_match
    another_payload_takes_nothing_over_from_an_attempt_that_failed
}

fn api(ledger: &Ledger) -> IdempotencyLayer {
    IdempotencyLayer::api(ledger, caller::shared())
}

fn in_memory() -> IdempotencyLayer {
    api(&Ledger::new(MemoryStore::new()))
}

/// What the second of two bodies under one key is answered.
async fn second(layer: &IdempotencyLayer, first: &'static str, second: &'static str) -> StatusCode {
    let app = counting(layer, 201);
    app.send(order("k", first)).await;
    let answer = app.send(order("k", second)).await;
    assert_eq!(app.runs(), 1);
    answer.status
}

async fn d01_another_payload_is_refused_and_the_first_outcome_stays(stores: Stores) {
    let app = counting(&api(&stores.ledger()), 201);
    app.send(order("k", r#"{"amount":1}"#)).await;
    let refused = app.send(order("k", r#"{"amount":2}"#)).await;
    assert_eq!((refused.status.as_u16(), refused.code().as_deref()), (422, Some("key_reused")));
    assert_eq!(refused.headers["content-type"], "application/problem+json");
    assert!(!refused.headers.contains_key("retry-after"), "it would be refused again");
    assert!(app.send(order("k", r#"{"amount":1}"#)).await.is_replayed());
    assert_eq!(app.runs(), 1);
}

#[tokio::test(start_paused = true)]
async fn d01_the_status_of_a_refusal_is_the_users_to_choose() {
    let layer = in_memory().on_refusal(|rejection, refusal| {
        if rejection == Rejection::KeyReused {
            *refusal.status_mut() = StatusCode::CONFLICT;
        }
    });
    assert_eq!(second(&layer, "1", "2").await, 409);
}

async fn d02_a_webhooks_other_payload_is_a_duplicate(stores: Stores) {
    let layer = IdempotencyLayer::webhook(&stores.ledger(), header("X-Id")).fingerprint(fingerprint::whole());
    let app = counting(&layer, 200);
    app.send(event("e")).await;
    let other = Request::post("/hooks").header("x-id", "e").body(body("attempt: 2")).unwrap();
    let replay = app.send(other).await;
    assert_eq!((replay.status.as_u16(), replay.is_replayed(), app.runs()), (200, true, 1));
}

async fn d03_another_payload_is_refused_as_such_while_the_first_runs(stores: Stores) {
    let (a, gate) = gated(&api(&stores.ledger()));
    let b = counting(&api(&stores.ledger()), 201);
    let first = deliver(&a, order("k", "1"));
    until(async || a.runs() == 1).await;
    for elsewhere in [&a, &b] {
        assert_eq!(elsewhere.send(order("k", "2")).await.status, 422, "and not 409");
    }
    gate.add_permits(1);
    assert_eq!(first.await.unwrap().body, "run 1");
    assert_eq!((a.runs(), b.runs()), (1, 0));
}

#[tokio::test(start_paused = true)]
async fn d04_only_selected_members_count() {
    let layer = || in_memory().fingerprint(fingerprint::members(&["$.amount"]));
    assert_eq!(second(&layer(), r#"{"amount":1,"note":"a"}"#, r#"{"amount":1,"note":"b"}"#).await, 201);
    assert_eq!(second(&layer(), r#"{"amount":1}"#, r#"{"amount":2}"#).await, 422);
}

#[tokio::test(start_paused = true)]
async fn d05_members_that_change_between_retries_are_left_out() {
    let layer = || in_memory().fingerprint(fingerprint::json().except(&["$.sent_at"]));
    assert_eq!(second(&layer(), r#"{"a":1,"sent_at":"10:00"}"#, r#"{"a":1,"sent_at":"10:05"}"#).await, 201);
    assert_eq!(second(&layer(), r#"{"a":1,"sent_at":"10:00"}"#, r#"{"a":2,"sent_at":"10:00"}"#).await, 422);
}

#[tokio::test(start_paused = true)]
async fn d06_the_order_of_members_and_white_space_count_by_choice() {
    let (one, other) = (r#"{"a":1,"b":[1,2]}"#, "{ \"b\": [1, 2],\n \"a\": 1 }");
    assert_eq!(second(&in_memory().fingerprint(fingerprint::json()), one, other).await, 201);
    assert_eq!(second(&in_memory(), one, other).await, 422);
}

#[tokio::test(start_paused = true)]
async fn d07_the_order_of_an_array_counts() {
    let layer = in_memory().fingerprint(fingerprint::json());
    assert_eq!(second(&layer, r#"{"i":[1,2]}"#, r#"{"i":[2,1]}"#).await, 422);
}

#[tokio::test(start_paused = true)]
async fn d09_without_a_fingerprint_any_payload_is_a_duplicate() {
    assert_eq!(second(&in_memory().fingerprint(fingerprint::ignored()), "1", "2").await, 201);
    assert_eq!(second(&in_memory().other_payload(OnOtherPayload::Replay), "1", "2").await, 201);
}

#[tokio::test(start_paused = true)]
async fn d11_path_and_body_do_not_run_into_each_other() {
    // The path is in the scope whatever is chosen, so the case is made with the query.
    let app = counting(&in_memory(), 201);
    let post = |uri: &str, text: &'static str| -> Request<Body> {
        Request::post(uri).header("idempotency-key", "k").body(body(text)).unwrap()
    };
    app.send(post("/o?a=12", "3")).await;
    assert_eq!(app.send(post("/o?a=123", "")).await.status, 422);
}

async fn d13_no_body_is_a_payload_like_any_other(stores: Stores) {
    let app = counting(&api(&stores.ledger()), 201);
    app.send(order("k", "")).await;
    assert!(app.send(order("k", "")).await.is_replayed());
    assert_eq!(app.send(order("k", "1")).await.status, 422);
    assert_eq!(app.runs(), 1);
}

async fn d15_what_a_process_remembers_refuses_and_replays_as_the_store_does(stores: Stores) {
    let app = counting(&api(&stores.ledger()), 201);
    for (payload, status, replayed) in [("1", 201, false), ("1", 201, true), ("2", 422, false), ("1", 201, true)] {
        let answer = app.send(order("k", payload)).await;
        assert_eq!((answer.status.as_u16(), answer.is_replayed()), (status, replayed));
    }
    assert_eq!(app.runs(), 1);
}

async fn a_record_with_a_fingerprint_and_a_request_without_one_do_not_match(stores: Stores) {
    let with = || api(&stores.ledger());
    let without = || api(&stores.ledger()).fingerprint(fingerprint::ignored());
    for (key, first, then) in [("k", with(), without()), ("l", without(), with())] {
        let (first, then) = (counting(&first, 201), counting(&then, 201));
        first.send(order(key, "1")).await;
        assert_eq!(then.send(order(key, "1")).await.status, 422);
        assert!(first.send(order(key, "1")).await.is_replayed());
        assert_eq!(then.runs(), 0);
    }
    let webhook = |payload| IdempotencyLayer::webhook(&stores.ledger(), header("X-Id")).fingerprint(payload);
    let (first, then) = (webhook(fingerprint::whole()), webhook(fingerprint::ignored()));
    for (id, first, then) in [("e", &first, &then), ("f", &then, &first)] {
        let (first, then) = (counting(first, 200), counting(then, 200));
        first.send(event(id)).await;
        assert!(then.send(event(id)).await.is_replayed());
        assert_eq!(then.runs(), 0);
    }
}

async fn another_payload_takes_nothing_over_from_an_attempt_that_failed(stores: Stores) {
    let app = App::new(&api(&stores.ledger()), |_, run| async move { answer(500, format!("run {run}")) });
    app.send(order("k", "1")).await;
    assert_eq!(app.send(order("k", "2")).await.status, 422);
    assert_eq!((app.send(order("k", "1")).await.status.as_u16(), app.runs()), (500, 2));
}
