//! Waiting until a write is where a failover finds it.
//!
//! `WAIT` counts the replicas that have all writes made *before it on its own connection*, and blocks that connection
//! meanwhile. So it has connections of its own, and a write right before it: one that changes nothing.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use redis::{Pipeline, Value};
use tokio::sync::Semaphore;
use tokio::time::Instant;
use tower::BoxError;

use super::answer::unexpected;
use super::connection::Connector;
use super::layout::{Phase, millis};
use super::topology::Topology;
use crate::store::{ClaimId, StoreError};
use crate::sync::{Mutex, lock};

/// How many claims and outcomes are waited for at once.
const CONNECTIONS: usize = 8;

/// How long a connection idles and is used again: what is between it and the server may forget it.
const IDLE: Duration = Duration::from_secs(10);

const CONFIRM: &str = include_str!("confirm.lua");

/// What a claim and an outcome have to be safe from before they count.
///
/// Redis replicates after it has answered: a master that dies takes its last writes with it, and what they said may run
/// again. Waiting for replicas makes that rare. It does not make it impossible: [`WAIT` is no
/// consensus](https://redis.io/docs/latest/commands/wait/), and a replica that lacks a write may still be promoted.
///
/// Each waiting takes up to `timeout`, which has to be below [`Ledger::store_timeout`](crate::Ledger::store_timeout). A claim
/// that too few replicas have is given back, and the request refused with 503; an outcome that too few have is pursued like
/// one that could not be stored. Until then a duplicate may be told of it already. Eight are waited for
/// [at once](super::RedisStore::max_confirming), on as many connections.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
#[non_exhaustive]
pub enum Durability {
    /// The master has it. The default.
    #[default]
    Master,
    /// So many replicas have it in memory (`WAIT`). The user needs `+wait`.
    Replicated {
        /// How many replicas.
        replicas: u32,
        /// For how long they are waited for.
        timeout: Duration,
    },
    /// The master and so many replicas have it on disk (`WAITAOF`: Redis 7.2 and later, with `appendonly yes` on all of
    /// them). The user needs `+waitaof`.
    Synced {
        /// How many replicas.
        replicas: u32,
        /// For how long they are waited for.
        timeout: Duration,
    },
}

/// Waits for replicas.
#[derive(Debug)]
pub(super) struct Confirmer {
    durability: Durability,
    topology: Arc<Topology>,
    at_once: usize,
    free: Semaphore,
    idle: Mutex<Vec<Idle>>,
}

/// A connection that nobody waits on.
#[derive(Debug)]
struct Idle {
    connector: Connector,
    since: Instant,
}

/// A confirmation under way. Where it comes to nothing, those that idle are not trusted either: what has swallowed one of
/// them has mostly swallowed all.
struct Confirming<'a> {
    idle: &'a Mutex<Vec<Idle>>,
    has_come_to_nothing: bool,
}

/// Why a write does not count.
#[derive(Debug)]
pub(super) enum Unconfirmed {
    /// The key is not the claim's any more, or nobody knows.
    Failed(BoxError),
    TooFew(TooFewReplicas),
}

/// Fewer replicas have it than were asked for.
#[derive(Debug)]
pub(super) struct TooFewReplicas {
    acknowledged: i64,
}

/// The key was the claim's a moment ago: the server has changed.
#[derive(Debug)]
struct Gone;

/// Too many others wait for their replicas.
#[derive(Debug)]
struct Busy;

impl Confirmer {
    /// Waits for nobody.
    pub(super) fn new(topology: Arc<Topology>) -> Self {
        Self::with(Durability::Master, CONNECTIONS, topology)
    }

    /// The same with another setting.
    pub(super) fn again(&self, durability: Option<Durability>, at_once: Option<usize>) -> Self {
        let (durability, at_once) = (durability.unwrap_or(self.durability), at_once.unwrap_or(self.at_once));
        Self::with(durability, at_once, Arc::clone(&self.topology))
    }

    fn with(durability: Durability, at_once: usize, topology: Arc<Topology>) -> Self {
        let at_once = at_once.clamp(1, Semaphore::MAX_PERMITS);
        Self { durability, topology, at_once, free: Semaphore::new(at_once), idle: Mutex::default() }
    }

    /// Whether there is anybody to wait for.
    pub(super) fn waits(&self) -> bool {
        !matches!(self.durability, Durability::Master)
    }

