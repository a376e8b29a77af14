//! The memory store, from a thousand keys on.

use std::time::Duration;

use bytes::Bytes;
use tokio::time::Instant;
use tower_idempotency::MemoryStore;
use tower_idempotency::key::Key;
use tower_idempotency::store::{Claim, Claimed, Store as _};

use super::{DAY, LEASE, deliver, live, nanos_each, random_key};

/// How many duplicates are sent at most.
const DUPLICATES: usize = 200_000;

pub fn unbounded() -> MemoryStore {
    MemoryStore::new().max_keys(usize::MAX).max_bytes(usize::MAX)
}

pub async fn grow(largest: usize, record: &Bytes) {
    println!("\nThe memory store, with records of {} bytes:\n", record.len());
    println!("| keys | bytes a key | first delivery | longest of them | duplicate |\n|---|---|---|---|---|");
    let sizes = (3..).map(|exponent| 10_usize.pow(exponent)).take_while(|size| *size <= largest);
    for size in sizes {
        let keys: Vec<Key> = (0..size).map(|_| random_key()).collect();
        let (store, before) = (unbounded(), live());
        let (started, mut longest) = (Instant::now(), Duration::ZERO);
        let mut last = started;
        for key in &keys {
            deliver(&store, key, DAY, record).await;
            let now = Instant::now();
            longest = longest.max(now - last);
            last = now;
        }
        let first = nanos_each(started.elapsed(), size);
        let bytes = (live() - before) as f64 / size as f64;

        let started = Instant::now();
        // Keys are random, so each is as far from the one before as can be.
        let duplicates = keys.iter().cycle().take(DUPLICATES);
        for key in duplicates {
            let claimed = store.claim(key, &Claim::new(LEASE, DAY)).await.unwrap();
            assert!(matches!(claimed, Claimed::Done { .. }));
        }
        let duplicate = nanos_each(started.elapsed(), DUPLICATES);
        let longest = longest.as_secs_f64() * 1000.0;
        println!("| {size} | {bytes:.0} | {first:.0} ns | {longest:.2} ms | {duplicate:.0} ns |");
    }
}
