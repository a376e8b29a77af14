//! The store inside one process: the embedded default, for a single instance and for tests.
//!
//! Its promises last as long as the process: a restart forgets everything, and another process knows nothing of it.

#[cfg(all(test, shuttle))]
mod races;
mod slots;

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::Notify;
use tokio::time::Instant;

use self::slots::{Judged, Phase, Slot, Slots, Used};
use super::{Claim, Claimed, Entry, Forgotten, Hold, State, Store, StoreError};
use crate::key::Key;
use crate::sync::atomic::Ordering;
use crate::sync::{Mutex, MutexGuard, lock};

/// How many keys it holds by default.
const MAX_KEYS: usize = 1_000_000;

/// How many bytes of records it holds by default: 256 MiB.
const MAX_BYTES: usize = 256 << 20;

const SHARDS: usize = 16;

/// Claims and records in the memory of this process. Cheap to clone; clones are one store.
///
/// When it is full it drops keys that are free, then refuses new claims: it never drops a key that is running or done,
/// for that would be a second execution. A million keys, kept for three days, are about four deliveries a second: for more,
/// raise [`max_keys`](Self::max_keys) or lower the retention.
#[derive(Clone, Debug)]
pub struct MemoryStore {
    shards: Arc<[Shard; SHARDS]>,
    used: Arc<Used>,
    max_keys: usize,
    max_bytes: usize,
}

#[derive(Debug, Default)]
struct Shard {
    slots: Mutex<Slots>,
    changed: Notify,
}

/// The store holds as many keys or bytes as it may.
#[derive(Debug)]
struct Full;

// === impl MemoryStore ===

impl MemoryStore {
    /// An empty store for a million keys and 256 MiB of records.
    #[must_use]
    pub fn new() -> Self {
        Self {
            shards: Arc::new(std::array::from_fn(|_| Shard::default())),
            used: Arc::default(),
            max_keys: MAX_KEYS,
            max_bytes: MAX_BYTES,
        }
    }

    /// How many keys it holds, running, done and free, before it refuses new claims. Default: 1,000,000.
    ///
    /// An attempt whose key has gone meanwhile is recorded all the same.
    #[must_use]
    pub const fn max_keys(mut self, keys: usize) -> Self {
        self.max_keys = keys;
        self
    }

    /// How many bytes of records it holds before it refuses new claims. Default: 256 MiB.
    ///
    /// Attempts that run at that moment still finish, so it may grow beyond by
    /// [`Ledger::max_in_flight`](crate::Ledger::max_in_flight) records.
    #[must_use]
    pub const fn max_bytes(mut self, bytes: usize) -> Self {
        self.max_bytes = bytes;
        self
    }

    fn shard(&self, key: &Key) -> &Shard {
        &self.shards[usize::from(key.as_bytes()[0]) % SHARDS]
    }

    /// The shard's slots, less some that have expired.
    fn slots<'a>(&self, shard: &'a Shard, now: Instant) -> MutexGuard<'a, Slots> {
        let mut slots = lock(&shard.slots);
        slots.sweep(now, &self.used);
        slots
    }

    fn too_many_keys(&self) -> bool {
        self.used.keys.load(Ordering::Relaxed) >= self.max_keys
    }

    fn too_many_bytes(&self) -> bool {
        self.used.bytes.load(Ordering::Relaxed) >= self.max_bytes
    }

    fn is_full(&self) -> bool {
        self.too_many_keys() || self.too_many_bytes()
    }

    /// Drops what is expired or free, in shard after shard, until there is room.
    fn make_room(&self, now: Instant) {
        for shard in self.shards.iter() {
            let mut slots = self.slots(shard, now);
            if self.too_many_keys() {
                slots.drop_free(&self.used);
            }
            if !self.is_full() {
                return;
            }
        }
    }
}

impl Default for MemoryStore {
    fn default() -> Self {
        Self::new()
    }
}

