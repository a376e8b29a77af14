//! Duplicates of a running attempt: waiting, sharing, taking over.
//!
//! All requests of this process for one key share a [`Flight`]. One of them at a time has the lead: it alone speaks to
//! the store, and its attempt keeps the lead while it runs. The others wait for what comes of it, or for the lead.

use std::collections::HashMap;
use std::mem;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use tokio::sync::{OwnedMutexGuard, watch};
use tokio::time::{Instant, sleep_until};

use crate::fingerprint::Fingerprint;
use crate::gauge::{Gauge, Ticket};
use crate::key::Key;
use crate::ledger::Ledger;
use crate::record::Record;
use crate::sync::atomic::{AtomicBool, Ordering};
use crate::sync::{Mutex, MutexGuard, lock};
use crate::telemetry::Report;

/// The pauses between two looks at a key that another process runs, before jitter. The first is also the least between
/// two looks that hints of the store bring about: a hint is followed at once, also right after a look that was due, so
/// that in the long run there is one look per such pause at most, and for a moment there may be one more.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LAST_PAUSE: Duration = Duration::from_millis(250);

/// How many attempts may fail before all that wait are refused: a failing handler is not run once for each of them.
const MAX_FAILURES: u32 = 2;

/// All flights of a ledger.
#[derive(Default)]
pub(crate) struct Flights(Mutex<HashMap<Key, Members>>);

struct Members {
    flight: Arc<Flight>,
    count: usize,
}

/// What the requests of this process for one key share.
struct Flight {
    lead: Arc<tokio::sync::Mutex<Course>>,
    news: watch::Sender<News>,
    waiting: Arc<Gauge>,
    /// It is off the map, and its members need not be counted any more.
    is_retired: AtomicBool,
}

/// What whoever leads hands on to the next.
struct Course {
    failures: u32,
    pause: Duration,
    next_look: Instant,
    /// Whether a hint has brought it forward.
    is_hinted: bool,
    /// From when on a hint is followed.
    next_hinted: Instant,
    /// The store's next hint. It stays from one look to the next, so that nothing that happens during a look is missed and
    /// the store has one watcher per key, not one after the other.
    hint: Option<BoxFuture<'static, ()>>,
}

#[derive(Clone)]
enum News {
    Claiming,
    Landed(Landing),
    Running {
        fingerprint: Option<Fingerprint>,
        /// When the lease ends that another process has.
        lease_until: Option<Instant>,
    },
}

/// How a flight ended for those who waited.
#[derive(Clone)]
pub(crate) enum Landing {
    Done {
        fingerprint: Option<Fingerprint>,
        record: Arc<Record>,
    },
    Failed,
    StoreUnavailable,
    /// What the store keeps cannot be read.
    Unreadable,
}

/// One request's place in a flight.
pub(crate) struct Seat {
    membership: Membership,
    news: watch::Receiver<News>,
    waiting: Option<(Ticket, Ticket)>,
    fingerprint: Option<Fingerprint>,
    refuse_other: bool,
}

/// The right to speak to the store about a key, one at a time in this process.
pub(crate) struct Lead {
    membership: Membership,
    course: OwnedMutexGuard<Course>,
}

/// A flight is there as long as somebody is on it.
struct Membership {
    ledger: Ledger,
    key: Key,
    flight: Arc<Flight>,
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
        let membership = Membership::join(ledger, key);
        let news = membership.flight.news.subscribe();
        Self { membership, news, waiting: None, fingerprint, refuse_other }
    }

    /// Whether this request has had to wait.
    fn has_waited(&self) -> bool {
        self.waiting.is_some()
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
        let flight = Arc::clone(&self.membership.flight);
        let mut lead = pin!(Arc::clone(&flight.lead).lock_owned());
        let mut course = None;
        loop {
            let news = self.news.borrow_and_update().clone();
            match news {
                News::Landed(Landing::Done { fingerprint, .. }) if self.refuses(fingerprint) => return Turn::Mismatch,
                News::Landed(landing) => return Turn::Landed(landing),
                News::Running { fingerprint, .. } if self.refuses(fingerprint) => return Turn::Mismatch,
                News::Claiming | News::Running { .. } => {}
            }
            let now = Instant::now();
            let next_look = course.as_ref().map(|course: &OwnedMutexGuard<Course>| course.next_look);
            if next_look.is_some_and(|look| look <= now)
                && let Some(course) = course.take()
            {
                return Turn::Lead(Lead { membership: self.membership.again(), course });
            }
            tokio::select! {
                biased;
                // First, so that those who are told together do not queue up at the lock of the lead.
                _ = self.news.changed() => {}
                taken = &mut lead, if course.is_none() => {
                    course = Some(taken);
                    continue;
                }
                () = std::future::ready(()), if !self.has_waited() => {
                    if !self.start_waiting() {
                        return Turn::Full;
                    }
                    report.waits();
                }
                () = sleep_until(next_look.unwrap_or(patience).min(patience)) => {
                    if Instant::now() >= patience {
                        return Turn::OutOfPatience(self.lease_until());
                    }
                }
                // Last, so that who may not wait at all makes no store watch.
                () = self.membership.hinted(course.as_deref_mut()) => {}
            }
        }
    }

    /// When the lease ends that another process has, as far as is known by now.
    fn lease_until(&self) -> Option<Instant> {
        match &*self.news.borrow() {
            News::Running { lease_until, .. } => *lease_until,
            News::Claiming | News::Landed(_) => None,
        }
    }

    fn start_waiting(&mut self) -> bool {
        self.waiting = self.membership.ledger.wait_ticket().zip(self.membership.flight.waiting.take());
        self.waiting.is_some()
    }
}

