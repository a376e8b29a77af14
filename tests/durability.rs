//! Claims and outcomes that replicas have to have before they count.

#![allow(clippy::expect_used, clippy::unwrap_used, reason = "a test panics where it fails")]

mod common;

use std::time::Duration;

use futures_util::future::join_all;
use redis::AsyncCommands as _;
use tokio::time::Instant;
use tower_idempotency::key::{Key, header};
use tower_idempotency::store::redis::Durability;
use tower_idempotency::store::{Claim, Claimed, Hold, Store as _};
use tower_idempotency::{IdempotencyLayer, Ledger, RedisStore};

use common::app::{App, answer, event};
use common::proxy::Proxy;
use common::redis::RedisServer;
use common::until;

const LONG: Duration = Duration::from_secs(60);

const REPLICATED: Durability = Durability::Replicated { replicas: 1, timeout: Duration::from_secs(1) };

struct Pair {
    master: RedisServer,
    replica: RedisServer,
}

impl Pair {
    /// A master, and a replica that has all it has.
    async fn start() -> Self {
        let master = RedisServer::start_with(&["--repl-diskless-sync-delay", "0"]);
        let port = master.port().to_string();
        let replica = RedisServer::start_with(&["--replicaof", "127.0.0.1", &port]);
        let (mut client, mut copy) = (master.client().await, replica.client().await);
        let mut writes = 0;
        // `WAIT` alone would count a replica that has nothing yet, where nothing was written since it came.
        until(async || {
            writes += 1;
            let () = client.set("writes", writes).await.unwrap();
            copy.get::<_, Option<u32>>("writes").await.unwrap() == Some(writes)
        })
        .await;
        Self { master, replica }
    }

    fn app(&self, durability: Durability) -> App {
        let ledger = Ledger::new(self.master.store().durability(durability)).store_timeout(Duration::from_secs(2));
        let layer = IdempotencyLayer::webhook(&ledger, header("X-Id")).complete_wait(Duration::from_secs(1));
        App::new(&layer, |_, run| async move { answer(200, format!("run {run}")) })
    }
}

#[tokio::test]
async fn what_a_replica_has_counts() {
    let pair = Pair::start().await;
    let app = pair.app(REPLICATED);
    let first = app.send(event("e")).await;
    assert!(first.status == 200 && first.is_stored(), "{first:?}");
    assert!(app.send(event("e")).await.is_replayed());
    let keys: Vec<String> = pair.replica.client().await.keys("idempotency:*").await.unwrap();
    assert_eq!(keys.len(), 1);
}

#[tokio::test]
async fn a_claim_that_too_few_replicas_have_is_given_back_and_refused() {
    let pair = Pair::start().await;
    let app = pair.app(REPLICATED);
    pair.replica.freeze();
    let refused = app.send(event("e")).await;
    assert_eq!((refused.status.as_u16(), refused.code().as_deref(), app.runs()), (503, Some("store_unavailable"), 0));
    assert_eq!(pair.app(Durability::Master).send(event("other")).await.status, 200, "the choice is the store's");
    pair.replica.thaw();
    let thawed = Instant::now();
    assert_eq!(app.send(event("e")).await.status, 200, "the lease is not waited for");
    assert!(thawed.elapsed() < Duration::from_secs(5));
}

#[tokio::test]
async fn an_outcome_that_too_few_replicas_have_is_pursued() {
    let pair = Pair::start().await;
    let ledger = Ledger::new(pair.master.store().durability(REPLICATED)).store_timeout(Duration::from_secs(2));
    let layer = IdempotencyLayer::webhook(&ledger, header("X-Id")).complete_wait(Duration::from_millis(500));
    let (entered, mut is_entered) = tokio::sync::mpsc::channel(1);
    let (go_on, goes_on) = tokio::sync::watch::channel(false);
    let app = App::new(&layer, move |_, run| {
        let (entered, mut goes_on) = (entered.clone(), goes_on.clone());
        async move {
            entered.send(()).await?;
            goes_on.wait_for(|on| *on).await?;
            answer(200, format!("run {run}"))
        }
    });
    let first = tokio::spawn(app.send(event("e")));
    is_entered.recv().await.unwrap();
    pair.replica.freeze();
    go_on.send(true).unwrap();
    let first = first.await.unwrap();
    assert_eq!((first.status.as_u16(), first.is_stored()), (200, false));
    pair.replica.thaw();
    ledger.drain(Duration::from_secs(10)).await.unwrap();
    let keys: Vec<String> = pair.replica.client().await.keys("idempotency:*").await.unwrap();
    let state: Vec<u8> = pair.replica.client().await.getrange(&keys[0], 2, 2).await.unwrap();
    assert_eq!(state, b"D");
}

