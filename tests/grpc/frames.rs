//! Clients that frame their messages as no client should. They are refused or served as tonic would serve them; whatever
//! they do, the server goes on.

use bytes::Bytes;
use http::{HeaderMap, Request};
use http_body_util::{BodyExt as _, StreamBody};
use hyper::body::Frame;
use hyper_util::client::legacy::Client;
use hyper_util::rt::TokioExecutor;
use prost::Message as _;
use tower_idempotency::{IdempotencyLayer, OnBadKey, key};

use crate::bank::{CHARGE, Served, api, charge, ledger};

/// A call as its bytes, in frames of 16 KiB; what came of it, from wherever it says so.
async fn code(served: &Served, key: &str, body: Vec<u8>) -> String {
    let frames = body.chunks(16 << 10).map(|chunk| Ok::<_, std::io::Error>(Frame::data(Bytes::copy_from_slice(chunk))));
    let frames: Vec<_> = frames.collect();
    let client = Client::builder(TokioExecutor::new()).http2_only(true).build_http();
    let request = Request::post(format!("http://{}{CHARGE}", served.addr))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .header("idempotency-key", key)
        .body(StreamBody::new(futures_util::stream::iter(frames)))
        .unwrap();
    let (head, body) = client.request(request).await.unwrap().into_parts();
    assert_eq!(head.status, 200);
    let trailers = body.collect().await.unwrap().trailers().cloned().unwrap_or_default();
    let status = |headers: &HeaderMap| headers.get("grpc-status").map(|status| status.to_str().unwrap().to_owned());
    status(&head.headers).or_else(|| status(&trailers)).expect("a status")
}

fn framed(flag: u8, announced: u32, message: &[u8]) -> Vec<u8> {
    [&[flag][..], &announced.to_be_bytes(), message].concat()
}

fn odd_frames() -> Vec<(&'static str, Vec<u8>)> {
    let message = charge("", 500).into_inner().encode_to_vec();
    let len = u32::try_from(message.len()).unwrap();
    let one = framed(0, len, &message);
    vec![
        ("nothing", Vec::new()),
        ("half a prefix", one[..3].to_vec()),
        ("a prefix alone", one[..5].to_vec()),
        ("truncated", one[..one.len() - 1].to_vec()),
        ("announced too short", framed(0, len - 1, &message)),
        ("announced too long", framed(0, len + 1, &message)),
        ("two messages", [&one[..], &one].concat()),
        ("100 MiB announced", framed(0, 100 << 20, &message)),
        ("4 GiB announced", framed(0, u32::MAX, &message)),
        ("an unknown flag", framed(7, len, &message)),
        ("compressed, it says", framed(1, len, &message)),
        ("no protobuf", framed(0, 3, b"\xff\xff\xff")),
    ]
}

async fn goes_on(served: &Served) {
    let runs = served.bank.runs();
    let mut client = served.client().await;
    for _ in 0..2 {
        client.charge(charge("sound", 500)).await.unwrap();
    }
    assert!(served.bank.runs() <= runs + 1);
}

async fn tries(layer: IdempotencyLayer) -> Vec<(&'static str, String)> {
    let served = Served::by(layer).await;
    let mut codes = Vec::new();
    for (number, (what, body)) in odd_frames().into_iter().enumerate() {
        codes.push((what, code(&served, &number.to_string(), body).await));
        goes_on(&served).await;
    }
    codes
}

#[tokio::test]
async fn what_tonic_makes_of_it_stands_where_the_key_is_in_the_head() {
    for (what, code) in tries(api(&ledger())).await {
        // Of two messages it reads one.
        assert_eq!(code == "0", what == "two messages", "{what}: {code}");
    }
}

#[tokio::test]
async fn what_is_not_one_message_is_refused_where_the_key_is_in_it() {
    let layer = api(&ledger()).key(key::protobuf([1])).missing_key(OnBadKey::Refuse);
    for (what, code) in tries(layer).await {
        assert_eq!(code, "3", "{what}");
    }
}

#[tokio::test]
async fn what_is_too_large_is_refused_with_no_more_of_it_kept_than_may_be() {
    let served = Served::by(api(&ledger()).max_request_body(100 << 10)).await;
    let message = framed(0, 3 << 20, &vec![0; 3 << 20]);
    assert_eq!(code(&served, "large", message).await, "8");
    assert_eq!(served.bank.runs(), 0);
    goes_on(&served).await;
}
