//! Processes that die before the commit of an effect, between the commit and the record of it, and between the record and the
//! response, on each database and with Redis in front of it: every event has its effect once. Without the row in the
//! transaction, those that die after the commit have it twice.
//!
//! `KILLS=50 cargo test --test crash_points -- --nocapture` kills as many processes at each point and prints the table.

#![allow(clippy::expect_used, clippy::unwrap_used, reason = "a test panics where it fails")]
#![allow(clippy::print_stdout, reason = "it measures")]

mod common;

use std::env;
use std::process::{Command, Stdio, abort};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use axum::extract::State;
use axum::http::{HeaderMap, StatusCode};
use axum::routing::post;
use axum::{Extension, Router};
use bytes::Bytes;
use futures_util::future::join_all;
use http::Request;
use http_body_util::{BodyExt as _, Empty};
use hyper_util::client::legacy::Client;
use hyper_util::rt::TokioExecutor;
use sqlx::postgres::PgPool;
use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePool};
use sqlx::{AssertSqlSafe, Postgres, Sqlite};
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::net::TcpListener;
use tokio::process::Child;
use tokio::time::{sleep, timeout};
use tower_idempotency::key::{Key, header};
use tower_idempotency::store::{Claim, Claimed, Dedup, Entry, Forgotten, Hold, Recorded, Store, StoreError};
use tower_idempotency::{Attempt, IdempotencyLayer, Ledger, PostgresStore, RedisStore, SqliteStore};

use common::postgres::PostgresServer;
use common::redis::RedisServer;
use common::scratch::Scratch;

const POINTS: [&str; 3] = ["before the commit", "after the commit", "after the record"];
const EVENTS: usize = 4;
const LEASE: Duration = Duration::from_millis(300);
const LONG: Duration = Duration::from_secs(60);

const DATABASE: &str = "CRASH_DATABASE";
const REDIS: &str = "CRASH_REDIS";
const WITHOUT_ROW: &str = "CRASH_WITHOUT_ROW";

/// Whether the process dies when an outcome has been recorded.
static DIES: AtomicBool = AtomicBool::new(false);

/// The database that the effects are in.
#[derive(Clone)]
enum Shop {
    Postgres(PgPool, Dedup<Postgres>),
    Sqlite(SqlitePool, Dedup<Sqlite>),
}

/// A store after which a process may die.
struct Deadly<S>(S);

/// A process that serves, until it dies.
struct Process {
    child: Child,
    addr: String,
}

// === the process ===

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "the process that the other test starts"]
async fn process() {
    let Ok(url) = env::var(DATABASE) else { return };
    let shop = Shop::open(&url).await;
    let ledger = match (env::var(REDIS), &shop) {
        (Ok(redis), _) => Ledger::new(Deadly(RedisStore::new(&redis).unwrap())),
        (Err(_), Shop::Postgres(pool, _)) => Ledger::new(Deadly(PostgresStore::new(pool.clone()))),
        (Err(_), Shop::Sqlite(pool, _)) => Ledger::new(Deadly(SqliteStore::new(pool.clone()))),
    };
    let layer = IdempotencyLayer::webhook(&ledger, header("x-id")).lease(LEASE);
    let app = Router::new().route("/", post(sell).layer(layer)).with_state(shop);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    println!("\nlistening on {}", listener.local_addr().unwrap());
    axum::serve(listener, app).await.unwrap();
}

async fn sell(State(shop): State<Shop>, Extension(attempt): Extension<Attempt>, headers: HeaderMap) -> StatusCode {
    let (event, dies) = (headers["x-id"].to_str().unwrap(), headers.get("x-dies").map(|point| point.to_str().unwrap()));
    if dies == Some(POINTS[2]) {
        DIES.store(true, Ordering::SeqCst);
    }
    match shop.sell(&attempt, event, dies).await {
        Ok(()) => StatusCode::OK,
        // Nothing has happened, and it comes again.
        Err(_) => StatusCode::SERVICE_UNAVAILABLE,
    }
}

