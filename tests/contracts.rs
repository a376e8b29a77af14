//! The cells of the two contracts, each as a request sees it.

#![allow(clippy::expect_used, clippy::unwrap_used, reason = "a test panics where it fails")]

mod common;

use std::convert::Infallible;
use std::io;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use futures_util::{StreamExt as _, stream};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response, StatusCode};
use http_body::Frame;
use http_body_util::{BodyExt as _, StreamBody};
use tokio::sync::{Notify, Semaphore};
use tokio::time::{Instant, sleep, timeout};
use tower::{BoxError, Layer as _, ServiceExt as _, service_fn};
use tower_idempotency::key::{header, json};
use tower_idempotency::store::{Claim, Forgotten, State, Store as _};
use tower_idempotency::{
    Attempt, IdempotencyLayer, Ledger, MemoryStore, OnStoreError, Rejection, Replay, RequestBody, caller,
};

use common::app::{
    Answer, App, Body, Incoming, answer, attempt, body, chunk, deliver, echoing, event, frames, gated, order,
};
use common::stores::{Fault, Step, Stores};
use common::until;

fn ledger() -> Ledger {
    Ledger::new(MemoryStore::new())
}

fn webhook() -> IdempotencyLayer {
    IdempotencyLayer::webhook(&ledger(), header("X-Id"))
}

fn api() -> IdempotencyLayer {
    IdempotencyLayer::api(&ledger(), caller::shared())
}

/// Answers with the status the test wants, and the number of its run.
fn app(layer: &IdempotencyLayer, status: u16) -> App {
    App::new(layer, move |_, run| async move { answer(status, format!("run {run}")) })
}

fn code(answer: &Answer) -> String {
    answer.code().unwrap_or_default()
}

// Keys.

