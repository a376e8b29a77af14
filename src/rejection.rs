//! Every refusal of the layer.
//!
//! Refusals are responses, never errors: the layer's error is the inner service's. Each is a problem document (RFC 9457)
//! with a stable code that a machine can read, or a status of [gRPC](crate::grpc), and stands in the response's extensions
//! as a [`Rejection`].
//!
//! None of them is 403, 406 or 410, which some senders of webhooks take for a wish to be left alone.

use bytes::Bytes;
use http::header::{CONTENT_TYPE, HeaderValue, LINK, RETRY_AFTER};
use http::{Response, StatusCode};
use serde_json::{Map, Value};
use tokio::time::Instant;

/// When a refused request should come again, in seconds, where nobody knows. An attempt that runs is mostly done by then.
pub(crate) const RETRY_AFTER_SECS: u64 = 1;

/// A page that explains the rules to whoever is refused.
#[derive(Clone, Debug)]
pub(crate) struct PolicyPage {
    pub(crate) url: String,
    pub(crate) link: HeaderValue,
}

/// Why the layer refused a request.
///
/// All but [`Rejection::OutcomeNotRetained`], [`Rejection::OutcomeUnknown`] and [`Rejection::ShuttingDown`] say that this
/// delivery has not run.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
#[non_exhaustive]
pub enum Rejection {
    /// The attempts this duplicate waited for came to nothing.
    AttemptFailed,
    /// The request body did not arrive within
    /// [`body_timeout`](crate::IdempotencyLayer::body_timeout).
    BodyTimeout,
    /// The request body is larger than
    /// [`max_request_body`](crate::IdempotencyLayer::max_request_body).
    BodyTooLarge,
    /// The request body broke off.
    BodyUnreadable,
    /// The inner service was not ready within
    /// [`ready_timeout`](crate::IdempotencyLayer::ready_timeout).
    InnerNotReady,
    /// There is something where the key should be, but not a key.
    KeyMalformed,
    /// There is no key, and one is required.
    KeyMissing,
    /// The key came before with another payload.
    KeyReused,
    /// It ran, and its outcome was too large, streaming or applied earlier, and cannot be told again.
    OutcomeNotRetained,
    /// It ran, but another attempt had taken its place, and what came of that one is not known yet.
    OutcomeUnknown,
    /// More attempts run, or more duplicates wait, than may.
    Overloaded,
    /// Another attempt has the key and did not finish while this duplicate waited.
    Running,
    /// The function of [`try_scope`](crate::IdempotencyLayer::try_scope) failed.
    ScopeUnknown,
    /// The process is about to end.
    ShuttingDown,
    /// The store did not answer, or what it keeps cannot be read.
    StoreUnavailable,
}

