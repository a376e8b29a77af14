//! What a call that comes again is told.

use futures_util::future::join_all;
use tonic::codec::CompressionEncoding::Gzip;
use tonic::metadata::MetadataMap;
use tonic::{Code, Request, Status};
use tonic_types::{ErrorDetails, StatusExt as _};
use tower_idempotency::{Kept, grpc};

use crate::bank::{Served, api, charge, is_replayed, kept, ledger, webhook};
use crate::common::stores::Stores;
use crate::payments::Receipt;

async fn a_replay_is_the_same_message_with_the_same_trailers(stores: Stores) {
    let served = Served::by(api(&stores.ledger())).await;
    for (key, gzip) in [("plain", false), ("compressed", true)] {
        let mut client = served.client().await;
        if gzip {
            client = client.send_compressed(Gzip).accept_compressed(Gzip);
        }
        let first = client.charge(charge(key, 500)).await.unwrap();
        let again = client.charge(charge(key, 500)).await.unwrap();
        assert_eq!(first.get_ref(), again.get_ref());
        assert_eq!(first.get_ref().cents, 500);
        assert!(!is_replayed(first.metadata()) && is_replayed(again.metadata()));
        // The client puts the trailers to the headers.
        assert_eq!(kept(first.metadata()), kept(again.metadata()));
        let metadata = again.metadata();
        assert_eq!(metadata.get("cost").unwrap(), "7");
        assert_eq!(metadata.get_all("tag").iter().collect::<Vec<_>>(), ["a", "b"]);
        assert_eq!(metadata.get_bin("seal-bin").unwrap().to_bytes().unwrap(), &b"\0\xff"[..]);
        assert_eq!(metadata.get("grpc-encoding").is_some(), gzip);
    }
    assert_eq!(served.bank.runs(), 2);
}

async fn a_status_is_replayed_with_all_it_has(stores: Stores) {
    let served = Served::by(api(&stores.ledger())).await;
    let mut metadata = MetadataMap::new();
    metadata.insert("cost", "3".parse().unwrap());
    let details = ErrorDetails::with_error_info("CHARGED", "bank", [("number".to_owned(), "9".to_owned())]);
    let exists = Status::with_error_details_and_metadata(Code::AlreadyExists, "schon da: 100 %", details, metadata);
    served.bank.plan([Err(exists)]);
    let mut client = served.client().await;
    let first = client.charge(charge("k", 500)).await.unwrap_err();
    let again = client.charge(charge("k", 500)).await.unwrap_err();
    assert_eq!((first.code(), first.message()), (Code::AlreadyExists, "schon da: 100 %"));
    assert_eq!((again.code(), again.message()), (first.code(), first.message()));
    assert_eq!(again.details(), first.details());
    assert_eq!(again.get_details_error_info().unwrap().reason, "CHARGED");
    assert_eq!(kept(first.metadata()), kept(again.metadata()));
    assert!(is_replayed(again.metadata()));
    assert_eq!(served.bank.runs(), 1);
}

async fn calls_at_the_same_time_are_one_run(stores: Stores) {
    let (one, other) = (Served::by(api(&stores.ledger())).await, Served::by(api(&stores.ledger())).await);
    let mut clients = Vec::new();
    for served in [&one, &other] {
        for _ in 0..10 {
            clients.push(served.client().await);
        }
    }
    let calls = clients.iter_mut().map(async |client| client.charge(charge("k", 500)).await.unwrap().into_inner());
    let receipts: Vec<Receipt> = join_all(calls).await;
    assert!(receipts.iter().all(|receipt| *receipt == receipts[0]), "{receipts:?}");
    assert_eq!(one.bank.runs() + other.bank.runs(), 1);
}

macro_rules! on_every_store {
    ($($name:ident)+) => {
        mod memory {
            $(#[tokio::test]
            async fn $name() {
                super::$name($crate::common::stores::Stores::memory()).await;
            })+
        }

        mod redis {
            $(#[tokio::test]
            async fn $name() {
                super::$name($crate::common::stores::Stores::redis()).await;
            })+
        }
    };
}

on_every_store! {
    a_replay_is_the_same_message_with_the_same_trailers
    a_status_is_replayed_with_all_it_has
    calls_at_the_same_time_are_one_run
}

#[tokio::test]
async fn what_was_not_retained_is_said_to_be_done() {
    let served = Served::by(api(&ledger()).max_kept_body(3)).await;
    let mut client = served.client().await;
    let first = client.charge(charge("k", 500)).await.unwrap();
    assert_eq!(first.metadata().get("idempotency-stored").unwrap(), "false");
    assert_eq!(first.metadata().get("cost").unwrap(), "7");
    let again = client.charge(charge("k", 500)).await.unwrap_err();
    assert_eq!(again.code(), Code::AlreadyExists);
    assert_eq!(again.get_details_error_info().unwrap().reason, "OUTCOME_NOT_RETAINED");
    assert!(again.get_details_retry_info().is_none());
    assert_eq!(served.bank.runs(), 1);
}

