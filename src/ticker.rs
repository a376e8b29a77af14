//! A thread of the process's own, which no handler blocks.
//!
//! A task that is to see to others may wait for a thread that a handler blocks: what a timer wakes, or another task spawns last,
//! lies where no other thread takes it. And of the threads of a runtime one at a time waits for timers and sockets while the
//! others sleep: when that one takes a task which blocks it, no timer goes off until something wakes another.
//!
//! So, twenty times a second, this thread lets the alarms go off that are due, and in runtimes where a lease is renewed it spawns a
//! task that does nothing but wake whoever sleeps. It runs no handler's code, which might block it. With no alarms and no such
//! runtimes it sleeps.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, PoisonError, Weak};
use std::time::Duration;
use std::{io, mem, thread};

use tokio::runtime::RuntimeFlavor;

use crate::alarms::Watch;
use crate::sync::{Runtime, lock_static};
use crate::telemetry;

/// How late an alarm may go off, and how long a runtime may sleep although a timer is due.
pub(crate) const PERIOD: Duration = Duration::from_millis(50);

/// As long as it is held, a runtime is kept awake.
pub(crate) type AwakeToken = Arc<()>;

struct Ticker {
    watches: Vec<Watch>,
    awake: Vec<Awake>,
    is_running: bool,
}

/// A runtime to be kept awake.
struct Awake {
    runtime: Runtime,
    token: Weak<()>,
}

static TICKER: Mutex<Ticker> = Mutex::new(Ticker { watches: Vec::new(), awake: Vec::new(), is_running: false });
static NEEDED: Condvar = Condvar::new();

/// Whether there is more than one thread in a runtime. Where there is not, that one runs what blocks it or sees to timers, and
/// nothing helps.
pub(crate) fn serves(runtime: &Runtime) -> bool {
    runtime.runtime_flavor() == RuntimeFlavor::MultiThread
}

/// Looks after alarms from here on, unless there is no thread to do it.
pub(crate) fn attend(watch: Watch) -> Result<(), Watch> {
    let mut ticker = lock_static(&TICKER);
    match ticker.run() {
        Ok(()) => {
            ticker.watches.push(watch);
            NEEDED.notify_one();
            Ok(())
        }
        Err(error) => {
            drop(ticker);
            telemetry::no_thread(&error);
            Err(watch)
        }
    }
}

/// Keeps a runtime awake as long as the token is held, if that is of use.
pub(crate) fn keep_awake(runtime: &Runtime) -> AwakeToken {
    if !serves(runtime) {
        return AwakeToken::default();
    }
    let mut ticker = lock_static(&TICKER);
    let token = ticker.token(runtime);
    let running = ticker.run();
    drop(ticker);
    match running {
        Ok(()) => NEEDED.notify_one(),
        Err(error) => telemetry::no_thread(&error),
    }
    token
}

fn tick() {
    loop {
        let ticker = NEEDED.wait_while(lock_static(&TICKER), |ticker| ticker.is_idle());
        let mut ticker = ticker.unwrap_or_else(PoisonError::into_inner);
        let (awake, left) = mem::take(&mut ticker.awake).into_iter().partition(Awake::is_needed);
        ticker.awake = awake;
        let runtimes = ticker.awake.iter().map(|awake| awake.runtime.clone()).collect::<Vec<_>>();
        let mut watches = mem::take(&mut ticker.watches);
        drop(ticker);
        for runtime in runtimes {
            runtime.spawn(async {});
        }
        watches.retain(Watch::look);
        lock_static(&TICKER).watches.append(&mut watches);
        // With the last handle of a runtime goes what its user has left in it, which must not end this thread.
        let _ = catch_unwind(AssertUnwindSafe(|| drop::<Vec<_>>(left)));
        thread::sleep(PERIOD);
    }
}

// === impl Ticker ===

impl Ticker {
    fn is_idle(&self) -> bool {
        self.watches.is_empty() && self.awake.is_empty()
    }

    fn run(&mut self) -> io::Result<()> {
        if !self.is_running {
            thread::Builder::new().name("idempotency-tick".to_owned()).spawn(tick)?;
            self.is_running = true;
        }
        Ok(())
    }

    fn token(&mut self, runtime: &Runtime) -> AwakeToken {
        let known = self.awake.iter_mut().find(|awake| awake.runtime.id() == runtime.id());
        if let Some(token) = known.as_ref().and_then(|awake| awake.token.upgrade()) {
            return token;
        }
        let token = AwakeToken::default();
        match known {
            Some(awake) => awake.token = Arc::downgrade(&token),
            None => self.awake.push(Awake { runtime: runtime.clone(), token: Arc::downgrade(&token) }),
        }
        token
    }
}

// === impl Awake ===

impl Awake {
    fn is_needed(&self) -> bool {
        self.token.strong_count() > 0
    }
}
