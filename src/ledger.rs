//! A store with what goes with it in one process.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::FutureExt as _;
use tokio_util::task::task_tracker::{TaskTracker, TaskTrackerToken};

use crate::alarms::Alarms;
use crate::breaker::Breaker;
use crate::fingerprint::Fingerprint;
use crate::flight::Flights;
use crate::gauge::{Gauge, Ticket};
use crate::key::{Key, Keys};
use crate::near::Near;
use crate::store::erased::{ErasedStore, StoreFuture};
use crate::store::{Entry, Forgotten, State, Store, StoreError};
use crate::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use crate::sync::{AbortHandle, Runtime};
use crate::telemetry::Shows;
use crate::within::within;

const MAX_IN_FLIGHT: usize = 1024;
const MAX_OVERDUE: usize = 1024;
const MAX_WAITING: usize = 8192;
const MAX_WAITING_PER_KEY: usize = 1024;
const MAX_GIVEN_UP: usize = 1024;
const STORE_TIMEOUT: Duration = Duration::from_millis(250);

/// A store, the attempts that run in this process, and the duplicates that wait for them.
///
/// Make one for each store and share it: it is cheap to clone, and clones are one ledger. Layers that differ per route
/// belong on the same ledger, so that their bounds hold together.
///
/// It belongs to one runtime, unless its store is the one in memory: a store's connections live in the runtime that made them, and where
/// that is blocked or not driven any more, leases are lost in others that share it. Where there is a runtime per thread, make a store and
/// a ledger in each.
#[derive(Clone)]
pub struct Ledger(Arc<Inner>);

struct Inner {
    store: Box<dyn ErasedStore>,
    store_timeout_ms: AtomicU64,
    breaker: Breaker,
    flights: Flights,
    near: Near,
    max_waiting_per_key: AtomicUsize,
    waiting: Arc<Gauge>,
    in_flight: Arc<Gauge>,
    overdue: Arc<Gauge>,
    given_up: Arc<Gauge>,
    alarms: Alarms,
    tasks: TaskTracker,
    draining: AtomicBool,
}

/// The right to start an attempt.
pub(crate) struct AttemptTicket {
    ticket: Option<Ticket>,
    _token: TaskTrackerToken,
}

impl AttemptTicket {
    /// Goes on under another right, unless it counts no more.
    pub(crate) fn exchange(&mut self, ticket: Ticket) {
        self.ticket = self.ticket.take().and(Some(ticket));
    }

    /// Makes room for the next, although whoever drains still waits for this one.
    pub(crate) fn give_back(&mut self) {
        self.ticket = None;
    }
}

/// What the store knows of an event that may not start here.
pub(crate) enum Known {
    Done(Option<Fingerprint>, Bytes),
    /// Nothing, or that the next attempt may start.
    Nothing,
    Running,
}

/// The process was asked to stop, and not everything had come to its end when its time was up.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct StillRunning {
    /// How many attempts were running. Where it is none, claims were still to be released.
    pub attempts: usize,
}

/// The store's deadline has passed.
#[derive(Debug)]
struct TimedOut;

// === impl Ledger ===

impl Ledger {
    /// A ledger over a store, whose type is erased.
    pub fn new(store: impl Store) -> Self {
        Self(Arc::new(Inner {
            store: Box::new(store),
            store_timeout_ms: AtomicU64::new(STORE_TIMEOUT.as_millis() as u64),
            breaker: Breaker::new(),
            flights: Flights::default(),
            near: Near::default(),
            max_waiting_per_key: AtomicUsize::new(MAX_WAITING_PER_KEY),
            waiting: Gauge::new(MAX_WAITING, Some(Shows::Waiting)),
            in_flight: Gauge::new(MAX_IN_FLIGHT, Some(Shows::Running)),
            overdue: Gauge::new(MAX_OVERDUE, Some(Shows::Overdue)),
            given_up: Gauge::new(MAX_GIVEN_UP, Some(Shows::GivenUp)),
            alarms: Alarms::default(),
            tasks: TaskTracker::new(),
            draining: AtomicBool::new(false),
        }))
    }

    /// How many attempts run at once, in all layers of this ledger; beyond, a request is refused with 503 at once.
    /// Default: 1024.
    #[must_use]
    pub fn max_in_flight(self, attempts: usize) -> Self {
        self.0.in_flight.limit(attempts);
        self
    }

