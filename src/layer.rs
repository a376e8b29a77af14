//! The layer: the two contracts and the setters.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderName, HeaderValue, Method, Response, StatusCode, request};
use tower::{BoxError, Layer};

use crate::caller::Caller;
use crate::digest::Secret;
use crate::fingerprint::Payload;
use crate::kept::Kept;
use crate::key::{HeaderSyntax, Key, KeySource, Keys};
use crate::ledger::Ledger;
use crate::policy::{OnBadKey, OnOtherPayload, OnStoreError, OverLimit, Policy, Replay};
use crate::rejection::{PolicyPage, Rejection};
use crate::service::Idempotency;
use crate::store::{MAX_DURATION, MIN_DURATION};

/// Makes a service run each event or request once. See the [crate docs](crate) for an example.
///
/// There are two contracts and no third default: one for senders of [webhooks](Self::webhook), who look only at whether
/// the answer was 2xx, and one for clients of an [api](Self::api), who read it. Each setter names both defaults where they
/// differ. A layer is cheap to clone; setters change only the clone they are called on.
#[derive(Clone, Debug)]
pub struct IdempotencyLayer {
    ledger: Ledger,
    policy: Arc<Policy>,
}

impl IdempotencyLayer {
    /// The contract for webhooks. A duplicate of a finished delivery is answered 200 with the kept body; one of a running
    /// delivery waits briefly and is then told 503, which every sender retries.
    #[must_use]
    pub fn webhook(ledger: &Ledger, key: impl Into<KeySource>) -> Self {
        Self { ledger: ledger.clone(), policy: Arc::new(Policy::webhook(key.into())) }
    }

    /// The contract for clients of an API (draft-ietf-httpapi-idempotency-key-header-07, Stripe). The key is
    /// `Idempotency-Key` or `X-Idempotency-Key`. A duplicate is answered the kept status, headers and body; one of a running
    /// request waits briefly and is then told 409; another payload under the same key is told 422.
    #[must_use]
    pub fn api(ledger: &Ledger, caller: Caller) -> Self {
        Self { ledger: ledger.clone(), policy: Arc::new(Policy::api(caller)) }
    }

    /// Whether the layer does anything at all; while it does not, every request passes through and the store is not asked.
    /// For a switch in the configuration. Default: it does.
    #[must_use]
    pub fn enabled(self, enabled: bool) -> Self {
        self.set(|policy| policy.enabled = enabled)
    }

    fn set(mut self, set: impl FnOnce(&mut Policy)) -> Self {
        let policy = Arc::make_mut(&mut self.policy);
        set(policy);
        // It is another layer than the one it was cloned from, and warns for itself.
        policy.warned = Arc::default();
        self
    }

    /// Where the key comes from. Default: the argument of [`webhook`](Self::webhook); the headers of [`api`](Self::api).
    #[must_use]
    pub fn key(self, key: impl Into<KeySource>) -> Self {
        self.set(|policy| policy.key = key.into())
    }

    /// What may stand in a key header. Default: webhook, opaque with 1 to 1024 bytes; api, 1 to 255 visible ASCII
    /// characters, quoted or bare. [`HeaderSyntax::StructuredString`] is the draft to the letter: quoted alone.
    #[must_use]
    pub fn header_syntax(self, syntax: HeaderSyntax) -> Self {
        self.set(|policy| policy.header_syntax = syntax)
    }

    /// Adds to what a key is unique within, beside contract, method, path and caller: a tenant, a host, or the prefix that
    /// a router strips before the layer sees the path. Default: nothing.
    #[must_use]
    pub fn scope<F, K>(self, scope: F) -> Self
    where
        F: Fn(&request::Parts) -> Option<K> + Send + Sync + 'static,
        K: Into<Bytes>,
    {
        self.set(|policy| policy.scope = Some(Arc::new(move |head| Ok(scope(head).map(Into::into)))))
    }

    /// As [`scope`](Self::scope), by a function that may fail, as where a tenant has to be looked up: the request is then
    /// refused with 500 and runs nowhere. The error is named in the request's event, so it must name no secret. Default:
    /// nothing.
    #[must_use]
    pub fn try_scope<F, K, E>(self, scope: F) -> Self
    where
        F: Fn(&request::Parts) -> Result<Option<K>, E> + Send + Sync + 'static,
        K: Into<Bytes>,
        E: Into<BoxError>,
    {
        let scope = move |head: &request::Parts| scope(head).map(|scope| scope.map(Into::into)).map_err(Into::into);
        self.set(|policy| policy.scope = Some(Arc::new(scope)))
    }

