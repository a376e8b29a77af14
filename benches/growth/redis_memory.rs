//! What an outcome takes of Redis's memory.

use futures_util::stream::{self, StreamExt as _};
use redis::aio::MultiplexedConnection;
use tower_idempotency::Ledger;

use super::common::app::event;
use super::common::redis::RedisServer;
use super::{USUAL, answering};

const KEYS: usize = 10_000;
const AT_ONCE: usize = 128;

/// The default, and the longest with which a name fits into one block less.
const PREFIX: &str = "idempotency";
const SHORT: &str = "idempoten";

/// Returns the bytes of a key with the usual outcome, with its share of the tables.
pub async fn grow(server: &RedisServer) -> f64 {
    println!("\nRedis, by the size of an outcome, which is JSON; with `used_memory` over {KEYS} of them:\n");
    println!("| outcome | prefix | name | value | `MEMORY USAGE` | `used_memory` a key |\n|---|---|---|---|---|---|");
    let mut client = server.client().await;
    let mut usual = 0.0;
    for (length, prefix) in
        [(0, PREFIX), (USUAL, SHORT), (USUAL, PREFIX), (512, PREFIX), (4096, PREFIX), (65536, PREFIX)]
    {
        let () = redis::cmd("FLUSHALL").query_async(&mut client).await.unwrap();
        let ledger = Ledger::new(server.store().prefix(prefix));
        let (_, app) = answering(&ledger, length);
        app.send(event("first")).await;
        let names: Vec<String> = redis::cmd("KEYS").arg("*").query_async(&mut client).await.unwrap();
        let [name] = &names[..] else { panic!("one key, not {names:?}") };
        let value: usize = redis::cmd("STRLEN").arg(name).query_async(&mut client).await.unwrap();
        let usage: usize = redis::cmd("MEMORY").arg("USAGE").arg(name).query_async(&mut client).await.unwrap();

        let before = used_memory(&mut client).await;
        let deliveries = stream::iter(0..KEYS).map(|id| app.send(event(&id.to_string())));
        deliveries.buffer_unordered(AT_ONCE).for_each(|answer| async move { assert!(answer.is_stored()) }).await;
        let per_key = (used_memory(&mut client).await - before) / KEYS as f64;
        println!("| {length} | `{prefix}` | {} | {value} | {usage} | {per_key:.0} |", name.len());
        if (length, prefix) == (USUAL, PREFIX) {
            usual = per_key;
        }
    }
    println!(
        "\nA name is the prefix, `:{{`, 32 characters of the key, and `}}`. A value is a header of 49 bytes, and the record: 10 bytes, the headers of the response, and its body."
    );
    usual
}

async fn used_memory(client: &mut MultiplexedConnection) -> f64 {
    info(client, "used_memory").await
}

/// A figure of `INFO`.
pub async fn info(client: &mut MultiplexedConnection, name: &str) -> f64 {
    let info: redis::InfoDict = redis::cmd("INFO").query_async(client).await.unwrap();
    info.get(name).unwrap_or_else(|| panic!("no {name}"))
}
