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
const DELAY: Duration = Duration::from_millis(100);

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

    /// Sets one that goes off [`DELAY`] after `now`. It may spawn a task, and what is spawned last may wait for a thread that is about to be
    /// blocked: the caller spawns another.
    pub(crate) fn set(&self, now: Instant, called: Weak<dyn Called>, runtime: &Runtime) -> Alarm {
        let id = runtime.id();
        let at = now + DELAY;
        let (number, is_watched) = lock(&self.set).insert(id, at, called);
        if !is_watched {
            let awake = awake::keep(runtime, &self.tasks);
            // A runtime that is ending drops it here and now.
            runtime.spawn(Watch { set: Arc::downgrade(&self.set), runtime: id, _awake: awake }.keep(at));
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

#[cfg(all(test, not(shuttle)))]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use tokio::time::sleep;

    use super::*;

    /// Counts how often it is called, and is busy the first few times.
    #[derive(Default)]
    struct Bell {
        rung: AtomicUsize,
        busy: usize,
    }

    impl Called for Bell {
        fn called(self: Arc<Self>) -> bool {
            self.rung.fetch_add(1, Ordering::Relaxed) < self.busy
        }
    }

    impl Bell {
        fn set(self: &Arc<Self>, alarms: &Alarms) -> Alarm {
            let called: Weak<Self> = Arc::downgrade(self);
            alarms.set(Instant::now(), called, &Runtime::current())
        }

        fn rung(&self) -> usize {
            self.rung.load(Ordering::Relaxed)
        }
    }

    fn alarms() -> Alarms {
        Alarms::new(TaskTracker::new())
    }

    #[tokio::test(start_paused = true)]
    async fn one_goes_off_unless_it_is_taken_back_or_its_bell_is_gone() {
        let (alarms, rings, silent, gone) = (alarms(), Arc::default(), Arc::default(), Arc::<Bell>::default());
        Bell::set(&rings, &alarms);
        let taken_back = Bell::set(&silent, &alarms);
        gone.set(&alarms);
        alarms.unset(taken_back);
        drop(gone);
        sleep(DELAY / 2).await;
        assert_eq!(rings.rung(), 0);
        sleep(DELAY).await;
        assert_eq!((rings.rung(), silent.rung()), (1, 0));
    }

    #[tokio::test(start_paused = true)]
    async fn whoever_is_busy_is_called_again() {
        let (alarms, bell) = (alarms(), Arc::new(Bell { busy: 2, ..Bell::default() }));
        bell.set(&alarms);
        sleep(DELAY * 5 / 2).await;
        assert_eq!(bell.rung(), 2);
        sleep(DELAY * 10).await;
        assert_eq!(bell.rung(), 3);
    }

    #[tokio::test(start_paused = true)]
    async fn to_take_one_back_too_late_takes_back_no_other() {
        let (alarms, first, second) = (alarms(), Arc::default(), Arc::default());
        let late = Bell::set(&first, &alarms);
        // By then nobody is on watch any more.
        sleep(DELAY * 2).await;
        Bell::set(&second, &alarms);
        alarms.unset(late);
        sleep(DELAY * 2).await;
        assert_eq!((first.rung(), second.rung()), (1, 1));
    }

    #[tokio::test(start_paused = true)]
    async fn those_taken_back_in_any_order_leave_no_room_taken() {
        let (alarms, bell) = (alarms(), Arc::default());
        let mut set: Vec<_> = (0..8).map(|_| Bell::set(&bell, &alarms)).collect();
        for at in [3, 0, 5, 0, 2, 1, 1, 0] {
            alarms.unset(set.remove(at));
        }
        assert!(lock(&alarms.set).watched.iter().all(|watched| watched.calls.is_empty()));
        sleep(DELAY * 2).await;
        assert_eq!(bell.rung(), 0);
        assert!(lock(&alarms.set).watched.is_empty());
    }

    #[test]
    fn those_of_a_runtime_that_ends_go_off_and_those_of_another_stay() {
        let (alarms, ends, stays) = (alarms(), Arc::default(), Arc::default());
        let runtime = || tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_time().build().unwrap();
        let (ending, staying) = (runtime(), runtime());
        ending.block_on(async { Bell::set(&ends, &alarms) });
        let in_time = staying.block_on(async { Bell::set(&stays, &alarms) });
        drop(ending);
        assert_eq!((ends.rung(), stays.rung()), (1, 0));
        alarms.unset(in_time);
    }
}
