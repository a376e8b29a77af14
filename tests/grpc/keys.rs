//! Keys in metadata and in messages, and how long a duplicate waits for its own sake.

use std::time::Duration;

use http::{Request, Response};
use tokio::time::Instant;
use tonic::Code;
use tonic::codec::CompressionEncoding::Gzip;
use tonic::metadata::MetadataValue;
use tower_idempotency::key::KeySource;
use tower_idempotency::{OverLimit, key};

use crate::bank::{CHARGE, Served, api, charge, ledger, webhook};
use crate::common::app::{self, App, Incoming, answer};

/// How often it runs, called once with each of these ids.
async fn runs(source: impl Into<KeySource>, compressed: bool, ids: &[&str]) -> u32 {
    let served = Served::by(webhook(&ledger()).key(source)).await;
    let mut client = served.client().await;
    if compressed {
        client = client.send_compressed(Gzip);
    }
    for id in ids {
        let mut request = charge(id, 500);
        request.get_mut().request_id = (*id).to_owned();
        request.metadata_mut().insert_bin("id-bin", MetadataValue::from_bytes(id.as_bytes()));
        client.charge(request).await.unwrap();
    }
    served.bank.runs()
}

#[tokio::test]
async fn a_key_is_metadata_or_a_field_of_the_message() {
    let ids = ["a", "b", "a", "b"];
    assert_eq!(runs(key::metadata("idempotency-key"), false, &ids).await, 2);
    assert_eq!(runs(key::metadata("id-bin"), false, &ids).await, 2);
    assert_eq!(runs(key::protobuf([1]), false, &ids).await, 2);
    assert_eq!(runs(key::protobuf([1]), true, &ids).await, 2, "compressed");
    assert_eq!(runs(key::protobuf([2]), false, &ids).await, 1, "the account is always the same");
    assert_eq!(runs(key::protobuf([2]).and(key::protobuf([3])), false, &ids).await, 1);
    assert_eq!(runs(key::protobuf([4]), false, &ids).await, 4, "there is no such field");
    assert_eq!(runs(key::protobuf([1]), false, &["", ""]).await, 2, "an empty one is not sent");
}

#[tokio::test]
async fn a_message_that_unpacks_to_too_much_is_over_the_limit() {
    let bomb = || {
        let mut bomb = charge("", 500);
        bomb.get_mut().account = "a".repeat(100_000);
        bomb
    };
    let layer = webhook(&ledger()).key(key::protobuf([1])).max_request_body(1000);
    let served = Served::by(layer.clone()).await;
    let refused = served.client().await.send_compressed(Gzip).charge(bomb()).await.unwrap_err();
    assert_eq!((refused.code(), refused.message()), (Code::ResourceExhausted, "the request body is too large"));
    assert_eq!(served.bank.runs(), 0);
    let served = Served::by(layer.over_limit(OverLimit::PassThrough)).await;
    served.client().await.send_compressed(Gzip).charge(bomb()).await.unwrap();
    assert_eq!(served.bank.runs(), 1);
}

#[tokio::test]
async fn a_rule_may_be_for_messages_and_for_json() {
    for source in [key::json("$.id").or(key::protobuf([1])), key::protobuf([1]).or(key::json("$.id"))] {
        assert_eq!(runs(source.clone(), false, &["a", "b", "a"]).await, 2);
        let layer = webhook(&ledger()).key(source);
        let app = App::new(&layer, |_: Incoming, _| async { answer(200, "") });
        for (id, runs) in [(1, 1), (1, 1), (2, 2)] {
            let request = Request::post("/hook").header("content-type", "application/json; charset=utf-8");
            app.send(request.body(app::body(format!("{{\"id\":{id}}}"))).unwrap()).await;
            assert_eq!(app.runs(), runs);
        }
    }
}

/// A call of a handler that never ends, without tonic, which would end it by itself.
fn call(key: &str, timeout: &str) -> Request<app::Body> {
    let request = Request::post(CHARGE).header("content-type", "application/grpc").header("idempotency-key", key);
    request.header("grpc-timeout", timeout).body(app::body("")).unwrap()
}

#[tokio::test(start_paused = true)]
async fn a_duplicate_waits_no_longer_than_its_client() {
    let layer = api(&ledger()).patience(Duration::from_secs(60));
    let app = App::new(&layer, |_: Incoming, _| std::future::pending::<Result<Response<app::Body>, _>>());
    let first = tokio::spawn(app.send(call("k", "1S")));
    tokio::time::sleep(Duration::from_millis(1)).await;
    for (timeout, waited) in [("200m", 200), ("5S", 5_000), ("1H", 60_000), ("soon", 60_000)] {
        let before = Instant::now();
        let refused = app.send(call("k", timeout)).await;
        assert_eq!(refused.headers["grpc-status"], "10");
        let took = before.elapsed().as_millis();
        assert!((waited..waited + 5).contains(&took), "{timeout}: {took} ms");
    }
    assert!(!first.is_finished(), "the attempt is not the duplicate's to end");
}

#[tokio::test]
async fn a_call_and_a_request_of_one_key_are_one_event_and_neither_reads_the_others_answer() {
    let (ledger, body) = (ledger(), || app::body("\0\0\0\0\0"));
    let layer = api(&ledger).fingerprint(tower_idempotency::fingerprint::ignored());
    let app = App::new(&layer, |request: Incoming, _| async move {
        let mut response = answer(200, "\0\0\0\0\0")?;
        if let Some(kind) = request.headers().get("content-type") {
            response.headers_mut().insert("content-type", kind.clone());
            response.headers_mut().insert("grpc-status", "0".parse()?);
        }
        Ok(response)
    });
    let by_grpc = |key: &str| {
        let request = Request::post(CHARGE).header("idempotency-key", key).header("content-type", "application/grpc");
        request.body(body()).unwrap()
    };
    let by_http = |key: &str| Request::post(CHARGE).header("idempotency-key", key).body(body()).unwrap();
    assert_eq!(app.send(by_grpc("a")).await.headers["grpc-status"], "0");
    assert_eq!(app.send(by_http("a")).await.code().unwrap(), "outcome_not_retained");
    assert_eq!(app.send(by_http("b")).await.status, 200);
    assert_eq!(app.send(by_grpc("b")).await.headers["grpc-status"], "6");
    assert_eq!(app.runs(), 2);
}
