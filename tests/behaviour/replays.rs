//! C: the first run, and its outcome told again.

use std::time::Duration;

use bytes::Bytes;
use http::{HeaderName, HeaderValue, Request, StatusCode};
use tokio::time::sleep;
use tower_idempotency::key::header;
use tower_idempotency::store::{Claim, Claimed, Store as _};
use tower_idempotency::{Attempt, IdempotencyLayer, Ledger, MemoryStore, caller};

use crate::common::app::{Answer, App, answer, attempt, body, counting, event, key_of, order};
use crate::common::stores::{Step, Stores};

on_every_store! {
    c01_a_second_post_gets_the_first_answer_byte_for_byte
    c09_an_answer_without_content_is_replayed_without_one
    c16_an_outcome_is_forgotten_after_its_retention
    c17_retention_counts_from_completion
    c19_an_outcome_that_the_handler_does_not_want_kept_runs_again
    c30_a_record_of_a_version_to_come_is_an_outage_and_never_garbage
}

/// Long enough for a real server on a busy machine to be faster.
const TICK: Duration = Duration::from_millis(500);

fn api() -> IdempotencyLayer {
    api_on(&Ledger::new(MemoryStore::new()))
}

fn api_on(ledger: &Ledger) -> IdempotencyLayer {
    IdempotencyLayer::api(ledger, caller::shared())
}

fn with_headers(headers: &'static [(&'static str, &'static str)], layer: &IdempotencyLayer) -> App {
    App::new(layer, move |_, run| async move {
        let mut response = answer(201, format!("run {run}"))?;
        for (name, value) in headers {
            response.headers_mut().append(HeaderName::from_static(name), HeaderValue::from_static(value));
        }
        Ok(response)
    })
}

async fn c01_a_second_post_gets_the_first_answer_byte_for_byte(stores: Stores) {
    let app = with_headers(&[("location", "/o/1"), ("content-type", "application/json")], &api_on(&stores.ledger()));
    let first = app.send(order("k", "1")).await;
    let mut second = app.send(order("k", "1")).await;
    assert_eq!((second.status, &second.body, app.runs()), (StatusCode::CREATED, &first.body, 1));
    assert!(!first.headers.contains_key("idempotent-replayed"), "c02: the first is not marked");
    assert_eq!(second.headers.remove("idempotent-replayed").unwrap(), "true", "c02: its replay is");
    assert_eq!(second.headers.remove("content-length").unwrap(), "5", "c12: which says how long it is");
    assert_eq!(second.headers, first.headers);
}

#[tokio::test(start_paused = true)]
async fn c02_the_marks_name_is_the_users_to_choose() {
    let layer = api().on_replay(|kept| {
        if let Some(mark) = kept.headers.remove("idempotent-replayed") {
            kept.headers.insert("x-replayed", mark);
        }
    });
    let app = counting(&layer, 201);
    app.send(order("k", "1")).await;
    let replay = app.send(order("k", "1")).await;
    assert_eq!(
        (replay.headers.get("idempotent-replayed"), &replay.headers["x-replayed"]),
        (None, &"true".parse().unwrap())
    );
}

#[tokio::test(start_paused = true)]
async fn c02_the_first_is_marked_too_by_choice() {
    let app = counting(&api().mark_first().require_key(), 201);
    let mark =
        |answer: &Answer| answer.headers.get("idempotent-replayed").map(|mark| mark.to_str().unwrap().to_owned());
    assert_eq!(mark(&app.send(order("k", "1")).await).as_deref(), Some("false"));
    assert_eq!(mark(&app.send(order("k", "1")).await).as_deref(), Some("true"));
    assert_eq!(mark(&app.send(order("k", "2")).await), None, "a refusal is neither");
}

