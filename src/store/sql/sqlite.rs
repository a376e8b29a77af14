//! Claims and outcomes in a file, for services of one machine: durable without a server.
//!
//! Several processes may share the file, as long as they are on one machine: SQLite's locks do not hold on network file systems. One
//! writes at a time, and the others wait for it.
//!
//! [`open`](SqliteStore::open) has the file written ahead (WAL) and synchronised at each commit, so that what is acknowledged outlives the
//! process and the machine. While a duplicate waits for another process it looks every 50 to 375 ms.

use std::future::pending;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use sqlx::AssertSqlSafe;
use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePool, SqlitePoolOptions, SqliteSynchronous};
use tokio::time::sleep;

use super::row::{FIRST, attempt};
use super::statements::{Dialect, Statement, Statements};
use super::table::{InvalidTable, table_name};
use super::{Answer, Database, Parameter, Row, Sweeper, steps};
use crate::key::Key;
use crate::slot::cleared_behind;
use crate::store::{Claim, Claimed, Entry, Forgotten, Hold, Store, StoreError};

/// The time of the machine's clock, in milliseconds since 1970.
const NOW: &str = "CAST((julianday('now') - 2440587.5) * 86400000 AS INTEGER)";

pub(super) const DIALECT: Dialect = Dialect { now: NOW, bounded_now: NOW, tell: None, one_of: ["IN (", ")"] };

/// How long a process waits for another that writes. Less than the default of
/// [`Ledger::store_timeout`](crate::Ledger::store_timeout), so that it is refused and not given up.
const BUSY_TIMEOUT: Duration = Duration::from_millis(200);

/// How often a file is opened that others are about to make.
const OPENINGS: usize = 8;

/// A store in a table of SQLite 3.39 or later. Cheap to clone; clones are one store.
///
/// ```no_run
/// # async fn open() -> Result<(), Box<dyn std::error::Error>> {
/// use tower_idempotency::{Ledger, SqliteStore};
///
/// let store = SqliteStore::open("idempotency.db").await?;
/// let ledger = Ledger::new(store);
/// # let _ = ledger;
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct SqliteStore {
    pool: SqlitePool,
    table: Arc<str>,
    statements: Arc<Statements>,
    sweeper: Arc<Sweeper>,
}

impl SqliteStore {
    /// Opens a file, or makes it, with its table `idempotency`. What is kept holds bodies of responses, and a file that is made has the
    /// permissions that the process gives to files.
    ///
    /// # Errors
    ///
    /// If the file cannot be opened, or is none of SQLite's.
    pub async fn open(path: impl AsRef<Path>) -> Result<Self, StoreError> {
        let options = SqliteConnectOptions::new()
            .filename(path)
            .create_if_missing(true)
            .journal_mode(SqliteJournalMode::Wal)
            .synchronous(SqliteSynchronous::Full)
            .busy_timeout(BUSY_TIMEOUT);
        // One writes at a time, anyway, and a queue in the process is fairer than the lock of a file.
        let pool = SqlitePoolOptions::new().max_connections(1).idle_timeout(None).max_lifetime(None);
        for _ in 0..OPENINGS {
            match Self::opened(&pool, &options).await {
                Err(error) if error.is_definite() => sleep(BUSY_TIMEOUT / 4).await,
                opened => return opened,
            }
        }
        Self::opened(&pool, &options).await
    }

    /// Several processes that make a file at once are in each other's way.
    async fn opened(pool: &SqlitePoolOptions, options: &SqliteConnectOptions) -> Result<Self, StoreError> {
        let store = Self::new(pool.clone().connect_with(options.clone()).await.map_err(super::failed)?);
        store.migrate().await?;
        Ok(store)
    }

    /// A store in the table `idempotency`, on connections of `pool`, for whoever has one. They need a busy timeout. Where they
    /// do not write ahead (WAL), whoever reads the file holds up whoever writes.
    #[must_use]
    pub fn new(pool: SqlitePool) -> Self {
        Self::in_table(pool, "idempotency".to_owned())
    }

    /// The same in another table, or in one of an attached database: `table` or `database.table`.
    ///
    /// # Errors
    ///
    /// If a name has other characters than ASCII letters, digits and `_`, begins with a digit, or is longer than 52.
    pub fn table(self, name: &str) -> Result<Self, InvalidTable> {
        Ok(Self::in_table(self.pool, table_name(name)?))
    }

    fn in_table(pool: SqlitePool, table: String) -> Self {
        let statements = Arc::new(Statements::of(&table, DIALECT));
        Self { pool, table: table.into(), statements, sweeper: Arc::default() }
    }

    /// The name of its table.
    #[must_use]
    pub fn table_name(&self) -> &str {
        &self.table
    }

    /// What makes the table, as SQL. It can be run again where it is there.
    #[must_use]
    pub fn schema(&self) -> String {
        super::table::with_index_of_database(include_str!("sqlite.sql"), &self.table, "sweep_after")
    }

    /// Makes the table if it is not there. Several processes may do so at once.
    ///
    /// # Errors
    ///
    /// If the file cannot be written.
    pub async fn migrate(&self) -> Result<(), StoreError> {
        sqlx::raw_sql(AssertSqlSafe(self.schema())).execute(&self.pool).await.map(drop).map_err(super::failed)
    }

    /// Removes rows that have expired, up to `rows` of them, and says how many there were. A row is found at the latest one lease
    /// after it has expired. For operators: the store does so by itself.
    ///
    /// # Errors
    ///
    /// If the file cannot be written.
    pub async fn sweep(&self, rows: u32) -> Result<u64, StoreError> {
        let sweep = sqlx::query(AssertSqlSafe(Arc::clone(&self.statements.sweep))).bind(i64::from(rows));
        Ok(cleared_behind(sweep.execute(&self.pool)).await.map_err(super::failed)?.rows_affected())
    }
}

impl Database for SqliteStore {
    // Who reads waits for nobody who writes.
    const READS_FIRST: bool = true;

    fn statements(&self) -> &Statements {
        &self.statements
    }

    super::asks_its_pool!();

    /// It has no hints.
    async fn changed(&self, _: &Key) {
        pending().await
    }

    async fn sweep(&self, rows: u32) -> Result<u64, StoreError> {
        self.sweep(rows).await
    }

    fn sweeper(&self) -> &Arc<Sweeper> {
        &self.sweeper
    }
}

super::store_by_steps!(SqliteStore);
