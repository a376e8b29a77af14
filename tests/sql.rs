//! The stores in databases: what is theirs alone. That they keep the promises of all stores is tried in `stores.rs` and
//! `promises.rs`.

#![allow(clippy::expect_used, clippy::unwrap_used, reason = "a test panics where it fails")]

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use futures_util::future::join_all;
use sqlx::postgres::{PgPool, PgPoolOptions};
use sqlx::{AssertSqlSafe, Connection as _, PgConnection, SqliteConnection};
use tokio::time::{Instant, sleep, timeout};
use tower_idempotency::key::{Key, header};
use tower_idempotency::store::{Claim, Claimed, Hold, State, Store};
use tower_idempotency::{IdempotencyLayer, Ledger, PostgresStore, SqliteStore};

use common::app::{App, answer, event};
use common::postgres::PostgresServer;
use common::scratch::Scratch;
use common::until;

const LONG: Duration = Duration::from_secs(60);
const BLINK: Duration = Duration::from_millis(1);

fn key() -> Key {
    Key::from(rand::random::<[u8; 24]>())
}

async fn file() -> (SqliteStore, Scratch) {
    let dir = Scratch::new();
    (SqliteStore::open(dir.path().join("store.db")).await.unwrap(), dir)
}

async fn acquire(store: &impl Store, key: &Key, claim: Claim) -> Claim {
    let mut claim = claim;
    let Claimed::Acquired { attempt } = store.claim(key, &claim).await.unwrap() else { panic!("not acquired") };
    claim.attempt = attempt;
    claim
}

/// A hundred deliveries of one event at once, to three processes with a store each.
async fn one_of_a_hundred_runs<S: Store>(stores: [S; 3]) {
    let apps = stores.map(|store| {
        let layer =
            IdempotencyLayer::webhook(&Ledger::new(store).store_timeout(Duration::from_secs(5)), header("X-Id"));
        App::new(&layer.patience(LONG), |_, _| async {
            sleep(Duration::from_millis(50)).await;
            answer(200, format!("run {}", rand::random::<u64>()))
        })
    });
    let answers = join_all((0..100).map(|number| apps[number % 3].send(event("e")))).await;
    assert_eq!(apps.iter().map(App::runs).sum::<u32>(), 1);
    assert!(answers.iter().all(|answer| answer.status == 200 && answer.body == answers[0].body), "{answers:?}");
}

#[tokio::test]
async fn one_of_a_hundred_deliveries_to_three_processes_runs_on_postgres() {
    let server = PostgresServer::shared();
    let store = server.store().await;
    let other = || async { PostgresStore::new(server.pool().await).table(store.table_name()).unwrap() };
    one_of_a_hundred_runs([store.clone(), other().await, other().await]).await;
}

#[tokio::test]
async fn one_of_a_hundred_deliveries_to_three_processes_runs_on_sqlite() {
    let (store, dir) = file().await;
    let other = || SqliteStore::open(dir.path().join("store.db"));
    one_of_a_hundred_runs([store, other().await.unwrap(), other().await.unwrap()]).await;
}

/// Whoever has set it for all of a database's transactions has set it for these.
#[tokio::test]
async fn races_are_decided_at_every_level_of_isolation() {
    let server = PostgresServer::shared();
    let made = server.store().await;
    for level in ["read committed", "repeatable read", "serializable"] {
        let options = server.url().parse::<sqlx::postgres::PgConnectOptions>().unwrap();
        let options = options.options([("default_transaction_isolation", level)]);
        let pool = PgPoolOptions::new().max_connections(16).connect_with(options).await.unwrap();
        let store = PostgresStore::new(pool).table(made.table_name()).unwrap();
        for _ in 0..8 {
            let key = key();
            let crashed = acquire(&store, &key, Claim::new(BLINK, LONG)).await;
            sleep(BLINK * 5).await;
            let claims: Vec<Claim> = (0..16).map(|_| Claim::new(LONG, LONG)).collect();
            let claimed = join_all(claims.iter().map(|claim| store.claim(&key, claim))).await;
            let acquired = claimed.iter().filter(|claimed| matches!(claimed, Ok(Claimed::Acquired { attempt: 2 })));
            assert_eq!(acquired.count(), 1, "{level}: {claimed:?}");
            let refused = |error: &tower_idempotency::store::StoreError| error.is_definite();
            assert!(claimed.iter().filter_map(|claimed| claimed.as_ref().err()).all(refused), "{level}: {claimed:?}");
            assert_eq!(store.renew(&key, &crashed).await.unwrap(), Hold::Lost);
        }
    }
}