// === impl Lead ===

impl Lead {
    /// This process runs the key: what other processes do to it is of no interest.
    pub(crate) fn running_here(&mut self) {
        self.course.hint = None;
    }

    /// Another process runs the key. Whoever leads next looks again, later and later, but not long after the lease ends.
    pub(crate) fn running_elsewhere(mut self, fingerprint: Option<Fingerprint>, lease_left: Duration) {
        let pause = self.course.pause.mul_f64(rand::random_range(1.0..1.5)).min(lease_left + FIRST_PAUSE);
        let now = Instant::now();
        self.course.next_look = now + pause;
        if mem::take(&mut self.course.is_hinted) {
            self.course.next_hinted = now + FIRST_PAUSE;
        }
        self.course.pause = (self.course.pause * 2).min(LAST_PAUSE);
        self.tell_running(fingerprint, Some(Instant::now() + lease_left));
    }

    /// Lets those who wait compare their payload with that of the attempt.
    pub(crate) fn running(&self, fingerprint: Option<Fingerprint>) {
        self.tell_running(fingerprint, None);
    }

    fn tell_running(&self, fingerprint: Option<Fingerprint>, lease_until: Option<Instant>) {
        self.membership.flight.news.send_if_modified(|news| {
            let known = matches!(news, News::Running { fingerprint: there, .. } if *there == fingerprint);
            *news = News::Running { fingerprint, lease_until };
            !known
        });
    }

    /// The attempt came to nothing: one of those who wait takes over, the others go on waiting. When that one comes to
    /// nothing too, the others are refused.
    pub(crate) fn failed(mut self) {
        self.course.failures += 1;
        if self.course.failures >= MAX_FAILURES {
            self.land(Landing::Failed);
        } else {
            self.membership.flight.news.send_replace(News::Claiming);
        }
    }

    /// Tells all who wait. Who comes later asks the store.
    pub(crate) fn land(self, landing: Landing) {
        self.membership.retire();
        self.membership.flight.news.send_replace(News::Landed(landing));
    }

    /// Leaves those who wait to ask the store for themselves: this process is not the one that knows.
    pub(crate) fn step_down(self) {
        self.membership.flight.news.send_replace(News::Claiming);
    }
}

// === impl Membership ===

impl Membership {
    fn join(ledger: &Ledger, key: Key) -> Self {
        let mut flights = ledger.flights().lock();
        let members = flights.entry(key).or_insert_with(|| Members { flight: Flight::new(ledger), count: 0 });
        members.count += 1;
        Self { ledger: ledger.clone(), key, flight: Arc::clone(&members.flight) }
    }

    fn again(&self) -> Self {
        if let Some(members) = self.ledger.flights().lock().get_mut(&self.key)
            && Arc::ptr_eq(&members.flight, &self.flight)
        {
            members.count += 1;
        }
        Self { ledger: self.ledger.clone(), key: self.key, flight: Arc::clone(&self.flight) }
    }

    /// Waits for a hint of the store and brings the next look forward, for whoever has the course of the flight. Dropped
    /// halfway, it loses nothing.
    async fn hinted(&self, course: Option<&mut Course>) {
        let Some(course) = course.filter(|course| !course.is_hinted && course.next_hinted < course.next_look) else {
            return std::future::pending().await;
        };
        course.hint.get_or_insert_with(|| self.next_hint()).await;
        // Waits for the next one before anybody looks.
        let mut next = self.next_hint();
        course.hint = (&mut next).now_or_never().is_none().then_some(next);
        let look = course.next_hinted.max(Instant::now());
        if look < course.next_look {
            course.next_look = look;
            course.is_hinted = true;
        }
    }

    fn next_hint(&self) -> BoxFuture<'static, ()> {
        let (ledger, key) = (self.ledger.clone(), self.key);
        async move { ledger.store().changed(&key).await }.boxed()
    }

    /// Takes the flight off the map, so that whoever comes next starts a new one.
    fn retire(&self) {
        let mut flights = self.ledger.flights().lock();
        if flights.get(&self.key).is_some_and(|members| Arc::ptr_eq(&members.flight, &self.flight)) {
            flights.remove(&self.key);
        }
        self.flight.is_retired.store(true, Ordering::Release);
    }
}

impl Drop for Membership {
    fn drop(&mut self) {
        if self.flight.is_retired.load(Ordering::Acquire) {
            return;
        }
        let mut flights = self.ledger.flights().lock();
        if let Some(members) = flights.get_mut(&self.key)
            && Arc::ptr_eq(&members.flight, &self.flight)
        {
            members.count -= 1;
            if members.count == 0 {
                flights.remove(&self.key);
            }
        }
    }
}

// === impl Flights ===

impl Flights {
    fn lock(&self) -> MutexGuard<'_, HashMap<Key, Members>> {
        lock(&self.0)
    }

    #[cfg(all(test, shuttle))]
    pub(crate) fn is_empty(&self) -> bool {
        self.lock().is_empty()
    }
}

// === impl Flight ===

impl Flight {
    fn new(ledger: &Ledger) -> Arc<Self> {
        let now = Instant::now();
        let pause = FIRST_PAUSE;
        let course = Course { failures: 0, pause, next_look: now, is_hinted: false, next_hinted: now, hint: None };
        Arc::new(Self {
            lead: Arc::new(tokio::sync::Mutex::new(course)),
            news: watch::Sender::new(News::Claiming),
            waiting: ledger.waiting_per_key(),
            is_retired: AtomicBool::new(false),
        })
    }
}
