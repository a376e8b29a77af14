//! A counter of deliveries, and the identity of each in a second table of the same database, in the same transaction.
//!
//! ```text
//! cargo run --example postmark_stats
//! curl -i http://127.0.0.1:3000/webhooks/postmark -d '{"MessageID":"m-1","Recipient":"a@example.com","RecordType":"Delivery"}'
//! curl http://127.0.0.1:3000/stats
//! ```
//!
//! Postmark delivers, opens and clicks one message for each of its recipients, and comes again until it is answered 200. The
//! statistics are right whatever happens in between: `?crash` ends the process after the commit and before anybody remembers
//! the delivery, which is when a store beside the database is at its end.
//!
//! Settings, from the environment: `ADDR` (`127.0.0.1:3000`); `DATABASE_URL` (`sqlite://stats.db`, a file that is made, or
//! `postgres://…`); `REDIS_URL` puts Redis in front, where otherwise the claims are in the same database; `LEASE_MS` (30000); and
//! `WITHOUT_ROW=1` leaves the identity out of the transaction, to see what happens then.

use std::env;
use std::error::Error;
use std::process::abort;
use std::time::Duration;

use axum::body::Bytes;
use axum::extract::{RawQuery, State};
use axum::http::StatusCode;
use axum::routing::{get, post};
use axum::{Extension, Router};
use serde::Deserialize;
use sqlx::postgres::PgPool;
use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePool};
use sqlx::{AssertSqlSafe, Postgres, Sqlite};
use tokio::net::TcpListener;
use tower_idempotency::store::{Dedup, Recorded};
use tower_idempotency::{Attempt, IdempotencyLayer, Ledger, PostgresStore, RedisStore, SqliteStore, key};

const STATS: &str = "CREATE TABLE IF NOT EXISTS stats (record_type text PRIMARY KEY, count bigint NOT NULL)";
const COUNT: &str = "INSERT INTO stats AS s (record_type, count) VALUES ($1, 1) \
                     ON CONFLICT (record_type) DO UPDATE SET count = s.count + 1";

/// The database of the statistics, and the second table.
#[derive(Clone)]
enum Database {
    Postgres(PgPool, Dedup<Postgres>),
    Sqlite(SqlitePool, Dedup<Sqlite>),
}

