//! What a layer has been told to do: its contract, every default of that contract, and what follows from both.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use http::{Method, Response, StatusCode, request, response};
use tokio::time::Instant;
use tower::BoxError;

use crate::caller::Caller;
use crate::connection::is_upgrade;
use crate::digest::{Digest, Secret};
use crate::fingerprint::{self, Fingerprint, Payload};
use crate::grpc::{self, Code};
use crate::kept::Keeping;
use crate::key::{self, Extracted, HeaderSyntax, Key, KeySource, Keys, Part};
use crate::media_type;
use crate::rejection::{PolicyPage, Rejection};
use crate::store::Claim;
use crate::telemetry::{self, PassedThrough};

// The defaults. The first group differs by contract.

const WEBHOOK_RETENTION: Duration = Duration::from_secs(3 * 24 * 60 * 60);
const API_RETENTION: Duration = Duration::from_secs(24 * 60 * 60);
const WEBHOOK_PATIENCE: Duration = Duration::from_secs(2);
const API_PATIENCE: Duration = Duration::from_secs(1);
const WEBHOOK_MAX_KEY: usize = 1024;
const API_MAX_KEY: usize = 255;

const LEASE: Duration = Duration::from_secs(30);
const MAX_ATTEMPT: Duration = Duration::from_secs(15 * 60);
const MAX_REQUEST_BODY: usize = 2 << 20;
const BODY_TIMEOUT: Duration = Duration::from_secs(30);
const READY_TIMEOUT: Duration = Duration::from_secs(5);
const MAX_KEPT_BODY: usize = 1 << 20;
const KEPT_BODY_TIMEOUT: Duration = Duration::from_millis(500);
const COMPLETE_WAIT: Duration = Duration::from_secs(2);
const COMPLETE_CEILING: Duration = Duration::from_secs(5 * 60);

/// Whom the layer answers.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Contract {
    Api,
    Webhook,
}

/// What happens to a request whose key is missing or malformed.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[non_exhaustive]
pub enum OnBadKey {
    /// It runs without protection.
    PassThrough,
    /// It is refused with 400.
    Refuse,
}

/// What happens to a request that brings a known key with another payload.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[non_exhaustive]
pub enum OnOtherPayload {
    /// It is refused with 422, also while the first is running, and takes nothing over.
    Refuse,
    /// It is a duplicate like any other; the event says `other_payload`.
    Replay,
}

/// What happens to a request whose body is over the limit.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[non_exhaustive]
pub enum OverLimit {
    /// It runs without protection.
    PassThrough,
    /// It is refused with 413.
    Refuse,
}

/// What happens to a request when the store does not answer.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[non_exhaustive]
pub enum OnStoreError {
    /// It runs without protection: every delivery runs, also several at once. An event that the store knows, but cannot
    /// be read, is refused all the same.
    Bypass,
    /// It is refused with 503.
    Refuse,
}

/// What a duplicate of a finished attempt is answered.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[non_exhaustive]
pub enum Replay {
    /// The kept status, headers and body; 409 where they were not retained.
    Outcome,
    /// 200 for any kept 2xx, with the kept headers and body, empty where they were not retained. Any other kept status is
    /// told as it was: a kept failure is no acknowledgement.
    Acknowledge,
}

/// Everything a layer knows. Its setters and their docs are those of `IdempotencyLayer`.
#[derive(Clone)]
pub(crate) struct Policy {
    pub(crate) contract: Contract,
    pub(crate) enabled: bool,
    pub(crate) key: KeySource,
    pub(crate) header_syntax: HeaderSyntax,
    pub(crate) secret: Option<Secret>,
    /// While secrets rotate, the one before this, or none where there was none.
    pub(crate) previous_secret: Option<Option<Secret>>,
    pub(crate) caller: Option<Caller>,
    pub(crate) scope: Option<Arc<ScopeFn>>,
    pub(crate) applies: Arc<AppliesFn>,
    /// The methods of gRPC that are protected.
    pub(crate) unary: grpc::Methods,
    pub(crate) missing_key: OnBadKey,
    pub(crate) malformed_key: OnBadKey,
    pub(crate) fingerprint: Payload,
    pub(crate) other_payload: OnOtherPayload,
    pub(crate) keeps: Arc<KeepsFn>,
    pub(crate) keeps_code: Arc<KeepsCodeFn>,
    pub(crate) keeping: Keeping,
    pub(crate) expires_header: bool,
    pub(crate) mark_first: bool,
    pub(crate) replay: Replay,
    pub(crate) running_status: StatusCode,
    pub(crate) patience: Duration,
    pub(crate) lease: Duration,
    pub(crate) retention: Duration,
    pub(crate) max_attempt: Duration,
    pub(crate) stream_request_body: bool,
    pub(crate) max_request_body: usize,
    pub(crate) over_limit: OverLimit,
    pub(crate) body_timeout: Duration,
    pub(crate) ready_timeout: Duration,
    pub(crate) max_kept_body: usize,
    pub(crate) kept_body_timeout: Duration,
    pub(crate) complete_wait: Duration,
    pub(crate) complete_ceiling: Duration,
    pub(crate) on_store_error: OnStoreError,
    pub(crate) policy_page: Option<PolicyPage>,
    pub(crate) on_refusal: Option<Arc<RefusalFn>>,
    /// Whether it has been said that requests come without a key, with a malformed one, and by a protocol of which nothing is
    /// protected.
    pub(crate) warned: Arc<[AtomicBool; 3]>,
}

