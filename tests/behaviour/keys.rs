//! A: keys in headers, and which requests have one.

use bytes::Bytes;
use futures_util::{StreamExt as _, stream};
use http::{HeaderName, HeaderValue, Method, Request};
use http_body::Frame;
use http_body_util::{BodyExt as _, StreamBody};
use tower_idempotency::key::{HeaderSyntax, header, json};
use tower_idempotency::{Attempt, IdempotencyLayer, Ledger, MemoryStore, OnBadKey, caller};

use crate::common::app::{Answer, App, Body, Incoming, answer, body, counting};
use crate::common::stores::{Step, Stores};

fn api() -> IdempotencyLayer {
    api_on(&Ledger::new(MemoryStore::new()))
}

fn api_on(ledger: &Ledger) -> IdempotencyLayer {
    IdempotencyLayer::api(ledger, caller::shared())
}

fn webhook() -> IdempotencyLayer {
    webhook_on(&Ledger::new(MemoryStore::new()))
}

fn webhook_on(ledger: &Ledger) -> IdempotencyLayer {
    IdempotencyLayer::webhook(ledger, header("X-Id"))
}

/// A request with these header lines.
fn with(method: Method, lines: &[(&'static str, &[u8])]) -> Request<Body> {
    let mut request = Request::new(body("1"));
    *request.method_mut() = method;
    for (name, value) in lines {
        request.headers_mut().append(HeaderName::from_static(name), HeaderValue::from_bytes(value).unwrap());
    }
    request
}

fn post(lines: &[(&'static str, &[u8])]) -> Request<Body> {
    with(Method::POST, lines)
}

fn keyed(key: impl AsRef<[u8]>) -> Request<Body> {
    post(&[("idempotency-key", key.as_ref())])
}

fn identified(id: impl AsRef<[u8]>) -> Request<Body> {
    post(&[("x-id", id.as_ref())])
}

fn refusal(answer: &Answer) -> (u16, String) {
    (answer.status.as_u16(), answer.code().unwrap_or_default())
}

fn malformed() -> (u16, String) {
    (400, "key_malformed".to_owned())
}

fn missing() -> (u16, String) {
    (400, "key_missing".to_owned())
}

#[tokio::test(start_paused = true)]
async fn a01_a_request_without_a_key_passes_through_unbuffered_each_time() {
    let stores = Stores::memory();
    for layer in [webhook_on(&stores.ledger()), api_on(&stores.ledger())] {
        let app = App::new(&layer, |request: Incoming, _| async move {
            assert!(request.extensions().get::<Attempt>().is_none());
            // Its body never ends: whoever buffers it waits for ever.
            assert!(request.into_body().frame().await.is_some());
            answer(201, "ran")
        });
        for _ in 0..2 {
            let endless = stream::iter([Ok(Frame::data(Bytes::from_static(b"first")))]).chain(stream::pending());
            let request = Request::post("/").body(StreamBody::new(endless).boxed_unsync()).unwrap();
            let passed = app.send(request).await;
            assert_eq!((passed.status.as_u16(), &passed.body[..]), (201, &b"ran"[..]));
            assert!(!passed.headers.contains_key("idempotent-replayed"));
        }
        assert_eq!(app.runs(), 2);
    }
    assert_eq!(stores.calls(Step::Claim), 0);
}

#[tokio::test(start_paused = true)]
async fn a02_a_required_key_that_is_missing_is_refused_with_a_problem() {
    let stores = Stores::memory();
    for layer in [webhook_on(&stores.ledger()), api_on(&stores.ledger())] {
        let app = counting(&layer.require_key().policy_url("https://example.com/retries"), 201);
        let refused = app.send(post(&[])).await;
        assert_eq!(refusal(&refused), missing());
        assert_eq!(refused.headers["content-type"], "application/problem+json");
        assert_eq!(refused.headers["link"], "<https://example.com/retries>; rel=\"describedby\"");
        let problem: serde_json::Value = serde_json::from_slice(&refused.body).unwrap();
        assert_eq!(problem["title"], "the idempotency key is missing");
        assert_eq!(problem["type"], "https://example.com/retries#key_missing");
        assert_eq!(app.runs(), 0);
    }
    assert_eq!(stores.calls(Step::Claim), 0);
}

#[tokio::test(start_paused = true)]
async fn a04_a_required_key_is_not_required_of_what_is_not_protected() {
    let app = counting(&api().require_key(), 201);
    for method in [Method::GET, Method::HEAD, Method::OPTIONS] {
        assert_eq!(app.send(with(method, &[])).await.status, 201);
    }
    assert_eq!(app.runs(), 3);
    // A webhook may come by GET.
    let hook = counting(&webhook().require_key(), 200);
    for (method, status) in [(Method::GET, 400), (Method::HEAD, 200), (Method::OPTIONS, 200)] {
        assert_eq!(hook.send(with(method, &[])).await.status, status);
    }
}

#[tokio::test(start_paused = true)]
async fn a06_an_empty_key_is_malformed_and_not_missing() {
    for layer in [api(), api().require_key()] {
        let app = counting(&layer, 201);
        assert_eq!(refusal(&app.send(keyed("")).await), malformed());
        assert_eq!(app.runs(), 0);
    }
    // A sender of webhooks cannot correct itself, and its event may have an id elsewhere.
    let hook = counting(&webhook().require_key(), 200);
    assert_eq!(refusal(&hook.send(identified("")).await), missing());
    let fallback = counting(&webhook().key(header("X-Id").or(json("$"))), 200);
    fallback.send(identified("")).await;
    assert!(fallback.send(identified("")).await.is_replayed());
}

#[tokio::test(start_paused = true)]
async fn a07_a_key_of_two_quotes_is_empty_too() {
    let app = counting(&api(), 201);
    assert_eq!(refusal(&app.send(keyed(r#""""#)).await), malformed());
    assert_eq!(app.runs(), 0);
    let opaque = counting(&webhook(), 200);
    opaque.send(identified(r#""""#)).await;
    assert!(opaque.send(identified(r#""""#)).await.is_replayed(), "whatever a webhook's sender means by it");
}

#[tokio::test(start_paused = true)]
async fn a08_a_key_is_the_same_quoted_and_bare() {
    for (quoted, bare) in [(r#""abc""#, "abc"), (r#""a\"b\\c""#, r#"a"b\c"#)] {
        let app = counting(&api(), 201);
        app.send(keyed(quoted)).await;
        assert!(app.send(keyed(bare)).await.is_replayed());
        assert!(app.send(keyed(quoted)).await.is_replayed());
        assert_eq!(app.runs(), 1);
        let opaque = counting(&webhook(), 200);
        opaque.send(identified(quoted)).await;
        assert!(!opaque.send(identified(bare)).await.is_replayed(), "a webhook's key is opaque");
    }
    for stray in [r#""abc"#, r#""a"b""#, r#""a\b""#, r#""a" "b""#] {
        assert_eq!(refusal(&counting(&api(), 201).send(keyed(stray)).await), malformed(), "{stray}");
    }
}

#[tokio::test(start_paused = true)]
async fn a10_to_the_letter_a_key_is_a_quoted_string_and_its_parameters_say_nothing() {
    let app = counting(&api().header_syntax(HeaderSyntax::StructuredString { max_len: 255 }), 201);
    assert_eq!(app.send(keyed(r#""abc";p=1"#)).await.body, "run 1");
    assert!(app.send(keyed(r#""abc""#)).await.is_replayed());
    for key in ["abc", "\"\"", "\"abc", "\"a\", \"b\"", "8e03978e-40d5-43dd-bc93-6894a57f9324"] {
        assert_eq!(refusal(&app.send(keyed(key)).await), malformed(), "{key}");
    }
    assert_eq!(app.runs(), 1);
}

#[tokio::test(start_paused = true)]
async fn a12_a_key_has_a_longest_length() {
    let app = counting(&api(), 201);
    for longest in ["k".repeat(255), format!("\"{}\"", "l".repeat(255))] {
        assert_eq!(app.send(keyed(longest)).await.status, 201);
    }
    for longer in ["k".repeat(256), format!("\"{}\"", "k".repeat(256))] {
        assert_eq!(refusal(&app.send(keyed(longer)).await), malformed());
    }
    assert_eq!(app.runs(), 2);

    let hook = counting(&webhook(), 200);
    for replayed in [false, true] {
        assert_eq!(hook.send(identified("k".repeat(1024))).await.is_replayed(), replayed);
        assert!(!hook.send(identified("k".repeat(1025))).await.is_replayed(), "it passes through");
    }
}

#[tokio::test(start_paused = true)]
async fn a13_the_length_counts_bytes() {
    let visible = counting(&api().header_syntax(HeaderSyntax::Visible { max_len: 10 }), 201);
    assert_eq!(visible.send(keyed("0123456789")).await.status, 201);
    assert_eq!(refusal(&visible.send(keyed("0123456789a")).await), malformed());
    let opaque = webhook().header_syntax(HeaderSyntax::Opaque { max_len: 10 }).malformed_key(OnBadKey::Refuse);
    let opaque = counting(&opaque, 200);
    assert_eq!(opaque.send(identified("漢字漢")).await.status, 200);
    assert_eq!(refusal(&opaque.send(identified("漢字漢字")).await), malformed());
}

#[tokio::test(start_paused = true)]
async fn a14_an_apis_header_key_is_visible_ascii_and_others_are_not_bound_to_it() {
    let app = counting(&api(), 201);
    for key in [&b"cl\xc3\xa9"[..], b"\xff", b"a b", b"a\tb", b"\"a b\"", b"\"cl\xc3\xa9\""] {
        assert_eq!(refusal(&app.send(keyed(key)).await), malformed(), "{}", key.escape_ascii());
    }
    assert_eq!(app.runs(), 0);
    let hook = counting(&webhook(), 200);
    for key in [&b"cl\xc3\xa9"[..], b"\xff", b"a b", b"a\tb"] {
        hook.send(identified(key)).await;
        assert!(hook.send(identified(key)).await.is_replayed());
    }
    let of_body = counting(&api().key(json("$.id")), 201);
    for id in [r#"{"id":"ключ"}"#, r#"{"id":"a\tb\u0000"}"#] {
        of_body.send(Request::post("/").body(body(id)).unwrap()).await;
        assert!(of_body.send(Request::post("/").body(body(id)).unwrap()).await.is_replayed());
    }
}

#[tokio::test(start_paused = true)]
async fn a16_two_lines_with_one_value_are_one_key_and_with_two_they_are_none() {
    let same = |name| post(&[(name, b"a"), (name, b"a")]);
    let different = |name| post(&[(name, b"a"), (name, b"b")]);
    let app = counting(&api(), 201);
    assert_eq!(app.send(same("idempotency-key")).await.status, 201);
    assert!(app.send(keyed("a")).await.is_replayed());
    assert_eq!(refusal(&app.send(different("idempotency-key")).await), malformed());
    assert_eq!(app.runs(), 1);

    let hook = counting(&webhook(), 200);
    hook.send(same("x-id")).await;
    assert!(hook.send(identified("a")).await.is_replayed());
    for _ in 0..2 {
        assert!(!hook.send(different("x-id")).await.is_replayed());
    }
    assert_eq!(hook.runs(), 3);
    let strict = counting(&webhook().malformed_key(OnBadKey::Refuse), 200);
    assert_eq!(refusal(&strict.send(different("x-id")).await), malformed());
}

#[tokio::test(start_paused = true)]
async fn a17_a_comma_makes_a_list_unless_it_is_quoted() {
    let app = counting(&api(), 201);
    for list in ["a,b", "a, a", ",a", "a,", r#""a", "b""#] {
        assert_eq!(refusal(&app.send(keyed(list)).await), malformed(), "{list}");
    }
    assert_eq!(app.runs(), 0);
    assert_eq!(app.send(keyed(r#""a,b""#)).await.status, 201);
    assert!(app.send(keyed(r#""a,b""#)).await.is_replayed());
    let opaque = counting(&webhook(), 200);
    opaque.send(identified("a,b")).await;
    assert!(opaque.send(identified("a,b")).await.is_replayed());
    assert!(!opaque.send(identified("a")).await.is_replayed());
}

#[tokio::test(start_paused = true)]
async fn a18_a_key_that_has_to_be_a_uuid_is_malformed_where_it_is_none() {
    fn is_uuid(key: &[u8]) -> bool {
        let is_hyphen = |at: usize| matches!(at, 8 | 13 | 18 | 23);
        let fits = |(at, byte): (usize, &u8)| if is_hyphen(at) { *byte == b'-' } else { byte.is_ascii_hexdigit() };
        key.len() == 36 && key.iter().enumerate().all(fits)
    }
    let (uuid, none) = ("0af9ee4c-4c14-4e0c-9a5e-3f9d6a3b7c10", "0af9ee4c-4c14-4e0c-9a5e-3f9d6a3b7c1x");
    let app = counting(&api().key(header("Idempotency-Key").valid_if(is_uuid)), 201);
    assert_eq!(refusal(&app.send(keyed(none)).await), malformed());
    assert_eq!(app.runs(), 0);
    app.send(keyed(uuid)).await;
    assert!(app.send(keyed(format!("\"{uuid}\""))).await.is_replayed(), "it is asked of what is inside the quotes");
    let hook = counting(&webhook().key(header("X-Id").valid_if(is_uuid)), 200);
    for _ in 0..2 {
        assert!(!hook.send(identified(none)).await.is_replayed());
    }
}

#[tokio::test(start_paused = true)]
async fn a19_a_key_may_have_a_shortest_length() {
    let app = counting(&api().key(header("Idempotency-Key").valid_if(|key| key.len() >= 20)), 201);
    assert_eq!(refusal(&app.send(keyed("abc")).await), malformed());
    assert_eq!(app.send(keyed("k".repeat(20))).await.status, 201);
    assert_eq!(app.runs(), 1);
}

#[tokio::test(start_paused = true)]
async fn a21_the_two_names_of_the_header_have_to_agree() {
    let both = |one: &[u8], other: &[u8]| post(&[("idempotency-key", one), ("x-idempotency-key", other)]);
    let app = counting(&api(), 201);
    assert_eq!(refusal(&app.send(both(b"a", b"b")).await), malformed());
    assert_eq!(refusal(&app.send(both(b"a", b"")).await), malformed());
    assert_eq!(app.runs(), 0);
    app.send(both(b"a", b"\"a\"")).await;
    assert!(app.send(keyed("a")).await.is_replayed());
    assert!(app.send(post(&[("x-idempotency-key", b"a")])).await.is_replayed());
}

#[tokio::test(start_paused = true)]
async fn a23_of_headers_with_a_fallback_the_first_that_is_there_counts() {
    let app = counting(&webhook().key(header("X-A").or(header("X-B"))), 200);
    assert_eq!(app.send(post(&[("x-b", b"b")])).await.body, "run 1");
    assert_eq!(app.send(post(&[("x-a", b"a"), ("x-b", b"b")])).await.body, "run 2");
    assert_eq!(app.send(post(&[("x-a", b"a")])).await.body, "run 2");
    assert_eq!(app.send(post(&[("x-a", b""), ("x-b", b"b")])).await.body, "run 1");
}

#[tokio::test(start_paused = true)]
async fn a25_methods_are_chosen() {
    let app = counting(&api().methods([Method::PUT]), 200);
    for (method, run) in
        [(Method::PUT, "run 1"), (Method::PUT, "run 1"), (Method::POST, "run 2"), (Method::POST, "run 3")]
    {
        assert_eq!(app.send(with(method, &[("idempotency-key", b"k")])).await.body, run);
    }
}

#[tokio::test(start_paused = true)]
async fn a27_a_query_by_its_own_method_is_safe() {
    let query = || with(Method::from_bytes(b"QUERY").unwrap(), &[("idempotency-key", b"k"), ("x-id", b"k")]);
    let app = counting(&api(), 200);
    let hook = counting(&webhook(), 200);
    for _ in 0..2 {
        app.send(query()).await;
        hook.send(query()).await;
    }
    assert_eq!((app.runs(), hook.runs()), (2, 1), "a webhook is one by whatever method it comes");
}

#[tokio::test(start_paused = true)]
async fn a29_upgrades_and_tunnels_are_left_alone() {
    for layer in [webhook().require_key(), api().require_key()] {
        let app = App::new(&layer, |request: Incoming, _| async move {
            assert!(request.extensions().get::<Attempt>().is_none());
            let mut response = answer(101, "")?;
            response.headers_mut().insert("upgrade", HeaderValue::from_static("websocket"));
            Ok(response)
        });
        let upgrade = |key: &'static [u8]| {
            let offer = [("connection", &b"Upgrade"[..]), ("upgrade", b"websocket")];
            [Method::GET, Method::POST]
                .map(|method| with(method, &[&offer[..], &[("idempotency-key", key), ("x-id", key)]].concat()))
        };
        for request in upgrade(b"k").into_iter().chain(upgrade(b"k")).chain(upgrade(b"")) {
            let switched = app.send(request).await;
            assert_eq!((switched.status.as_u16(), switched.headers["upgrade"].as_bytes()), (101, &b"websocket"[..]));
        }
        for key in [&b"k"[..], b"k", b""] {
            app.send(with(Method::CONNECT, &[("idempotency-key", key), ("x-id", key)])).await;
        }
        assert_eq!(app.runs(), 9);
    }
}
