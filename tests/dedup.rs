//! The row in the transaction that makes the effect: once, whatever becomes of the store or of the lease.

#![allow(clippy::expect_used, clippy::unwrap_used, reason = "a test panics where it fails")]

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use futures_util::future::join_all;
use futures_util::join;
use sqlx::postgres::{PgConnectOptions, PgPool, PgPoolOptions};
use sqlx::sqlite::{SqliteConnectOptions, SqlitePool};
use sqlx::{AssertSqlSafe, Postgres, Sqlite};
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout};
use tower_idempotency::key::header;
use tower_idempotency::store::{Dedup, Recorded};
use tower_idempotency::{Attempt, IdempotencyLayer, Ledger, MemoryStore, caller};

use common::app::{App, answer, attempt, event, key_of, order};
use common::postgres::PostgresServer;
use common::scratch::Scratch;

fn ledger() -> Ledger {
    Ledger::new(MemoryStore::new())
}

fn webhook(ledger: &Ledger) -> IdempotencyLayer {
    IdempotencyLayer::webhook(ledger, header("X-Id"))
}

/// Attempts of one event, of as many processes that know nothing of each other: as if each lease had run out.
async fn attempts<const N: usize>(layers: [IdempotencyLayer; N]) -> [Attempt; N] {
    let (sender, mut receiver) = mpsc::unbounded_channel();
    for layer in layers {
        let sender = sender.clone();
        let app = App::new(&layer, move |request, _| {
            sender.send(attempt(&request)).unwrap();
            async { answer(200, "") }
        });
        app.send(event("e")).await;
    }
    let mut attempts = Vec::new();
    while attempts.len() < N {
        attempts.push(receiver.recv().await.unwrap());
    }
    attempts.try_into().ok().unwrap()
}

struct Postgresql {
    pool: PgPool,
    dedup: Dedup<Postgres>,
    effects: String,
    _server: Arc<PostgresServer>,
}

impl Postgresql {
    async fn new() -> Self {
        let server = PostgresServer::shared();
        let pool = server.pool().await;
        let name = format!("effects_{:016x}", rand::random::<u64>());
        let dedup = Dedup::<Postgres>::new().table(&format!("seen_{name}")).unwrap();
        let schema = format!("{} CREATE TABLE {name} (n bigint)", dedup.schema());
        sqlx::raw_sql(AssertSqlSafe(schema)).execute(&pool).await.unwrap();
        Self { pool, dedup, effects: name, _server: server }
    }

    async fn at(&self, level: &'static str) -> PgPool {
        let options = (*self.pool.connect_options()).clone();
        let options: PgConnectOptions = options.options([("default_transaction_isolation", level)]);
        PgPoolOptions::new().max_connections(4).connect_with(options).await.unwrap()
    }

    async fn effects(&self) -> i64 {
        sqlx::query_scalar(AssertSqlSafe(format!("SELECT count(*) FROM {}", self.effects)))
            .fetch_one(&self.pool)
            .await
            .unwrap()
    }

    fn effect(&self) -> AssertSqlSafe<String> {
        AssertSqlSafe(format!("INSERT INTO {} VALUES (1)", self.effects))
    }
}

async fn file() -> (SqlitePool, Dedup<Sqlite>, Scratch) {
    let dir = Scratch::new();
    let options = SqliteConnectOptions::new().filename(dir.path().join("shop.db")).create_if_missing(true);
    let options = options.journal_mode(sqlx::sqlite::SqliteJournalMode::Wal);
    let pool = SqlitePool::connect_with(options).await.unwrap();
    let dedup = Dedup::<Sqlite>::new();
    let schema = format!("{} CREATE TABLE effects (n INTEGER)", dedup.schema());
    sqlx::raw_sql(AssertSqlSafe(schema)).execute(&pool).await.unwrap();
    (pool, dedup, dir)
}

