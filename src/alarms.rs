//! What is to happen a little later, unless it is over by then.
//!
//! An attempt sets an alarm and takes it back when it ends, and most end long before it goes off: to set one wakes nobody, unless
//! it is the only one. All those of a ledger in one runtime stand in one queue, and somebody looks after that as long as there are
//! any: the [`ticker`], or a task of the runtime where that has but one thread.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Weak};
use std::time::Duration;

use tokio::time::{Instant, sleep_until};

use crate::sync::{Mutex, Runtime, RuntimeId, lock};
use crate::ticker;

/// How long after it was set an alarm goes off.
pub(crate) const DELAY: Duration = Duration::from_millis(100);

/// All alarms of a ledger that are set.
#[derive(Default)]
pub(crate) struct Alarms(Arc<Mutex<Set>>);

/// Whom an alarm tells.
pub(crate) trait OnAlarm: Send + Sync {
    /// It went off, in a thread that must not be held up.
    fn on_alarm(self: Arc<Self>) -> Then;
}

/// What becomes of an alarm that went off.
#[derive(Clone, Copy, Eq, PartialEq)]
pub(crate) enum Then {
    Done,
    /// It goes off again after the same time.
    Snooze,
}

/// Which alarm it is.
#[derive(Clone, Copy)]
pub(crate) struct Alarm {
    runtime: RuntimeId,
    number: u64,
}

/// Looks after the alarms of a ledger in one runtime.
pub(crate) struct Watch {
    set: Weak<Mutex<Set>>,
    runtime: RuntimeId,
}

/// A watch in a task. Where the runtime ends, what is in it ends as well: the alarms go off early.
struct Watching(Watch);

#[derive(Default)]
struct Set {
    /// Those in one runtime have nothing to do with another, which may be blocked, or end.
    queues: Vec<Queue>,
    last: u64,
}

/// The alarms in a runtime, in the order they were set, which is the one they go off in.
struct Queue {
    runtime: RuntimeId,
    /// What was taken back keeps its place until it is the first.
    alarms: VecDeque<(Instant, Option<Weak<dyn OnAlarm>>)>,
    /// The number of the first, or of the next.
    first: u64,
}

// === impl Alarms ===

impl Alarms {
    /// Sets one that goes off [`DELAY`] after `now`, and up to [`PERIOD`](ticker::PERIOD) later.
    pub(crate) fn set(&self, now: Instant, told: Weak<dyn OnAlarm>, runtime: &Runtime) -> Alarm {
        let id = runtime.id();
        let at = now + DELAY;
        let (number, is_watched) = lock(&self.0).insert(id, at, told);
        if !is_watched {
            Watch { set: Arc::downgrade(&self.0), runtime: id }.start(runtime, at);
        }
        Alarm { runtime: id, number }
    }

    /// Takes one back, if it has not gone off.
    pub(crate) fn unset(&self, alarm: Alarm) {
        let mut set = lock(&self.0);
        let unset = set.of(alarm.runtime).and_then(|queue| queue.take(alarm.number));
        drop(set);
        drop(unset);
    }
}

// === impl Set ===

impl Set {
    fn of(&mut self, runtime: RuntimeId) -> Option<&mut Queue> {
        self.queues.iter_mut().find(|queue| queue.runtime == runtime)
    }

    /// Tells its number, and whether it is looked after. If not, it is for the caller to see to that.
    fn insert(&mut self, runtime: RuntimeId, at: Instant, told: Weak<dyn OnAlarm>) -> (u64, bool) {
        if let Some(queue) = self.of(runtime) {
            return (queue.push(at, told), true);
        }
        // Of two alarms in a runtime none has the number of the other, or one could be taken back for the other.
        let mut queue = Queue { runtime, alarms: VecDeque::new(), first: self.last + 1 };
        let number = queue.push(at, told);
        self.queues.push(queue);
        (number, false)
    }