#[tokio::test(start_paused = true)]
async fn a_json_key_leaves_the_body_as_it_was() {
    let app = echoing(&IdempotencyLayer::webhook(&ledger(), json("$.data.id")));
    let event = |text: &'static str| Request::post("/").body(body(text)).unwrap();
    assert_eq!(app.send(event(r#"{"data": {"id": 1}}"#)).await.body, r#"{"data": {"id": 1}}"#);
    let duplicate = app.send(event(r#"{"sent": 2, "data": {"id": 1}}"#)).await;
    assert_eq!(duplicate.body, r#"{"data": {"id": 1}}"#);
    assert!(duplicate.is_replayed());
}

#[tokio::test(start_paused = true)]
async fn a_scope_separates_what_a_router_strips() {
    let layer = api().scope(|head| head.headers.get("x-tenant").map(|tenant| tenant.as_bytes().to_vec()));
    let app = app(&layer, 201);
    let by = |tenant: &'static str| {
        let mut request = order("k", "1");
        request.headers_mut().insert("x-tenant", HeaderValue::from_static(tenant));
        request
    };
    assert_eq!(app.send(by("a")).await.body, "run 1");
    assert_eq!(app.send(by("b")).await.body, "run 2");
    assert_eq!(app.send(order("k", "1")).await.body, "run 3");
    assert_eq!(app.send(by("a")).await.body, "run 1");
}

#[tokio::test(start_paused = true)]
async fn method_and_path_are_part_of_the_scope() {
    let app = app(&webhook(), 200);
    let send = |method: Method, path: &str| {
        app.send(Request::builder().method(method).uri(path).header("x-id", "e").body(body("")).unwrap())
    };
    assert_eq!(send(Method::POST, "/a").await.body, "run 1");
    assert_eq!(send(Method::POST, "/b").await.body, "run 2");
    assert_eq!(send(Method::PUT, "/a").await.body, "run 3");
    assert_eq!(send(Method::POST, "/a?again").await.body, "run 1");
    for _ in 0..2 {
        assert!(!send(Method::HEAD, "/a").await.is_replayed());
        assert!(!send(Method::OPTIONS, "/a").await.is_replayed());
    }
    assert_eq!(app.runs(), 7);
}

#[tokio::test(start_paused = true)]
async fn a_layer_inside_of_itself_does_not_wait_for_itself() {
    let layer = webhook();
    let handler = service_fn(|_: Request<RequestBody<RequestBody<Body>>>| async {
        Ok::<_, Infallible>(Response::new(body("ran")))
    });
    let twice = layer.layer(layer.layer(handler));
    for replayed in [false, true] {
        let response = twice.clone().oneshot(event("e")).await.unwrap();
        assert_eq!(
            (response.status().as_u16(), response.headers().contains_key("idempotent-replayed")),
            (200, replayed)
        );
    }
}

#[tokio::test(start_paused = true)]
async fn an_operator_can_compute_a_key_and_look_it_up() {
    let ledger = ledger();
    let layer = IdempotencyLayer::webhook(&ledger, json("$.id"));
    let app = app(&layer, 200);
    let request = || Request::post("/").body(body(r#"{"id":"e"}"#)).unwrap();
    app.send(request()).await;
    let (head, _) = request().into_parts();
    let key = layer.key_of(&head, &Bytes::from_static(br#"{"id":"e"}"#)).unwrap();
    let entry = ledger.lookup(&key).await.unwrap().unwrap();
    assert!(matches!(entry.state, State::Done(_)));
    assert!(!format!("{entry:?}").contains("run 1"), "what was answered has no place in a log");
    assert_eq!(layer.key_of(&head, &Bytes::from_static(b"{}")), None);
    assert_eq!(ledger.forget(&key, false).await.unwrap(), Forgotten::Forgotten);
    assert_eq!(app.send(request()).await.body, "run 2");
}

#[tokio::test(start_paused = true)]
async fn a_layer_inside_of_another_ledgers_does_its_own_work() {
    let shared = Stores::memory();
    let runs = Arc::new(AtomicU32::new(0));
    for _ in 0..2 {
        let runs = Arc::clone(&runs);
        let handler = service_fn(move |_: Request<RequestBody<RequestBody<Body>>>| {
            runs.fetch_add(1, Ordering::SeqCst);
            async { Ok::<_, Infallible>(Response::new(body("ran"))) }
        });
        // Each process has a ledger of its own around the one they share.
        let inner = IdempotencyLayer::webhook(&shared.ledger(), header("X-Id"));
        webhook().layer(inner.layer(handler)).oneshot(event("e")).await.unwrap();
    }
    assert_eq!(runs.load(Ordering::SeqCst), 1);
}

// Replays.

#[tokio::test(start_paused = true)]
async fn a_webhook_duplicate_is_answered_200_with_what_was_kept() {
    for status in [200, 201, 202, 204] {
        let app = app(&webhook(), status);
        let first = app.send(event("e")).await;
        let duplicate = app.send(event("e")).await;
        assert_eq!((first.status.as_u16(), first.is_replayed()), (status, false));
        assert_eq!((duplicate.status.as_u16(), duplicate.is_replayed()), (200, true));
        assert_eq!((duplicate.body, app.runs()), (first.body, 1));
    }
}

#[tokio::test(start_paused = true)]
async fn what_is_kept_and_how_it_is_replayed_are_chosen() {
    let whole = app(&webhook().keep(|status| status == 201).replay(Replay::Outcome), 201);
    whole.send(event("e")).await;
    assert_eq!((whole.send(event("e")).await.status.as_u16(), whole.runs()), (201, 1));
    let failure = app(&webhook().keep(|_| true), 500);
    failure.send(event("e")).await;
    assert_eq!((failure.send(event("e")).await.status.as_u16(), failure.runs()), (500, 1), "no acknowledgement");
}

#[tokio::test(start_paused = true)]
async fn trailers_are_replayed() {
    let app = App::new(&api(), |_, _| async {
        let trailers = HeaderMap::from_iter([(HeaderName::from_static("x-sum"), HeaderValue::from_static("7"))]);
        Ok(Response::new(frames(vec![chunk("a"), chunk("b"), Ok(Frame::trailers(trailers))])))
    });
    let first = app.send(order("k", "1")).await;
    let replay = app.send(order("k", "1")).await;
    assert!(replay.is_replayed() && replay.trailers.is_some() && !replay.headers.contains_key("content-length"));
    assert_eq!((first.body, first.trailers), (replay.body, replay.trailers));
}

// Bodies.

#[tokio::test(start_paused = true)]
async fn a_streamed_request_is_not_buffered_and_runs_again_when_it_broke() {
    let app = App::new(&webhook().stream_request_body(), |request: Incoming, run| async move {
        let whole = request.into_body().collect().await.is_ok();
        answer(200, format!("run {run}, whole: {whole}"))
    });
    let of = |body| Request::post("/").header("x-id", "e").body(body).unwrap();
    let broken = frames(vec![chunk("half"), Err(io::Error::other("reset"))]);
    assert_eq!(app.send(of(broken)).await.body, "run 1, whole: false");
    assert_eq!(app.send(of(body("x".repeat(3 << 20)))).await.body, "run 2, whole: true");
    assert_eq!(app.send(of(body("x"))).await.body, "run 2, whole: true");
}

#[tokio::test(start_paused = true)]
async fn half_a_request_is_not_kept_however_late_it_broke() {
    let app = App::new(&webhook().stream_request_body(), |request: Incoming, run| async move {
        let answered = stream::once(async move {
            let whole = request.into_body().collect().await.is_ok();
            Ok(Frame::data(Bytes::from(format!("run {run}, whole: {whole}"))))
        });
        Ok(Response::new(StreamBody::new(answered).boxed_unsync()))
    });
    let broken = frames(vec![chunk("half"), Err(io::Error::other("reset"))]);
    let first = app.send(Request::post("/hooks").header("x-id", "e").body(broken).unwrap()).await;
    assert_eq!((&first.body[..], first.is_stored()), (&b"run 1, whole: false"[..], false));
    assert_eq!(app.send(event("e")).await.body, "run 2, whole: true");
}

#[tokio::test(start_paused = true)]
async fn a_large_response_keeps_its_length() {
    let app = App::new(&api().max_kept_body(10), move |_, _| async move { Ok(Response::new(body("x".repeat(11)))) });
    let response = app.call(order("k", "1")).await.unwrap();
    assert_eq!(http_body::Body::size_hint(response.body()).exact(), Some(11));
}

#[tokio::test(start_paused = true)]
async fn a_slow_response_streams_on_and_leaves_a_tombstone_before_its_end() {
    let more = Arc::new(Semaphore::new(0));
    let gate = Arc::clone(&more);
    let app = App::new(&webhook().lease(Duration::from_secs(3)), move |_, _| {
        let gate = Arc::clone(&gate);
        async move {
            let rest = stream::once(async move {
                gate.acquire().await.unwrap().forget();
                chunk("second")
            });
            Ok(Response::new(StreamBody::new(stream::iter([chunk("first")]).chain(rest)).boxed_unsync()))
        }
    });
    let started = Instant::now();
    let response = app.call(event("e")).await.unwrap();
    assert_eq!(started.elapsed(), Duration::from_millis(500));
    assert_eq!(response.headers()["idempotency-stored"], "false");
    let mut body = response.into_body();
    assert_eq!(body.frame().await.unwrap().unwrap().into_data().unwrap(), "first");
    // The lease is renewed while it streams.
    sleep(Duration::from_secs(10)).await;
    assert_eq!(code(&app.send(event("e")).await), "running");
    more.add_permits(1);
    assert_eq!(body.frame().await.unwrap().unwrap().into_data().unwrap(), "second");
    assert!(body.frame().await.is_none());
    let duplicate = app.send(event("e")).await;
    assert_eq!((duplicate.status.as_u16(), duplicate.is_replayed(), app.runs()), (200, true, 1));
}

#[tokio::test(start_paused = true)]
async fn the_last_frame_of_a_known_length_waits_for_the_tombstone() {
    let stores = Stores::memory();
    let layer = IdempotencyLayer::webhook(&stores.ledger(), header("X-Id")).max_kept_body(2);
    let app = App::new(&layer, |_, _| async {
        Ok(Response::builder().header("content-length", "4").body(frames(vec![chunk("ab"), chunk("cd")])).unwrap())
    });
    stores.fail(Step::Complete, Fault::LoseRequest, 3);
    let mut body = app.call(event("e")).await.unwrap().into_body();
    let mut read = Vec::new();
    while let Some(frame) = body.frame().await {
        read.extend_from_slice(&frame.unwrap().into_data().unwrap());
        if read.len() == 4 {
            let elsewhere = App::new(&layer, |_, _| async { answer(200, "ran again") });
            assert!(elsewhere.send(event("e")).await.is_replayed());
        }
    }
    assert_eq!(read, b"abcd");
}

#[tokio::test(start_paused = true)]
async fn a_slow_response_is_driven_to_its_end_without_its_client() {
    let app = App::new(&webhook(), |_, run| async move {
        let rest = stream::iter(0..10).then(|_| async {
            sleep(Duration::from_secs(1)).await;
            chunk("more")
        });
        assert_eq!(run, 1);
        Ok(Response::new(StreamBody::new(rest).boxed_unsync()))
    });
    drop(app.call(event("e")).await.unwrap());
    assert_eq!(code(&app.send(event("e")).await), "running");
    sleep(Duration::from_secs(10)).await;
    assert!(app.send(event("e")).await.is_replayed());
}

#[tokio::test(start_paused = true)]
async fn a_slow_response_that_breaks_runs_again() {
    let app = App::new(&webhook(), |_, run| async move {
        if run > 1 {
            return answer(200, "whole");
        }
        let rest = stream::once(async {
            sleep(Duration::from_secs(1)).await;
            Err(io::Error::other("broken off"))
        });
        Ok(Response::new(StreamBody::new(rest).boxed_unsync()))
    });
    let response = app.call(event("e")).await.unwrap();
    assert!(response.into_body().collect().await.is_err());
    assert_eq!(app.send(event("e")).await.body, "whole");
}

#[tokio::test(start_paused = true)]
async fn what_is_last_is_held_back_with_what_could_follow_it() {
    for trailing in [Frame::data(Bytes::new()), Frame::trailers(HeaderMap::new())] {
        let stores = Stores::memory();
        let layer = IdempotencyLayer::webhook(&stores.ledger(), header("X-Id")).max_kept_body(1);
        let trailing = Arc::new(std::sync::Mutex::new(Some(trailing)));
        let app = App::new(&layer, move |_, _| {
            let trailing = trailing.lock().unwrap().take().unwrap();
            let sent = stream::iter([chunk("ab"), chunk("cd"), Ok(trailing)]).chain(stream::pending());
            let response = Response::builder().header("content-length", "4");
            async move { Ok(response.body(StreamBody::new(sent).boxed_unsync()).unwrap()) }
        });
        stores.fail(Step::Complete, Fault::LoseRequest, u32::MAX);
        let mut body = app.call(event("e")).await.unwrap().into_body();
        assert_eq!(body.frame().await.unwrap().unwrap().into_data().unwrap(), "ab");
        assert!(timeout(Duration::from_secs(1), body.frame()).await.is_err(), "the end left before its tombstone");
    }
}

#[tokio::test(start_paused = true)]
async fn trailers_end_a_body_that_is_slow_to_say_so() {
    let app = App::new(&api(), |_, _| async {
        let trailers = HeaderMap::from_iter([(HeaderName::from_static("x-sum"), HeaderValue::from_static("7"))]);
        let sent = stream::iter([chunk("ab"), Ok(Frame::trailers(trailers))]).chain(stream::pending());
        Ok(Response::new(StreamBody::new(sent).boxed_unsync()))
    });
    for _ in 0..2 {
        let answer = app.send(order("k", "1")).await;
        assert!(answer.is_stored() && answer.trailers.is_some());
    }
}

#[tokio::test]
async fn an_endless_body_without_a_client_is_given_up() {
    let ledger = ledger().max_in_flight(1);
    let layer = IdempotencyLayer::webhook(&ledger, header("X-Id")).max_attempt(Duration::from_millis(200));
    let app = App::new(&layer.max_kept_body(10), |_, run| async move {
        if run > 1 {
            return answer(200, "ran");
        }
        Ok(Response::new(StreamBody::new(stream::repeat_with(|| chunk("abcd"))).boxed_unsync()))
    });
    drop(app.call(event("e")).await.unwrap());
    timeout(Duration::from_secs(10), ledger.drain(Duration::from_secs(10))).await.unwrap().unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_client_that_does_not_read_holds_nothing_for_ever() {
    let minute = Duration::from_secs(60);
    let ledger = ledger().max_in_flight(1);
    let layer = IdempotencyLayer::webhook(&ledger, header("X-Id")).max_attempt(minute).max_kept_body(10);
    let app = App::new(&layer, |_, _| async { Ok(Response::new(frames((0..10).map(|_| chunk("abcd")).collect()))) });
    let unread = app.call(event("e")).await.unwrap();
    sleep(minute * 2).await;
    assert!(app.send(event("e")).await.is_replayed());
    assert_eq!(app.send(event("other")).await.status, 200);
    assert_eq!(app.runs(), 2);
    assert!(unread.into_body().collect().await.is_err(), "what was cut short does not look whole");
}

/// A response whose body is larger than what is kept, in pieces that a client has to take one by one.
fn in_pieces(pieces: Vec<io::Result<Frame<Bytes>>>) -> Result<Response<Body>, tower::BoxError> {
    Ok(Response::builder().header("content-length", "12").body(frames(pieces)).unwrap())
}

#[tokio::test(start_paused = true)]
async fn a_client_that_is_slow_to_take_the_end_keeps_nobody_waiting() {
    let stores = Stores::memory();
    let layer = IdempotencyLayer::webhook(&stores.ledger(), header("X-Id")).max_kept_body(1);
    let app = App::new(&layer, |_, _| async { in_pieces(vec![chunk("abcd"), chunk("efgh"), chunk("ijkl")]) });
    stores.fail(Step::Complete, Fault::LoseRequest, u32::MAX);
    let mut unread = app.call(event("e")).await.unwrap().into_body();
    assert!(unread.frame().await.is_some());
    sleep(Duration::from_secs(3)).await;
    stores.heal();
    sleep(Duration::from_secs(2)).await;
    assert!(app.send(event("e")).await.is_replayed());
}

#[tokio::test(start_paused = true)]
async fn a_body_that_failed_frees_its_key_before_its_client_takes_note() {
    let app = App::new(&webhook().max_kept_body(1), |_, run| async move {
        match run {
            1 => in_pieces(vec![chunk("abcd"), chunk("efgh"), Err(io::Error::other("broken off"))]),
            _ => answer(200, ""),
        }
    });
    let mut unread = app.call(event("e")).await.unwrap().into_body();
    assert!(unread.frame().await.is_some());
    sleep(Duration::from_secs(2)).await;
    assert_eq!(app.send(event("e")).await.status, 200);
    assert!(unread.collect().await.is_err());
}

#[tokio::test(start_paused = true)]
async fn a_finished_key_is_not_kept_alive_by_a_client_that_is_slow_to_take_the_end() {
    let second = Duration::from_secs(1);
    let layer = webhook().max_kept_body(1).lease(second * 3).retention(second * 5);
    let app = App::new(&layer, |_, _| async { in_pieces(vec![chunk("abcd"), chunk("efgh"), chunk("ijkl")]) });
    let mut unread = app.call(event("e")).await.unwrap().into_body();
    assert!(unread.frame().await.is_some());
    sleep(second * 60).await;
    app.call(event("e")).await.unwrap();
    assert_eq!(app.runs(), 2, "its retention is over");
}

#[tokio::test(start_paused = true)]
async fn a_response_of_more_headers_than_a_record_has_room_for_leaves_a_tombstone() {
    let app = App::new(&webhook(), |_, _| async {
        let mut response = answer(200, "body")?;
        for _ in 0..70_000 {
            response.headers_mut().append("x-a", HeaderValue::from_static("1"));
        }
        Ok(response)
    });
    let first = app.send(event("e")).await;
    assert_eq!((first.headers.get_all("x-a").iter().count(), first.is_stored()), (70_000, false));
    let again = app.send(event("e")).await;
    assert_eq!((again.status.as_u16(), again.is_replayed(), app.runs()), (200, true, 1));
}

#[tokio::test(start_paused = true)]
async fn what_is_sensitive_is_sensitive_when_it_is_told_again() {
    let app = App::new(&webhook(), |_, _| async {
        let mut response = answer(200, "body")?;
        let mut token = HeaderValue::from_static("secret");
        token.set_sensitive(true);
        response.headers_mut().insert("x-token", token);
        Ok(response)
    });
    for _ in 0..2 {
        let headers = app.send(event("e")).await.headers;
        assert!(headers["x-token"] == "secret" && headers["x-token"].is_sensitive());
    }
    assert_eq!(app.runs(), 1);
}

/// A service that is ready after so many failures.
#[derive(Clone)]
struct Fragile {
    failures: Arc<AtomicU32>,
    numbers: Arc<Mutex<Vec<u32>>>,
}

impl tower::Service<Incoming> for Fragile {
    type Response = Response<Body>;
    type Error = BoxError;
    type Future = std::future::Ready<Result<Response<Body>, BoxError>>;

    fn poll_ready(&mut self, _: &mut std::task::Context<'_>) -> std::task::Poll<Result<(), BoxError>> {
        let failing = self.failures.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1));
        std::task::Poll::Ready(if failing.is_ok() { Err("not ready".into()) } else { Ok(()) })
    }

    fn call(&mut self, request: Incoming) -> Self::Future {
        self.numbers.lock().unwrap().push(attempt(&request).number());
        std::future::ready(answer(200, "ready"))
    }
}

#[tokio::test(start_paused = true)]
async fn an_attempt_whose_service_was_never_ready_is_not_counted() {
    let fragile = Fragile { failures: Arc::new(AtomicU32::new(2)), numbers: Arc::default() };
    let service = webhook().layer(fragile.clone());
    for _ in 0..2 {
        let failed = service.clone().oneshot(event("e")).await;
        assert_eq!(failed.expect_err("it is not ready").to_string(), "not ready");
    }
    assert_eq!(service.clone().oneshot(event("e")).await.unwrap().status(), 200);
    assert_eq!(*fragile.numbers.lock().unwrap(), [1]);
}

#[tokio::test(start_paused = true)]
async fn a_layer_that_is_switched_off_waits_for_its_service_as_long_as_that_takes() {
    for (enabled, waits) in [(true, false), (false, true)] {
        let busy = tower::service_fn(|_: Incoming| async {
            sleep(Duration::from_secs(20)).await;
            answer(200, "done")
        });
        let busy = tower::limit::ConcurrencyLimit::new(busy, 1);
        let service = webhook().enabled(enabled).layer(busy);
        let request = || Request::get("/").body(body("")).unwrap();
        let first = tokio::spawn(service.clone().oneshot(request()));
        tokio::task::yield_now().await;
        let second = service.oneshot(request()).await.unwrap().status();
        assert_eq!(second == 200, waits, "{second}");
        assert_eq!(first.await.unwrap().unwrap().status(), 200);
    }
}

// Steering.

#[tokio::test(start_paused = true)]
async fn a_handler_steers_what_becomes_of_its_outcome() {
    let day = Duration::from_secs(24 * 60 * 60);
    let app = App::new(&webhook(), move |request: Incoming, run| async move {
        let attempt = request.extensions().get::<Attempt>().unwrap();
        match request.headers()["x-id"].as_bytes() {
            b"long" => attempt.keep_for(day * 30),
            b"not" => attempt.dont_keep(),
            _ => attempt.already_applied(),
        }
        answer(201, format!("run {run}"))
    });
    app.send(event("long")).await;
    sleep(day * 29).await;
    assert!(app.send(event("long")).await.is_replayed());

    assert!(!app.send(event("not")).await.is_stored());
    assert_eq!(app.send(event("not")).await.body, "run 3");

    let failing = App::new(&webhook(), |request: Incoming, _| async move {
        attempt(&request).already_applied();
        let mut response = answer(503, "later")?;
        response.headers_mut().insert("retry-after", HeaderValue::from_static("120"));
        Ok(response)
    });
    for _ in 0..2 {
        let applied = failing.send(event("applied")).await;
        assert_eq!((applied.status.as_u16(), applied.headers.get("retry-after")), (200, None), "it has not failed");
    }
    for _ in 0..2 {
        let applied = app.send(event("applied")).await;
        assert_eq!((applied.status.as_u16(), applied.is_replayed(), &applied.body[..]), (200, true, &b""[..]));
    }
    assert_eq!(app.runs(), 4);
}

#[tokio::test(start_paused = true)]
async fn an_api_is_told_that_an_applied_outcome_is_not_retained() {
    let app = App::new(&api(), |request: Incoming, _| async move {
        request.extensions().get::<Attempt>().unwrap().already_applied();
        answer(500, "whatever")
    });
    for _ in 0..2 {
        assert_eq!(code(&app.send(order("k", "1")).await), "outcome_not_retained");
    }
    assert_eq!(app.runs(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_handler_may_steer_from_inside_its_body() {
    let app = App::new(&webhook(), |request: Incoming, run| async move {
        let attempt = request.extensions().get::<Attempt>().unwrap().clone();
        let late = stream::once(async move {
            match run {
                1 => attempt.dont_keep(),
                _ => attempt.already_applied(),
            }
            chunk("late")
        });
        Ok(Response::new(StreamBody::new(late).boxed_unsync()))
    });
    let first = app.send(event("e")).await;
    assert_eq!((&first.body[..], first.is_stored()), (&b"late"[..], false));
    assert_eq!(app.send(event("e")).await.body, "");
    assert!(app.send(event("e")).await.is_replayed());
    assert_eq!(app.runs(), 2);
}

// Attempts that take too long.

#[tokio::test(start_paused = true)]
async fn handlers_that_hang_do_not_keep_others_from_running() {
    let ledger = ledger().max_in_flight(2);
    let app = App::new(&IdempotencyLayer::webhook(&ledger, header("X-Id")), |_, run| async move {
        if run <= 2 {
            std::future::pending::<()>().await;
        }
        answer(200, "ran")
    });
    for id in ["a", "b"] {
        assert!(timeout(Duration::from_secs(1), app.send(event(id))).await.is_err());
    }
    assert_eq!(code(&app.send(event("c")).await), "overloaded");
    sleep(Duration::from_secs(15 * 60)).await;
    assert_eq!(app.send(event("c")).await.status, 200);
}

#[tokio::test(start_paused = true)]
async fn handlers_that_hang_are_bounded_too() {
    let ledger = ledger().max_in_flight(1).max_overdue(1);
    let app = App::new(&IdempotencyLayer::webhook(&ledger, header("X-Id")), |_, _| std::future::pending());
    for id in ["a", "b"] {
        assert!(timeout(Duration::from_secs(1), app.send(event(id))).await.is_err());
        sleep(Duration::from_secs(15 * 60)).await;
    }
    assert_eq!(code(&app.send(event("c")).await), "overloaded");
    assert_eq!(ledger.drain(Duration::from_secs(1)).await.unwrap_err().attempts, 2);
}

#[tokio::test(start_paused = true)]
async fn an_overdue_attempt_whose_key_is_gone_is_recorded() {
    let second = Duration::from_secs(1);
    let layer = webhook().lease(second).retention(second).max_attempt(second * 3);
    let app = App::new(&layer, move |_, run| async move {
        sleep(second * 20).await;
        answer(200, format!("run {run}"))
    });
    let first = app.send(event("e")).await;
    assert_eq!((first.status.as_u16(), first.is_stored()), (200, true));
    assert!(app.send(event("e")).await.is_replayed());
}

#[tokio::test(start_paused = true)]
async fn an_overdue_attempt_is_told_that_it_lost() {
    let second = Duration::from_secs(1);
    let layer = webhook().lease(second).max_attempt(second * 3).patience(second * 60);
    let app = App::new(&layer, |request: Incoming, run| async move {
        if run == 1 {
            request.extensions().get::<Attempt>().unwrap().lost().await;
            return answer(500, "stopped");
        }
        answer(200, "ran")
    });
    let overdue = tokio::spawn(app.send(event("e")));
    sleep(second).await;
    assert_eq!(app.send(event("e")).await.body, "ran");
    assert_eq!(timeout(second * 10, overdue).await.unwrap().unwrap().body, "stopped");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_handler_that_blocks_its_thread_keeps_its_lease() {
    let lease = Duration::from_millis(300);
    let stores = Stores::memory();
    let layer = || IdempotencyLayer::webhook(&stores.ledger(), header("X-Id")).lease(lease).patience(Duration::ZERO);
    let blocks = App::new(&layer(), move |_, run| async move {
        tokio::task::block_in_place(|| std::thread::sleep(lease * 4));
        answer(200, format!("run {run}"))
    });
    let blocking = tokio::spawn(blocks.send(event("e")));
    sleep(lease * 3).await;
    assert_eq!(code(&app(&layer(), 200).send(event("e")).await), "running");
    assert_eq!(blocking.await.unwrap().body, "run 1");
}

#[tokio::test(start_paused = true)]
async fn an_attempt_about_to_start_is_waited_for() {
    let stores = Stores::memory();
    let ledger = stores.ledger();
    let app = App::new(&IdempotencyLayer::webhook(&ledger, header("X-Id")), |_, _| async {
        sleep(Duration::from_secs(5)).await;
        answer(200, "ran")
    });
    stores.fail(Step::Claim, Fault::Hang, 1);
    let starting = tokio::spawn(app.send(event("e")));
    sleep(Duration::from_millis(50)).await;
    ledger.drain(Duration::from_secs(60)).await.unwrap();
    assert_eq!(app.runs(), 1);
    assert_eq!(starting.await.unwrap().body, "ran");
}

#[tokio::test(start_paused = true)]
async fn an_attempt_that_failed_is_remembered_past_what_had_no_effect() {
    for forged in [false, true] {
        let stores = Stores::memory();
        let layer = IdempotencyLayer::webhook(&stores.ledger(), header("X-Id"));
        let app = App::new(&layer, move |request: Incoming, run| async move {
            let retry = request.extensions().get::<Attempt>().unwrap().is_retry();
            match run {
                1 => answer(500, "failed, perhaps after its effect"),
                2 if forged => answer(401, "not the sender"),
                _ => answer(200, retry.to_string()),
            }
        });
        app.send(event("e")).await;
        sleep(Duration::from_secs(60)).await;
        if !forged {
            stores.fail(Step::Claim, Fault::LoseAnswer, 3);
        }
        app.send(event("e")).await;
        sleep(Duration::from_secs(60)).await;
        assert_eq!(app.send(event("e")).await.body, "true", "forged: {forged}");
    }
}

// Readiness and the store.

#[tokio::test(start_paused = true)]
async fn duplicates_hold_nothing_of_what_the_inner_service_is_short_of() {
    let gate = Arc::new(Notify::new());
    let opened = Arc::clone(&gate);
    let handler = service_fn(move |_: Incoming| {
        let opened = Arc::clone(&opened);
        async move {
            opened.notified().await;
            Ok::<_, Infallible>(Response::new(body("ran")))
        }
    });
    let limited = tower::limit::ConcurrencyLimitLayer::new(1).layer(handler);
    let app = webhook().layer(limited);
    let send = |id: &str| tokio::spawn(app.clone().oneshot(event(id)));
    let done = send("done");
    sleep(Duration::from_millis(1)).await;
    gate.notify_one();
    assert_eq!(done.await.unwrap().unwrap().status(), 200);

    let running = send("a");
    sleep(Duration::from_millis(1)).await;
    let started = Instant::now();
    assert!(send("done").await.unwrap().unwrap().headers().contains_key("idempotent-replayed"));
    assert_eq!(started.elapsed(), Duration::ZERO);
    let not_ready = send("b").await.unwrap().unwrap();
    assert_eq!(started.elapsed(), Duration::from_secs(5));
    assert_eq!(not_ready.status(), StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(not_ready.extensions().get(), Some(&Rejection::InnerNotReady));
    gate.notify_one();
    running.await.unwrap().unwrap();
    let again = send("b");
    sleep(Duration::from_millis(1)).await;
    gate.notify_one();
    assert_eq!(again.await.unwrap().unwrap().status(), 200);
}

#[tokio::test(start_paused = true)]
async fn a_store_that_does_not_answer_refuses_or_is_bypassed() {
    let stores = Stores::memory();
    let layer = IdempotencyLayer::webhook(&stores.ledger(), header("X-Id"));
    let (strict, lenient) = (app(&layer, 200), app(&layer.on_store_error(OnStoreError::Bypass), 200));
    stores.fail(Step::Claim, Fault::LoseRequest, u32::MAX);
    let refused = strict.send(event("e")).await;
    assert_eq!((refused.status.as_u16(), code(&refused).as_str()), (503, "store_unavailable"));
    assert_eq!(refused.headers["retry-after"], "1");
    for run in ["run 1", "run 2"] {
        assert_eq!(lenient.send(event("e")).await.body, run);
    }
    assert_eq!(strict.runs(), 0);
}

#[tokio::test(start_paused = true)]
async fn an_event_that_is_known_but_unreadable_is_never_run() {
    let stores = Stores::memory();
    let layer = IdempotencyLayer::webhook(&stores.ledger(), header("X-Id")).on_store_error(OnStoreError::Bypass);
    let app = App::new(&layer, |request: Incoming, _| async move {
        answer(400, request.extensions().get::<Attempt>().unwrap().key().to_string())
    });
    let key = app.send(event("e")).await.body;
    let key = std::str::from_utf8(&key).unwrap().parse().unwrap();
    let claim = Claim::new(Duration::from_secs(60), Duration::from_secs(60));
    stores.store().claim(&key, &claim).await.unwrap();
    stores.store().complete(&key, &claim, Bytes::from_static(b"\x02 of a version to come")).await.unwrap();
    assert_eq!(code(&app.send(event("e")).await), "store_unavailable");
    assert_eq!(app.runs(), 1);
}

#[tokio::test(start_paused = true)]
async fn those_who_wait_are_refused_together_when_the_store_goes_down() {
    let stores = Stores::memory();
    let app = app(&IdempotencyLayer::webhook(&stores.ledger(), header("X-Id")), 200);
    stores.fail(Step::Claim, Fault::Hang, u32::MAX);
    let started = Instant::now();
    let refused = futures_util::future::join_all((0..50).map(|_| app.send(event("e")))).await;
    assert!(refused.iter().all(|answer| answer.status == 503));
    assert!(started.elapsed() < Duration::from_millis(500), "{:?}", started.elapsed());
}

#[tokio::test(start_paused = true)]
async fn a_client_that_waits_leaves_its_place() {
    let ledger = ledger().max_waiting(1);
    let app = App::new(&IdempotencyLayer::webhook(&ledger, header("X-Id")), |_, run| async move {
        sleep(Duration::from_secs(1)).await;
        answer(200, format!("run {run}"))
    });
    let running = tokio::spawn(app.send(event("e")));
    sleep(Duration::from_millis(1)).await;
    for _ in 0..10 {
        let waiting = tokio::spawn(app.send(event("e")));
        sleep(Duration::from_millis(1)).await;
        waiting.abort();
        let _ = waiting.await;
    }
    assert_eq!(app.send(event("e")).await.body, "run 1");
    assert_eq!(running.await.unwrap().body, "run 1");
}

#[tokio::test(start_paused = true)]
async fn a_full_house_sends_nobody_away_who_waits_for_another_process() {
    let stores = Stores::memory();
    let (elsewhere, finish) = gated(&IdempotencyLayer::webhook(&stores.ledger(), header("X-Id")));
    let first = deliver(&elsewhere, event("e"));
    until(async || elsewhere.runs() == 1).await;
    let ledger = stores.ledger().max_in_flight(1);
    let (app, leave) = gated(&IdempotencyLayer::webhook(&ledger, header("X-Id")).patience(Duration::from_secs(20)));
    let waiting: Vec<_> = (0..10).map(|_| deliver(&app, event("e"))).collect();
    until(async || ledger.waiting() == 10).await;
    let full = deliver(&app, event("other"));
    sleep(Duration::from_secs(2)).await;
    assert_eq!((ledger.in_flight(), ledger.waiting()), (1, 10));
    let looks = stores.calls(Step::Lookup);
    assert!((4..=40).contains(&looks), "{looks} looks in 2 s");
    assert_eq!(code(&app.send(event("new")).await), "overloaded");
    finish.add_permits(1);
    for answer in waiting {
        assert!(answer.await.unwrap().is_replayed());
    }
    leave.add_permits(1);
    assert_eq!((first.await.unwrap().status, full.await.unwrap().status), (StatusCode::OK, StatusCode::OK));
}

#[tokio::test(start_paused = true)]
async fn a_full_house_with_a_silent_store_is_bypassed_together() {
    let stores = Stores::memory();
    stores.fail(Step::Lookup, Fault::Hang, u32::MAX);
    let ledger = stores.ledger().max_in_flight(0);
    let layer = IdempotencyLayer::webhook(&ledger, header("X-Id")).on_store_error(OnStoreError::Bypass);
    let app = app(&layer, 200);
    let deliveries: Vec<_> = (0..3).map(|_| deliver(&app, event("e"))).collect();
    for answer in deliveries {
        assert_eq!(answer.await.unwrap().status, 200);
    }
    assert_eq!(app.runs(), 3);
    // What is being drained starts nothing.
    ledger.drain(Duration::ZERO).await.unwrap();
    let deliveries: Vec<_> = (0..3).map(|_| deliver(&app, event("e"))).collect();
    for answer in deliveries {
        assert_eq!(answer.await.unwrap().status, 503);
    }
    assert_eq!(app.runs(), 3);
}

#[tokio::test(start_paused = true)]
async fn a_full_house_with_a_silent_store_is_refused_together() {
    let stores = Stores::memory();
    stores.fail(Step::Lookup, Fault::Hang, u32::MAX);
    let ledger = stores.ledger().max_in_flight(0);
    let app = app(&IdempotencyLayer::webhook(&ledger, header("X-Id")), 200);
    let before = Instant::now();
    let deliveries: Vec<_> = (0..20).map(|_| deliver(&app, event("e"))).collect();
    for answer in deliveries {
        assert_eq!(code(&answer.await.unwrap()), "store_unavailable");
    }
    assert!(before.elapsed() < Duration::from_millis(300), "{:?}", before.elapsed());
    assert_eq!(stores.calls(Step::Lookup), 1);
}