#[tokio::test]
async fn a_sender_of_webhooks_is_told_that_it_went_well() {
    let served = Served::by(webhook(&ledger()).max_kept_body(3)).await;
    let mut client = served.client().await;
    client.charge(charge("k", 500)).await.unwrap();
    let again = client.charge(charge("k", 500)).await.unwrap();
    assert_eq!(*again.get_ref(), Receipt::default());
    assert!(is_replayed(again.metadata()));
    assert_eq!(again.metadata().get("receipt").unwrap(), "1");
    assert_eq!(served.bank.runs(), 1);
}

#[tokio::test]
async fn a_failure_too_large_to_be_kept_runs_again() {
    let served = Served::by(api(&ledger()).max_kept_body(3).keep_codes(|_| false)).await;
    let mut client = served.client().await;
    client.charge(charge("k", 500)).await.unwrap();
    client.charge(charge("k", 500)).await.unwrap();
    assert_eq!(served.bank.runs(), 2);
}

#[tokio::test]
async fn a_selection_of_headers_leaves_a_call_whole() {
    let layer = api(&ledger()).keep_headers(&["cost"]).drop_headers(&["grpc-status"]);
    let served = Served::by(layer).await;
    let mut client = served.client().await.send_compressed(Gzip).accept_compressed(Gzip);
    let first = client.charge(charge("k", 500)).await.unwrap();
    let again = client.charge(charge("k", 500)).await.unwrap();
    assert_eq!(first.get_ref(), again.get_ref());
    assert_eq!(again.metadata().get("cost").unwrap(), "7");
    assert!(again.metadata().get("receipt").is_none() && again.metadata().get("tag").is_none());
    assert_eq!(served.bank.runs(), 1);
}

#[tokio::test]
async fn a_hook_leaves_a_call_readable_and_its_status_true() {
    let bare = |kept: &mut Kept| {
        kept.headers.clear();
        kept.trailers = None;
    };
    let lies = |kept: &mut Kept| {
        kept.headers.insert("grpc-status", "0".parse().unwrap());
        kept.trailers.get_or_insert_default().insert("grpc-status", "3".parse().unwrap());
    };
    let layers = [
        api(&ledger()).redact(bare),
        api(&ledger()).on_replay(bare),
        api(&ledger()).redact(lies),
        api(&ledger()).on_replay(lies),
        api(&ledger()).drop_headers(&["content-type", "grpc-encoding"]),
        webhook(&ledger()).redact(bare).keep_codes(|code| code.to_string() != "UNAVAILABLE"),
    ];
    for layer in layers {
        let served = Served::by(layer).await;
        let mut client = served.client().await.send_compressed(Gzip).accept_compressed(Gzip);
        let first = client.charge(charge("k", 500)).await.unwrap();
        let again = client.charge(charge("k", 500)).await.unwrap();
        assert_eq!(first.get_ref(), again.get_ref());
        served.bank.plan([Err(Status::already_exists("it is there"))]);
        for _ in 0..2 {
            assert_eq!(client.charge(charge("e", 500)).await.unwrap_err().code(), Code::AlreadyExists);
        }
        assert_eq!(served.bank.runs(), 2);
    }
}

#[tokio::test]
async fn a_client_that_cannot_unpack_it_is_told_that_it_is_done() {
    let served = Served::by(api(&ledger())).await;
    served.client().await.accept_compressed(Gzip).charge(charge("k", 500)).await.unwrap();
    let again = served.client().await.charge(charge("k", 500)).await.unwrap_err();
    assert_eq!(again.code(), Code::AlreadyExists);
    let served = Served::by(webhook(&ledger())).await;
    served.client().await.accept_compressed(Gzip).charge(charge("k", 500)).await.unwrap();
    let again = served.client().await.charge(charge("k", 500)).await.unwrap();
    assert_eq!(*again.get_ref(), Receipt::default());
}

#[tokio::test]
async fn an_operator_sees_what_came_of_a_call() {
    let ledger = ledger();
    let layer = api(&ledger);
    let served = Served::by(layer.clone()).await;
    served.bank.plan([Ok(1), Err(Status::not_found("no such account"))]);
    let head = |key| {
        let request = http::Request::post(crate::bank::CHARGE).header("content-type", "application/grpc");
        request.header("idempotency-key", key).body(()).unwrap().into_parts().0
    };
    let mut client = served.client().await;
    for (key, code) in [("a", grpc::Code::Ok), ("b", grpc::Code::NotFound)] {
        let _ = client.charge(charge(key, 500)).await;
        let key = layer.key_of(&head(key), &bytes::Bytes::new()).unwrap();
        assert_eq!(ledger.lookup(&key).await.unwrap().unwrap().code(), Some(code));
    }
}

#[tokio::test]
async fn a_call_without_a_key_runs_each_time() {
    let served = Served::by(api(&ledger())).await;
    let mut client = served.client().await;
    for _ in 0..2 {
        client.charge(Request::new(charge("", 500).into_inner())).await.unwrap();
    }
    assert_eq!(served.bank.runs(), 2);
}