#[tokio::test]
async fn a_run_that_the_store_has_forgotten_makes_no_second_effect_on_postgres() {
    let db = Arc::new(Postgresql::new().await);
    let (ledger, fails) = (ledger(), Arc::new(AtomicBool::new(true)));
    let layers = [webhook(&ledger), IdempotencyLayer::api(&ledger, caller::shared())];
    for (layer, request, status) in [(&layers[0], "webhook", 200), (&layers[1], "api", 409)] {
        fails.store(true, Ordering::SeqCst);
        let (inner, failing) = (Arc::clone(&db), Arc::clone(&fails));
        let app = App::new(layer, move |request, _| {
            let (db, attempt, fails) = (Arc::clone(&inner), attempt(&request), Arc::clone(&failing));
            async move {
                let mut transaction = db.pool.begin().await?;
                let recorded = db.dedup.record(&mut transaction, &attempt).await?;
                if recorded == Recorded::First {
                    sqlx::query(db.effect()).execute(&mut *transaction).await?;
                    if fails.swap(false, Ordering::SeqCst) {
                        return answer(500, "rolled back");
                    }
                    transaction.commit().await?;
                }
                answer(200, "invoiced")
            }
        });
        let request = || if request == "api" { order("k", "1") } else { event("e") };
        let before = db.effects().await;
        assert_eq!(app.send(request()).await.status, 500);
        assert_eq!(db.effects().await, before, "what was rolled back has not happened");
        assert_eq!(app.send(request()).await.body, "invoiced");
        // The process dies between the commit and the record of it.
        ledger.forget(&key_of(layer, request()), true).await.unwrap();
        assert_eq!(app.send(request()).await.status, status);
        assert_eq!(app.send(request()).await.status, status);
        assert_eq!((app.runs(), db.effects().await), (3, before + 1));
    }
}

#[tokio::test]
async fn a_run_that_the_store_has_forgotten_makes_no_second_effect_on_sqlite() {
    let (pool, dedup, _dir) = file().await;
    let ledger = ledger();
    let layer = webhook(&ledger);
    let inner = pool.clone();
    let app = App::new(&layer, move |request, _| {
        let (pool, dedup, attempt) = (inner.clone(), dedup.clone(), attempt(&request));
        async move {
            let mut transaction = pool.begin().await?;
            if dedup.record(&mut transaction, &attempt).await? == Recorded::First {
                sqlx::query("INSERT INTO effects VALUES (1)").execute(&mut *transaction).await?;
                transaction.commit().await?;
            }
            answer(200, "invoiced")
        }
    });
    assert_eq!(app.send(event("e")).await.body, "invoiced");
    ledger.forget(&key_of(&layer, event("e")), true).await.unwrap();
    let again = app.send(event("e")).await;
    assert_eq!((again.status.as_u16(), &again.body[..]), (200, &b""[..]));
    let effects: i64 = sqlx::query_scalar("SELECT count(*) FROM effects").fetch_one(&pool).await.unwrap();
    assert_eq!((app.runs(), effects), (2, 1));
}

/// What a handler has in its own tables it can tell again.
#[tokio::test]
async fn an_outcome_may_be_rebuilt() {
    let (pool, dedup, _dir) = file().await;
    let (ledger, dedup) = (ledger(), dedup.outcomes_are_rebuilt());
    let layer = IdempotencyLayer::api(&ledger, caller::shared());
    let app = App::new(&layer, move |request, _| {
        let (pool, dedup, attempt) = (pool.clone(), dedup.clone(), attempt(&request));
        async move {
            let mut transaction = pool.begin().await?;
            dedup.record(&mut transaction, &attempt).await?;
            transaction.commit().await?;
            answer(201, "order 1")
        }
    });
    for _ in 0..2 {
        assert_eq!(app.send(order("k", "1")).await.body, "order 1");
        let replay = app.send(order("k", "1")).await;
        assert!(replay.is_replayed() && replay.body == "order 1");
        ledger.forget(&key_of(&layer, order("k", "1")), true).await.unwrap();
    }
    assert_eq!(app.runs(), 2);
}

