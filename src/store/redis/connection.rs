//! A connection that heals.
//!
//! The client's multiplexed connection is fast and never comes back once it is lost; it also cannot tell a server that
//! is slow from one whose packets vanish. So it is replaced when it breaks, when it leads to a replica, and when two
//! calls in a row have waited in vain.
//!
//! A cluster's connection repairs itself, but for a node that is silent, of which it learns nothing. Then another is made for
//! the keys of that node alone, and takes the place of the first when it has got an answer for one of them: as long as the
//! node is silent the new one is busy looking for it, and serves nobody well.
//!
//! Connecting is one task for all who wait for it, outlives their patience, and backs off with jitter.

use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt as _;
use futures_util::future::{BoxFuture, Shared};
use redis::{Cmd, ErrorKind, Pipeline, RedisError, RedisResult, Value};
use tokio::task::JoinError;
use tokio::time::{Instant, sleep};

use super::failure::{Failure, comes_before_any_effect, is_from_replica, is_reply, is_worth_leaving};
use super::health::{Connection, Verdict};
use super::inspect::Inspector;
use super::link::Link;
use super::topology::Topology;
use crate::sync::{Mutex, lock};

/// The pauses between attempts to connect.
const FIRST_BACKOFF: Duration = Duration::from_millis(20);
const LAST_BACKOFF: Duration = Duration::from_millis(500);

/// How long a new connection serves before the server is looked at.
const LOOK_AFTER: Duration = Duration::from_secs(1);

/// How long a connection serves at least before it is left for a server that may be better.
const LEAVE_AFTER: Duration = Duration::from_secs(1);

/// Hands out the current connection, and makes another when it has to.
#[derive(Debug)]
pub(super) struct Connector {
    topology: Arc<Topology>,
    inspector: Option<Arc<Inspector>>,
    state: Arc<Mutex<State>>,
}

#[derive(Debug, Default)]
struct State {
    current: Option<Connection>,
    /// For those domains of a cluster that are silent on the current one.
    candidate: Option<Connection>,
    connecting: Option<Connecting>,
    /// After a failure: the error, and until when it is the answer.
    failed: Option<(RedisError, Instant)>,
    backoff: Duration,
    connected_at: Option<Instant>,
}

type Connecting = Shared<BoxFuture<'static, Result<Connection, RedisError>>>;

// === impl Connector ===

impl Connector {
    pub(super) fn new(topology: Arc<Topology>) -> Self {
        Self { topology, inspector: None, state: Arc::default() }
    }

    /// Has every server looked at that it connects to.
    pub(super) fn inspected(self, inspector: Inspector) -> Self {
        Self { inspector: Some(Arc::new(inspector)), ..self }
    }

    /// Sends a command about a key, and sends it once more if the connection turns out to be cut or to lead to a replica:
    /// every step of a store may be sent twice.
    pub(super) fn query(&self, name: &str, command: &Cmd) -> impl Future<Output = Result<Value, Failure>> {
        self.call(name, |link| link.send(command))
    }

    /// Sends commands about a key one right after the other, by one connection.
    pub(super) async fn query_all(&self, name: &str, commands: &Pipeline) -> Result<Vec<Value>, Failure> {
        self.call(name, |link| link.send_all(name, commands)).await
    }

    /// Finds the server anew before the next command, unless it has just done so.
    pub(super) fn leave(&self) {
        let state = lock(&self.state);
        if let (Some(current), Some(at)) = (&state.current, state.connected_at)
            && at.elapsed() >= LEAVE_AFTER
        {
            current.fail();
        }
    }

    async fn call<'a, T>(
        &self,
        name: &str,
        send: impl Fn(&dyn Link) -> BoxFuture<'a, RedisResult<T>>,
    ) -> Result<T, Failure> {
        let domain = usize::from(self.topology.domain(name));
        let connection = self.connection(domain).await.map_err(Failure::Unsent)?;
        let first = match self.call_on(&connection, domain, &send).await {
            Err(error) if connection.verdict(domain) == Verdict::Broken => error,
            result => return result.map_err(|error| self.failure(error)),
        };
        if is_from_replica(&first) {
            lock(&self.state).leave(&connection, &first);
        }
        let again = async {
            let connection = self.connection(domain).await.map_err(Failure::Unsent)?;
            self.call_on(&connection, domain, &send).await.map_err(|error| self.failure(error))
        };
        Box::pin(again).await.map_err(|second| self.failure(first).and_then(second))
    }

    async fn call_on<'a, T>(
        &self,
        connection: &Connection,
        domain: usize,
        send: &impl Fn(&dyn Link) -> BoxFuture<'a, RedisResult<T>>,
    ) -> RedisResult<T> {
        let result = connection.call(domain, send(connection.link())).await;
        match &result {
            Err(error) if is_worth_leaving(error) => self.leave(),
            _ if self.topology.is_cluster() => lock(&self.state).promote(connection, domain),
            _ => {}
        }
        result
    }

    fn failure(&self, error: RedisError) -> Failure {
        // The cluster client may have sent it before, to a node that was lost after it had done it.
        let is_first = !self.topology.is_cluster() || comes_before_any_effect(&error);
        if is_reply(&error) && is_first { Failure::Refused(error) } else { Failure::Unknown(error) }
    }

    /// The connection for a domain, new where there is none that works.
    async fn connection(&self, domain: usize) -> Result<Connection, RedisError> {
        let connecting = {
            let mut state = lock(&self.state);
            match state.at_hand(domain, self.topology.is_cluster()) {
                Some(at_hand) => return at_hand,
                None => state.connecting.get_or_insert_with(|| self.connect()).clone(),
            }
        };
        connecting.await
    }

    /// Starts to connect, in a task of its own: no caller's deadline can cut it short.
    fn connect(&self) -> Connecting {
        let (topology, state) = (Arc::clone(&self.topology), Arc::clone(&self.state));
        let inspector = self.inspector.clone();
        let task = tokio::spawn(async move {
            let connected = connect(&topology, inspector).await;
            lock(&state).connected(&connected);
            connected
        });
        let state = Arc::clone(&self.state);
        let connected = async move {
            // Where it panics or its runtime ends, the task does not get to say so, and the next caller may have another runtime.
            let broken_off = |died: JoinError| {
                let error = Err(RedisError::from((ErrorKind::Client, "connecting was broken off", died.to_string())));
                lock(&state).connected(&error);
                error
            };
            task.await.unwrap_or_else(broken_off)
        };
        connected.boxed().shared()
    }
}