/// As where an operator looks at it in a transaction and goes to lunch.
/// On connections of the store's own, and on others that have no bound on their waits.
#[tokio::test]
async fn a_row_that_is_locked_holds_up_its_own_event_alone() {
    let server = PostgresServer::shared();
    let own = server.store().await;
    let others = PostgresStore::new(server.pool().await).table(own.table_name()).unwrap();
    let mut operator = PgConnection::connect(&server.url()).await.unwrap();
    for store in [own, others] {
        let ledger = Ledger::new(store.clone());
        let layer = IdempotencyLayer::webhook(&ledger, header("X-Id"));
        let fails = Arc::new(AtomicBool::new(true));
        let failing = Arc::clone(&fails);
        let app = App::new(&layer, move |_, _| {
            let status = if failing.load(Ordering::SeqCst) { 500 } else { 200 };
            async move { answer(status, "done") }
        });
        let [failed, done] = [(); 2].map(|()| format!("{:x}", rand::random::<u64>()));
        assert_eq!(app.send(event(&failed)).await.status, 500);
        fails.store(false, Ordering::SeqCst);
        assert_eq!(app.send(event(&done)).await.status, 200);
        let mut transaction = operator.begin().await.unwrap();
        let lock = format!("SELECT * FROM {} FOR UPDATE", store.table_name());
        sqlx::query(AssertSqlSafe(lock)).fetch_all(&mut *transaction).await.unwrap();
        for _ in 0..6 {
            let before = Instant::now();
            assert_eq!(app.send(event(&failed)).await.code().as_deref(), Some("store_unavailable"));
            assert!(before.elapsed() < Duration::from_secs(1));
            assert!(app.send(event(&done)).await.is_replayed());
            let free = format!("{:x}", rand::random::<u64>());
            assert_eq!(app.send(event(&free)).await.status, 200);
        }
        transaction.rollback().await.unwrap();
        until(async || app.send(event(&failed)).await.status == 200).await;
    }
}

#[tokio::test]
async fn a_server_that_is_down_is_a_refusal_and_one_that_is_back_goes_on() {
    let mut server = PostgresServer::start();
    let store = server.store().await;
    let app =
        App::new(&IdempotencyLayer::webhook(&Ledger::new(store), header("X-Id")), |_, _| async { answer(200, "done") });
    assert_eq!(app.send(event("a")).await.status, 200);
    server.stop();
    for _ in 0..5 {
        let before = Instant::now();
        assert_eq!(app.send(event("b")).await.code().as_deref(), Some("store_unavailable"));
        assert!(before.elapsed() < Duration::from_secs(1), "{:?}", before.elapsed());
    }
    server.start_again();
    until(async || app.send(event("b")).await.status == 200).await;
    assert!(app.send(event("a")).await.is_replayed());
    assert_eq!(app.runs(), 2);
}

/// A call that is given up halfway leaves a connection that another can use.
#[tokio::test]
async fn calls_that_are_given_up_spoil_nothing() {
    let server = PostgresServer::shared();
    let made = server.store().await;
    let pool = PgPoolOptions::new().max_connections(2).connect(&server.url()).await.unwrap();
    let store = PostgresStore::new(pool).table(made.table_name()).unwrap();
    for round in 0..200 {
        let claim = Claim::new(LONG, LONG);
        let _ = timeout(Duration::from_micros(rand::random_range(0..2000)), store.claim(&key(), &claim)).await;
        if round % 20 == 0 {
            acquire(&store, &key(), Claim::new(LONG, LONG)).await;
        }
    }
    let key = key();
    let claim = acquire(&store, &key, Claim::new(LONG, LONG)).await;
    assert_eq!(store.complete(&key, &claim, "record".into()).await.unwrap(), Hold::Held);
    assert_eq!(store.lookup(&key).await.unwrap().unwrap().state, State::Done("record".into()));
}