    /// Makes stored keys keyed digests, for raw keys that could be guessed, such as consecutive numbers: who reads the store
    /// can then not try which were there. Every process needs the same secret. Default: none. A [fingerprint](crate::fingerprint) is no keyed
    /// digest: where the payload holds the key, or can be guessed itself, compare [nothing](crate::fingerprint::ignored) of it.
    ///
    /// Another secret makes every key another, [`Attempt::key`](crate::Attempt::key) too: what the store knows is found no
    /// more, and would run again. So set the old one as [`previous_secret`](Self::previous_secret) for a while.
    ///
    /// # Panics
    ///
    /// If `secret` is shorter than 16 bytes.
    #[must_use]
    pub fn secret(self, secret: impl AsRef<[u8]>) -> Self {
        let secret = in_length(secret.as_ref());
        self.set(|policy| policy.secret = Some(secret))
    }

    /// The secret before this one. Each request is then claimed under both keys, the previous one first, and its outcome is
    /// kept under both: processes that know either secret, or both, run it once between them. That doubles the calls of the
    /// store. Default: none.
    ///
    /// What is outside of the store knows one key each: a handler that looks for its row, and a call downstream, has to ask for
    /// [`Attempt::previous_key`](crate::Attempt::previous_key) as well.
    ///
    /// To rotate: give every process the new secret with the old one as previous, wait for the longest retention, then
    /// take the old one away.
    ///
    /// # Panics
    ///
    /// If `secret` is shorter than 16 bytes.
    #[must_use]
    pub fn previous_secret(self, secret: impl AsRef<[u8]>) -> Self {
        let secret = in_length(secret.as_ref());
        self.set(|policy| policy.previous_secret = Some(Some(secret)))
    }

    /// As [`previous_secret`](Self::previous_secret), for a service that had none.
    #[must_use]
    pub fn previously_without_secret(self) -> Self {
        self.set(|policy| policy.previous_secret = Some(None))
    }

    /// Which methods are protected. Default: webhook, all, GET too; api, POST and PATCH, so that PUT and DELETE pass
    /// through. HEAD, OPTIONS, CONNECT and upgrades always do.
    #[must_use]
    pub fn methods(self, methods: impl IntoIterator<Item = Method>) -> Self {
        let methods: Vec<Method> = methods.into_iter().collect();
        self.set(|policy| policy.applies = Arc::new(move |method| methods.contains(method)))
    }

    /// Refuses a request without a key with 400: [`missing_key`](Self::missing_key) with [`OnBadKey::Refuse`].
    #[must_use]
    pub fn require_key(self) -> Self {
        self.missing_key(OnBadKey::Refuse)
    }

    /// What happens to a request without a key. Default: [`OnBadKey::PassThrough`]; the first of each layer is warned of.
    #[must_use]
    pub fn missing_key(self, then: OnBadKey) -> Self {
        self.set(|policy| policy.missing_key = then)
    }

    /// What happens to a malformed key: two different values, a list, a JSON value that is no scalar or stands twice, a body
    /// that is not the JSON or the multipart form it has to be, a part that is not [valid](KeySource::valid_if). Default:
    /// webhook, [`OnBadKey::PassThrough`], where the first of each layer is warned of; api, [`OnBadKey::Refuse`].
    #[must_use]
    pub fn malformed_key(self, then: OnBadKey) -> Self {
        self.set(|policy| policy.malformed_key = then)
    }

    /// What of a request is compared with the one that brought its key first. Default: webhook, [`ignored`]; api, [`whole`].
    ///
    /// What was kept under another setting does not match.
    ///
    /// [`ignored`]: crate::fingerprint::ignored
    /// [`whole`]: crate::fingerprint::whole
    #[must_use]
    pub fn fingerprint(self, payload: Payload) -> Self {
        self.set(|policy| policy.fingerprint = payload)
    }

