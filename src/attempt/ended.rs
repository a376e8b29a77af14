//! Attempts that end because their runtime has ended.
//!
//! What a handler holds is dropped with its attempt, and may take its time: not that of the thread which sees to alarms, nor that of
//! the caller. So one thread of the process drops them, one after the other, and is there as long as there are any.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::thread;

use futures_util::future::BoxFuture;

use crate::sync::{Runtime, lock_static};

struct Ended {
    attempts: VecDeque<(Runtime, BoxFuture<'static, ()>)>,
    has_thread: bool,
}

static ENDED: Mutex<Ended> = Mutex::new(Ended { attempts: VecDeque::new(), has_thread: false });

/// Drops an attempt, soon. Where no thread can be started, the next that ends is the occasion.
pub(super) fn end(runtime: Runtime, attempt: BoxFuture<'static, ()>) {
    let mut ended = lock_static(&ENDED);
    ended.attempts.push_back((runtime, attempt));
    if !ended.has_thread {
        ended.has_thread = thread::Builder::new().name("idempotency-end".to_owned()).spawn(end_all).is_ok();
    }
}

fn end_all() {
    while let Some((runtime, attempt)) = next() {
        let end = || {
            let _in = runtime.enter();
            drop(attempt);
        };
        // One that panics leaves the others theirs.
        let _ = catch_unwind(AssertUnwindSafe(end));
    }
}

fn next() -> Option<(Runtime, BoxFuture<'static, ()>)> {
    let mut ended = lock_static(&ENDED);
    let next = ended.attempts.pop_front();
    ended.has_thread = next.is_some();
    next
}