#[tokio::test(start_paused = true)]
async fn c04_what_is_for_one_caller_or_one_connection_is_not_replayed() {
    const HEADERS: [(&str, &str); 9] = [
        ("set-cookie", "a=1"),
        ("set-cookie", "b=2"),
        ("www-authenticate", "Basic"),
        ("authorization", "x"),
        ("connection", "x-hop"),
        ("x-hop", "1"),
        ("keep-alive", "1"),
        ("trailer", "x-sum"),
        ("upgrade", "h2c"),
    ];
    let app = with_headers(&HEADERS, &api());
    let first = app.send(order("k", "1")).await;
    assert_eq!(first.headers.len(), HEADERS.len());
    let replay = app.send(order("k", "1")).await;
    let mut names: Vec<_> = replay.headers.keys().map(HeaderName::as_str).collect();
    names.sort_unstable();
    assert_eq!(names, ["content-length", "idempotent-replayed"]);
}

#[tokio::test(start_paused = true)]
async fn c06_repeated_lines_are_replayed_in_their_order() {
    let app = with_headers(&[("x-a", "2"), ("x-a", "1")], &api());
    app.send(order("k", "1")).await;
    let replay = app.send(order("k", "1")).await;
    assert_eq!(replay.headers.get_all("x-a").iter().collect::<Vec<_>>(), ["2", "1"]);
}

#[tokio::test(start_paused = true)]
async fn c08_a_list_changed_after_the_layer_was_made_changes_nothing() {
    let mut names = vec!["X-A"];
    let layer = api().keep_headers(&names);
    names.push("x-b");
    let app = with_headers(&[("x-a", "1"), ("x-b", "2")], &layer);
    app.send(order("k", "1")).await;
    let replay = app.send(order("k", "1")).await;
    assert_eq!((replay.headers.get("x-a").is_some(), replay.headers.get("x-b"), app.runs()), (true, None, 1));
    assert_eq!(names.len(), 2);
}

async fn c09_an_answer_without_content_is_replayed_without_one(stores: Stores) {
    let app = App::new(&api_on(&stores.ledger()), |_, _| async { answer(204, "") });
    app.send(order("k", "1")).await;
    let replay = app.send(order("k", "1")).await;
    assert_eq!((replay.status, replay.is_replayed(), replay.body.len()), (StatusCode::NO_CONTENT, true, 0));
    assert_eq!(replay.headers.get("content-length"), None, "RFC 9110 §8.6");
}

#[tokio::test(start_paused = true)]
async fn c11_any_content_type_is_kept() {
    let app = with_headers(&[("content-type", "text/csv")], &api());
    app.send(order("k", "1")).await;
    assert_eq!(app.send(order("k", "1")).await.headers["content-type"], "text/csv");
}

#[tokio::test(start_paused = true)]
async fn c12_a_replay_can_forbid_caches_to_keep_it() {
    let layer = api().on_replay(|kept| {
        kept.headers.insert("cache-control", HeaderValue::from_static("no-store"));
    });
    let app = with_headers(&[("cache-control", "max-age=60")], &layer);
    assert_eq!(app.send(order("k", "1")).await.headers["cache-control"], "max-age=60");
    assert_eq!(app.send(order("k", "1")).await.headers["cache-control"], "no-store");
}

async fn c16_an_outcome_is_forgotten_after_its_retention(stores: Stores) {
    let app = counting(&api_on(&stores.ledger()).retention(TICK * 2), 201);
    assert_eq!(app.send(order("k", "1")).await.body, "run 1");
    assert_eq!(app.send(order("k", "1")).await.body, "run 1");
    sleep(TICK * 3).await;
    assert_eq!(app.send(order("k", "1")).await.body, "run 2");
}

async fn c17_retention_counts_from_completion(stores: Stores) {
    let app = App::new(&api_on(&stores.ledger()).retention(TICK * 4), |_, run| async move {
        sleep(TICK * 3).await;
        answer(201, format!("run {run}"))
    });
    app.send(order("k", "1")).await;
    sleep(TICK * 2).await;
    assert_eq!(app.send(order("k", "1")).await.body, "run 1", "five ticks after the start, two after the end");
}

async fn c19_an_outcome_that_the_handler_does_not_want_kept_runs_again(stores: Stores) {
    let app = App::new(&api_on(&stores.ledger()), |request, run| async move {
        attempt(&request).dont_keep();
        answer(201, format!("run {run}"))
    });
    let first = app.send(order("k", "1")).await;
    assert!(!first.is_stored());
    assert_eq!(app.send(order("k", "1")).await.body, "run 2");
}