    /// What happens to another payload under a known key. Default: webhook, [`OnOtherPayload::Replay`]; api,
    /// [`OnOtherPayload::Refuse`].
    #[must_use]
    pub fn other_payload(self, then: OnOtherPayload) -> Self {
        self.set(|policy| policy.other_payload = then)
    }

    /// Which outcomes are kept and replayed; after any other the next delivery runs. Default: webhook, 2xx; api, all but
    /// 5xx, 401, 403, 404, 405, 408, 409, 425 and 429.
    ///
    /// To keep a failure is to lose the event: every retry is answered with it. Where `keeps` panics, 2xx are kept.
    #[must_use]
    pub fn keep(self, keeps: impl Fn(StatusCode) -> bool + Send + Sync + 'static) -> Self {
        self.set(|policy| policy.keeps = Arc::new(keeps))
    }

    /// Which response headers are kept, and no others but `Content-Encoding`, without which a body could not be read.
    /// Default: all but those that are [never kept](Self::drop_headers).
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
    /// handler said, and nothing tells it that a retry will not get all of that. The status stays. Default: nothing is changed.
    ///
    /// Where `redact` panics, or leaves a body larger than [`max_kept_body`](Self::max_kept_body), a tombstone is stored
    /// without headers: what was to be taken out is not kept by mistake, and the request does not run again.
    #[must_use]
    pub fn redact(self, redact: impl Fn(&mut Kept) + Send + Sync + 'static) -> Self {
        self.set(|policy| policy.keeping.redact = Some(Arc::new(redact)))
    }

    /// Changes what a duplicate is told: a header more, another body. The status stays. Where `hook` panics, the duplicate is
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

    /// How long a duplicate waits for a running attempt. Default: webhook, 2 s; api, 1 s.
    #[must_use]
    pub fn patience(self, patience: Duration) -> Self {
        self.set(|policy| policy.patience = patience.min(MAX_DURATION))
    }

    /// How long a claim lives without a sign of life; it is renewed while the attempt runs. After a crash the key is stuck
    /// for that long. Default: 30 s.
    ///
    /// # Panics
    ///
    /// If it is not from 1 ms to 366 days.
    #[must_use]
    pub fn lease(self, lease: Duration) -> Self {
        self.set(|policy| policy.lease = in_range(lease))
    }

    /// How long an outcome is replayed, counted from completion. Default: webhook, 3 days; api, 24 hours.
    ///
    /// # Panics
    ///
    /// If it is not from 1 ms to 366 days.
    #[must_use]
    pub fn retention(self, retention: Duration) -> Self {
        self.set(|policy| policy.retention = in_range(retention))
    }

    /// How long the lease of an attempt is renewed; a hung handler then loses its key to the next delivery. Default: 15
    /// minutes.
    #[must_use]
    pub fn max_attempt(self, max: Duration) -> Self {
        self.set(|policy| policy.max_attempt = max.min(MAX_DURATION))
    }

    /// Does not buffer the request body, where neither the key nor the fingerprint needs it. An attempt whose request body
    /// failed is then released, whatever it answered. How large such a body may be, and how long it may take, is the handler's
    /// to say: neither [`max_request_body`](Self::max_request_body) nor [`body_timeout`](Self::body_timeout) holds for it.
    /// Default: the body is buffered before the claim.
    #[must_use]
    pub fn stream_request_body(self) -> Self {
        self.set(|policy| policy.stream_request_body = true)
    }

    /// How large a request body may be, in bytes. It is counted, whatever `Content-Length` says. Default: 2 MiB. Where the
    /// key is in the body, this holds before it is known whether there is one.
    #[must_use]
    pub fn max_request_body(self, bytes: usize) -> Self {
        self.set(|policy| policy.max_request_body = bytes)
    }

    /// What happens to a larger one. Default: [`OverLimit::Refuse`], with 413 and nothing claimed.
    #[must_use]
    pub fn over_limit(self, then: OverLimit) -> Self {
        self.set(|policy| policy.over_limit = then)
    }

    /// How long a request body may take to arrive; beyond, it is refused with 408. Default: 30 s.
    #[must_use]
    pub fn body_timeout(self, timeout: Duration) -> Self {
        self.set(|policy| policy.body_timeout = timeout.min(MAX_DURATION))
    }

