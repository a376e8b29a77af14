//! What of an outcome is kept, and how it is told again.

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use bytes::Bytes;
use http::header::{self, HeaderMap, HeaderName, HeaderValue};
use http::{Response, StatusCode, response};

use crate::body::ResponseBody;
use crate::connection::tokens;
use crate::grpc::{GRPC_ENCODING, GRPC_STATUS};
use crate::media_type;
use crate::policy::Replay;
use crate::record::{Content, Record};
use crate::rejection::Rejection;
use crate::telemetry;

/// Marks a response that is a replay.
pub(crate) const IDEMPOTENT_REPLAYED: HeaderName = HeaderName::from_static("idempotent-replayed");

/// `false` on a response that a retry will not get again: it is not in the store, or not with its body.
pub(crate) const IDEMPOTENCY_STORED: HeaderName = HeaderName::from_static("idempotency-stored");

/// When an outcome will be forgotten, as an HTTP date.
pub(crate) const IDEMPOTENCY_EXPIRES: HeaderName = HeaderName::from_static("idempotency-expires");

/// What belongs to one connection (RFC 9110 §7.6.1), to one caller, or to one moment, and is never replayed.
static NEVER_KEPT: [HeaderName; 16] = [
    header::AUTHORIZATION,
    header::CONNECTION,
    header::CONTENT_LENGTH,
    header::DATE,
    HeaderName::from_static("keep-alive"),
    header::PROXY_AUTHENTICATE,
    header::PROXY_AUTHORIZATION,
    HeaderName::from_static("proxy-connection"),
    header::SET_COOKIE,
    header::TE,
    header::TRAILER,
    header::TRANSFER_ENCODING,
    header::UPGRADE,
    header::WWW_AUTHENTICATE,
    IDEMPOTENCY_STORED,
    IDEMPOTENT_REPLAYED,
];

/// What says something about a body, beside `Content-*`, and has no place where there is none.
const ABOUT_THE_BODY: [HeaderName; 6] = [
    header::ACCEPT_RANGES,
    HeaderName::from_static("digest"),
    header::ETAG,
    header::LAST_MODIFIED,
    HeaderName::from_static("repr-digest"),
    HeaderName::from_static("want-digest"),
];

/// Without these a call could not be read, or would be read as another.
const OF_A_CALL: [HeaderName; 3] = [header::CONTENT_TYPE, GRPC_ENCODING, GRPC_STATUS];

/// What is kept of a response, in the hands of [`redact`](crate::IdempotencyLayer::redact), and what is told of it again,
/// in those of [`on_replay`](crate::IdempotencyLayer::on_replay).
#[derive(Clone)]
#[non_exhaustive]
pub struct Kept {
    /// The status. A replay under the webhook contract says 200 for any 2xx.
    pub status: StatusCode,
    /// The headers, without those of one connection, caller or moment. `Content-Length` is computed after the hook.
    pub headers: HeaderMap,
    /// The body; empty where it was not retained.
    pub body: Bytes,
    /// The trailers, where there are any.
    pub trailers: Option<HeaderMap>,
}

/// What a layer keeps, and does with what it keeps.
#[derive(Clone, Default)]
pub(crate) struct Keeping {
    /// Of the headers, only these.
    pub(crate) only: Option<Vec<HeaderName>>,
    /// Of the headers, not these.
    pub(crate) never: Vec<HeaderName>,
    pub(crate) redact: Option<Arc<KeptFn>>,
    pub(crate) on_replay: Option<Arc<KeptFn>>,
}

pub(crate) type KeptFn = dyn Fn(&mut Kept) + Send + Sync;

// === impl Keeping ===

