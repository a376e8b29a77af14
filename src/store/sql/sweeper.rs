//! Expired rows are removed by the tasks that make new ones, a few at a time.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use tokio::time::timeout;

use super::Database;

/// How many expired rows are removed at once, how long that may take, and after how many new keys it is done.
const SWEEP: u32 = 256;
const SWEEP_TIMEOUT: Duration = Duration::from_secs(5);
const SWEEP_AFTER: usize = 64;

/// Has expired rows removed by the tasks that make new ones, one at a time.
#[derive(Debug, Default)]
pub(super) struct Sweeper {
    new_keys: AtomicUsize,
    is_sweeping: AtomicBool,
}

/// That somebody sweeps, also where its task is dropped.
struct Sweeping(Arc<Sweeper>);

// === impl Sweeper ===

impl Sweeper {
    /// A key is new. Some of those that have expired are removed in the background, now and then, unless that is going on.
    pub(super) fn new_key(database: &impl Database) {
        let sweeper = database.sweeper();
        let is_due = sweeper.new_keys.fetch_add(1, Ordering::Relaxed) % SWEEP_AFTER == SWEEP_AFTER - 1;
        if is_due && !sweeper.is_sweeping.swap(true, Ordering::Acquire) {
            let (sweeping, database) = (Sweeping(Arc::clone(sweeper)), database.clone());
            tokio::spawn(async move {
                let _sweeping = sweeping;
                // What was not removed now is removed later.
                let _ = timeout(SWEEP_TIMEOUT, database.sweep(SWEEP)).await;
            });
        }
    }
}

impl Drop for Sweeping {
    fn drop(&mut self) {
        self.0.is_sweeping.store(false, Ordering::Release);
    }
}
