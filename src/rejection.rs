//! Every refusal of the layer.
//!
//! Refusals are responses, never errors: the layer's error is the inner service's. Each is a problem document (RFC 9457)
//! with a stable code that a machine can read, and stands in the response's extensions as a [`Rejection`].
//!
//! None of them is 403, 406 or 410, which some senders of webhooks take for a wish to be left alone.

use bytes::Bytes;
use http::header::{CONTENT_TYPE, HeaderValue, LINK, RETRY_AFTER};
use http::{Response, StatusCode};

use crate::body::ResponseBody;

/// When a refused request should come again, in seconds. An attempt that runs is mostly done by then.
const RETRY_AFTER_SECS: &str = "1";

/// Why the layer refused a request.
///
/// All but [`Rejection::OutcomeUnknown`] say that this delivery has not run.
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
            Self::ShuttingDown => "shutting_down",
            Self::StoreUnavailable => "store_unavailable",
        }
    }

    const fn title(self) -> &'static str {
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

    /// The refusal as a response. `running` is the status of [`Rejection::Running`], `policy` a URL that explains the
    /// rules.
    pub(crate) fn response<R>(self, running: StatusCode, policy: Option<&HeaderValue>) -> Response<ResponseBody<R>> {
        let status = if self == Self::Running { running } else { self.status() };
        let (code, title) = (self.code(), self.title());
        // Both are ours and need no escaping.
        let problem = format!(r#"{{"title":"{title}","status":{},"code":"{code}"}}"#, status.as_u16());
        let mut response = Response::new(ResponseBody::buffered(Bytes::from(problem), None));
        *response.status_mut() = status;
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/problem+json"));
        if self.is_retryable() {
            headers.insert(RETRY_AFTER, HeaderValue::from_static(RETRY_AFTER_SECS));
        }
        if let Some(policy) = policy {
            headers.insert(LINK, policy.clone());
        }
        response.extensions_mut().insert(self);
        response
    }
}

#[cfg(test)]
mod tests {
    use http_body_util::{BodyExt as _, Empty};

    use super::*;

    #[tokio::test]
    async fn a_refusal_is_a_problem_document_with_a_code() {
        let response = Rejection::Running.response::<Empty<Bytes>>(StatusCode::CONFLICT, None);
        assert_eq!(response.status(), StatusCode::CONFLICT);
        assert_eq!(response.headers()[RETRY_AFTER], "1");
        assert_eq!(response.headers()[CONTENT_TYPE], "application/problem+json");
        assert_eq!(response.extensions().get(), Some(&Rejection::Running));
        let body = response.into_body().collect().await.unwrap().to_bytes();
        let problem: serde_json::Value = serde_json::from_slice(&body).unwrap();
        assert_eq!((&problem["code"], &problem["status"]), (&"running".into(), &409.into()));
    }

    #[test]
    fn a_policy_is_linked() {
        let policy = HeaderValue::from_static("<https://example.com/retries>; rel=describedby");
        let response = Rejection::KeyMissing.response::<Empty<Bytes>>(StatusCode::CONFLICT, Some(&policy));
        assert_eq!(response.headers()[LINK], policy);
        assert_eq!(response.headers().get(RETRY_AFTER), None);
    }
}