impl Shop {
    async fn open(url: &str) -> Self {
        if url.starts_with("postgres:") {
            return Self::Postgres(PgPool::connect(url).await.unwrap(), Dedup::<Postgres>::new());
        }
        let options: SqliteConnectOptions = url.parse().unwrap();
        let options = options.create_if_missing(true).journal_mode(SqliteJournalMode::Wal);
        Self::Sqlite(SqlitePool::connect_with(options).await.unwrap(), Dedup::<Sqlite>::new())
    }

    async fn sell(&self, attempt: &Attempt, event: &str, dies: Option<&str>) -> Result<(), sqlx::Error> {
        macro_rules! sell_in {
            ($transaction:expr, $dedup:expr) => {{
                let mut transaction = $transaction;
                let is_first = env::var_os(WITHOUT_ROW).is_some()
                    || $dedup.record(&mut transaction, attempt).await? == Recorded::First;
                if is_first {
                    let effect = "INSERT INTO effects VALUES ($1)";
                    sqlx::query(effect).bind(event).execute(&mut *transaction).await?;
                    dies_if(dies == Some(POINTS[0]));
                    transaction.commit().await?;
                    dies_if(dies == Some(POINTS[1]));
                }
            }};
        }
        match self {
            Self::Postgres(pool, dedup) => sell_in!(pool.begin().await?, dedup),
            Self::Sqlite(pool, dedup) => sell_in!(pool.begin_with("BEGIN IMMEDIATE").await?, dedup),
        }
        Ok(())
    }
}

fn dies_if(dies: bool) {
    if dies {
        abort();
    }
}

impl<S: Store> Store for Deadly<S> {
    async fn claim(&self, key: &Key, claim: &Claim) -> Result<Claimed, StoreError> {
        self.0.claim(key, claim).await
    }

    async fn renew(&self, key: &Key, claim: &Claim) -> Result<Hold, StoreError> {
        self.0.renew(key, claim).await
    }

    async fn complete(&self, key: &Key, claim: &Claim, record: Bytes) -> Result<Hold, StoreError> {
        let hold = self.0.complete(key, claim, record).await;
        dies_if(DIES.load(Ordering::SeqCst));
        hold
    }

    async fn release(&self, key: &Key, claim: &Claim, remember: Duration) -> Result<Hold, StoreError> {
        self.0.release(key, claim, remember).await
    }

    async fn lookup(&self, key: &Key) -> Result<Option<Entry>, StoreError> {
        self.0.lookup(key).await
    }

    async fn forget(&self, key: &Key, force: bool) -> Result<Forgotten, StoreError> {
        self.0.forget(key, force).await
    }

    fn failure_domain(&self, key: &Key) -> u16 {
        self.0.failure_domain(key)
    }

    async fn changed(&self, key: &Key) {
        self.0.changed(key).await;
    }
}

// === the test ===

impl Process {
    async fn start(database: &str, redis: Option<&str>, row: bool) -> Self {
        let mut command = Command::new(env::current_exe().unwrap());
        command.args(["--exact", "process", "--ignored", "--nocapture"]).env(DATABASE, database).env_remove(REDIS);
        command
            .envs(redis.map(|redis| (REDIS, redis)))
            .envs((!row).then_some((WITHOUT_ROW, "1")))
            .stdout(Stdio::piped())
            .stderr(Stdio::null());
        let mut child = tokio::process::Command::from(command).kill_on_drop(true).spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let addr = async {
            loop {
                let line = lines.next_line().await.unwrap().expect("it listens");
                if let Some(addr) = line.strip_prefix("listening on ") {
                    return addr.to_owned();
                }
            }
        };
        let addr = timeout(LONG, addr).await.unwrap();
        tokio::spawn(async move { while let Ok(Some(_)) = lines.next_line().await {} });
        Self { child, addr }
    }

    /// Delivers an event, at which the process may die. Nothing comes back if it does.
    async fn deliver(&self, event: &str, dies: Option<&str>) -> Option<StatusCode> {
        let mut request = Request::post(format!("http://{}/", self.addr)).header("x-id", event);
        if let Some(point) = dies {
            request = request.header("x-dies", point);
        }
        let client = Client::builder(TokioExecutor::new()).build_http();
        let response = client.request(request.body(Empty::<Bytes>::new()).unwrap()).await.ok()?;
        let status = response.status();
        response.into_body().collect().await.ok()?;
        Some(status)
    }