    /// Those in a runtime, which nobody looks after any more.
    fn remove(&mut self, runtime: RuntimeId) -> Option<Queue> {
        let place = self.queues.iter().position(|queue| queue.runtime == runtime)?;
        let queue = self.queues.swap_remove(place);
        self.last = self.last.max(queue.next() - 1);
        Some(queue)
    }
}

// === impl Queue ===

impl Queue {
    fn next(&self) -> u64 {
        self.first + self.alarms.len() as u64
    }

    fn push(&mut self, at: Instant, told: Weak<dyn OnAlarm>) -> u64 {
        let number = self.next();
        self.alarms.push_back((at, Some(told)));
        number
    }

    fn take(&mut self, number: u64) -> Option<Weak<dyn OnAlarm>> {
        let place = usize::try_from(number.checked_sub(self.first)?).ok()?;
        let taken = self.alarms.get_mut(place)?.1.take();
        while let Some((_, None)) = self.alarms.front() {
            self.pop();
        }
        taken
    }

    fn pop(&mut self) -> Option<Weak<dyn OnAlarm>> {
        let (_, told) = self.alarms.pop_front()?;
        self.first += 1;
        told
    }

    /// The next that is due by now.
    fn pop_due(&mut self, now: Instant) -> Option<Weak<dyn OnAlarm>> {
        while self.alarms.front().is_some_and(|(at, _)| *at <= now) {
            if let Some(told) = self.pop() {
                return Some(told);
            }
        }
        None
    }
}

// === impl Watch ===

impl Watch {
    /// By the ticker, where a task might wait for a thread that is blocked.
    fn start(self, runtime: &Runtime, first: Instant) {
        let unattended = if ticker::serves(runtime) { ticker::attend(self) } else { Err(self) };
        if let Err(watch) = unattended {
            // A runtime that is ending drops it here and now.
            runtime.spawn(Watching(watch).watch(first));
        }
    }

    /// Lets those go off that are due. Tells whether any are left: whoever sets the next starts another watch.
    pub(crate) fn look(&self) -> bool {
        self.ring();
        self.next().is_some()
    }

    fn ring(&self) {
        let Some(set) = self.set.upgrade() else { return };
        let now = Instant::now();
        loop {
            let due = lock(&set).of(self.runtime).and_then(|queue| queue.pop_due(now));
            let Some(due) = due else { return };
            if tell(&due) == Then::Snooze {
                lock(&set).insert(self.runtime, now + DELAY, due);
            }
        }
    }

    fn next(&self) -> Option<Instant> {
        let set = self.set.upgrade()?;
        let mut set = lock(&set);
        let first = set.of(self.runtime)?.alarms.front().map(|(at, _)| *at);
        if first.is_none() {
            set.remove(self.runtime);
        }
        first
    }
}

/// One that panics leaves the others theirs.
fn tell(told: &Weak<dyn OnAlarm>) -> Then {
    let Some(told) = told.upgrade() else { return Then::Done };
    catch_unwind(AssertUnwindSafe(|| told.on_alarm())).unwrap_or(Then::Done)
}

// === impl Watching ===

impl Watching {
    async fn watch(mut self, first: Instant) {
        // Also where that is taken back at once: or each attempt that is alone would start a watch of its own.
        let mut next = Some(first);
        while let Some(at) = next {
            sleep_until(at).await;
            self.0.ring();
            next = self.0.next();
        }
        // From here on it looks after nothing.
        self.0.set = Weak::new();
    }
}

impl Drop for Watching {
    fn drop(&mut self) {
        let Some(set) = self.0.set.upgrade() else { return };
        let left = lock(&set).remove(self.0.runtime);
        for told in left.into_iter().flat_map(|left| left.alarms).filter_map(|(_, told)| told) {
            // Who would snooze is being polled, and is left to its caller.
            tell(&told);
        }
    }
}

