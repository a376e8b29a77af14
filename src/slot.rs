//! The slot of a thread, where a task may lie that no other thread takes.
//!
//! A thread of tokio's runtime of several threads runs next what was spawned or woken on it last, and keeps that to itself: in the
//! meantime it may be in a handler that blocks. What must not wait for that is pushed out of the slot by a task that does nothing.

use std::future::poll_fn;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Wake, Waker};

use crate::sync::Runtime;

/// Pushes out what lies in the slot of this thread, if that is one of the runtime's: any of them takes it then.
pub(crate) fn clear(runtime: &Runtime) {
    runtime.spawn(async {});
}

/// A future whose task any thread takes, whatever wakes it: a timer, or an answer that another task hands on.
pub(crate) async fn unslotted<F: Future>(runtime: Runtime, future: F) -> F::Output {
    let mut future = pin!(future);
    poll_fn(|cx| {
        let waker = Waker::from(Arc::new(ClearingWaker { task: cx.waker().clone(), runtime: runtime.clone() }));
        future.as_mut().poll(&mut Context::from_waker(&waker))
    })
    .await
}

/// Clears the slot behind the task that it wakes.
struct ClearingWaker {
    task: Waker,
    runtime: Runtime,
}

impl Wake for ClearingWaker {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.task.wake_by_ref();
        clear(&self.runtime);
    }
}

/// Clears the slot behind what leaves a task there, however that ends.
#[cfg(any(feature = "postgres", feature = "sqlite"))]
pub(crate) async fn cleared_behind<F: Future>(future: F) -> F::Output {
    let clearing = ClearOnDrop(Runtime::current());
    let output = future.await;
    drop(clearing);
    output
}

#[cfg(any(feature = "postgres", feature = "sqlite"))]
struct ClearOnDrop(Runtime);

#[cfg(any(feature = "postgres", feature = "sqlite"))]
impl Drop for ClearOnDrop {
    fn drop(&mut self) {
        clear(&self.0);
    }
}
