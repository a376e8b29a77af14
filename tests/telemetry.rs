//! One event per request, and nothing in it that is nobody's business.

#![allow(clippy::expect_used, clippy::unwrap_used, reason = "a test panics where it fails")]

mod common;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures_util::FutureExt as _;
use futures_util::future::join_all;
use http::Request;
use tokio::time::sleep;
use tower::buffer::Buffer;
use tower::{Layer as _, ServiceExt as _, service_fn};
use tower_idempotency::key::{header, json};
use tower_idempotency::{IdempotencyLayer, caller};
use tracing::field::{Field, Visit};
use tracing::instrument::{Instrument as _, WithSubscriber as _};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Metadata, Subscriber};

use common::app::{App, Incoming, answer, body, event, order};
use common::stores::{Fault, Step, Stores};

/// Everything that was said.
#[derive(Clone, Default)]
struct Ear(Arc<Mutex<Vec<BTreeMap<String, String>>>>);

#[derive(Default)]
struct Fields(BTreeMap<String, String>);

impl Subscriber for Ear {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn event(&self, event: &Event<'_>) {
        let mut fields = Fields::default();
        fields.0.insert("target".to_owned(), event.metadata().target().to_owned());
        event.record(&mut fields);
        self.0.lock().unwrap().push(fields.0);
    }

    fn enter(&self, _: &Id) {}

    fn exit(&self, _: &Id) {}
}

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.0.insert(field.name().to_owned(), format!("{value:?}"));
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.0.insert(field.name().to_owned(), value.to_owned());
    }
}

impl Ear {
    /// The outcomes said so far, as `outcome/reason`.
    fn outcomes(&self) -> Vec<String> {
        let events = self.0.lock().unwrap();
        let of_requests = events.iter().filter(|event| event.contains_key("outcome"));
        of_requests.map(|event| format!("{}/{}", event["outcome"], event["reason"])).collect()
    }

    fn has_heard(&self, text: &str) -> bool {
        self.0.lock().unwrap().iter().flat_map(BTreeMap::values).any(|value| value.contains(text))
    }
}

/// Runs under a subscriber that hears everything, also what tasks say.
async fn listening(work: impl AsyncFnOnce()) -> Ear {
    let ear = Ear::default();
    // The attempt's task inherits the subscriber only if it is the thread's.
    let guard = tracing::subscriber::set_default(ear.clone());
    work().with_current_subscriber().await;
    drop(guard);
    ear
}

#[tokio::test(start_paused = true)]
async fn each_request_ends_in_exactly_one_event() {
    let stores = Stores::memory();
    let layer = IdempotencyLayer::webhook(&stores.ledger(), header("X-Id").or(json("$.id"))).max_request_body(1000);
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
    let at = |path: &str| Request::post(path).header("x-id", "e").body(body("{}")).unwrap();
    let plain = |text: String| Request::post("/").body(body(text)).unwrap();
    let ear = listening(async || {
        app.send(at("/")).await;
        app.send(at("/")).await;
        app.send(at("/fail")).await;
        let _ = app.call(at("/error")).await;
        let _ = std::panic::AssertUnwindSafe(app.call(at("/panic"))).catch_unwind().await;
        app.send(at("/large")).await;
        sleep(Duration::from_secs(1)).await;
        app.send(plain("{}".to_owned())).await;
        app.send(plain("not json".to_owned())).await;
        app.send(plain("x".repeat(2000))).await;
        app.send(Request::options("/").body(body("")).unwrap()).await;
        let slow = join_all([app.send(at("/slow")), app.send(at("/slow"))]).await;
        assert_eq!(slow[1].status, 503);
        stores.fail(Step::Claim, Fault::LoseRequest, 3);
        app.send(event("other")).await;
    })
    .await;
    let mut outcomes = ear.outcomes();
    let mut expected = vec![
        "executed/kept",
        "replayed/",
        "executed/released",
        "executed/error",
        "executed/panicked",
        "executed/tombstone",
        "passed_through/key_missing",
        "passed_through/key_malformed",
        "refused/body_too_large",
        "passed_through/not_applicable",
        "refused/running",
        "executed/kept",
        "refused/store_unavailable",
    ];
    outcomes.sort();
    expected.sort_unstable();
    assert_eq!(outcomes, expected);
}

/// Also where its outcome is none that is kept.
#[tokio::test(start_paused = true)]
async fn an_attempt_whose_place_was_taken_says_so() {
    let stores = Stores::memory();
    let layer = || IdempotencyLayer::webhook(&stores.ledger(), header("X-Id")).lease(Duration::from_secs(1));
    for status in [200, 500] {
        let slow = App::new(&layer(), move |_, _| async move {
            sleep(Duration::from_secs(5)).await;
            answer(status, "slow")
        });
        let other = App::new(&layer(), |_, _| async { answer(200, "done") });
        let id = status.to_string();
        let ear = listening(async || {
            stores.fail(Step::Renew, Fault::LoseRequest, u32::MAX);
            let others = async {
                sleep(Duration::from_secs(2)).await;
                other.send(event(&id)).await
            };
            tokio::join!(slow.send(event(&id)), others);
            stores.heal();
        })
        .await;
        assert_eq!(ear.outcomes(), ["executed/kept", "executed/lost"]);
    }
}

