//! G: attempts that fail, leases that end, stores that break.

use std::time::Duration;

use bytes::Bytes;
use futures_util::FutureExt as _;
use futures_util::future::join_all;
use tokio::time::{Instant, sleep};
use tower_idempotency::key::header;
use tower_idempotency::store::{Claim, Forgotten, Hold, Store as _};
use tower_idempotency::{IdempotencyLayer, Ledger, MemoryStore, OnStoreError, caller};

use crate::common::app::{App, answer, counting, deliver, event, gated, key_of, order};
use crate::common::stores::{Fault, Step, Stores};
use crate::common::until;

on_every_store! {
    g01_after_a_5xx_the_next_delivery_runs
    g06_errors_and_panics_surface_and_leave_no_claim
    g08_garbage_under_a_key_is_an_outage_and_never_a_run
    g09_an_empty_record_is_an_outage_and_never_an_endless_409
    g14_nothing_is_renewed_when_the_attempt_has_ended
    g15_a_renewal_that_fails_is_sent_again
    g17_a_release_by_a_stale_attempt_frees_nothing
    g19_a_store_that_is_down_is_a_503_and_no_run
    g21_a_store_that_hangs_costs_its_timeout_and_no_more
    g22_an_outcome_that_could_not_be_stored_is_told_as_such_and_pursued
    g24_a_claim_whose_answer_was_lost_is_the_claimants_own
    g26_a_release_of_what_is_gone_or_released_is_no_error
    g28_a_store_that_fails_twice_is_asked_a_third_time
    g30_a_thousand_duplicates_disturb_no_other_key
}

const TICK: Duration = Duration::from_millis(200);

fn api(ledger: &Ledger) -> IdempotencyLayer {
    IdempotencyLayer::api(ledger, caller::shared())
}

fn webhook(ledger: &Ledger) -> IdempotencyLayer {
    IdempotencyLayer::webhook(ledger, header("X-Id"))
}

fn in_memory() -> Ledger {
    Ledger::new(MemoryStore::new())
}

async fn g01_after_a_5xx_the_next_delivery_runs(stores: Stores) {
    let app = App::new(&api(&stores.ledger()), |_, run| async move { answer(if run == 1 { 500 } else { 201 }, "") });
    for (status, replayed) in [(500, false), (201, false), (201, true)] {
        let answer = app.send(order("k", "1")).await;
        assert_eq!((answer.status.as_u16(), answer.is_replayed()), (status, replayed));
    }
    assert_eq!(app.runs(), 2);
}

/// How often a status runs when it is sent twice.
async fn runs(layer: &IdempotencyLayer, status: u16) -> u32 {
    let app = counting(layer, status);
    for _ in 0..2 {
        let mut request = order("k", "1");
        request.headers_mut().insert("x-id", "e".parse().unwrap());
        assert_eq!(app.send(request).await.status.as_u16(), status);
    }
    app.runs()
}

#[tokio::test(start_paused = true)]
async fn g02_an_api_keeps_a_4xx_that_a_retry_cannot_change_and_a_webhook_none() {
    for (status, kept) in [(400, true), (402, true), (412, true), (422, true), (401, false), (403, false), (404, false)]
    {
        assert_eq!(runs(&api(&in_memory()), status).await, if kept { 1 } else { 2 }, "{status}");
    }
    for status in [400, 401, 403, 404, 406, 410, 422] {
        assert_eq!(runs(&webhook(&in_memory()), status).await, 2, "{status}");
    }
}

#[tokio::test(start_paused = true)]
async fn g03_what_time_may_change_is_not_kept() {
    for status in [408, 409, 425, 429, 500, 502, 503, 504] {
        assert_eq!(runs(&api(&in_memory()), status).await, 2, "{status}");
        assert_eq!(runs(&webhook(&in_memory()), status).await, 2, "{status}");
    }
}

