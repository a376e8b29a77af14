//! Claims and outcomes in PostgreSQL, for services that have it and no Redis.
//!
//! Each step is one statement in a transaction of its own. The time is that of the server's clock, so processes need not agree
//! on theirs. What is acknowledged lasts as the server's `synchronous_commit` says.
//!
//! While a duplicate waits for another process, one more connection listens for the end of it (`LISTEN`), and it looks every 50 to
//! 375 ms all the same. A first delivery costs two statements, a duplicate as many.
//!
//! Behind PgBouncer it needs sessions of its own, or 1.21 and later with `max_prepared_statements`: a statement that is prepared on
//! one connection and run on another may be another's. PgBouncer also refuses or drops the `lock_timeout` that [`open`](PostgresStore::open) asks
//! for when it connects: bring a pool of your own.
//!
//! The user needs `SELECT`, `INSERT`, `UPDATE` and `DELETE` on the table. The table is made by [`migrate`](PostgresStore::migrate), or by
//! whatever manages your schema from what [`schema`](PostgresStore::schema) says. Expired rows are removed in the background, 16 after
//! each 8 new keys while there are that many.

use std::future::pending;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use sqlx::AssertSqlSafe;
use sqlx::postgres::{PgConnectOptions, PgPool, PgPoolOptions};

use super::listen::Watchers;
use super::row::{FIRST, Phase, attempt};
use super::statements::{Dialect, Statement, Statements};
use super::table::{InvalidTable, table_name};
use super::{Answer, Database, Parameter, Row, Sweeper, steps};
use crate::key::Key;
use crate::slot::cleared_behind;
use crate::store::{Claim, Claimed, Entry, Forgotten, Hold, Store, StoreError};

/// The time of the server's clock, in milliseconds since 1970.
const NOW: &str = "(date_part('epoch', clock_timestamp()) * 1000)::bigint";

/// The lock timeout is less than the default of [`Ledger::store_timeout`](crate::Ledger::store_timeout), so that a step is refused and
/// not given up. It holds for this statement's transaction, which ends with it.
const BOUNDED_NOW: &str = "CASE WHEN set_config('lock_timeout', '200', true) IS NOT NULL \
                           THEN (date_part('epoch', clock_timestamp()) * 1000)::bigint END";

/// Whether connections with these options wait for locks no longer than a statement would have them wait.
fn bound_their_waits(options: &str) -> bool {
    let last = options.split_whitespace().filter_map(|option| option.strip_prefix("lock_timeout=")).next_back();
    // Without a unit it is milliseconds, and 0 is no bound.
    let millis = last.and_then(|value| value.strip_suffix("ms").unwrap_or(value).parse().ok());
    millis.is_some_and(|millis: u32| (1..=200).contains(&millis))
}

/// Where the end of an attempt is told that somebody waits for, by the key as it [shows itself](crate::key::Key).
pub(super) const CHANNEL: &str = "idempotency";
const TELL: &str = "pg_notify('idempotency', translate(encode(key, 'base64'), '+/', '-_'))::text";

/// With a bound on waits in each statement. An array, since a join may be planned from all rows that have expired.
pub(super) const DIALECT: Dialect = Dialect {
    now: NOW,
    bounded_now: BOUNDED_NOW,
    tell: Some(TELL),
    one_of: ["= ANY (ARRAY(", " FOR UPDATE SKIP LOCKED))"],
};

/// A store in a table of PostgreSQL 12 or later. Cheap to clone; clones are one store.
///
/// ```no_run
/// # async fn connect() -> Result<(), Box<dyn std::error::Error>> {
/// use tower_idempotency::{Ledger, PostgresStore};
///
/// let store = PostgresStore::open("postgres://localhost/shop")?;
/// store.migrate().await?;
/// let ledger = Ledger::new(store);
/// # let _ = ledger;
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct PostgresStore {
    pool: PgPool,
    table: Arc<str>,
    statements: Arc<Statements>,
    sweeper: Arc<Sweeper>,
    watchers: Arc<Watchers>,
}

impl PostgresStore {
    /// A store in the table `idempotency`, on up to 16 connections of its own, which are made when they are needed: a server that is
    /// down at start is a refusal, as later.
    ///
    /// # Errors
    ///
    /// If `url` is none of PostgreSQL's.
    pub fn open(url: &str) -> Result<Self, StoreError> {
        let options: PgConnectOptions = url.parse().map_err(super::failed)?;
        // A statement bounds its wait for a row by itself, but it has the lock of its table by then.
        let options = options.options([("lock_timeout", "200ms")]);
        // To ask a connection whether it lives before each statement would double the round trips.
        let pool = PgPoolOptions::new().max_connections(16).test_before_acquire(false);
        Ok(Self::new(pool.connect_lazy_with(options)))
    }

    /// A store in the table `idempotency`, on connections of `pool`, for whoever has one.
    ///
    /// Every running attempt and every duplicate needs a connection for the moment of a step. How long one waits for it is
    /// bounded by [`Ledger::store_timeout`](crate::Ledger::store_timeout). A pool of the store's own, as [`open`](Self::open) makes it, is
    /// better: it does not ask each connection whether it lives (`test_before_acquire`), which doubles the round trips, and its
    /// connections have a `lock_timeout`, which also holds for tables, that an index being made, `VACUUM FULL` or `ALTER TABLE` lock.
    /// Where the options of this pool's connections
    /// ([`PgConnectOptions::options`](sqlx::postgres::PgConnectOptions::options)) set none of at most 200 ms, each
    /// statement bounds its wait for rows itself.
    #[must_use]
    pub fn new(pool: PgPool) -> Self {
        Self::in_table(pool, "idempotency".to_owned())
    }

