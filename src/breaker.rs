//! Refuses at once what the store would not answer anyway, and lets one claim through to see whether it does again.

use std::collections::HashMap;
use std::fmt;
use std::time::Duration;

use tokio::time::Instant;

use crate::key::Key;
use crate::store::StoreError;
use crate::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use crate::sync::{Mutex, lock};
use crate::telemetry::{self, Shown, Shows};

/// How many claims in a row get no answer before it opens.
const FAILURES: u32 = 3;

/// The pauses between two probes, before jitter. Short, for a probe costs one request its patience and the store one
/// command.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LAST_PAUSE: Duration = Duration::from_millis(250);

/// For how long a circuit that has closed is remembered: what was sent before may fail until then.
const MEMORY: Duration = Duration::from_secs(5);

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
    /// A key of which nothing is ever heard says little about the others.
    last_failed: Option<Key>,
    open: Option<Open>,
    /// What was sent before says nothing about now.
    closed_at: Option<Instant>,
}

struct Open {
    pause: Duration,
    next_probe: Instant,
    _shown: Shown,
}

/// A claim that may be sent. Dropped without an answer, it says nothing about the store.
pub(crate) struct Trial<'a> {
    breaker: &'a Breaker,
    domain: u16,
    key: Key,
    /// If there was any trouble then.
    admitted: Option<Instant>,
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
    pub(crate) fn admit(&self, domain: u16, key: Key) -> Result<Trial<'_>, StoreError> {
        let admitted = (self.troubled.load(Ordering::Relaxed) > 0).then(Instant::now);
        if let Some(now) = admitted
            && let Some(open) = lock(&self.circuits).get_mut(&domain).and_then(|circuit| circuit.open.as_mut())
            && !open.probes(now)
        {
            return Err(StoreError::unreachable(CircuitOpen));
        }
        Ok(Trial { breaker: self, domain, key, admitted })
    }

    fn answered(&self, domain: u16) {
        if self.troubled.load(Ordering::Relaxed) == 0 {
            return;
        }
        let now = Instant::now();
        let mut circuits = lock(&self.circuits);
        let Some(circuit) = circuits.get_mut(&domain) else { return };
        let was_open = circuit.open.take().is_some();
        (circuit.failures, circuit.last_failed) = (0, None);
        if was_open {
            circuit.closed_at = Some(now);
        } else if circuit.closed_at.is_none_or(|at| now - at > MEMORY) {
            circuits.remove(&domain);
        }
        self.troubled.store(circuits.len(), Ordering::Relaxed);
        drop(circuits);
        if was_open {
            telemetry::store_is_back();
        }
    }

    fn failed(&self, trial: &Trial<'_>) {
        let max_failures = self.max_failures.load(Ordering::Relaxed);
        let mut circuits = lock(&self.circuits);
        let circuit = circuits.entry(trial.domain).or_default();
        if circuit.closed_at.is_none_or(|at| trial.admitted.is_some_and(|admitted| at < admitted))
            && circuit.last_failed != Some(trial.key)
        {
            circuit.failures = circuit.failures.saturating_add(1);
            circuit.last_failed = Some(trial.key);
        }
        let opens = circuit.open.is_none() && max_failures > 0 && circuit.failures >= max_failures;
        if opens {
            circuit.open = Some(Open::new());
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
        let next_probe = Instant::now() + jittered(FIRST_PAUSE);
        Self { pause: FIRST_PAUSE, next_probe, _shown: Shown::new(Shows::OpenCircuits) }
    }

    /// Whether this one is to try it. The next one does not wait for what comes of that.
    fn probes(&mut self, now: Instant) -> bool {
        if now < self.next_probe {
            return false;
        }
        self.pause = (self.pause * 2).min(LAST_PAUSE);
        self.next_probe = now + jittered(self.pause);
        true
    }
}

/// So that many processes do not probe in step.
fn jittered(pause: Duration) -> Duration {
    pause.mul_f64(rand::random_range(0.5..1.0))
}

