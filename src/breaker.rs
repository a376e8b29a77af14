//! Refuses at once what the store would not answer anyway, and lets one claim through to see whether it does again.

use std::collections::HashMap;
use std::fmt;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::time::Duration;

use tokio::time::Instant;

use crate::lock::lock;
use crate::store::StoreError;
use crate::telemetry::{self, Shown, Shows};

/// How many claims in a row get no answer before it opens.
const FAILURES: u32 = 3;

/// The pauses between two probes, before jitter. Short, for a probe costs one request its patience and the store one
/// command.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LAST_PAUSE: Duration = Duration::from_millis(250);

/// The circuits of a ledger, one for each failure domain that gives trouble.
pub(crate) struct Breaker {
    circuits: Mutex<HashMap<u16, Circuit>>,
    /// How many there are: mostly none, and then no lock is taken.
    troubled: AtomicUsize,
    max_failures: AtomicU32,
}

#[derive(Default)]
struct Circuit {
    failures: u32,
    open: Option<Open>,
}

struct Open {
    pause: Duration,
    until: Instant,
    probing: bool,
    _shown: Shown,
}

/// A claim that may be sent. Dropped without an answer, it says nothing about the store.
pub(crate) struct Trial<'a> {
    breaker: &'a Breaker,
    domain: u16,
    is_probe: bool,
}

/// The store has not answered of late.
#[derive(Debug)]
struct CircuitOpen;

// === impl Breaker ===

impl Breaker {
    pub(crate) fn new() -> Self {
        Self { circuits: Mutex::default(), troubled: AtomicUsize::new(0), max_failures: AtomicU32::new(FAILURES) }
    }

    pub(crate) fn open_after(&self, failures: u32) {
        self.max_failures.store(failures, Ordering::Relaxed);
    }

    /// Whether a claim may be sent.
    pub(crate) fn admit(&self, domain: u16) -> Result<Trial<'_>, StoreError> {
        let mut is_probe = false;
        if self.troubled.load(Ordering::Relaxed) > 0
            && let Some(open) = lock(&self.circuits).get_mut(&domain).and_then(|circuit| circuit.open.as_mut())
        {
            if open.probing || Instant::now() < open.until {
                return Err(StoreError::unreachable(CircuitOpen));
            }
            open.probing = true;
            is_probe = true;
        }
        Ok(Trial { breaker: self, domain, is_probe })
    }

    fn answered(&self, domain: u16) {
        if self.troubled.load(Ordering::Relaxed) == 0 {
            return;
        }
        let mut circuits = lock(&self.circuits);
        let circuit = circuits.remove(&domain);
        self.troubled.store(circuits.len(), Ordering::Relaxed);
        drop(circuits);
        if circuit.is_some_and(|circuit| circuit.open.is_some()) {
            telemetry::store_is_back();
        }
    }

    fn failed(&self, domain: u16, is_probe: bool) {
        let max_failures = self.max_failures.load(Ordering::Relaxed);
        let mut circuits = lock(&self.circuits);
        let circuit = circuits.entry(domain).or_default();
        circuit.failures = circuit.failures.saturating_add(1);
        let opens = circuit.open.is_none() && max_failures > 0 && circuit.failures >= max_failures;
        if opens {
            circuit.open = Some(Open::new());
        } else if let (Some(open), true) = (&mut circuit.open, is_probe) {
            open.again();
        }
        self.troubled.store(circuits.len(), Ordering::Relaxed);
        drop(circuits);
        if opens {
            telemetry::store_is_out();
        }
    }
}

// === impl Open ===

impl Open {
    fn new() -> Self {
        let until = Instant::now() + jittered(FIRST_PAUSE);
        Self { pause: FIRST_PAUSE, until, probing: false, _shown: Shown::new(Shows::OpenCircuits) }
    }

    fn again(&mut self) {
        self.pause = (self.pause * 2).min(LAST_PAUSE);
        self.until = Instant::now() + jittered(self.pause);
    }
}