#[tokio::test(start_paused = true)]
async fn g04_a_redirection_is_kept_for_an_api_and_is_a_failure_for_a_webhook() {
    for status in [301, 303, 304, 307] {
        assert_eq!(runs(&api(&in_memory()), status).await, 1, "{status}");
        assert_eq!(runs(&webhook(&in_memory()), status).await, 2, "{status}");
    }
}

async fn g06_errors_and_panics_surface_and_leave_no_claim(stores: Stores) {
    let app = App::new(&webhook(&stores.ledger()), |_, run| async move {
        match run {
            1 => panic!("first"),
            2 => Err("second".into()),
            _ => answer(201, "third"),
        }
    });
    let panic = std::panic::AssertUnwindSafe(app.call(event("e"))).catch_unwind().await.unwrap_err();
    assert_eq!(panic.downcast_ref::<&str>(), Some(&"first"));
    assert_eq!(app.call(event("e")).await.unwrap_err().to_string(), "second");
    assert_eq!(app.send(event("e")).await.body, "third");
    assert_eq!(app.runs(), 3);
}

/// Puts a finished record under the key of `event("e")`.
async fn seed(stores: &Stores, layer: &IdempotencyLayer, record: &'static [u8]) {
    let (store, key) = (stores.store(), key_of(layer, event("e")));
    let claim = Claim::new(TICK, TICK * 100);
    store.claim(&key, &claim).await.unwrap();
    assert_eq!(store.complete(&key, &claim, Bytes::from_static(record)).await.unwrap(), Hold::Held);
}

async fn refuses_what_it_cannot_read(stores: Stores, record: &'static [u8]) {
    let layer = webhook(&stores.ledger());
    seed(&stores, &layer, record).await;
    for layer in [layer.clone(), layer.on_store_error(OnStoreError::Bypass)] {
        let app = counting(&layer, 200);
        for _ in 0..2 {
            let refused = app.send(event("e")).await;
            assert_eq!((refused.status.as_u16(), refused.code().as_deref()), (503, Some("store_unavailable")));
        }
        assert_eq!(app.runs(), 0, "it was seen");
    }
}

async fn g08_garbage_under_a_key_is_an_outage_and_never_a_run(stores: Stores) {
    refuses_what_it_cannot_read(stores, b"garbage").await;
}

async fn g09_an_empty_record_is_an_outage_and_never_an_endless_409(stores: Stores) {
    refuses_what_it_cannot_read(stores, b"").await;
}

#[tokio::test]
async fn g10_an_unknown_state_is_an_outage_and_never_a_run() {
    let stores = Stores::redis();
    let layer = webhook(&stores.ledger());
    seed(&stores, &layer, b"").await;
    let name = format!("idempotency:{{{}}}", key_of(&layer, event("e")));
    let mut client = stores.server.as_ref().unwrap().client().await;
    let () = ::redis::cmd("SETRANGE").arg(&name).arg(2).arg("X").query_async(&mut client).await.unwrap();
    let app = counting(&layer, 200);
    assert_eq!((app.send(event("e")).await.status.as_u16(), app.runs()), (503, 0));
}

#[tokio::test]
async fn g12_a_running_record_without_a_deadline_gets_one_and_is_not_run() {
    let stores = Stores::redis();
    let layer = webhook(&stores.ledger()).lease(TICK * 2).patience(TICK * 20);
    let key = key_of(&layer, event("e"));
    stores.store().claim(&key, &Claim::new(TICK * 2, TICK * 100)).await.unwrap();
    let mut client = stores.server.as_ref().unwrap().client().await;
    let () = ::redis::cmd("PERSIST").arg(format!("idempotency:{{{key}}}")).query_async(&mut client).await.unwrap();
    let impatient = counting(&layer.clone().patience(Duration::ZERO), 200);
    assert_eq!((impatient.send(event("e")).await.status.as_u16(), impatient.runs()), (503, 0));
    let patient = counting(&layer, 200);
    assert_eq!(patient.send(event("e")).await.body, "run 1", "a lease later it is dead");
}

