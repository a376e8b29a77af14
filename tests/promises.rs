//! What the crate promises, each promise on every store. The numbers are those of `DESIGN.md` §3.

#![allow(clippy::expect_used, clippy::unwrap_used, reason = "a test panics where it fails")]

mod common;

use std::future::pending;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::join_all;
use futures_util::stream;
use http::{Response, StatusCode};
use http_body::Frame;
use http_body_util::{BodyExt as _, StreamBody};
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout};
use tower_idempotency::key::{Key, header};
use tower_idempotency::store::{Claim, Claimed, Forgotten, State, Store as _};
use tower_idempotency::{IdempotencyLayer, Ledger, caller};

use common::app::{Answer, App, answer, attempt, deliver, event, gated, order};
use common::stores::{Fault, Step, Stores};
use common::until;

macro_rules! promises {
    ($($name:ident)+) => {
        mod memory {
            $(#[tokio::test(start_paused = true)]
            async fn $name() {
                super::$name(super::Stores::memory()).await;
            })+
        }

        mod redis {
            $(#[tokio::test]
            async fn $name() {
                super::$name(super::Stores::redis()).await;
            })+
        }

        mod memory_with_near_cache {
            $(#[tokio::test(start_paused = true)]
            async fn $name() {
                super::$name(super::Stores::memory().with_near_cache()).await;
            })+
        }

        mod redis_with_near_cache {
            $(#[tokio::test]
            async fn $name() {
                super::$name(super::Stores::redis().with_near_cache()).await;
            })+
        }

        mod postgres {
            $(#[tokio::test]
            async fn $name() {
                super::$name(super::Stores::postgres().await).await;
            })+
        }

        mod sqlite {
            $(#[tokio::test]
            async fn $name() {
                super::$name(super::Stores::sqlite().await).await;
            })+
        }
    };
}

promises! {
    p1_one_attempt_at_a_time_among_64_deliveries_to_two_processes
    p1_one_attempt_at_a_time_past_its_lease_while_it_is_renewed
    p2_a_running_delivery_is_never_acknowledged
    p2_a_failed_delivery_is_never_acknowledged
    p3_an_event_that_failed_runs_again
    p3_an_event_that_panicked_runs_again
    p3_an_event_whose_process_died_runs_again
    p3_an_event_whose_response_body_failed_runs_again
    p4_a_stale_attempt_answers_with_its_successors_outcome
    p4_a_stale_attempt_acknowledges_nothing_while_its_successor_runs
    p4_an_attempt_is_told_that_it_lost
    p5_the_outcome_is_stored_before_it_is_told
    p5_what_could_not_be_stored_says_so_and_is_pursued
    p5_a_lost_answer_of_the_completion_costs_nothing
    p6_a_hung_attempt_does_not_hold_its_key_for_ever
    p7_a_client_that_hangs_up_changes_nothing
    p7_a_client_that_hangs_up_while_the_claim_is_asked_for_leaves_no_claim
    p8_attempts_are_bounded
    p8_duplicates_that_wait_are_bounded
    p9_one_caller_never_gets_anothers_outcome
    a_claim_whose_answer_was_lost_is_recognised
    a_claim_that_got_no_answer_is_refused_and_given_up
    the_waiting_take_over_once_and_are_then_refused
    a_finished_key_is_replayed_while_the_process_drains
}

const SHORT: Duration = Duration::from_millis(300);

fn webhook(ledger: &Ledger) -> IdempotencyLayer {
    IdempotencyLayer::webhook(ledger, header("X-Id"))
}

/// The store's key of the event `id`, found by a run that is not kept.
async fn key_of(stores: &Stores, id: &str) -> Key {
    let (sender, mut receiver) = tokio::sync::mpsc::channel(1);
    let app = App::new(&webhook(&stores.ledger()), move |request, _| {
        let sender = sender.clone();
        async move {
            let attempt = attempt(&request);
            sender.send(attempt.key()).await?;
            answer(400, "not kept")
        }
    });
    app.send(event(id)).await;
    receiver.recv().await.unwrap()
}