impl Rejection {
    /// A stable name that a machine can read; it stands in the problem document as `code`.
    #[must_use]
    pub const fn code(self) -> &'static str {
        match self {
            Self::AttemptFailed => "attempt_failed",
            Self::BodyTimeout => "body_timeout",
            Self::BodyTooLarge => "body_too_large",
            Self::BodyUnreadable => "body_unreadable",
            Self::InnerNotReady => "inner_not_ready",
            Self::KeyMalformed => "key_malformed",
            Self::KeyMissing => "key_missing",
            Self::KeyReused => "key_reused",
            Self::OutcomeNotRetained => "outcome_not_retained",
            Self::OutcomeUnknown => "outcome_unknown",
            Self::Overloaded => "overloaded",
            Self::Running => "running",
            Self::ScopeUnknown => "scope_unknown",
            Self::ShuttingDown => "shutting_down",
            Self::StoreUnavailable => "store_unavailable",
        }
    }

    pub(crate) const fn title(self) -> &'static str {
        match self {
            Self::AttemptFailed => "the attempts that ran before this request failed",
            Self::BodyTimeout => "the request body did not arrive in time",
            Self::BodyTooLarge => "the request body is too large",
            Self::BodyUnreadable => "the request body could not be read",
            Self::InnerNotReady => "the service is not ready",
            Self::KeyMalformed => "the idempotency key is malformed",
            Self::KeyMissing => "the idempotency key is missing",
            Self::KeyReused => "the idempotency key was used with another payload",
            Self::OutcomeNotRetained => "the request was executed and its outcome is not retained",
            Self::OutcomeUnknown => "the outcome of the request is not known yet",
            Self::Overloaded => "too many requests are running",
            Self::Running => "a request with this idempotency key is running",
            Self::ScopeUnknown => "the scope of the idempotency key is unknown",
            Self::ShuttingDown => "the service is shutting down",
            Self::StoreUnavailable => "idempotency cannot be guaranteed at the moment",
        }
    }

    /// The status, except for [`Rejection::Running`], which has that of its contract.
    const fn status(self) -> StatusCode {
        match self {
            Self::BodyTimeout => StatusCode::REQUEST_TIMEOUT,
            Self::BodyTooLarge => StatusCode::PAYLOAD_TOO_LARGE,
            Self::BodyUnreadable | Self::KeyMalformed | Self::KeyMissing => StatusCode::BAD_REQUEST,
            Self::KeyReused => StatusCode::UNPROCESSABLE_ENTITY,
            Self::OutcomeNotRetained => StatusCode::CONFLICT,
            Self::ScopeUnknown => StatusCode::INTERNAL_SERVER_ERROR,
            Self::AttemptFailed
            | Self::InnerNotReady
            | Self::OutcomeUnknown
            | Self::Overloaded
            | Self::Running
            | Self::ShuttingDown
            | Self::StoreUnavailable => StatusCode::SERVICE_UNAVAILABLE,
        }
    }

    /// Whether the same request may fare better later.
    const fn is_retryable(self) -> bool {
        matches!(self.status(), StatusCode::SERVICE_UNAVAILABLE)
    }

    /// Whether a sender that takes the refusal for an acknowledgement would lose an event: there is one, and this delivery
    /// of it has not run.
    pub(crate) const fn is_of_an_event(self) -> bool {
        !matches!(self, Self::KeyMalformed | Self::KeyMissing | Self::OutcomeNotRetained)
    }

    /// After how many seconds the same request may fare better, if it may.
    pub(crate) fn retry_after(self, until: Option<Instant>) -> Option<u64> {
        let is_told = self == Self::Running || self.is_retryable();
        is_told.then(|| until.map_or(RETRY_AFTER_SECS, seconds_until))
    }

    /// The refusal as a problem document. `running` is the status of [`Rejection::Running`]; `until` is when the reason will
    /// be gone, where that is known.
    pub(crate) fn problem(
        self,
        running: StatusCode,
        page: Option<&PolicyPage>,
        until: Option<Instant>,
    ) -> Response<Bytes> {
        let status = if self == Self::Running { running } else { self.status() };
        let mut problem = Map::new();
        if let Some(page) = page {
            problem.insert("type".to_owned(), format!("{}#{}", page.url, self.code()).into());
        }
        problem.insert("title".to_owned(), self.title().into());
        problem.insert("status".to_owned(), status.as_u16().into());
        problem.insert("code".to_owned(), self.code().into());
        let mut response = Response::new(Bytes::from(Value::from(problem).to_string()));
        *response.status_mut() = status;
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/problem+json"));
        if let Some(secs) = self.retry_after(until) {
            headers.insert(RETRY_AFTER, secs.into());
        }
        if let Some(page) = page {
            headers.insert(LINK, page.link.clone());
        }
        response
    }
}

/// Rounded up, and never so soon that it would be at once.
fn seconds_until(until: Instant) -> u64 {
    let left = until.saturating_duration_since(Instant::now());
    left.as_secs().saturating_add(u64::from(left.subsec_nanos() > 0)).max(1)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_refusal_is_a_problem_document_with_a_code() {
        let response = Rejection::Running.problem(StatusCode::CONFLICT, None, None);
        assert_eq!(response.status(), StatusCode::CONFLICT);
        assert_eq!(response.headers()[RETRY_AFTER], "1");
        assert_eq!(response.headers()[CONTENT_TYPE], "application/problem+json");
        let problem: Value = serde_json::from_slice(response.body()).unwrap();
        assert_eq!((&problem["code"], &problem["status"]), (&"running".into(), &409.into()));
        assert_eq!(problem.get("type"), None, "`about:blank`, RFC 9457 §4.2.1");
    }

    #[test]
    fn a_policy_is_linked() {
        let url = "https://example.com/retries".to_owned();
        let page = PolicyPage { url, link: HeaderValue::from_static("<https://example.com/retries>; rel=describedby") };
        let response = Rejection::KeyMissing.problem(StatusCode::CONFLICT, Some(&page), None);
        assert_eq!(response.headers()[LINK], page.link);
        assert_eq!(response.headers().get(RETRY_AFTER), None);
        let problem: Value = serde_json::from_slice(response.body()).unwrap();
        assert_eq!(problem["type"], "https://example.com/retries#key_missing");
    }

    #[tokio::test(start_paused = true)]
    async fn when_to_come_again_is_rounded_up() {
        let after = |left: u64| {
            let until = Instant::now() + Duration::from_millis(left);
            let response = Rejection::Running.problem(StatusCode::CONFLICT, None, Some(until));
            response.headers()[RETRY_AFTER].to_str().unwrap().to_owned()
        };
        assert_eq!([0, 1, 1000, 1001, 29_500].map(after), ["1", "1", "1", "2", "30"]);
    }
}
