//! Outcomes that this process has told or stored of late, to be told again without asking the store.
//!
//! Only what is finished is in here, and nothing changes that but its end and [`Ledger::forget`](crate::Ledger::forget). Whoever
//! has asked the store says from when its answer is: one from before a key was forgotten is not taken.

use std::collections::VecDeque;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tokio::time::Instant;

use crate::fingerprint::Fingerprint;
use crate::key::{Key, KeyMap};
use crate::sync::atomic::{AtomicBool, Ordering};
use crate::sync::{Mutex, lock};

/// Outcomes are kept side by side in slabs of this size, in bytes: one allocation each would be scattered all over the memory.
/// A larger one stays where it is.
const SLAB: usize = 64 << 10;

/// What an outcome takes beside its bytes, at most.
const OVERHEAD: usize = 320;

/// How many that have come to their end are dropped by each that is added or looked for.
const SWEEP: usize = 4;

/// The outcomes at hand. Without room there are none.
#[derive(Default)]
pub(crate) struct Near {
    is_on: AtomicBool,
    state: Mutex<State>,
}

/// What came of an event: the fingerprint of the request that brought it first, and the record.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct AtHand {
    pub(crate) fingerprint: Option<Fingerprint>,
    pub(crate) record: Bytes,
}

/// A time before or after which a key was forgotten.
#[derive(Clone, Copy)]
pub(crate) struct AsOf(u64);

/// A key that is being forgotten. However that ends, it is forgotten here.
pub(crate) struct Forgetting<'a> {
    near: &'a Near,
    key: Key,
}

#[derive(Default)]
struct State {
    max_bytes: usize,
    life: Duration,
    by_key: KeyMap<(Instant, AtHand)>,
    /// The first to come first. What has been replaced or forgotten keeps its place, and the room it takes in its slab.
    in_order: VecDeque<(Instant, Key, usize)>,
    bytes: usize,
    slab: BytesMut,
    forgotten: u64,
}

// === impl Near ===

impl Near {
    pub(crate) fn set(&self, max_bytes: usize, life: Duration) {
        let mut state = lock(&self.state);
        let forgotten = state.forgotten;
        *state = State { max_bytes, life, forgotten, ..State::default() };
        self.is_on.store(max_bytes > 0 && !life.is_zero(), Ordering::Relaxed);
    }

    pub(crate) fn get(&self, key: &Key) -> Option<AtHand> {
        if !self.is_on.load(Ordering::Relaxed) {
            return None;
        }
        let now = Instant::now();
        let mut at_hand = {
            let mut state = lock(&self.state);
            state.sweep(now);
            state.by_key.get(key).filter(|(until, _)| *until > now).map(|(_, at_hand)| at_hand.clone())?
        };
        // A client that is slow to take a hundred bytes must not keep a slab for itself.
        if is_in_slab(&at_hand.record) {
            at_hand.record = Bytes::copy_from_slice(&at_hand.record);
        }
        Some(at_hand)
    }

    /// To be asked before the store is.
    pub(crate) fn as_of(&self) -> AsOf {
        AsOf(if self.is_on.load(Ordering::Relaxed) { lock(&self.state).forgotten } else { 0 })
    }

    /// Keeps what the store has said, or has been told, for as long as it is kept there at the most.
    pub(crate) fn put(
        &self,
        as_of: AsOf,
        key: Key,
        fingerprint: Option<Fingerprint>,
        record: &Bytes,
        kept_for: Duration,
    ) {
        if self.is_on.load(Ordering::Relaxed) {
            let now = Instant::now();
            let mut state = lock(&self.state);
            state.sweep(now);
            if state.forgotten == as_of.0 {
                let until = now + state.life.min(kept_for);
                state.put(until, key, fingerprint, record);
            }
        }
    }

    pub(crate) fn forget(&self, key: Key) -> Forgetting<'_> {
        Forgetting { near: self, key }
    }
}

// === impl State ===

impl State {
    fn put(&mut self, until: Instant, key: Key, fingerprint: Option<Fingerprint>, record: &Bytes) {
        let bytes = record.len() + OVERHEAD;
        if bytes > self.max_bytes {
            return;
        }
        while self.bytes + bytes > self.max_bytes {
            self.drop_first();
        }
        let at_hand = AtHand { fingerprint, record: self.in_slab(record) };
        self.by_key.insert(key, (until, at_hand));
        self.in_order.push_back((until, key, bytes));
        self.bytes += bytes;
    }

    fn in_slab(&mut self, record: &Bytes) -> Bytes {
        if !is_in_slab(record) {
            return record.clone();
        }
        if self.slab.capacity() < record.len() {
            self.slab = BytesMut::with_capacity(SLAB);
        }
        self.slab.extend_from_slice(record);
        self.slab.split().freeze()
    }

