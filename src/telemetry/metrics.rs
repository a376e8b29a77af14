//! What goes to the recorder that the program has installed, under the names in the docs above.

use std::sync::Once;
use std::time::Duration;

use ::metrics::{Gauge, Unit, counter, describe_counter, describe_gauge, describe_histogram, gauge, histogram};
use tokio::time::Instant;

use super::{Shows, TARGET};
use crate::policy::Contract;

const REQUESTS: &str = "idempotency_requests_total";
pub(super) const CLAIM: &str = "idempotency_claim_seconds";
const RUN: &str = "idempotency_run_seconds";
const WAIT: &str = "idempotency_wait_seconds";
pub(super) const COMPLETE: &str = "idempotency_complete_seconds";
const ATTEMPTS: &str = "idempotency_attempts";
const WAITERS: &str = "idempotency_waiters";
const OPEN_CIRCUITS: &str = "idempotency_open_circuits";
const GIVEN_UP: &str = "idempotency_claims_given_up";

/// One of what a gauge shows, until it is dropped.
///
/// It keeps its gauge: a recorder that is installed meanwhile is not told of an end whose beginning it has missed.
pub(crate) struct Shown(Gauge);

/// Times what may be given up: then it says nothing.
pub(crate) struct Timer(Instant);

/// Times a run of the inner service, however it ends.
pub(crate) struct RunTimer {
    contract: &'static str,
    started: Instant,
}

/// Tells the recorder what there will be, once. Programs install it before their first request.
pub(super) fn describe() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        describe_counter!(REQUESTS, Unit::Count, "Requests that have ended, by how.");
        describe_histogram!(CLAIM, Unit::Seconds, "How long it took to ask the store for a claim, with all sendings.");
        describe_histogram!(RUN, Unit::Seconds, "How long the inner service ran, with its body as far as it is kept.");
        describe_histogram!(WAIT, Unit::Seconds, "How long duplicates waited, of those that did.");
        describe_histogram!(COMPLETE, Unit::Seconds, "How long it took until an outcome was stored or given up.");
        describe_gauge!(ATTEMPTS, Unit::Count, "Attempts in this process.");
        describe_gauge!(WAITERS, Unit::Count, "Duplicates that wait in this process.");
        describe_gauge!(OPEN_CIRCUITS, Unit::Count, "Parts of the store that do not answer.");
        describe_gauge!(GIVEN_UP, Unit::Count, "Claims without an attempt that are being released.");
        // A zero can be told from a name that is misspelt.
        for shows in [Shows::GivenUp, Shows::OpenCircuits, Shows::Overdue, Shows::Running, Shows::Waiting] {
            shows.gauge().increment(0.0);
        }
    });
}

/// A request has ended.
pub(super) fn ended(contract: &'static str, outcome: &'static str, reason: &'static str, waited: Option<Duration>) {
    counter!(target: TARGET, REQUESTS, "contract" => contract, "outcome" => outcome, "reason" => reason).increment(1);
    if let Some(waited) = waited {
        histogram!(target: TARGET, WAIT, "contract" => contract, "outcome" => outcome).record(waited);
    }
}

// === impl Timer ===

impl Timer {
    pub(crate) fn start() -> Self {
        Self(Instant::now())
    }
}

/// What was timed has ended.
#[allow(clippy::needless_pass_by_value, reason = "it ends once")]
pub(super) fn timed(timer: Timer, name: &'static str, contract: Contract, result: &'static str) {
    let labels = [("contract", contract.name()), ("result", result)];
    histogram!(target: TARGET, name, &labels).record(timer.0.elapsed());
}

// === impl Shown ===

impl Shown {
    pub(crate) fn new(shows: Shows) -> Self {
        let gauge = shows.gauge();
        gauge.increment(1.0);
        Self(gauge)
    }
}

impl Drop for Shown {
    fn drop(&mut self) {
        self.0.decrement(1.0);
    }
}

// === impl Shows ===

impl Shows {
    fn gauge(self) -> Gauge {
        match self {
            Self::GivenUp => gauge!(target: TARGET, GIVEN_UP),
            Self::OpenCircuits => gauge!(target: TARGET, OPEN_CIRCUITS),
            Self::Overdue => gauge!(target: TARGET, ATTEMPTS, "state" => "overdue"),
            Self::Running => gauge!(target: TARGET, ATTEMPTS, "state" => "running"),
            Self::Waiting => gauge!(target: TARGET, WAITERS),
        }
    }
}

// === impl RunTimer ===

impl RunTimer {
    pub(crate) fn start(contract: Contract) -> Self {
        Self { contract: contract.name(), started: Instant::now() }
    }
}

impl Drop for RunTimer {
    fn drop(&mut self) {
        histogram!(target: TARGET, RUN, "contract" => self.contract).record(self.started.elapsed());
    }
}