async fn rows(pool: &PgPool, store: &PostgresStore) -> i64 {
    let count = format!("SELECT count(*) FROM {}", store.table_name());
    sqlx::query_scalar(AssertSqlSafe(count)).fetch_one(pool).await.unwrap()
}

#[tokio::test]
async fn what_has_expired_is_removed_and_nothing_else() {
    let server = PostgresServer::shared();
    let (postgres, pool) = (server.store().await, server.pool().await);
    let (sqlite, _dir) = file().await;
    for number in 0..20 {
        let life = if number < 5 { LONG } else { BLINK };
        acquire(&postgres, &key(), Claim::new(BLINK, life)).await;
        acquire(&sqlite, &key(), Claim::new(BLINK, life)).await;
    }
    sleep(BLINK * 50).await;
    assert_eq!((postgres.sweep(10).await.unwrap(), sqlite.sweep(10).await.unwrap()), (10, 10));
    assert_eq!((postgres.sweep(10).await.unwrap(), sqlite.sweep(10).await.unwrap()), (5, 5));
    assert_eq!((postgres.sweep(10).await.unwrap(), sqlite.sweep(10).await.unwrap()), (0, 0));
    assert_eq!(rows(&pool, &postgres).await, 5);
}

#[tokio::test]
async fn new_keys_make_room_for_themselves() {
    let server = PostgresServer::shared();
    let (store, pool) = (server.store().await, server.pool().await);
    for _ in 0..300 {
        acquire(&store, &key(), Claim::new(BLINK, BLINK)).await;
    }
    until(async || {
        acquire(&store, &key(), Claim::new(BLINK, BLINK)).await;
        rows(&pool, &store).await < 150
    })
    .await;
}

/// The row is touched by the end of an attempt and its index is not: an index that moves with every row costs a third.
#[tokio::test]
async fn the_end_of_an_attempt_leaves_the_index_alone() {
    let server = PostgresServer::shared();
    let (store, pool) = (server.store().await, server.pool().await);
    let table = store.table_name();
    let swept = format!("SELECT sweep_after, expires_at FROM {table}");
    let times = async || -> (i64, i64) { sqlx::query_as(AssertSqlSafe(swept.clone())).fetch_one(&pool).await.unwrap() };
    let key = key();
    let claim = acquire(&store, &key, Claim::new(LONG, LONG)).await;
    let (before, claimed) = times().await;
    assert!((before - claimed).abs() < 1000, "{before} {claimed}");
    store.complete(&key, &claim, "record".into()).await.unwrap();
    let (after, completed) = times().await;
    assert_eq!(after, before);
    assert!(completed < claimed && after - completed <= 60_000);
    // What is remembered for much shorter is looked for then.
    store.forget(&key, true).await.unwrap();
    let mut shorter = acquire(&store, &key, Claim::new(LONG, LONG)).await;
    shorter.retention = BLINK;
    assert_eq!(store.complete(&key, &shorter, "record".into()).await.unwrap(), Hold::Held);
    until(async || store.sweep(1).await.unwrap() == 1).await;
}

