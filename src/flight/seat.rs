//! One request on a flight: it waits for the flight to land, or for the lead.

use std::future::poll_fn;
use std::sync::Arc;
use std::task::{Poll, Waker};

use tokio::time::{Instant, sleep_until};

use super::{Flight, Landing, Lead};
use crate::fingerprint::Fingerprint;
use crate::gauge::Ticket;
use crate::key::Key;
use crate::ledger::Ledger;
use crate::sync::lock;
use crate::telemetry::Report;

/// One request's place in a flight.
pub(crate) struct Seat {
    pub(super) flight: Arc<Flight>,
    waiting: Option<Waiting>,
    fingerprint: Option<Fingerprint>,
    refuse_other: bool,
}

/// That a request has had to wait.
struct Waiting {
    place: u64,
    _ticket: Ticket,
}

/// What comes of taking part.
pub(crate) enum Turn {
    Full,
    Landed(Landing),
    Lead(Lead),
    Mismatch,
    /// With when the lease ends that another process has.
    OutOfPatience(Option<Instant>),
}

// === impl Seat ===

impl Seat {
    pub(crate) fn take(ledger: &Ledger, key: Key, fingerprint: Option<Fingerprint>, refuse_other: bool) -> Self {
        Self { flight: Flight::join(ledger, key), waiting: None, fingerprint, refuse_other }
    }

    /// Whether a fingerprint found under the key refuses this request.
    pub(crate) fn refuses(&self, fingerprint: Option<Fingerprint>) -> bool {
        self.refuse_other && fingerprint != self.fingerprint
    }

    /// Whether it brings another payload than the request that brought the key first.
    pub(crate) fn differs_from(&self, first: Option<Fingerprint>) -> bool {
        self.fingerprint != first
    }

    /// Waits for the flight to land or for the lead; the first to come has it at once.
    pub(crate) async fn turn(&mut self, patience: Instant, report: &mut Report) -> Turn {
        let lead = match self.look(None) {
            Some(Turn::Lead(lead)) if lead.next_look().is_none() => return Turn::Lead(lead),
            Some(Turn::Lead(lead)) => Some(lead),
            Some(turn) => return turn,
            None => None,
        };
        let turn = Box::pin(self.wait_for(lead, patience, report)).await;
        report.goes_on();
        turn
    }

    /// The same, where there is something to wait for.
    async fn wait_for(&mut self, lead: Option<Lead>, patience: Instant, report: &mut Report) -> Turn {
        if !self.wait(report) {
            return Turn::Full;
        }
        let turn = match lead {
            Some(lead) => Turn::Lead(lead),
            None => tokio::select! {
                biased;
                turn = poll_fn(|context| self.look(Some(context.waker())).map_or(Poll::Pending, Poll::Ready)) => turn,
                () = sleep_until(patience) => return Turn::OutOfPatience(self.lease_until()),
            },
        };
        let Turn::Lead(mut lead) = turn else { return turn };
        // There is no news but what whoever has the lead brings.
        while let Some(look) = lead.next_look() {
            tokio::select! {
                biased;
                () = sleep_until(look.min(patience)) => {
                    if patience <= Instant::now() {
                        return Turn::OutOfPatience(self.lease_until());
                    }
                }
                // Last, so that who may not wait at all makes no store watch.
                () = lead.hinted() => {}
            }
        }
        Turn::Lead(lead)
    }

    /// What there is for this request by now. If there is nothing yet, it is woken to look again.
    fn look(&self, waker: Option<&Waker>) -> Option<Turn> {
        // Who is told with many others does not queue up at the lock.
        if let Some(landing) = self.flight.landed.get() {
            return Some(self.told(landing));
        }
        // The waker of an earlier look is dropped after the lock is left: what goes with it may look here, too.
        let _before;
        let mut state = lock(&self.flight.state);
        if let Some(landing) = self.flight.landed.get() {
            return Some(self.told(landing));
        }
        if state.running.is_some_and(|running| self.refuses(running.fingerprint)) {
            return Some(Turn::Mismatch);
        }
        let place = self.waiting.as_ref().map(|waiting| waiting.place);
        if let Some(course) = state.course.take() {
            _before = place.and_then(|place| state.asleep.remove(&place));
            return Some(Turn::Lead(Lead { flight: Arc::clone(&self.flight), course }));
        }
        _before = place.zip(waker).and_then(|(place, waker)| state.asleep.insert(place, waker.clone()));
        None
    }

    fn told(&self, landing: &Landing) -> Turn {
        match landing {
            Landing::Done { fingerprint, .. } if self.refuses(*fingerprint) => Turn::Mismatch,
            landing => Turn::Landed(landing.clone()),
        }
    }

    /// Begins to wait, if it does not yet, unless too many do.
    fn wait(&mut self, report: &mut Report) -> bool {
        if self.waiting.is_none() {
            let ticket = self.flight.ledger.wait_ticket();
            self.waiting = ticket.and_then(|_ticket| Some(Waiting { place: self.flight.place()?, _ticket }));
            if self.waiting.is_some() {
                report.waits();
            }
        }
        self.waiting.is_some()
    }

    /// When the lease ends that another process has, as far as is known by now.
    fn lease_until(&self) -> Option<Instant> {
        lock(&self.flight.state).running?.lease_until
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        if let Some(waiting) = &self.waiting
            && self.flight.landed.get().is_none()
        {
            self.flight.leave(waiting.place);
        }
    }
}
