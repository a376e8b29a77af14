//! What the stores in SQL databases share: one row per key, one statement to change it, the database's clock.
//!
//! Each step writes by an `INSERT … ON CONFLICT DO UPDATE … WHERE`, which takes effect only where the state of the row allows it, and
//! where it did not, reads the row to say why. What is read may be newer than what the write met, and allow it after all: then
//! it says nothing, and the step is tried again.

pub(super) mod dedup;
#[cfg(feature = "postgres")]
mod listen;
#[cfg(feature = "postgres")]
pub mod postgres;
#[cfg(feature = "sqlite")]
pub mod sqlite;
mod statements;
mod steps;

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use sqlx::error::DatabaseError;
use sqlx::query::Query;
use sqlx::{AssertSqlSafe, ColumnIndex, Decode, Encode, Executor, IntoArguments, Pool, Type};
use tokio::time::timeout;

use self::statements::Statements;
use super::{Claim, Claimed, Entry, Forgotten, Hold, State, StoreError};
use crate::fingerprint::Fingerprint;
use crate::key::Key;

/// A database as a store speaks to it.
trait Database: Send + Sync + 'static {
    /// Whether a claim looks at the row before it tries to take it.
    const READS_FIRST: bool;

    fn statements(&self) -> &Statements;

    /// The row that a statement writes or reads, if there is one.
    fn query(
        &self,
        sql: &Arc<str>,
        parameters: &[Parameter<'_>],
    ) -> impl Future<Output = Result<Option<Row>, sqlx::Error>> + Send;

    /// Returns when the key may have changed. See [`Store::changed`](super::Store::changed).
    fn changed(&self, key: &Key) -> impl Future<Output = ()> + Send;

    /// Removes some expired rows in the background, unless that is going on.
    fn sweep_now_and_then(&self);
}

