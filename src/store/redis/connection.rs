//! A connection that heals.
//!
//! The client's multiplexed connection is fast and never comes back once it is lost; it also cannot tell a server that
//! is slow from one whose packets vanish. So it is replaced when it breaks, when it leads to a replica, and when two
//! calls in a row have waited in vain. Connecting is one task for all who wait for it, outlives their patience, and backs
//! off with jitter.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures_util::FutureExt as _;
use futures_util::future::{BoxFuture, Shared};
use redis::aio::MultiplexedConnection;
use redis::{AsyncConnectionConfig, Client, Cmd, ErrorKind, RedisError, RedisResult, ServerErrorKind, Value};
use tokio::time::Instant;

use crate::lock::lock;
use crate::store::StoreError;

/// How long connecting may take, greeting included.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);

/// The last resort against a caller that sets no deadline of its own; the ledger's is far below.
const RESPONSE_TIMEOUT: Duration = Duration::from_secs(5);

/// How many calls in a row go unanswered, and for how long, before the connection is condemned. Both, because callers
/// differ in their deadlines, and because one whose own client has left stops waiting at once.
const MAX_SILENT: u32 = 2;
const MAX_SILENCE: Duration = Duration::from_millis(200);

/// The pauses between attempts to connect.
const FIRST_BACKOFF: Duration = Duration::from_millis(20);
const LAST_BACKOFF: Duration = Duration::from_millis(500);

/// Hands out the current connection, and makes another when it has to.
#[derive(Debug)]
pub(super) struct Connector {
    client: Client,
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

/// Why a command has no result.
#[derive(Debug)]
pub(super) enum Failure {
    /// The server said so, and has done nothing.
    Refused(RedisError),
    /// It may have been done.
    Unknown(RedisError),
    /// It has not been sent.
    Unsent(RedisError),
}

/// A connection and what is known of its health. Clones are one connection.
#[derive(Clone, Debug)]
struct Connection {
    inner: MultiplexedConnection,
    health: Arc<Mutex<Health>>,
}

#[derive(Debug)]
struct Health {
    broken: bool,
    last_answer: Instant,
    silent: u32,
    silent_since: Option<Instant>,
}

/// A call under way. Dropped without an answer, it counts as silence.
struct Call<'a> {
    health: &'a Mutex<Health>,
    sent: Instant,
    answered: bool,
}

/// Connects, in bounded time.
pub(super) async fn open(client: &Client, config: AsyncConnectionConfig) -> RedisResult<MultiplexedConnection> {
    let config = config.set_connection_timeout(Some(CONNECT_TIMEOUT));
    let connected = client.get_multiplexed_async_connection_with_config(&config);
    let too_long = |_| Err(RedisError::from((ErrorKind::Io, "connecting took too long")));
    tokio::time::timeout(CONNECT_TIMEOUT, connected).await.unwrap_or_else(too_long)
}

// === impl Connector ===

impl Connector {
    pub(super) fn new(client: Client) -> Self {
        Self { client, state: Arc::default() }
    }

    /// Sends a command, and sends it once more if the connection turns out to be cut or to lead to a replica: every step of
    /// a store may be sent twice.
    pub(super) async fn query(&self, command: &Cmd) -> Result<Value, Failure> {
        let mut connection = self.connection().await.map_err(Failure::Unsent)?;
        let first = match connection.query(command).await {
            Err(error) if connection.is_condemned() => error,
            result => return result.map_err(Failure::sent),
        };
        if is_from_replica(&first) {
            lock(&self.state).back_off(&first);
        }
        let second = match self.connection().await {
            Ok(mut connection) => connection.query(command).await.map_err(Failure::sent),
            Err(error) => Err(Failure::Unsent(error)),
        };
        second.map_err(|second| Failure::sent(first).and_then(second))
    }

