//! What is said of each request: exactly one event, with its terminal outcome.
//!
//! Events have the target `tower_idempotency` and the fields `outcome`, `reason`, `cause`, `contract`, `key` (the digest,
//! never the raw key), `attempt` and `waited`. What needs an operator's eye is a warning, everything else is at debug level.

use std::error::Error;
use std::iter::successors;

use tracing::{Level, event};

use crate::key::Key;
use crate::policy::Contract;
use crate::rejection::Rejection;
use crate::store::StoreError;

const TARGET: &str = "tower_idempotency";

/// How a request ended. The names are the stable values of the field `outcome`.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Outcome {
    /// The client left before anything was decided.
    Abandoned,
    /// It ran without protection, because the store is down and the layer was told to bypass it.
    Bypassed,
    /// It ran.
    Executed(Executed),
    /// The layer had nothing to do with it.
    PassedThrough(PassedThrough),
    Refused(Rejection),
    /// It was answered with the outcome of an attempt.
    Replayed {
        /// The request that brought the key first had another payload.
        other_payload: bool,
    },
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Executed {
    /// The handler found that an earlier attempt had made the effect.
    AlreadyApplied,
    /// The inner service returned an error.
    Error,
    /// Its response body failed.
    FailedBody,
    Kept,
    /// Another attempt had taken its place.
    Lost,
    Panicked,
    /// The outcome is none that is kept; the next delivery runs.
    Released,
    /// It ran without its body being kept.
    Tombstone,
    /// The store did not take the outcome before the pursuit ended.
    Unstored,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum PassedThrough {
    BodyOverLimit,
    KeyMalformed,
    KeyMissing,
    NotApplicable,
}

/// What is known of one request. Its end is reported once, also when its future is dropped.
#[derive(Debug)]
pub(crate) struct Report {
    contract: Contract,
    key: Option<Key>,
    attempt: Option<u32>,
    waited: bool,
    cause: Option<String>,
    open: bool,
}

impl Report {
    pub(crate) fn open(contract: Contract) -> Self {
        Self { contract, key: None, attempt: None, waited: false, cause: None, open: true }
    }

    pub(crate) fn key(&mut self, key: Key) {
        self.key = Some(key);
    }

    pub(crate) fn waited(&mut self, waited: bool) {
        self.waited = waited;
    }

    pub(crate) fn attempt(&mut self, number: u32) {
        self.attempt = Some(number);
    }

    /// What lies behind the outcome, in words that name neither key nor body.
    pub(crate) fn cause(&mut self, error: &dyn Error) {
        let chain = successors(Some(error), |&error| error.source());
        self.cause = Some(chain.map(ToString::to_string).collect::<Vec<_>>().join(": "));
    }

    /// Reports the end of the request.
    pub(crate) fn close(mut self, outcome: Outcome) {
        self.say(outcome);
    }

    fn say(&mut self, outcome: Outcome) {
        self.open = false;
        let (contract, key) = (self.contract.name(), self.key.map(tracing::field::display));
        let (attempt, waited, cause) = (self.attempt, self.waited, self.cause.as_deref());
        let is_alarming = outcome.is_alarming();
        let (outcome, reason) = (outcome.name(), outcome.reason());
        // The level of an event is a constant of its place.
        if is_alarming {
            event!(target: TARGET, Level::WARN, outcome, reason, cause, contract, key, attempt, waited);
        } else {
            event!(target: TARGET, Level::DEBUG, outcome, reason, cause, contract, key, attempt, waited);
        }
    }
}

impl Drop for Report {
    fn drop(&mut self) {
        if self.open {
            self.say(Outcome::Abandoned);
        }
    }
}

/// Said once per layer: a sender whose events all lack a key would otherwise go unprotected and unnoticed.
pub(crate) fn first_unprotected(contract: Contract, why: &str) {
    let contract = contract.name();
    event!(target: TARGET, Level::WARN, contract, why, "a request passed through unprotected; said once per layer");
}

/// Why a store call did not do what it was asked for. The request's own event says what became of it.
pub(crate) fn store_error(call: &'static str, key: &Key, error: &StoreError) {
    let cause = error.source().map(ToString::to_string);
    event!(target: TARGET, Level::DEBUG, call, %key, %error, cause, "store call failed");
}

/// A function that was given to the layer panicked, and the layer went on without it.
pub(crate) fn hook_panicked(hook: &'static str) {
    event!(target: TARGET, Level::WARN, hook, "a hook panicked");
}

impl Outcome {
    /// Whether an operator has to see it. A malformed key is its sender's affair, and the first of each layer is warned of.
    const fn is_alarming(self) -> bool {
        matches!(
            self,
            Self::Bypassed
                | Self::Executed(Executed::Lost | Executed::Panicked | Executed::Unstored)
                | Self::Refused(Rejection::OutcomeUnknown | Rejection::Overloaded | Rejection::StoreUnavailable)
        )
    }

    const fn name(self) -> &'static str {
        match self {
            Self::Abandoned => "abandoned",
            Self::Bypassed => "bypassed",
            Self::Executed(_) => "executed",
            Self::PassedThrough(_) => "passed_through",
            Self::Refused(_) => "refused",
            Self::Replayed { .. } => "replayed",
        }
    }

    const fn reason(self) -> &'static str {
        match self {
            Self::Abandoned | Self::Bypassed | Self::Replayed { other_payload: false } => "",
            Self::Executed(Executed::AlreadyApplied) => "already_applied",
            Self::Executed(Executed::Error) => "error",
            Self::Executed(Executed::FailedBody) => "failed_body",
            Self::Executed(Executed::Kept) => "kept",
            Self::Executed(Executed::Lost) => "lost",
            Self::Executed(Executed::Panicked) => "panicked",
            Self::Executed(Executed::Released) => "released",
            Self::Executed(Executed::Tombstone) => "tombstone",
            Self::Executed(Executed::Unstored) => "unstored",
            Self::PassedThrough(PassedThrough::BodyOverLimit) => "body_over_limit",
            Self::PassedThrough(PassedThrough::KeyMalformed) => "key_malformed",
            Self::PassedThrough(PassedThrough::KeyMissing) => "key_missing",
            Self::PassedThrough(PassedThrough::NotApplicable) => "not_applicable",
            Self::Refused(rejection) => rejection.code(),
            Self::Replayed { other_payload: true } => "other_payload",
        }
    }
}