pub(crate) type ScopeFn = dyn Fn(&request::Parts) -> Result<Option<Bytes>, BoxError> + Send + Sync;
pub(crate) type AppliesFn = dyn Fn(&Method) -> bool + Send + Sync;
pub(crate) type KeepsFn = dyn Fn(StatusCode) -> bool + Send + Sync;
pub(crate) type KeepsCodeFn = dyn Fn(Code) -> bool + Send + Sync;
pub(crate) type RefusalFn = dyn Fn(Rejection, &mut Response<Bytes>) + Send + Sync;

// === impl Policy ===

impl Policy {
    pub(crate) fn webhook(key: KeySource) -> Self {
        Self {
            contract: Contract::Webhook,
            enabled: true,
            key,
            header_syntax: HeaderSyntax::Opaque { max_len: WEBHOOK_MAX_KEY },
            secret: None,
            previous_secret: None,
            caller: None,
            scope: None,
            applies: Arc::new(|_| true),
            unary: grpc::Methods::default(),
            missing_key: OnBadKey::PassThrough,
            malformed_key: OnBadKey::PassThrough,
            fingerprint: fingerprint::ignored(),
            other_payload: OnOtherPayload::Replay,
            keeps: Arc::new(|status| status.is_success()),
            keeps_code: Arc::new(|code| code == Code::Ok),
            keeping: Keeping::default(),
            expires_header: false,
            mark_first: false,
            replay: Replay::Acknowledge,
            running_status: StatusCode::SERVICE_UNAVAILABLE,
            patience: WEBHOOK_PATIENCE,
            lease: LEASE,
            retention: WEBHOOK_RETENTION,
            max_attempt: MAX_ATTEMPT,
            stream_request_body: false,
            max_request_body: MAX_REQUEST_BODY,
            over_limit: OverLimit::Refuse,
            body_timeout: BODY_TIMEOUT,
            ready_timeout: READY_TIMEOUT,
            max_kept_body: MAX_KEPT_BODY,
            kept_body_timeout: KEPT_BODY_TIMEOUT,
            complete_wait: COMPLETE_WAIT,
            complete_ceiling: COMPLETE_CEILING,
            on_store_error: OnStoreError::Refuse,
            policy_page: None,
            on_refusal: None,
            warned: Arc::default(),
        }
    }

    /// draft-ietf-httpapi-idempotency-key-header-07, and Stripe where the draft leaves it open.
    pub(crate) fn api(caller: Caller) -> Self {
        Self {
            contract: Contract::Api,
            header_syntax: HeaderSyntax::Visible { max_len: API_MAX_KEY },
            caller: Some(caller),
            applies: Arc::new(|method| matches!(*method, Method::POST | Method::PATCH)),
            malformed_key: OnBadKey::Refuse,
            fingerprint: fingerprint::whole(),
            other_payload: OnOtherPayload::Refuse,
            keeps: Arc::new(is_deterministic),
            keeps_code: Arc::new(Code::is_deterministic),
            replay: Replay::Outcome,
            running_status: StatusCode::CONFLICT,
            patience: API_PATIENCE,
            retention: API_RETENTION,
            ..Self::webhook(key::headers(&["Idempotency-Key", "X-Idempotency-Key"]))
        }
    }

    /// Whether the layer has anything to do with a request at all.
    pub(crate) fn applies(&self, head: &request::Parts) -> bool {
        let never = matches!(head.method, Method::HEAD | Method::OPTIONS | Method::CONNECT);
        let applies = if media_type::is_grpc(&head.headers) {
            // Its head does not tell whether it streams.
            self.unary.contains(head.uri.path())
        } else {
            !media_type::is_grpc_web(&head.headers) && (self.applies)(&head.method)
        };
        self.enabled && !never && !is_upgrade(head) && applies
    }

    /// Whether a request passes through that nobody has decided to let through: the layer was not made with gRPC in mind.
    pub(crate) fn overlooks(&self, head: &request::Parts) -> bool {
        self.enabled && self.unary.is_empty() && media_type::is_grpc(&head.headers)
    }

