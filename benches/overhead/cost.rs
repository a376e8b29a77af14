//! What a piece of work costs, in time and in allocations.

use std::alloc::System;
use std::hint::black_box;
use std::ops::AddAssign;
use std::time::Duration;

use stats_alloc::{INSTRUMENTED_SYSTEM, Region, StatsAlloc};
use tokio::time::Instant;

#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

#[derive(Clone, Copy, Default)]
pub struct Cost {
    pub time: Duration,
    /// A block that grew counts as another.
    pub allocations: usize,
    pub bytes: usize,
}

impl Cost {
    pub fn of<T>(work: impl FnOnce() -> T) -> Self {
        let region = Region::new(ALLOCATOR);
        let started = Instant::now();
        black_box(work());
        let time = started.elapsed();
        let change = region.change();
        Self { time, allocations: change.allocations + change.reallocations, bytes: change.bytes_allocated }
    }
}

impl AddAssign for Cost {
    fn add_assign(&mut self, other: Self) {
        self.time += other.time;
        self.allocations += other.allocations;
        self.bytes += other.bytes;
    }
}
