//! What is said of each request: one event, and with the feature `metrics` what can be counted and timed.
//!
//! There is nothing to call here, only names to look for. All of them are stable. None holds a raw key, a path, a header or
//! a body.
//!
//! # Events
//!
//! Exactly one event of `tracing` per request, with the target `tower_idempotency`. What needs an operator's eye is a
//! warning, everything else is at debug level.
//!
//! | field | |
//! |---|---|
//! | `outcome`, `reason` | how the request ended: the table below |
//! | `cause` | what lies behind that, in words, where there is more to say |
//! | `contract` | `api` or `webhook` |
//! | `key` | the [digest](crate::key::Key) of its key, which [`Ledger::lookup`](crate::Ledger::lookup) takes |
//! | `attempt` | the number of the attempt that it started |
//! | `waited` | whether it waited for another |
//!
//! Others are not of one request's end:
//!
//! | message | level | fields | |
//! |---|---|---|---|
//! | `a request passed through unprotected; said once per layer` | warning | `contract`, `why` | for each reason once: the key is missing, it is malformed, or no method of gRPC is named |
//! | `a hook panicked` | warning | `hook` | a function that was given to the layer, which went on without it |
//! | `the store does not answer: claims are refused at once until it does` | warning | | |
//! | `the store answers again` | info | | |
//! | `the Redis server may not keep what it is given` | warning | `finding` | it evicts, does not persist, or is too old |
//! | `the Redis server was not looked at whole` | info | `finding` | the user may not ask |
//! | `no thread could be started` | warning | `error`, `advice` | a handler that blocks its thread may lose its lease |
//! | `store call failed` | debug | `call`, `key`, `error`, `cause` | one call; the request's own event says what became of it |
//!
//! # Outcomes
//!
//! | `outcome` | `reason` | |
//! |---|---|---|
//! | `executed` | `kept` | it ran, and its outcome is kept |
//! | | `tombstone` | it ran, and its outcome is kept without its body |
//! | | `already_applied` | the handler found that an earlier attempt had made the effect |
//! | | `released` | it ran, and its outcome is none that is kept: the next delivery runs |
//! | | `error`, `panicked`, `failed_body` | it failed: the next delivery runs |
//! | | `lost` | it ran, but another attempt had taken its place; a warning, like `panicked` and `unstored` |
//! | | `unstored` | it ran, and the store did not take the outcome before the pursuit of it ended |
//! | `replayed` | | it was answered with the outcome of an attempt |
//! | | `other_payload` | the same, and the first request had another payload |
//! | `refused` | `attempt_failed`, `running` | a duplicate that waited in vain |
//! | | `key_missing`, `key_malformed`, `key_reused`, `scope_unknown` | for its key; a warning for the last |
//! | | `body_timeout`, `body_too_large`, `body_unreadable` | for its body |
//! | | `inner_not_ready`, `shutting_down` | for the service behind the layer, also where its own error is passed on |
//! | | `overloaded`, `store_unavailable` | for what the layer needs itself; a warning |
//! | | `outcome_not_retained`, `outcome_unknown` | it ran, and what came of it cannot be told; the second is a warning |
//! | `passed_through` | `key_missing`, `key_malformed` | it ran unprotected for want of a key |
//! | | `body_over_limit` | it ran unprotected, because its body is too large |
//! | | `not_applicable` | the layer has nothing to do with it |
//! | `bypassed` | | it ran unprotected, because the store is down and the layer was told to; a warning |
//! | `abandoned` | | its client left, or a scope, caller or key function panicked, before anything was decided |
//!
//! The reasons of what is refused are the [codes](crate::Rejection::code) that its client is told.
//!
//! # Metrics
//!
//! With the feature `metrics`, what is known goes to the recorder of the crate `metrics` that the program has installed; units
//! and descriptions are given to it with the first request. Install it before the layer is at work. Durations are
//! histograms, in seconds.
//!
//! | name | labels | |
//! |---|---|---|
//! | `idempotency_requests_total` | `contract`, `outcome`, `reason` | counter: requests that have ended, each once |
//! | `idempotency_claim_seconds` | `contract`, `result` | asking the store for a claim, with all sendings, unless the client left meanwhile |
//! | `idempotency_run_seconds` | `contract` | the inner service, from its call until its body is read as far as it may be kept |
//! | `idempotency_wait_seconds` | `contract`, `outcome` | how long a duplicate waited; who did not wait is not in it |
//! | `idempotency_complete_seconds` | `contract`, `result` | from the first sending of an outcome until it is stored or given up |
//! | `idempotency_attempts` | `state` | gauge: attempts in this process |
//! | `idempotency_waiters` | | gauge: duplicates that wait in this process |
//! | `idempotency_open_circuits` | | gauge: parts of the store that do not answer, so that claims are refused at once |
//! | `idempotency_claims_given_up` | | gauge: claims without an attempt that are being released |
//!
//! `contract`, `outcome` and `reason` are those of the event; `reason` is empty where the table shows none. A request that
//! runs ends with its attempt, and is counted then: after it is answered, and also when its client has left. The gauges add up
//! over all ledgers of the process; [`Ledger::in_flight`](crate::Ledger::in_flight) and
//! [`Ledger::waiting`](crate::Ledger::waiting) are those of one.
//!
//! | name | label | |
//! |---|---|---|
//! | `idempotency_claim_seconds` | `result="acquired"` | an attempt may run |
//! | | `result="done"`, `result="running"` | a duplicate, of a finished attempt or a running one |
//! | | `result="mismatch"` | refused: the key came with another payload |
//! | | `result="error"` | the store did not answer, or what it keeps cannot be read |
//! | `idempotency_complete_seconds` | `result="stored"` | |
//! | | `result="lost"` | another attempt had taken its place |
//! | | `result="given_up"` | the ceiling was reached first |
//! | `idempotency_attempts` | `state="running"` | counts against [`max_in_flight`](crate::Ledger::max_in_flight) |
//! | | `state="overdue"` | past [`max_attempt`](crate::IdempotencyLayer::max_attempt), and counts against [`max_overdue`](crate::Ledger::max_overdue) |