    /// How many attempts past their layer's [`max_attempt`](crate::IdempotencyLayer::max_attempt) do not count as running;
    /// beyond, they do, so that handlers that hang stay bounded. Default: 1024.
    #[must_use]
    pub fn max_overdue(self, attempts: usize) -> Self {
        self.0.overdue.limit(attempts);
        self
    }

    /// How many duplicates wait at once for attempts that run; beyond, a duplicate is refused with 503 at once.
    /// Default: 8192.
    #[must_use]
    pub fn max_waiting(self, duplicates: usize) -> Self {
        self.0.waiting.limit(duplicates);
        self
    }

    /// How many of them wait for the same key. Default: 1024.
    #[must_use]
    pub fn max_waiting_per_key(self, duplicates: usize) -> Self {
        self.0.max_waiting_per_key.store(duplicates, Ordering::Relaxed);
        self
    }

    /// How many claims that got no answer, or whose client left, are released at once in the background; the lease of those
    /// beyond runs out by itself. Default: 1024.
    #[must_use]
    pub fn max_given_up(self, claims: usize) -> Self {
        self.0.given_up.limit(claims);
        self
    }

    /// How long one call of the store may take; a claim that got no answer is sent again, all within 1.6 times that.
    /// Default: 250 ms.
    #[must_use]
    pub fn store_timeout(self, timeout: Duration) -> Self {
        let millis = u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX).max(1);
        self.0.store_timeout_ms.store(millis, Ordering::Relaxed);
        self
    }

    /// After how many claims in a row without an answer the circuit opens: from then on requests are refused at once, as
    /// when the store does not answer, but for one now and then that tries it, after pauses of 250 ms at most. Claims of one key
    /// alone do not open it. 0 switches this off. Default: 3.
    ///
    /// Of a store of several parts, such as a cluster, each [part](crate::store::Store::failure_domain) has a circuit of its own.
    #[must_use]
    pub fn break_after(self, claims: u32) -> Self {
        self.0.breaker.open_after(claims);
        self
    }

    /// Keeps finished outcomes at hand in this process, in so many bytes and for so long each, and tells duplicates of them without
    /// asking the store: a storm of one event's duplicates costs it nothing, and is answered also while it is down. The first to
    /// come are the first to go when the bytes are used up. 0 bytes switch it off. Default: off, because it weakens two
    /// things by the time it keeps:
    ///
    /// - What *another* process [forgets](Self::forget) is told here for up to `life` longer, and so is what this one forgets by a
    ///   call that gets no answer. What it is told to be forgotten is not.
    /// - An outcome may be told for up to `life` longer than it is kept.
    ///
    /// Neither makes an event run twice, nor acknowledges one that has not run: only finished outcomes are kept, never claims.
    #[must_use]
    pub fn near_cache(self, bytes: usize, life: Duration) -> Self {
        self.0.near.set(bytes, life);
        self
    }

    /// Waits for the attempts that run, and for what is still to be stored of those that have run. From here on, for good,
    /// requests that would start an attempt are refused with 503; finished keys are still replayed.
    ///
    /// Call it when the server has stopped accepting, before the process ends. Requests that pass through are the server's
    /// own to wait for. An attempt that is cut off by the end of its process runs again at the next delivery, when its lease
    /// is over. Call it before the runtime is dropped, too: where a handler blocks a thread then, the drop waits for that handler, but
    /// its lease is not renewed any more.
    ///
    /// # Errors
    ///
    /// If `timeout` passes first.
    pub async fn drain(&self, timeout: Duration) -> Result<(), StillRunning> {
        self.0.draining.store(true, Ordering::SeqCst);
        self.0.tasks.close();
        let drained = tokio::time::timeout(timeout, self.0.tasks.wait()).await;
        drained.map_err(|_| StillRunning { attempts: self.in_flight() + self.0.overdue.used() })
    }

    /// How many attempts run now, of [`max_in_flight`](Self::max_in_flight); those [overdue](Self::max_overdue) do not count.
    /// For a page that shows how the process is doing: it has changed by the time it is read.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.0.in_flight.used()
    }

    /// How many duplicates wait now for attempts that run, of [`max_waiting`](Self::max_waiting).
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.0.waiting.used()
    }

    /// What the store knows of a key, as an event or [`Attempt::key`](crate::Attempt::key) showed it.
    ///
    /// # Errors
    ///
    /// If the store does not answer within its timeout.
    pub async fn lookup(&self, key: &Key) -> Result<Option<Entry>, StoreError> {
        self.bounded(self.store().lookup(key)).await
    }

    /// Lets the next delivery of a key run, whatever came of the last one. A key that is running only with `force`, since
    /// it may then run twice. An effect whose `Dedup` row is still in the database is not made again by that.
    ///
    /// # Errors
    ///
    /// If the store does not answer within its timeout: then it may or may not have forgotten the key.
    pub async fn forget(&self, key: &Key, force: bool) -> Result<Forgotten, StoreError> {
        let _forgotten_here_too = self.near().forget(*key);
        self.bounded(self.store().forget(key, force)).await
    }

    /// How far an event has come that may not start here: the outcome with the fingerprint of the request that brought it first.
    pub(crate) async fn known(&self, keys: Keys) -> Result<Known, StoreError> {
        let mut known = Known::Nothing;
        for key in [Some(keys.current), keys.previous].into_iter().flatten() {
            match self.lookup(&key).await? {
                Some(Entry { fingerprint, state: State::Done(record), .. }) => {
                    return Ok(Known::Done(fingerprint, record));
                }
                Some(Entry { state: State::Running, .. }) => known = Known::Running,
                Some(Entry { state: State::Free, .. }) | None => {}
            }
        }
        Ok(known)
    }

    pub(crate) fn store(&self) -> &dyn ErasedStore {
        &*self.0.store
    }

    pub(crate) fn call_timeout(&self) -> Duration {
        Duration::from_millis(self.0.store_timeout_ms.load(Ordering::Relaxed))
    }

    /// A call of the store, with a deadline around it.
    pub(crate) fn bounded<'a, T>(
        &self,
        call: StoreFuture<'a, T>,
    ) -> impl Future<Output = Result<T, StoreError>> + use<'a, T> {
        bounded_by(self.call_timeout(), call)
    }

    pub(crate) fn breaker(&self) -> &Breaker {
        &self.0.breaker
    }

    pub(crate) fn flights(&self) -> &Flights {
        &self.0.flights
    }

    pub(crate) fn near(&self) -> &Near {
        &self.0.near
    }

    pub(crate) fn wait_ticket(&self) -> Option<Ticket> {
        self.0.waiting.take()
    }

    pub(crate) fn max_waiting_of_a_key(&self) -> usize {
        self.0.max_waiting_per_key.load(Ordering::Relaxed)
    }

    pub(crate) fn is_draining(&self) -> bool {
        self.0.draining.load(Ordering::SeqCst)
    }

    /// The right to start an attempt, if one may start. Whoever drains waits for it, so it is taken before that is looked at.
    pub(crate) fn attempt(&self) -> Option<AttemptTicket> {
        let ticket = AttemptTicket { ticket: Some(self.0.in_flight.take()?), _token: self.0.tasks.token() };
        (!self.is_draining()).then_some(ticket)
    }

    /// The right to go on without counting as running.
    pub(crate) fn overdue(&self) -> Option<Ticket> {
        self.0.overdue.take()
    }

    /// Whether two handles are one ledger.
    pub(crate) fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    pub(crate) fn given_up(&self) -> Option<Ticket> {
        self.0.given_up.take()
    }

    pub(crate) fn alarms(&self) -> &Alarms {
        &self.0.alarms
    }

    /// Starts a task that draining waits for.
    pub(crate) fn spawn(&self, runtime: &Runtime, task: impl Future<Output = ()> + Send + 'static) -> AbortHandle {
        runtime.spawn(self.0.tasks.track_future(task)).abort_handle()
    }
}

pub(crate) fn bounded_by<'a, T>(
    timeout: Duration,
    call: StoreFuture<'a, T>,
) -> impl Future<Output = Result<T, StoreError>> + use<'a, T> {
    within(timeout, call).map(|answer| answer.unwrap_or_else(|| Err(StoreError::unknown(TimedOut))))
}

impl fmt::Debug for Ledger {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ledger")
            .field("in_flight", &self.in_flight())
            .field("waiting", &self.waiting())
            .field("draining", &self.is_draining())
            .finish_non_exhaustive()
    }
}

// === impl StillRunning ===

impl fmt::Display for StillRunning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} attempts were still running", self.attempts)
    }
}

impl std::error::Error for StillRunning {}

// === impl TimedOut ===

impl fmt::Display for TimedOut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("no answer within the store timeout")
    }
}

impl std::error::Error for TimedOut {}