async fn connect(topology: &Topology, inspector: Option<Arc<Inspector>>) -> Result<Connection, RedisError> {
    let link = topology.connect().await?;
    match inspector {
        Some(inspector) if inspector.is_strict() => inspector.look(&*link).await?,
        // Nobody waits for it, and who has just come back has more urgent things to ask.
        Some(inspector) => {
            let link = Arc::clone(&link);
            tokio::spawn(async move {
                sleep(LOOK_AFTER).await;
                inspector.look(&*link).await
            });
        }
        None => {}
    }
    Ok(Connection::new(link, !topology.is_cluster()))
}

// === impl State ===

impl State {
    /// What there is for a domain without connecting: a connection, or the failure of the last attempt to make one.
    fn at_hand(&mut self, domain: usize, is_cluster: bool) -> Option<Result<Connection, RedisError>> {
        let is_good = |connection: &Connection| connection.verdict(domain) == Verdict::Good;
        if let (Some(current), None) = (&self.current, &self.candidate)
            && is_good(current)
        {
            return Some(Ok(current.clone()));
        }
        if !is_cluster {
            self.current.take_if(|current| !is_good(current));
        }
        let is_backing_off = self.is_backing_off();
        self.candidate.take_if(|candidate| !is_good(candidate) && !is_backing_off);
        match (&self.current, &self.candidate, &self.connecting, &self.failed) {
            (Some(current), _, _, _) if is_good(current) => Some(Ok(current.clone())),
            (_, Some(candidate), _, _) => Some(Ok(candidate.clone())),
            (_, None, Some(_), _) => None,
            (Some(current), None, None, _) if is_backing_off => Some(Ok(current.clone())),
            (None, None, None, Some((error, until))) if Instant::now() < *until => Some(Err(error.clone())),
            _ => None,
        }
    }

    fn connected(&mut self, connected: &Result<Connection, RedisError>) {
        self.connecting = None;
        match connected {
            Ok(connection) => {
                self.connected_at = Some(Instant::now());
                self.failed = None;
                match &mut self.current {
                    None => self.current = Some(connection.clone()),
                    Some(_) => {
                        self.candidate = Some(connection.clone());
                        // It may be no better.
                        self.backoff = LAST_BACKOFF;
                    }
                }
            }
            Err(error) => self.back_off(error),
        }
    }

    /// Puts a candidate in the place of a connection that did not get that answer.
    fn promote(&mut self, connection: &Connection, domain: usize) {
        if let Some(candidate) =
            self.candidate.take_if(|candidate| candidate.is(connection) && candidate.answers(domain))
        {
            self.current = Some(candidate);
        }
    }

    /// Of all calls that fail on a connection, the first counts.
    fn leave(&mut self, connection: &Connection, error: &RedisError) {
        if self.current.as_ref().is_some_and(|current| current.is(connection)) {
            self.back_off(error);
        }
    }

    fn is_backing_off(&self) -> bool {
        let connected_at = self.connected_at.map(|at| at + self.backoff);
        let failed_until = self.failed.as_ref().map(|(_, until)| *until);
        connected_at.max(failed_until).is_some_and(|until| Instant::now() < until)
    }

    /// Pauses before the next attempt to connect: longer each time, unless a connection has been good for a while.
    fn back_off(&mut self, error: &RedisError) {
        self.current.take_if(|current| current.is_broken());
        let was_good = self.connected_at.take().is_some_and(|at| at.elapsed() > LAST_BACKOFF);
        if was_good {
            self.backoff = Duration::ZERO;
        } else {
            self.backoff = (self.backoff * 2).clamp(FIRST_BACKOFF, LAST_BACKOFF);
            let pause = self.backoff.mul_f64(rand::random_range(0.5..1.0));
            self.failed = Some((error.clone(), Instant::now() + pause));
        }
    }
}
