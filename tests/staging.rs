//! Large outcomes, which reach Redis beside the script and not in it.

#![allow(clippy::expect_used, clippy::unwrap_used, reason = "a test panics where it fails")]

mod common;

use std::time::Duration;

use bytes::Bytes;
use redis::AsyncCommands as _;
use tower_idempotency::RedisStore;
use tower_idempotency::key::Key;
use tower_idempotency::store::{Claim, Claimed, Hold, State, Store as _};

use common::redis::RedisServer;

const LONG: Duration = Duration::from_secs(60);

fn key() -> Key {
    Key::from([7; 24])
}

fn large() -> Bytes {
    (0..=u8::MAX).cycle().take(300_000).collect()
}

async fn acquire(store: &RedisStore, lease: Duration) -> Claim {
    let claim = Claim::new(lease, LONG);
    match store.claim(&key(), &claim).await.unwrap() {
        Claimed::Acquired { attempt } => {
            let mut claim = claim;
            claim.attempt = attempt;
            claim
        }
        other => panic!("{other:?}"),
    }
}

async fn keys(server: &RedisServer) -> Vec<String> {
    server.client().await.keys("*").await.unwrap()
}

async fn assert_done(server: &RedisServer, store: &RedisStore) {
    let entry = store.lookup(&key()).await.unwrap().unwrap();
    assert_eq!((entry.state, entry.attempt), (State::Done(large()), 1));
    assert!(entry.expires_in > LONG / 2 && entry.expires_in <= LONG);
    assert_eq!(keys(server).await.len(), 1, "nothing is left beside it");
}

#[tokio::test]
async fn a_large_outcome_is_staged_and_takes_the_place_of_its_claim() {
    let server = RedisServer::start();
    let store = server.store();
    let claim = acquire(&store, LONG).await;
    for _ in 0..3 {
        assert_eq!(store.complete(&key(), &claim, large()).await.unwrap(), Hold::Held);
        assert_done(&server, &store).await;
    }
    let stats: String = redis::cmd("INFO").arg("commandstats").query_async(&mut server.client().await).await.unwrap();
    assert!(stats.contains("cmdstat_rename:calls=1,"), "{stats}");
}

#[tokio::test]
async fn a_stale_attempt_stages_for_nothing() {
    let server = RedisServer::start();
    let store = server.store();
    let stale = acquire(&store, Duration::from_millis(1)).await;
    tokio::time::sleep(Duration::from_millis(20)).await;
    let successor = acquire(&store, LONG).await;
    assert_eq!(store.complete(&key(), &stale, large()).await.unwrap(), Hold::Lost);
    assert_eq!(store.lookup(&key()).await.unwrap().unwrap().state, State::Running);
    assert_eq!(keys(&server).await.len(), 1);
    assert_eq!(store.complete(&key(), &successor, Bytes::from_static(b"small")).await.unwrap(), Hold::Held);
    assert_eq!(store.complete(&key(), &stale, large()).await.unwrap(), Hold::Lost);
}

#[tokio::test]
async fn a_key_that_is_gone_is_completed() {
    let server = RedisServer::start();
    let store = server.store();
    let claim = acquire(&store, LONG).await;
    let () = redis::cmd("FLUSHALL").query_async(&mut server.client().await).await.unwrap();
    assert_eq!(store.complete(&key(), &claim, large()).await.unwrap(), Hold::Held);
    assert_done(&server, &store).await;
}

#[tokio::test]
async fn a_released_claim_is_not_completed() {
    let server = RedisServer::start();
    let store = server.store();
    let claim = acquire(&store, LONG).await;
    store.release(&key(), &claim, LONG).await.unwrap();
    assert_eq!(store.complete(&key(), &claim, large()).await.unwrap(), Hold::Lost);
    assert_eq!(store.lookup(&key()).await.unwrap().unwrap().state, State::Free);
}

#[tokio::test]
async fn scripts_that_the_server_forgot_are_sent_again() {
    let server = RedisServer::start();
    let store = server.store();
    let claim = acquire(&store, LONG).await;
    let () = redis::cmd("SCRIPT").arg("FLUSH").query_async(&mut server.client().await).await.unwrap();
    assert_eq!(store.complete(&key(), &claim, large()).await.unwrap(), Hold::Held);
    assert_done(&server, &store).await;
}

#[tokio::test]
async fn a_server_out_of_memory_takes_it_whole() {
    let server = RedisServer::start_with(&["--maxmemory-policy", "noeviction"]);
    let store = server.store();
    let claim = acquire(&store, LONG).await;
    let mut client = server.client().await;
    let () = redis::cmd("CONFIG").arg(&["SET", "maxmemory", "1"]).query_async(&mut client).await.unwrap();
    assert_eq!(store.complete(&key(), &claim, large()).await.unwrap(), Hold::Held);
    assert_done(&server, &store).await;
}
