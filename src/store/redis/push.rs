//! Wakes those who wait for other processes: the scripts publish to a channel of the key's name when they end a claim.
//!
//! One RESP3 connection for all who wait, in a task of its own that is there only while somebody waits and a little
//! longer. Nothing depends on it: whoever waits also polls, so a message that is lost costs a poll, and a server that
//! knows no RESP3 or refuses the channel costs nothing else. What has been lost with a connection nobody knows, so then
//! all who wait are sent to look.

use std::collections::HashMap;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use redis::{ErrorKind, PushInfo, PushKind, RedisError, RedisResult, Value};
use tokio::sync::Notify;
use tokio::task::AbortHandle;
use tokio::time::{Instant, sleep, sleep_until};

use super::topology::{Listener, Topology};
use crate::sync::{Mutex, lock};

/// How many channels there may be. Who waits for more keys at once has to poll for those beyond.
const MAX_CHANNELS: usize = 16 << 10;

/// How many of them one command names, at most.
const MAX_BATCH: usize = 256;

/// How often the connection is tried and channels that nobody waits for are left: the second time they are met, so that
/// who looks and goes on waiting, or comes right after another, finds the channel still open.
const SWEEP: Duration = Duration::from_secs(1);

/// How many channels are subscribed to again to try the connection.
const SOME: usize = 8;

/// How long the connection stays without channels.
const LINGER: Duration = Duration::from_secs(5);

/// The pauses between two connections, before jitter. The last one is long, for polling does without.
const FIRST_BACKOFF: Duration = Duration::from_millis(20);
const LAST_BACKOFF: Duration = Duration::from_secs(10);

/// Who waits for which key, and the task that listens for them.
#[derive(Debug)]
pub(super) struct Push(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    topology: Arc<Topology>,
    state: Mutex<State>,
    /// Tells the task of new channels.
    asked: Notify,
}

#[derive(Debug, Default)]
struct State {
    channels: HashMap<Arc<str>, Channel>,
    /// Those that are not subscribed to yet.
    fresh: Vec<Arc<str>>,
    listener: Option<AbortHandle>,
    backoff: Duration,
}

#[derive(Debug, Default)]
struct Channel {
    waiters: usize,
    /// Nobody waited when it was last looked at.
    unused: bool,
    changed: Arc<Notify>,
}

/// One who waits, until it is dropped.
struct Waiter<'a> {
    push: &'a Inner,
    name: Arc<str>,
    changed: Arc<Notify>,
}

/// What a sweep found.
struct Swept {
    unused: Vec<Arc<str>>,
    /// Some that are still wanted.
    used: Vec<Arc<str>>,
}

// === impl Push ===

impl Push {
    pub(super) fn new(topology: Arc<Topology>) -> Self {
        Self(Arc::new(Inner { topology, state: Mutex::default(), asked: Notify::new() }))
    }

    /// Returns when something was published under the name, or may have been.
    pub(super) async fn changed(&self, name: &str) {
        match self.0.topology.can_listen().then(|| Waiter::join(&self.0, name)).flatten() {
            Some(waiter) => waiter.changed.notified().await,
            None => std::future::pending().await,
        }
    }
}

impl Drop for Push {
    fn drop(&mut self) {
        if let Some(listener) = lock(&self.0.state).listener.take() {
            listener.abort();
        }
    }
}

// === impl State ===

impl State {
    /// Those that are to be subscribed to now, if somebody still waits for them.
    fn fresh(&mut self) -> Vec<Arc<str>> {
        let fresh = std::mem::take(&mut self.fresh);
        fresh.into_iter().filter(|name| self.channels.contains_key(name)).collect()
    }
}

// === impl Waiter ===

impl<'a> Waiter<'a> {
    fn join(push: &'a Arc<Inner>, name: &str) -> Option<Self> {
        let mut state = lock(&push.state);
        let name: Arc<str> = match state.channels.get_key_value(name) {
            Some((name, _)) => Arc::clone(name),
            None if state.channels.len() >= MAX_CHANNELS => return None,
            None => {
                let name: Arc<str> = name.into();
                state.fresh.push(Arc::clone(&name));
                push.asked.notify_one();
                name
            }
        };
        let channel = state.channels.entry(Arc::clone(&name)).or_default();
        channel.waiters += 1;
        channel.unused = false;
        let changed = Arc::clone(&channel.changed);
        // Its runtime may have ended, and this may be another.
        if state.listener.as_ref().is_none_or(AbortHandle::is_finished) {
            state.listener = Some(tokio::spawn(Arc::clone(push).listen()).abort_handle());
        }
        Some(Self { push, name, changed })
    }
}

impl Drop for Waiter<'_> {
    fn drop(&mut self) {
        if let Some(channel) = lock(&self.push.state).channels.get_mut(&self.name) {
            channel.waiters -= 1;
        }
    }
}

// === impl Inner ===

impl Inner {
    /// Listens on one connection after the other, as long as somebody waits.
    async fn listen(self: Arc<Self>) {
        while self.is_wanted() {
            let mut has_listened = None;
            if self.listen_once(&mut has_listened).await.is_err() {
                if has_listened.is_some() {
                    self.wake_all();
                }
                sleep(self.back_off(has_listened)).await;
            }
        }
    }

