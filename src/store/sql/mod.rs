//! What the stores in SQL databases share: one row per key, one statement to change it, the database's clock.
//!
//! Each step writes by one statement, which takes effect only where the state of the row allows it, and where it did not, reads the row
//! to say why. What is read may be newer than what the write met, and allow it after all: then it says nothing, and the step
//! is tried again. New keys are inserted and others updated, by statements of their own: one for both (`ON CONFLICT DO UPDATE`)
//! locks the row of every duplicate and logs that.

pub(super) mod dedup;
#[cfg(feature = "postgres")]
mod listen;
#[cfg(feature = "postgres")]
pub mod postgres;
mod row;
#[cfg(feature = "sqlite")]
pub mod sqlite;
mod statements;
mod steps;
mod sweeper;
mod table;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use sqlx::error::DatabaseError;
use sqlx::query::Query;
use sqlx::{AssertSqlSafe, Encode, Type};

use self::row::Row;
use self::statements::{Statement, Statements};
use self::sweeper::Sweeper;
pub use self::table::InvalidTable;
use super::StoreError;
use crate::key::Key;

/// A database as a store speaks to it.
trait Database: Clone + Send + Sync + 'static {
    /// Whether a claim looks at the row before it tries to take it.
    const READS_FIRST: bool;

    fn statements(&self) -> &Statements;

    /// The attempt of the row that a statement has written, if it has: the first, where it returns none.
    fn write(&self, statement: &Statement, parameters: &[Parameter<'_>]) -> impl Future<Output = Answer<u32>> + Send;

    /// The row that a statement reads, if there is one.
    fn read(&self, statement: &Statement, parameters: &[Parameter<'_>]) -> impl Future<Output = Answer<Row>> + Send;

    /// Returns when the key may have changed. See [`Store::changed`](super::Store::changed).
    fn changed(&self, key: &Key) -> impl Future<Output = ()> + Send;

    /// Removes rows that have expired, up to so many.
    fn sweep(&self, rows: u32) -> impl Future<Output = Result<u64, StoreError>> + Send;

    fn sweeper(&self) -> &Arc<Sweeper>;
}

#[derive(Clone, Copy)]
enum Parameter<'a> {
    Bytes(&'a [u8]),
    Flag(bool),
    Number(i64),
    OptionalBytes(Option<&'a [u8]>),
}

type Answer<T> = Result<Option<T>, sqlx::Error>;

/// Others were faster each time.
#[derive(Debug)]
struct Contended;

fn millis(duration: Duration) -> i64 {
    i64::try_from(duration.as_millis()).unwrap_or(i64::MAX)
}

/// What an error of the client says of the step.
fn failed(error: sqlx::Error) -> StoreError {
    match error {
        sqlx::Error::PoolTimedOut | sqlx::Error::PoolClosed | sqlx::Error::Configuration(_) => {
            StoreError::unreachable(error)
        }
        sqlx::Error::ColumnDecode { .. } | sqlx::Error::Decode(_) => StoreError::unreadable(error),
        sqlx::Error::Database(ref refused) if is_definite(&**refused) => StoreError::refused(error),
        _ => StoreError::unknown(error),
    }
}

/// Whether an error of the database says that the step has had no effect. That it lost a connection, failed to write or ended says
/// nothing: it may have been done by then.
fn is_definite(error: &dyn DatabaseError) -> bool {
    let Some(code) = error.code() else { return false };
    #[cfg(feature = "postgres")]
    if let Some(error) = error.try_downcast_ref::<sqlx::postgres::PgDatabaseError>() {
        use sqlx::postgres::PgSeverity::{Fatal, Panic};
        let unsure = ["08", "57P", "58", "XX", "40003"].iter().any(|class| code.starts_with(class));
        return !unsure && !matches!(error.severity(), Fatal | Panic);
    }
    // The low byte is what went wrong, the others where: SQLITE_IOERR.
    code.parse::<u32>().is_ok_and(|code| code & 0xff != 10)
}

/// Whether the database has undone the step for the sake of others.
fn is_undone(error: &sqlx::Error) -> bool {
    let code = error.as_database_error().and_then(|error| error.code());
    // Serialization failure and deadlock.
    code.is_some_and(|code| matches!(&*code, "40001" | "40P01"))
}

/// A statement with its parameters.
fn bound<D>(statement: &Statement, parameters: &[Parameter<'_>]) -> Query<'static, D, D::Arguments>
where
    D: sqlx::Database,
    bool: for<'t> Encode<'t, D> + Type<D>,
    i64: for<'t> Encode<'t, D> + Type<D>,
    for<'a> &'a [u8]: Encode<'a, D> + Type<D>,
    for<'a> Option<&'a [u8]>: Encode<'a, D> + Type<D>,
{
    // Made of constants and of the name of a table that was looked at.
    let query = sqlx::query(AssertSqlSafe(Arc::clone(&statement.sql)));
    parameters.iter().take(statement.parameters).fold(query, |query, parameter| match *parameter {
        Parameter::Bytes(bytes) => query.bind(bytes),
        Parameter::Flag(flag) => query.bind(flag),
        Parameter::Number(number) => query.bind(number),
        Parameter::OptionalBytes(bytes) => query.bind(bytes),
    })
}

/// How a database is asked on connections of a pool, which takes them back in tasks. The client has no trait for how many rows a
/// statement has changed.
macro_rules! asks_its_pool {
    () => {
        async fn write(&self, statement: &Statement, parameters: &[Parameter<'_>]) -> Answer<u32> {
            let query = super::bound(statement, parameters);
            if statement.returns {
                // To its end, not to its first row: SQLite commits, and says whether it could, after the last.
                return cleared_behind(query.fetch_all(&self.pool)).await?.first().map(attempt).transpose();
            }
            let done = cleared_behind(query.execute(&self.pool)).await?;
            Ok((done.rows_affected() > 0).then_some(FIRST))
        }

        async fn read(&self, statement: &Statement, parameters: &[Parameter<'_>]) -> Answer<Row> {
            let query = super::bound(statement, parameters);
            cleared_behind(query.fetch_all(&self.pool)).await?.first().map(Row::read).transpose()
        }
    };
}
use asks_its_pool;

/// The trait of stores by the steps that they share.
macro_rules! store_by_steps {
    ($store:ident) => {
        impl Store for $store {
            async fn claim(&self, key: &Key, claim: &Claim) -> Result<Claimed, StoreError> {
                steps::claim(self, key, claim).await
            }

            async fn renew(&self, key: &Key, claim: &Claim) -> Result<Hold, StoreError> {
                steps::renew(self, key, claim).await
            }

            async fn complete(&self, key: &Key, claim: &Claim, record: Bytes) -> Result<Hold, StoreError> {
                steps::complete(self, key, claim, &record).await
            }

            async fn release(&self, key: &Key, claim: &Claim, remember: Duration) -> Result<Hold, StoreError> {
                steps::release(self, key, claim, remember).await
            }

            async fn lookup(&self, key: &Key) -> Result<Option<Entry>, StoreError> {
                steps::lookup(self, key).await
            }

            async fn forget(&self, key: &Key, force: bool) -> Result<Forgotten, StoreError> {
                steps::forget(self, key, force).await
            }

            fn failure_domain(&self, _: &Key) -> u16 {
                0
            }

            async fn changed(&self, key: &Key) {
                Database::changed(self, key).await
            }
        }
    };
}
use store_by_steps;

// === impl Contended ===

impl fmt::Display for Contended {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("too many claims of one key at once")
    }
}

impl std::error::Error for Contended {}
