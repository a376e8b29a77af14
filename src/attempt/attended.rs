//! Who polls an attempt, and who renews its lease.
//!
//! Its caller polls it, as long as it stays and it does not take long, and nobody renews a lease so young. All others get a task
//! of their own for either.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::{Arc, Weak};
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::future::BoxFuture;
use tokio::sync::oneshot;
use tracing::{Instrument as _, Span};

use super::Run;
use crate::alarms::{self, Alarm, OnAlarm, Then};
use crate::ledger::Ledger;
use crate::sync::{Mutex, Runtime, lock, try_lock};
use crate::ticker;

/// What is due by then, such as a short lease, has a task from the start: the alarm may be late, and the task behind it.
const SOON: Duration = alarms::DELAY.saturating_add(ticker::PERIOD.saturating_mul(2));

/// An attempt in the hands of its caller, who waits for a reply. Dropped, it goes on without.
pub(super) struct Attended<T> {
    work: Arc<Work>,
    alarm: Alarm,
    reply: oneshot::Receiver<T>,
}

/// What there is to poll, and by whom if not by the caller. It does not hold the run, which the attempt itself does: a caller that
/// holds on to what has ended must not hold its place, nor its claim.
struct Work {
    ledger: Ledger,
    run: Weak<Run>,
    /// As long as the caller has it.
    attempt: Mutex<Option<BoxFuture<'static, ()>>>,
    runtime: Runtime,
    span: Span,
}

// === impl Attended ===

impl<T> Attended<T> {
    pub(super) fn new(run: &Arc<Run>, attempt: BoxFuture<'static, ()>, reply: oneshot::Receiver<T>) -> Self {
        let work = Arc::new(Work {
            ledger: run.lease.ledger().clone(),
            run: Arc::downgrade(run),
            attempt: Mutex::new(Some(attempt)),
            runtime: Runtime::current(),
            span: Span::current(),
        });
        if run.is_due_by(run.started + SOON) {
            run.start_renewals(&work.runtime);
            work.unslot();
        }
        let told: Weak<Work> = Arc::downgrade(&work);
        let alarm = work.ledger.alarms().set(run.started, told, &work.runtime);
        Self { work, alarm, reply }
    }
}

impl<T> Future for Attended<T> {
    type Output = Result<T, oneshot::error::RecvError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        self.work.poll(cx);
        Pin::new(&mut self.reply).poll(cx)
    }
}

impl<T> Drop for Attended<T> {
    fn drop(&mut self) {
        self.work.ledger.alarms().unset(self.alarm);
        let attempt = lock(&self.work.attempt).take();
        self.work.leave(attempt);
    }
}

// === impl Work ===

impl Work {
    fn poll(&self, cx: &mut Context<'_>) {
        let mut attempt = lock(&self.attempt);
        let Some(polled) = attempt.as_mut() else { return };
        // Its timers are those of the runtime that it was started in, wherever its caller is polled.
        let _in = self.runtime.enter();
        // What panics, such as a store, ends the attempt and not its caller, as it would in a task.
        let polled = catch_unwind(AssertUnwindSafe(|| polled.as_mut().poll(cx)));
        if !matches!(polled, Ok(Poll::Pending)) {
            let ended = attempt.take();
            drop(attempt);
            drop(ended);
        }
    }

    fn start_renewals(&self) {
        // Who holds it last may give the claim back, in its runtime.
        let _in = self.runtime.enter();
        if let Some(run) = self.run.upgrade() {
            run.start_renewals(&self.runtime);
        }
    }

    /// Leaves the attempt, unless it has ended, to a task.
    fn leave(&self, attempt: Option<BoxFuture<'static, ()>>) {
        if let Some(attempt) = attempt {
            self.start_renewals();
            self.ledger.spawn(&self.runtime, attempt.instrument(self.span.clone()));
            self.unslot();
        }
    }

    /// What a task spawns last waits for its very thread, which it may be about to block. So that is a task that does nothing.
    fn unslot(&self) {
        self.runtime.spawn(async {});
    }
}

impl OnAlarm for Work {
    fn on_alarm(self: Arc<Self>) -> Then {
        self.start_renewals();
        let Some(mut attempt) = try_lock(&self.attempt) else {
            // It is being polled.
            return Then::Snooze;
        };
        let taken = attempt.take();
        drop(attempt);
        self.leave(taken);
        Then::Done
    }
}