#[tokio::test]
async fn one_of_many_attempts_is_first_at_every_level_of_isolation() {
    let db = Postgresql::new().await;
    for level in ["read committed", "repeatable read", "serializable"] {
        let pool = db.at(level).await;
        let attempts = attempts([(); 8].map(|()| webhook(&ledger()).scope(move |_| Some(level)))).await;
        let recorded = join_all(attempts.iter().map(async |attempt| {
            let mut transaction = pool.begin().await?;
            let recorded = db.dedup.record(&mut transaction, attempt).await?;
            transaction.commit().await?;
            Ok::<_, sqlx::Error>(recorded)
        }));
        let recorded = recorded.await;
        let first = recorded.iter().filter(|recorded| matches!(recorded, Ok(Recorded::First)));
        assert_eq!(first.count(), 1, "{level}: {recorded:?}");
        for error in recorded.iter().filter_map(|recorded| recorded.as_ref().err()) {
            assert_ne!(level, "read committed", "{error}");
            assert_eq!(error.as_database_error().and_then(|error| error.code()).as_deref(), Some("40001"));
        }
        // Whoever comes later finds it, at each level.
        let mut transaction = pool.begin().await.unwrap();
        assert_eq!(db.dedup.record(&mut transaction, &attempts[0]).await.unwrap(), Recorded::Already);
    }
}

#[tokio::test]
async fn a_row_that_was_committed_after_a_snapshot_is_an_error_and_not_a_second_effect() {
    let db = Postgresql::new().await;
    for level in ["repeatable read", "serializable"] {
        let pool = db.at(level).await;
        let [one, other] = attempts([(); 2].map(|()| webhook(&ledger()).scope(move |_| Some(level)))).await;
        let mut late = pool.begin().await.unwrap();
        db.effects().await;
        sqlx::query("SELECT 1 FROM pg_class").execute(&mut *late).await.unwrap();
        let mut first = pool.begin().await.unwrap();
        assert_eq!(db.dedup.record(&mut first, &one).await.unwrap(), Recorded::First);
        first.commit().await.unwrap();
        let error = db.dedup.record(&mut late, &other).await.unwrap_err();
        assert_eq!(error.as_database_error().unwrap().code().unwrap(), "40001", "{level}");
    }
}

#[tokio::test]
async fn the_second_waits_for_the_first_and_takes_its_place_if_it_is_undone() {
    let db = Postgresql::new().await;
    for commits in [true, false] {
        let [one, other] =
            attempts([(); 2].map(|()| webhook(&ledger()).scope(move |_| Some(commits.to_string())))).await;
        let (mut first, mut second) = (db.pool.begin().await.unwrap(), db.pool.begin().await.unwrap());
        assert_eq!(db.dedup.record(&mut first, &one).await.unwrap(), Recorded::First);
        let waits = db.dedup.record(&mut second, &other);
        let ends = async {
            tokio::time::sleep(Duration::from_millis(100)).await;
            if commits { first.commit().await } else { first.rollback().await }
        };
        let (recorded, ended) = join!(waits, ends);
        ended.unwrap();
        assert_eq!(recorded.unwrap(), if commits { Recorded::Already } else { Recorded::First });
    }
}

#[tokio::test]
async fn a_first_that_is_frozen_holds_up_nobody_for_ever() {
    let db = Postgresql::new().await;
    let dedup = db.dedup.clone().lock_timeout(Duration::from_millis(100));
    let [one, other] = attempts([(); 2].map(|()| webhook(&ledger()))).await;
    let mut frozen = db.pool.begin().await.unwrap();
    sqlx::query("SET LOCAL lock_timeout = '7s'").execute(&mut *frozen).await.unwrap();
    assert_eq!(dedup.record(&mut frozen, &one).await.unwrap(), Recorded::First);
    let setting: String = sqlx::query_scalar("SHOW lock_timeout").fetch_one(&mut *frozen).await.unwrap();
    assert_eq!(setting, "7s", "what is the handler's stays");
    let mut second = db.pool.begin().await.unwrap();
    let before = Instant::now();
    let refused = timeout(Duration::from_secs(5), dedup.record(&mut second, &other)).await.unwrap().unwrap_err();
    assert_eq!(refused.as_database_error().unwrap().code().unwrap(), "55P03");
    assert!(before.elapsed() < Duration::from_secs(2));
    // For as long as PostgreSQL can wait.
    let mut patient = db.pool.begin().await.unwrap();
    let dedup = db.dedup.clone().lock_timeout(Duration::MAX);
    let third = attempts([webhook(&ledger()).scope(|_| Some("another"))]).await;
    assert_eq!(dedup.record(&mut patient, &third[0]).await.unwrap(), Recorded::First);
}

