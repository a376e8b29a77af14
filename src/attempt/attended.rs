//! Who polls an attempt, and who renews its lease.
//!
//! Its caller polls it, as long as it stays and it does not take long, and nobody renews a lease so young, unless that is a short
//! one. All others get a task of their own, and one for their lease.

use std::mem;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::{Arc, Weak};
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::future::BoxFuture;
use tokio::sync::oneshot;
use tracing::{Instrument as _, Span};

use super::{Run, ended};
use crate::alarms::{self, Alarm, OnAlarm, Then};
use crate::ledger::Ledger;
use crate::slot;
use crate::sync::atomic::{AtomicBool, Ordering};
use crate::sync::{Mutex, Runtime, lock, try_lock};
use crate::ticker;

/// A lease that is due by then has a task from the start: an alarm goes off a period late, and what it starts may wait as long
/// again.
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
    /// An errand is under way.
    is_sent_for: AtomicBool,
    runtime: Runtime,
    span: Span,
}

/// A task on its way to take an attempt from its caller.
struct Errand(Weak<Work>);

// === impl Attended ===

impl<T> Attended<T> {
    pub(super) fn new(run: &Arc<Run>, attempt: BoxFuture<'static, ()>, reply: oneshot::Receiver<T>) -> Self {
        let work = Arc::new(Work {
            ledger: run.lease.ledger().clone(),
            run: Arc::downgrade(run),
            attempt: Mutex::new(Some(attempt)),
            is_sent_for: AtomicBool::new(false),
            runtime: Runtime::current(),
            span: Span::current(),
        });
        if run.is_due_by(run.started + SOON) {
            run.start_renewals(&work.runtime);
            // Or the handler may block the thread that they wait for.
            slot::clear(&work.runtime);
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
        let work = &self.work;
        work.ledger.alarms().unset(self.alarm);
        let attempt = lock(&work.attempt).take();
        if let Some(attempt) = attempt {
            work.start_renewals();
            work.ledger.spawn(&work.runtime, attempt.instrument(work.span.clone()));
            slot::clear(&work.runtime);
        }
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
}

impl OnAlarm for Work {
    fn on_alarm(self: Arc<Self>) -> Then {
        if try_lock(&self.attempt).is_some_and(|attempt| attempt.is_none()) {
            return Then::Done;
        }
        if !self.is_sent_for.swap(true, Ordering::Relaxed) {
            let errand = Errand(Arc::downgrade(&self));
            self.ledger.spawn(&self.runtime, errand.run());
        }
        Then::Snooze
    }
}

// === impl Errand ===

impl Errand {
    async fn run(self) {
        if let Some((attempt, span)) = self.arrive() {
            attempt.instrument(span).await;
        }
    }

    /// The attempt, unless its caller is polling it at the moment.
    fn arrive(mut self) -> Option<(BoxFuture<'static, ()>, Span)> {
        let work = mem::take(&mut self.0).upgrade()?;
        work.start_renewals();
        slot::clear(&work.runtime);
        work.is_sent_for.store(false, Ordering::Relaxed);
        Some((try_lock(&work.attempt)?.take()?, work.span.clone()))
    }
}

impl Drop for Errand {
    /// It has not arrived: the runtime has ended, and with it the attempt.
    fn drop(&mut self) {
        let Some(work) = self.0.upgrade() else { return };
        work.is_sent_for.store(false, Ordering::Relaxed);
        if let Some(attempt) = try_lock(&work.attempt).and_then(|mut attempt| attempt.take()) {
            ended::end(work.runtime.clone(), attempt);
        }
    }
}
