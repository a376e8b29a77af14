//! What a first delivery costs on PostgreSQL, against a pair of statements written by hand, and what removing a million expired rows
//! costs those who are served meanwhile.
//!
//! `cargo bench --bench sql` starts a server of its own and prints two tables. Both sides take turns, round by round, on
//! the same pool; the figures are ratios, since single rounds differ by a third.

#![allow(clippy::expect_used, clippy::unwrap_used, reason = "a benchmark panics where it fails")]
#![allow(clippy::print_stdout, reason = "it measures")]

#[path = "../tests/common/mod.rs"]
mod common;

use std::time::Duration;

use bytes::Bytes;
use futures_util::future::join_all;
use sqlx::AssertSqlSafe;
use sqlx::postgres::{PgConnectOptions, PgPool, PgPoolOptions};
use tokio::time::Instant;
use tower_idempotency::PostgresStore;
use tower_idempotency::key::Key;
use tower_idempotency::store::{Claim, Claimed, Store as _};

use common::postgres::PostgresServer;

const ROUNDS: usize = 15;
const ROUND: Duration = Duration::from_millis(400);
const EXPIRED: u32 = 1_000_000;
const RECORD: &[u8] = &[7; 160];
const DAY: Duration = Duration::from_secs(24 * 60 * 60);

fn key() -> Key {
    Key::from(rand::random::<[u8; 24]>())
}

/// One first delivery, ours.
async fn by_store(store: &PostgresStore) {
    let (key, mut claim) = (key(), Claim::new(DAY, DAY));
    let Claimed::Acquired { attempt } = store.claim(&key, &claim).await.unwrap() else { panic!("a new key") };
    claim.attempt = attempt;
    store.complete(&key, &claim, Bytes::from_static(RECORD)).await.unwrap();
}

/// The same as one would write it who thinks of no crash, no lease and no late answer.
async fn by_hand(pool: &PgPool) {
    const CLAIM: &str = "INSERT INTO by_hand (key, state, expires_at) VALUES ($1, 1, now() + interval '1 day') ON CONFLICT (key) DO NOTHING";
    const COMPLETE: &str = "UPDATE by_hand SET state = 2, record = $2 WHERE key = $1 AND state = 1";
    let key = key();
    sqlx::query(CLAIM).bind(&key.as_bytes()[..]).execute(pool).await.unwrap();
    sqlx::query(COMPLETE).bind(&key.as_bytes()[..]).bind(RECORD).execute(pool).await.unwrap();
}

/// How many per second, by so many at once.
async fn rate(at_once: usize, deliver: impl AsyncFn()) -> f64 {
    let started = Instant::now();
    let counts = join_all((0..at_once).map(async |_| {
        let mut count = 0_u32;
        while started.elapsed() < ROUND {
            deliver().await;
            count += 1;
        }
        count
    }));
    f64::from(counts.await.iter().sum::<u32>()) / started.elapsed().as_secs_f64()
}

fn median(mut values: Vec<f64>) -> (f64, f64, f64) {
    values.sort_by(f64::total_cmp);
    (values[values.len() / 2], values[0], values[values.len() - 1])
}

async fn against_a_pair(pool: &PgPool, store: &PostgresStore) {
    println!("| at once | by hand | ours | ratio (median, least, most) |\n|---|---|---|---|");
    for at_once in [1, 16] {
        let (mut hand, mut ours, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
        for round in 0..ROUNDS {
            // Whoever comes second finds more rows.
            let (a, b) = if round % 2 == 0 {
                let hand = rate(at_once, async || by_hand(pool).await).await;
                (hand, rate(at_once, async || by_store(store).await).await)
            } else {
                let ours = rate(at_once, async || by_store(store).await).await;
                (rate(at_once, async || by_hand(pool).await).await, ours)
            };
            hand.push(a);
            ours.push(b);
            ratios.push(b / a);
        }
        let (ratio, least, most) = median(ratios);
        println!(
            "| {at_once} | {:.0}/s | {:.0}/s | {ratio:.2} ({least:.2}, {most:.2}) |",
            median(hand).0,
            median(ours).0
        );
    }
}

/// The p99 of a delivery in milliseconds, by so many clients at once.
async fn p99(at_once: usize, store: &PostgresStore, lasts: Duration) -> f64 {
    let started = Instant::now();
    let took = join_all((0..at_once).map(async |_| {
        let mut took = Vec::new();
        while started.elapsed() < lasts {
            let before = Instant::now();
            by_store(store).await;
            took.push(before.elapsed().as_secs_f64() * 1000.0);
        }
        took
    }));
    let mut took = took.await.concat();
    took.sort_by(f64::total_cmp);
    took[took.len() * 99 / 100]
}

/// Makes a million rows that have expired, as they are after a pause of the service, and a look of the server at its table.
async fn expire(pool: &PgPool, store: &PostgresStore) {
    let table = store.table_name();
    let expired = format!(
        "INSERT INTO {table} (key, claim, attempt, lease_until, retention, forgotten, remembered, sweep_after, state, expires_at) \
         SELECT sha256(n::text::bytea), '', 1, 0, 0, false, false, n, 0, n \
         FROM generate_series(1, {EXPIRED}) n ON CONFLICT DO NOTHING"
    );
    let mut connection = pool.acquire().await.unwrap();
    for statement in ["SET lock_timeout = 0", &expired, &format!("ANALYZE {table}"), "CHECKPOINT", "RESET lock_timeout"]
    {
        sqlx::raw_sql(AssertSqlSafe(statement.to_owned())).execute(&mut *connection).await.unwrap();
    }
}

async fn while_sweeping(pool: &PgPool, store: &PostgresStore) {
    println!(
        "\n| at once | p99 with nothing to remove | as the store removes a million | as `sweep` does, over and over |\n|---|---|---|---|"
    );
    for at_once in [1, 16] {
        let lasts = Duration::from_secs(10);
        let idle = p99(at_once, store, lasts).await;
        expire(pool, store).await;
        let by_itself = p99(at_once, store, lasts).await;
        let sweeper = store.clone();
        let sweeping = tokio::spawn(async move { while sweeper.sweep(256).await.unwrap() != 0 {} });
        let mut over_and_over = Vec::new();
        while !sweeping.is_finished() {
            over_and_over.push(p99(at_once, store, Duration::from_secs(1)).await);
        }
        sweeping.await.unwrap();
        let (over_and_over, ..) = median(over_and_over);
        println!("| {at_once} | {idle:.2} ms | {by_itself:.2} ms | {over_and_over:.2} ms |");
    }
}

#[tokio::main]
async fn main() {
    let server = PostgresServer::durable();
    server.pool().await;
    let options: PgConnectOptions = server.url().parse().unwrap();
    let options = options.options([("lock_timeout", "200ms")]);
    let pool = PgPoolOptions::new().max_connections(16).test_before_acquire(false).connect_with(options).await.unwrap();
    let store = PostgresStore::new(pool.clone());
    store.migrate().await.unwrap();
    let by_hand = "CREATE TABLE by_hand (key bytea PRIMARY KEY, state bigint NOT NULL, record bytea, expires_at timestamptz NOT NULL); \
                   CREATE INDEX ON by_hand (expires_at)";
    sqlx::raw_sql(by_hand).execute(&pool).await.unwrap();
    against_a_pair(&pool, &store).await;
    while_sweeping(&pool, &store).await;
}