#[tokio::test]
async fn a_table_has_a_name_that_one_may_have() {
    let server = PostgresServer::shared();
    let pool = server.pool().await;
    sqlx::query("CREATE SCHEMA IF NOT EXISTS shop").execute(&pool).await.unwrap();
    let store = PostgresStore::new(pool.clone()).table("shop.seen_events").unwrap();
    join_all((0..8).map(|_| store.migrate())).await.into_iter().for_each(|made| made.unwrap());
    acquire(&store, &key(), Claim::new(LONG, LONG)).await;
    for name in ["order", "clock", "Wrote", "RETURNING", "x_23456789_123456789_123456789_123456789_123456789_1"] {
        let store = PostgresStore::new(pool.clone()).table(name).unwrap();
        store.migrate().await.unwrap();
        let key = key();
        let claim = acquire(&store, &key, Claim::new(LONG, LONG)).await;
        assert_eq!(store.renew(&key, &claim).await.unwrap(), Hold::Held);
        let indexes = "SELECT count(*) FROM pg_indexes WHERE tablename = $1";
        let indexes: i64 = sqlx::query_scalar(indexes).bind(name).fetch_one(&pool).await.unwrap();
        assert_eq!(indexes, 2, "{name}");
    }
    let longest = "a".repeat(52);
    assert!(PostgresStore::new(pool.clone()).table(&longest).is_ok());
    for name in ["", ".", "a.", ".a", "a.b.c", "a b", "a;", "a\"", "1a", "ä", &"a".repeat(53)] {
        assert!(PostgresStore::new(pool.clone()).table(name).is_err(), "{name}");
    }
    let (sqlite, _dir) = file().await;
    let other = sqlite.table("main.other").unwrap();
    other.migrate().await.unwrap();
    acquire(&other, &key(), Claim::new(LONG, LONG)).await;
}

#[tokio::test]
async fn a_table_that_is_not_there_is_a_refusal() {
    let server = PostgresServer::shared();
    let store = PostgresStore::new(server.pool().await).table("nowhere").unwrap();
    let refused = store.claim(&key(), &Claim::new(LONG, LONG)).await.unwrap_err();
    assert!(refused.is_definite() && !refused.is_outage(), "{refused:?}");
}

#[tokio::test]
async fn a_file_outlives_whoever_has_it() {
    let (store, dir) = file().await;
    let (done, running) = (key(), key());
    let claim = acquire(&store, &done, Claim::new(LONG, LONG)).await;
    store.complete(&done, &claim, "record".into()).await.unwrap();
    acquire(&store, &running, Claim::new(LONG, LONG)).await;
    drop(store);
    let store = SqliteStore::open(dir.path().join("store.db")).await.unwrap();
    assert_eq!(store.lookup(&done).await.unwrap().unwrap().state, State::Done("record".into()));
    let claimed = store.claim(&running, &Claim::new(LONG, LONG)).await.unwrap();
    assert!(matches!(claimed, Claimed::Running { .. }));
}

#[tokio::test]
async fn a_file_that_cannot_be_one_is_an_error() {
    let dir = Scratch::new();
    assert!(SqliteStore::open(dir.path().join("missing/store.db")).await.is_err());
    std::fs::write(dir.path().join("text"), "this is no database, and long enough to say so".repeat(100)).unwrap();
    assert!(SqliteStore::open(dir.path().join("text")).await.is_err());
}

#[tokio::test]
async fn a_row_that_nobody_here_has_written_is_never_run() {
    let (store, dir) = file().await;
    let ledger = Ledger::new(store);
    let layer = IdempotencyLayer::webhook(&ledger, header("X-Id"));
    let app = App::new(&layer, |_, _| async { answer(200, "done") });
    app.send(event("e")).await;
    let path = dir.path().join("store.db");
    let mut connection = SqliteConnection::connect(&format!("sqlite://{}", path.display())).await.unwrap();
    sqlx::query("UPDATE idempotency SET state = 9").execute(&mut connection).await.unwrap();
    assert_eq!(app.send(event("e")).await.code().as_deref(), Some("store_unavailable"));
    let key = common::app::key_of(&layer, event("e"));
    assert!(ledger.forget(&key, false).await.unwrap_err().is_unreadable());
    assert_eq!(app.send(event("e")).await.code().as_deref(), Some("store_unavailable"));
    assert_eq!(app.runs(), 1);
    // Expired, it is nobody's.
    sqlx::query("UPDATE idempotency SET expires_at = 0").execute(&mut connection).await.unwrap();
    assert_eq!(app.send(event("e")).await.status, 200);
    assert_eq!(app.runs(), 2);
}

