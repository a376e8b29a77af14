//! A connection that heals.
//!
//! The client's multiplexed connection is fast and never comes back once it is lost; it also cannot tell a server that
//! is slow from one whose packets vanish. So it is replaced when it breaks, when it leads to a replica, and when two
//! calls in a row have waited in vain. A cluster's connection repairs itself, but for a node that is silent, of which it
//! learns nothing: it is replaced too, and serves the other nodes until then. Connecting is one task for all who wait for
//! it, outlives their patience, and backs off with jitter.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt as _;
use futures_util::future::{BoxFuture, Shared};
use redis::{Cmd, ErrorKind, Pipeline, RedisError, RedisResult, Value};
use tokio::task::JoinError;
use tokio::time::{Instant, sleep};

use super::failure::{Failure, comes_before_any_effect, is_about_topology, is_from_replica, is_reply};
use super::inspect::Inspector;
use super::link::Link;
use super::topology::Topology;
use crate::sync::{Mutex, lock};

/// How many calls in a row go unanswered, and for how long, before a connection is not trusted any more. Both, because
/// callers differ in their deadlines, and because one whose own client has left stops waiting at once.
const MAX_SILENT: u32 = 2;
const MAX_SILENCE: Duration = Duration::from_millis(200);

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
    connecting: Option<Connecting>,
    /// After a failure: the error, and until when it is the answer.
    failed: Option<(RedisError, Instant)>,
    backoff: Duration,
    connected_at: Option<Instant>,
}

type Connecting = Shared<BoxFuture<'static, Result<Connection, RedisError>>>;

/// A connection and what is known of its health. Clones are one connection.
#[derive(Clone)]
struct Connection {
    link: Arc<dyn Link>,
    health: Arc<Mutex<Health>>,
}

struct Health {
    /// Whether one call that fails breaks it for all.
    is_whole: bool,
    broken: bool,
    /// By failure domain: one node of a cluster may be silent while the others answer.
    domains: Vec<Domain>,
}

#[derive(Clone, Copy, Default)]
struct Domain {
    last_answer: Option<Instant>,
    silent: u32,
    silent_for: Duration,
}

#[derive(Clone, Copy, Eq, PartialEq)]
enum Verdict {
    Broken,
    Good,
    /// Part of it does not answer.
    Suspect,
}

