//! Duplicates of a running attempt: waiting, sharing, taking over.
//!
//! All requests of this process for one key share a [`Flight`]. One of them at a time has the lead: it alone speaks to
//! the store, and its attempt keeps the lead while it runs. The others wait for what comes of it, or for the lead.

mod lead;
#[cfg(all(test, shuttle))]
mod races;
mod seat;

use std::collections::BTreeMap;
use std::mem;
use std::sync::{Arc, OnceLock, Weak};
use std::task::Waker;

use bytes::Bytes;
use tokio::time::Instant;

use self::lead::Course;
pub(crate) use self::lead::Lead;
pub(crate) use self::seat::{Seat, Turn};
use crate::fingerprint::Fingerprint;
use crate::key::{Key, KeyMap};
use crate::ledger::Ledger;
use crate::sync::{Mutex, lock};

/// All flights of a ledger, each as long as somebody is on it and it has not landed.
#[derive(Default)]
pub(crate) struct Flights(Mutex<KeyMap<Weak<Flight>>>);

/// What the requests of this process for one key share.
struct Flight {
    ledger: Ledger,
    key: Key,
    state: Mutex<State>,
    /// Set under the lock of the state, and for good.
    landed: OnceLock<Landing>,
}

struct State {
    /// Unless somebody has the lead.
    course: Option<Course>,
    /// What is known of the attempt that runs.
    running: Option<Running>,
    /// How many wait, until it lands.
    waiting: usize,
    /// Those of them who have looked and are to be woken, the first to come first. If there are any and the lead is free, somebody
    /// else who waits is about to look.
    asleep: BTreeMap<u64, Waker>,
    next_place: u64,
}

#[derive(Clone, Copy)]
struct Running {
    fingerprint: Option<Fingerprint>,
    /// When the lease ends that another process has.
    lease_until: Option<Instant>,
}

/// How a flight ended for those who waited.
#[derive(Clone)]
pub(crate) enum Landing {
    Done {
        fingerprint: Option<Fingerprint>,
        record: Bytes,
    },
    Failed,
    StoreUnavailable,
    /// What the store keeps cannot be read.
    Unreadable,
}

// === impl Flight ===

impl Flight {
    fn join(ledger: &Ledger, key: Key) -> Arc<Self> {
        let mut flights = lock(&ledger.flights().0);
        if let Some(flight) = flights.get(&key).and_then(Weak::upgrade) {
            return flight;
        }
        let state = State {
            course: Some(Course::default()),
            running: None,
            waiting: 0,
            asleep: BTreeMap::new(),
            next_place: 0,
        };
        let flight = Arc::new(Self { ledger: ledger.clone(), key, state: Mutex::new(state), landed: OnceLock::new() });
        flights.insert(key, Arc::downgrade(&flight));
        flight
    }

    /// A place for one who waits, unless too many do.
    fn place(&self) -> Option<u64> {
        let mut state = lock(&self.state);
        if state.waiting >= self.ledger.max_waiting_of_a_key() {
            return None;
        }
        state.waiting += 1;
        state.next_place += 1;
        Some(state.next_place)
    }

    /// Gives the place back. Whoever had it may be the one who was woken to take the lead.
    fn leave(&self, place: u64) {
        let mut state = lock(&self.state);
        state.waiting -= 1;
        let asleep = state.asleep.remove(&place);
        let next = if state.course.is_some() { state.next() } else { None };
        drop(state);
        drop(asleep);
        if let Some(next) = next {
            next.wake();
        }
    }

    /// Tells those who wait what is known of the attempt that runs, if it is another than before.
    fn runs(&self, running: Option<Running>) {
        let mut state = lock(&self.state);
        let fingerprint = |running: Running| running.fingerprint;
        let is_news = running.is_some() && state.running.map(fingerprint) != running.map(fingerprint);
        state.running = running;
        let asleep = if is_news { mem::take(&mut state.asleep) } else { BTreeMap::new() };
        drop(state);
        asleep.into_values().for_each(Waker::wake);
    }

    /// Leaves the lead to the next.
    fn hand_on(&self, course: Course) {
        let mut state = lock(&self.state);
        state.course = Some(course);
        let next = state.next();
        drop(state);
        if let Some(next) = next {
            next.wake();
        }
    }

    fn land(&self, landing: Landing) {
        self.ledger.flights().remove(self);
        let mut state = lock(&self.state);
        // It lands once: whoever takes the lead after that is told so instead.
        let _ = self.landed.set(landing);
        let asleep = mem::take(&mut state.asleep);
        drop(state);
        asleep.into_values().for_each(Waker::wake);
    }
}

impl Drop for Flight {
    fn drop(&mut self) {
        if self.landed.get().is_none() {
            self.ledger.flights().remove(self);
        }
    }
}

// === impl State ===

impl State {
    /// Who is to be woken to take the lead.
    fn next(&mut self) -> Option<Waker> {
        self.asleep.pop_first().map(|(_, waker)| waker)
    }
}