/// Another process writes for longer than anybody waits.
#[tokio::test]
async fn a_file_that_somebody_writes_is_a_refusal() {
    let (store, dir) = file().await;
    let store = Arc::new(store);
    let path = dir.path().join("store.db");
    let mut other = SqliteConnection::connect(&format!("sqlite://{}", path.display())).await.unwrap();
    sqlx::query("BEGIN IMMEDIATE").execute(&mut other).await.unwrap();
    let refused = store.claim(&key(), &Claim::new(LONG, LONG)).await.unwrap_err();
    assert!(refused.is_definite(), "{refused:?}");
    sqlx::query("COMMIT").execute(&mut other).await.unwrap();
    acquire(&*store, &key(), Claim::new(LONG, LONG)).await;
}

/// Without writing ahead, whoever reads keeps a writer from committing. That is heard of after the row that the write returns.
#[tokio::test]
async fn a_write_that_could_not_be_committed_is_none() {
    let dir = Scratch::new();
    let url = format!("sqlite://{}", dir.path().join("store.db").display());
    let options: sqlx::sqlite::SqliteConnectOptions = url.parse().unwrap();
    let options = options.create_if_missing(true).journal_mode(sqlx::sqlite::SqliteJournalMode::Delete);
    let options = options.busy_timeout(BLINK);
    let pool = sqlx::sqlite::SqlitePoolOptions::new().connect_with(options).await.unwrap();
    let store = SqliteStore::new(pool);
    store.migrate().await.unwrap();
    let (running, done) = (key(), key());
    let claim = acquire(&store, &done, Claim::new(LONG, LONG)).await;
    let mut reader = SqliteConnection::connect(&url).await.unwrap();
    sqlx::query("BEGIN").execute(&mut reader).await.unwrap();
    sqlx::query("SELECT count(*) FROM idempotency").fetch_one(&mut reader).await.unwrap();
    for _ in 0..2 {
        assert!(store.claim(&running, &Claim::new(LONG, LONG)).await.is_err());
        assert!(store.complete(&done, &claim, "record".into()).await.is_err());
    }
    sqlx::query("ROLLBACK").execute(&mut reader).await.unwrap();
    assert_eq!(store.lookup(&running).await.unwrap(), None);
    assert_eq!(store.complete(&done, &claim, "record".into()).await.unwrap(), Hold::Held);
}

/// Also when somebody has written to the table and not yet ended.
#[tokio::test]
async fn a_process_that_starts_holds_up_nobody() {
    let server = PostgresServer::shared();
    let store = server.store().await;
    let mut operator = PgConnection::connect(&server.url()).await.unwrap();
    let mut transaction = operator.begin().await.unwrap();
    let delete = format!("DELETE FROM {} WHERE attempt < 0", store.table_name());
    sqlx::query(AssertSqlSafe(delete)).execute(&mut *transaction).await.unwrap();
    timeout(Duration::from_secs(2), store.migrate()).await.unwrap().unwrap();
    acquire(&store, &key(), Claim::new(LONG, LONG)).await;
}

/// As by an index that is being made.
#[tokio::test]
async fn a_table_that_is_locked_is_a_refusal_and_leaves_the_connections_free() {
    let server = PostgresServer::shared();
    let store = server.store().await;
    let mut operator = PgConnection::connect(&server.url()).await.unwrap();
    let mut transaction = operator.begin().await.unwrap();
    let lock = format!("LOCK TABLE {} IN EXCLUSIVE MODE", store.table_name());
    sqlx::query(AssertSqlSafe(lock)).execute(&mut *transaction).await.unwrap();
    let (claims, key) = ([(); 20].map(|()| Claim::new(LONG, LONG)), key());
    let refused = join_all(claims.iter().map(|claim| timeout(LONG, store.claim(&key, claim)))).await;
    assert!(refused.into_iter().all(|refused| refused.unwrap().unwrap_err().is_definite()));
    transaction.rollback().await.unwrap();
    acquire(&store, &key, Claim::new(LONG, LONG)).await;
}