    /// Whether the request body is there before the claim.
    pub(crate) fn buffers(&self) -> bool {
        !self.stream_request_body || self.key.reads_body() || !self.fingerprint.is_ignored()
    }

    pub(crate) fn extract(&self, head: &request::Parts, body: &Bytes) -> Extracted {
        self.key.extract(head, body, self.header_syntax, self.max_request_body)
    }

    /// The stored keys: digests over scope and parts, under each secret. It fails where the scope does.
    pub(crate) fn stored_keys(&self, head: &request::Parts, parts: &[Part]) -> Result<Keys, BoxError> {
        let scope = self.scope.as_ref().map(|scope| scope(head)).transpose()?;
        let key = |secret: Option<&Secret>| {
            let mut digest = Digest::keyed("key 1", secret);
            digest.part(b'C', self.contract.name().as_bytes());
            digest.part(b'm', head.method.as_str().as_bytes());
            digest.part(b'p', head.uri.path().as_bytes());
            if let Some(caller) = &self.caller {
                caller.digest(head, &mut digest);
            }
            match &scope {
                None => digest.part(b'0', &[]),
                Some(None) => digest.part(b'-', &[]),
                Some(Some(scope)) => digest.part(b's', scope),
            }
            parts.iter().for_each(|part| part.digest(&mut digest));
            Key::new(digest.finish())
        };
        let previous = self.previous_secret.as_ref().map(|previous| key(previous.as_ref()));
        Ok(Keys { current: key(self.secret.as_ref()), previous })
    }

    pub(crate) fn claim(&self, fingerprint: Option<Fingerprint>) -> Claim {
        Claim { fingerprint, refuse_other: self.refuses_other(), ..Claim::new(self.lease, self.retention) }
    }

    /// Whether a known key with another fingerprint, or with none where there is one here, refuses a request.
    pub(crate) fn refuses_other(&self) -> bool {
        self.other_payload == OnOtherPayload::Refuse
    }

    /// When a key that another process runs will be free, where that can be told: its lease has not been renewed when it
    /// should have been. As long as it is renewed, its attempt may end at any moment.
    pub(crate) fn free_at(&self, lease_until: Option<Instant>) -> Option<Instant> {
        lease_until.filter(|until| until.saturating_duration_since(Instant::now()) < self.lease / 2)
    }

    /// Says once of each reason that a request goes unprotected.
    pub(crate) fn warn_once(&self, reason: PassedThrough) {
        let [missing, malformed, unnamed] = &*self.warned;
        let (warned, why) = match reason {
            PassedThrough::KeyMalformed => (malformed, "its key is malformed"),
            PassedThrough::NotApplicable => (unnamed, "it is a call of gRPC, and the layer names no unary method"),
            _ => (missing, "it has no key"),
        };
        if !warned.swap(true, Ordering::Relaxed) {
            telemetry::first_unprotected(self.contract, why);
        }
    }
}

/// A status of a class that is none counts as one of 5xx (RFC 9110 §15).
pub(crate) fn is_failure(status: StatusCode) -> bool {
    status.as_u16() >= 500
}

/// Whether a client that sends the same again would be answered the same.
fn is_deterministic(status: StatusCode) -> bool {
    !status.is_informational()
        && !is_failure(status)
        && !matches!(status.as_u16(), 401 | 403 | 404 | 405 | 408 | 409 | 425 | 429)
}

/// Whether a response says that it has no end (HTML Living Standard §9.2, server-sent events).
pub(crate) fn is_endless(head: &response::Parts) -> bool {
    media_type::is(&head.headers, b"text/event-stream")
}

// === impl Contract ===

impl Contract {
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Api => "api",
            Self::Webhook => "webhook",
        }
    }
}