#[tokio::test(start_paused = true)]
async fn a_service_that_cannot_be_called_has_not_run() {
    let (full, worker) = Buffer::pair(service_fn(|_: Incoming| async { answer(200, "done") }), 1);
    // Without it the service is never ready again.
    drop(worker);
    let service = IdempotencyLayer::webhook(&Stores::memory().ledger(), header("X-Id")).layer(full);
    let without_key = Request::post("/").body(body("")).unwrap();
    for request in [event("e"), without_key] {
        let service = service.clone();
        let ear = listening(async || assert!(service.oneshot(request).await.is_err())).await;
        assert_eq!(ear.outcomes(), ["refused/inner_not_ready"]);
    }
}

#[tokio::test(start_paused = true)]
async fn a_client_that_leaves_is_heard_of_once() {
    let layer = IdempotencyLayer::webhook(&Stores::memory().ledger(), header("X-Id"));
    let app = App::new(&layer, |_, _| async {
        sleep(Duration::from_secs(5)).await;
        answer(200, "done")
    });
    let ear = listening(async || {
        // The attempt goes on and says how it ended; the duplicate was only waiting.
        let _ = tokio::time::timeout(Duration::from_secs(1), app.send(event("e"))).await;
        let _ = tokio::time::timeout(Duration::from_secs(1), app.send(event("e"))).await;
        sleep(Duration::from_secs(10)).await;
    })
    .await;
    assert_eq!(ear.outcomes(), ["abandoned/", "executed/kept"]);
}

#[tokio::test(start_paused = true)]
async fn p9_no_raw_key_and_no_body_is_said() {
    let stores = Stores::memory();
    let layer = IdempotencyLayer::api(&stores.ledger(), caller::authorization());
    let app =
        App::new(
            &layer,
            |_, run| async move { if run == 1 { Err("an error".into()) } else { answer(201, "body-of-bob") } },
        );
    let request = |payload| {
        let mut request = order("alice@example.com", payload);
        request.headers_mut().insert("authorization", "Bearer secret-of-bob".parse().unwrap());
        request
    };
    let ear = listening(async || {
        let _ = app.call(request("payload-1")).await;
        app.send(request("payload-1")).await;
        app.send(request("payload-1")).await;
        app.send(request("payload-2")).await;
        stores.fail(Step::Claim, Fault::LoseAnswer, 3);
        app.send(request("payload-1")).await;
    })
    .await;
    assert_eq!(ear.outcomes().len(), 5);
    for secret in ["alice", "secret-of-bob", "payload", "body-of-bob"] {
        assert!(!ear.has_heard(secret), "{secret} was said");
    }
}

#[tokio::test(start_paused = true)]
async fn a_refusal_for_the_store_names_its_cause() {
    let stores = Stores::memory();
    let app = App::new(&IdempotencyLayer::webhook(&stores.ledger(), header("X-Id")), |_, _| async { answer(200, "") });
    let ear = listening(async || {
        stores.fail(Step::Claim, Fault::LoseRequest, 3);
        app.send(event("e")).await;
    })
    .await;
    assert!(ear.has_heard("the store did not answer: the request was lost"));
}

#[tokio::test(start_paused = true)]
async fn a_missing_key_is_warned_of_once_per_layer() {
    let layer = IdempotencyLayer::webhook(&Stores::memory().ledger(), header("X-Id"));
    let app = App::new(&layer, |_, _| async { answer(200, "") });
    let ear = listening(async || {
        for _ in 0..5 {
            app.send(Request::post("/").body(body("")).unwrap()).await;
        }
    })
    .await;
    assert_eq!(ear.outcomes().len(), 5);
    assert_eq!(ear.0.lock().unwrap().iter().filter(|event| event.contains_key("message")).count(), 1);
}

/// Whoever serves gRPC and names no method has protected nothing.
#[tokio::test(start_paused = true)]
async fn a_layer_that_knows_of_no_method_warns_of_the_first_call() {
    let base = IdempotencyLayer::webhook(&Stores::memory().ledger(), header("X-Id"));
    for (layer, warnings) in [(base.clone(), 1), (base.clone().unary("/a/B"), 0), (base.enabled(false), 0)] {
        let app = App::new(&layer, |_, _| async { answer(200, "") });
        let ear = listening(async || {
            for _ in 0..3 {
                let call = Request::post("/a/C").header("content-type", "application/grpc");
                app.send(call.body(body("")).unwrap()).await;
            }
        })
        .await;
        assert_eq!(ear.0.lock().unwrap().iter().filter(|event| event.contains_key("message")).count(), warnings);
    }
}

/// A layer that is made of another has requests of its own.
#[tokio::test(start_paused = true)]
async fn layers_made_of_one_warn_each_for_itself() {
    let base = IdempotencyLayer::webhook(&Stores::memory().ledger(), header("X-Id"));
    let layers = [base.clone().key(header("X-Order")), base.clone().key(header("X-Invoice")), base];
    let apps = layers.map(|layer| App::new(&layer, |_, _| async { answer(200, "") }));
    let ear = listening(async || {
        for app in apps.iter().chain(&apps) {
            app.send(Request::post("/").body(body("")).unwrap()).await;
        }
    })
    .await;
    assert_eq!(ear.0.lock().unwrap().iter().filter(|event| event.contains_key("message")).count(), 3);
}

#[tokio::test]
async fn an_attempt_runs_in_the_span_of_its_caller() {
    let _guard = tracing::subscriber::set_default(tracing_subscriber::registry());
    let layer = IdempotencyLayer::webhook(&Stores::memory().ledger(), header("X-Id"));
    let app = App::new(&layer, |_, _| async {
        answer(200, tracing::Span::current().metadata().map_or("none", Metadata::name))
    });
    let span = tracing::info_span!("of the caller");
    assert_eq!(app.send(event("e")).instrument(span).await.body, "of the caller");
}
