//! The row in the transaction that makes the effect.

use std::marker::PhantomData;
use std::sync::Arc;
use std::time::Duration;

#[cfg(feature = "postgres")]
use sqlx::Postgres;
#[cfg(feature = "sqlite")]
use sqlx::Sqlite;
use sqlx::{AssertSqlSafe, Transaction};

use super::millis;
use super::statements::Dialect;
use super::sweeper;
use super::table::{InvalidTable, quoted, table_name};
use crate::attempt::Attempt;
use crate::key::Key;
use crate::store::{MAX_DURATION, MIN_DURATION};

const TABLE: &str = "idempotency_effects";

/// Longer than the retention of a webhook and its longest attempt.
const KEEP: Duration = Duration::from_secs(8 * 24 * 60 * 60);

/// PostgreSQL counts it in milliseconds of 31 bits.
const MAX_LOCK_TIMEOUT: Duration = Duration::from_secs(24 * 24 * 60 * 60);

/// Makes an effect exact: the identity of the event goes into a table of the same database, in the same transaction.
///
/// A store alone cannot keep an attempt from running again whose process died between the effect and the record of it. With this row the
/// second run finds what the first has done, whatever store the layer is on, and an attempt that has lost its lease cannot
/// commit an effect that its successor has committed.
///
/// ```no_run
/// # #[cfg(feature = "postgres")]
/// # mod shop {
/// use axum::{Extension, http::StatusCode};
/// use sqlx::{PgPool, Postgres};
/// use tower_idempotency::Attempt;
/// use tower_idempotency::store::{Dedup, Recorded};
///
/// async fn invoice(pool: PgPool, dedup: Dedup<Postgres>, attempt: Attempt) -> Result<StatusCode, sqlx::Error> {
///     let mut transaction = pool.begin().await?;
///     if dedup.record(&mut transaction, &attempt).await? == Recorded::First {
///         sqlx::query("UPDATE stock SET count = count - 1").execute(&mut *transaction).await?;
///         transaction.commit().await?;
///     }
///     // Otherwise there is nothing to do: the layer answers as for a duplicate.
///     Ok(StatusCode::OK)
/// }
/// # }
/// ```
///
/// An error means that nothing was made: let the transaction go, and answer with a failure that is not kept, such as 503, so
/// that the event comes again.
///
/// # What holds where
///
/// - **PostgreSQL, READ COMMITTED** (its default): the second of two transactions waits for the first, for
///   [`lock_timeout`](Self::lock_timeout) at most, and finds its row, or is first if that was rolled back. Beyond the timeout it fails with 55P03.
/// - **PostgreSQL, REPEATABLE READ and SERIALIZABLE**: a row that was committed after the transaction began is no row to find, and
///   the second fails with 40001. It finds the row when the event comes again.
/// - **SQLite**: one transaction writes at a time. One that was begun deferred and has read something cannot write once another has
///   written, and fails at once (`SQLITE_BUSY_SNAPSHOT`): record first, or begin with `BEGIN IMMEDIATE`.
///
/// # Making an effect again
///
/// [`Ledger::forget`](crate::Ledger::forget) knows nothing of the row: the next delivery runs, and finds the effect made. To have it
/// made again, undo it and delete the row of [`Attempt::key`], and of the previous key while a secret rotates, in one transaction; then
/// forget the key.
///
/// # From other clients
///
/// [`statement`](Self::statement) is what it says to the database, for tokio-postgres, diesel, sea-orm or rusqlite: no row that it
/// wrote means that the effect is there. While a [secret rotates](crate::IdempotencyLayer::previous_secret), run it for
/// [`Attempt::previous_key`] first.
#[derive(Debug)]
pub struct Dedup<D> {
    table: Arc<str>,
    keep: Duration,
    lock_timeout: Duration,
    rebuilds: bool,
    database: PhantomData<fn() -> D>,
}