    /// The same in another table, `table` or `schema.table`.
    ///
    /// # Errors
    ///
    /// If a name has other characters than ASCII letters, digits and `_`, begins with a digit, or is longer than 52.
    pub fn table(self, name: &str) -> Result<Self, InvalidTable> {
        Ok(Self::in_table(self.pool, table_name(name)?))
    }

    fn in_table(pool: PgPool, table: String) -> Self {
        let has_bound = pool.connect_options().get_options().is_some_and(bound_their_waits);
        let dialect = if has_bound { Dialect { bounded_now: NOW, ..DIALECT } } else { DIALECT };
        let statements = Arc::new(Statements::of(&table, dialect));
        Self { pool, table: table.into(), statements, sweeper: Arc::default(), watchers: Arc::default() }
    }

    /// The name of its table.
    #[must_use]
    pub fn table_name(&self) -> &str {
        &self.table
    }

    /// What makes the table, as SQL. It can be run again where it is there.
    #[must_use]
    pub fn schema(&self) -> String {
        super::table::with_index(include_str!("postgres.sql"), &self.table, "sweep_after")
    }

    /// Makes the table if it is not there. Several processes may do so at once.
    ///
    /// # Errors
    ///
    /// If the server cannot be reached or does not let the user make tables.
    pub async fn migrate(&self) -> Result<(), StoreError> {
        // To make what is there takes a lock all the same, and whoever waits for that holds up all who come after.
        let table = super::table::quoted(&self.table);
        let is_there = "SELECT EXISTS (SELECT FROM pg_index JOIN pg_class ON pg_class.oid = indexrelid \
                        WHERE indrelid = to_regclass($1) AND relname = $2)";
        let is_there =
            sqlx::query_scalar(is_there).bind(&table).bind(super::table::index_name(&self.table, "sweep_after"));
        if is_there.fetch_one(&self.pool).await.map_err(super::failed)? {
            return Ok(());
        }
        // `IF NOT EXISTS` alone fails for one of two who do it at once.
        let locked =
            format!("SET LOCAL lock_timeout = '5s'; SELECT pg_advisory_xact_lock(hashtext('{}'));", self.table);
        let mut transaction = self.pool.begin().await.map_err(super::failed)?;
        for sql in [locked, self.schema()] {
            sqlx::raw_sql(AssertSqlSafe(sql)).execute(&mut *transaction).await.map_err(super::failed)?;
        }
        transaction.commit().await.map_err(super::failed)
    }

    /// Removes rows that have expired, up to `rows` of them, and says how many there were. A row is found at the latest one lease
    /// after it has expired. For operators: the store does so by itself.
    ///
    /// # Errors
    ///
    /// If the server does not answer.
    pub async fn sweep(&self, rows: u32) -> Result<u64, StoreError> {
        let sweep = sqlx::query(AssertSqlSafe(Arc::clone(&self.statements.sweep))).bind(i64::from(rows));
        Ok(cleared_behind(sweep.execute(&self.pool)).await.map_err(super::failed)?.rows_affected())
    }
}

impl Database for PostgresStore {
    // First deliveries are what is to be fast, and their write is what finds out.
    const READS_FIRST: bool = false;

    fn statements(&self) -> &Statements {
        &self.statements
    }

    super::asks_its_pool!();

    async fn changed(&self, key: &Key) {
        let watch = self.watchers.watch(*key, &self.pool);
        let told = watch.told();
        let (table, running) = (super::table::quoted(&self.table), Phase::Running.number());
        let mark = format!(
            "UPDATE {table} SET watched = true \
             WHERE key = $1 AND expires_at > {BOUNDED_NOW} AND state = {running} AND NOT watched"
        );
        let mark = sqlx::query(AssertSqlSafe(mark)).bind(&key.as_bytes()[..]);
        let marked = cleared_behind(mark.execute(&self.pool)).await;
        // Without the mark nobody tells.
        if marked.is_err() {
            pending().await
        }
        told.await;
    }

    async fn sweep(&self, rows: u32) -> Result<u64, StoreError> {
        self.sweep(rows).await
    }

    fn sweeper(&self) -> &Arc<Sweeper> {
        &self.sweeper
    }
}

super::store_by_steps!(PostgresStore);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bound_is_one_of_locks_and_no_longer_than_ours() {
        for bound in
            ["-c lock_timeout=200ms", "-c lock_timeout=50", "-c search_path=x -c lock_timeout=0 -c lock_timeout=1ms"]
        {
            assert!(bound_their_waits(bound), "{bound}");
        }
        let others =
            ["", "-c deadlock_timeout=100ms", "-c lock_timeout=0", "-c lock_timeout=201ms", "-c lock_timeout=1s"];
        for other in others.into_iter().chain(["-c lock_timeout=50 -c lock_timeout=1s", "-c lock_timeout=-1"]) {
            assert!(!bound_their_waits(other), "{other}");
        }
    }
}