#[tokio::test]
async fn a_deferred_transaction_that_has_read_cannot_write_behind_another() {
    let (pool, dedup, _dir) = file().await;
    let [one, other] = attempts([(); 2].map(|()| webhook(&ledger()))).await;
    let mut late = pool.begin().await.unwrap();
    sqlx::query("SELECT count(*) FROM effects").fetch_one(&mut *late).await.unwrap();
    let mut first = pool.begin().await.unwrap();
    assert_eq!(dedup.record(&mut first, &one).await.unwrap(), Recorded::First);
    first.commit().await.unwrap();
    let error = dedup.record(&mut late, &other).await.unwrap_err();
    assert_eq!(error.as_database_error().unwrap().code().unwrap(), "517", "SQLITE_BUSY_SNAPSHOT");
    late.rollback().await.unwrap();
    let mut again = pool.begin_with("BEGIN IMMEDIATE").await.unwrap();
    assert_eq!(dedup.record(&mut again, &other).await.unwrap(), Recorded::Already);
}

#[tokio::test]
async fn a_row_under_the_secret_before_counts() {
    const OLD: &str = "the secret of last year";
    let (pool, dedup, _dir) = file().await;
    let old = webhook(&ledger()).secret(OLD);
    let both = webhook(&ledger()).secret("the secret of this year").previous_secret(OLD);
    let [before, now] = attempts([old, both.clone()]).await;
    let mut transaction = pool.begin().await.unwrap();
    assert_eq!(dedup.record(&mut transaction, &before).await.unwrap(), Recorded::First);
    assert_eq!(dedup.record(&mut transaction, &now).await.unwrap(), Recorded::Already);
    transaction.rollback().await.unwrap();
    let mut transaction = pool.begin().await.unwrap();
    assert_eq!(dedup.record(&mut transaction, &now).await.unwrap(), Recorded::First);
    assert_eq!(dedup.record(&mut transaction, &before).await.unwrap(), Recorded::Already);
}

#[tokio::test]
async fn another_client_says_the_same_and_rows_are_kept_no_longer_than_they_are() {
    let (pool, dedup, dir) = file().await;
    let dedup = dedup.keep(Duration::from_millis(1));
    let [attempt] = attempts([webhook(&ledger())]).await;
    let connection = rusqlite::Connection::open(dir.path().join("shop.db")).unwrap();
    let insert = || connection.execute(&dedup.statement(), [attempt.key().as_bytes()]).unwrap();
    assert_eq!((insert(), insert()), (1, 0));
    let mut transaction = pool.begin().await.unwrap();
    assert_eq!(dedup.record(&mut transaction, &attempt).await.unwrap(), Recorded::Already);
    transaction.rollback().await.unwrap();
    tokio::time::sleep(Duration::from_millis(20)).await;
    assert_eq!(connection.execute(&dedup.sweep(), [10]).unwrap(), 1);
    assert_eq!(insert(), 1);
}

/// To look at all rows for the few that have expired costs more than everything else together.
#[tokio::test]
async fn what_has_expired_is_found_by_an_index() {
    let db = Postgresql::new().await;
    let seen = format!("seen_{}", db.effects);
    let rows = "SELECT sha256(n::text::bytea), 99999999999999 + n FROM generate_series(1, 5000) n";
    let fill = format!("INSERT INTO {seen} {rows}; ANALYZE {seen}");
    sqlx::raw_sql(AssertSqlSafe(fill)).execute(&db.pool).await.unwrap();
    let explain = format!("EXPLAIN {}", db.dedup.sweep().replace("$1", "16"));
    let plan: Vec<String> = sqlx::query_scalar(AssertSqlSafe(explain)).fetch_all(&db.pool).await.unwrap();
    assert!(plan.iter().any(|line| line.contains("Index Cond: (expires_at <=")), "{plan:#?}");
    assert!(!plan.iter().any(|line| line.contains("Seq Scan")), "{plan:#?}");

    let (pool, dedup, _dir) = file().await;
    let explain = format!("EXPLAIN QUERY PLAN {}", dedup.sweep().replace("$1", "16"));
    let plan: Vec<(i64, i64, i64, String)> = sqlx::query_as(AssertSqlSafe(explain)).fetch_all(&pool).await.unwrap();
    assert!(plan.iter().any(|(_, _, _, step)| step.contains("(expires_at<?)")), "{plan:#?}");
    assert!(!plan.iter().any(|(_, _, _, step)| step.starts_with("SCAN idempotency")), "{plan:#?}");
}
