//! A million keys that expire in the same millisecond, and how long claims of other keys take meanwhile.

use std::time::Duration;

use redis::AsyncCommands as _;
use redis::aio::MultiplexedConnection;
use tokio::time::{Instant, sleep, sleep_until};
use tower_idempotency::store::{Claim, Store};

use super::common::redis::RedisServer;
use super::memory_store::unbounded;
use super::{DAY, LEASE, deliver, live, random_key};

const EXPIRING: usize = 1_000_000;

/// How long it takes from the first of them on until they expire, and how long claims are looked at before and after that.
const UNTIL: Duration = Duration::from_secs(20);
const LASTS: Duration = Duration::from_secs(5);

/// How many claims there are in a row, each millisecond: ten thousand a second would fill no table meanwhile.
const IN_A_ROW: usize = 10;

/// How many commands a pipeline has that fills Redis.
const PIPELINE: usize = 1000;

pub async fn in_memory(record: &[u8]) {
    println!("\nA million keys of the memory store expire at once:\n");
    header();
    let (store, before) = (unbounded(), live());
    let expire = Instant::now() + UNTIL;
    for _ in 0..EXPIRING {
        let retention = expire.duration_since(Instant::now()).max(Duration::from_secs(1));
        deliver(&store, &random_key(), retention, record).await;
    }
    let filled = live() - before;
    row("claim, before", claims(&store).await);
    sleep_until(expire).await;
    row("claim, while they expire", claims(&store).await);
    println!("\n{} MiB before, {} MiB after: maps keep their tables.", filled >> 20, (live() - before) >> 20);
}

pub async fn in_redis(server: &RedisServer, record: &[u8]) {
    println!("\nThe same in Redis, which removes them by itself, `hz` times a second:\n");
    header();
    let (store, mut client) = (server.store(), server.client().await);
    for hz in [10, 100] {
        let () = redis::cmd("CONFIG").arg("SET").arg("hz").arg(hz).query_async(&mut client).await.unwrap();
        let expire = fill(&mut client, record).await;
        for when in ["before", "while they expire"] {
            let (claims, pings) = tokio::join!(claims(&store), pings(client.clone()));
            row(&format!("`hz {hz}`: claim, {when}"), claims);
            row(&format!("`hz {hz}`: PING, {when}"), pings);
            sleep_until(expire - Duration::from_millis(50)).await;
        }
    }
}

/// Fills it with what looks like outcomes, and says when they expire.
async fn fill(client: &mut MultiplexedConnection, record: &[u8]) -> Instant {
    let () = redis::cmd("FLUSHALL").query_async(client).await.unwrap();
    let (seconds, _): (u64, u64) = redis::cmd("TIME").query_async(client).await.unwrap();
    let (until, expire) = (seconds + UNTIL.as_secs(), Instant::now() + UNTIL);
    for _ in 0..EXPIRING / PIPELINE {
        let mut pipeline = redis::pipe();
        for _ in 0..PIPELINE {
            let name = format!("idempotency:{{{}}}", random_key());
            pipeline.cmd("SET").arg(name).arg(record).arg("EXAT").arg(until).ignore();
        }
        let () = pipeline.query_async(client).await.unwrap();
    }
    expire
}

async fn claims(store: &impl Store) -> Vec<Duration> {
    timed(async || {
        store.claim(&random_key(), &Claim::new(LEASE, DAY)).await.unwrap();
    })
    .await
}

async fn pings(mut client: MultiplexedConnection) -> Vec<Duration> {
    timed(async || {
        let _: String = client.ping().await.unwrap();
    })
    .await
}

/// How long each took.
async fn timed(mut work: impl AsyncFnMut()) -> Vec<Duration> {
    let (started, mut took) = (Instant::now(), Vec::new());
    while started.elapsed() < LASTS {
        for _ in 0..IN_A_ROW {
            let before = Instant::now();
            work().await;
            took.push(before.elapsed());
        }
        sleep(Duration::from_millis(1)).await;
    }
    took
}

fn header() {
    println!("| | p50 | p99 | p99.9 | longest | of |\n|---|---|---|---|---|---|");
}

fn row(name: &str, mut took: Vec<Duration>) {
    took.sort_unstable();
    let micros = |per_mille: usize| took[(took.len() * per_mille / 1000).min(took.len() - 1)].as_secs_f64() * 1e6;
    let count = took.len();
    println!(
        "| {name} | {:.1} µs | {:.1} µs | {:.1} µs | {:.2} ms | {count} |",
        micros(500),
        micros(990),
        micros(999),
        micros(1000) / 1000.0
    );
}
