//! The setters for what is kept of an outcome, and what is told.

use std::sync::Arc;

use bytes::Bytes;
use http::{HeaderName, HeaderValue, Response, StatusCode};

use super::IdempotencyLayer;
use crate::grpc::Code;
use crate::kept::Kept;
use crate::policy::Replay;
use crate::rejection::{PolicyPage, Rejection};

impl IdempotencyLayer {
    /// Which outcomes are kept and replayed; after any other the next delivery runs. Default: webhook, 2xx; api, all but
    /// 5xx, 401, 403, 404, 405, 408, 409, 425 and 429.
    ///
    /// To keep a failure is to lose the event: every retry is answered with it. Where `keeps` panics, 2xx are kept.
    #[must_use]
    pub fn keep(self, keeps: impl Fn(StatusCode) -> bool + Send + Sync + 'static) -> Self {
        self.set(|policy| policy.keeps = Arc::new(keeps))
    }

    /// As [`keep`](Self::keep), for calls of [gRPC](crate::grpc), whose HTTP status says nothing. Default: webhook, `OK`; api,
    /// `OK`, `INVALID_ARGUMENT`, `NOT_FOUND`, `ALREADY_EXISTS`, `FAILED_PRECONDITION` and `OUT_OF_RANGE`.
    ///
    /// `UNIMPLEMENTED` is not kept: a process of the last release says so of a method that the next one has. Where `keeps`
    /// panics, `OK` is kept.
    #[must_use]
    pub fn keep_codes(self, keeps: impl Fn(Code) -> bool + Send + Sync + 'static) -> Self {
        self.set(|policy| policy.keeps_code = Arc::new(keeps))
    }

    /// Which response headers are kept, and no others but `Content-Encoding`, without which a body could not be read, and
    /// of a call of gRPC `Content-Type` and `grpc-*`. Default: all but those that are [never kept](Self::drop_headers).
    ///
    /// # Panics
    ///
    /// If one of `names` is not a header name.
    #[must_use]
    pub fn keep_headers(self, names: &[&str]) -> Self {
        self.set(|policy| policy.keeping.only = Some(header_names(names)))
    }

    /// Which response headers are not kept, beside those that never are: the headers of one connection, `Authorization`,
    /// `Content-Length`, which is computed anew, `Date`, `Set-Cookie` and `WWW-Authenticate`. Default: none.
    ///
    /// # Panics
    ///
    /// If one of `names` is not a header name.
    #[must_use]
    pub fn drop_headers(self, names: &[&str]) -> Self {
        self.set(|policy| policy.keeping.never.extend(header_names(names)))
    }

    /// Changes what is stored, as where the store must not see a part of a response. The first caller is answered what the
    /// handler said, and nothing tells it that a retry will not get all of that. The status stays, and of
    /// a call of gRPC also what it is read by (`Content-Type`, `grpc-encoding`, `grpc-status`). Default: nothing is changed.
    ///
    /// Where `redact` panics, or leaves a body larger than [`max_kept_body`](Self::max_kept_body), a tombstone is stored
    /// without headers: what was to be taken out is not kept by mistake, and the request does not run again.
    #[must_use]
    pub fn redact(self, redact: impl Fn(&mut Kept) + Send + Sync + 'static) -> Self {
        self.set(|policy| policy.keeping.redact = Some(Arc::new(redact)))
    }

    /// Changes what a duplicate is told: a header more, another body. The status stays, as with [`redact`](Self::redact). Where `hook` panics, the duplicate is
    /// told what was kept. It is not called for refusals. Default: nothing is changed.
    #[must_use]
    pub fn on_replay(self, hook: impl Fn(&mut Kept) + Send + Sync + 'static) -> Self {
        self.set(|policy| policy.keeping.on_replay = Some(Arc::new(hook)))
    }

    /// Marks the response of a run too, with `Idempotent-Replayed: false`, so that clients can tell it from one that passed
    /// through. Default: only replays are marked.
    #[must_use]
    pub fn mark_first(self) -> Self {
        self.set(|policy| policy.mark_first = true)
    }

    /// Says when an outcome will be forgotten, as `Idempotency-Expires: <HTTP date>`, on the response that is kept and on its
    /// replays. The time is that of this process's clock. Default: not said.
    #[must_use]
    pub fn expires_header(self) -> Self {
        self.set(|policy| policy.expires_header = true)
    }

    /// What a duplicate of a finished attempt is answered. Default: webhook, [`Replay::Acknowledge`]; api,
    /// [`Replay::Outcome`].
    #[must_use]
    pub fn replay(self, replay: Replay) -> Self {
        self.set(|policy| policy.replay = replay)
    }

    /// What a duplicate is answered whose attempt is still running when its patience is over. Default: webhook, 503; api,
    /// 409.
    ///
    /// # Panics
    ///
    /// If `status` is neither 4xx nor 5xx: that would acknowledge unfinished work.
    #[must_use]
    pub fn running_status(self, status: StatusCode) -> Self {
        assert!(status.is_client_error() || status.is_server_error(), "a running duplicate has to be refused");
        self.set(|policy| policy.running_status = status)
    }

    /// A page that explains the rules to whoever is refused, as `Link: <url>; rel="describedby"`, and with the refusal's
    /// [code](crate::Rejection::code) as fragment, as the `type` of the problem document. Default: none.
    ///
    /// # Panics
    ///
    /// If `url` cannot stand in a header.
    #[must_use]
    #[allow(clippy::expect_used, reason = "as documented: a programmer's mistake, found at start")]
    pub fn policy_url(self, url: &str) -> Self {
        let link = HeaderValue::try_from(format!("<{url}>; rel=\"describedby\"")).expect("not a header value");
        self.set(|policy| policy.policy_page = Some(PolicyPage { url: url.to_owned(), link }))
    }

    /// Changes or replaces a refusal. Default: a problem document (RFC 9457), and for a call of [gRPC](crate::grpc) a status.
    ///
    /// A 2xx is let through only for refusals that lose no event, as where a webhook without a key is to be acknowledged
    /// and dropped. In place of any other status that is neither 4xx nor 5xx, and where `hook` panics, the refusal is told
    /// as it was. Of a refusal of gRPC only the headers can be changed, and the code only to another than `OK`: a client takes
    /// no other status of HTTP and no body.
    #[must_use]
    pub fn on_refusal(self, hook: impl Fn(Rejection, &mut Response<Bytes>) + Send + Sync + 'static) -> Self {
        self.set(|policy| policy.on_refusal = Some(Arc::new(hook)))
    }
}

#[allow(clippy::expect_used, reason = "a programmer's mistake, found at start")]
fn header_names(names: &[&str]) -> Vec<HeaderName> {
    names.iter().map(|name| HeaderName::from_bytes(name.as_bytes()).expect("not a header name")).collect()
}
