//! Responses and clients that are not as the protocol has them. They are tried on the layer alone: tonic would not say such
//! things.

use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Request, Response};
use http_body::Frame;
use http_body_util::{BodyExt as _, Full};
use hyper_util::client::legacy::Client;
use hyper_util::rt::TokioExecutor;
use prost::Message as _;
use tonic::Status;
use tower_idempotency::{Attempt, IdempotencyLayer, grpc};

use crate::bank::{CHARGE, Served, api, charge, ledger, webhook};
use crate::common::app::{self, App, Incoming, chunk, frames};

type Headers = &'static [(&'static str, &'static str)];

fn call() -> Request<app::Body> {
    let request = Request::post(CHARGE).header("content-type", "application/grpc").header("idempotency-key", "k");
    request.body(app::body("\0\0\0\0\0")).unwrap()
}

fn headers(headers: Headers) -> HeaderMap {
    let mut map = HeaderMap::new();
    for (name, value) in headers {
        map.append(HeaderName::from_static(name), HeaderValue::from_static(value));
    }
    map
}

/// Always the same response, with what stands in its head and in its trailers.
fn saying(layer: &IdempotencyLayer, status: u16, head: Headers, trailers: Headers) -> App {
    App::new(layer, move |_: Incoming, _| async move {
        let body = frames(vec![chunk("\0\0\0\0\0"), Ok(Frame::trailers(headers(trailers)))]);
        let mut response = Response::new(body);
        *response.status_mut() = status.try_into()?;
        *response.headers_mut() = headers(head);
        Ok(response)
    })
}

