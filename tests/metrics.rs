//! What is counted, timed and shown of each request. A recorder is its test's own: all tasks of a test run on its thread.

#![allow(clippy::expect_used, clippy::unwrap_used, reason = "a test panics where it fails")]

mod common;

use std::panic::AssertUnwindSafe;
use std::time::Duration;

use futures_util::FutureExt as _;
use futures_util::future::join_all;
use http::Request;
use metrics_exporter_prometheus::PrometheusHandle;
use tokio::time::{sleep, timeout};
use tower_idempotency::key::{header, json};
use tower_idempotency::{IdempotencyLayer, Ledger, MemoryStore, OnOtherPayload, OnStoreError, caller};

use common::app::{App, answer, body, event, order};
use common::metrics::{Metrics, recorder};
use common::stores::{Fault, Step, Stores};

/// Runs with a recorder, and returns what it has recorded.
async fn counting(work: impl AsyncFnOnce(&PrometheusHandle)) -> Metrics {
    let recorder = recorder();
    let _guard = metrics::set_default_local_recorder(&recorder);
    let handle = recorder.handle();
    work(&handle).await;
    // Until what the attempts have left to do is done.
    sleep(Duration::from_secs(60)).await;
    Metrics::parse(&handle.render())
}

fn now(handle: &PrometheusHandle) -> Metrics {
    Metrics::parse(&handle.render())
}

/// How the requests have ended, as `contract/outcome/reason`, and how many did so.
fn requests(metrics: &Metrics) -> Vec<(String, f64)> {
    let label = |series: &str, name: &str| {
        series.split_once(&format!("{name}=\"")).unwrap().1.split_once('"').unwrap().0.to_owned()
    };
    let ends = metrics.of("idempotency_requests_total");
    let mut ends: Vec<_> = ends
        .map(|(series, count)| (["contract", "outcome", "reason"].map(|name| label(series, name)).join("/"), count))
        .collect();
    ends.sort_by(|a, b| a.0.cmp(&b.0));
    ends
}

