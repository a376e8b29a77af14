//! What threads share, and the tasks that this crate starts.
//!
//! Locks, counts and tasks are those of std and tokio. In the tests of [races](crate) they are shuttle's, which decides who
//! comes next wherever a lock is taken, a count is changed or a task waits, and tries one order after the other.

#[cfg(not(all(test, shuttle)))]
pub(crate) use std::sync::{Mutex, MutexGuard, atomic};
use std::sync::{PoisonError, TryLockError};

#[cfg(all(test, shuttle))]
pub(crate) use shuttle::future::AbortHandle;
#[cfg(all(test, shuttle))]
pub(crate) use shuttle::sync::{Mutex, MutexGuard, atomic};
#[cfg(not(all(test, shuttle)))]
pub(crate) use tokio::runtime::{Handle as Runtime, Id as RuntimeId};
#[cfg(not(all(test, shuttle)))]
pub(crate) use tokio::task::AbortHandle;

/// Locks, also after a panic elsewhere: no step under a lock of this crate can panic halfway, so what is guarded is whole.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The same, unless somebody else has it at the moment.
pub(crate) fn try_lock<T>(mutex: &Mutex<T>) -> Option<MutexGuard<'_, T>> {
    match mutex.try_lock() {
        Ok(guard) => Some(guard),
        Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
        Err(TryLockError::WouldBlock) => None,
    }
}

/// Locks what is the whole process's. It is std's lock also in the tests of races, since shuttle's are of one run.
pub(crate) fn lock_static<T>(mutex: &'static std::sync::Mutex<T>) -> std::sync::MutexGuard<'static, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Where tasks are spawned from elsewhere: of shuttle's there is one.
#[cfg(all(test, shuttle))]
#[derive(Clone, Debug)]
pub(crate) struct Runtime;

#[cfg(all(test, shuttle))]
#[derive(Clone, Copy, Eq, PartialEq)]
pub(crate) struct RuntimeId;

#[cfg(all(test, shuttle))]
impl Runtime {
    pub(crate) fn current() -> Self {
        Self
    }

    pub(crate) fn id(&self) -> RuntimeId {
        RuntimeId
    }

    pub(crate) fn runtime_flavor(&self) -> tokio::runtime::RuntimeFlavor {
        tokio::runtime::RuntimeFlavor::CurrentThread
    }

    pub(crate) fn enter(&self) {}

    pub(crate) fn spawn<F>(&self, task: F) -> shuttle::future::JoinHandle<F::Output>
    where
        F: Future<Output: Send> + Send + 'static,
    {
        shuttle::future::spawn(task)
    }
}