async fn g14_nothing_is_renewed_when_the_attempt_has_ended(stores: Stores) {
    let app = App::new(&webhook(&stores.ledger()).lease(TICK), |_, run| async move {
        sleep(TICK).await;
        match run {
            1 => answer(200, ""),
            2 => answer(500, ""),
            _ => panic!("third"),
        }
    });
    app.send(event("a")).await;
    app.send(event("b")).await;
    let _ = std::panic::AssertUnwindSafe(app.call(event("c"))).catch_unwind().await;
    let renewed = stores.calls(Step::Renew);
    assert!(renewed >= 3, "{renewed}");
    sleep(TICK * 3).await;
    assert_eq!(stores.calls(Step::Renew), renewed);
}

async fn g15_a_renewal_that_fails_is_sent_again(stores: Stores) {
    let lease = TICK * 5;
    let (app, gate) = gated(&webhook(&stores.ledger()).lease(lease).patience(Duration::ZERO));
    let first = deliver(&app, event("e"));
    until(async || app.runs() == 1).await;
    stores.fail(Step::Renew, Fault::LoseRequest, 1);
    sleep(lease + TICK).await;
    let elsewhere = counting(&webhook(&stores.ledger()).patience(Duration::ZERO), 200);
    assert_eq!((elsewhere.send(event("e")).await.status.as_u16(), elsewhere.runs()), (503, 0));
    gate.add_permits(1);
    assert_eq!((first.await.unwrap().status.as_u16(), app.runs()), (200, 1));
}

async fn g17_a_release_by_a_stale_attempt_frees_nothing(stores: Stores) {
    let ledger = stores.ledger();
    let layer = webhook(&ledger).patience(Duration::ZERO);
    let stale = App::new(&layer, |_, _| async {
        sleep(TICK * 2).await;
        answer(500, "")
    });
    let failing = deliver(&stale, event("e"));
    until(async || stale.runs() == 1).await;
    assert_eq!(ledger.forget(&key_of(&layer, event("e")), true).await.unwrap(), Forgotten::Forgotten);
    let (owner, gate) = gated(&webhook(&stores.ledger()));
    let owned = deliver(&owner, event("e"));
    until(async || owner.runs() == 1).await;
    assert_eq!(failing.await.unwrap().status, 500);
    let third = counting(&webhook(&stores.ledger()).patience(Duration::ZERO), 200);
    assert_eq!((third.send(event("e")).await.status.as_u16(), third.runs()), (503, 0), "the second still owns it");
    gate.add_permits(1);
    assert_eq!(owned.await.unwrap().status, 200);
}

async fn g19_a_store_that_is_down_is_a_503_and_no_run(mut stores: Stores) {
    let app = counting(&api(&stores.ledger()), 201);
    match &mut stores.server {
        Some(server) => server.kill(),
        None => stores.fail(Step::Claim, Fault::LoseRequest, 3),
    }
    let refused = app.send(order("k", "1")).await;
    assert_eq!((refused.status.as_u16(), refused.code().as_deref()), (503, Some("store_unavailable")));
    assert!(refused.headers.contains_key("retry-after"));
    assert_eq!(app.runs(), 0);
}

async fn g21_a_store_that_hangs_costs_its_timeout_and_no_more(stores: Stores) {
    let ledger = stores.ledger().store_timeout(TICK);
    for (layer, status) in [(api(&ledger), 503), (api(&ledger).on_store_error(OnStoreError::Bypass), 201)] {
        stores.fail(Step::Claim, Fault::Hang, 3);
        let app = counting(&layer, 201);
        let started = Instant::now();
        assert_eq!(app.send(order("k", "1")).await.status.as_u16(), status);
        // 1.6 times the timeout, and what a busy machine needs.
        assert!((TICK..TICK * 5).contains(&started.elapsed()), "{:?}", started.elapsed());
        stores.heal();
    }
}