async fn is_done(ledger: &Ledger, key: &Key) -> bool {
    matches!(ledger.lookup(key).await, Ok(Some(entry)) if matches!(entry.state, State::Done(_)))
}

async fn p1_one_attempt_at_a_time_among_64_deliveries_to_two_processes(stores: Stores) {
    let patient = |ledger: &Ledger| webhook(ledger).patience(Duration::from_secs(20));
    let (a, let_a) = gated(&patient(&stores.ledger()));
    let (b, let_b) = gated(&patient(&stores.ledger()));
    let deliveries: Vec<_> = (0..64).map(|n| deliver(if n % 2 == 0 { &a } else { &b }, event("e"))).collect();
    until(async || a.runs() + b.runs() == 1).await;
    sleep(SHORT).await;
    let_a.add_permits(64);
    let_b.add_permits(64);
    let answers: Vec<Answer> = join_all(deliveries).await.into_iter().map(Result::unwrap).collect();
    assert_eq!(a.runs() + b.runs(), 1);
    assert!(answers.iter().all(|answer| answer.status == 200 && answer.body == answers[0].body));
    assert_eq!(answers.iter().filter(|answer| !answer.is_replayed()).count(), 1);
}

async fn p1_one_attempt_at_a_time_past_its_lease_while_it_is_renewed(stores: Stores) {
    let brief = |ledger: &Ledger| webhook(ledger).lease(SHORT).patience(Duration::ZERO);
    let (app, gate) = gated(&brief(&stores.ledger()));
    let first = deliver(&app, event("e"));
    until(async || app.runs() == 1).await;
    let (other, _) = gated(&brief(&stores.ledger()));
    for _ in 0..6 {
        sleep(SHORT / 2).await;
        assert_eq!(other.send(event("e")).await.status, 503);
    }
    gate.add_permits(1);
    assert_eq!(first.await.unwrap().status, 200);
    assert!(other.send(event("e")).await.is_replayed());
    assert_eq!((app.runs(), other.runs()), (1, 0));
}

async fn p2_a_running_delivery_is_never_acknowledged(stores: Stores) {
    let layer = webhook(&stores.ledger()).patience(SHORT);
    let (app, gate) = gated(&layer);
    let first = deliver(&app, event("e"));
    until(async || app.runs() == 1).await;
    let (elsewhere, _) = gated(&webhook(&stores.ledger()).patience(SHORT));
    for duplicate in [app.send(event("e")).await, elsewhere.send(event("e")).await] {
        assert_eq!((duplicate.status.as_u16(), duplicate.code().as_deref()), (503, Some("running")));
        assert_eq!(duplicate.headers["retry-after"], "1");
    }
    gate.add_permits(1);
    assert!(!first.await.unwrap().is_replayed());

    let api = IdempotencyLayer::api(&stores.ledger(), caller::shared()).patience(SHORT);
    let (app, gate) = gated(&api);
    let first = deliver(&app, order("k", "1"));
    until(async || app.runs() == 1).await;
    assert_eq!(app.send(order("k", "1")).await.status, 409);
    assert_eq!(app.send(order("k", "2")).await.status, 422, "another payload is decided before running");
    gate.add_permits(1);
    assert_eq!(first.await.unwrap().status, 200);
}

async fn p2_a_failed_delivery_is_never_acknowledged(stores: Stores) {
    let app = App::new(&webhook(&stores.ledger()), |_, _| async {
        sleep(SHORT).await;
        answer(500, "failed")
    });
    let deliveries: Vec<_> = (0..16).map(|_| deliver(&app, event("e"))).collect();
    for answer in join_all(deliveries).await {
        assert!(answer.unwrap().status.is_server_error());
    }
}