impl Store for MemoryStore {
    async fn claim(&self, key: &Key, claim: &Claim) -> Result<Claimed, StoreError> {
        let now = Instant::now();
        if self.is_full() {
            self.make_room(now);
        }
        let mut slots = self.slots(self.shard(key), now);
        let taken = match slots.get(key, now) {
            None if self.too_many_bytes() => return Err(StoreError::refused(Full)),
            None => Slot::running(claim, 1, now),
            Some(slot) => match slot.judge(claim, now) {
                Judged::Answer(answer) => return Ok(answer),
                Judged::Takeable => slot.taken_over(claim, now),
            },
        };
        let attempt = taken.attempt;
        match slots.put_within(self.max_keys, key, taken, &self.used) {
            true => Ok(Claimed::Acquired { attempt }),
            false => Err(StoreError::refused(Full)),
        }
    }

    async fn renew(&self, key: &Key, claim: &Claim) -> Result<Hold, StoreError> {
        let now = Instant::now();
        let mut slots = self.slots(self.shard(key), now);
        match slots.get(key, now) {
            Some(slot) if slot.id != claim.id || matches!(slot.phase, Phase::Free) => return Ok(Hold::Lost),
            Some(Slot { phase: Phase::Done(_), .. }) => {}
            Some(slot) => {
                let renewed = Slot { remembered: slot.remembered, ..Slot::running(claim, claim.attempt, now) };
                slots.put(key, renewed, &self.used);
            }
            None => slots.put(key, Slot::running(claim, claim.attempt, now), &self.used),
        }
        Ok(Hold::Held)
    }

    async fn complete(&self, key: &Key, claim: &Claim, record: Bytes) -> Result<Hold, StoreError> {
        let now = Instant::now();
        let shard = self.shard(key);
        let mut slots = self.slots(shard, now);
        match slots.get(key, now) {
            Some(slot) if slot.id != claim.id || matches!(slot.phase, Phase::Free) => return Ok(Hold::Lost),
            Some(Slot { phase: Phase::Done(_), .. }) => return Ok(Hold::Held),
            Some(_) | None => {
                let expires = now + claim.retention;
                let done = Slot { phase: Phase::Done(record), expires, ..Slot::running(claim, claim.attempt, now) };
                slots.put(key, done, &self.used);
            }
        }
        drop(slots);
        shard.changed.notify_waiters();
        Ok(Hold::Held)
    }

    async fn release(&self, key: &Key, claim: &Claim, remember: Duration) -> Result<Hold, StoreError> {
        let now = Instant::now();
        let shard = self.shard(key);
        let mut slots = self.slots(shard, now);
        let free = match slots.get(key, now) {
            Some(slot) if slot.id != claim.id => return Ok(Hold::Lost),
            Some(Slot { phase: Phase::Done(_), .. }) => return Ok(Hold::Lost),
            Some(Slot { phase: Phase::Free, .. }) => return Ok(Hold::Held),
            // A claim that names no attempt was given up before it ran, and is not counted.
            Some(slot) if claim.attempt == 0 => {
                Slot { attempt: slot.attempt.saturating_sub(1), ..slot.freed(remember, now) }
            }
            Some(slot) => slot.freed(remember, now),
            None => {
                let free = Slot::running(claim, claim.attempt, now).freed(claim.lease, now);
                Slot { remembered: false, ..free }
            }
        };
        slots.put(key, free, &self.used);
        drop(slots);
        shard.changed.notify_waiters();
        Ok(Hold::Held)
    }

    async fn lookup(&self, key: &Key) -> Result<Option<Entry>, StoreError> {
        let now = Instant::now();
        let slots = self.slots(self.shard(key), now);
        Ok(slots.get(key, now).map(|slot| {
            let state = match &slot.phase {
                Phase::Done(record) => State::Done(record.clone()),
                Phase::Free => State::Free,
                Phase::Running { .. } => State::Running,
            };
            Entry::new(state, slot.attempt, slot.fingerprint, slot.expires - now)
        }))
    }