async fn g22_an_outcome_that_could_not_be_stored_is_told_as_such_and_pursued(stores: Stores) {
    let layer = |ledger: &Ledger| api(ledger).lease(TICK * 10).complete_wait(TICK).patience(Duration::ZERO);
    let app = counting(&layer(&stores.ledger()), 201);
    stores.fail(Step::Complete, Fault::LoseRequest, u32::MAX);
    let first = app.send(order("k", "1")).await;
    assert_eq!((first.status.as_u16(), first.is_stored()), (201, false));
    let elsewhere = counting(&layer(&stores.ledger()), 201);
    assert_eq!(elsewhere.send(order("k", "1")).await.status, 409, "the claim is still held");
    stores.heal();
    until(async || elsewhere.send(order("k", "1")).await.is_replayed()).await;
    assert_eq!((app.runs(), elsewhere.runs()), (1, 0));
}

async fn g24_a_claim_whose_answer_was_lost_is_the_claimants_own(stores: Stores) {
    let app = counting(&api(&stores.ledger()), 201);
    stores.fail(Step::Claim, Fault::LoseAnswer, 1);
    let first = app.send(order("k", "1")).await;
    assert_eq!((first.status.as_u16(), app.runs()), (201, 1), "and no 409");
}

async fn g26_a_release_of_what_is_gone_or_released_is_no_error(stores: Stores) {
    stores.fail(Step::Release, Fault::LoseAnswer, 1);
    let app = counting(&webhook(&stores.ledger()), 500);
    assert_eq!(app.send(event("e")).await.body, "run 1", "released twice");
    let (store, key) = (stores.store(), key_of(&webhook(&stores.ledger()), event("gone")));
    let claim = Claim::new(TICK, TICK);
    for _ in 0..2 {
        assert_eq!(store.release(&key, &claim, TICK).await.unwrap(), Hold::Held);
    }
}

async fn g28_a_store_that_fails_twice_is_asked_a_third_time(stores: Stores) {
    stores.fail(Step::Claim, Fault::LoseRequest, 2);
    let app = counting(&api(&stores.ledger()), 201);
    assert_eq!((app.send(order("k", "1")).await.status.as_u16(), app.runs()), (201, 1));
    assert_eq!(stores.calls(Step::Claim), 3);
}

async fn g30_a_thousand_duplicates_disturb_no_other_key(stores: Stores) {
    let (app, gate) = gated(&api(&stores.ledger()).patience(Duration::ZERO));
    let first = deliver(&app, order("k", "1"));
    until(async || app.runs() == 1).await;
    let duplicates = join_all((0..999).map(|_| app.send(order("k", "1")))).await;
    assert!(duplicates.iter().all(|answer| answer.status == 409));
    gate.add_permits(2);
    assert_eq!(app.send(order("other", "1")).await.body, "run 2");
    assert_eq!(first.await.unwrap().body, "run 1");
}

/// Where the limit of the promise lies: a store that evicts may let an event run again, and still nothing stale is told.
#[tokio::test]
async fn g32_an_evicted_claim_may_run_again_and_its_first_attempt_knows() {
    let stores = Stores::redis();
    let layer = |ledger: &Ledger| webhook(ledger).lease(TICK * 3);
    let layer_a = layer(&stores.ledger());
    let (a, gate) = gated(&layer_a);
    let first = deliver(&a, event("e"));
    until(async || a.runs() == 1).await;
    let mut client = stores.server.as_ref().unwrap().client().await;
    let name = format!("idempotency:{{{}}}", key_of(&layer_a, event("e")));
    let () = ::redis::cmd("DEL").arg(&name).query_async(&mut client).await.unwrap();
    let b = App::new(&layer(&stores.ledger()), |_, _| async { answer(200, "successor") });
    assert_eq!(b.send(event("e")).await.body, "successor");
    gate.add_permits(1);
    let told = first.await.unwrap();
    assert_eq!((&told.body[..], told.is_replayed()), (&b"successor"[..], true));
}
