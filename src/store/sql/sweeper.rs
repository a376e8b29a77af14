//! Expired rows are removed by the tasks that make new ones, a few at a time.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use tokio::time::timeout;

use super::Database;
use super::statements::Dialect;

/// How many expired rows are removed at once, and how long that may take. Few, since a commit waits for those before it.
const SWEEP: u32 = 16;
const SWEEP_TIMEOUT: Duration = Duration::from_secs(5);

/// After how many new keys it is done: while there are rows to remove, two for each new one, and otherwise now and then.
const AFTER_FULL: usize = 8;
const AFTER_LESS: usize = 64;

/// Has expired rows removed by the tasks that make new ones, one at a time.
#[derive(Debug, Default)]
pub(super) struct Sweeper {
    new_keys: AtomicUsize,
    is_sweeping: AtomicBool,
    /// The last time found as many as it may remove.
    was_full: AtomicBool,
}

/// That somebody sweeps, also where its task is dropped.
struct Sweeping(Arc<Sweeper>);

/// What removes rows that have expired, found by a column that has an index and is no less than `expires_at`, but for the moment
/// between two looks at the clock. Its one parameter is how many at most.
pub(super) fn statement(table: &str, indexed: &str, dialect: Dialect) -> String {
    let Dialect { now, one_of: [before, after], .. } = dialect;
    // The time as a query of its own, that is asked once: no index serves to compare with what changes while it is read, and to look
    // at all rows for those that have expired costs more than all else.
    let now = format!("(SELECT {now})");
    let keys = format!("SELECT key FROM {table} WHERE {indexed} <= {now} ORDER BY {indexed} LIMIT $1");
    format!("DELETE FROM {table} WHERE key {before}{keys}{after} AND expires_at <= {now}")
}

// === impl Sweeper ===

impl Sweeper {
    /// A key is new. Some of those that have expired are removed in the background, now and then, unless that is going on.
    pub(super) fn new_key(database: &impl Database) {
        let sweeper = database.sweeper();
        let after = if sweeper.was_full.load(Ordering::Relaxed) { AFTER_FULL } else { AFTER_LESS };
        let is_due = sweeper.new_keys.fetch_add(1, Ordering::Relaxed) % after == after - 1;
        if is_due && !sweeper.is_sweeping.swap(true, Ordering::Acquire) {
            let (sweeping, database) = (Sweeping(Arc::clone(sweeper)), database.clone());
            tokio::spawn(async move {
                // What was not removed now is removed later.
                let removed = timeout(SWEEP_TIMEOUT, database.sweep(SWEEP)).await;
                let is_full = matches!(removed, Ok(Ok(rows)) if rows == u64::from(SWEEP));
                sweeping.0.was_full.store(is_full, Ordering::Relaxed);
            });
        }
    }
}

impl Drop for Sweeping {
    fn drop(&mut self) {
        self.0.is_sweeping.store(false, Ordering::Release);
    }
}