impl fmt::Debug for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Policy")
            .field("contract", &self.contract)
            .field("key", &self.key)
            .field("caller", &self.caller)
            .field("lease", &self.lease)
            .field("retention", &self.retention)
            .field("patience", &self.patience)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use http::{Request, Version};

    use super::*;
    use crate::caller;

    fn head(request: request::Builder) -> request::Parts {
        request.body(()).unwrap().into_parts().0
    }

    fn text(text: &'static str) -> Part {
        Part::Text(Bytes::from_static(text.as_bytes()))
    }

    /// A change here makes every key in every store a stranger: all that was done would be done again.
    #[test]
    fn stored_keys_do_not_change() {
        let parts = [text("m"), Part::Number(Bytes::from_static(b"1")), Part::Bool(true), Part::Absent];
        let webhook = Policy::webhook(key::json("$.id"));
        let key = webhook.stored_keys(&head(Request::post("/hooks?x=1")), &parts).unwrap().current;
        assert_eq!(key.to_string(), "1KmgR38gJkKjTO4430zyy-DuQxRo1bT1");
        let api = Policy::api(caller::authorization());
        let authorized = Request::post("/orders").header("authorization", "Bearer a");
        let key = api.stored_keys(&head(authorized), &parts[..1]).unwrap().current;
        assert_eq!(key.to_string(), "Qvnep8M2NY2CHCBsIwYDWdK2VLgJSIWX");
    }

    #[test]
    fn scopes_and_parts_do_not_run_into_each_other() {
        let policy = Policy::webhook(key::json("$.id"));
        let key = |path: &str, parts: &[Part]| policy.stored_keys(&head(Request::post(path)), parts).unwrap().current;
        assert_ne!(key("/", &[text("a"), text("bc")]), key("/", &[text("ab"), text("c")]));
        assert_ne!(key("/", &[text("1")]), key("/", &[Part::Number(Bytes::from_static(b"1"))]));
        assert_ne!(key("/a", &[text("b")]), key("/", &[text("ab")]));
        assert_ne!(key("/", &[text("a")]), key("/", &[text("a"), Part::Absent]));
        assert_eq!(key("/?a", &[text("a")]), key("/?b", &[text("a")]));
        let put = policy.stored_keys(&head(Request::put("/")), &[text("a")]).unwrap().current;
        assert_ne!(put, key("/", &[text("a")]));
    }

    #[test]
    fn callers_do_not_share_keys() {
        let key = |caller: Caller, request: request::Builder| {
            Policy::api(caller).stored_keys(&head(request), &[text("k")]).unwrap()
        };
        let by_token = |token: &str| key(caller::authorization(), Request::post("/").header("authorization", token));
        assert_ne!(by_token("a"), by_token("b"));
        assert_eq!(by_token("a"), by_token("a"));
        assert_ne!(key(caller::authorization(), Request::post("/")), by_token(""));
        let shared = |token: &str| key(caller::shared(), Request::post("/").header("authorization", token));
        assert_eq!(shared("a"), shared("b"));
    }

    #[test]
    fn a_secret_decides_the_key_and_the_one_before_it_still_finds_it() {
        let keys = |secret: Option<&[u8]>, previous: Option<Option<&[u8]>>| {
            let policy = Policy {
                secret: secret.map(Secret::new),
                previous_secret: previous.map(|previous| previous.map(Secret::new)),
                ..Policy::webhook(key::json("$.id"))
            };
            policy.stored_keys(&head(Request::post("/")), &[text("a")]).unwrap()
        };
        let none = keys(None, None);
        let old = keys(Some(b"old"), Some(None));
        let new = keys(Some(b"new"), Some(Some(b"old")));
        assert_eq!((none.previous, old.previous, new.previous), (None, Some(none.current), Some(old.current)));
        assert!(none.current != old.current && old.current != new.current);
    }

    #[test]
    fn upgrades_and_methods_without_effects_pass() {
        let policy = Policy::webhook(key::json("$.id"));
        assert!(policy.applies(&head(Request::get("/"))));
        for method in [Method::HEAD, Method::OPTIONS, Method::CONNECT] {
            assert!(!policy.applies(&head(Request::builder().method(method))));
        }
        let upgrade =
            |to: &str| head(Request::post("/").header("connection", "keep-alive, Upgrade").header("upgrade", to));
        assert!(!policy.applies(&upgrade("websocket")));
        for none in ["h2c", "h2, h2c", "", ",", "TLS/1.2", "HTTP/2.0, tls/1.0"] {
            assert!(policy.applies(&upgrade(none)), "{none}");
        }
        let offer = || Request::post("/").header("connection", "upgrade").header("upgrade", "websocket");
        assert!(policy.applies(&head(offer().version(Version::HTTP_10))), "HTTP/1.0 has no upgrades");
        assert!(policy.applies(&head(Request::post("/").header("upgrade", "websocket"))), "without `Connection`");
        assert!(!policy.applies(&head(Request::post("/").header("content-type", "application/grpc+proto"))));
        let api = Policy::api(caller::shared());
        for (method, applies) in
            [(Method::POST, true), (Method::PATCH, true), (Method::PUT, false), (Method::GET, false)]
        {
            assert_eq!(api.applies(&head(Request::builder().method(method))), applies);
        }
    }

    #[test]
    fn what_a_correct_retry_could_change_is_not_kept() {
        for (status, kept) in
            [(200, true), (301, true), (400, true), (422, true), (401, false), (404, false), (500, false), (999, false)]
        {
            assert_eq!((Policy::api(caller::shared()).keeps)(StatusCode::from_u16(status).unwrap()), kept);
        }
        let webhook = Policy::webhook(key::json("$.id"));
        for (status, kept) in [(200, true), (204, true), (301, false), (400, false), (503, false)] {
            assert_eq!((webhook.keeps)(StatusCode::from_u16(status).unwrap()), kept);
        }
    }
}