impl Keeping {
    /// What is stored of a whole response, of which `max_body` bytes may be kept.
    pub(crate) fn record(
        &self,
        head: &response::Parts,
        body: Bytes,
        trailers: Option<HeaderMap>,
        max_body: usize,
    ) -> Record {
        let trailers = self.trailers(trailers);
        let kept = Kept { status: head.status, headers: self.headers(&head.headers), body, trailers };
        let Some(redact) = &self.redact else { return kept.into() };
        match hooked("redact", redact, kept) {
            Some(kept) if kept.body.len() <= max_body => {
                let trailers = self.trailers(kept.trailers);
                Kept { headers: self.headers(&kept.headers), trailers, ..kept }.into()
            }
            // What was to be taken out may still be in there.
            _ => Record { status: head.status, headers: HeaderMap::new(), content: Content::Tombstone },
        }
    }

    /// What is stored of a response whose body is not.
    pub(crate) fn tombstone(&self, head: &response::Parts) -> Record {
        let bare = Record { status: head.status, headers: HeaderMap::new(), content: Content::Tombstone };
        let kept =
            Kept { status: head.status, headers: self.headers(&head.headers), body: Bytes::new(), trailers: None };
        let kept = match &self.redact {
            None => kept,
            Some(redact) => match hooked("redact", redact, kept) {
                Some(kept) => kept,
                None => return bare,
            },
        };
        let mut headers = self.headers(&kept.headers);
        let content = headers.keys().filter(|name| name.as_str().starts_with("content-"));
        for name in content.cloned().collect::<Vec<_>>().iter().chain(&ABOUT_THE_BODY) {
            headers.remove(name);
        }
        Record { headers, ..bare }
    }

    /// The outcome told again.
    pub(crate) fn replay<R>(&self, record: Record, replay: Replay) -> Result<Response<ResponseBody<R>>, Rejection> {
        let (body, trailers) = match (record.content, replay) {
            (Content::Kept { body, trailers }, _) => (body, trailers),
            (Content::Tombstone, Replay::Acknowledge) => (Bytes::new(), None),
            (Content::Tombstone, Replay::Outcome) => return Err(Rejection::OutcomeNotRetained),
        };
        let mut headers = record.headers;
        let status = match replay {
            Replay::Acknowledge if record.status.is_success() => StatusCode::OK,
            Replay::Acknowledge | Replay::Outcome => record.status,
        };
        if status != record.status {
            headers.remove(header::CONTENT_RANGE);
        }
        headers.insert(IDEMPOTENT_REPLAYED, HeaderValue::from_static("true"));
        let kept = Kept { status, headers, body, trailers };
        Ok(match &self.on_replay {
            None => kept,
            Some(hook) => match hooked("on_replay", hook, kept.clone()) {
                Some(told) => told,
                None => kept,
            },
        }
        .into_response())
    }

    fn trailers(&self, trailers: Option<HeaderMap>) -> Option<HeaderMap> {
        trailers.map(|trailers| self.headers(&trailers)).filter(|trailers| !trailers.is_empty())
    }

    fn headers(&self, headers: &HeaderMap) -> HeaderMap {
        let mut kept = headers.clone();
        for name in tokens(headers, &header::CONNECTION).filter_map(|name| HeaderName::from_bytes(name).ok()) {
            kept.remove(name);
        }
        let is_grpc = media_type::is_grpc(headers);
        let is_kept = |name: &HeaderName| {
            let is_needed = *name == GRPC_STATUS || is_grpc && OF_A_CALL.contains(name);
            let is_never = NEVER_KEPT.contains(name) || self.never.contains(name);
            (is_needed || !is_never) && self.only.as_ref().is_none_or(|only| is_among(only, name, is_grpc))
        };
        for name in headers.keys().filter(|name| !is_kept(name)) {
            kept.remove(name);
        }
        kept
    }
}

/// Whether a header is one of those that alone are kept, or none to go without: a body cannot be read without its coding, nor a
/// call without what is its own, and one is the layer's.
fn is_among(only: &[HeaderName], name: &HeaderName, is_grpc: bool) -> bool {
    let always = [header::CONTENT_ENCODING, IDEMPOTENCY_EXPIRES];
    let is_of_a_call = name.as_str().starts_with("grpc-") || *name == header::CONTENT_TYPE && is_grpc;
    only.contains(name) || always.contains(name) || is_of_a_call
}