    /// Listens on one connection until it fails, or until nobody has waited for a while.
    async fn listen_once(self: &Arc<Self>, listening_since: &mut Option<Instant>) -> RedisResult<()> {
        let lost = Arc::new(Notify::new());
        let mut connection = self.topology.listen(self.receiver(&lost)).await?;
        let mut next_sweep = Instant::now() + SWEEP;
        let mut unused_from = next_sweep;
        loop {
            let fresh = lock(&self.state).fresh();
            for names in fresh.chunks(MAX_BATCH) {
                let failed = connection.subscribe(&texts(names)).await?;
                listening_since.get_or_insert_with(Instant::now);
                // Tried again with the next ones, or at the next sweep.
                let failed = names.iter().filter(|name| failed.contains(&&***name)).cloned();
                lock(&self.state).fresh.extend(failed);
            }
            if Instant::now() >= next_sweep {
                next_sweep = Instant::now() + SWEEP;
                let swept = self.sweep();
                if !(swept.used.is_empty() && swept.unused.is_empty()) {
                    unused_from = next_sweep;
                } else if unused_from.elapsed() >= LINGER {
                    return Ok(());
                }
                leave(&mut connection, &swept).await?;
            }
            tokio::select! {
                () = self.asked.notified() => {}
                () = lost.notified() => return Err(RedisError::from((ErrorKind::Io, "the connection was lost"))),
                () = sleep_until(next_sweep) => {}
            }
        }
    }

    /// Takes what the server sends, without a queue that it could fill.
    fn receiver(
        self: &Arc<Self>,
        lost: &Arc<Notify>,
    ) -> impl Fn(PushInfo) -> Result<(), Infallible> + Send + Sync + 'static {
        let (inner, lost) = (Arc::clone(self), Arc::clone(lost));
        move |push| {
            match (push.kind, push.data.first()) {
                (PushKind::Disconnection, _) => lost.notify_one(),
                (PushKind::Message | PushKind::SMessage, Some(Value::BulkString(name))) => inner.wake(name),
                _ => {}
            }
            Ok(())
        }
    }

    fn wake(&self, name: &[u8]) {
        let Ok(name) = str::from_utf8(name) else { return };
        let changed = lock(&self.state).channels.get(name).map(|channel| Arc::clone(&channel.changed));
        if let Some(changed) = changed {
            changed.notify_waiters();
        }
    }

    fn wake_all(&self) {
        let all: Vec<_> = lock(&self.state).channels.values().map(|channel| Arc::clone(&channel.changed)).collect();
        for changed in all {
            changed.notify_waiters();
        }
    }

    /// Whether somebody waits: then all channels are to be subscribed to anew. If not, the task is over, and whoever comes
    /// next starts another.
    fn is_wanted(&self) -> bool {
        let mut state = lock(&self.state);
        state.channels.retain(|_, channel| channel.waiters > 0);
        state.fresh = state.channels.keys().cloned().collect();
        if state.fresh.is_empty() {
            state.listener = None;
        }
        state.listener.is_some()
    }

    /// Takes off the channels that nobody has waited for since the sweep before.
    fn sweep(&self) -> Swept {
        let mut state = lock(&self.state);
        let left = state.channels.extract_if(|_, channel| {
            let was_unused = std::mem::replace(&mut channel.unused, channel.waiters == 0);
            channel.unused && was_unused
        });
        let unused = left.map(|(name, _)| name).collect();
        // In a cluster one of them may be in a part that does not answer.
        Swept { unused, used: state.channels.keys().take(SOME).cloned().collect() }
    }

    /// The pause after a failure: longer each time, unless the connection has been good for a while. It outlives the task,
    /// or each who waits would try anew.
    fn back_off(&self, listening_since: Option<Instant>) -> Duration {
        let mut state = lock(&self.state);
        let was_good = listening_since.is_some_and(|since| since.elapsed() > SWEEP);
        let backoff = if was_good { Duration::ZERO } else { state.backoff * 2 };
        state.backoff = backoff.clamp(FIRST_BACKOFF, LAST_BACKOFF);
        state.backoff.mul_f64(rand::random_range(0.5..1.0))
    }
}

/// Unsubscribes from what is unused. Where nothing is, subscribes again to what is used: a trial of the connection that
/// needs no right of its own.
async fn leave(connection: &mut Listener, swept: &Swept) -> RedisResult<()> {
    for names in swept.unused.chunks(MAX_BATCH) {
        connection.unsubscribe(&texts(names)).await?;
    }
    if swept.unused.is_empty() && !swept.used.is_empty() {
        let failed = connection.subscribe(&texts(&swept.used)).await?;
        if failed.len() == swept.used.len() {
            return Err((ErrorKind::Io, "no part of the cluster answers").into());
        }
    }
    Ok(())
}

fn texts(names: &[Arc<str>]) -> Vec<&str> {
    names.iter().map(|name| &**name).collect()
}