#[cfg(all(test, not(shuttle)))]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::mpsc;
    use std::thread;

    use tokio::runtime::Builder;
    use tokio::time::sleep;

    use super::*;

    /// Counts how often it rings, and is busy the first few times.
    #[derive(Default)]
    struct Bell {
        rung: AtomicUsize,
        busy: usize,
        breaks: bool,
    }

    impl OnAlarm for Bell {
        fn on_alarm(self: Arc<Self>) -> Then {
            assert!(!self.breaks, "it breaks");
            match self.rung.fetch_add(1, Ordering::Relaxed) < self.busy {
                true => Then::Snooze,
                false => Then::Done,
            }
        }
    }

    impl Bell {
        fn set(self: &Arc<Self>, alarms: &Alarms) -> Alarm {
            let told: Weak<Self> = Arc::downgrade(self);
            alarms.set(Instant::now(), told, &Runtime::current())
        }

        fn rung(&self) -> usize {
            self.rung.load(Ordering::Relaxed)
        }
    }

    #[tokio::test(start_paused = true)]
    async fn one_goes_off_unless_it_is_taken_back_or_its_bell_is_gone() {
        let (alarms, rings, silent, gone) = (Alarms::default(), Arc::default(), Arc::default(), Arc::<Bell>::default());
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
    async fn whoever_is_busy_is_told_again() {
        let (alarms, bell) = (Alarms::default(), Arc::new(Bell { busy: 2, ..Bell::default() }));
        bell.set(&alarms);
        sleep(DELAY * 5 / 2).await;
        assert_eq!(bell.rung(), 2);
        sleep(DELAY * 10).await;
        assert_eq!(bell.rung(), 3);
    }

    #[tokio::test(start_paused = true)]
    async fn to_take_one_back_too_late_takes_back_no_other() {
        let (alarms, first, second) = (Alarms::default(), Arc::default(), Arc::default());
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
        let (alarms, bell) = (Alarms::default(), Arc::default());
        let mut set: Vec<_> = (0..8).map(|_| Bell::set(&bell, &alarms)).collect();
        for at in [3, 0, 5, 0, 2, 1, 1, 0] {
            alarms.unset(set.remove(at));
        }
        assert!(lock(&alarms.0).queues.iter().all(|queue| queue.alarms.is_empty()));
        sleep(DELAY * 2).await;
        assert_eq!(bell.rung(), 0);
        assert!(lock(&alarms.0).queues.is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn whoever_panics_leaves_the_others_theirs() {
        let (alarms, other) = (Alarms::default(), Arc::default());
        let breaks = Arc::new(Bell { breaks: true, ..Bell::default() });
        breaks.set(&alarms);
        Bell::set(&other, &alarms);
        sleep(DELAY * 2).await;
        assert_eq!(other.rung(), 1);
    }

    #[test]
    fn those_of_a_runtime_of_several_threads_go_off_although_all_are_blocked() {
        let (alarms, breaks, rings) =
            (Alarms::default(), Arc::new(Bell { breaks: true, ..Bell::default() }), Arc::default());
        let runtime = Builder::new_multi_thread().worker_threads(1).enable_time().build().unwrap();
        let (release, blocked) = mpsc::channel::<()>();
        runtime.spawn(async move { blocked.recv() });
        runtime.block_on(async {
            breaks.set(&alarms);
            Bell::set(&rings, &alarms);
        });
        let until = Instant::now() + DELAY * 100;
        while rings.rung() == 0 && Instant::now() < until {
            thread::sleep(ticker::PERIOD);
        }
        drop(release);
        assert_eq!(rings.rung(), 1);
    }

    #[test]
    fn those_of_a_runtime_that_ends_go_off_and_those_of_another_stay() {
        let (alarms, ends, stays) = (Alarms::default(), Arc::default(), Arc::default());
        let runtime = || Builder::new_current_thread().enable_time().build().unwrap();
        let (ending, staying) = (runtime(), runtime());
        ending.block_on(async { Bell::set(&ends, &alarms) });
        let in_time = staying.block_on(async { Bell::set(&stays, &alarms) });
        drop(ending);
        assert_eq!((ends.rung(), stays.rung()), (1, 0));
        alarms.unset(in_time);
    }
}
