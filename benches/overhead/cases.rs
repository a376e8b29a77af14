//! What is measured, and what each is compared with.

use std::hint::black_box;
use std::time::Duration;

use bytes::Bytes;
use http::Request;
use serde::de::IgnoredAny;
use tower_idempotency::fingerprint;
use tower_idempotency::key::{self, Key, KeySource};
use tower_idempotency::store::{Claim, Claimed, Store as _};
use tower_idempotency::{IdempotencyLayer, Ledger, MemoryStore};

use super::cost::Cost;
use super::payload::{FLAT_KEY, NESTED_KEY, Pieces, flat, nested};
use super::work::{CROWD, OUTCOME, bare, layered, runtime};

pub const BARE: &str = "bare service";
const BARE_CROWD: &str = "bare service, 64 at once";
const PAIR: &str = "`claim` and `complete` by hand, on a boxed record";
const CLAIM_OF_DONE: &str = "`claim` of a finished key, by hand";
const FINGERPRINT_OFF: &str = "replay of 64 KiB, key in a header, fingerprint off";

const DAY: Duration = Duration::from_secs(24 * 60 * 60);

/// Larger than any body.
const ONE_FRAME: usize = usize::MAX;
const FRAME: usize = 16 << 10;

pub struct Case {
    pub name: String,
    /// Does it so many times.
    pub run: Box<dyn Fn(u64) -> Cost>,
    /// The name of the case that does what cannot be avoided.
    pub part: Option<String>,
}

impl Case {
    fn new(name: impl Into<String>, run: impl Fn(u64) -> Cost + 'static) -> Self {
        Self { name: name.into(), run: Box::new(run), part: None }
    }

    fn against(self, part: impl Into<String>) -> Self {
        Self { part: Some(part.into()), ..self }
    }
}

pub fn all() -> Vec<Case> {
    [parts(), ways(), crowds(), json(), others()].into_iter().flatten().collect()
}

fn webhook(key: impl Into<KeySource>) -> impl Fn(&Ledger) -> IdempotencyLayer {
    let key = key.into();
    move |ledger| IdempotencyLayer::webhook(ledger, key.clone())
}

