//! What is to happen a little later, unless it is over by then.
//!
//! An attempt sets an alarm and takes it back when it ends, and most end long before it goes off. So all alarms of a ledger in
//! one runtime share a task, which sleeps until the first of those that were set when it last looked: to set one wakes nobody.

use std::collections::VecDeque;
use std::sync::{Arc, Weak};
use std::time::Duration;

use tokio::time::{Instant, sleep_until};
use tokio_util::task::TaskTracker;

use crate::awake::{self, Token};
use crate::sync::{Mutex, Runtime, RuntimeId, lock};

/// How long after it was set an alarm goes off.
pub(crate) const DELAY: Duration = Duration::from_millis(100);

/// All alarms of a ledger that are set.
pub(crate) struct Alarms {
    set: Arc<Mutex<Set>>,
    /// There are some as long as there is anybody to call.
    tasks: TaskTracker,
}

/// Whom an alarm calls. It goes off in a task that must not be held up.
pub(crate) trait Called: Send + Sync {
    /// Tells whether to call again after the same time.
    fn called(self: Arc<Self>) -> bool;
}

/// Which alarm it is.
#[derive(Clone, Copy)]
pub(crate) struct Alarm {
    runtime: RuntimeId,
    number: u64,
}

#[derive(Default)]
struct Set {
    /// Those in one runtime have nothing to do with another, which may be blocked, or end.
    watched: Vec<Watched>,
    last: u64,
}

/// The alarms in a runtime, in the order they were set, which is the one they go off in. A task looks after them.
struct Watched {
    runtime: RuntimeId,
    /// What was taken back keeps its place until it is the first.
    calls: VecDeque<(Instant, Option<Weak<dyn Called>>)>,
    /// The number of the first, or of the next.
    first: u64,
}

/// Held by that task. Where the runtime ends, what is in it ends as well: the alarms go off early.
struct Watch {
    set: Weak<Mutex<Set>>,
    runtime: RuntimeId,
    _awake: Token,
}

// === impl Alarms ===

impl Alarms {
    pub(crate) fn new(tasks: TaskTracker) -> Self {
        Self { set: Arc::default(), tasks }
    }

    /// Sets one, at that time or soon after.
    pub(crate) fn set(&self, now: Instant, called: Weak<dyn Called>, runtime: &Runtime) -> Alarm {
        let id = runtime.id();
        let at = now + DELAY;
        let (number, is_watched) = lock(&self.set).insert(id, at, called);
        if !is_watched {
            let awake = awake::keep(runtime, &self.tasks);
            // A runtime that is ending drops it here and now.
            runtime.spawn(Watch { set: Arc::downgrade(&self.set), runtime: id, _awake: awake }.keep(at));
            // What is spawned last may wait for this very thread, which a handler may be about to block.
            runtime.spawn(async {});
        }
        Alarm { runtime: id, number }
    }

    /// Takes one back, if it has not gone off.
    pub(crate) fn unset(&self, alarm: Alarm) {
        let mut set = lock(&self.set);
        let unset = set.of(alarm.runtime).and_then(|watched| watched.take(alarm.number));
        drop(set);
        drop(unset);
    }
}

// === impl Set ===

impl Set {
    fn of(&mut self, runtime: RuntimeId) -> Option<&mut Watched> {
        self.watched.iter_mut().find(|watched| watched.runtime == runtime)
    }

    /// Tells its number, and whether it is looked after. If not, it is for the caller to see to that.
    fn insert(&mut self, runtime: RuntimeId, at: Instant, called: Weak<dyn Called>) -> (u64, bool) {
        if let Some(watched) = self.of(runtime) {
            return (watched.push(at, called), true);
        }
        // Of two alarms in a runtime none has the number of the other, or one could be taken back for the other.
        let mut watched = Watched { runtime, calls: VecDeque::new(), first: self.last + 1 };
        let number = watched.push(at, called);
        self.watched.push(watched);
        (number, false)
    }

    /// Those in a runtime, which nobody looks after any more.
    fn remove(&mut self, runtime: RuntimeId) -> Option<Watched> {
        let place = self.watched.iter().position(|watched| watched.runtime == runtime)?;
        let watched = self.watched.swap_remove(place);
        self.last = self.last.max(watched.next() - 1);
        Some(watched)
    }
}

// === impl Watched ===

impl Watched {
    fn next(&self) -> u64 {
        self.first + self.calls.len() as u64
    }

    fn push(&mut self, at: Instant, called: Weak<dyn Called>) -> u64 {
        let number = self.next();
        self.calls.push_back((at, Some(called)));
        number
    }

    fn take(&mut self, number: u64) -> Option<Weak<dyn Called>> {
        let place = usize::try_from(number.checked_sub(self.first)?).ok()?;
        let taken = self.calls.get_mut(place)?.1.take();
        while let Some((_, None)) = self.calls.front() {
            self.pop();
        }
        taken
    }

    fn pop(&mut self) -> Option<Weak<dyn Called>> {
        let (_, called) = self.calls.pop_front()?;
        self.first += 1;
        called
    }

    /// Whom to call by now.
    fn due(&mut self, now: Instant) -> Vec<Weak<dyn Called>> {
        let mut due = Vec::new();
        while self.calls.front().is_some_and(|(at, _)| *at <= now) {
            due.extend(self.pop());
        }
        due
    }
}

// === impl Watch ===

impl Watch {
    /// Lets alarms go off, as long as there are any. Whoever sets the next starts another watch.
    async fn keep(mut self, first: Instant) {
        // Also where that is taken back at once: or each attempt that is alone would start a watch of its own.
        let mut next = Some(first);
        while let Some(at) = next {
            sleep_until(at).await;
            self.call();
            next = self.next();
        }
        // From here on it looks after nothing.
        self.set = Weak::new();
    }

    fn next(&self) -> Option<Instant> {
        let set = self.set.upgrade()?;
        let mut set = lock(&set);
        let first = set.of(self.runtime)?.calls.front().map(|(at, _)| *at);
        if first.is_none() {
            set.remove(self.runtime);
        }
        first
    }

    fn call(&self) {
        let Some(set) = self.set.upgrade() else { return };
        let now = Instant::now();
        let due = lock(&set).of(self.runtime).map(|watched| watched.due(now));
        for called in due.into_iter().flatten() {
            if called.upgrade().is_some_and(Called::called) {
                lock(&set).insert(self.runtime, now + DELAY, called);
            }
        }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        let Some(set) = self.set.upgrade() else { return };
        let left = lock(&set).remove(self.runtime);
        for called in left.into_iter().flat_map(|left| left.calls).filter_map(|(_, called)| called) {
            // Who would be called again is being polled, and is left to its caller.
            called.upgrade().map(Called::called);
        }
    }
}