async fn p3_an_event_that_failed_runs_again(stores: Stores) {
    let app = App::new(&webhook(&stores.ledger()), |request, run| async move {
        assert_eq!(attempt(&request).number(), run);
        assert_eq!(attempt(&request).is_retry(), run > 1);
        match run {
            1 => answer(500, "failed"),
            2 => Err("an error of the inner service".into()),
            3 => answer(403, "not verified"),
            _ => answer(200, "done"),
        }
    });
    assert_eq!(app.send(event("e")).await.status, 500);
    assert_eq!(app.call(event("e")).await.unwrap_err().to_string(), "an error of the inner service");
    assert_eq!(app.send(event("e")).await.status, 403);
    assert_eq!(app.send(event("e")).await.body, "done");
    assert!(app.send(event("e")).await.is_replayed());
    assert_eq!(app.runs(), 4);
}

async fn p3_an_event_that_panicked_runs_again(stores: Stores) {
    let app = App::new(&webhook(&stores.ledger()), |_, run| async move {
        assert!(run > 1, "the first run panics");
        answer(200, "done")
    });
    let panic = deliver(&app, event("e")).await.unwrap_err().into_panic();
    assert!(panic.downcast_ref::<&str>().is_some_and(|panic| panic.contains("the first run panics")));
    assert_eq!(app.send(event("e")).await.body, "done");
    assert_eq!(app.runs(), 2);
}

async fn p3_an_event_whose_process_died_runs_again(stores: Stores) {
    let key = key_of(&stores, "e").await;
    let lease = SHORT * 2;
    let died = stores.store().claim(&key, &Claim::new(lease, lease * 100)).await.unwrap();
    assert_eq!(died, Claimed::Acquired { attempt: 2 });
    let app = App::new(&webhook(&stores.ledger()).patience(lease * 10), |request, _| async move {
        answer(200, attempt(&request).number().to_string())
    });
    let started = Instant::now();
    assert_eq!(app.send(event("e")).await.body, "3");
    assert!(started.elapsed() >= lease / 2 && started.elapsed() < lease * 5, "{:?}", started.elapsed());
}

async fn p3_an_event_whose_response_body_failed_runs_again(stores: Stores) {
    let app = App::new(&webhook(&stores.ledger()), |_, run| async move {
        let frames: Vec<io::Result<_>> = match run {
            1 => vec![Ok(Frame::data(Bytes::from_static(b"half"))), Err(io::Error::other("broken off"))],
            _ => vec![Ok(Frame::data(Bytes::from_static(b"whole")))],
        };
        Ok(Response::new(StreamBody::new(stream::iter(frames)).boxed_unsync()))
    });
    let response = app.call(event("e")).await.unwrap();
    assert!(response.into_body().collect().await.is_err());
    assert_eq!(app.send(event("e")).await.body, "whole");
    assert!(app.send(event("e")).await.is_replayed());
}

/// An attempt forced out by an operator, and its successor, which an operator's patience allows to finish or not.
async fn superseded(
    stores: &Stores,
    layer: impl Fn(&Ledger) -> IdempotencyLayer,
) -> (App, JoinHandle<Answer>, Arc<Semaphore>) {
    let ledger = stores.ledger();
    let (sender, mut receiver) = tokio::sync::mpsc::channel(1);
    let gate = Arc::new(Semaphore::new(0));
    let opened = Arc::clone(&gate);
    let app = App::new(&layer(&ledger), move |request, run| {
        let (sender, opened) = (sender.clone(), Arc::clone(&opened));
        async move {
            sender.send(attempt(&request).key()).await?;
            opened.acquire().await?.forget();
            answer(200, format!("stale run {run}"))
        }
    });
    let stale = deliver(&app, event("e"));
    let key = receiver.recv().await.unwrap();
    assert_eq!(ledger.forget(&key, false).await.unwrap(), Forgotten::Running);
    assert_eq!(ledger.forget(&key, true).await.unwrap(), Forgotten::Forgotten);
    (app, stale, gate)
}