// === impl Trial ===

impl Trial<'_> {
    /// Learns from what came of the claim. That the store refused it is an answer.
    pub(crate) fn ended<T>(&self, result: &Result<T, StoreError>) {
        match result {
            Err(error) if error.is_outage() => self.breaker.failed(self),
            _ => self.breaker.answered(self.domain),
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

    fn key(n: u32) -> Key {
        Key::from([n as u8; 24])
    }

    fn outage(breaker: &Breaker, domain: u16, n: u32) {
        breaker.admit(domain, key(n)).unwrap().ended::<()>(&Err(StoreError::unknown("no answer")));
    }

    fn opened() -> Breaker {
        let breaker = Breaker::new();
        (0..FAILURES).for_each(|n| outage(&breaker, 0, n));
        breaker
    }

    #[tokio::test(start_paused = true)]
    async fn it_opens_after_failures_in_a_row_in_one_domain() {
        let breaker = Breaker::new();
        for _ in 0..10 {
            (1..FAILURES).for_each(|n| outage(&breaker, 0, n));
            outage(&breaker, 1, 0);
            breaker.admit(0, key(0)).unwrap().ended(&Ok(()));
            breaker.admit(1, key(0)).unwrap().ended(&Ok(()));
        }
        (0..FAILURES).for_each(|n| outage(&breaker, 0, n));
        assert!(breaker.admit(0, key(9)).is_err());
        assert!(breaker.admit(1, key(9)).is_ok(), "the other domain answers");
    }

    #[tokio::test(start_paused = true)]
    async fn one_key_alone_does_not_open_it() {
        let breaker = Breaker::new();
        (0..100).for_each(|_| outage(&breaker, 0, 1));
        assert!(breaker.admit(0, key(2)).is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn a_refusal_is_an_answer() {
        let breaker = Breaker::new();
        for n in 0..10 {
            for error in [StoreError::refused("full"), StoreError::unreadable("rubbish")] {
                breaker.admit(0, key(n)).unwrap().ended::<()>(&Err(error));
            }
        }
        assert!(breaker.admit(0, key(0)).is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn one_claim_after_the_other_probes_until_one_is_answered() {
        let breaker = opened();
        advance(FIRST_PAUSE).await;
        let first = breaker.admit(0, key(0)).unwrap();
        assert!(breaker.admit(0, key(1)).is_err(), "one is enough");
        advance(LAST_PAUSE).await;
        let second = breaker.admit(0, key(1)).expect("one that gets no answer keeps nobody from trying");
        first.ended::<()>(&Err(StoreError::unreachable("down")));
        assert!(breaker.admit(0, key(2)).is_err());
        second.ended(&Ok(()));
        assert!((0..3).all(|n| breaker.admit(0, key(n)).is_ok()));
    }

    #[tokio::test(start_paused = true)]
    async fn what_was_sent_before_it_closed_does_not_open_it_again() {
        let breaker = Breaker::new();
        let early: Vec<_> = (0..10).map(|n| breaker.admit(0, key(n)).unwrap()).collect();
        (0..FAILURES).for_each(|n| outage(&breaker, 0, n));
        advance(LAST_PAUSE).await;
        breaker.admit(0, key(0)).unwrap().ended(&Ok(()));
        early.iter().for_each(|trial| trial.ended::<()>(&Err(StoreError::unknown("no answer"))));
        assert!(breaker.admit(0, key(0)).is_ok());
        advance(MEMORY * 2).await;
        breaker.admit(0, key(0)).unwrap().ended(&Ok(()));
        assert_eq!(breaker.troubled.load(Ordering::Relaxed), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn it_can_be_switched_off() {
        let breaker = Breaker::new();
        breaker.open_after(0);
        (0..100).for_each(|n| outage(&breaker, 0, n));
        assert!(breaker.admit(0, key(0)).is_ok());
    }
}
