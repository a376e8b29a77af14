//! A store that remembers what it was asked for.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use tower_idempotency::key::Key;
use tower_idempotency::store::{Claim, Claimed, Entry, Forgotten, Hold, Store, StoreError};

/// What passes through on the way to a store. Clones are one.
#[derive(Clone)]
pub struct Observed<S> {
    inner: S,
    seen: Arc<Seen>,
    /// Without a hint it answers as it did before.
    blind: bool,
    /// It hints all the time.
    restless: bool,
    /// It does not know how long a lease still lasts.
    vague: bool,
}

#[derive(Default)]
struct Seen {
    /// When it was asked for a claim.
    looks: Mutex<Vec<u64>>,
    /// When the last completion was sent.
    completed: Mutex<Option<u64>>,
    hints: AtomicUsize,
    before: Mutex<Option<(usize, Claimed)>>,
}

/// The time in microseconds, comparable between processes.
pub fn micros() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_micros().try_into().unwrap()
}

/// Panics unless there is a look per 50 ms, and at most one more after it, in any stretch of time.
pub fn assert_paced(looks: &[u64]) {
    let pace = 50_000;
    for (first, from) in looks.iter().enumerate() {
        for (last, to) in looks.iter().enumerate().skip(first) {
            let allowed = (to - from) / pace + 2;
            assert!((last - first + 1) as u64 <= allowed, "{} looks in {} us", last - first + 1, to - from);
        }
    }
}

impl<S> Observed<S> {
    pub fn new(inner: S) -> Self {
        Self { inner, seen: Arc::default(), blind: false, restless: false, vague: false }
    }

    /// Who polls it learns nothing: whoever is told something was woken.
    pub fn blind(inner: S) -> Self {
        Self { blind: true, ..Self::new(inner) }
    }

    pub fn restless(inner: S) -> Self {
        Self { restless: true, ..Self::new(inner) }
    }

    pub fn vague(self) -> Self {
        Self { vague: true, ..self }
    }

    pub fn looks(&self) -> Vec<u64> {
        self.seen.looks.lock().unwrap().clone()
    }

    pub fn hints(&self) -> usize {
        self.seen.hints.load(Ordering::SeqCst)
    }

    pub fn completed(&self) -> Option<u64> {
        *self.seen.completed.lock().unwrap()
    }
}

impl<S: Store> Store for Observed<S> {
    async fn claim(&self, key: &Key, claim: &Claim) -> Result<Claimed, StoreError> {
        self.seen.looks.lock().unwrap().push(micros());
        let hints = self.hints();
        if let Some((then, claimed)) = &*self.seen.before.lock().unwrap()
            && self.blind
            && *then == hints
        {
            return Ok(claimed.clone());
        }
        let claimed = self.inner.claim(key, claim).await?;
        if let (Claimed::Running { fingerprint, .. }, true) = (&claimed, self.vague) {
            return Ok(Claimed::Running { fingerprint: *fingerprint, lease_left: Duration::ZERO });
        }
        if let Claimed::Running { fingerprint, .. } = claimed {
            let running = Claimed::Running { fingerprint, lease_left: Duration::from_secs(60) };
            *self.seen.before.lock().unwrap() = Some((hints, running));
        }
        Ok(claimed)
    }

    async fn renew(&self, key: &Key, claim: &Claim) -> Result<Hold, StoreError> {
        self.inner.renew(key, claim).await
    }

    async fn complete(&self, key: &Key, claim: &Claim, record: Bytes) -> Result<Hold, StoreError> {
        *self.seen.completed.lock().unwrap() = Some(micros());
        self.inner.complete(key, claim, record).await
    }

    async fn release(&self, key: &Key, claim: &Claim, remember: Duration) -> Result<Hold, StoreError> {
        self.inner.release(key, claim, remember).await
    }

    async fn lookup(&self, key: &Key) -> Result<Option<Entry>, StoreError> {
        self.inner.lookup(key).await
    }

    async fn forget(&self, key: &Key, force: bool) -> Result<Forgotten, StoreError> {
        self.inner.forget(key, force).await
    }

    fn failure_domain(&self, key: &Key) -> u16 {
        self.inner.failure_domain(key)
    }

    async fn changed(&self, key: &Key) {
        if !self.restless {
            self.inner.changed(key).await;
        }
        self.seen.hints.fetch_add(1, Ordering::SeqCst);
    }
}
