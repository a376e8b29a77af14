//! The key and the body of a request, before anything is claimed.
//!
//! The body is buffered first: a duplicate that waits with its body unread stalls the other streams of its connection, a
//! slow sender would hold a claim, and half a body must not become a kept 400.

use std::pin::pin;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Version, header, request};
use http_body::Body;

use crate::body::{Failed, RequestBody};
use crate::collect::{Collector, Filled};
use crate::fingerprint::Fingerprint;
use crate::key::{Extracted, Malformed, Part};
use crate::policy::{OnBadKey, OverLimit, Policy};
use crate::rejection::Rejection;
use crate::telemetry::{PassedThrough, Report};
use crate::within::within;

/// For how long, and for how many more bodies of the largest size, a request that is too large is read on before it is
/// refused. Nothing of it is kept.
const LINGER: Duration = Duration::from_secs(1);
const LINGER_BODIES: usize = 4;

/// What there is to do with a request.
pub(crate) enum Intake<B> {
    Keyed(Keyed<B>),
    PassThrough(RequestBody<B>, PassedThrough),
    Refuse(Rejection),
}

pub(crate) struct Keyed<B> {
    pub(crate) parts: Vec<Part>,
    pub(crate) fingerprint: Option<Fingerprint>,
    pub(crate) body: RequestBody<B>,
    /// Whether the body has failed, where it is streamed.
    pub(crate) failed: Failed,
}

enum Buffered<B> {
    PassThrough(RequestBody<B>),
    Refuse(Rejection),
    Whole(Bytes, Option<Box<HeaderMap>>),
}

/// Finds the key, and buffers the body unless there is nothing to protect.
pub(crate) async fn take_in<B: Body<Data = Bytes>>(
    policy: &Policy,
    head: &request::Parts,
    body: B,
    report: &mut Report,
) -> Intake<B> {
    let extract = |body: &Bytes| policy.extract(head, body);
    let by_head = (!policy.key.reads_body()).then(|| extract(&Bytes::new()));
    if let Some(unusable @ (Ok(None) | Err(_))) = by_head {
        return without_key(policy, &unusable, RequestBody::untouched(body), report);
    }
    if let (Some(Ok(Some(parts))), false) = (&by_head, policy.buffers()) {
        let failed = Failed::not_yet();
        let body = RequestBody::watched(body, failed.clone());
        return Intake::Keyed(Keyed { parts: parts.clone(), fingerprint: None, body, failed });
    }
    let (data, trailers) = match buffer(policy, head, body).await {
        Buffered::Whole(data, trailers) => (data, trailers),
        Buffered::PassThrough(body) => return Intake::PassThrough(body, PassedThrough::BodyOverLimit),
        Buffered::Refuse(refusal) => return Intake::Refuse(refusal),
    };
    match by_head.unwrap_or_else(|| extract(&data)) {
        Err(Malformed::TOO_LARGE) => match policy.over_limit {
            OverLimit::PassThrough => {
                Intake::PassThrough(RequestBody::buffered(data, trailers), PassedThrough::BodyOverLimit)
            }
            OverLimit::Refuse => Intake::Refuse(Rejection::BodyTooLarge),
        },
        Ok(Some(parts)) => Intake::Keyed(Keyed {
            parts,
            fingerprint: policy.fingerprint.fingerprint(head, &data),
            body: RequestBody::buffered(data, trailers),
            failed: Failed::default(),
        }),
        unusable => without_key(policy, &unusable, RequestBody::buffered(data, trailers), report),
    }
}

/// What the contract says of a key that is missing or malformed.
fn without_key<B>(policy: &Policy, unusable: &Extracted, body: RequestBody<B>, report: &mut Report) -> Intake<B> {
    let (then, refusal, reason) = match unusable {
        Ok(_) => (policy.missing_key, Rejection::KeyMissing, PassedThrough::KeyMissing),
        Err(malformed) => {
            report.cause(malformed);
            (policy.malformed_key, Rejection::KeyMalformed, PassedThrough::KeyMalformed)
        }
    };
    match then {
        OnBadKey::Refuse => Intake::Refuse(refusal),
        OnBadKey::PassThrough => {
            policy.warn_once(reason);
            Intake::PassThrough(body, reason)
        }
    }
}

async fn buffer<B: Body<Data = Bytes>>(policy: &Policy, head: &request::Parts, body: B) -> Buffered<B> {
    let mut collector = Collector::new(body, policy.max_request_body);
    let filled = within(policy.body_timeout, pin!(collector.fill())).await;
    match filled {
        Some(Ok(Filled::Whole)) => {
            let (data, trailers, _) = collector.into_parts();
            Buffered::Whole(data, trailers)
        }
        Some(Ok(Filled::OverCap)) if policy.over_limit == OverLimit::PassThrough => {
            let (data, _, rest) = collector.into_parts();
            Buffered::PassThrough(RequestBody::resumed(data, rest))
        }
        Some(Ok(Filled::OverCap)) => {
            // A client that sends all before it reads would see a reset instead of the refusal. One that asked first is
            // answered by that alone: to read on would be to tell it to send.
            if collector.is_untouched() && asks_first(head) {
                return Buffered::Refuse(Rejection::BodyTooLarge);
            }
            let rest = policy.max_request_body.saturating_mul(LINGER_BODIES);
            let _ = within(LINGER, Box::pin(collector.discard(rest))).await;
            Buffered::Refuse(Rejection::BodyTooLarge)
        }
        Some(Err(_)) => Buffered::Refuse(Rejection::BodyUnreadable),
        None => Buffered::Refuse(Rejection::BodyTimeout),
    }
}

/// Whether the client waits to be told before it sends its body. HTTP/1.0 knows of no such thing (RFC 9110 §10.1.1).
fn asks_first(head: &request::Parts) -> bool {
    let is_asked = |expected: &HeaderValue| expected.as_bytes().eq_ignore_ascii_case(b"100-continue");
    head.version > Version::HTTP_10 && head.headers.get_all(header::EXPECT).iter().any(is_asked)
}
