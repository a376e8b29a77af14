//! How many there are of what there may only be so many of.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Counts them, and gives out no more than there may be.
pub(crate) struct Gauge {
    used: AtomicUsize,
    max: AtomicUsize,
}

/// One of them, until it is dropped.
pub(crate) struct Ticket(Arc<Gauge>);

// === impl Gauge ===

impl Gauge {
    pub(crate) fn new(max: usize) -> Arc<Self> {
        Arc::new(Self { used: AtomicUsize::new(0), max: AtomicUsize::new(max) })
    }

    pub(crate) fn limit(&self, max: usize) {
        self.max.store(max, Ordering::Relaxed);
    }

    pub(crate) fn used(&self) -> usize {
        self.used.load(Ordering::Relaxed)
    }

    pub(crate) fn take(self: &Arc<Self>) -> Option<Ticket> {
        let max = self.max.load(Ordering::Relaxed);
        let take = |used| (used < max).then_some(used + 1);
        let taken = self.used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take);
        taken.is_ok().then(|| Ticket(Arc::clone(self)))
    }
}

// === impl Ticket ===

impl Drop for Ticket {
    fn drop(&mut self) {
        self.0.used.fetch_sub(1, Ordering::Relaxed);
    }
}
