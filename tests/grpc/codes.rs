//! Which outcomes are kept: by the status of the call, not that of HTTP.

use tonic::{Code, Status};
use tower_idempotency::{IdempotencyLayer, grpc};

use crate::bank::{Served, api, charge, ledger, webhook};

/// Which codes are still the answer when the call comes again.
async fn kept(layer: IdempotencyLayer) -> Vec<Code> {
    let served = Served::by(layer).await;
    let mut client = served.client().await;
    let mut kept = Vec::new();
    for number in 1..=16 {
        let code = Code::from_i32(number);
        served.bank.plan([Err(Status::new(code, "planned"))]);
        let key = number.to_string();
        let first = client.charge(charge(&key, 500)).await.unwrap_err();
        assert_eq!((first.code(), first.message()), (code, "planned"));
        let runs = served.bank.runs();
        let again = client.charge(charge(&key, 500)).await;
        if again.is_err_and(|again| again.code() == code && again.message() == "planned") {
            kept.push(code);
        } else {
            assert_eq!(served.bank.runs(), runs + 1);
        }
    }
    kept
}

#[tokio::test]
async fn an_api_keeps_what_would_be_said_again() {
    use Code::{AlreadyExists, FailedPrecondition, InvalidArgument, NotFound, OutOfRange};
    let expected = [InvalidArgument, NotFound, AlreadyExists, FailedPrecondition, OutOfRange];
    assert_eq!(kept(api(&ledger())).await, expected);
}

#[tokio::test]
async fn a_webhook_keeps_what_went_well() {
    assert_eq!(kept(webhook(&ledger())).await, []);
}

#[tokio::test]
async fn a_layer_can_be_told_what_to_keep() {
    let layer = api(&ledger()).keep_codes(|code| matches!(code, grpc::Code::Ok | grpc::Code::Aborted));
    assert_eq!(kept(layer).await, [Code::Aborted]);
}

#[tokio::test]
async fn a_rule_that_panics_keeps_what_went_well() {
    let served = Served::by(api(&ledger()).keep_codes(|_| panic!("a bug"))).await;
    let mut client = served.client().await;
    served.bank.plan([Err(Status::already_exists("planned")), Ok(1), Ok(2)]);
    client.charge(charge("k", 500)).await.unwrap_err();
    for _ in 0..2 {
        assert_eq!(client.charge(charge("k", 500)).await.unwrap().get_ref().cents, 1);
    }
    assert_eq!(served.bank.runs(), 2);
}

#[tokio::test]
async fn what_was_unavailable_runs_again() {
    let served = Served::by(api(&ledger())).await;
    let mut client = served.client().await;
    served.bank.plan([Err(Status::unavailable("not now"))]);
    let first = client.charge(charge("k", 500)).await.unwrap_err();
    assert_eq!(first.code(), Code::Unavailable);
    assert_eq!(client.charge(charge("k", 500)).await.unwrap().get_ref().number, 2);
    assert_eq!(client.charge(charge("k", 500)).await.unwrap().get_ref().number, 2);
    assert_eq!(served.bank.runs(), 2);
}
