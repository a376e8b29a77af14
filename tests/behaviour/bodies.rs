//! E: bodies that are too large, cut short, streamed, or followed by trailers.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures_util::{StreamExt as _, stream};
use http::{HeaderMap, HeaderName, HeaderValue, Request, Response};
use http_body::Frame;
use http_body_util::{BodyExt as _, StreamBody};
use tokio::time::Instant;
use tower_idempotency::key::{header, json};
use tower_idempotency::{IdempotencyLayer, Ledger, MemoryStore, OverLimit, caller};

use crate::common::app::{Answer, App, Body, Incoming, answer, attempt, body, chunk, counting, echoing, frames};
use crate::common::stores::{Step, Stores};

on_every_store! {
    e10_a_body_that_breaks_off_or_stalls_claims_nothing
    e11_a_response_too_large_to_be_kept_is_told_whole_once_and_leaves_a_tombstone
}

const MIB: usize = 1 << 20;

/// The two contracts, whose requests are those of `post`.
fn contracts(ledger: &Ledger) -> [IdempotencyLayer; 2] {
    [IdempotencyLayer::webhook(ledger, header("X-Id")), IdempotencyLayer::api(ledger, caller::shared())]
}

fn in_memory() -> [IdempotencyLayer; 2] {
    contracts(&Ledger::new(MemoryStore::new()))
}

fn post(key: &str, body: Body) -> Request<Body> {
    Request::post("/").header("x-id", key).header("idempotency-key", key).body(body).unwrap()
}

fn refusal(answer: &Answer) -> (u16, String) {
    (answer.status.as_u16(), answer.code().unwrap_or_default())
}

fn too_large() -> (u16, String) {
    (413, "body_too_large".to_owned())
}

/// What a duplicate under either contract is told of an outcome whose body was not kept.
fn is_of_a_tombstone(answer: &Answer) -> bool {
    let is_acknowledged = answer.status == 200 && answer.is_replayed() && answer.body.is_empty();
    is_acknowledged || refusal(answer) == (409, "outcome_not_retained".to_owned())
}

#[tokio::test(start_paused = true)]
async fn e01_a_body_over_the_limit_is_refused_and_claims_nothing() {
    let stores = Stores::memory();
    for layer in contracts(&stores.ledger()) {
        let app = counting(&layer.clone().max_request_body(MIB), 201);
        assert_eq!(refusal(&app.send(post("k", body(vec![0; 2 * MIB]))).await), too_large());
        assert_eq!((app.runs(), stores.calls(Step::Claim)), (0, 0));
        let limits = counting(&layer, 201);
        assert_eq!(refusal(&limits.send(post("k", body(vec![0; 2 * MIB + 1]))).await), too_large(), "by default");
    }
    for layer in contracts(&stores.ledger()) {
        assert_eq!(counting(&layer, 201).send(post("k", body(vec![0; 2 * MIB]))).await.body, "run 1");
    }
}

#[tokio::test(start_paused = true)]
async fn e01_a_body_over_the_limit_runs_unprotected_by_choice() {
    let stores = Stores::memory();
    for layer in contracts(&stores.ledger()) {
        let app = echoing(&layer.max_request_body(4).over_limit(OverLimit::PassThrough));
        for _ in 0..2 {
            let large = post("k", frames(vec![chunk("abc"), chunk("def"), chunk("ghi")]));
            assert_eq!(app.send(large).await.body, "abcdefghi");
        }
        assert_eq!((app.runs(), stores.calls(Step::Claim)), (2, 0));
    }
}

fn kib() -> io::Result<Frame<Bytes>> {
    Ok(Frame::data(Bytes::from(vec![b'x'; 1024])))
}

/// A body of as many frames of 1 KiB as are asked for, which counts them.
fn endless(read: &Arc<AtomicUsize>) -> Body {
    let read = Arc::clone(read);
    let frames = stream::repeat_with(move || {
        read.fetch_add(1, Ordering::SeqCst);
        kib()
    });
    StreamBody::new(frames).boxed_unsync()
}

#[tokio::test(start_paused = true)]
async fn e02_a_body_of_unknown_length_is_counted_and_not_read_for_ever() {
    for layer in in_memory() {
        let app = echoing(&layer.max_request_body(4096));
        let within = frames((0..4).map(|_| kib()).collect());
        assert_eq!(app.send(post("within", within)).await.body.len(), 4096);
        let (read, started) = (Arc::new(AtomicUsize::new(0)), Instant::now());
        assert_eq!(refusal(&app.send(post("k", endless(&read))).await), too_large());
        // The body, and four more, so that most clients get to read the answer.
        assert!(read.load(Ordering::SeqCst) <= 5 * 4 + 2, "{read:?} frames were read");
        assert_eq!(started.elapsed(), Duration::ZERO);
        let stalls = stream::iter((0..5).map(|_| kib())).chain(stream::pending());
        assert_eq!(refusal(&app.send(post("k", StreamBody::new(stalls).boxed_unsync())).await), too_large());
        assert_eq!(started.elapsed(), Duration::from_secs(1), "it is given a second to end");
        assert_eq!(app.send(post("k", body("within"))).await.body, "within", "nothing was claimed");
    }
}

