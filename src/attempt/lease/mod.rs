//! A claim as this process holds it: asked for, renewed, completed, given back.
//!
//! A call without an answer may have taken effect. So a claim is asked for again under the same id, a completion is
//! pursued, and a claim that nobody waits for any more is released behind it, in the background.

mod ask;
mod late;

use std::time::Duration;

use bytes::Bytes;
use futures_util::future::join;
use tokio::runtime::Handle;
use tokio::time::{Instant, sleep, sleep_until};

pub(crate) use self::ask::Asked;
use crate::key::{Key, Keys};
use crate::ledger::Ledger;
use crate::store::erased::StoreFuture;
use crate::store::{Claim, Hold, State, StoreError};
use crate::sync::Runtime;
use crate::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use crate::telemetry;

/// The pauses between two sendings of a step, before jitter.
const FIRST_BACKOFF: Duration = Duration::from_millis(10);
const LAST_BACKOFF: Duration = Duration::from_secs(1);

/// A claim that this process has, or may have.
pub(crate) struct Lease {
    ledger: Ledger,
    key: Key,
    claim: Claim,
    /// When it was sent first.
    asked: Instant,
    /// How long after that it was renewed last, in milliseconds: enough for 49 days, and no attempt is renewed for longer than 30. As
    /// a number of 64 bits it would make the box of a claim too large for what an allocator has at hand.
    renewed_after: AtomicU32,
    /// Another sending than the one that was answered may have been the one that took effect, so it is renewed at once.
    is_unsure: bool,
    /// The inner service has not been called: dropped now, the claim is released in the background.
    adrift: AtomicBool,
    /// While secrets rotate, the claim of the same event under its previous key, which was asked for first. It is given up
    /// before anybody waits for the other.
    previous: Option<Box<Self>>,
}

/// Why a lease is not renewed any more.
pub(crate) enum Ended {
    /// It was told that it lost.
    Lost,
    /// It has been renewed for as long as it may.
    Overdue,
}

/// What came of a pursuit.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Pursued {
    Held,
    Lost,
    /// The ceiling was reached first.
    Unanswered,
}

impl Lease {
    /// From here on the attempt sees the claim through.
    pub(crate) fn begin(&self) {
        self.adrift.store(false, Ordering::Relaxed);
        if let Some(previous) = &self.previous {
            previous.begin();
        }
    }

    pub(crate) fn number(&self) -> u32 {
        self.claim.attempt.max(self.previous.as_ref().map_or(0, |previous| previous.number()))
    }

    pub(crate) fn keys(&self) -> Keys {
        Keys { current: self.key, previous: self.previous.as_ref().map(|previous| previous.key) }
    }

    /// Whether it is to be renewed by then.
    pub(crate) fn is_due_by(&self, then: Instant) -> bool {
        self.is_unsure
            || self.since() + self.claim.lease / 4 <= then
            || self.previous.as_ref().is_some_and(|previous| previous.is_due_by(then))
    }

    /// Whether it has not been renewed for as long as it lasts, so that another may have the key.
    pub(crate) fn is_over(&self) -> bool {
        self.since().elapsed() >= self.claim.lease || self.previous.as_ref().is_some_and(|previous| previous.is_over())
    }

    /// From when the lease counts.
    fn since(&self) -> Instant {
        self.asked + Duration::from_millis(self.renewed_after.load(Ordering::Relaxed).into())
    }

    pub(crate) fn claim(&self) -> &Claim {
        &self.claim
    }

    pub(crate) fn ledger(&self) -> &Ledger {
        &self.ledger
    }

    /// Renews the lease until it is lost, or until `deadline`.
    pub(crate) async fn renew(&self, deadline: Instant) -> Ended {
        match &self.previous {
            None => self.renew_one(deadline).await,
            Some(previous) => tokio::select! {
                ended = self.renew_one(deadline) => ended,
                ended = previous.renew_one(deadline) => ended,
            },
        }
    }

    async fn renew_one(&self, deadline: Instant) -> Ended {
        let mut renew_at = if self.is_unsure { self.asked } else { self.since() + self.interval() };
        loop {
            sleep_until(renew_at.min(deadline)).await;
            if Instant::now() >= deadline {
                return Ended::Overdue;
            }
            renew_at = match self.renew_once().await {
                Ok(Hold::Held) => self.since() + self.interval(),
                Ok(Hold::Lost) => return Ended::Lost,
                Err(_) => Instant::now() + jittered((self.claim.lease / 10).min(LAST_BACKOFF)),
            };
        }
    }

    async fn renew_once(&self) -> Result<Hold, StoreError> {
        let sent = Instant::now();
        let renewed = self.ledger.bounded(self.ledger.store().renew(&self.key, &self.claim)).await;
        match &renewed {
            Ok(Hold::Held) => {
                let after = sent.saturating_duration_since(self.asked).as_millis();
                self.renewed_after.store(u32::try_from(after).unwrap_or(u32::MAX), Ordering::Relaxed);
            }
            Ok(Hold::Lost) => {}
            Err(error) => telemetry::store_error("renew", &self.key, error),
        }
        renewed
    }