#[derive(Clone)]
struct Stats {
    database: Database,
    /// Whether the identity goes into the transaction.
    row: bool,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Delivery {
    record_type: String,
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let set = |name| env::var(name).ok().filter(|value| !value.is_empty());
    let url = set("DATABASE_URL").unwrap_or_else(|| "sqlite://stats.db".to_owned());
    let (database, beside) = Database::open(&url).await?;
    let ledger = match set("REDIS_URL") {
        Some(url) => Ledger::new(RedisStore::new(&url)?),
        None => beside,
    };
    let lease =
        set("LEASE_MS").map_or(Ok(30_000), |lease| lease.parse()).map_err(|error| format!("LEASE_MS: {error}"))?;
    let postmark = IdempotencyLayer::webhook(
        &ledger,
        key::json("$.MessageID")
            .and(key::json("$.Recipient"))
            .and_optional(key::json("$.RecordType"))
            .and_optional(key::json("$.ReceivedAt")),
    )
    .lease(Duration::from_millis(lease));
    let app = Router::new()
        .route("/webhooks/postmark", post(count).layer(postmark))
        .route("/stats", get(show))
        .with_state(Stats { database, row: set("WITHOUT_ROW").is_none() });

    let addr = env::var("ADDR").unwrap_or_else(|_| "127.0.0.1:3000".to_owned());
    let listener = TcpListener::bind(&addr).await.map_err(|error| format!("{addr}: {error}"))?;
    introduce(&listener.local_addr()?.to_string());
    let stop = async { drop(tokio::signal::ctrl_c().await) };
    axum::serve(listener, app).with_graceful_shutdown(stop).await?;
    ledger.drain(Duration::from_secs(10)).await?;
    Ok(())
}

impl Database {
    /// Opens it with its tables, and a ledger of claims in the same.
    async fn open(url: &str) -> Result<(Self, Ledger), Box<dyn Error>> {
        if url.starts_with("sqlite:") {
            let options: SqliteConnectOptions = url.parse()?;
            let options = options.create_if_missing(true).journal_mode(SqliteJournalMode::Wal);
            let path = options.get_filename().to_owned();
            let (pool, dedup) = (SqlitePool::connect_with(options).await?, Dedup::<Sqlite>::new());
            sqlx::raw_sql(AssertSqlSafe(format!("{STATS}; {}", dedup.schema()))).execute(&pool).await?;
            // Claims are made on a connection of their own: a handler that writes for long holds up no duplicate.
            return Ok((Self::Sqlite(pool, dedup), Ledger::new(SqliteStore::open(path).await?)));
        }
        let (pool, dedup) = (PgPool::connect(url).await?, Dedup::<Postgres>::new());
        sqlx::raw_sql(AssertSqlSafe(format!("{STATS}; {}", dedup.schema()))).execute(&pool).await?;
        let store = PostgresStore::open(url)?;
        store.migrate().await?;
        Ok((Self::Postgres(pool, dedup), Ledger::new(store)))
    }
}

/// The two tables change together, or neither does. What is the same in both databases is written once.
macro_rules! count_in {
    ($transaction:expr, $dedup:expr, $row:expr, $attempt:expr, $delivery:expr) => {{
        let mut transaction = $transaction;
        if !$row || $dedup.record(&mut transaction, $attempt).await? == Recorded::First {
            sqlx::query(COUNT).bind(&$delivery.record_type).execute(&mut *transaction).await?;
            transaction.commit().await?;
        }
    }};
}

impl Stats {
    async fn count(&self, attempt: &Attempt, delivery: &Delivery) -> Result<(), sqlx::Error> {
        match &self.database {
            Database::Postgres(pool, dedup) => count_in!(pool.begin().await?, dedup, self.row, attempt, delivery),
            Database::Sqlite(pool, dedup) => {
                count_in!(pool.begin_with("BEGIN IMMEDIATE").await?, dedup, self.row, attempt, delivery);
            }
        }
        Ok(())
    }
}

/// `POST /webhooks/postmark`. A delivery without an id passes through without an attempt, and is not counted.
async fn count(
    State(stats): State<Stats>,
    attempt: Option<Extension<Attempt>>,
    RawQuery(query): RawQuery,
    body: Bytes,
) -> (StatusCode, &'static str) {
    let Ok(delivery) = serde_json::from_slice(&body) else { return (StatusCode::BAD_REQUEST, "not a delivery\n") };
    let Some(Extension(attempt)) = attempt else { return (StatusCode::OK, "it has no id\n") };
    match stats.count(&attempt, &delivery).await {
        Ok(()) if query.as_deref() == Some("crash") && !attempt.is_retry() => abort(),
        Ok(()) => (StatusCode::OK, "counted\n"),
        // Nothing was counted, and it comes again.
        Err(_) => (StatusCode::SERVICE_UNAVAILABLE, "try again\n"),
    }
}

/// `GET /stats`.
async fn show(State(stats): State<Stats>) -> Result<String, StatusCode> {
    let select = "SELECT record_type, count FROM stats ORDER BY record_type";
    let rows: Result<Vec<(String, i64)>, _> = match &stats.database {
        Database::Postgres(pool, _) => sqlx::query_as(select).fetch_all(pool).await,
        Database::Sqlite(pool, _) => sqlx::query_as(select).fetch_all(pool).await,
    };
    let rows = rows.map_err(|_| StatusCode::SERVICE_UNAVAILABLE)?;
    Ok(rows.into_iter().map(|(record_type, count)| format!("{record_type}: {count}\n")).collect())
}

#[allow(clippy::print_stdout, reason = "it talks to whoever started it")]
fn introduce(addr: &str) {
    println!("The statistics are at http://{addr}/stats (POST /webhooks/postmark)");
}
