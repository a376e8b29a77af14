//! Calls that stream pass through, whatever key they bring.

use futures_util::{StreamExt as _, stream};
use tokio::sync::mpsc;
use tower_idempotency::{IdempotencyLayer, caller};

use crate::bank::{Served, api, keyed, ledger};
use crate::payments::{DESCRIPTORS, TotalRequest, WatchRequest};

fn by_schema() -> IdempotencyLayer {
    IdempotencyLayer::api(&ledger(), caller::shared()).unary_methods_of(DESCRIPTORS).unwrap()
}

#[tokio::test]
async fn a_stream_of_answers_is_untouched() {
    for layer in [api(&ledger()), by_schema()] {
        let served = Served::by(layer).await;
        served.bank.close();
        let mut client = served.client().await;
        for _ in 0..2 {
            let mut receipts = client.watch(keyed("k", WatchRequest::default())).await.unwrap().into_inner();
            served.bank.admit(1);
            assert_eq!(receipts.message().await.unwrap().unwrap().number, 1, "before the stream ends");
            served.bank.admit(1);
            assert_eq!(receipts.message().await.unwrap().unwrap().number, 2);
            assert_eq!(receipts.message().await.unwrap(), None);
        }
        assert_eq!(served.bank.runs(), 2);
    }
}

#[tokio::test]
async fn a_conversation_is_untouched() {
    for layer in [api(&ledger()), by_schema()] {
        let served = Served::by(layer).await;
        let mut client = served.client().await;
        for _ in 0..2 {
            let (ask, asked) = mpsc::channel::<TotalRequest>(1);
            let asked = stream::unfold(asked, async |mut asked| Some((asked.recv().await?, asked)));
            let mut totals = client.totals(keyed("k", asked.boxed())).await.unwrap().into_inner();
            for account in ["a", "ab", "abc"] {
                ask.send(TotalRequest { account: account.to_owned() }).await.unwrap();
                // It is answered before the next is asked.
                let total = totals.message().await.unwrap().unwrap();
                assert_eq!(total.cents, account.len() as u64);
            }
            drop(ask);
            assert_eq!(totals.message().await.unwrap(), None);
        }
        assert_eq!(served.bank.runs(), 2);
    }
}

#[tokio::test]
async fn a_method_that_has_no_effect_is_not_protected_by_its_schema() {
    let served = Served::by(by_schema()).await;
    let mut client = served.client().await;
    for _ in 0..2 {
        client.total(keyed("k", TotalRequest::default())).await.unwrap();
        client.charge(crate::bank::charge("k", 500)).await.unwrap();
    }
    assert_eq!(served.bank.runs(), 3);
}