    /// Returns when the key is seen to be another attempt's, or to have been. A key that is gone is nobody else's.
    pub(crate) async fn watch(&self) {
        match &self.previous {
            None => self.watch_one().await,
            Some(previous) => tokio::select! {
                () = self.watch_one() => {}
                () = previous.watch_one() => {}
            },
        }
    }

    async fn watch_one(&self) {
        loop {
            sleep(self.claim.lease.max(LAST_BACKOFF)).await;
            match self.ledger.lookup(&self.key).await {
                Ok(None) => {}
                Ok(Some(entry)) if entry.state == State::Running && entry.attempt == self.claim.attempt => {}
                Ok(Some(_)) => return,
                Err(error) => telemetry::store_error("lookup", &self.key, &error),
            }
        }
    }

    /// Completes the claim, again and again up to the ceiling.
    pub(crate) async fn complete(&self, record: &Bytes, retention: Duration, ceiling: Duration) -> Pursued {
        let current = self.complete_one(record, retention, ceiling);
        match &self.previous {
            None => current.await,
            Some(previous) => {
                let previous = previous.complete_one(record, retention, ceiling);
                let (pursued, previously) = Box::pin(join(current, previous)).await;
                pursued.and(previously)
            }
        }
    }

    async fn complete_one(&self, record: &Bytes, retention: Duration, ceiling: Duration) -> Pursued {
        let claim = Claim { retention, ..self.claim.clone() };
        let complete = || self.ledger.store().complete(&self.key, &claim, record.clone());
        self.pursue("complete", ceiling, complete).await
    }

    /// Gives the claim back, again and again as long as it could be alive.
    pub(crate) async fn release(&self, remember: Duration) -> Pursued {
        let current = self.release_one(remember);
        match &self.previous {
            None => current.await,
            Some(previous) => {
                let (pursued, previously) = Box::pin(join(current, previous.release_one(remember))).await;
                pursued.and(previously)
            }
        }
    }

    async fn release_one(&self, remember: Duration) -> Pursued {
        let sendings = AtomicU32::new(0);
        let release = || {
            sendings.fetch_add(1, Ordering::Relaxed);
            self.ledger.store().release(&self.key, &self.claim, remember)
        };
        match self.pursue("release", self.claim.lease, release).await {
            // By one that was not answered the key was free, and whoever has it now took it rightly.
            Pursued::Lost if sendings.load(Ordering::Relaxed) > 1 => Pursued::Held,
            released => released,
        }
    }

    async fn pursue<'a>(
        &self,
        name: &'static str,
        ceiling: Duration,
        call: impl Fn() -> StoreFuture<'a, Hold>,
    ) -> Pursued {
        let deadline = Instant::now() + ceiling;
        let mut backoff = Backoff::new();
        loop {
            match self.ledger.bounded(call()).await {
                Ok(Hold::Held) => return Pursued::Held,
                Ok(Hold::Lost) => return Pursued::Lost,
                Err(error) => telemetry::store_error(name, &self.key, &error),
            }
            let pause = backoff.next();
            if Instant::now() + pause >= deadline {
                return Pursued::Unanswered;
            }
            Box::pin(sleep(pause)).await;
        }
    }

    fn interval(&self) -> Duration {
        // Two renewals may go wrong before the lease is over. Not below a millisecond, or it would spin.
        jittered(self.claim.lease / 3).max(Duration::from_millis(1))
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if !*self.adrift.get_mut() || Handle::try_current().is_err() {
            return;
        }
        // Beyond the bound the lease is left to run out.
        let Some(ticket) = self.ledger.given_up() else { return };
        // Without a number it counts as never having run.
        let claim = Claim { attempt: 0, ..self.claim.clone() };
        let (ledger, asked, renewed_after) = (self.ledger.clone(), self.asked, AtomicU32::new(0));
        let (is_unsure, adrift) = (false, AtomicBool::new(false));
        // The previous lease, where there is one, is dropped with this one.
        let given_up = Self { ledger, key: self.key, claim, asked, renewed_after, is_unsure, adrift, previous: None };
        self.ledger.spawn(&Runtime::current(), async move {
            given_up.release(given_up.claim.lease).await;
            drop(ticket);
        });
    }
}

// === impl Pursued ===

impl Pursued {
    /// What came of two pursuits together.
    fn and(self, other: Self) -> Self {
        match (self, other) {
            (Self::Lost, _) | (_, Self::Lost) => Self::Lost,
            (Self::Unanswered, _) | (_, Self::Unanswered) => Self::Unanswered,
            (Self::Held, Self::Held) => Self::Held,
        }
    }
}

/// Pauses that double, with jitter of this process's own, so that many do not come back in step.
struct Backoff(Duration);

impl Backoff {
    fn new() -> Self {
        Self(FIRST_BACKOFF)
    }

    fn next(&mut self) -> Duration {
        let pause = jittered(self.0);
        self.0 = (self.0 * 2).min(LAST_BACKOFF);
        pause
    }
}

fn jittered(pause: Duration) -> Duration {
    pause.mul_f64(rand::random_range(0.75..1.0))
}