#[tokio::test(start_paused = true)]
async fn what_does_not_say_that_it_went_well_runs_again() {
    const GRPC: (&str, &str) = ("content-type", "application/grpc");
    const EVENTS: (&str, &str) = ("content-type", "text/event-stream");
    let cases: [(u16, Headers, Headers); 11] = [
        (200, &[GRPC], &[]),
        (200, &[GRPC], &[("grpc-status", "14")]),
        (200, &[GRPC], &[("grpc-status", "zero")]),
        (200, &[GRPC], &[("grpc-status", "0"), ("grpc-status", "14")]),
        (200, &[GRPC, ("grpc-status", "14")], &[]),
        (200, &[GRPC, ("grpc-status", "0")], &[("grpc-status", "14")]),
        (200, &[EVENTS], &[("grpc-status", "14")]),
        (401, &[GRPC], &[("grpc-status", "0")]),
        (503, &[GRPC, ("grpc-status", "0")], &[]),
        (503, &[GRPC], &[("grpc-status", "0")]),
        (204, &[GRPC], &[("grpc-status", "0")]),
    ];
    for (status, head, trailers) in cases {
        for layer in [api(&ledger()), webhook(&ledger()), webhook(&ledger()).max_kept_body(3)] {
            let app = saying(&layer, status, head, trailers);
            app.send(call()).await;
            app.send(call()).await;
            assert_eq!(app.runs(), 2, "{status} {head:?} {trailers:?}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_status_that_is_said_twice_is_said() {
    for layer in [api(&ledger()), webhook(&ledger())] {
        let head = &[("content-type", "application/grpc")];
        let app = saying(&layer, 200, head, &[("grpc-status", "0"), ("grpc-status", "0")]);
        app.send(call()).await;
        assert!(app.send(call()).await.is_replayed());
        assert_eq!(app.runs(), 1);
    }
}

#[tokio::test(start_paused = true)]
async fn what_a_forger_can_bring_about_is_remembered_for_a_lease() {
    let lease = Duration::from_millis(60);
    let cases: [(u16, Headers, u32); 5] = [
        (401, &[], 1),
        (200, &[("grpc-status", "16")], 1),
        (200, &[("grpc-status", "13")], 2),
        (200, &[("grpc-status", "1")], 2),
        (503, &[], 2),
    ];
    for (status, head, attempt) in cases {
        let attempts = move |request: &Incoming| request.extensions().get::<Attempt>().unwrap().number();
        let app = App::new(&webhook(&ledger()).lease(lease), move |request: Incoming, _| async move {
            let mut response = Response::new(app::body(""));
            *response.status_mut() = status.try_into()?;
            *response.headers_mut() = headers(head);
            response.headers_mut().insert("attempt", attempts(&request).into());
            Ok(response)
        });
        app.send(call()).await;
        tokio::time::sleep(lease * 2).await;
        let again = app.send(call()).await;
        assert_eq!(again.headers["attempt"], attempt.to_string(), "{status} {head:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_kept_failure_is_acknowledged_to_nobody() {
    let keeps = |code| matches!(code, grpc::Code::Ok | grpc::Code::AlreadyExists);
    for (max, told) in [(1000, "6"), (3, "6")] {
        let layer = webhook(&ledger()).keep_codes(keeps).max_kept_body(max);
        let layer = layer.fingerprint(tower_idempotency::fingerprint::ignored());
        let app = saying(&layer, 200, &[("content-type", "application/grpc")], &[("grpc-status", "6")]);
        app.send(call()).await;
        let again = app.send(call()).await;
        let status = again.trailers.as_ref().unwrap_or(&again.headers)["grpc-status"].clone();
        assert_eq!(status, told);
        let by_http = Request::post(CHARGE).header("idempotency-key", "k").body(app::body("")).unwrap();
        assert_eq!(app.send(by_http).await.code().unwrap(), "outcome_not_retained");
        assert_eq!(app.runs(), 1);
    }
}

#[tokio::test(start_paused = true)]
async fn a_sender_of_webhooks_is_told_by_either_protocol_that_it_went_well() {
    let by_http = |key: &str| Request::post(CHARGE).header("idempotency-key", key).body(app::body("")).unwrap();
    let by_grpc = |key: &'static str| {
        let mut call = call();
        call.headers_mut().insert("idempotency-key", HeaderValue::from_static(key));
        call
    };
    let ok: Headers = &[("grpc-status", "0")];
    for max in [1000, 3] {
        let app = saying(&webhook(&ledger()).max_kept_body(max), 200, &[("content-type", "application/grpc")], ok);
        app.send(by_grpc("a")).await;
        let told = app.send(by_http("a")).await;
        assert_eq!((told.status.as_u16(), told.body.len(), told.headers.get("content-type")), (200, 0, None));
        let app = saying(&webhook(&ledger()).max_kept_body(max), 200, &[], &[]);
        app.send(by_http("b")).await;
        let told = app.send(by_grpc("b")).await;
        assert_eq!((told.headers["content-type"].as_bytes(), &told.body[..]), (&b"application/grpc"[..], &[0; 5][..]));
        assert_eq!(told.trailers.unwrap()["grpc-status"], "0");
    }
}

/// tonic serves a call whatever its `Content-Type` is. The layer takes it for plain HTTP, but sees from the answer what it was.
#[tokio::test]
async fn a_call_that_does_not_say_what_it_is_is_judged_as_one() {
    for content_type in [None, Some("application/octet-stream")] {
        for layer in [api(&ledger()), webhook(&ledger())] {
            let layer = layer.fingerprint(tower_idempotency::fingerprint::ignored());
            let served = Served::by(layer).await;
            served.bank.plan([Err(Status::unavailable("not now"))]);
            let message = charge("", 500).into_inner().encode_to_vec();
            let framed = [&[0][..], &u32::try_from(message.len()).unwrap().to_be_bytes(), &message].concat();
            let mut request = Request::post(format!("http://{}{CHARGE}", served.addr)).header("idempotency-key", "k");
            if let Some(content_type) = content_type {
                request = request.header("content-type", content_type);
            }
            let client = Client::builder(TokioExecutor::new()).http2_only(true).build_http();
            let response = client.request(request.body(Full::new(Bytes::from(framed))).unwrap()).await.unwrap();
            assert_eq!(response.headers()["grpc-status"], "14");
            response.into_body().collect().await.unwrap();
            let mut client = served.client().await;
            assert_eq!(client.charge(charge("k", 500)).await.unwrap().get_ref().number, 2);
        }
    }
}