    async fn deliver_until_it_is_acknowledged(&self, event: &str) {
        let delivered = async {
            while self.deliver(event, None).await != Some(StatusCode::OK) {
                sleep(Duration::from_millis(20)).await;
            }
        };
        timeout(LONG, delivered).await.unwrap_or_else(|_| panic!("{event} is lost"));
    }
}

/// How many events there were, and how many effects.
async fn kill(database: &str, redis: Option<&str>, row: bool, point: &str, kills: usize) -> [i64; 3] {
    let cell = format!("{:016x}", rand::random::<u64>());
    let mut process = Process::start(database, redis, row).await;
    for round in 0..kills {
        let events: Vec<String> = (0..EVENTS).map(|number| format!("{cell}-{round}-{number}")).collect();
        let fatal = rand::random_range(0..EVENTS);
        let deliveries = events.iter().enumerate();
        join_all(deliveries.map(|(number, event)| process.deliver(event, (number == fatal).then_some(point)))).await;
        let died = timeout(LONG, process.child.wait()).await.expect("it dies").unwrap();
        assert!(!died.success());
        process = Process::start(database, redis, row).await;
        join_all(events.iter().map(|event| process.deliver_until_it_is_acknowledged(event))).await;
    }
    let count = format!("SELECT count(*), count(DISTINCT event) FROM effects WHERE event LIKE '{cell}-%'");
    let (effects, distinct) = match Shop::open(database).await {
        Shop::Postgres(pool, _) => sqlx::query_as(AssertSqlSafe(count)).fetch_one(&pool).await.unwrap(),
        Shop::Sqlite(pool, _) => sqlx::query_as(AssertSqlSafe(count)).fetch_one(&pool).await.unwrap(),
    };
    [i64::try_from(kills * EVENTS).unwrap(), effects, distinct]
}

#[tokio::test]
async fn effects_are_events_wherever_a_process_dies() {
    let kills = env::var("KILLS").ok().and_then(|kills| kills.parse().ok()).unwrap_or(3);
    let (server, redis, dir) = (PostgresServer::shared(), RedisServer::start(), Scratch::new());
    let pool = server.pool().await;
    let schema = format!(
        "{} {} CREATE TABLE effects (event text)",
        PostgresStore::new(pool.clone()).schema(),
        Dedup::<Postgres>::new().schema(),
    );
    sqlx::raw_sql(AssertSqlSafe(schema)).execute(&pool).await.unwrap();
    let file = format!("sqlite://{}", dir.path().join("shop.db").display());
    let Shop::Sqlite(pool, dedup) = Shop::open(&file).await else { unreachable!("it is a file") };
    let schema =
        format!("{} {} CREATE TABLE effects (event TEXT)", SqliteStore::new(pool.clone()).schema(), dedup.schema());
    sqlx::raw_sql(AssertSqlSafe(schema)).execute(&pool).await.unwrap();

    println!("{:<12} {:<8} {:<20} {:>6} {:>7} {:>7}", "effects in", "store", "killed", "kills", "events", "effects");
    let (postgres, redis_url) = (server.url(), redis.url());
    for (name, database) in [("PostgreSQL", &postgres), ("SQLite", &file)] {
        for (store, redis) in [("the same", None), ("Redis", Some(&*redis_url))] {
            for point in POINTS {
                let [events, effects, distinct] = kill(database, redis, true, point, kills).await;
                println!("{name:<12} {store:<8} {point:<20} {kills:>6} {events:>7} {effects:>7}");
                assert_eq!((effects, distinct), (events, events), "{name}, {store}, {point}");
            }
        }
        let [events, effects, distinct] = kill(database, Some(&redis_url), false, POINTS[1], kills).await;
        println!("{name:<12} {:<8} {:<20} {kills:>6} {events:>7} {effects:>7}", "Redis", "… without the row");
        // Others than the fatal event may have been as far.
        assert!(effects >= events + kills as i64 && distinct == events, "{name}, without the row");
    }
}