    /// How long the inner service may take to become ready; beyond, the claim is released and the request refused with
    /// 503. It holds for requests that pass through, too, unless the layer is not [enabled](Self::enabled). Default: 5 s.
    #[must_use]
    pub fn ready_timeout(self, timeout: Duration) -> Self {
        self.set(|policy| policy.ready_timeout = timeout.min(MAX_DURATION))
    }

    /// How large a response body may be to be kept, in bytes; a larger one leaves a tombstone. Default: 1 MiB; at most
    /// 256 MiB.
    #[must_use]
    pub fn max_kept_body(self, bytes: usize) -> Self {
        self.set(|policy| policy.max_kept_body = bytes.min(256 << 20))
    }

    /// How long a response body may take to be kept; a slower one streams on and leaves a tombstone. Default: 500 ms.
    #[must_use]
    pub fn kept_body_timeout(self, timeout: Duration) -> Self {
        self.set(|policy| policy.kept_body_timeout = timeout.min(MAX_DURATION))
    }

    /// How long a response waits for its outcome to be stored; it then leaves with `Idempotency-Stored: false`. Default: 2 s.
    #[must_use]
    pub fn complete_wait(self, wait: Duration) -> Self {
        self.set(|policy| policy.complete_wait = wait.min(MAX_DURATION))
    }

    /// How long storing an outcome is pursued in the background after that. Default: 5 minutes.
    #[must_use]
    pub fn complete_ceiling(self, ceiling: Duration) -> Self {
        self.set(|policy| policy.complete_ceiling = ceiling.min(MAX_DURATION))
    }

    /// What happens when the store does not answer. Default: [`OnStoreError::Refuse`], with 503.
    #[must_use]
    pub fn on_store_error(self, then: OnStoreError) -> Self {
        self.set(|policy| policy.on_store_error = then)
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

    /// Changes or replaces a refusal. Default: a problem document (RFC 9457).
    ///
    /// A 2xx is let through only for refusals that lose no event, as where a webhook without a key is to be acknowledged
    /// and dropped. In place of any other status that is neither 4xx nor 5xx, and where `hook` panics, the refusal is told
    /// as it was.
    #[must_use]
    pub fn on_refusal(self, hook: impl Fn(Rejection, &mut Response<Bytes>) + Send + Sync + 'static) -> Self {
        self.set(|policy| policy.on_refusal = Some(Arc::new(hook)))
    }
}

impl IdempotencyLayer {
    /// The key under which the ledger knows a request, for [`Ledger::lookup`] and [`Ledger::forget`]; none where it would
    /// pass through or be refused for its key.
    #[must_use]
    pub fn key_of(&self, head: &request::Parts, body: &Bytes) -> Option<Key> {
        Some(self.keys_of(head, body)?.current)
    }
}

impl IdempotencyLayer {
    /// The same request's key under the [`previous_secret`](Self::previous_secret), while secrets rotate. An event that is
    /// to run again then has to be forgotten under both.
    #[must_use]
    pub fn previous_key_of(&self, head: &request::Parts, body: &Bytes) -> Option<Key> {
        self.keys_of(head, body)?.previous
    }

    fn keys_of(&self, head: &request::Parts, body: &Bytes) -> Option<Keys> {
        let parts = self.policy.key.extract(head, body, self.policy.header_syntax).ok().flatten();
        parts.filter(|_| self.policy.applies(head)).and_then(|parts| self.policy.stored_keys(head, &parts).ok())
    }
}

impl<S> Layer<S> for IdempotencyLayer {
    type Service = Idempotency<S>;

    fn layer(&self, inner: S) -> Idempotency<S> {
        Idempotency::new(inner, self.ledger.clone(), Arc::clone(&self.policy))
    }
}

fn in_length(secret: &[u8]) -> Secret {
    assert!(secret.len() >= 16, "a secret has at least 16 bytes");
    Secret::new(secret)
}

#[allow(clippy::expect_used, reason = "a programmer's mistake, found at start")]
fn header_names(names: &[&str]) -> Vec<HeaderName> {
    names.iter().map(|name| HeaderName::from_bytes(name.as_bytes()).expect("not a header name")).collect()
}

fn in_range(duration: Duration) -> Duration {
    assert!((MIN_DURATION..=MAX_DURATION).contains(&duration), "a duration is from 1 ms to 366 days");
    duration
}
