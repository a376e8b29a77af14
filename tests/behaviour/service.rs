//! K: the layer among others, its switches and its hooks.

use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Request, Response, StatusCode};
use http_body::Frame;
use tokio::time::{sleep, timeout};
use tower::limit::ConcurrencyLimitLayer;
use tower::{Layer as _, ServiceExt as _};
use tower_idempotency::key::{header, json};
use tower_idempotency::store::Forgotten;
use tower_idempotency::{IdempotencyLayer, Ledger, MemoryStore, OnOtherPayload, Rejection, caller, fingerprint};

use crate::common::app::{App, answer, body, chunk, counting, deliver, event, frames, gated, key_of, order};
use crate::common::stores::{Step, Stores};
use crate::common::until;

on_every_store! {
    k07_a_key_that_is_forgotten_runs_again
    k07_a_key_that_is_forgotten_runs_again_with_another_payload_too
    k09_a_layer_that_is_switched_off_asks_no_store
    k11_routes_have_rules_of_their_own_on_one_store
    k14_hooks_that_panic_change_no_answer
}

fn api(ledger: &Ledger) -> IdempotencyLayer {
    IdempotencyLayer::api(ledger, caller::shared())
}

fn in_memory() -> IdempotencyLayer {
    api(&Ledger::new(MemoryStore::new()))
}

#[tokio::test(start_paused = true)]
async fn k06_a_replay_needs_no_permit_of_a_busy_service() {
    let service =
        tower::service_fn(|request: Request<tower_idempotency::RequestBody<crate::common::app::Body>>| async move {
            if request.headers()["idempotency-key"] == "k1" {
                sleep(Duration::from_secs(60)).await;
            }
            answer(201, "ran")
        });
    let service = in_memory().layer(ConcurrencyLimitLayer::new(1).layer(service));
    let send = |key: &str| service.clone().oneshot(order(key, "1"));
    assert_eq!(send("k0").await.unwrap().status(), 201);
    let running = tokio::spawn(send("k1"));
    sleep(Duration::from_secs(1)).await;
    let replay = timeout(Duration::from_secs(1), send("k0")).await.expect("no waiting").unwrap();
    assert_eq!(replay.headers()["idempotent-replayed"], "true");
    assert_eq!(running.await.unwrap().unwrap().status(), 201);
}

async fn k07_a_key_that_is_forgotten_runs_again(stores: Stores) {
    let ledger = stores.ledger();
    let layer = api(&ledger);
    let app = counting(&layer, 201);
    assert_eq!(app.send(order("k", "1")).await.body, "run 1");
    assert_eq!(ledger.forget(&key_of(&layer, order("k", "1")), false).await.unwrap(), Forgotten::Forgotten);
    assert_eq!(app.send(order("k", "1")).await.body, "run 2");
}

async fn k07_a_key_that_is_forgotten_runs_again_with_another_payload_too(stores: Stores) {
    let ledger = stores.ledger();
    let layer = api(&ledger);
    let app = counting(&layer, 201);
    app.send(order("k", "1")).await;
    ledger.forget(&key_of(&layer, order("k", "1")), false).await.unwrap();
    assert_eq!(app.send(order("k", "corrected")).await.body, "run 2");
    assert_eq!(app.send(order("k", "1")).await.status, 422, "it is the payload of the key now");
}

async fn k09_a_layer_that_is_switched_off_asks_no_store(stores: Stores) {
    let app = counting(&api(&stores.ledger()).require_key().enabled(false), 201);
    for _ in 0..2 {
        assert_eq!(app.send(order("k", "1")).await.status, 201);
    }
    assert_eq!((app.runs(), stores.calls(Step::Claim)), (2, 0));
}