    async fn forget(&self, key: &Key, force: bool) -> Result<Forgotten, StoreError> {
        let now = Instant::now();
        let shard = self.shard(key);
        let mut slots = self.slots(shard, now);
        let free = match slots.get(key, now) {
            None => return Ok(Forgotten::Absent),
            Some(slot) if slot.is_live(now) && !force => return Ok(Forgotten::Running),
            Some(slot) => Slot { forgotten: true, ..slot.freed(slot.retention, now) },
        };
        slots.put(key, free, &self.used);
        drop(slots);
        shard.changed.notify_waiters();
        Ok(Forgotten::Forgotten)
    }

    fn failure_domain(&self, _: &Key) -> u16 {
        0
    }

    async fn changed(&self, key: &Key) {
        self.shard(key).changed.notified().await;
    }
}

// === impl Full ===

impl std::fmt::Display for Full {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("the memory store is full")
    }
}

impl std::error::Error for Full {}

#[cfg(test)]
mod tests {
    use super::*;

    const LEASE: Duration = Duration::from_secs(1);
    const RETENTION: Duration = Duration::from_secs(60);

    fn key(n: u32) -> Key {
        let mut digest = [0; 24];
        digest[..4].copy_from_slice(&n.to_le_bytes());
        Key::from(digest)
    }

    async fn claim(store: &MemoryStore, n: u32) -> (Claim, Result<Claimed, StoreError>) {
        let claim = Claim::new(LEASE, RETENTION);
        let claimed = store.claim(&key(n), &claim).await;
        (claim, claimed)
    }

    #[tokio::test(start_paused = true)]
    async fn a_full_store_drops_what_is_free_and_never_what_is_running_or_done() {
        let store = MemoryStore::new().max_keys(3);
        let (running, _) = claim(&store, 1).await;
        let (done, _) = claim(&store, 2).await;
        store.complete(&key(2), &done, Bytes::from_static(b"x")).await.unwrap();
        let (free, _) = claim(&store, 3).await;
        store.release(&key(3), &free, RETENTION).await.unwrap();

        assert_eq!(claim(&store, 4).await.1.unwrap(), Claimed::Acquired { attempt: 1 });
        assert_eq!(store.lookup(&key(3)).await.unwrap(), None, "the free key was to make room");
        assert!(claim(&store, 5).await.1.unwrap_err().is_definite());
        assert_eq!(store.renew(&key(1), &running).await.unwrap(), Hold::Held);
        assert!(matches!(claim(&store, 2).await.1.unwrap(), Claimed::Done { .. }), "a duplicate is still answered");

        tokio::time::sleep(RETENTION + LEASE).await;
        assert_eq!(claim(&store, 5).await.1.unwrap(), Claimed::Acquired { attempt: 1 });
    }

    #[tokio::test(start_paused = true)]
    async fn a_store_full_of_bytes_refuses_new_claims_and_finishes_old_ones() {
        let store = MemoryStore::new().max_bytes(4);
        let (first, _) = claim(&store, 1).await;
        let (second, _) = claim(&store, 2).await;
        store.complete(&key(1), &first, Bytes::from_static(b"four")).await.unwrap();
        assert!(claim(&store, 3).await.1.is_err());
        assert_eq!(store.complete(&key(2), &second, Bytes::from_static(b"four")).await.unwrap(), Hold::Held);
        tokio::time::sleep(RETENTION).await;
        assert!(claim(&store, 3).await.1.is_ok());
        assert_eq!(store.used.bytes.load(Ordering::Relaxed), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn what_has_expired_is_removed_in_passing() {
        let store = MemoryStore::new();
        for n in 0..1000 {
            let (held, _) = claim(&store, n * 256).await;
            store.release(&key(n * 256), &held, LEASE).await.unwrap();
        }
        assert_eq!(store.used.keys.load(Ordering::Relaxed), 1000);
        tokio::time::sleep(LEASE).await;
        for _ in 0..(1000 / slots::SWEEP + 1) {
            store.lookup(&key(0)).await.unwrap();
        }
        assert_eq!(store.used.keys.load(Ordering::Relaxed), 0);
        let slots = store.shards[0].slots.lock().unwrap();
        assert!(slots.by_key.is_empty() && slots.by_expiry.is_empty() && slots.free.is_empty());
    }
}
