//! B: keys in bodies, keys of several parts, and the habits of those who send webhooks.

use http::Request;
use tower_idempotency::fingerprint;
use tower_idempotency::key::{KeySource, header, json};
use tower_idempotency::{IdempotencyLayer, Ledger, MemoryStore, OnBadKey, OnOtherPayload, caller};

use crate::common::app::{Answer, App, Body, body, counting, echoing};
use crate::common::stores::{Step, Stores};

fn webhook(key: impl Into<KeySource>) -> IdempotencyLayer {
    webhook_on(&Ledger::new(MemoryStore::new()), key)
}

fn webhook_on(ledger: &Ledger, key: impl Into<KeySource>) -> IdempotencyLayer {
    IdempotencyLayer::webhook(ledger, key)
}

fn api(key: impl Into<KeySource>) -> IdempotencyLayer {
    IdempotencyLayer::api(&Ledger::new(MemoryStore::new()), caller::shared()).key(key)
}

fn post(text: &'static str) -> Request<Body> {
    Request::post("/hooks").body(body(text)).unwrap()
}

/// How often a handler runs for these bodies, one after the other.
async fn runs(layer: &IdempotencyLayer, bodies: &[&'static str]) -> u32 {
    let app = counting(layer, 200);
    for text in bodies {
        assert_eq!(app.send(post(text)).await.status, 200, "{text}");
    }
    app.runs()
}

async fn code(layer: &IdempotencyLayer, text: &'static str) -> (u16, String) {
    let app = counting(layer, 200);
    let refused: Answer = app.send(post(text)).await;
    assert_eq!(app.runs(), 0, "{text}");
    (refused.status.as_u16(), refused.code().unwrap_or_default())
}

fn malformed() -> (u16, String) {
    (400, "key_malformed".to_owned())
}

fn missing() -> (u16, String) {
    (400, "key_missing".to_owned())
}

fn postmark() -> KeySource {
    json("$.MessageID").and(json("$.Recipient"))
}

#[tokio::test(start_paused = true)]
async fn b02_an_event_without_an_id_is_no_duplicate_of_another_without_one() {
    for text in ["{}", r#"{"id":null}"#, r#"{"id":""}"#, r#"{"other":"id"}"#, "[]", "null", ""] {
        for layer in [webhook(json("$.id")), api(json("$.id"))] {
            assert_eq!(runs(&layer, &[text, text]).await, 2, "{text}");
            assert_eq!(code(&layer.require_key(), text).await, missing());
        }
    }
}

#[tokio::test(start_paused = true)]
async fn b04_one_message_to_two_recipients_is_two_events() {
    let app = counting(&webhook(postmark()), 200);
    let (a, b) = (r#"{"MessageID":"m","Recipient":"a"}"#, r#"{"MessageID":"m","Recipient":"b"}"#);
    for (text, run) in [(a, "run 1"), (b, "run 2"), (a, "run 1"), (b, "run 2")] {
        assert_eq!(app.send(post(text)).await.body, run);
    }
}

#[tokio::test(start_paused = true)]
async fn b06_a_composite_without_one_of_its_parts_is_missing_unless_that_is_optional() {
    let absent =
        [r#"{"MessageID":"m"}"#, r#"{"MessageID":"m","Recipient":""}"#, r#"{"MessageID":"m","Recipient":null}"#];
    for text in absent {
        assert_eq!(runs(&webhook(postmark()), &[text, text]).await, 2, "{text}");
        assert_eq!(code(&webhook(postmark()).require_key(), text).await, missing());
    }
    let optional = json("$.MessageID").and_optional(json("$.Recipient"));
    assert_eq!(runs(&webhook(optional.clone()), &absent).await, 1);
    assert_eq!(runs(&webhook(optional), &[absent[0], r#"{"MessageID":"m","Recipient":"a"}"#]).await, 2);
}

#[tokio::test(start_paused = true)]
async fn b07_the_parts_of_a_composite_do_not_run_into_each_other() {
    let source = json("$.a").and(json("$.b"));
    assert_eq!(runs(&webhook(source), &[r#"{"a":"a","b":"bc"}"#, r#"{"a":"ab","b":"c"}"#]).await, 2);
}

#[tokio::test(start_paused = true)]
async fn b09_a_number_is_no_string_and_both_count_by_their_text() {
    let bodies =
        [r#"{"id":1}"#, r#"{"id":"1"}"#, r#"{"id":1.0}"#, r#"{"id":0}"#, r#"{"id":false}"#, r#"{"id":"false"}"#];
    assert_eq!(runs(&webhook(json("$.id")), &bodies).await, 6);
    for text in bodies {
        assert_eq!(runs(&webhook(json("$.id")), &[text, text]).await, 1, "{text}");
    }
}

#[tokio::test(start_paused = true)]
async fn b11_an_object_is_no_key() {
    for text in [r#"{"id":{"a":1,"b":2}}"#, r#"{"id":{}}"#, r#"{"id":["e"]}"#] {
        assert_eq!(runs(&webhook(json("$.id")), &[text, text]).await, 2, "{text}");
        assert_eq!(code(&webhook(json("$.id")).malformed_key(OnBadKey::Refuse), text).await, malformed());
        assert_eq!(code(&api(json("$.id")), text).await, malformed());
    }
}

#[tokio::test(start_paused = true)]
async fn b13_the_handler_of_a_webhook_decides_what_becomes_of_a_body_that_is_no_json() {
    let stores = Stores::memory();
    let hook = echoing(&webhook_on(&stores.ledger(), json("$.id")));
    for text in ["not json", r#"{"id":"e""#, r#"{"id":"e"} and more"#, "\u{feff}{}"] {
        for _ in 0..2 {
            let told = hook.send(post(text)).await;
            assert_eq!((&told.body[..], told.is_replayed()), (text.as_bytes(), false), "it has the body as it came");
        }
        assert_eq!(code(&api(json("$.id")), text).await, malformed());
    }
    assert_eq!((hook.runs(), stores.calls(Step::Claim)), (8, 0));
}

#[tokio::test(start_paused = true)]
async fn b15_json_is_read_whatever_its_content_type_says() {
    for content_type in ["text/plain", "application/x-www-form-urlencoded", "application/json; charset=utf-8"] {
        let app = counting(&webhook(json("$.id")), 200);
        let send = || {
            let request = Request::post("/hooks").header("content-type", content_type);
            app.send(request.body(body(r#"{"id":"e1"}"#)).unwrap())
        };
        send().await;
        assert!(send().await.is_replayed(), "{content_type}");
        assert_eq!(app.runs(), 1);
    }
}

/// The Standard Webhooks specification: a retry has the id of the first delivery, another timestamp and another signature.
#[tokio::test(start_paused = true)]
async fn b16_what_is_signed_anew_for_each_delivery_is_no_part_of_the_payload() {
    let strict = webhook(header("webhook-id")).fingerprint(fingerprint::whole()).other_payload(OnOtherPayload::Refuse);
    for layer in [webhook(header("webhook-id")), strict] {
        let app = counting(&layer, 200);
        let deliver = |timestamp: &str, signature: &str| {
            let request = Request::post("/hooks").header("webhook-id", "msg_1");
            let request = request.header("webhook-timestamp", timestamp).header("webhook-signature", signature);
            app.send(request.body(body("event")).unwrap())
        };
        deliver("1700000000", "v1,YQ==").await;
        let again = deliver("1700000300", "v1,Yg==").await;
        assert_eq!((again.status.as_u16(), again.is_replayed(), app.runs()), (200, true, 1));
    }
}

#[tokio::test(start_paused = true)]
async fn b18_a_delivery_that_counts_its_attempts_is_a_duplicate_all_the_same() {
    let (first, second) = (r#"{"id":"e","attempt":1}"#, r#"{"id":"e","attempt":2}"#);
    let deliver = async |app: &App| {
        app.send(post(first)).await;
        app.send(post(second)).await
    };
    let hook = counting(&webhook(json("$.id")), 200);
    let told = deliver(&hook).await;
    assert_eq!((told.status.as_u16(), told.is_replayed(), hook.runs()), (200, true, 1));
    let app = counting(&api(json("$.id")), 201);
    assert_eq!((deliver(&app).await.status.as_u16(), app.runs()), (422, 1), "a client of an api is told");
}

#[tokio::test(start_paused = true)]
async fn b19_a_body_with_two_ids_has_none() {
    for text in [r#"{"id":1,"id":2}"#, r#"{"id":2,"id":1}"#, r#"{"id":1,"id":1}"#, r#"{"id":1,"\u0069d":2}"#] {
        assert_eq!(code(&api(json("$.id")), text).await, malformed());
        let hook = counting(&webhook(json("$.id")), 200);
        for text in [text, r#"{"id":1}"#, r#"{"id":2}"#, text] {
            assert!(!hook.send(post(text)).await.is_replayed(), "{text}");
        }
    }
}