    /// The connection, new where there is none that works.
    async fn connection(&self) -> Result<Connection, RedisError> {
        let connecting = {
            let mut state = lock(&self.state);
            if state.current.as_ref().is_some_and(Connection::is_condemned) {
                state.current = None;
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
        let (client, state) = (self.client.clone(), Arc::clone(&self.state));
        let task = tokio::spawn(async move {
            let config = AsyncConnectionConfig::new().set_response_timeout(Some(RESPONSE_TIMEOUT));
            let connected = open(&client, config).await.map(Connection::new);
            lock(&state).connected(&connected);
            connected
        });
        let state = Arc::clone(&self.state);
        let connected = async move {
            // Where its runtime ends, the task does not get to say so, and the next caller may have another runtime.
            let broken_off = |_| {
                let error = Err(RedisError::from((ErrorKind::Client, "connecting was broken off")));
                lock(&state).connected(&error);
                error
            };
            task.await.unwrap_or_else(broken_off)
        };
        connected.boxed().shared()
    }
}

// === impl State ===

impl State {
    fn connected(&mut self, connected: &Result<Connection, RedisError>) {
        self.connecting = None;
        match connected {
            Ok(connection) => {
                self.current = Some(connection.clone());
                self.connected_at = Some(Instant::now());
                self.failed = None;
            }
            Err(error) => self.back_off(error),
        }
    }

    /// Pauses before the next attempt to connect: longer each time, unless a connection has been good for a while.
    fn back_off(&mut self, error: &RedisError) {
        self.current = None;
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
    fn new(inner: MultiplexedConnection) -> Self {
        let health = Health { broken: false, last_answer: Instant::now(), silent: 0, silent_since: None };
        Self { inner, health: Arc::new(Mutex::new(health)) }
    }

    fn is_condemned(&self) -> bool {
        let health = lock(&self.health);
        let is_silent = health.silent_since.is_some_and(|since| since.elapsed() >= MAX_SILENCE);
        health.broken || is_silent && health.silent >= MAX_SILENT
    }

    async fn query(&mut self, command: &Cmd) -> RedisResult<Value> {
        let mut call = Call { health: &self.health, sent: Instant::now(), answered: false };
        let result = command.query_async(&mut self.inner).await;
        match &result {
            Err(error) if !is_reply(error) => {
                if !error.is_timeout() {
                    lock(call.health).broken = true;
                }
            }
            reply => call.answered(matches!(reply, Err(error) if is_from_replica(error))),
        }
        result
    }
}

/// Whether the server itself said so. Everything else leaves open what it has done.
fn is_reply(error: &RedisError) -> bool {
    matches!(error.kind(), ErrorKind::Server(_) | ErrorKind::Extension)
}

/// Whether the server cannot write, and another may have taken its place.
fn is_from_replica(error: &RedisError) -> bool {
    match error.kind() {
        ErrorKind::Server(ServerErrorKind::ReadOnly | ServerErrorKind::MasterDown) => true,
        // From inside a script, before 7.0.
        ErrorKind::Server(ServerErrorKind::ResponseError) => {
            error.detail().is_some_and(|detail| detail.contains("-READONLY") || detail.contains("-MASTERDOWN"))
        }
        _ => false,
    }
}

/// Whether what stands under the key is none of our records. `CORRUPT` is the scripts' own word for it.
fn is_of_no_record(error: &RedisError) -> bool {
    // Before 7.0 an error inside a script has its code in the text.
    let in_script = || error.detail().is_some_and(|detail| detail.contains(" WRONGTYPE "));
    matches!(error.code(), Some("WRONGTYPE" | "CORRUPT")) || error.code() == Some("ERR") && in_script()
}

// === impl Failure ===

impl Failure {
    fn sent(error: RedisError) -> Self {
        if is_reply(&error) { Self::Refused(error) } else { Self::Unknown(error) }
    }

    /// What has been done by a sending that failed like this, and another after it that failed like `next`.
    pub(super) fn and_then(self, next: Self) -> Self {
        match (self, next) {
            (Self::Unknown(_), Self::Refused(error) | Self::Unsent(error)) => Self::Unknown(error),
            (Self::Refused(_), Self::Unsent(error)) => Self::Refused(error),
            (_, next) => next,
        }
    }

    /// What went wrong last.
    pub(super) fn error(&self) -> &RedisError {
        match self {
            Self::Refused(error) | Self::Unknown(error) | Self::Unsent(error) => error,
        }
    }
}

impl From<Failure> for StoreError {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Refused(error) if is_of_no_record(&error) => Self::unreadable(error),
            Failure::Refused(error) | Failure::Unsent(error) => Self::refused(error),
            Failure::Unknown(error) => Self::unknown(error),
        }
    }
}

// === impl Call ===

impl Call<'_> {
    fn answered(&mut self, by_replica: bool) {
        self.answered = true;
        let mut health = lock(self.health);
        health.silent = 0;
        health.silent_since = None;
        health.last_answer = Instant::now();
        health.broken |= by_replica;
    }
}

impl Drop for Call<'_> {
    fn drop(&mut self) {
        if !self.answered {
            let mut health = lock(self.health);
            if health.last_answer < self.sent {
                health.silent += 1;
                health.silent_since.get_or_insert(self.sent);
            }
        }
    }
}