#[tokio::test(start_paused = true)]
async fn each_request_is_counted_once_by_how_it_ended() {
    let stores = Stores::memory();
    let ledger = stores.ledger();
    let layer = IdempotencyLayer::webhook(&ledger, header("X-Id").or(json("$.id"))).max_request_body(1000);
    let app = App::new(&layer, |request, run| async move {
        match request.uri().path() {
            "/panic" => panic!("as asked"),
            "/error" => Err("as asked".into()),
            "/fail" => answer(500, "failed"),
            "/slow" => {
                sleep(Duration::from_secs(5)).await;
                answer(200, "slow")
            }
            "/large" => answer(200, "x".repeat(2 << 20)),
            _ => answer(200, format!("run {run}")),
        }
    });
    let api = IdempotencyLayer::api(&ledger, caller::shared());
    let api = App::new(&api, |_, _| async { answer(201, "ordered") });
    let at = |path: &str| Request::post(path).header("x-id", "e").body(body("{}")).unwrap();
    let plain = |text: String| Request::post("/").body(body(text)).unwrap();
    let metrics = counting(async |_| {
        app.send(at("/")).await;
        app.send(at("/")).await;
        app.send(at("/fail")).await;
        let _ = app.call(at("/error")).await;
        let _ = AssertUnwindSafe(app.call(at("/panic"))).catch_unwind().await;
        app.send(at("/large")).await;
        app.send(plain("{}".to_owned())).await;
        app.send(plain("not json".to_owned())).await;
        app.send(plain("x".repeat(2000))).await;
        app.send(Request::options("/").body(body("")).unwrap()).await;
        join_all([app.send(at("/slow")), app.send(at("/slow"))]).await;
        sleep(Duration::from_secs(5)).await;
        // Its run is counted when it ends, the duplicate of it when its client leaves.
        let slow = || Request::post("/slow").header("x-id", "left").body(body("{}")).unwrap();
        let _ = timeout(Duration::from_secs(1), app.send(slow())).await;
        let _ = timeout(Duration::from_secs(1), app.send(slow())).await;
        sleep(Duration::from_secs(5)).await;
        stores.fail(Step::Claim, Fault::LoseRequest, 3);
        app.send(event("other")).await;
        stores.fail(Step::Complete, Fault::LoseRequest, u32::MAX);
        app.send(event("unstored")).await;
        sleep(Duration::from_secs(600)).await;
        stores.heal();
        api.send(order("o", "payload")).await;
        api.send(order("o", "payload")).await;
        api.send(order("o", "another payload")).await;
        api.send(Request::post("/orders").body(body("no key")).unwrap()).await;
    })
    .await;
    let expected = [
        ("api/executed/kept", 1.0),
        ("api/passed_through/key_missing", 1.0),
        ("api/refused/key_reused", 1.0),
        ("api/replayed/", 1.0),
        ("webhook/abandoned/", 1.0),
        ("webhook/executed/error", 1.0),
        ("webhook/executed/kept", 3.0),
        ("webhook/executed/panicked", 1.0),
        ("webhook/executed/released", 1.0),
        ("webhook/executed/tombstone", 1.0),
        ("webhook/executed/unstored", 1.0),
        ("webhook/passed_through/key_malformed", 1.0),
        ("webhook/passed_through/key_missing", 1.0),
        ("webhook/passed_through/not_applicable", 1.0),
        ("webhook/refused/body_too_large", 1.0),
        ("webhook/refused/running", 1.0),
        ("webhook/refused/store_unavailable", 1.0),
        ("webhook/replayed/", 1.0),
    ];
    assert_eq!(requests(&metrics), expected.map(|(end, count)| (end.to_owned(), count)));

    let count = |name: &str, labels: &str| metrics.get(&format!("idempotency_{name}_seconds_count{{{labels}}}"));
    assert_eq!(count("run", r#"contract="webhook""#), 8.0, "all that were executed, also who failed");
    assert_eq!(count("claim", r#"contract="webhook",result="error""#), 1.0, "three sendings are one way to a claim");
    assert_eq!(count("claim", r#"contract="webhook",result="acquired""#), 8.0);
    assert_eq!(count("complete", r#"contract="webhook",result="stored""#), 4.0);
    assert_eq!(count("complete", r#"contract="webhook",result="given_up""#), 1.0);
    assert_eq!(count("wait", r#"contract="webhook",outcome="refused""#), 1.0);
    assert_eq!(count("wait", r#"contract="webhook",outcome="abandoned""#), 1.0);
    assert_eq!(metrics.sum("idempotency_wait_seconds_count"), 2.0, "who did not wait is not in it");
}

#[tokio::test(start_paused = true)]
async fn durations_are_seconds_of_what_they_say() {
    let stores = Stores::memory();
    let layer = IdempotencyLayer::webhook(&stores.ledger(), header("X-Id")).patience(Duration::from_secs(60));
    let app = App::new(&layer, |_, _| async {
        sleep(Duration::from_secs(7)).await;
        answer(200, "done")
    });
    let metrics = counting(async |_| {
        stores.fail(Step::Complete, Fault::Hang, 2);
        let late = async {
            sleep(Duration::from_secs(2)).await;
            app.send(event("e")).await
        };
        futures_util::join!(app.send(event("e")), late);
    })
    .await;
    let seconds = |name: &str, labels: &str| metrics.get(&format!("idempotency_{name}_seconds_sum{{{labels}}}"));
    assert_eq!(seconds("run", r#"contract="webhook""#), 7.0);
    // Two sendings that wait in vain for 250 ms each, and the pauses after them.
    let completed = seconds("complete", r#"contract="webhook",result="stored""#);
    assert!((0.5..0.6).contains(&completed), "{completed}");
    let waited = seconds("wait", r#"contract="webhook",outcome="replayed""#);
    assert!((waited - 5.0 - completed).abs() < 0.01, "{waited}");
}

#[tokio::test(start_paused = true)]
async fn gauges_add_up_over_ledgers_and_end_at_zero() {
    let running = r#"idempotency_attempts{state="running"}"#;
    let overdue = r#"idempotency_attempts{state="overdue"}"#;
    let ledgers = [(); 2].map(|()| Ledger::new(MemoryStore::new()).max_overdue(1));
    let apps = ledgers.each_ref().map(|ledger| {
        let layer = IdempotencyLayer::webhook(ledger, header("X-Id")).max_attempt(Duration::from_secs(10));
        App::new(&layer.patience(Duration::from_secs(5)), |_, _| async {
            sleep(Duration::from_secs(20)).await;
            answer(200, "done")
        })
    });
    let metrics = counting(async |handle| {
        for (app, ids) in apps.iter().zip([["a", "a", "b"], ["a", "a", "a"]]) {
            for id in ids {
                tokio::spawn(app.send(event(id)));
            }
        }
        sleep(Duration::from_secs(1)).await;
        let shown = now(handle);
        assert_eq!([running, overdue, "idempotency_waiters"].map(|gauge| shown.get(gauge)), [3.0, 0.0, 3.0]);
        assert_eq!(ledgers.each_ref().map(|ledger| (ledger.in_flight(), ledger.waiting())), [(2, 1), (1, 2)]);
        sleep(Duration::from_secs(10)).await;
        let shown = now(handle);
        let shown = [running, overdue, "idempotency_waiters"].map(|gauge| shown.get(gauge));
        assert_eq!(shown, [1.0, 2.0, 0.0], "one more is overdue than may be, and counts as running");
        assert_eq!(ledgers.each_ref().map(Ledger::in_flight), [1, 0]);
    })
    .await;
    for gauge in [running, overdue, "idempotency_waiters", "idempotency_claims_given_up"] {
        assert_eq!(metrics.get(gauge), 0.0, "{gauge}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_claim_that_is_given_up_is_shown_until_it_is_released() {
    let stores = Stores::memory();
    let app = App::new(&IdempotencyLayer::webhook(&stores.ledger(), header("X-Id")), |_, _| async { answer(200, "") });
    let metrics = counting(async |handle| {
        stores.fail(Step::Claim, Fault::LoseAnswer, 3);
        stores.fail(Step::Release, Fault::LoseRequest, 3);
        app.send(event("e")).await;
        assert_eq!(now(handle).get("idempotency_claims_given_up"), 1.0);
    })
    .await;
    assert_eq!(metrics.get("idempotency_claims_given_up"), 0.0);
}

#[tokio::test(start_paused = true)]
async fn a_recorder_that_comes_late_sees_no_gauge_below_zero() {
    let layer = IdempotencyLayer::webhook(&Ledger::new(MemoryStore::new()), header("X-Id"));
    let app = App::new(&layer, |_, _| async {
        sleep(Duration::from_secs(1)).await;
        answer(200, "")
    });
    let early = tokio::spawn(app.send(event("early")));
    sleep(Duration::from_millis(500)).await;
    let metrics = counting(async |_| {
        early.await.unwrap();
        app.send(event("late")).await;
    })
    .await;
    assert_eq!(metrics.get(r#"idempotency_attempts{state="running"}"#), 0.0);
    assert_eq!(metrics.sum("idempotency_requests_total"), 2.0);
}

#[tokio::test(start_paused = true)]
async fn a_duplicate_that_is_bypassed_waits_no_longer() {
    let stores = Stores::memory();
    let ledger = stores.ledger();
    let layer = IdempotencyLayer::webhook(&ledger, header("X-Id")).on_store_error(OnStoreError::Bypass);
    let app = App::new(&layer, |_, _| async {
        sleep(Duration::from_secs(10)).await;
        answer(200, "")
    });
    stores.fail(Step::Claim, Fault::Hang, 3);
    let all = join_all([app.send(event("e")), app.send(event("e"))]);
    let look = async {
        sleep(Duration::from_millis(100)).await;
        assert_eq!(ledger.waiting(), 1);
        sleep(Duration::from_secs(5)).await;
        assert_eq!((app.runs(), ledger.waiting()), (2, 0));
    };
    futures_util::join!(all, look);
}

#[tokio::test(start_paused = true)]
async fn p9_no_key_path_header_or_body_is_a_label() {
    let stores = Stores::memory();
    let ledger = stores.ledger();
    let api = IdempotencyLayer::api(&ledger, caller::authorization());
    let api = App::new(&api, |_, run| async move {
        if run == 1 { Err("an error of bob".into()) } else { answer(201, "body-of-bob") }
    });
    let webhook = IdempotencyLayer::webhook(&ledger, json("$.id")).other_payload(OnOtherPayload::Replay);
    let webhook = App::new(&webhook, |_, _| async { answer(200, "body-of-bob") });
    let request = |payload| {
        let mut request = order("alice@example.com", payload);
        request.headers_mut().insert("authorization", "Bearer secret-of-bob".parse().unwrap());
        request
    };
    let page = {
        let recorder = recorder();
        let _guard = metrics::set_default_local_recorder(&recorder);
        let _ = api.call(request("payload-1")).await;
        api.send(request("payload-1")).await;
        api.send(request("payload-1")).await;
        api.send(request("payload-2")).await;
        for id in [r#"{"id":"alice@example.com"}"#, r#"{"id":"payload-3"}"#, r#"{"id":["#] {
            webhook.send(Request::post("/path-of-bob").body(body(id)).unwrap()).await;
        }
        sleep(Duration::from_secs(60)).await;
        recorder.handle().render()
    };
    assert_eq!(Metrics::parse(&page).sum("idempotency_requests_total"), 7.0);
    for secret in ["alice", "secret", "payload-", "bob", "/orders", "path-of"] {
        assert!(!page.contains(secret), "{secret} is in {page}");
    }
}
