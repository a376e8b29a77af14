//! What threads share, and the tasks that this crate starts.
//!
//! Locks, counts and tasks are those of std and tokio. In the tests of [races](crate) they are shuttle's, which decides who
//! comes next wherever a lock is taken, a count is changed or a task waits, and tries one order after the other.

use std::sync::PoisonError;
#[cfg(not(all(test, shuttle)))]
pub(crate) use std::sync::{Mutex, MutexGuard, atomic};

#[cfg(all(test, shuttle))]
pub(crate) use shuttle::future::{AbortHandle, spawn};
#[cfg(all(test, shuttle))]
pub(crate) use shuttle::sync::{Mutex, MutexGuard, atomic};
#[cfg(not(all(test, shuttle)))]
pub(crate) use tokio::task::{AbortHandle, spawn};

/// Locks, also after a panic elsewhere: no step under a lock of this crate can panic halfway, so what is guarded is whole.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