#[tokio::test]
async fn many_may_make_one_file() {
    let dir = Scratch::new();
    let path = dir.path().join("store.db");
    let opened = join_all((0..8).map(|_| SqliteStore::open(&path))).await;
    assert!(opened.iter().all(Result::is_ok), "{opened:?}");
}

/// How many connections listen, to all of this server's stores.
async fn listeners(pool: &PgPool) -> i64 {
    let count = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'LISTEN%' AND pid <> pg_backend_pid()";
    sqlx::query_scalar(count).fetch_one(pool).await.unwrap()
}

#[tokio::test]
async fn who_waits_is_told_of_the_end_and_nobody_listens_for_nothing() {
    let server = PostgresServer::start();
    let pool = server.pool().await;
    let store = PostgresStore::open(&server.url()).unwrap();
    store.migrate().await.unwrap();
    // On one connection: what listens is another.
    let options = server.url().parse::<sqlx::postgres::PgConnectOptions>().unwrap();
    let other = PostgresStore::new(PgPoolOptions::new().max_connections(1).connect_with(options).await.unwrap());
    for end in 0..3 {
        let key = key();
        let claim = acquire(&store, &key, Claim::new(LONG, LONG)).await;
        let hints = Arc::new(AtomicUsize::new(0));
        // They wait again when they are told, as a flight does: a connection that has just been made has everybody look.
        let watches = [(); 2].map(|()| {
            let (store, hints) = (other.clone(), Arc::clone(&hints));
            tokio::spawn(async move {
                loop {
                    store.changed(&key).await;
                    hints.fetch_add(1, Ordering::SeqCst);
                }
            })
        });
        let watched = format!("SELECT watched FROM {} WHERE key = $1", store.table_name());
        until(async || {
            let watched = sqlx::query_scalar(AssertSqlSafe(watched.clone())).bind(&key.as_bytes()[..]);
            let watched: bool = watched.fetch_one(&pool).await.unwrap();
            watched && listeners(&pool).await == 1
        })
        .await;
        sleep(Duration::from_millis(200)).await;
        let before = hints.load(Ordering::SeqCst);
        sleep(Duration::from_millis(200)).await;
        assert_eq!(hints.load(Ordering::SeqCst), before, "nothing has happened");
        match end {
            0 => drop(store.complete(&key, &claim, "record".into()).await.unwrap()),
            1 => drop(store.release(&key, &claim, LONG).await.unwrap()),
            _ => drop(store.forget(&key, true).await.unwrap()),
        }
        until(async || hints.load(Ordering::SeqCst) >= before + 2).await;
        watches.iter().for_each(tokio::task::JoinHandle::abort);
        other.claim(&key, &Claim::new(LONG, LONG)).await.unwrap();
    }
    until(async || listeners(&pool).await == 0).await;
}

#[tokio::test]
async fn a_connection_that_is_lost_has_everybody_look() {
    let server = PostgresServer::start();
    let pool = server.pool().await;
    let store = PostgresStore::open(&server.url()).unwrap();
    store.migrate().await.unwrap();
    let key = key();
    acquire(&store, &key, Claim::new(LONG, LONG)).await;
    let watching = store.clone();
    let watch = tokio::spawn(async move {
        // The first is that of the connection that has been made.
        for _ in 0..2 {
            watching.changed(&key).await;
        }
    });
    until(async || listeners(&pool).await == 1).await;
    sleep(Duration::from_millis(100)).await;
    assert!(!watch.is_finished());
    sqlx::query("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query LIKE 'LISTEN%'")
        .execute(&pool)
        .await
        .unwrap();
    timeout(Duration::from_secs(5), watch).await.expect("everybody looks").unwrap();
}