#[derive(Clone, Copy)]
enum Parameter<'a> {
    Bytes(&'a [u8]),
    Flag(bool),
    Number(i64),
    OptionalBytes(Option<&'a [u8]>),
}

/// How many expired rows are removed at once, how long that may take, and after how many new keys it is done.
const SWEEP: u32 = 256;
const SWEEP_TIMEOUT: Duration = Duration::from_secs(5);
const SWEEP_AFTER: usize = 64;

/// The longest name of a table, in bytes, that leaves room for the name of its index: PostgreSQL cuts off what is over 63.
const MAX_NAME: usize = 52;

/// What a step has found under the key, or has made of it.
struct Row {
    /// It was written by this step.
    wrote: bool,
    attempt: u32,
    phase: Phase,
    /// The claim that asks has it, or had it last.
    is_mine: bool,
    fingerprint: Option<Fingerprint>,
    forgotten: bool,
    lease_left: Duration,
    expires_in: Duration,
    record: Bytes,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Phase {
    Done,
    Free,
    Running,
}

/// Others were faster each time.
#[derive(Debug)]
struct Contended;

/// A row that none of these stores has written.
#[derive(Debug)]
struct Unreadable(&'static str);

/// A name that a table cannot have here.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct InvalidTable(());

/// Has expired rows removed by the tasks that make new ones, one at a time.
#[derive(Debug, Default)]
struct Sweeper {
    new_keys: AtomicUsize,
    is_sweeping: AtomicBool,
}

/// That somebody sweeps, also where its task is dropped.
struct Sweeping(Arc<Sweeper>);

/// What a step's row means, if it is not outdated.
type Meaning<T> = Option<T>;

// === impl Row ===

impl Row {
    /// Reads the columns that every step names.
    fn read<R>(row: &R) -> Result<Self, sqlx::Error>
    where
        R: sqlx::Row,
        for<'a> &'a str: ColumnIndex<R>,
        bool: for<'r> Decode<'r, R::Database> + Type<R::Database>,
        i64: for<'r> Decode<'r, R::Database> + Type<R::Database>,
        Vec<u8>: for<'r> Decode<'r, R::Database> + Type<R::Database>,
    {
        let unreadable = |error: Unreadable| sqlx::Error::Decode(error.into());
        let wrote = row.try_get("wrote")?;
        let phase = Phase::of(row.try_get("state")?).map_err(unreadable)?;
        let record: Option<Vec<u8>> = row.try_get("record")?;
        // What has been written is written, whatever stood there.
        let fingerprint = if wrote { None } else { row.try_get("fingerprint")? };
        if phase == Phase::Done && record.is_none() && !wrote {
            return Err(unreadable(Unreadable("an outcome without a record")));
        }
        Ok(Self {
            wrote,
            attempt: u32::try_from(row.try_get::<i64, _>("attempt")?).unwrap_or(u32::MAX),
            phase,
            is_mine: row.try_get("mine")?,
            fingerprint: read_fingerprint(fingerprint).map_err(unreadable)?,
            forgotten: row.try_get("forgotten")?,
            lease_left: left(row.try_get("lease_left")?),
            expires_in: left(row.try_get("expires_in")?),
            record: record.unwrap_or_default().into(),
        })
    }

    /// What came of a claim.
    fn claimed(self, claim: &Claim) -> Meaning<Claimed> {
        let (attempt, fingerprint) = (self.attempt, self.fingerprint);
        if self.wrote {
            return Some(Claimed::Acquired { attempt });
        }
        if self.expires_in.is_zero() {
            return None;
        }
        match self.phase {
            Phase::Running if self.is_mine => Some(Claimed::Acquired { attempt }),
            _ if claim.refuse_other && !self.forgotten && fingerprint != claim.fingerprint => Some(Claimed::Mismatch),
            Phase::Done => Some(Claimed::Done { fingerprint, record: self.record }),
            // Its own claim, released: this sending of it is late.
            Phase::Free if self.is_mine => Some(Claimed::Running { fingerprint, lease_left: Duration::ZERO }),
            Phase::Running if !self.lease_left.is_zero() => {
                Some(Claimed::Running { fingerprint, lease_left: self.lease_left })
            }
            Phase::Free | Phase::Running => None,
        }
    }

    /// Whether a claim that was renewed, completed or released still has the key. It has, too, where the step has already led
    /// to where it leads, or a renewal has nothing to do any more.
    fn hold(&self, held: Phase) -> Meaning<Hold> {
        match self.phase {
            _ if self.wrote => Some(Hold::Held),
            _ if self.expires_in.is_zero() => None,
            _ if !self.is_mine => Some(Hold::Lost),
            Phase::Running => None,
            phase if phase == held => Some(Hold::Held),
            Phase::Done | Phase::Free => Some(Hold::Lost),
        }
    }

    fn forgotten(&self) -> Meaning<Forgotten> {
        if self.wrote {
            return Some(Forgotten::Forgotten);
        }
        if self.expires_in.is_zero() {
            return Some(Forgotten::Absent);
        }
        (self.phase == Phase::Running && !self.lease_left.is_zero()).then_some(Forgotten::Running)
    }

    fn entry(self) -> Option<Entry> {
        let state = match self.phase {
            Phase::Done => State::Done(self.record),
            Phase::Free => State::Free,
            Phase::Running => State::Running,
        };
        (!self.expires_in.is_zero()).then(|| Entry::new(state, self.attempt, self.fingerprint, self.expires_in))
    }
}

// === impl Phase ===

impl Phase {
    const fn number(self) -> i64 {
        match self {
            Self::Free => 0,
            Self::Running => 1,
            Self::Done => 2,
        }
    }

    fn of(number: i64) -> Result<Self, Unreadable> {
        match number {
            0 => Ok(Self::Free),
            1 => Ok(Self::Running),
            2 => Ok(Self::Done),
            _ => Err(Unreadable("a state that there is not")),
        }
    }
}

fn millis(duration: Duration) -> i64 {
    i64::try_from(duration.as_millis()).unwrap_or(i64::MAX)
}

/// What is left of a time, none where it is over.
fn left(millis: i64) -> Duration {
    Duration::from_millis(u64::try_from(millis).unwrap_or(0))
}

fn read_fingerprint(bytes: Option<Vec<u8>>) -> Result<Option<Fingerprint>, Unreadable> {
    let whole = |bytes: Vec<u8>| bytes.try_into().map_err(|_| Unreadable("a fingerprint of another length"));
    Ok(bytes.map(whole).transpose()?.map(Fingerprint::from_bytes))
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

async fn queried<D>(pool: &Pool<D>, sql: &Arc<str>, parameters: &[Parameter<'_>]) -> Result<Option<Row>, sqlx::Error>
where
    D: sqlx::Database,
    D::Arguments: IntoArguments<D>,
    for<'c> &'c Pool<D>: Executor<'c, Database = D>,
    for<'a> &'a str: ColumnIndex<D::Row>,
    bool: for<'t> Encode<'t, D> + for<'r> Decode<'r, D> + Type<D>,
    i64: for<'t> Encode<'t, D> + for<'r> Decode<'r, D> + Type<D>,
    Vec<u8>: for<'r> Decode<'r, D> + Type<D>,
    for<'a> &'a [u8]: Encode<'a, D> + Type<D>,
    for<'a> Option<&'a [u8]>: Encode<'a, D> + Type<D>,
{
    // To its end, not to its first row: SQLite commits, and says whether it could, after the last.
    bound(sql, parameters).fetch_all(pool).await?.first().map(Row::read).transpose()
}

/// A statement with its parameters.
fn bound<D>(sql: &Arc<str>, parameters: &[Parameter<'_>]) -> Query<'static, D, D::Arguments>
where
    D: sqlx::Database,
    bool: for<'t> Encode<'t, D> + Type<D>,
    i64: for<'t> Encode<'t, D> + Type<D>,
    for<'a> &'a [u8]: Encode<'a, D> + Type<D>,
    for<'a> Option<&'a [u8]>: Encode<'a, D> + Type<D>,
{
    // Made of constants and of the name of a table that was looked at.
    let query = sqlx::query(AssertSqlSafe(Arc::clone(sql)));
    parameters.iter().fold(query, |query, parameter| match *parameter {
        Parameter::Bytes(bytes) => query.bind(bytes),
        Parameter::Flag(flag) => query.bind(flag),
        Parameter::Number(number) => query.bind(number),
        Parameter::OptionalBytes(bytes) => query.bind(bytes),
    })
}

/// A name as it can stand in a statement, where there is no way to make it a parameter.
fn quoted(name: &str) -> String {
    let words: Vec<String> = name.split('.').map(|word| format!("\"{word}\"")).collect();
    words.join(".")
}

fn table_name(name: &str) -> Result<String, InvalidTable> {
    let is_word = |word: &str| {
        let is_letter = |byte: u8| byte.is_ascii_alphabetic() || byte == b'_';
        (1..=MAX_NAME).contains(&word.len())
            && word.bytes().all(|byte| is_letter(byte) || byte.is_ascii_digit())
            && word.bytes().next().is_some_and(is_letter)
    };
    let mut words = name.split('.');
    let is_name = words.clone().count() <= 2 && words.all(is_word);
    is_name.then(|| name.to_owned()).ok_or(InvalidTable(()))
}

/// Fills in a schema whose indexes are where their tables are.
#[cfg(feature = "postgres")]
fn with_index(schema: &str, table: &str) -> String {
    let bare = table.split_once('.').map_or(table, |(_, bare)| bare);
    schema.replace("{table}", &quoted(table)).replace("{index}", &quoted(&format!("{bare}_expires_at")))
}

/// The same for SQLite, where an index is named with its database and names its table without.
#[cfg(feature = "sqlite")]
fn with_index_of_database(schema: &str, table: &str) -> String {
    let bare = table.split_once('.').map_or(table, |(_, bare)| bare);
    let index = quoted(&format!("{table}_expires_at"));
    schema.replace("{table}", &quoted(table)).replace("{index}", &index).replace("{bare}", &quoted(bare))
}

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

// === impl Sweeper ===

impl Sweeper {
    fn run_now_and_then<F>(self: &Arc<Self>, sweep: impl FnOnce() -> F)
    where
        F: Future<Output = Result<u64, StoreError>> + Send + 'static,
    {
        let is_due = self.new_keys.fetch_add(1, Ordering::Relaxed) % SWEEP_AFTER == SWEEP_AFTER - 1;
        if is_due && !self.is_sweeping.swap(true, Ordering::Acquire) {
            let (sweep, sweeping) = (sweep(), Sweeping(Arc::clone(self)));
            tokio::spawn(async move {
                let _sweeping = sweeping;
                // What was not removed now is removed later.
                let _ = timeout(SWEEP_TIMEOUT, sweep).await;
            });
        }
    }
}

impl Drop for Sweeping {
    fn drop(&mut self) {
        self.0.is_sweeping.store(false, Ordering::Release);
    }
}

// === impl InvalidTable ===

impl fmt::Display for InvalidTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("not the name of a table")
    }
}

impl std::error::Error for InvalidTable {}

// === impl Contended and Unreadable ===

impl fmt::Display for Contended {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("too many claims of one key at once")
    }
}

impl std::error::Error for Contended {}

impl fmt::Display for Unreadable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0)
    }
}

impl std::error::Error for Unreadable {}