/// Whether an effect is still to be made.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Recorded {
    /// An earlier transaction has made it.
    Already,
    /// It is this transaction's to make. The row is there when it commits.
    First,
}

impl<D> Dedup<D> {
    /// Rows in the table `idempotency_effects`.
    #[must_use]
    pub fn new() -> Self {
        Self {
            table: TABLE.into(),
            keep: KEEP,
            lock_timeout: Duration::from_secs(5),
            rebuilds: false,
            database: PhantomData,
        }
    }

    /// The same in another table, `table` or `schema.table`.
    ///
    /// # Errors
    ///
    /// If a name has other characters than ASCII letters, digits and `_`, begins with a digit, or is longer than 52.
    pub fn table(self, name: &str) -> Result<Self, InvalidTable> {
        Ok(Self { table: table_name(name)?.into(), ..self })
    }

    /// How long a row is kept. It has to outlive the layer's [`retention`](crate::IdempotencyLayer::retention) and its
    /// [`max_attempt`](crate::IdempotencyLayer::max_attempt) together, and be over before a client may use its key for something
    /// else: as long as the row is there, nothing else is made under the key. Default: 8 days, for webhooks; an api that forgets its
    /// keys after 24 hours and lets them be used anew has to set it.
    #[must_use]
    pub fn keep(self, keep: Duration) -> Self {
        Self { keep: keep.clamp(MIN_DURATION, MAX_DURATION), ..self }
    }

    /// How long a transaction waits for another that has recorded the same event and not ended yet, so that one that is
    /// frozen does not hold up the next for ever; at most 24 days, which is as long as PostgreSQL takes. On SQLite that is the
    /// busy timeout of the connection. Default: 5 s.
    #[must_use]
    pub fn lock_timeout(self, timeout: Duration) -> Self {
        Self { lock_timeout: timeout.clamp(MIN_DURATION, MAX_LOCK_TIMEOUT), ..self }
    }

    /// The handler answers for itself when the effect is there, from its own tables, and what it answers is kept. Default: the
    /// layer answers as for an outcome that was not retained, whatever the handler says
    /// ([`Attempt::already_applied`]).
    #[must_use]
    pub fn outcomes_are_rebuilt(self) -> Self {
        Self { rebuilds: true, ..self }
    }

    fn recorded(&self, attempt: &Attempt, keys: usize, rows: u64) -> Recorded {
        if rows == keys as u64 {
            return Recorded::First;
        }
        if !self.rebuilds {
            attempt.already_applied();
        }
        Recorded::Already
    }

    fn insert(&self, dialect: Dialect) -> String {
        let (table, now, keep) = (quoted(&self.table), dialect.now, millis(self.keep));
        format!("INSERT INTO {table} (key, expires_at) VALUES ($1, {now} + {keep}) ON CONFLICT (key) DO NOTHING")
    }
}

#[cfg(feature = "postgres")]
impl Dedup<Postgres> {
    /// Writes the row, or finds it. Call it before the effect, in the transaction that makes it.
    ///
    /// # Errors
    ///
    /// If the database cannot say: another transaction has the row and does not end, or has committed it after this one
    /// began, or the server does not answer.
    pub async fn record(
        &self,
        transaction: &mut Transaction<'_, Postgres>,
        attempt: &Attempt,
    ) -> Result<Recorded, sqlx::Error> {
        let bound = "SELECT current_setting('lock_timeout'), set_config('lock_timeout', $1, true)";
        let timeout = self.lock_timeout.as_millis().to_string();
        let (before, _): (String, String) = sqlx::query_as(bound).bind(timeout).fetch_one(&mut **transaction).await?;
        let statement: Arc<str> = self.statement().into();
        let (mut keys, mut rows) = (0, 0);
        for key in both(attempt) {
            let insert = sqlx::query(AssertSqlSafe(Arc::clone(&statement))).bind(&key.as_bytes()[..]);
            rows += insert.execute(&mut **transaction).await?.rows_affected();
            keys += 1;
        }
        let reset = "SELECT set_config('lock_timeout', $1, true)";
        sqlx::query(reset).bind(before).execute(&mut **transaction).await?;
        Ok(self.recorded(attempt, keys, rows))
    }