    /// Returns when what a claim has written is as safe as was asked for.
    pub(super) async fn confirm(&self, name: &str, phase: Phase, id: &ClaimId) -> Result<(), Unconfirmed> {
        let (Durability::Replicated { timeout, .. } | Durability::Synced { timeout, .. }) = self.durability else {
            return Ok(());
        };
        let started = Instant::now();
        let permit = tokio::time::timeout(timeout, self.free.acquire()).await;
        let _permit = permit.ok().and_then(Result::ok).ok_or_else(|| Unconfirmed::Failed(Busy.into()))?;
        self.ask(name, phase, id, timeout.saturating_sub(started.elapsed())).await
    }

    /// The same, unless claims and outcomes could have to wait for it.
    pub(super) async fn confirm_at_once(&self, name: &str, phase: Phase, id: &ClaimId) -> Result<(), Unconfirmed> {
        let spare = self.at_once == 1 || self.free.available_permits() > 1;
        match (self.durability, self.free.try_acquire()) {
            (Durability::Replicated { timeout, .. } | Durability::Synced { timeout, .. }, Ok(_permit)) if spare => {
                self.ask(name, phase, id, timeout).await
            }
            _ => Ok(()),
        }
    }

    async fn ask(&self, name: &str, phase: Phase, id: &ClaimId, timeout: Duration) -> Result<(), Unconfirmed> {
        let (wait, wanted) = match self.durability {
            Durability::Master => return Ok(()),
            Durability::Replicated { replicas, .. } => {
                let mut wait = redis::cmd("WAIT");
                wait.arg(replicas).arg(millis(timeout));
                (wait, replicas)
            }
            Durability::Synced { replicas, .. } => {
                let mut wait = redis::cmd("WAITAOF");
                wait.arg(1).arg(replicas).arg(millis(timeout));
                (wait, replicas)
            }
        };
        let mut commands = Pipeline::new();
        commands
            .cmd("EVAL")
            .arg(CONFIRM)
            .arg(1)
            .arg(name)
            .arg(id.as_bytes())
            .arg(&[phase.byte()][..])
            .add_command(wait);
        let mut confirming = Confirming { idle: &self.idle, has_come_to_nothing: true };
        let connector = self.idle().unwrap_or_else(|| Connector::new(Arc::clone(&self.topology)));
        let answers = connector.query_all(name, &commands).await;
        judge(&answers.map_err(|failure| Unconfirmed::Failed(StoreError::from(failure).into()))?, wanted)?;
        confirming.has_come_to_nothing = false;
        // Only a good one is used again: another is blocked still, or leads to a server that others have left.
        lock(&self.idle).push(Idle { connector, since: Instant::now() });
        Ok(())
    }

    /// The one that was used last, since the others may be idle for longer.
    fn idle(&self) -> Option<Connector> {
        let mut idle = lock(&self.idle);
        idle.retain(|idle| idle.since.elapsed() < IDLE);
        idle.pop().map(|idle| idle.connector)
    }
}

impl Drop for Confirming<'_> {
    fn drop(&mut self) {
        if self.has_come_to_nothing {
            lock(self.idle).clear();
        }
    }
}

fn judge(answers: &[Value], wanted: u32) -> Result<(), Unconfirmed> {
    let enough = |acknowledged| match acknowledged >= i64::from(wanted) {
        true => Ok(()),
        false => Err(Unconfirmed::TooFew(TooFewReplicas { acknowledged })),
    };
    match answers {
        [Value::Int(1), Value::Int(acknowledged)] => enough(*acknowledged),
        [Value::Int(1), Value::Array(acknowledged)] => match acknowledged.as_slice() {
            // The master itself has not.
            [Value::Int(0), _] => Err(Unconfirmed::TooFew(TooFewReplicas { acknowledged: 0 })),
            [Value::Int(_), Value::Int(replicas)] => enough(*replicas),
            _ => Err(Unconfirmed::Failed(unexpected().into())),
        },
        [Value::Int(0), _] => Err(Unconfirmed::Failed(Gone.into())),
        _ => Err(Unconfirmed::Failed(unexpected().into())),
    }
}

// === impl Unconfirmed ===

impl From<Unconfirmed> for StoreError {
    fn from(unconfirmed: Unconfirmed) -> Self {
        match unconfirmed {
            // What was to be confirmed has taken effect, and the server has said so.
            Unconfirmed::Failed(error) => Self::unconfirmed(error),
            Unconfirmed::TooFew(too_few) => Self::unconfirmed(too_few),
        }
    }
}

impl fmt::Display for TooFewReplicas {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "only {} replicas have it in time", self.acknowledged)
    }
}

impl std::error::Error for TooFewReplicas {}

impl fmt::Display for Gone {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("what was written is not there any more")
    }
}

impl std::error::Error for Gone {}

impl fmt::Display for Busy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("too many others wait for their replicas")
    }
}

impl std::error::Error for Busy {}
