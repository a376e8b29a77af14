//! What is to happen a little later, unless it is over by then.
//!
//! An attempt sets an alarm and takes it back when it ends, and most end long before it goes off. So all alarms of a ledger
//! share one task, which sleeps until the first of those that were set when it last looked: to set one wakes nobody.

use std::collections::BTreeMap;
use std::mem;
use std::sync::{Arc, Weak};
use std::time::Duration;

use tokio::time::{Instant, sleep_until};

use crate::sync::{Mutex, Runtime, lock};

/// How late the watch may be before another takes its place: a handler may be blocking the thread it needs.
const MAX_LATE: Duration = Duration::from_millis(100);

/// All alarms of a ledger that are set.
#[derive(Default)]
pub(crate) struct Alarms(Arc<Mutex<Set>>);

/// Whom an alarm calls. It goes off in a task that must not be held up.
pub(crate) trait Called: Send + Sync {
    /// Tells when to call again, if that is wanted.
    fn called(self: Arc<Self>) -> Option<Instant>;
}

/// When an alarm goes off, and which of them it is.
pub(crate) type Alarm = (Instant, u64);

type Calls = BTreeMap<Alarm, Weak<dyn Called>>;

#[derive(Default)]
struct Set {
    calls: Calls,
    next: u64,
    watch: Option<Watch>,
}

/// Which task lets the alarms go off.
#[derive(Clone, Copy)]
struct Watch {
    number: u64,
    sleeps_until: Instant,
}

/// Held by that task: alarms do not end with the runtime it is in, but go off early.
struct OnWatch {
    set: Weak<Mutex<Set>>,
    number: u64,
}

// === impl Alarms ===

impl Alarms {
    /// Sets one.
    pub(crate) fn set(&self, at: Instant, called: Weak<dyn Called>, runtime: &Runtime) -> Alarm {
        let mut set = lock(&self.0);
        let alarm = set.insert(at, called);
        let in_time = |watch: Watch| watch.sleeps_until <= at && Instant::now() < watch.sleeps_until + MAX_LATE;
        let number = set.next;
        let is_watched = set.watch.is_some_and(in_time);
        if !is_watched {
            set.watch = Some(Watch { number, sleeps_until: at });
        }
        drop(set);
        if !is_watched {
            // A runtime that is ending drops it here and now.
            runtime.spawn(OnWatch { set: Arc::downgrade(&self.0), number }.go(at));
        }
        alarm
    }

    /// Takes one back, if it has not gone off.
    pub(crate) fn unset(&self, alarm: Alarm) {
        let unset = lock(&self.0).calls.remove(&alarm);
        drop(unset);
    }
}

// === impl Set ===

impl Set {
    fn insert(&mut self, at: Instant, called: Weak<dyn Called>) -> Alarm {
        self.next += 1;
        let alarm = (at, self.next);
        self.calls.insert(alarm, called);
        alarm
    }

    fn take_due(&mut self, now: Instant) -> Calls {
        let later = self.calls.split_off(&(now, u64::MAX));
        mem::replace(&mut self.calls, later)
    }
}

// === impl OnWatch ===

impl OnWatch {
    async fn go(self, first: Instant) {
        let mut next = Some(first);
        while let Some(at) = next {
            sleep_until(at).await;
            self.call();
            next = self.next();
        }
    }

    /// Lets those go off that are due.
    fn call(&self) {
        let Some(set) = self.set.upgrade() else { return };
        let due = lock(&set).take_due(Instant::now());
        for called in due.into_values() {
            let again = called.upgrade().and_then(Called::called);
            if let Some(again) = again {
                lock(&set).insert(again, called);
            }
        }
    }

    /// When to look again. Where no alarm is left, whoever sets one starts another watch.
    fn next(&self) -> Option<Instant> {
        let set = self.set.upgrade()?;
        let mut set = lock(&set);
        if set.watch?.number != self.number {
            return None;
        }
        let next = set.calls.first_key_value().map(|((at, _), _)| *at);
        set.watch = next.map(|sleeps_until| Watch { number: self.number, sleeps_until });
        next
    }
}

impl Drop for OnWatch {
    fn drop(&mut self) {
        let Some(set) = self.set.upgrade() else { return };
        let left = {
            let mut set = lock(&set);
            set.watch.take_if(|watch| watch.number == self.number).map(|_| mem::take(&mut set.calls))
        };
        for called in left.into_iter().flat_map(BTreeMap::into_values) {
            // Who would be called again is being polled, and is left to its caller.
            called.upgrade().and_then(Called::called);
        }
    }
}