/// So that many processes do not probe in step.
fn jittered(pause: Duration) -> Duration {
    pause.mul_f64(rand::random_range(0.5..1.0))
}

// === impl Trial ===

impl Trial<'_> {
    /// Learns from what came of the claim. That the store refused it is an answer.
    pub(crate) fn ended<T>(self, result: &Result<T, StoreError>) {
        match result {
            Err(error) if error.is_outage() => self.breaker.failed(self.domain, self.is_probe),
            _ => self.breaker.answered(self.domain),
        }
    }
}

impl Drop for Trial<'_> {
    fn drop(&mut self) {
        if self.is_probe
            && let Some(open) =
                lock(&self.breaker.circuits).get_mut(&self.domain).and_then(|circuit| circuit.open.as_mut())
        {
            open.probing = false;
        }
    }
}

// === impl CircuitOpen ===

impl fmt::Display for CircuitOpen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("it has not answered of late, and is asked again in a moment")
    }
}

impl std::error::Error for CircuitOpen {}

#[cfg(test)]
mod tests {
    use tokio::time::advance;

    use super::*;

    fn outage(breaker: &Breaker, domain: u16) {
        breaker.admit(domain).unwrap().ended::<()>(&Err(StoreError::unknown("no answer")));
    }

    fn opened() -> Breaker {
        let breaker = Breaker::new();
        (0..FAILURES).for_each(|_| outage(&breaker, 0));
        breaker
    }

    #[tokio::test(start_paused = true)]
    async fn it_opens_after_failures_in_a_row_in_one_domain() {
        let breaker = Breaker::new();
        for _ in 0..10 {
            (1..FAILURES).for_each(|_| outage(&breaker, 0));
            outage(&breaker, 1);
            breaker.admit(0).unwrap().ended(&Ok(()));
            breaker.admit(1).unwrap().ended(&Ok(()));
        }
        (0..FAILURES).for_each(|_| outage(&breaker, 0));
        assert!(breaker.admit(0).is_err());
        assert!(breaker.admit(1).is_ok(), "the other domain answers");
    }

    #[tokio::test(start_paused = true)]
    async fn a_refusal_is_an_answer() {
        let breaker = Breaker::new();
        for _ in 0..10 {
            for error in [StoreError::refused("full"), StoreError::unreadable("rubbish")] {
                breaker.admit(0).unwrap().ended::<()>(&Err(error));
            }
        }
        assert!(breaker.admit(0).is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn one_claim_at_a_time_probes_and_closes_it() {
        let breaker = opened();
        advance(LAST_PAUSE).await;
        let probe = breaker.admit(0).unwrap();
        assert!(breaker.admit(0).is_err(), "one is enough");
        drop(probe);
        let probe = breaker.admit(0).expect("one whose client has left leaves the place to the next");
        probe.ended::<()>(&Err(StoreError::unreachable("down")));
        assert!(breaker.admit(0).is_err());
        advance(LAST_PAUSE).await;
        breaker.admit(0).unwrap().ended(&Ok(()));
        let trials: Vec<_> = (0..3).map(|_| breaker.admit(0).unwrap()).collect();
        assert_eq!((trials.len(), breaker.troubled.load(Ordering::Relaxed)), (3, 0));
    }

    #[tokio::test(start_paused = true)]
    async fn what_was_sent_before_it_opened_postpones_no_probe() {
        let breaker = Breaker::new();
        let early: Vec<_> = (0..10).map(|_| breaker.admit(0).unwrap()).collect();
        (0..FAILURES).for_each(|_| outage(&breaker, 0));
        advance(LAST_PAUSE).await;
        early.into_iter().for_each(|trial| trial.ended::<()>(&Err(StoreError::unknown("no answer"))));
        assert!(breaker.admit(0).is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn it_can_be_switched_off() {
        let breaker = Breaker::new();
        breaker.open_after(0);
        (0..100).for_each(|_| outage(&breaker, 0));
        assert!(breaker.admit(0).is_ok());
    }
}