    /// What [`record`](Self::record) says. Its one parameter is the 24 bytes of [`Attempt::key`].
    #[must_use]
    pub fn statement(&self) -> String {
        self.insert(super::postgres::DIALECT)
    }

    /// What makes the table, as SQL. It can be run again where it is there.
    #[must_use]
    pub fn schema(&self) -> String {
        super::table::with_index(
            "CREATE TABLE IF NOT EXISTS {table} (key bytea PRIMARY KEY, expires_at bigint NOT NULL);\n\
             CREATE INDEX IF NOT EXISTS {index} ON {table} (expires_at);\n",
            &self.table,
            "expires_at",
        )
    }

    /// What removes rows that are kept no longer. Its one parameter is how many at most. Whoever runs it needs `SELECT`, `UPDATE` and
    /// `DELETE` on the table, and the handler `SELECT` and `INSERT`.
    #[must_use]
    pub fn sweep(&self) -> String {
        sweeper::statement(&quoted(&self.table), "expires_at", super::postgres::DIALECT)
    }
}

#[cfg(feature = "sqlite")]
impl Dedup<Sqlite> {
    /// Writes the row, or finds it. Call it before the effect, in the transaction that makes it.
    ///
    /// # Errors
    ///
    /// If another transaction writes for longer than the connection waits, or has written since this one began to read.
    pub async fn record(
        &self,
        transaction: &mut Transaction<'_, Sqlite>,
        attempt: &Attempt,
    ) -> Result<Recorded, sqlx::Error> {
        let statement: Arc<str> = self.statement().into();
        let (mut keys, mut rows) = (0, 0);
        for key in both(attempt) {
            let insert = sqlx::query(AssertSqlSafe(Arc::clone(&statement))).bind(&key.as_bytes()[..]);
            rows += insert.execute(&mut **transaction).await?.rows_affected();
            keys += 1;
        }
        Ok(self.recorded(attempt, keys, rows))
    }

    /// What [`record`](Self::record) says. Its one parameter is the 24 bytes of [`Attempt::key`].
    #[must_use]
    pub fn statement(&self) -> String {
        self.insert(super::sqlite::DIALECT)
    }

    /// What makes the table, as SQL. It can be run again where it is there.
    #[must_use]
    pub fn schema(&self) -> String {
        super::table::with_index_of_database(
            "CREATE TABLE IF NOT EXISTS {table} (key BLOB PRIMARY KEY NOT NULL, expires_at INTEGER NOT NULL);\n\
             CREATE INDEX IF NOT EXISTS {index} ON {bare} (expires_at);\n",
            &self.table,
            "expires_at",
        )
    }

    /// What removes rows that are kept no longer. Its one parameter is how many at most.
    #[must_use]
    pub fn sweep(&self) -> String {
        sweeper::statement(&quoted(&self.table), "expires_at", super::sqlite::DIALECT)
    }
}

/// In the same order everywhere, so that no two transactions wait for each other.
fn both(attempt: &Attempt) -> impl Iterator<Item = Key> {
    let mut keys = [Some(attempt.key()), attempt.previous_key()];
    keys.sort_unstable_by_key(|key| key.map(|key| *key.as_bytes()));
    keys.into_iter().flatten()
}

impl<D> Default for Dedup<D> {
    fn default() -> Self {
        Self::new()
    }
}

impl<D> Clone for Dedup<D> {
    fn clone(&self) -> Self {
        Self {
            table: Arc::clone(&self.table),
            keep: self.keep,
            lock_timeout: self.lock_timeout,
            rebuilds: self.rebuilds,
            database: PhantomData,
        }
    }
}