async fn p4_a_stale_attempt_answers_with_its_successors_outcome(stores: Stores) {
    let (_, stale, gate) = superseded(&stores, webhook).await;
    let successor = App::new(&webhook(&stores.ledger()), |_, _| async { answer(200, "successor") });
    assert_eq!(successor.send(event("e")).await.body, "successor");
    gate.add_permits(1);
    let stale = stale.await.unwrap();
    assert_eq!((stale.status, &stale.body[..], stale.is_replayed()), (StatusCode::OK, &b"successor"[..], true));
    assert_eq!(successor.send(event("e")).await.body, "successor", "the stale attempt changed nothing");
}

async fn p4_a_stale_attempt_acknowledges_nothing_while_its_successor_runs(stores: Stores) {
    let (_, stale, gate) = superseded(&stores, webhook).await;
    let (successor, let_successor) = gated(&webhook(&stores.ledger()));
    let succeeding = deliver(&successor, event("e"));
    until(async || successor.runs() == 1).await;
    gate.add_permits(1);
    let stale = stale.await.unwrap();
    assert_eq!((stale.status.as_u16(), stale.code().as_deref()), (503, Some("outcome_unknown")));
    let_successor.add_permits(1);
    assert_eq!(succeeding.await.unwrap().body, "run 1");
    assert_eq!(successor.send(event("e")).await.body, "run 1");
}

async fn p4_an_attempt_is_told_that_it_lost(stores: Stores) {
    let ledger = stores.ledger();
    let (sender, mut receiver) = tokio::sync::mpsc::channel(1);
    let app = App::new(&webhook(&ledger).lease(SHORT), move |request, _| {
        let sender = sender.clone();
        async move {
            let attempt = attempt(&request);
            sender.send(attempt.key()).await?;
            attempt.lost().await;
            answer(500, "stopped early")
        }
    });
    let told = deliver(&app, event("e"));
    let key = receiver.recv().await.unwrap();
    ledger.forget(&key, true).await.unwrap();
    assert_eq!(timeout(SHORT * 10, told).await.unwrap().unwrap().body, "stopped early");
}

async fn p5_the_outcome_is_stored_before_it_is_told(stores: Stores) {
    let app =
        App::new(
            &webhook(&stores.ledger()),
            |request, _| async move { answer(200, attempt(&request).key().to_string()) },
        );
    let elsewhere = stores.ledger();
    for id in ["a", "b", "c", "d"] {
        // The head alone: its body has not been read.
        let response = app.call(event(id)).await.unwrap();
        let head = response.headers().clone();
        let key = response.into_body().collect().await.unwrap().to_bytes();
        let key = std::str::from_utf8(&key).unwrap().parse().unwrap();
        assert!(is_done(&elsewhere, &key).await && !head.contains_key("idempotency-stored"));
    }
}

async fn p5_what_could_not_be_stored_says_so_and_is_pursued(stores: Stores) {
    let key = key_of(&stores, "e").await;
    let layer = webhook(&stores.ledger()).complete_wait(SHORT).lease(SHORT * 4);
    let app = App::new(&layer, |_, run| async move { answer(200, format!("run {run}")) });
    stores.fail(Step::Complete, Fault::LoseRequest, u32::MAX);
    let first = app.send(event("e")).await;
    assert_eq!((first.status.as_u16(), first.is_stored()), (200, false));
    // The lease is renewed meanwhile, so nobody runs it again.
    sleep(SHORT * 6).await;
    assert_eq!(app.clone().send(event("e")).await.code().as_deref(), Some("running"));
    stores.heal();
    let elsewhere = stores.ledger();
    until(async || is_done(&elsewhere, &key).await).await;
    let second = app.send(event("e")).await;
    assert_eq!((second.body, app.runs()), (first.body, 1));
}

