//! Keeps a runtime awake in which a handler may block a thread.
//!
//! Of the threads of a runtime one at a time waits for timers and sockets, and the others sleep. When that one takes a task which
//! blocks it, nobody sees to timers until something wakes another, and no lease is renewed. So a thread that
//! belongs to none spawns a task there now and then, which does nothing but wake whoever sleeps: in each runtime that has had attempts, as
//! long as their ledger has any.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;
use std::{io, thread};

use futures_util::FutureExt as _;
use tokio::runtime::RuntimeFlavor;
use tokio_util::task::TaskTracker;

use crate::sync::{JoinHandle, Runtime};
use crate::telemetry;

/// How long a runtime may sleep although a timer is due.
const MAX_SLEEP: Duration = Duration::from_millis(50);

/// As long as it is held, a runtime is kept awake.
pub(crate) type Token = Arc<()>;

struct Awake {
    kept: Vec<Kept>,
    has_thread: bool,
}

struct Kept {
    runtime: Runtime,
    /// It is kept awake as long as there are any, too.
    tasks: TaskTracker,
    token: Weak<()>,
    last: Option<JoinHandle<()>>,
}

static AWAKE: Mutex<Awake> = Mutex::new(Awake { kept: Vec::new(), has_thread: false });
static ADDED: Condvar = Condvar::new();

/// Keeps a runtime awake as long as the token is held, and then until there are no such tasks any more.
pub(crate) fn keep(runtime: &Runtime, tasks: &TaskTracker) -> Token {
    let token = Token::default();
    // Where there is but one thread, it runs what blocks it or sees to timers.
    if runtime.runtime_flavor() != RuntimeFlavor::CurrentThread {
        let failed = lock().keep(runtime, tasks, &token).err();
        ADDED.notify_one();
        if let Some(error) = failed {
            telemetry::no_thread(&error);
        }
    }
    token
}

fn wake() {
    loop {
        let awake = ADDED.wait_while(lock(), |awake| awake.kept.is_empty());
        let mut awake = awake.unwrap_or_else(PoisonError::into_inner);
        let left = awake.kept.extract_if(.., |kept| !kept.is_needed()).collect::<Vec<_>>();
        for kept in &mut awake.kept {
            kept.last = Some(kept.runtime.spawn(async {}));
        }
        drop(awake);
        // With the last handle of a runtime goes what its user has left in it.
        drop(left);
        thread::sleep(MAX_SLEEP);
    }
}

fn lock() -> MutexGuard<'static, Awake> {
    AWAKE.lock().unwrap_or_else(PoisonError::into_inner)
}

// === impl Awake ===

impl Awake {
    /// Fails where there is no thread to do it.
    fn keep(&mut self, runtime: &Runtime, tasks: &TaskTracker, token: &Token) -> io::Result<()> {
        let token = Arc::downgrade(token);
        let is_it = |kept: &&mut Kept| kept.runtime.id() == runtime.id() && TaskTracker::ptr_eq(&kept.tasks, tasks);
        match self.kept.iter_mut().find(is_it) {
            Some(kept) => kept.token = token,
            None => self.kept.push(Kept { runtime: runtime.clone(), tasks: tasks.clone(), token, last: None }),
        }
        if !self.has_thread {
            thread::Builder::new().name("idempotency-awake".to_owned()).spawn(wake)?;
            self.has_thread = true;
        }
        Ok(())
    }
}

// === impl Kept ===

impl Kept {
    fn is_needed(&mut self) -> bool {
        // A runtime that has ended cancels what is spawned in it.
        let last = self.last.take().and_then(|last| last.now_or_never());
        let has_ended = matches!(last, Some(Err(_)));
        !has_ended && (self.token.strong_count() > 0 || !self.tasks.is_empty())
    }
}
