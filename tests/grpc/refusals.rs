//! Refusals, as a client of tonic reads them.

use std::time::Duration;

use http::HeaderValue;
use tonic::{Code, Status};
use tonic_types::StatusExt as _;
use tower_idempotency::{IdempotencyLayer, Ledger, Rejection};

use crate::bank::{Served, api, charge, ledger, webhook};
use crate::common::stores::{Fault, Step, Stores};

/// Reason, and seconds until a retry may fare better.
fn details(status: &Status) -> (String, Option<u64>) {
    let info = status.get_details_error_info().unwrap();
    assert_eq!(info.domain, "tower-idempotency");
    let retry = status.get_details_retry_info().map(|retry| retry.retry_delay.unwrap().as_secs());
    (info.reason, retry)
}

fn is(status: &Status, code: Code, reason: &str, retry: Option<u64>) {
    assert_eq!((status.code(), details(status)), (code, (reason.to_owned(), retry)));
    assert!(!status.message().is_empty());
}

/// What a duplicate is told while the first runs.
async fn while_running(layer: IdempotencyLayer) -> Status {
    let served = Served::by(layer.patience(Duration::from_millis(1))).await;
    served.bank.close();
    let mut client = served.client().await;
    let mut other = client.clone();
    let first = tokio::spawn(async move { other.charge(charge("k", 500)).await.unwrap() });
    crate::common::until(async || served.bank.runs() == 1).await;
    let refused = client.charge(charge("k", 500)).await.unwrap_err();
    served.bank.admit(1);
    first.await.unwrap();
    refused
}

#[tokio::test]
async fn a_running_call_says_when_to_come_again() {
    is(&while_running(api(&ledger())).await, Code::Aborted, "RUNNING", Some(1));
    is(&while_running(webhook(&ledger())).await, Code::Unavailable, "RUNNING", Some(1));
    let limited = api(&ledger()).running_status(http::StatusCode::TOO_MANY_REQUESTS);
    is(&while_running(limited).await, Code::ResourceExhausted, "RUNNING", Some(1));
}

#[tokio::test]
async fn a_store_that_is_down_says_when_to_come_again() {
    let stores = Stores::memory();
    stores.fail(Step::Claim, Fault::LoseRequest, u32::MAX);
    let served = Served::by(api(&stores.ledger())).await;
    let refused = served.client().await.charge(charge("k", 500)).await.unwrap_err();
    is(&refused, Code::Unavailable, "STORE_UNAVAILABLE", Some(1));
    assert_eq!(served.bank.runs(), 0);
}

#[tokio::test]
async fn a_full_house_says_when_to_come_again() {
    let served = Served::by(api(&Ledger::new(tower_idempotency::MemoryStore::new()).max_in_flight(0))).await;
    let refused = served.client().await.charge(charge("k", 500)).await.unwrap_err();
    is(&refused, Code::Unavailable, "OVERLOADED", Some(1));
}

#[tokio::test]
async fn a_call_that_will_never_be_right_is_not_to_be_retried() {
    let served = Served::by(api(&ledger()).require_key().max_request_body(100)).await;
    let mut client = served.client().await;
    let refused = client.charge(charge("", 500)).await.unwrap_err();
    is(&refused, Code::InvalidArgument, "KEY_MISSING", None);
    let refused = client.charge(charge("two, keys", 500)).await.unwrap_err();
    is(&refused, Code::InvalidArgument, "KEY_MALFORMED", None);
    client.charge(charge("k", 500)).await.unwrap();
    let refused = client.charge(charge("k", 900)).await.unwrap_err();
    is(&refused, Code::InvalidArgument, "KEY_REUSED", None);
    let mut large = charge("large", 500);
    large.get_mut().account = "a".repeat(100);
    let refused = client.charge(large).await.unwrap_err();
    is(&refused, Code::ResourceExhausted, "BODY_TOO_LARGE", None);
    assert_eq!(served.bank.runs(), 1);
}

#[tokio::test]
async fn a_scope_that_fails_is_the_servers_fault() {
    let layer = api(&ledger()).try_scope(|_| Err::<Option<&str>, _>("no tenant"));
    let refused = Served::by(layer).await.client().await.charge(charge("k", 500)).await.unwrap_err();
    is(&refused, Code::Internal, "SCOPE_UNKNOWN", None);
}

#[tokio::test]
async fn a_page_that_explains_is_linked() {
    let layer = api(&ledger()).require_key().policy_url("https://example.com/retries");
    let refused = Served::by(layer).await.client().await.charge(charge("", 500)).await.unwrap_err();
    let help = refused.get_details_help().unwrap();
    assert_eq!(help.links[0].url, "https://example.com/retries#key_missing");
    assert_eq!(help.links[0].description, refused.message());
}

#[tokio::test]
async fn a_hook_may_change_what_is_told_but_not_that_it_is_refused() {
    let layer = api(&ledger()).require_key().on_refusal(|refusal, response| {
        assert_eq!(refusal, Rejection::KeyMissing);
        response.headers_mut().insert("grpc-status", HeaderValue::from_static("9"));
        response.headers_mut().insert("hint", HeaderValue::from_static("see the docs"));
        *response.body_mut() = "no frame".into();
    });
    let refused = Served::by(layer).await.client().await.charge(charge("", 500)).await.unwrap_err();
    is(&refused, Code::FailedPrecondition, "KEY_MISSING", None);
    assert_eq!(refused.metadata().get("hint").unwrap(), "see the docs");

    let lies: [fn(&mut http::Response<bytes::Bytes>); 7] = [
        |told| drop(told.headers_mut().insert("grpc-status", HeaderValue::from_static("0"))),
        |told| drop(told.headers_mut().remove("grpc-status")),
        |told| *told = http::Response::default(),
        |told| assert!(told.headers_mut().append("grpc-status", HeaderValue::from_static("0"))),
        |told| drop(told.headers_mut().insert("grpc-status", HeaderValue::from_static("00"))),
        |told| {
            *told.status_mut() = http::StatusCode::BAD_REQUEST;
            told.headers_mut().insert("content-length", HeaderValue::from_static("5"));
        },
        |_| panic!("a bug"),
    ];
    for lie in lies {
        let layer = api(&ledger()).require_key().on_refusal(move |_, told| lie(told));
        let refused = Served::by(layer).await.client().await.charge(charge("", 500)).await.unwrap_err();
        is(&refused, Code::InvalidArgument, "KEY_MISSING", None);
    }
}
