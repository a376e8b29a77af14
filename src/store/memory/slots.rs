//! The keys of one shard, by key, by when they expire, and by whether they may be dropped.

use std::collections::BTreeSet;
use std::mem;
use std::time::Duration;

use bytes::Bytes;
use tokio::time::Instant;

use crate::fingerprint::Fingerprint;
use crate::key::{Key, KeyMap};
use crate::store::{Claim, ClaimId, Claimed};
use crate::sync::atomic::{AtomicUsize, Ordering};

/// How many expired keys one step removes at most, so that a million expiring together stop nobody.
pub(super) const SWEEP: usize = 16;

/// What all shards hold together.
#[derive(Debug, Default)]
pub(super) struct Used {
    pub(super) keys: AtomicUsize,
    pub(super) bytes: AtomicUsize,
}

#[derive(Debug, Default)]
pub(super) struct Slots {
    pub(super) by_key: KeyMap<Slot>,
    pub(super) by_expiry: BTreeSet<(Instant, Key)>,
    /// What may be dropped when the store is full, soonest to expire first.
    pub(super) free: BTreeSet<(Instant, Key)>,
}

#[derive(Clone, Debug)]
pub(super) struct Slot {
    pub(super) id: ClaimId,
    pub(super) attempt: u32,
    pub(super) retention: Duration,
    pub(super) fingerprint: Option<Fingerprint>,
    /// Made free by an operator: whatever comes next is taken, whatever its fingerprint is.
    pub(super) forgotten: bool,
    /// An attempt before this one died or failed, and is to be remembered for the retention.
    pub(super) remembered: bool,
    pub(super) phase: Phase,
    pub(super) expires: Instant,
}

#[derive(Clone, Debug)]
pub(super) enum Phase {
    Done(Bytes),
    Free,
    Running { lease_until: Instant },
}

/// What a claim means for a key that somebody has had.
pub(super) enum Judged {
    Answer(Claimed),
    Takeable,
}

// === impl Used ===

impl Used {
    fn one_more_key(&self, max: usize) -> bool {
        let more = |keys| (keys < max).then_some(keys + 1);
        self.keys.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).is_ok()
    }
}

// === impl Slot ===

impl Slot {
    pub(super) fn running(claim: &Claim, attempt: u32, now: Instant) -> Self {
        let lease_until = now + claim.lease;
        Self {
            id: claim.id,
            attempt,
            retention: claim.retention,
            fingerprint: claim.fingerprint,
            forgotten: false,
            remembered: false,
            phase: Phase::Running { lease_until },
            // Outlives its lease, so that the attempt number and the fingerprint outlive a crash.
            expires: lease_until + claim.retention,
        }
    }

    /// The next attempt's. Who held it when its lease ended has died, and may have had an effect.
    pub(super) fn taken_over(&self, claim: &Claim, now: Instant) -> Self {
        let remembered = self.remembered || matches!(self.phase, Phase::Running { .. });
        Self { remembered, ..Self::running(claim, self.attempt.saturating_add(1), now) }
    }

    pub(super) fn freed(&self, life: Duration, now: Instant) -> Self {
        let life = if self.remembered { life.max(self.retention) } else { life };
        Self { phase: Phase::Free, remembered: life >= self.retention, expires: now + life, ..self.clone() }
    }

    pub(super) fn is_live(&self, now: Instant) -> bool {
        matches!(self.phase, Phase::Running { lease_until } if lease_until > now)
    }

    pub(super) fn judge(&self, claim: &Claim, now: Instant) -> Judged {
        let fingerprint = self.fingerprint;
        Judged::Answer(match &self.phase {
            Phase::Running { .. } if self.id == claim.id => Claimed::Acquired { attempt: self.attempt },
            _ if claim.refuse_other && !self.forgotten && fingerprint != claim.fingerprint => Claimed::Mismatch,
            Phase::Done(record) => Claimed::Done { fingerprint, record: record.clone() },
            // Its own claim, released: this sending of it is late.
            Phase::Free if self.id == claim.id => Claimed::Running { fingerprint, lease_left: Duration::ZERO },
            Phase::Running { lease_until } if *lease_until > now => {
                Claimed::Running { fingerprint, lease_left: *lease_until - now }
            }
            Phase::Free | Phase::Running { .. } => return Judged::Takeable,
        })
    }

    pub(super) fn bytes(&self) -> usize {
        match &self.phase {
            Phase::Done(record) => record.len(),
            Phase::Free | Phase::Running { .. } => 0,
        }
    }
}

// === impl Slots ===

impl Slots {
    pub(super) fn get(&self, key: &Key, now: Instant) -> Option<&Slot> {
        self.by_key.get(key).filter(|slot| slot.expires > now)
    }

    pub(super) fn put(&mut self, key: &Key, slot: Slot, used: &Used) {
        self.put_within(usize::MAX, key, slot, used);
    }

    /// Puts a slot under a key that is there, or for which there is room. Other shards take theirs at the same time.
    pub(super) fn put_within(&mut self, max_keys: usize, key: &Key, slot: Slot, used: &Used) -> bool {
        let (bytes, place, is_free) = (slot.bytes(), (slot.expires, *key), matches!(slot.phase, Phase::Free));
        match self.by_key.get_mut(key) {
            Some(there) => {
                let before = mem::replace(there, slot);
                self.leave_places(key, &before, used);
            }
            None if !used.one_more_key(max_keys) => return false,
            None => {
                self.by_key.insert(*key, slot);
            }
        }
        used.bytes.fetch_add(bytes, Ordering::Relaxed);
        self.by_expiry.insert(place);
        if is_free {
            self.free.insert(place);
        }
        true
    }

    fn remove(&mut self, key: &Key, used: &Used) {
        if let Some(slot) = self.by_key.remove(key) {
            self.leave_places(key, &slot, used);
            used.keys.fetch_sub(1, Ordering::Relaxed);
        }
    }

    fn leave_places(&mut self, key: &Key, slot: &Slot, used: &Used) {
        used.bytes.fetch_sub(slot.bytes(), Ordering::Relaxed);
        self.by_expiry.remove(&(slot.expires, *key));
        if matches!(slot.phase, Phase::Free) {
            self.free.remove(&(slot.expires, *key));
        }
    }

    pub(super) fn sweep(&mut self, now: Instant, used: &Used) {
        for _ in 0..SWEEP {
            match self.by_expiry.first() {
                Some(&(expires, key)) if expires <= now => self.remove(&key, used),
                _ => return,
            }
        }
    }

    pub(super) fn drop_free(&mut self, used: &Used) {
        if let Some((_, key)) = self.free.first().copied() {
            self.remove(&key, used);
        }
    }
}