/// A call under way. Dropped without an answer, it counts as silence.
struct Call<'a> {
    connection: &'a Connection,
    domain: usize,
    sent: Instant,
    answered: bool,
}

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
    pub(super) async fn query(&self, name: &str, command: &Cmd) -> Result<Value, Failure> {
        self.call(name, |link| link.send(command)).await
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
            lock(&current.health).fail();
        }
    }

    async fn call<'a, T>(
        &self,
        name: &str,
        send: impl Fn(&dyn Link) -> BoxFuture<'a, RedisResult<T>>,
    ) -> Result<T, Failure> {
        let domain = usize::from(self.topology.domain(name));
        let connection = self.connection().await.map_err(Failure::Unsent)?;
        let first = match connection.call(domain, send(&*connection.link)).await {
            Err(error) if connection.verdict() == Verdict::Broken => error,
            result => return result.map_err(|error| self.failure(error)),
        };
        if is_from_replica(&first) {
            lock(&self.state).leave(&connection, &first);
        }
        let second = match self.connection().await {
            Ok(connection) => {
                connection.call(domain, send(&*connection.link)).await.map_err(|error| self.failure(error))
            }
            Err(error) => Err(Failure::Unsent(error)),
        };
        second.map_err(|second| self.failure(first).and_then(second))
    }

    fn failure(&self, error: RedisError) -> Failure {
        // The cluster client may have sent it before, to a node that was lost after it had done it.
        let is_first = !self.topology.is_cluster() || comes_before_any_effect(&error);
        if is_reply(&error) && is_first { Failure::Refused(error) } else { Failure::Unknown(error) }
    }

    /// The connection, new where there is none that works.
    async fn connection(&self) -> Result<Connection, RedisError> {
        let connecting = {
            let mut state = lock(&self.state);
            let verdict = state.current.as_ref().map(Connection::verdict);
            if verdict == Some(Verdict::Broken) || verdict == Some(Verdict::Suspect) && !self.topology.is_cluster() {
                state.current = None;
            }
            if verdict == Some(Verdict::Suspect) && state.connecting.is_none() && !state.is_backing_off() {
                // The nodes that answer are served by the old one meanwhile.
                state.connecting = Some(self.connect());
            }
            match (&state.current, &state.connecting, &state.failed) {
                (Some(current), _, _) => return Ok(current.clone()),
                (None, Some(connecting), _) => connecting.clone(),
                (None, None, Some((error, until))) if Instant::now() < *until => return Err(error.clone()),
                (None, None, _) => state.connecting.insert(self.connect()).clone(),
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
    fn connected(&mut self, connected: &Result<Connection, RedisError>) {
        self.connecting = None;
        match connected {
            Ok(connection) => {
                let replaced = self.current.replace(connection.clone()).is_some();
                self.connected_at = Some(Instant::now());
                self.failed = None;
                if replaced {
                    // It may be no better.
                    self.backoff = LAST_BACKOFF;
                }
            }
            Err(error) => self.back_off(error),
        }
    }

    /// Of all calls that fail on a connection, the first counts.
    fn leave(&mut self, connection: &Connection, error: &RedisError) {
        if self.current.as_ref().is_some_and(|current| Arc::ptr_eq(&current.health, &connection.health)) {
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
        self.current.take_if(|current| current.verdict() == Verdict::Broken);
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

// === impl Connection ===

impl Connection {
    fn new(link: Arc<dyn Link>, is_whole: bool) -> Self {
        Self { link, health: Arc::new(Mutex::new(Health { is_whole, broken: false, domains: Vec::new() })) }
    }

    fn verdict(&self) -> Verdict {
        let health = lock(&self.health);
        let is_silent = |domain: &Domain| domain.silent >= MAX_SILENT && domain.silent_for >= MAX_SILENCE;
        match health.broken {
            true => Verdict::Broken,
            false if health.domains.iter().any(is_silent) => Verdict::Suspect,
            false => Verdict::Good,
        }
    }

    async fn call<T>(&self, domain: usize, call: BoxFuture<'_, RedisResult<T>>) -> RedisResult<T> {
        let mut under_way = Call { connection: self, domain, sent: Instant::now(), answered: false };
        let result = call.await;
        match &result {
            Err(error) if is_reply(error) => under_way.answered(is_about_topology(error), is_from_replica(error)),
            Err(error) if error.is_timeout() => {}
            Err(_) => lock(&self.health).fail(),
            Ok(_) => under_way.answered(false, false),
        }
        result
    }
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connection").finish_non_exhaustive()
    }
}

// === impl Health ===

impl Health {
    fn fail(&mut self) {
        self.broken |= self.is_whole;
    }

    fn domain(&mut self, domain: usize) -> &mut Domain {
        if self.domains.len() <= domain {
            self.domains.resize(domain + 1, Domain::default());
        }
        &mut self.domains[domain]
    }
}

// === impl Call ===

impl Call<'_> {
    fn answered(&mut self, about_topology: bool, by_replica: bool) {
        let mut health = lock(&self.connection.health);
        if by_replica {
            health.fail();
        }
        // Of a cluster such an answer is none: its client has followed the topology as far as it knows it.
        self.answered = health.is_whole || !about_topology;
        if self.answered {
            *health.domain(self.domain) = Domain { last_answer: Some(Instant::now()), ..Domain::default() };
        }
    }
}

impl Drop for Call<'_> {
    fn drop(&mut self) {
        if !self.answered {
            let mut health = lock(&self.connection.health);
            let domain = health.domain(self.domain);
            if domain.last_answer.is_none_or(|answer| answer < self.sent) {
                domain.silent += 1;
                domain.silent_for += self.sent.elapsed();
            }
        }
    }
}