#[tokio::test(start_paused = true)]
async fn e04_a_limit_of_nothing_lets_empty_bodies_pass() {
    for layer in in_memory() {
        let app = counting(&layer.max_request_body(0), 201);
        assert_eq!(app.send(post("a", body(""))).await.status, 201);
        assert_eq!(refusal(&app.send(post("b", body("x"))).await), too_large());
        assert_eq!(app.runs(), 1);
    }
}

#[tokio::test(start_paused = true)]
async fn e06_a_content_length_that_is_no_length_is_not_believed() {
    for layer in in_memory() {
        let app = echoing(&layer.max_request_body(4));
        for (key, length) in ["-1", "abc", "", "1", "99999999999999999999999"].into_iter().enumerate() {
            let claiming = |body| {
                let mut request = post(&key.to_string(), body);
                request.headers_mut().insert("content-length", HeaderValue::from_static(length));
                request
            };
            assert_eq!(refusal(&app.send(claiming(frames(vec![chunk("abc"), chunk("de")]))).await), too_large());
            assert_eq!(app.send(claiming(frames(vec![chunk("ab"), chunk("cd")]))).await.body, "abcd");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn e08_the_handler_reads_the_body_and_its_trailers_as_they_were_sent() {
    for layer in in_memory() {
        let app = App::new(&layer, |request: Incoming, _| async move {
            let seen = request.into_body().collect().await?;
            let sum = seen.trailers().and_then(|trailers| trailers.get("x-sum")).cloned();
            assert_eq!(sum, Some(HeaderValue::from_static("7")));
            let mut response = answer(200, "")?;
            *response.body_mut() = body(seen.to_bytes());
            Ok(response)
        });
        let trailers = HeaderMap::from_iter([(HeaderName::from_static("x-sum"), HeaderValue::from_static("7"))]);
        for replayed in [false, true] {
            let sent = vec![chunk("ab"), chunk(""), chunk("\0c"), Ok(Frame::trailers(trailers.clone()))];
            let told = app.send(post("k", frames(sent))).await;
            assert_eq!((&told.body[..], told.is_replayed()), (&b"ab\0c"[..], replayed));
        }
    }
}

async fn e10_a_body_that_breaks_off_or_stalls_claims_nothing(stores: Stores) {
    for layer in contracts(&stores.ledger()) {
        // The clock of a real server does not stand still.
        let app = App::new(&layer.body_timeout(Duration::from_millis(200)), |request: Incoming, run| async move {
            let number = attempt(&request).number();
            let seen = request.into_body().collect().await?.to_bytes();
            answer(201, format!("run {run}, attempt {number}: {} bytes", seen.len()))
        });
        let calls = stores.calls(Step::Claim);
        let broken = || frames(vec![chunk("half"), Err(io::Error::other("reset"))]);
        let stalled = || StreamBody::new(stream::iter([chunk("half")]).chain(stream::pending())).boxed_unsync();
        assert_eq!(refusal(&app.send(post("k", broken())).await), (400, "body_unreadable".to_owned()));
        assert_eq!(refusal(&app.send(post("k", stalled())).await), (408, "body_timeout".to_owned()));
        assert_eq!((app.runs(), stores.calls(Step::Claim)), (0, calls));
        assert_eq!(app.send(post("k", body("whole"))).await.body, "run 1, attempt 1: 5 bytes");
    }
}

#[tokio::test(start_paused = true)]
async fn e10_a_body_may_take_its_time_and_no_more() {
    for layer in in_memory() {
        let slow = |pause: u64| {
            let frames = stream::iter(0..10).then(move |_| async move {
                tokio::time::sleep(Duration::from_secs(pause)).await;
                chunk("x")
            });
            StreamBody::new(frames).boxed_unsync()
        };
        let (app, started) = (counting(&layer, 201), Instant::now());
        assert_eq!(app.send(post("k", slow(4))).await.status, 408);
        assert_eq!(started.elapsed(), Duration::from_secs(30));
        assert_eq!(app.send(post("k", slow(2))).await.body, "run 1");
    }
}

async fn e11_a_response_too_large_to_be_kept_is_told_whole_once_and_leaves_a_tombstone(stores: Stores) {
    for layer in contracts(&stores.ledger()) {
        let app = App::new(&layer.max_kept_body(4 * MIB), |_, _| async {
            let large = (0..5).map(|_| Ok(Frame::data(Bytes::from(vec![b'x'; MIB])))).collect();
            let response = Response::builder().header("content-type", "text/csv").header("etag", "\"1\"");
            Ok(response.header("x-a", "1").body(frames(large)).unwrap())
        });
        let first = app.send(post("k", body("1"))).await;
        assert_eq!((first.status.as_u16(), first.body.len(), first.is_stored()), (200, 5 * MIB, false));
        for _ in 0..2 {
            let told = app.send(post("k", body("1"))).await;
            assert!(is_of_a_tombstone(&told), "{told:?}");
            // What would be said of a body that is not there is not said.
            assert!(!told.headers.contains_key("etag"));
            assert_ne!(told.headers.get("content-type"), Some(&HeaderValue::from_static("text/csv")));
            assert_eq!(told.headers.contains_key("x-a"), told.is_replayed());
        }
        assert_eq!(app.runs(), 1);
    }
}

#[tokio::test(start_paused = true)]
async fn e12_a_stream_of_events_is_told_live_and_leaves_a_tombstone_at_its_head() {
    for layer in in_memory() {
        let app = App::new(&layer, |_, _| async {
            let events = stream::iter([chunk("data: 1\n\n")]).chain(stream::pending());
            let response = Response::builder().header("content-type", "Text/Event-Stream; charset=utf-8");
            Ok(response.body(StreamBody::new(events).boxed_unsync()).unwrap())
        });
        let started = Instant::now();
        let response = app.call(post("k", body("1"))).await.unwrap();
        assert_eq!(response.headers()["idempotency-stored"], "false");
        let mut live = response.into_body();
        assert_eq!(live.frame().await.unwrap().unwrap().into_data().unwrap(), "data: 1\n\n");
        assert_eq!(started.elapsed(), Duration::ZERO, "the stream does not end");
        assert!(is_of_a_tombstone(&app.send(post("k", body("1"))).await));
        assert_eq!(app.runs(), 1);
    }
}

/// A response of two frames, the first of them empty, with a pause between.
fn late(layer: &IdempotencyLayer, pause: Duration) -> App {
    App::new(layer, move |_, _| async move {
        let rest = stream::once(async move {
            tokio::time::sleep(pause).await;
            chunk("late")
        });
        Ok(Response::new(StreamBody::new(stream::iter([chunk("")]).chain(rest)).boxed_unsync()))
    })
}

#[tokio::test(start_paused = true)]
async fn e14_an_empty_first_frame_says_nothing_and_the_time_decides_whether_it_is_a_stream() {
    let patience = Duration::from_millis(500);
    for layer in in_memory() {
        let quick = late(&layer, patience - Duration::from_millis(1));
        for replayed in [false, true] {
            let told = quick.send(post("quick", body("1"))).await;
            assert_eq!((&told.body[..], told.is_stored(), told.is_replayed()), (&b"late"[..], true, replayed));
        }
        let slow = late(&layer, patience * 10);
        let started = Instant::now();
        let response = slow.call(post("slow", body("1"))).await.unwrap();
        assert_eq!(
            (started.elapsed(), &response.headers()["idempotency-stored"]),
            (patience, &"false".parse().unwrap())
        );
        assert_eq!(Answer::read(response).await.body, "late");
        assert!(is_of_a_tombstone(&slow.send(post("slow", body("1"))).await));
        assert_eq!((quick.runs(), slow.runs()), (1, 1));
    }
}

#[tokio::test(start_paused = true)]
async fn e15_the_limit_comes_before_the_replay() {
    for layer in in_memory() {
        let app = counting(&layer.max_request_body(1024), 201);
        assert_eq!(app.send(post("k", body("small"))).await.status, 201);
        assert_eq!(refusal(&app.send(post("k", body(vec![0; 2048]))).await), too_large());
        assert!(app.send(post("k", body("small"))).await.is_replayed());
        assert_eq!(app.runs(), 1);
    }
    // Where the key is in the body it could not even be known.
    let [webhook, _] = in_memory();
    let app = counting(&webhook.key(json("$.id")).max_request_body(1024), 200);
    let long = format!(r#"{{"id":"e","text":"{}"}}"#, "x".repeat(2048));
    assert_eq!(refusal(&app.send(Request::post("/").body(body(long)).unwrap()).await), too_large());
    assert_eq!(app.runs(), 0);
}
