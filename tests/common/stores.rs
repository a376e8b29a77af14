//! The stores a promise is kept on, and the faults they are given.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use tokio::time::sleep;
use tower_idempotency::key::Key;
use tower_idempotency::store::{Claim, Claimed, Entry, Forgotten, Hold, Store, StoreError};
use tower_idempotency::{Ledger, MemoryStore, PostgresStore, RedisStore, SqliteStore};

use super::postgres::PostgresServer;
use super::redis::RedisServer;
use super::scratch::Scratch;

/// One store, seen by several processes.
pub struct Stores {
    store: Kind,
    faults: Faults,
    near: bool,
    pub server: Option<RedisServer>,
    _postgres: Option<Arc<PostgresServer>>,
    _sqlite: Option<Scratch>,
}

/// What a process holds of it: the real store, with what goes wrong on the way there and back.
#[derive(Clone)]
pub struct TestStore {
    inner: Kind,
    faults: Faults,
}

#[derive(Clone)]
enum Kind {
    Memory(MemoryStore),
    Postgres(PostgresStore),
    Redis(RedisStore),
    Sqlite(SqliteStore),
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Step {
    Claim,
    Complete,
    Lookup,
    Release,
    Renew,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Fault {
    /// Neither the request nor an answer arrives.
    Hang,
    /// It is done and the answer takes a millisecond.
    DelayAnswer,
    /// It is done and the answer is lost.
    LoseAnswer,
    /// It is not done, and nobody can know.
    LoseRequest,
}

type Faults = Arc<Mutex<Plan>>;

#[derive(Default)]
struct Plan {
    faults: Vec<(Step, Fault, u32)>,
    calls: Vec<Step>,
}

impl Stores {
    pub fn memory() -> Self {
        Self::on(Kind::Memory(MemoryStore::new()))
    }

    pub fn redis() -> Self {
        let server = RedisServer::start();
        let store = Kind::Redis(server.store());
        Self { server: Some(server), ..Self::on(store) }
    }

    pub async fn postgres() -> Self {
        let server = PostgresServer::shared();
        Self { _postgres: Some(Arc::clone(&server)), ..Self::on(Kind::Postgres(server.store().await)) }
    }

    pub async fn sqlite() -> Self {
        let dir = Scratch::new();
        let store = SqliteStore::open(dir.path().join("store.db")).await.expect("a file");
        Self { _sqlite: Some(dir), ..Self::on(Kind::Sqlite(store)) }
    }

    fn on(store: Kind) -> Self {
        Self { store, faults: Faults::default(), near: false, server: None, _postgres: None, _sqlite: None }
    }

    /// The same, with processes that keep finished outcomes at hand.
    pub fn with_near_cache(self) -> Self {
        Self { near: true, ..self }
    }

    /// The store as one more process sees it, with a connection of its own.
    pub fn store(&self) -> TestStore {
        let inner = match (&self.store, &self.server) {
            (_, Some(server)) => Kind::Redis(server.store()),
            (kind, None) => kind.clone(),
        };
        TestStore { inner, faults: Arc::clone(&self.faults) }
    }

    /// One more process.
    pub fn ledger(&self) -> Ledger {
        let ledger = Ledger::new(self.store());
        if self.near { ledger.near_cache(1 << 20, Duration::from_secs(60)) } else { ledger }
    }

    /// The next calls of a step go wrong, so many times.
    pub fn fail(&self, step: Step, fault: Fault, times: u32) {
        self.faults.lock().unwrap().faults.push((step, fault, times));
    }

    /// From here on nothing goes wrong.
    pub fn heal(&self) {
        self.faults.lock().unwrap().faults.clear();
    }

    /// How often a step has been asked for, by all processes.
    pub fn calls(&self, step: Step) -> usize {
        self.faults.lock().unwrap().calls.iter().filter(|call| **call == step).count()
    }
}

impl TestStore {
    async fn with<T>(&self, step: Step, call: impl Future<Output = Result<T, StoreError>>) -> Result<T, StoreError> {
        match self.fault(step) {
            None => call.await,
            Some(Fault::Hang) => std::future::pending().await,
            Some(Fault::DelayAnswer) => {
                let answer = call.await;
                sleep(Duration::from_millis(1)).await;
                answer
            }
            Some(Fault::LoseAnswer) => {
                let _ = call.await;
                Err(StoreError::unknown("the answer was lost"))
            }
            Some(Fault::LoseRequest) => Err(StoreError::unknown("the request was lost")),
        }
    }

    fn fault(&self, step: Step) -> Option<Fault> {
        let mut plan = self.faults.lock().unwrap();
        plan.calls.push(step);
        let (_, fault, left) = plan.faults.iter_mut().find(|(of, _, left)| *of == step && *left > 0)?;
        *left -= 1;
        Some(*fault)
    }
}

macro_rules! delegate {
    ($self:ident, $method:ident($($arg:expr),*)) => {
        match &$self.inner {
            Kind::Memory(store) => store.$method($($arg),*).await,
            Kind::Postgres(store) => store.$method($($arg),*).await,
            Kind::Redis(store) => store.$method($($arg),*).await,
            Kind::Sqlite(store) => store.$method($($arg),*).await,
        }
    };
}

impl Store for TestStore {
    async fn claim(&self, key: &Key, claim: &Claim) -> Result<Claimed, StoreError> {
        self.with(Step::Claim, async { delegate!(self, claim(key, claim)) }).await
    }

    async fn renew(&self, key: &Key, claim: &Claim) -> Result<Hold, StoreError> {
        self.with(Step::Renew, async { delegate!(self, renew(key, claim)) }).await
    }

    async fn complete(&self, key: &Key, claim: &Claim, record: Bytes) -> Result<Hold, StoreError> {
        self.with(Step::Complete, async { delegate!(self, complete(key, claim, record)) }).await
    }

    async fn release(&self, key: &Key, claim: &Claim, remember: Duration) -> Result<Hold, StoreError> {
        self.with(Step::Release, async { delegate!(self, release(key, claim, remember)) }).await
    }

    async fn lookup(&self, key: &Key) -> Result<Option<Entry>, StoreError> {
        self.with(Step::Lookup, async { delegate!(self, lookup(key)) }).await
    }

    async fn forget(&self, key: &Key, force: bool) -> Result<Forgotten, StoreError> {
        delegate!(self, forget(key, force))
    }

    fn failure_domain(&self, key: &Key) -> u16 {
        match &self.inner {
            Kind::Memory(store) => store.failure_domain(key),
            Kind::Postgres(store) => store.failure_domain(key),
            Kind::Redis(store) => store.failure_domain(key),
            Kind::Sqlite(store) => store.failure_domain(key),
        }
    }

    async fn changed(&self, key: &Key) {
        delegate!(self, changed(key));
    }
}