#[tokio::test(start_paused = true)]
async fn c21_no_hook_of_a_replay_is_called_for_a_mismatch() {
    let app = counting(
        &api().on_replay(|_| panic!("called")).on_refusal(|_, refusal| {
            refusal.headers_mut().insert("x-refused", HeaderValue::from_static("yes"));
        }),
        201,
    );
    app.send(order("k", "1")).await;
    let refused = app.send(order("k", "2")).await;
    assert_eq!((refused.status.as_u16(), &refused.headers["x-refused"]), (422, &"yes".parse().unwrap()));
}

#[tokio::test(start_paused = true)]
async fn c23_the_handler_sees_the_key_of_its_attempt_and_none_without_a_key() {
    let layer = api();
    let app = App::new(&layer, |request, _| async move {
        let attempt = request.extensions().get::<Attempt>();
        answer(201, attempt.map_or("none".to_owned(), |attempt| attempt.key().to_string()))
    });
    let seen = app.send(order("k", "1")).await.body;
    assert_eq!(seen, key_of(&layer, order("k", "1")).to_string());
    assert_eq!(app.send(Request::post("/orders").body(body("1")).unwrap()).await.body, "none");
}

#[tokio::test(start_paused = true)]
async fn c24_two_equal_orders_with_two_keys_are_two_orders() {
    let app = counting(&api(), 201);
    app.send(order("k1", "1")).await;
    assert_eq!(app.send(order("k2", "1")).await.body, "run 2");
}

#[tokio::test(start_paused = true)]
async fn c25_a_key_is_another_on_another_path() {
    let app = counting(&api(), 201);
    let post = |path: &str| app.send(Request::post(path).header("idempotency-key", "k").body(body("1")).unwrap());
    assert_eq!(post("/a").await.body, "run 1");
    assert_eq!(post("/b").await.body, "run 2");
}

#[tokio::test(start_paused = true)]
async fn c27_another_query_is_another_payload_unless_it_is_left_out() {
    let post = |query: &str| {
        let uri = format!("/a?{query}");
        Request::post(uri).header("idempotency-key", "k").body(body("1")).unwrap()
    };
    let strict = counting(&api(), 201);
    strict.send(post("x=1")).await;
    assert_eq!(strict.send(post("x=2")).await.status, 422);
    let payload = tower_idempotency::fingerprint::whole().without_query();
    let lenient = counting(&api().fingerprint(payload), 201);
    lenient.send(post("x=1")).await;
    assert!(lenient.send(post("x=2")).await.is_replayed());
}

#[tokio::test(start_paused = true)]
async fn c28_the_order_of_a_query_is_no_other_payload() {
    let app = counting(&api(), 201);
    let post = |uri: &str| app.send(Request::post(uri).header("idempotency-key", "k").body(body("")).unwrap());
    post("/a?a=1&b=2").await;
    assert!(post("/a?b=2&a=1").await.is_replayed());
    assert_eq!(app.runs(), 1);
}

async fn c30_a_record_of_a_version_to_come_is_an_outage_and_never_garbage(stores: Stores) {
    let layer = IdempotencyLayer::webhook(&stores.ledger(), header("X-Id"));
    let (store, key) = (stores.store(), key_of(&layer, event("e")));
    let claim = Claim::new(TICK, TICK * 100);
    assert_eq!(store.claim(&key, &claim).await.unwrap(), Claimed::Acquired { attempt: 1 });
    store.complete(&key, &claim, Bytes::from_static(b"\x02\0\0\xc8\0\0\0\0\0\0")).await.unwrap();
    let app = counting(&layer, 200);
    let refused = app.send(event("e")).await;
    assert_eq!((refused.status.as_u16(), refused.code().as_deref()), (503, Some("store_unavailable")));
    assert_eq!((app.runs(), stores.calls(Step::Claim)), (0, 2));
}