async fn p5_a_lost_answer_of_the_completion_costs_nothing(stores: Stores) {
    let app = App::new(&webhook(&stores.ledger()), |_, run| async move { answer(200, format!("run {run}")) });
    stores.fail(Step::Complete, Fault::LoseAnswer, 2);
    let first = app.send(event("e")).await;
    assert!(first.is_stored());
    assert_eq!(app.send(event("e")).await.body, "run 1");
}

async fn p6_a_hung_attempt_does_not_hold_its_key_for_ever(stores: Stores) {
    let layer = webhook(&stores.ledger()).lease(SHORT).max_attempt(SHORT * 3).patience(SHORT * 20);
    let app = App::new(&layer, |_, run| async move {
        if run == 1 {
            pending::<()>().await;
        }
        answer(200, format!("run {run}"))
    });
    let hung = deliver(&app, event("e"));
    until(async || app.runs() == 1).await;
    let started = Instant::now();
    assert_eq!(app.send(event("e")).await.body, "run 2");
    assert!(started.elapsed() >= SHORT * 2, "it was not to be taken over before its time");
    hung.abort();
}

async fn p7_a_client_that_hangs_up_changes_nothing(stores: Stores) {
    let (app, gate) = gated(&webhook(&stores.ledger()));
    let client = deliver(&app, event("e"));
    until(async || app.runs() == 1).await;
    client.abort();
    assert!(client.await.unwrap_err().is_cancelled());
    gate.add_permits(1);
    let retry = app.send(event("e")).await;
    assert_eq!((&retry.body[..], retry.is_replayed(), app.runs()), (&b"run 1"[..], true, 1));
}

async fn p7_a_client_that_hangs_up_while_the_claim_is_asked_for_leaves_no_claim(stores: Stores) {
    let ledger = stores.ledger();
    let (app, gate) = gated(&webhook(&ledger).patience(SHORT * 5));
    gate.add_permits(2);
    // The claim arrives; its answer does not, and the client does not wait for the second sending.
    stores.fail(Step::Claim, Fault::LoseAnswer, 1);
    stores.fail(Step::Claim, Fault::Hang, 1);
    let client = deliver(&app, event("e"));
    sleep(Duration::from_millis(100)).await;
    client.abort();
    let _ = client.await;
    assert_eq!(app.runs(), 0);
    assert_eq!(app.send(event("e")).await.body, "run 1");
}

async fn p8_attempts_are_bounded(stores: Stores) {
    let ledger = stores.ledger().max_in_flight(1);
    let (app, gate) = gated(&webhook(&ledger));
    gate.add_permits(1);
    app.send(event("done")).await;
    let first = deliver(&app, event("a"));
    until(async || app.runs() == 2).await;
    let beyond = app.send(event("b")).await;
    assert_eq!((beyond.status.as_u16(), beyond.code().as_deref()), (503, Some("overloaded")));
    assert!(app.send(event("done")).await.is_replayed(), "a replay needs no attempt");
    gate.add_permits(2);
    assert_eq!(first.await.unwrap().status, 200);
    assert_eq!(app.send(event("b")).await.status, 200);
}

async fn p8_duplicates_that_wait_are_bounded(stores: Stores) {
    let ledger = stores.ledger().max_waiting(3).max_waiting_per_key(2);
    let (app, gate) = gated(&webhook(&ledger));
    let mut running = vec![deliver(&app, event("a")), deliver(&app, event("b"))];
    until(async || app.runs() == 2).await;
    running.extend([deliver(&app, event("a")), deliver(&app, event("a"))]);
    sleep(Duration::from_millis(50)).await;
    assert_eq!(app.send(event("a")).await.code().as_deref(), Some("overloaded"), "two wait for this key");
    running.push(deliver(&app, event("b")));
    sleep(Duration::from_millis(50)).await;
    assert_eq!(app.send(event("b")).await.code().as_deref(), Some("overloaded"), "three wait in all");
    gate.add_permits(2);
    for answer in join_all(running).await {
        assert_eq!(answer.unwrap().status, 200);
    }
    assert!(app.send(event("a")).await.is_replayed());
}