#[tokio::test]
async fn waiting_for_replicas_holds_up_nobody_else() {
    let pair = Pair::start().await;
    let app = pair.app(REPLICATED);
    assert_eq!(app.send(event("done")).await.status, 200);
    pair.replica.freeze();
    let waits = tokio::spawn(app.send(event("waits")));
    let replayed = Instant::now();
    assert!(app.send(event("done")).await.is_replayed());
    assert!(replayed.elapsed() < Duration::from_millis(250), "{:?}", replayed.elapsed());
    assert_eq!(waits.await.unwrap().status, 503);
    pair.replica.thaw();
}

#[tokio::test]
async fn a_claim_that_cannot_be_confirmed_is_given_up_and_leaves_no_key_behind() {
    let pair = Pair::start().await;
    let mut acl = redis::cmd("ACL");
    acl.arg(&["SETUSER", "app", "on", ">secret", "~*", "&*", "+@all", "-wait"]);
    let () = acl.query_async(&mut pair.master.client().await).await.unwrap();
    let url = format!("redis://app:secret@127.0.0.1:{}/", pair.master.port());
    let ledger = Ledger::new(RedisStore::new(&url).unwrap().durability(REPLICATED));
    let layer = IdempotencyLayer::webhook(&ledger, header("X-Id"));
    let app = App::new(&layer, |_, _| async { answer(200, "ran") });
    assert_eq!((app.send(event("e")).await.status.as_u16(), app.runs()), (503, 0));
    ledger.drain(Duration::from_secs(10)).await.unwrap();
    let other = pair.app(Durability::Master);
    assert_eq!(other.send(event("e")).await.status, 200, "the lease is not waited for");
}

#[tokio::test]
async fn what_cannot_be_confirmed_is_no_outage() {
    let pair = Pair::start().await;
    let app = pair.app(REPLICATED);
    assert_eq!(app.send(event("done")).await.status, 200);
    let mut acl = redis::cmd("ACL");
    acl.arg(&["SETUSER", "default", "-wait"]);
    let () = acl.query_async(&mut pair.master.client().await).await.unwrap();
    for n in 0..8 {
        assert_eq!(app.send(event(&n.to_string())).await.status, 503);
        assert!(app.send(event("done")).await.is_replayed(), "the circuit is closed");
    }
}

#[tokio::test]
async fn a_renewal_that_too_few_replicas_have_is_tried_again() {
    let pair = Pair::start().await;
    let store = pair.master.store().durability(REPLICATED);
    let (key, claim) = (Key::from([7; 24]), Claim::new(LONG, LONG));
    assert!(matches!(store.claim(&key, &claim).await.unwrap(), Claimed::Acquired { .. }));
    assert_eq!(store.renew(&key, &claim).await.unwrap(), Hold::Held);
    let (done, finished) = (Key::from([8; 24]), Claim::new(LONG, LONG));
    store.claim(&done, &finished).await.unwrap();
    store.complete(&done, &finished, b"done"[..].into()).await.unwrap();
    assert_eq!(store.renew(&done, &finished).await.unwrap(), Hold::Held, "a renewal may be late");
    pair.replica.freeze();
    let error = store.renew(&key, &claim).await.unwrap_err();
    assert!(!error.is_definite() && !error.is_outage(), "{error:?}");
    pair.replica.thaw();
    until(async || store.renew(&key, &claim).await.is_ok()).await;
}

#[tokio::test]
async fn connections_that_idle_and_lead_nowhere_cost_one_request() {
    let pair = Pair::start().await;
    let proxy = Proxy::to(pair.master.port()).await;
    let ledger = Ledger::new(RedisStore::new(&proxy.url()).unwrap().durability(REPLICATED));
    let layer = IdempotencyLayer::webhook(&ledger.store_timeout(Duration::from_secs(2)), header("X-Id"));
    let app = App::new(&layer, |_, _| async { answer(200, "ran") });
    let burst = join_all((0..32).map(|n| app.send(event(&n.to_string())))).await;
    assert!(burst.iter().all(|answer| answer.status == 200) && proxy.connections() > 4);
    proxy.black_hole();
    let mut refused = 0;
    for n in 32..52 {
        refused += u32::from(app.send(event(&n.to_string())).await.status != 200);
    }
    assert!(refused <= 1, "{refused} were refused");
}

#[tokio::test]
async fn a_master_without_its_replicas_is_left_for_one_that_has_them() {
    let (old, new) = (Pair::start().await, Pair::start().await);
    let proxy = Proxy::to(old.master.port()).await;
    let ledger = Ledger::new(RedisStore::new(&proxy.url()).unwrap().durability(REPLICATED));
    let layer = IdempotencyLayer::webhook(&ledger.store_timeout(Duration::from_secs(2)), header("X-Id"));
    let app = App::new(&layer, |_, _| async { answer(200, "ran") });
    assert_eq!(app.send(event("before")).await.status, 200);
    old.replica.freeze();
    proxy.retarget(new.master.port());
    // No connection is cut: what tells is that nobody acknowledges.
    until(async || app.send(event("e")).await.status == 200).await;
    old.replica.thaw();
    let keys: Vec<String> = new.replica.client().await.keys("idempotency:*").await.unwrap();
    assert_eq!(keys.len(), 1);
}
