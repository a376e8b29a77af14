//! What has to hold for inputs of any bytes. Each of these panics where it does not.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderValue, Request, Response, request};
use http_body_util::{BodyExt as _, Full};
use hyper::server::conn::http1;
use hyper_util::rt::TokioIo;
use hyper_util::service::TowerToHyperService;
use prost::Message as _;
use serde::de::IgnoredAny;
use serde_json::value::RawValue;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, duplex};
use tokio::runtime::{Builder, Runtime};
use tokio::time::timeout;
use tower::{Layer as _, Service as _, service_fn};
use tower_idempotency::key::{HeaderSyntax, Json, Key, form, header, headers, json, protobuf, query};
use tower_idempotency::store::{Claim, Claimed, Store as _};
use tower_idempotency::{Attempt, IdempotencyLayer, Ledger, MemoryStore, RequestBody, caller, fingerprint};

/// No input takes longer to be answered than the patience of all parts together.
const LONG: Duration = Duration::from_secs(600);

fn runtime() -> Runtime {
    Builder::new_current_thread().enable_time().start_paused(true).build().unwrap()
}

fn ledger() -> Ledger {
    Ledger::new(MemoryStore::new())
}

fn head(request: request::Builder) -> request::Parts {
    request.body(()).unwrap().into_parts().0
}

/// What a store returns as the record of an event, which nobody but this crate has written, or so one hopes.
pub(crate) fn record(input: &[u8]) {
    let store = MemoryStore::new();
    let ledger = Ledger::new(store.clone());
    let layers = [
        IdempotencyLayer::webhook(&ledger, header("x-id")),
        IdempotencyLayer::api(&ledger, caller::shared()).key(header("x-id")),
    ];
    for layer in layers {
        runtime().block_on(async {
            let request = || Request::post("/").header("x-id", "event");
            let key = layer.key_of(&head(request()), &Bytes::new()).expect("a key");
            let mut claim = Claim::new(LONG, LONG);
            let Claimed::Acquired { attempt } = store.claim(&key, &claim).await.unwrap() else { panic!("a new key") };
            claim.attempt = attempt;
            store.complete(&key, &claim, Bytes::copy_from_slice(input)).await.unwrap();
            let handler = |_: Request<RequestBody<Full<Bytes>>>| async {
                panic!("it was seen, and was run") as Result<Response<Full<Bytes>>, Infallible>
            };
            // The record has no fingerprint, which is another payload to an api.
            let mut service = layer.fingerprint(fingerprint::ignored()).layer(service_fn(handler));
            let response = service.call(request().body(Full::default()).unwrap()).await.unwrap();
            let (head, body) = response.into_parts();
            let is_replay = head.headers.get("idempotent-replayed").is_some_and(|replayed| replayed == "true");
            let status = head.status.as_u16();
            assert!(is_replay || [409, 503].contains(&status), "{head:?}");
            // Its length is what is said of it.
            let length = head.headers.get("content-length").map(|length| length.to_str().unwrap().parse::<usize>());
            let body = body.collect().await.unwrap().to_bytes();
            assert!(length.is_none_or(|length| length == Ok(body.len())), "{head:?} has {} bytes", body.len());
        });
    }
}

/// A path in the first line, and a body.
pub(crate) fn json_key(input: &[u8]) {
    let (path, body) = input.split_at(input.iter().position(|byte| *byte == b'\n').unwrap_or(input.len()));
    let body = Bytes::copy_from_slice(body);
    let Some(found) = str::from_utf8(path).ok().and_then(|path| Json::parse(path).ok()) else { return };
    let layer = IdempotencyLayer::webhook(&ledger(), found);
    let key = layer.key_of(&head(Request::post("/")), &body);
    // What it skips it does not check as closely as a parser that keeps it, so it may find a key where that fails.
    let (Some(key), Ok(body)) = (key, serde_json::from_slice::<&RawValue>(&body)) else { return };
    let Some(scalars) = scalars(body) else { return };
    let first = IdempotencyLayer::webhook(&ledger(), json("$[0]"));
    let is_key = |scalar: &&RawValue| {
        first.key_of(&head(Request::post("/")), &Bytes::from(format!("[{}]", scalar.get()))) == Some(key)
    };
    assert!(scalars.iter().any(is_key), "the key is none of {scalars:?}");
}