async fn k11_routes_have_rules_of_their_own_on_one_store(stores: Stores) {
    let ledger = stores.ledger();
    let a = counting(&IdempotencyLayer::webhook(&ledger, header("X-Id")), 200);
    let b = counting(&IdempotencyLayer::webhook(&ledger, json("$.id")), 200);
    let request =
        |path: &str, id: &str, json: &'static str| Request::post(path).header("x-id", id).body(body(json)).unwrap();
    a.send(request("/a", "1", r#"{"id":"1"}"#)).await;
    b.send(request("/b", "1", r#"{"id":"1"}"#)).await;
    assert_eq!((a.runs(), b.runs()), (1, 1));
    assert!(a.send(request("/a", "1", r#"{"id":"2"}"#)).await.is_replayed());
    assert!(b.send(request("/b", "2", r#"{"id":"1"}"#)).await.is_replayed());
}

async fn k14_hooks_that_panic_change_no_answer(stores: Stores) {
    let layer = api(&stores.ledger())
        .keep(|_| panic!("keep"))
        .on_replay(|_| panic!("on_replay"))
        .on_refusal(|_, _| panic!("on_refusal"));
    let app = counting(&layer.clone().require_key(), 201);
    let first = app.send(order("k", "1")).await;
    let replay = app.send(order("k", "1")).await;
    assert_eq!((first.status, first.body), (replay.status, replay.body.clone()));
    assert!(replay.is_replayed());
    let refused = app.send(order("k", "2")).await;
    assert_eq!((refused.status.as_u16(), refused.code().as_deref()), (422, Some("key_reused")));
    assert_eq!(app.send(Request::post("/orders").body(body("1")).unwrap()).await.status, 400);
    // Without a key none is called.
    let passing = counting(&layer, 201);
    assert_eq!(passing.send(Request::post("/orders").body(body("1")).unwrap()).await.status, 201);
}

#[tokio::test(start_paused = true)]
async fn a_redaction_that_panics_keeps_nothing_and_runs_nothing_again() {
    let ledger = Ledger::new(MemoryStore::new());
    let layer = IdempotencyLayer::webhook(&ledger, header("X-Id")).redact(|_| panic!("redact"));
    let app = counting(&layer, 200);
    let first = app.send(event("e")).await;
    assert_eq!((&first.body[..], first.is_stored()), (&b"run 1"[..], false));
    let replay = app.send(event("e")).await;
    assert_eq!((replay.status.as_u16(), replay.is_replayed(), replay.body.len(), app.runs()), (200, true, 0, 1));
    let api = counting(&in_memory().redact(|_| panic!("redact")), 201);
    api.send(order("k", "1")).await;
    let refused = api.send(order("k", "1")).await;
    assert_eq!((refused.code().as_deref(), api.runs()), (Some("outcome_not_retained"), 1));
}

#[tokio::test(start_paused = true)]
async fn what_is_stored_is_redacted_and_what_is_told_first_is_not() {
    let layer = in_memory().redact(|kept| {
        kept.headers.remove("x-token");
        kept.body = Bytes::from_static(b"***");
    });
    let app = App::new(&layer, |_, _| async {
        let mut response = answer(201, "card 4242")?;
        response.headers_mut().insert("x-token", HeaderValue::from_static("secret"));
        Ok(response)
    });
    let first = app.send(order("k", "1")).await;
    assert_eq!(
        (&first.body[..], first.headers.contains_key("x-token"), first.is_stored()),
        (&b"card 4242"[..], true, true)
    );
    let replay = app.send(order("k", "1")).await;
    assert_eq!((&replay.body[..], replay.headers.contains_key("x-token")), (&b"***"[..], false));
    assert_eq!(replay.headers["content-length"], "3");
}

#[tokio::test(start_paused = true)]
async fn a_refusal_may_be_replaced_but_not_by_an_acknowledgement_of_what_has_not_run() {
    let ledger = Ledger::new(MemoryStore::new());
    let layer = IdempotencyLayer::webhook(&ledger, header("X-Id"))
        .require_key()
        .patience(Duration::ZERO)
        .policy_url("https://example.com/retries")
        .on_refusal(|rejection, refusal| {
            *refusal.status_mut() = StatusCode::OK;
            *refusal.body_mut() = Bytes::from(rejection.code());
        });
    let (app, gate) = gated(&layer);
    let dropped = app.send(Request::post("/hooks").body(body("a ping")).unwrap()).await;
    assert_eq!((dropped.status.as_u16(), &dropped.body[..]), (200, &b"key_missing"[..]), "there was no event");
    let running = tokio::spawn(app.send(event("e")));
    tokio::task::yield_now().await;
    sleep(Duration::from_millis(1)).await;
    let refused = app.send(event("e")).await;
    assert_eq!((refused.status.as_u16(), refused.code().as_deref()), (503, Some("running")));
    assert_eq!(refused.headers["link"], "<https://example.com/retries>; rel=\"describedby\"");
    gate.add_permits(1);
    assert_eq!(running.await.unwrap().body, "run 1");
    assert_eq!(Rejection::Running.code(), "running");
}

#[tokio::test(start_paused = true)]
async fn an_expiry_is_announced_where_that_is_wanted() {
    let app = counting(&in_memory().expires_header(), 201);
    let first = app.send(order("k", "1")).await;
    let expires = httpdate::parse_http_date(first.headers["idempotency-expires"].to_str().unwrap()).unwrap();
    let left = expires.duration_since(std::time::SystemTime::now()).unwrap();
    let day = Duration::from_secs(24 * 60 * 60);
    assert!((day - Duration::from_secs(60)..=day).contains(&left), "{left:?}");
    let replay = app.send(order("k", "1")).await;
    assert_eq!(replay.headers["idempotency-expires"], first.headers["idempotency-expires"]);
    let unkept = counting(&in_memory().expires_header(), 500);
    assert!(!unkept.send(order("k", "1")).await.headers.contains_key("idempotency-expires"));
}

#[tokio::test(start_paused = true)]
async fn an_expiry_is_said_of_what_is_kept_alone_and_whatever_headers_are() {
    let chosen = counting(&in_memory().expires_header().keep_headers(&["x-a"]), 200);
    chosen.send(order("k", "1")).await;
    assert!(chosen.send(order("k", "1")).await.headers.contains_key("idempotency-expires"));
    let lost = counting(&in_memory().expires_header().redact(|_| panic!("redact")), 200);
    assert!(!lost.send(order("k", "1")).await.headers.contains_key("idempotency-expires"));
}

#[tokio::test(start_paused = true)]
async fn a_refusal_for_another_payload_is_no_acknowledgement() {
    let ledger = Ledger::new(MemoryStore::new());
    let layer = IdempotencyLayer::webhook(&ledger, header("X-Id"))
        .fingerprint(fingerprint::whole())
        .other_payload(OnOtherPayload::Refuse)
        .on_refusal(|_, refusal| *refusal.status_mut() = StatusCode::OK);
    let app = counting(&layer, 500);
    app.send(event("e")).await;
    let other = Request::post("/hooks").header("x-id", "e").body(body("try 2")).unwrap();
    assert_eq!(app.send(other).await.status, 422, "the first has failed: a sender told 200 would lose the event");
}

#[tokio::test(start_paused = true)]
async fn a_refusal_is_told_as_it_was_where_its_hook_says_what_it_may_not() {
    for status in [100, 101, 204, 304, 307] {
        let layer = in_memory().require_key().patience(Duration::ZERO).on_refusal(move |_, refusal| {
            *refusal.status_mut() = StatusCode::from_u16(status).unwrap();
        });
        let (app, gate) = gated(&layer);
        let told = app.send(Request::post("/orders").body(body("1")).unwrap()).await;
        assert_eq!(told.status.as_u16(), if status == 204 { 204 } else { 400 }, "there was no event");
        let running = deliver(&app, order("k", "1"));
        until(async || app.runs() == 1).await;
        assert_eq!(app.send(order("k", "1")).await.status, 409, "{status}");
        gate.add_permits(1);
        running.await.unwrap();
    }
    let half_done = in_memory().require_key().on_refusal(|_, refusal| {
        *refusal.body_mut() = Bytes::new();
        panic!("half done")
    });
    let told = counting(&half_done, 201).send(Request::post("/orders").body(body("1")).unwrap()).await;
    assert_eq!(told.code().as_deref(), Some("key_missing"));
}

#[tokio::test(start_paused = true)]
async fn what_is_not_kept_of_headers_is_not_kept_of_trailers() {
    let app = App::new(&in_memory().drop_headers(&["x-secret"]), |_, _| async {
        let names = ["x-secret", "set-cookie"].map(HeaderName::from_static);
        let trailers = HeaderMap::from_iter(names.map(|name| (name, HeaderValue::from_static("1"))));
        Ok(Response::new(frames(vec![chunk("a"), Ok(Frame::trailers(trailers))])))
    });
    assert_eq!(app.send(order("k", "1")).await.trailers.map(|trailers| trailers.len()), Some(2));
    let replay = app.send(order("k", "1")).await;
    assert_eq!((replay.is_replayed(), replay.trailers), (true, None));
}

/// All who wait are told by the last look, not by the one before they began to wait.
#[tokio::test(start_paused = true)]
async fn when_to_come_again_is_known_to_all_who_wait() {
    let store = MemoryStore::new();
    let layer = || {
        let ledger = Ledger::new(store.clone());
        IdempotencyLayer::webhook(&ledger, header("X-Id")).patience(Duration::from_secs(25))
    };
    let (app, gate) = gated(&layer());
    let running = deliver(&app, event("e"));
    until(async || app.runs() == 1).await;
    let elsewhere = counting(&layer(), 200);
    let waiting: Vec<_> = (0..20).map(|_| deliver(&elsewhere, event("e"))).collect();
    for refused in waiting {
        assert_eq!(refused.await.unwrap().headers["retry-after"], "1", "the lease is renewed all the time");
    }
    gate.add_permits(1);
    assert_eq!(running.await.unwrap().status, 200);
}
