//! Who leads a flight: when it looks at the store, and what it tells the others.

use std::future::pending;
use std::mem;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use tokio::time::Instant;

use super::{Flight, Landing, Running};
use crate::fingerprint::Fingerprint;
use crate::store::MAX_DURATION;

/// The pauses between two looks at a key that another process runs, before jitter. The first is also the least between
/// two looks that hints of the store bring about: a hint is followed at once, also right after a look that was due, so
/// that in the long run there is one look per such pause at most, and for a moment there may be one more.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LAST_PAUSE: Duration = Duration::from_millis(250);

/// How many attempts may fail before all that wait are refused: a failing handler is not run once for each of them.
const MAX_FAILURES: u32 = 2;

/// The right to speak to the store about a key, one at a time in this process.
pub(crate) struct Lead {
    pub(super) flight: Arc<Flight>,
    pub(super) course: Course,
}

/// What whoever leads hands on to the next.
pub(super) struct Course {
    failures: u32,
    pause: Duration,
    /// At once, if there is none.
    next_look: Option<Instant>,
    /// From when on a hint is followed: each look puts it off by the first pause, and one of them may come before its time.
    next_hinted: Option<Instant>,
    /// The store's next hint. It stays from one look to the next, so that nothing that happens during a look is missed and
    /// the store has one watcher per key, not one after the other.
    hint: Option<BoxFuture<'static, ()>>,
}

// === impl Lead ===

impl Lead {
    /// This process runs the key: what other processes do to it is of no interest.
    pub(crate) fn running_here(&mut self) {
        self.course.hint = None;
    }

    /// Another process runs the key. Whoever leads next looks again, later and later, but not long after the lease ends.
    pub(crate) fn running_elsewhere(mut self, fingerprint: Option<Fingerprint>, lease_left: Duration) {
        let lease_left = lease_left.min(MAX_DURATION);
        self.put_off(lease_left + FIRST_PAUSE);
        self.flight.runs(Some(Running { fingerprint, lease_until: Some(Instant::now() + lease_left) }));
    }

    /// Another process runs the key, and until when is not known.
    pub(crate) fn look_later(mut self) {
        self.put_off(MAX_DURATION);
    }

    fn put_off(&mut self, at_most: Duration) {
        let course = &mut self.course;
        let now = Instant::now();
        course.next_look = Some(now + course.pause.mul_f64(rand::random_range(1.0..1.5)).min(at_most));
        course.pause = (course.pause * 2).min(LAST_PAUSE);
        let from = course.next_hinted.max(now.checked_sub(FIRST_PAUSE));
        course.next_hinted = Some(from.map_or(now, |from| from + FIRST_PAUSE));
    }

    /// Lets those who wait compare their payload with that of the attempt.
    pub(crate) fn running(&self, fingerprint: Option<Fingerprint>) {
        self.flight.runs(Some(Running { fingerprint, lease_until: None }));
    }

    /// The attempt came to nothing: one of those who wait takes over, the others go on waiting. When that one comes to
    /// nothing too, the others are refused.
    pub(crate) fn failed(mut self) {
        self.course.failures += 1;
        if self.course.failures >= MAX_FAILURES {
            self.land(Landing::Failed);
        } else {
            self.step_down();
        }
    }

    /// Tells all who wait. Who comes later asks the store.
    pub(crate) fn land(mut self, landing: Landing) {
        self.course.hint = None;
        self.flight.land(landing);
    }

    /// Leaves those who wait to ask the store for themselves: this process is not the one that knows.
    pub(crate) fn step_down(self) {
        self.flight.runs(None);
    }

    /// When it is time to look, unless it is already.
    pub(super) fn next_look(&self) -> Option<Instant> {
        self.course.next_look.filter(|look| *look > Instant::now())
    }

    /// Waits for a hint of the store and brings the next look forward. Dropped halfway, it loses nothing.
    pub(super) async fn hinted(&mut self) {
        let course = &mut self.course;
        if course.next_hinted >= course.next_look {
            return pending().await;
        }
        course.hint.get_or_insert_with(|| next_hint(&self.flight)).await;
        // Waits for the next one before anybody looks.
        let mut next = next_hint(&self.flight);
        course.hint = (&mut next).now_or_never().is_none().then_some(next);
        course.next_look = course.next_look.min(course.next_hinted.max(Some(Instant::now())));
    }
}

impl Drop for Lead {
    fn drop(&mut self) {
        self.flight.hand_on(mem::take(&mut self.course));
    }
}

/// The next change of the key that the store tells of.
fn next_hint(flight: &Flight) -> BoxFuture<'static, ()> {
    let (ledger, key) = (flight.ledger.clone(), flight.key);
    let changed = async move { ledger.store().changed(&key).await };
    // Nothing depends on a hint, so neither does anything on one that panics.
    async move {
        if AssertUnwindSafe(changed).catch_unwind().await.is_err() {
            pending().await
        }
    }
    .boxed()
}

// === impl Course ===

impl Default for Course {
    fn default() -> Self {
        Self { failures: 0, pause: FIRST_PAUSE, next_look: None, next_hinted: None, hint: None }
    }
}