/// All scalars of a value, nothing where a parser does not get that far.
fn scalars(value: &RawValue) -> Option<Vec<&RawValue>> {
    let items: Vec<&RawValue> = match value.get().as_bytes() {
        [b'[', ..] => serde_json::from_str(value.get()).ok()?,
        [b'{', ..] => {
            let members: BTreeMap<Cow<'_, str>, &RawValue> = serde_json::from_str(value.get()).ok()?;
            members.into_values().collect()
        }
        _ => return Some(vec![value]),
    };
    let scalars: Option<Vec<Vec<_>>> = items.into_iter().map(scalars).collect();
    scalars.map(|scalars| scalars.concat())
}

/// A body of a call or of a plain request: to a parser of another make it is a message with the same field, or no message.
pub(crate) fn protobuf_key(input: &[u8]) {
    let layer = IdempotencyLayer::webhook(&ledger(), protobuf([1])).unary("/a/B");
    let key = |head: request::Builder, body: &[u8]| layer.key_of(&self::head(head), &Bytes::copy_from_slice(body));
    let plain = || Request::post("/a/B").header("content-type", "application/x-protobuf");
    let call = || Request::post("/a/B").header("content-type", "application/grpc").header("grpc-encoding", "gzip");
    let of_message = |message: &[u8]| {
        let found = key(plain(), message);
        let decoded = First::decode(message);
        match (&found, decoded) {
            // The parser takes the last of two that differ, knows that this field is a string, and may be stricter in what it skips.
            (Some(_), Ok(First { id })) if !id.is_empty() => {
                assert_eq!(found, key(plain(), &First { id }.encode_to_vec()), "another id than a parser finds");
            }
            (None, Ok(First { id })) if message == First { id: id.clone() }.encode_to_vec() => {
                assert_eq!(id, "", "a message that a parser has written");
            }
            _ => {}
        }
        found
    };
    of_message(input);
    let framed = |flag: u8, message: &[u8]| {
        [&[flag][..], &u32::try_from(message.len()).unwrap().to_be_bytes(), message].concat()
    };
    assert_eq!(key(call(), &framed(0, input)), of_message(input), "a call is its message");
    // As it came, and as something compressed.
    key(call(), input);
    key(call(), &framed(1, input));
    let _ = IdempotencyLayer::api(&ledger(), caller::shared()).unary_methods_of(input);
}

#[derive(Clone, Eq, PartialEq, prost::Message)]
struct First {
    #[prost(string, tag = "1")]
    id: String,
}

/// The lines of two headers, one after the other.
pub(crate) fn header_key(input: &[u8]) {
    let mut lines = Request::post("/");
    let mut values = Vec::new();
    for (line, name) in input.split(|byte| *byte == b'\n').zip(["a", "b"].into_iter().cycle()).take(8) {
        let Ok(value) = HeaderValue::from_bytes(line) else { return };
        values.push(value.clone());
        lines = lines.header(name, value);
    }
    let head = head(lines);
    let key = |syntax| -> Option<Key> {
        let layer = IdempotencyLayer::webhook(&ledger(), headers(&["a", "b"])).header_syntax(syntax);
        layer.key_of(&head, &Bytes::new())
    };
    let opaque = key(HeaderSyntax::Opaque { max_len: 1024 });
    let visible = key(HeaderSyntax::Visible { max_len: 255 });
    let structured = key(HeaderSyntax::StructuredString { max_len: 255 });
    let filled: Vec<_> = values.iter().filter(|value| !value.is_empty()).collect();
    let agree = filled.windows(2).all(|pair| pair[0] == pair[1]);
    let fits = filled.iter().all(|value| value.len() <= 1024);
    assert_eq!(opaque.is_some(), !filled.is_empty() && agree && fits, "any bytes are an opaque key: {values:?}");
    if let Some(structured) = structured {
        assert!(values.iter().all(|value| value.as_bytes().trim_ascii_start().starts_with(b"\"")), "{values:?}");
        assert!(visible.is_none_or(|visible| visible == structured), "quoted is bare: {values:?}");
    }
    if visible.is_some() {
        let is_text = |value: &HeaderValue| value.as_bytes().iter().all(|byte| matches!(byte, b' '..=b'~' | b'\t'));
        assert!(values.iter().all(is_text), "{values:?}");
    }
}

