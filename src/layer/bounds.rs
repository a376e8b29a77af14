//! The setters for how long things take, and how large they are.

use std::time::Duration;

use super::IdempotencyLayer;
use crate::policy::OverLimit;
use crate::store::{MAX_DURATION, MIN_DURATION};

const LONGEST_ATTEMPT: Duration = Duration::from_secs(30 * 24 * 60 * 60);

impl IdempotencyLayer {
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
    /// minutes. At most 30 days.
    #[must_use]
    pub fn max_attempt(self, max: Duration) -> Self {
        self.set(|policy| policy.max_attempt = max.min(LONGEST_ATTEMPT))
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
}

fn in_range(duration: Duration) -> Duration {
    assert!((MIN_DURATION..=MAX_DURATION).contains(&duration), "a duration is from 1 ms to 366 days");
    duration
}
