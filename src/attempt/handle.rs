//! What the handler sees of its attempt.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Notify;

use crate::key::{Key, Keys};
use crate::ledger::Ledger;
use crate::store::{MAX_DURATION, MIN_DURATION};
use crate::sync::atomic::{AtomicBool, Ordering};
use crate::sync::{Mutex, lock};

/// The attempt a handler runs in. It stands in the extensions of every request that runs under a claim, and in no other.
///
/// ```
/// use std::time::Duration;
/// use http::{Request, Response};
/// use tower_idempotency::Attempt;
///
/// async fn handler(request: Request<String>) -> Response<String> {
///     if let Some(attempt) = request.extensions().get::<Attempt>() {
///         // The key of this event, for a call downstream that knows idempotency keys too.
///         let downstream_key = attempt.key().to_string();
///         if attempt.is_retry() {
///             // Look first whether an attempt before this one got as far as the effect.
///         }
///         attempt.keep_for(Duration::from_secs(7 * 24 * 60 * 60));
///     }
///     Response::new("done".to_owned())
/// }
/// # let _ = handler;
/// ```
#[derive(Clone)]
pub struct Attempt {
    keys: Keys,
    number: u32,
    shared: Arc<Shared>,
    /// The attempt of a layer around this one's, if there is one.
    outer: Option<Arc<Self>>,
}

/// What the handler and its attempt tell each other.
struct Shared {
    ledger: Ledger,
    steering: Mutex<Steering>,
    is_lost: AtomicBool,
    lost: Notify,
}

/// What the handler wants done with its outcome.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Steering {
    pub(crate) already_applied: bool,
    pub(crate) dont_keep: bool,
    pub(crate) keep_for: Option<Duration>,
}

impl Attempt {
    pub(crate) fn new(ledger: Ledger, keys: Keys, number: u32) -> Self {
        let shared =
            Shared { ledger, steering: Mutex::default(), is_lost: AtomicBool::new(false), lost: Notify::new() };
        Self { keys, number, shared: Arc::new(shared), outer: None }
    }

    /// The same attempt, inside of another layer's.
    pub(super) fn inside(self, outer: Option<Self>) -> Self {
        Self { outer: outer.map(Arc::new), ..self }
    }

    /// Whether this attempt, or one around it, is one of that ledger for that key.
    pub(crate) fn is_under(&self, ledger: &Ledger, keys: Keys) -> bool {
        self.shared.ledger.is(ledger) && self.keys.meet(keys)
            || self.outer.as_ref().is_some_and(|outer| outer.is_under(ledger, keys))
    }

    /// The event, as the store knows it: the same for every delivery, and fit to be the idempotency key of a call
    /// downstream.
    ///
    /// Where the layer has a [`secret`](crate::IdempotencyLayer::secret), it changes with that: while secrets rotate, look for
    /// [`previous_key`](Self::previous_key) too.
    #[must_use]
    pub const fn key(&self) -> Key {
        self.keys.current
    }

    /// The same event under the [`previous_secret`](crate::IdempotencyLayer::previous_secret), while secrets rotate. An
    /// attempt that knew only that one has left its row, or called downstream, under this key.
    #[must_use]
    pub const fn previous_key(&self) -> Option<Key> {
        self.keys.previous
    }

    /// Which run of the inner service for this key it is: 1, 2, 3 … as long as the store remembers the key.
    #[must_use]
    pub const fn number(&self) -> u32 {
        self.number
    }

    /// Whether an attempt before this one ended without an outcome that is kept. It may have made its effect all the same.
    #[must_use]
    pub const fn is_retry(&self) -> bool {
        self.number > 1
    }

    /// Resolves when this attempt is told that it lost its claim: another runs, or has run, in its place. If it never is,
    /// the future never resolves. An attempt past `max_attempt` loses its claim to the next delivery, and is told so too.
    ///
    /// It is a chance to stop early, not a fence: a process that was paused learns of it too late. An effect that must not
    /// be made twice belongs in one transaction with a row that says so.
    pub async fn lost(&self) {
        let lost = self.shared.lost.notified();
        // From when it exists it is told of a loss, also of one that it is too late to see here.
        if !self.is_lost() {
            lost.await;
        }
    }

    pub(super) fn is_lost(&self) -> bool {
        self.shared.is_lost.load(Ordering::Acquire)
    }

    /// Tells all who wait for that, and who will.
    pub(super) fn set_lost(&self) {
        self.shared.is_lost.store(true, Ordering::Release);
        self.shared.lost.notify_waiters();
    }

    /// Keeps the outcome for that long instead of the layer's retention, if it is one that is kept. Brought to between 1 ms
    /// and 366 days.
    pub fn keep_for(&self, retention: Duration) {
        self.steer(|steering| steering.keep_for = Some(retention.clamp(MIN_DURATION, MAX_DURATION)));
    }

    /// Does not keep the outcome, whatever it is: the next delivery runs. A response that comes to its end says
    /// `Idempotency-Stored: false`, also one that would not have been kept anyway.
    pub fn dont_keep(&self) {
        self.steer(|steering| steering.dont_keep = true);
    }

    /// An earlier attempt had made the effect. Whatever response the handler returns, the key is completed without a body,
    /// and the answer is that to a duplicate of an outcome not retained: 200 for a webhook, 409 for an api, and for a call of
    /// gRPC `OK` or `ALREADY_EXISTS`. After an error or
    /// a panic the next delivery runs, and finds the same.
    pub fn already_applied(&self) {
        self.steer(|steering| steering.already_applied = true);
    }

    pub(crate) fn steering(&self) -> Steering {
        *lock(&self.shared.steering)
    }

    fn steer(&self, set: impl FnOnce(&mut Steering)) {
        set(&mut lock(&self.shared.steering));
    }
}

impl fmt::Debug for Attempt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Attempt").field("key", &self.keys.current).field("number", &self.number).finish_non_exhaustive()
    }
}