// === impl Flights ===

impl Flights {
    /// Takes a flight off the map, so that whoever comes next starts a new one.
    fn remove(&self, flight: &Flight) {
        let mut flights = lock(&self.0);
        if flights.get(&flight.key).is_some_and(|there| std::ptr::eq(there.as_ptr(), flight)) {
            flights.remove(&flight.key);
        }
    }

    #[cfg(all(test, shuttle))]
    pub(crate) fn is_empty(&self) -> bool {
        lock(&self.0).is_empty()
    }
}

#[cfg(test)]
#[allow(clippy::panic, reason = "a test panics where it fails")]
mod tests {
    use std::pin::Pin;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::task::{Context, Poll, Wake};
    use std::time::Duration;

    use super::*;
    use crate::MemoryStore;
    use crate::policy::Contract;
    use crate::telemetry::Report;

    /// One who waits, polled by hand.
    struct Member {
        turn: Pin<Box<dyn Future<Output = Turn>>>,
        bell: Arc<Bell>,
    }

    #[derive(Default)]
    struct Bell(AtomicBool);

    impl Wake for Bell {
        fn wake(self: Arc<Self>) {
            self.0.store(true, Ordering::SeqCst);
        }
    }

    impl Member {
        fn of(ledger: &Ledger) -> Self {
            let mut seat = Seat::take(ledger, KEY, None, false);
            let turn = Box::pin(async move {
                seat.turn(Instant::now() + Duration::from_secs(1), &mut Report::open(Contract::Webhook)).await
            });
            Self { turn, bell: Arc::default() }
        }

        fn poll(&mut self) -> Option<Turn> {
            match self.turn.as_mut().poll(&mut Context::from_waker(&Waker::from(Arc::clone(&self.bell)))) {
                Poll::Ready(turn) => Some(turn),
                Poll::Pending => None,
            }
        }

        fn is_woken(&self) -> bool {
            self.bell.0.swap(false, Ordering::SeqCst)
        }

        /// Waits from now on.
        fn waits(mut self) -> Self {
            assert!(self.poll().is_none());
            self
        }

        fn leads(&mut self) -> Lead {
            let Some(Turn::Lead(lead)) = self.poll() else { panic!("it has no lead") };
            lead
        }
    }

    const KEY: Key = Key::new([7; 24]);

    fn ledger() -> Ledger {
        Ledger::new(MemoryStore::new())
    }

    #[tokio::test]
    async fn who_has_come_first_is_woken_first_and_hands_on_what_it_does_not_take() {
        let ledger = ledger();
        let lead = Member::of(&ledger).leads();
        let [first, mut second, mut third] = [(); 3].map(|()| Member::of(&ledger).waits());
        lead.step_down();
        assert_eq!([&first, &second, &third].map(Member::is_woken), [true, false, false]);
        drop(first);
        assert_eq!([&second, &third].map(Member::is_woken), [true, false]);
        // Its client leaves while it has the lead.
        drop(second.leads());
        assert!(third.is_woken());
        third.leads().land(Landing::Failed);
    }

    #[tokio::test]
    async fn a_newcomer_takes_the_lead_that_nobody_has_come_for() {
        let ledger = ledger();
        let lead = Member::of(&ledger).leads();
        let mut slow = Member::of(&ledger).waits();
        lead.step_down();
        let lead = Member::of(&ledger).leads();
        assert!(slow.is_woken() && slow.poll().is_none());
        drop(lead);
        assert!(slow.is_woken());
        slow.leads().step_down();
    }

    #[tokio::test]
    async fn who_leaves_makes_room() {
        let ledger = ledger().max_waiting_per_key(1);
        let lead = Member::of(&ledger).leads();
        let waits = Member::of(&ledger).waits();
        assert!(matches!(Member::of(&ledger).poll(), Some(Turn::Full)));
        drop(waits);
        let _waits = Member::of(&ledger).waits();
        lead.step_down();
    }

    #[tokio::test]
    async fn all_are_told_and_who_comes_later_is_not() {
        let ledger = ledger();
        let lead = Member::of(&ledger).leads();
        let mut waiting = [(); 3].map(|()| Member::of(&ledger).waits());
        lead.land(Landing::Failed);
        let later = Member::of(&ledger).leads();
        for member in &mut waiting {
            assert!(member.is_woken());
            assert!(matches!(member.poll(), Some(Turn::Landed(Landing::Failed))));
        }
        later.step_down();
    }

    #[tokio::test]
    async fn a_flight_that_nobody_is_on_is_forgotten() {
        let ledger = ledger();
        let lead = Member::of(&ledger).leads();
        let waits = Member::of(&ledger).waits();
        drop(lead);
        assert_eq!(lock(&ledger.flights().0).len(), 1);
        drop(waits);
        assert_eq!(lock(&ledger.flights().0).len(), 0);
    }
}
