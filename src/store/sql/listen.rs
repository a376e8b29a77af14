//! Hints from PostgreSQL: one connection listens for all keys that somebody waits for, as long as somebody does.
//!
//! The row says whether anybody waits, and only then is its end told: a `NOTIFY` takes one lock of the whole database at its commit.
//! Nothing depends on it. Who waits looks all the same, and what is lost costs a pause between two looks.

use std::collections::HashMap;
use std::mem;
use std::sync::Arc;
use std::time::Duration;

use sqlx::postgres::{PgListener, PgPool, PgPoolOptions};
use tokio::sync::Notify;
use tokio::time::{interval, sleep};

use super::postgres::CHANNEL;
use crate::key::Key;
use crate::sync::{Mutex, lock};

/// How long a connection is given before it is tried again, and how often it is looked whether anybody waits.
const PAUSE: Duration = Duration::from_secs(1);

/// Who waits for which keys.
#[derive(Debug, Default)]
pub(super) struct Watchers(Mutex<Watched>);

#[derive(Debug, Default)]
struct Watched {
    keys: HashMap<Key, (Arc<Notify>, usize)>,
    /// Whether a task listens, or is about to.
    is_listening: bool,
}

/// That somebody waits for a key.
pub(super) struct Watch {
    watchers: Arc<Watchers>,
    key: Key,
    told: Arc<Notify>,
}

/// That a task listens, also when its runtime ends.
struct Listening {
    watchers: Arc<Watchers>,
    /// Until nobody waits any more. Who comes after that has another task listen.
    is_on: bool,
}

// === impl Watchers ===

impl Watchers {
    /// Waits for a key from now on, on a connection like those of `pool` that everybody shares.
    pub(super) fn watch(self: &Arc<Self>, key: Key, pool: &PgPool) -> Watch {
        let mut watched = lock(&self.0);
        let (told, count) = watched.keys.entry(key).or_default();
        *count += 1;
        let told = Arc::clone(told);
        let starts = !mem::replace(&mut watched.is_listening, true);
        drop(watched);
        if starts {
            // Outside of the lock: a runtime that is ending drops it here, and what is dropped takes the lock.
            tokio::spawn(listen(Listening { watchers: Arc::clone(self), is_on: true }, pool.clone()));
        }
        Watch { watchers: Arc::clone(self), key, told }
    }

    fn tell(&self, key: &str) {
        let Ok(key) = key.parse::<Key>() else { return };
        if let Some((told, _)) = lock(&self.0).keys.get(&key) {
            told.notify_waiters();
        }
    }

    fn tell_all(&self) {
        lock(&self.0).keys.values().for_each(|(told, _)| told.notify_waiters());
    }
}

async fn listen(mut listening: Listening, pool: PgPool) {
    let watchers = Arc::clone(&listening.watchers);
    // Not one of the pool's: it may have but one, and is needed for the steps.
    let options = PgPoolOptions::new().max_connections(1).max_lifetime(None).idle_timeout(None);
    let pool = options.connect_lazy_with((*pool.connect_options()).clone());
    while listening.goes_on() {
        if let Ok(mut listener) = PgListener::connect_with(&pool).await
            && listener.listen(CHANNEL).await.is_ok()
        {
            // What was told before is lost, so everybody looks.
            watchers.tell_all();
            let mut looks = interval(PAUSE);
            loop {
                tokio::select! {
                    told = listener.try_recv() => match told {
                        Ok(Some(notification)) => watchers.tell(notification.payload()),
                        // The connection was lost.
                        Ok(None) | Err(_) => break,
                    },
                    _ = looks.tick() => {
                        if !listening.goes_on() {
                            return;
                        }
                    }
                }
            }
            watchers.tell_all();
        }
        sleep(PAUSE).await;
    }
}

// === impl Watch ===

impl Watch {
    pub(super) fn told(&self) -> impl Future<Output = ()> {
        self.told.notified()
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        let mut watched = lock(&self.watchers.0);
        if let Some((_, count)) = watched.keys.get_mut(&self.key) {
            *count -= 1;
            if *count == 0 {
                watched.keys.remove(&self.key);
            }
        }
    }
}

// === impl Listening ===

impl Listening {
    /// Whether anybody waits.
    fn goes_on(&mut self) -> bool {
        let mut watched = lock(&self.watchers.0);
        self.is_on = !watched.keys.is_empty();
        watched.is_listening = self.is_on;
        self.is_on
    }
}

impl Drop for Listening {
    fn drop(&mut self) {
        // Otherwise it may be another's by now.
        if self.is_on {
            lock(&self.watchers.0).is_listening = false;
        }
    }
}
