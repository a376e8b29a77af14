//! What a handler of tonic may say of its attempt, also when it returns a status.

use std::time::Duration;

use tonic::{Code, Status};
use tonic_types::StatusExt as _;
use tower_idempotency::Attempt;

use crate::bank::{Served, api, charge, ledger, webhook};

#[tokio::test]
async fn an_outcome_that_is_not_to_be_kept_runs_again() {
    let served = Served::by(api(&ledger())).await;
    served.bank.steer(Attempt::dont_keep);
    served.bank.plan([Err(Status::already_exists("for now")), Ok(1)]);
    let mut client = served.client().await;
    let first = client.charge(charge("k", 500)).await.unwrap_err();
    assert_eq!(first.code(), Code::AlreadyExists);
    assert_eq!(first.metadata().get("idempotency-stored").unwrap(), "false");
    let second = client.charge(charge("k", 500)).await.unwrap();
    assert_eq!(second.metadata().get("idempotency-stored").unwrap(), "false");
    client.charge(charge("k", 500)).await.unwrap();
    assert_eq!(served.bank.runs(), 3);
}

#[tokio::test]
async fn an_effect_that_was_applied_earlier_is_not_applied_again() {
    for outcome in [Ok(1), Err(Status::already_exists("the row is there"))] {
        let served = Served::by(api(&ledger())).await;
        served.bank.steer(Attempt::already_applied);
        served.bank.plan([outcome]);
        let mut client = served.client().await;
        for _ in 0..2 {
            let told = client.charge(charge("k", 500)).await.unwrap_err();
            assert_eq!(told.code(), Code::AlreadyExists);
            assert_eq!(told.get_details_error_info().unwrap().reason, "OUTCOME_NOT_RETAINED");
        }
        assert_eq!(served.bank.runs(), 1);
    }
}

#[tokio::test]
async fn a_sender_of_webhooks_is_told_that_it_was_applied() {
    let served = Served::by(webhook(&ledger())).await;
    served.bank.steer(Attempt::already_applied);
    served.bank.plan([Err(Status::already_exists("the row is there"))]);
    let mut client = served.client().await;
    for _ in 0..2 {
        client.charge(charge("k", 500)).await.unwrap();
    }
    assert_eq!(served.bank.runs(), 1);
}

#[tokio::test]
async fn an_outcome_is_kept_for_as_long_as_the_handler_says() {
    let served = Served::by(api(&ledger()).expires_header().retention(Duration::from_secs(60))).await;
    served.bank.steer(|attempt| attempt.keep_for(Duration::from_millis(1)));
    served.bank.plan([Err(Status::not_found("no such account"))]);
    let mut client = served.client().await;
    let first = client.charge(charge("k", 500)).await.unwrap_err();
    assert!(first.metadata().contains_key("idempotency-expires"));
    crate::common::until(async || client.charge(charge("k", 500)).await.is_ok()).await;
    assert_eq!(served.bank.runs(), 2);
}