    fn sweep(&mut self, now: Instant) {
        for _ in 0..SWEEP {
            match self.in_order.front() {
                Some((until, _, _)) if *until <= now => self.drop_first(),
                _ => return,
            }
        }
    }

    fn drop_first(&mut self) {
        let Some((until, key, bytes)) = self.in_order.pop_front() else { return };
        self.bytes -= bytes;
        if self.by_key.get(&key).is_some_and(|(there, _)| *there == until) {
            self.by_key.remove(&key);
        }
    }
}

fn is_in_slab(record: &Bytes) -> bool {
    record.len() < SLAB / 4
}

// === impl Forgetting ===

impl Drop for Forgetting<'_> {
    fn drop(&mut self) {
        let mut state = lock(&self.near.state);
        state.forgotten += 1;
        state.by_key.remove(&self.key);
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::advance;

    use super::*;

    const LIFE: Duration = Duration::from_secs(5);
    const LONG: Duration = Duration::from_secs(3600);

    fn near(max_bytes: usize) -> Near {
        let near = Near::default();
        near.set(max_bytes, LIFE);
        near
    }

    fn key(number: usize) -> Key {
        Key::new([number as u8; 24])
    }

    fn outcome(bytes: usize) -> AtHand {
        AtHand { fingerprint: None, record: vec![7; bytes].into() }
    }

    fn put(near: &Near, number: usize, bytes: usize) {
        near.put(near.as_of(), key(number), None, &outcome(bytes).record, LONG);
    }

    #[tokio::test(start_paused = true)]
    async fn an_outcome_is_at_hand_for_its_life_and_no_longer_than_it_is_kept() {
        let near = near(10_000);
        put(&near, 1, 100);
        near.put(near.as_of(), key(2), None, &outcome(3).record, LIFE / 2);
        assert_eq!((near.get(&key(1)), near.get(&key(2))), (Some(outcome(100)), Some(outcome(3))));
        advance(LIFE / 2).await;
        assert_eq!((near.get(&key(1)), near.get(&key(2))), (Some(outcome(100)), None));
        advance(LIFE / 2).await;
        assert_eq!(near.get(&key(1)), None);
        let state = lock(&near.state);
        assert_eq!((state.bytes, state.by_key.len(), state.in_order.len()), (0, 0, 0));
    }

    #[tokio::test(start_paused = true)]
    async fn there_are_no_more_bytes_than_there_may_be() {
        let near = near(10_000);
        for number in 0..100 {
            put(&near, number, 1000);
            let state = lock(&near.state);
            assert!(state.bytes <= 10_000 && state.by_key.len() <= 7);
        }
        assert_eq!((near.get(&key(92)), near.get(&key(99))), (None, Some(outcome(1000))));
        put(&near, 99, 10_000);
        assert_eq!(near.get(&key(99)), Some(outcome(1000)));
        for bytes in [0, SLAB / 4, 0, 1] {
            put(&near, 1, bytes.min(9000));
            assert_eq!(near.get(&key(1)), Some(outcome(bytes.min(9000))));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_was_asked_for_before_a_key_was_forgotten_is_not_taken() {
        let near = near(10_000);
        put(&near, 1, 1);
        let as_of = near.as_of();
        drop(near.forget(key(1)));
        assert_eq!(near.get(&key(1)), None);
        near.put(as_of, key(1), None, &outcome(1).record, LONG);
        assert_eq!(near.get(&key(1)), None);
        put(&near, 1, 2);
        assert_eq!(near.get(&key(1)), Some(outcome(2)));
        // The place of the first comes to its end before that of the second.
        advance(LIFE - Duration::from_millis(1)).await;
        put(&near, 1, 3);
        advance(Duration::from_millis(1)).await;
        assert_eq!(near.get(&key(1)), Some(outcome(3)));
    }

    #[tokio::test(start_paused = true)]
    async fn a_slab_is_given_back_with_the_last_of_its_outcomes() {
        let near = near(100 * SLAB);
        for number in 0..250 {
            put(&near, number, 1000);
        }
        let told = near.get(&key(249)).unwrap().record;
        let last = lock(&near.state).by_key[&key(249)].1.record.clone();
        advance(LIFE).await;
        for number in 0..250 {
            near.get(&key(number));
        }
        lock(&near.state).slab = BytesMut::new();
        assert!(last.is_unique());
        assert_eq!(told, last);
    }

    #[test]
    fn without_room_there_is_nothing() {
        let near = Near::default();
        put(&near, 1, 1);
        assert_eq!(near.get(&key(1)), None);
        assert!(lock(&near.state).in_order.is_empty());
    }
}