/// What a hook makes of it; nothing where it panics. The status stays.
fn hooked(name: &'static str, hook: &Arc<KeptFn>, mut kept: Kept) -> Option<Kept> {
    let status = kept.status;
    let call = media_type::is_grpc(&kept.headers).then(|| kept.clone());
    if catch_unwind(AssertUnwindSafe(|| hook(&mut kept))).is_err() {
        telemetry::hook_panicked(name);
        return None;
    }
    kept.status = status;
    if let Some(call) = call {
        OF_A_CALL.iter().for_each(|name| reset(&mut kept.headers, name, &call.headers));
        let mut trailers = kept.trailers.take().unwrap_or_default();
        reset(&mut trailers, &GRPC_STATUS, &call.trailers.unwrap_or_default());
        kept.trailers = (!trailers.is_empty()).then_some(trailers);
    }
    Some(kept)
}

/// Makes a header what it was.
fn reset(headers: &mut HeaderMap, name: &HeaderName, before: &HeaderMap) {
    headers.remove(name);
    headers.extend(before.get(name).map(|value| (name.clone(), value.clone())));
}

// === impl Kept ===

impl Kept {
    fn into_response<R>(self) -> Response<ResponseBody<R>> {
        let Self { status, mut headers, body, trailers } = self;
        headers.remove(header::CONTENT_LENGTH);
        // RFC 9110 §8.6: none in a 1xx or 204, and in a 304 only what a 200 would have had.
        // gRPC has no use for lengths and announcements: its messages have a prefix, and HTTP/2 carries any trailers.
        let is_grpc = media_type::is_grpc(&headers);
        let has_length = !is_grpc && !matches!(status, StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED);
        match &trailers {
            None if has_length => {
                headers.insert(header::CONTENT_LENGTH, body.len().into());
            }
            None => {}
            Some(_) if is_grpc => {}
            // HTTP/1.1 carries only those that were announced.
            Some(trailers) => {
                for name in trailers.keys() {
                    headers.append(header::TRAILER, HeaderValue::from(name.clone()));
                }
            }
        }
        let mut response = Response::new(ResponseBody::buffered(body, trailers.map(Box::new)));
        *response.status_mut() = status;
        *response.headers_mut() = headers;
        response
    }
}

impl fmt::Debug for Kept {
    /// Without what has no place in a log.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Kept").field("status", &self.status).field("body", &self.body.len()).finish_non_exhaustive()
    }
}

