//! On paper: what a million events a second need of a Redis Cluster, from what one server needs for some.

use std::time::Duration;

use bytes::Bytes;
use futures_util::stream::{self, StreamExt as _};
use tower_idempotency::RedisStore;

use super::common::redis::RedisServer;
use super::redis_memory::info;
use super::{DAY, deliver, random_key};

const MEASURED: usize = 200_000;
const AT_ONCE: usize = 128;

const EVENTS_PER_SECOND: f64 = 1e6;

/// How much of its one thread a master should use at most.
const LOAD: f64 = 0.6;

/// How much of the memory of a master, in bytes, is for keys.
const SHARD: f64 = 48.0 * GIB;
const GIB: f64 = (1_u64 << 30) as f64;

/// What one first delivery, a claim and a completion, needs of its server.
struct Pair {
    micros: f64,
    bytes_in: f64,
    bytes_out: f64,
}

pub async fn estimate(server: &RedisServer, record: &Bytes, bytes_per_key: f64) {
    let Pair { micros, bytes_in, bytes_out } = measure(server, record).await;
    println!(
        "\nA million first deliveries a second, on paper. Measured in this run, {AT_ONCE} at once on one connection:\n"
    );
    println!("c = {micros:.1} µs of the server's processor for a claim and a completion together");
    println!("m = {bytes_per_key:.0} bytes of `used_memory` for a key with an outcome of 90 bytes");
    println!("w = {bytes_in:.0} + {bytes_out:.0} bytes to and from the server, without TCP and IP\n");
    let by_processor = EVENTS_PER_SECOND * micros / 1e6 / LOAD;
    let gigabits = EVENTS_PER_SECOND * (bytes_in + bytes_out) * 8.0 / 1e9;
    println!("masters for the processor: 10^6 · c / {:.0} % of a thread = {:.0}", LOAD * 100.0, by_processor.ceil());
    println!("network: 10^6 · w = {gigabits:.1} Gbit/s, {:.2} for each of these", gigabits / by_processor.ceil());
    println!("memory: 10^6 · retention · m, on masters of {:.0} GiB; as much again for each replica:\n", SHARD / GIB);
    println!("| retention | memory | masters |\n|---|---|---|");
    let minutes = |minutes: u64| Duration::from_secs(minutes * 60);
    for (name, retention) in [
        ("10 min", minutes(10)),
        ("1 h", minutes(60)),
        ("24 h, as for an api", DAY),
        ("3 days, as for a webhook", 3 * DAY),
    ] {
        let memory = EVENTS_PER_SECOND * retention.as_secs_f64() * bytes_per_key;
        let masters = (memory / SHARD).max(by_processor).ceil();
        println!("| {name} | {:.0} GiB | {masters:.0} |", memory / GIB);
    }
}

async fn measure(server: &RedisServer, record: &Bytes) -> Pair {
    let (store, mut client) = (server.store(), server.client().await);
    // Its scripts are loaded, and it has looked at its server.
    load(&store, 1000, record).await;
    let figures = ["used_cpu_user", "used_cpu_sys", "total_net_input_bytes", "total_net_output_bytes"];
    let mut look = async || {
        let mut seen = [0.0; 4];
        for (place, name) in seen.iter_mut().zip(figures) {
            *place = info(&mut client, name).await;
        }
        seen
    };
    let before = look().await;
    load(&store, MEASURED, record).await;
    let after = look().await;
    let [user, system, bytes_in, bytes_out] =
        std::array::from_fn(|figure| (after[figure] - before[figure]) / MEASURED as f64);
    Pair { micros: (user + system) * 1e6, bytes_in, bytes_out }
}

async fn load(store: &RedisStore, pairs: usize, record: &Bytes) {
    let deliveries = stream::iter(0..pairs).map(|_| async { deliver(store, &random_key(), DAY, record).await });
    deliveries.buffer_unordered(AT_ONCE).for_each(|()| async {}).await;
}