#[cfg(feature = "metrics")]
mod metrics;
#[cfg(not(feature = "metrics"))]
#[path = "no_metrics.rs"]
mod metrics;
mod outcome;

use std::error::Error;
use std::iter::successors;
use std::time::Duration;

use tokio::time::Instant;
use tracing::{Level, event};

pub(crate) use self::metrics::{RunTimer, Shown, Timer};
pub(crate) use self::outcome::{Executed, Outcome, PassedThrough};
use crate::attempt::{Asked, Pursued};
use crate::key::Key;
use crate::policy::Contract;
use crate::store::StoreError;

const TARGET: &str = "tower_idempotency";

/// What the gauges show.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Shows {
    GivenUp,
    OpenCircuits,
    Overdue,
    Running,
    Waiting,
}

/// What is known of one request. Its end is reported once, also when its future is dropped.
#[derive(Debug)]
pub(crate) struct Report {
    contract: Contract,
    key: Option<Key>,
    attempt: Option<u32>,
    waits_since: Option<Instant>,
    waited: Option<Duration>,
    cause: Option<Box<str>>,
    open: bool,
}

impl Report {
    pub(crate) fn open(contract: Contract) -> Self {
        metrics::describe();
        Self { contract, key: None, attempt: None, waits_since: None, waited: None, cause: None, open: true }
    }

    pub(crate) fn key(&mut self, key: Key) {
        self.key = Some(key);
    }

    /// The request has to wait for another, from now on.
    pub(crate) fn waits(&mut self) {
        self.waits_since = Some(Instant::now());
    }

    /// It waits no longer, if it did.
    pub(crate) fn goes_on(&mut self) {
        self.waited = self.waits_since.map(|since| since.elapsed());
    }

    pub(crate) fn attempt(&mut self, number: u32) {
        self.attempt = Some(number);
    }

    /// What lies behind the outcome, in words that name neither key nor body.
    pub(crate) fn cause(&mut self, error: &dyn Error) {
        let chain = successors(Some(error), |&error| error.source());
        self.cause = Some(chain.map(ToString::to_string).collect::<Vec<_>>().join(": ").into());
    }

    /// Reports the end of the request.
    pub(crate) fn close(mut self, outcome: Outcome) {
        self.say(outcome);
    }

    fn say(&mut self, outcome: Outcome) {
        self.open = false;
        let (contract, key) = (self.contract.name(), self.key.map(tracing::field::display));
        let (attempt, waited, cause) = (self.attempt, self.waited.is_some(), self.cause.as_deref());
        let is_alarming = outcome.is_alarming();
        let (outcome, reason) = (outcome.name(), outcome.reason());
        metrics::ended(contract, outcome, reason, self.waited);
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
            if self.attempt.is_none() {
                self.goes_on();
            }
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

/// Claims got no answer, and are refused at once from now on.
pub(crate) fn store_is_out() {
    event!(target: TARGET, Level::WARN, "the store does not answer: claims are refused at once until it does");
}

/// It has answered one.
pub(crate) fn store_is_back() {
    event!(target: TARGET, Level::INFO, "the store answers again");
}

/// What a store's server is like.
#[cfg(feature = "redis")]
pub(crate) fn server(is_known: bool, finding: &str) {
    // What a limited user may not see is nothing to wake anybody for.
    if is_known {
        event!(target: TARGET, Level::WARN, finding, "the Redis server may not keep what it is given");
    } else {
        event!(target: TARGET, Level::INFO, finding, "the Redis server was not looked at whole");
    }
}

/// A claim was asked for, and this came of it.
pub(crate) fn asked(contract: Contract, timer: Timer, asked: &Result<Asked, StoreError>) {
    let result = match asked {
        Ok(Asked::Acquired(_)) => "acquired",
        Ok(Asked::Done { .. }) => "done",
        Ok(Asked::Mismatch) => "mismatch",
        Ok(Asked::Running { .. }) => "running",
        Err(_) => "error",
    };
    metrics::timed(timer, metrics::CLAIM, contract, result);
}

/// An outcome was on its way into the store, and this came of it.
pub(crate) fn pursued(contract: Contract, timer: Timer, pursued: Pursued) {
    let result = match pursued {
        Pursued::Held => "stored",
        Pursued::Lost => "lost",
        Pursued::Unanswered => "given_up",
    };
    metrics::timed(timer, metrics::COMPLETE, contract, result);
}

/// There is no thread for the ticker: alarms are left to the runtimes, and may be late.
pub(crate) fn no_thread(error: &std::io::Error) {
    let advice = "a handler that blocks its thread may lose its lease";
    event!(target: TARGET, Level::WARN, %error, advice, "no thread could be started");
}

/// A function that was given to the layer panicked, and the layer went on without it.
pub(crate) fn hook_panicked(hook: &'static str) {
    event!(target: TARGET, Level::WARN, hook, "a hook panicked");
}