impl From<Kept> for Record {
    fn from(kept: Kept) -> Self {
        let Kept { status, headers, body, trailers } = kept;
        Self { status, headers, content: Content::Kept { body, trailers } }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use http_body_util::{BodyExt as _, Empty};

    use super::*;

    type Told = Response<ResponseBody<Empty<Bytes>>>;

    fn head(status: u16, headers: &[(&'static str, &[u8])]) -> response::Parts {
        let mut response = Response::builder().status(status);
        for (name, value) in headers {
            response = response.header(*name, *value);
        }
        response.body(()).unwrap().into_parts().0
    }

    fn record(keeping: &Keeping, head: &response::Parts, body: &'static [u8]) -> Record {
        keeping.record(head, Bytes::from_static(body), None, 100)
    }

    fn replay(keeping: &Keeping, record: &Record, replay: Replay) -> Told {
        keeping.replay(record.clone(), replay).unwrap()
    }

    #[test]
    fn repeated_headers_keep_their_order_and_one_connections_headers_are_dropped() {
        let head = head(
            200,
            &[
                ("x-a", b"1"),
                ("set-cookie", b"a=1"),
                ("connection", b"close,\xff, X-Hop"),
                ("x-hop", b"1"),
                ("x-a", b"2"),
                ("content-length", b"4"),
                ("date", b"today"),
            ],
        );
        let record = record(&Keeping::default(), &head, b"");
        assert_eq!(record.headers.get_all("x-a").iter().collect::<Vec<_>>(), ["1", "2"]);
        assert_eq!(record.headers.len(), 2);
    }

    #[test]
    fn an_acknowledgement_is_always_200() {
        let head = head(206, &[("content-range", b"bytes 0-3/9"), ("x-a", b"1")]);
        let keeping = Keeping::default();
        let record = record(&keeping, &head, b"body");
        let told = replay(&keeping, &record, Replay::Acknowledge);
        assert_eq!(told.status(), StatusCode::OK);
        assert_eq!(told.headers().get("content-range"), None);
        assert_eq!(told.headers()["content-length"], "4");
        let told = replay(&keeping, &record, Replay::Outcome);
        assert_eq!(told.status(), StatusCode::PARTIAL_CONTENT);
        assert!(told.headers().contains_key("content-range"));
    }

    #[test]
    fn a_replay_without_content_has_no_length() {
        let keeping = Keeping::default();
        let told = replay(&keeping, &record(&keeping, &head(204, &[]), b""), Replay::Outcome);
        assert_eq!((told.status(), told.headers().get("content-length")), (StatusCode::NO_CONTENT, None));
    }

    #[test]
    fn a_tombstone_says_nothing_about_a_body() {
        let head =
            head(200, &[("content-type", b"text/csv"), ("content-digest", b"x"), ("etag", b"\"1\""), ("x-a", b"1")]);
        let record = Keeping::default().tombstone(&head);
        assert_eq!(record.headers.keys().collect::<Vec<_>>(), ["x-a"]);
    }

    #[test]
    fn headers_are_chosen_and_a_coded_body_stays_readable() {
        let head = head(
            200,
            &[("x-a", b"1"), ("x-b", b"2"), ("content-encoding", b"gzip"), ("content-type", b"a/b"), ("date", b"x")],
        );
        let names = |keeping: Keeping| {
            let record = record(&keeping, &head, b"");
            record.headers.keys().map(|name| name.as_str().to_owned()).collect::<BTreeSet<_>>()
        };
        let set = |names: [&str; 2]| BTreeSet::from(names.map(str::to_owned));
        let name = HeaderName::from_static;
        let only = Keeping { only: Some(vec![name("x-a"), name("date")]), ..Keeping::default() };
        assert_eq!(names(only), set(["x-a", "content-encoding"]));
        let but = Keeping { never: vec![name("x-a"), name("content-encoding")], ..Keeping::default() };
        assert_eq!(names(but), set(["x-b", "content-type"]));
    }

    #[tokio::test]
    async fn what_is_told_is_what_the_hook_makes_of_it_and_of_its_length() {
        let keeping = Keeping {
            on_replay: Some(Arc::new(|kept: &mut Kept| {
                kept.body = Bytes::from_static(b"ok");
                kept.headers.insert(header::CONTENT_LENGTH, HeaderValue::from_static("99"));
                kept.status = StatusCode::IM_A_TEAPOT;
            })),
            ..Keeping::default()
        };
        let told = replay(&keeping, &record(&keeping, &head(201, &[]), b"long body"), Replay::Outcome);
        assert_eq!((told.status(), &told.headers()["content-length"]), (StatusCode::CREATED, &"2".parse().unwrap()));
        assert_eq!(told.into_body().collect().await.unwrap().to_bytes(), "ok");
    }

    #[test]
    fn a_redaction_that_panics_or_overflows_keeps_nothing_it_should_have_taken_out() {
        let panics: Arc<KeptFn> = Arc::new(|kept| {
            kept.headers.remove("x-a");
            panic!("half done")
        });
        let grows: Arc<KeptFn> = Arc::new(|kept| kept.body = Bytes::from(vec![b'x'; 101]));
        for hook in [panics, grows] {
            let keeping = Keeping { redact: Some(hook), ..Keeping::default() };
            let record = record(&keeping, &head(200, &[("x-a", b"1"), ("x-secret", b"2")]), b"secret");
            assert_eq!(
                record,
                Record { status: StatusCode::OK, headers: HeaderMap::new(), content: Content::Tombstone }
            );
            assert_eq!(replay(&keeping, &record, Replay::Acknowledge).status(), StatusCode::OK);
        }
    }
}
