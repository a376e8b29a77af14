//! How many there are of what there may only be so many of.

use std::sync::Arc;

use crate::sync::atomic::{AtomicUsize, Ordering};
use crate::telemetry::{Shown, Shows};

/// Counts them, and gives out no more than there may be.
pub(crate) struct Gauge {
    used: AtomicUsize,
    max: AtomicUsize,
    shows: Option<Shows>,
}

/// One of them, until it is dropped.
pub(crate) struct Ticket {
    gauge: Arc<Gauge>,
    _shown: Option<Shown>,
}

// === impl Gauge ===

impl Gauge {
    pub(crate) fn new(max: usize, shows: Option<Shows>) -> Arc<Self> {
        Arc::new(Self { used: AtomicUsize::new(0), max: AtomicUsize::new(max), shows })
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
        taken.is_ok().then(|| Ticket { gauge: Arc::clone(self), _shown: self.shows.map(Shown::new) })
    }
}

// === impl Ticket ===

impl Drop for Ticket {
    fn drop(&mut self) {
        self.gauge.used.fetch_sub(1, Ordering::Relaxed);
    }
}