fn small() -> Pieces {
    Pieces::new(Bytes::from_static(br#"{"event":"ping"}"#), ONE_FRAME)
}

fn event(id: u64) -> Request<Pieces> {
    Request::post("/hooks").header("x-event-id", id).body(small()).unwrap()
}

fn with_body(body: &Bytes, frame: usize) -> Request<Pieces> {
    Request::post("/hooks").header("x-event-id", "1").body(Pieces::new(body.clone(), frame)).unwrap()
}

/// What there would be without the layer, and what any layer would have to do.
fn parts() -> Vec<Case> {
    vec![
        Case::new(BARE, |count| bare(count, 1, event)),
        Case::new(BARE_CROWD, |count| bare(count, CROWD, event)),
        Case::new(PAIR, |count| by_hand(count, true)),
        Case::new(CLAIM_OF_DONE, |count| by_hand(count, false)),
    ]
}

/// The store's part of a first call, of new keys, or else of a replay.
fn by_hand(count: u64, new: bool) -> Cost {
    let store = MemoryStore::new().max_keys(usize::MAX).max_bytes(usize::MAX);
    let key = |n: u64| {
        let mut digest = [0; 24];
        digest[..8].copy_from_slice(&n.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes());
        Key::from(digest)
    };
    let deliver = async |n| {
        let mut claim = Claim::new(DAY, DAY);
        if let Claimed::Acquired { attempt } = store.claim(&key(n), &claim).await.unwrap() {
            claim.attempt = attempt;
            store.complete(&key(n), &claim, Bytes::copy_from_slice(OUTCOME)).await.unwrap();
        }
    };
    let runtime = runtime();
    runtime.block_on(deliver(0));
    Cost::of(|| {
        runtime.block_on(async {
            for n in 1..=count {
                deliver(if new { n } else { 0 }).await;
            }
        });
    })
}

fn ways() -> Vec<Case> {
    let keyless = |_| Request::post("/hooks").body(small()).unwrap();
    let layer = || webhook(key::header("x-event-id"));
    vec![
        Case::new("no key: passes through", move |count| layered(layer(), count, 1, keyless)),
        Case::new("first call", move |count| layered(layer(), count, 1, event)).against(PAIR),
        Case::new("replay", move |count| layered(layer(), count, 1, |_| event(0))).against(CLAIM_OF_DONE),
    ]
}

fn crowds() -> Vec<Case> {
    let layer = || webhook(key::header("x-event-id"));
    vec![
        Case::new("replay, 64 at once of one key", move |count| layered(layer(), count, CROWD, |_| event(0)))
            .against(BARE_CROWD),
        Case::new("first call and 63 duplicates that wait for it", move |count| {
            layered(layer(), count, CROWD, |n| event(n / CROWD))
        })
        .against(BARE_CROWD),
    ]
}

/// Replays, since what a key costs does not depend on whether it is new.
fn json() -> Vec<Case> {
    let mut cases = Vec::new();
    for (shape, path, make) in
        [("nested", NESTED_KEY, nested as fn(usize) -> Bytes), ("flat", FLAT_KEY, flat as fn(usize) -> Bytes)]
    {
        for kib in [1, 64, 1024] {
            let body = make(kib << 10);
            let ignored = format!("`IgnoredAny`, {kib} KiB {shape}");
            let bytes = body.clone();
            cases.push(Case::new(&*ignored, move |count| Cost::of(|| (0..count).for_each(|_| ignore(&bytes)))));
            let bytes = body.clone();
            cases.push(
                Case::new(format!("`key_of` by JSON, {kib} KiB {shape}"), move |count| key_of(path, &bytes, count))
                    .against(&*ignored),
            );
            for (frames, frame) in [("one frame", ONE_FRAME), ("frames of 16 KiB", FRAME)] {
                if body.len() <= frame && frame != ONE_FRAME {
                    continue;
                }
                let body = body.clone();
                let run = move |count| layered(webhook(key::json(path)), count, 1, |_| with_body(&body, frame));
                cases.push(Case::new(format!("replay by JSON, {kib} KiB {shape}, {frames}"), run).against(&*ignored));
            }
        }
    }
    cases
}

/// The least that reading JSON to its end takes.
fn ignore(body: &[u8]) {
    black_box(serde_json::from_slice::<IgnoredAny>(body).unwrap());
}

fn key_of(path: &str, body: &Bytes, count: u64) -> Cost {
    let layer = webhook(key::json(path))(&Ledger::new(MemoryStore::new()));
    let (head, ()) = Request::post("/hooks").body(()).unwrap().into_parts();
    Cost::of(|| (0..count).for_each(|_| _ = black_box(layer.key_of(&head, body).unwrap())))
}

fn others() -> Vec<Case> {
    let composite = || key::header("x-tenant").and(key::header("x-event-id")).and(key::json(NESTED_KEY));
    let (kib, large) = (nested(1 << 10), nested(64 << 10));
    let request = move |_| {
        let mut request = with_body(&kib, ONE_FRAME);
        request.headers_mut().insert("x-tenant", http::HeaderValue::from_static("acme"));
        request
    };
    let by_header = || webhook(key::header("x-event-id"));
    let unprinted = large.clone();
    vec![
        Case::new("replay by two headers and JSON, 1 KiB nested", move |count| {
            layered(webhook(composite()), count, 1, &request)
        })
        .against("`IgnoredAny`, 1 KiB nested"),
        Case::new(FINGERPRINT_OFF, move |count| layered(by_header(), count, 1, |_| with_body(&unprinted, ONE_FRAME))),
        Case::new("the same, fingerprint of the whole", move |count| {
            let layer = |ledger: &Ledger| by_header()(ledger).fingerprint(fingerprint::whole());
            layered(layer, count, 1, |_| with_body(&large, ONE_FRAME))
        })
        .against(FINGERPRINT_OFF),
    ]
}