async fn p9_one_caller_never_gets_anothers_outcome(stores: Stores) {
    let layer = IdempotencyLayer::api(&stores.ledger(), caller::authorization());
    let app = App::new(&layer, |_, run| async move { answer(201, format!("run {run}")) });
    let by = |caller: &'static str| {
        let mut request = order("k", "1");
        request.headers_mut().insert("authorization", caller.parse().unwrap());
        request
    };
    assert_eq!(app.send(by("alice")).await.body, "run 1");
    assert_eq!(app.send(by("bob")).await.body, "run 2");
    assert_eq!(app.send(by("alice")).await.body, "run 1");
    assert_eq!(app.send(by("bob")).await.body, "run 2");
    assert_eq!(app.send(order("k", "1")).await.body, "run 3", "the anonymous caller is another");
}

async fn a_claim_whose_answer_was_lost_is_recognised(stores: Stores) {
    let app = App::new(&webhook(&stores.ledger()), |request, _| async move {
        answer(200, attempt(&request).number().to_string())
    });
    stores.fail(Step::Claim, Fault::LoseAnswer, 2);
    let first = app.send(event("e")).await;
    assert_eq!((first.status.as_u16(), &first.body[..], app.runs()), (200, &b"1"[..], 1));
}

async fn a_claim_that_got_no_answer_is_refused_and_given_up(stores: Stores) {
    let app = App::new(&webhook(&stores.ledger()).patience(SHORT * 5), |request, _| async move {
        answer(200, attempt(&request).number().to_string())
    });
    stores.fail(Step::Claim, Fault::LoseAnswer, 3);
    let refused = app.send(event("e")).await;
    assert_eq!((refused.status.as_u16(), refused.code().as_deref()), (503, Some("store_unavailable")));
    stores.fail(Step::Claim, Fault::Hang, 3);
    let started = Instant::now();
    assert_eq!(app.send(event("hung")).await.status, 503);
    assert!(started.elapsed() < Duration::from_millis(500), "{:?}", started.elapsed());
    stores.heal();
    assert_eq!(app.send(event("e")).await.body, "1", "what never ran is not counted");
    assert_eq!(app.runs(), 1);
}

async fn the_waiting_take_over_once_and_are_then_refused(stores: Stores) {
    let app = App::new(&webhook(&stores.ledger()).patience(SHORT * 20), |_, _| async {
        sleep(SHORT).await;
        answer(500, "failed")
    });
    let deliveries: Vec<_> = (0..32).map(|_| deliver(&app, event("e"))).collect();
    let answers: Vec<Answer> = join_all(deliveries).await.into_iter().map(Result::unwrap).collect();
    assert_eq!(app.runs(), 2);
    assert_eq!(answers.iter().filter(|answer| answer.status == 500).count(), 2);
    let refused = |answer: &&Answer| answer.status == 503 && answer.code().as_deref() == Some("attempt_failed");
    assert_eq!(answers.iter().filter(refused).count(), 30);
}

async fn a_finished_key_is_replayed_while_the_process_drains(stores: Stores) {
    let ledger = stores.ledger();
    let (app, gate) = gated(&webhook(&ledger));
    gate.add_permits(1);
    app.send(event("done")).await;
    let running = deliver(&app, event("a"));
    until(async || app.runs() == 2).await;
    let still = ledger.drain(SHORT).await.unwrap_err();
    assert_eq!(still.attempts, 1);
    assert!(app.send(event("done")).await.is_replayed());
    assert_eq!(app.send(event("b")).await.code().as_deref(), Some("shutting_down"));
    gate.add_permits(1);
    ledger.drain(SHORT * 10).await.unwrap();
    assert_eq!(running.await.unwrap().body, "run 2");
}