/// A payload that comes again: as it was, and with white space around it.
pub(crate) fn payload(input: &[u8]) {
    let as_json = fingerprint::json().except(&["$.sent_at", "$.items[-1]"]);
    let is_json = serde_json::from_slice::<IgnoredAny>(input).is_ok() && str::from_utf8(input).is_ok();
    for (payload, ignores_space) in [(fingerprint::whole(), false), (as_json, true), (fingerprint::ignored(), true)] {
        let layer = IdempotencyLayer::api(&ledger(), caller::shared()).fingerprint(payload);
        let mut service = layer.layer(service_fn(|_: Request<RequestBody<Full<Bytes>>>| async {
            Ok::<_, Infallible>(Response::new(Full::<Bytes>::default()))
        }));
        let spaced = [b" ", input, b"\r\n"].concat();
        let statuses = runtime().block_on(async {
            let mut statuses = Vec::new();
            for body in [input.to_vec(), input.to_vec(), spaced] {
                let request = Request::post("/").header("idempotency-key", "k").body(Full::from(body)).unwrap();
                statuses.push(service.call(request).await.unwrap().status().as_u16());
            }
            statuses
        });
        assert_eq!(statuses[..2], [200, 200], "it is the same");
        assert!(statuses[2] == 200 || statuses[2] == 422);
        // A text may be too deep or too strange to be compared as JSON.
        assert!(statuses[2] == 422 || ignores_space, "white space counts where bytes are compared");
        assert!(
            statuses[2] == 200 || !ignores_space || !is_json || is_strange(input),
            "white space is no other payload"
        );
    }
}

/// Whether JSON is nested, or escaped, in ways in which it is compared by its bytes.
fn is_strange(input: &[u8]) -> bool {
    input.iter().filter(|byte| b"[{".contains(byte)).count() > 32 || input.contains(&b'\\')
}

/// All that a client sends on one connection.
pub(crate) fn request(input: &[u8]) {
    let ledger = ledger();
    let composite = json("$.id").and(query("q")).or(form("token"));
    let layer = IdempotencyLayer::webhook(&ledger, header("x-id").or(composite)).max_request_body(4096);
    let runs = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&runs);
    let service = layer.layer(service_fn(move |request: Request<RequestBody<hyper::body::Incoming>>| {
        let run = count.fetch_add(1, Ordering::SeqCst);
        async move {
            let has_attempt = request.extensions().get::<Attempt>().is_some();
            let body = request.into_body().collect().await;
            assert!(body.is_ok() || !has_attempt, "half a body was run");
            let status = if run % 3 == 2 { 500 } else { 200 };
            let length = body.map_or(0, |body| body.to_bytes().len());
            Ok::<_, Infallible>(Response::builder().status(status).body(Full::from(format!("{length}"))).unwrap())
        }
    }));
    runtime().block_on(async {
        let (mut client, server) = duplex(1 << 16);
        let server = http1::Builder::new().serve_connection(TokioIo::new(server), TowerToHyperService::new(service));
        let client = async {
            let (mut answers, mut requests) = tokio::io::split(&mut client);
            let mut answered = Vec::new();
            let sending = async {
                // A server that has heard enough hangs up.
                let _ = requests.write_all(input).await;
                let _ = requests.shutdown().await;
            };
            let (_, read) = tokio::join!(sending, answers.read_to_end(&mut answered));
            read.unwrap();
            answered
        };
        // What is wrong with the connection is the client's fault.
        let (_, answered) = timeout(LONG, async { tokio::join!(server, client) }).await.expect("an end");
        let sent = runs.load(Ordering::SeqCst);
        assert!(sent <= input.len(), "{sent} runs of {} bytes", input.len());
        assert!(answered.is_empty() || answered.starts_with(b"HTTP/1."));
        ledger.drain(LONG).await.unwrap();
        assert_eq!((ledger.in_flight(), ledger.waiting()), (0, 0));
    });
}
