//! Who waits for another process is woken by the server, and polls where it is not.

#![allow(clippy::expect_used, clippy::unwrap_used, reason = "a test panics where it fails")]

mod common;

use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::FutureExt as _;
use redis::aio::MultiplexedConnection;
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout};
use tower_idempotency::key::{Key, header};
use tower_idempotency::store::{Claim, Hold, Store};
use tower_idempotency::{IdempotencyLayer, Ledger, MemoryStore, RedisStore};

use common::app::{Answer, App, answer, event};
use common::observed::{Observed, assert_paced};
use common::proxy::Proxy;
use common::redis::RedisServer;

const LONG: Duration = Duration::from_secs(60);

fn key(n: u8) -> Key {
    Key::from([n; 24])
}

fn name(n: u8) -> String {
    format!("idempotency:{{{}}}", key(n))
}

async fn until(mut holds: impl AsyncFnMut() -> bool) {
    timeout(Duration::from_secs(20), async {
        while !holds().await {
            sleep(Duration::from_millis(5)).await;
        }
    })
    .await
    .expect("it does not come true");
}

/// One process, whose handler answers with `status` when it is let go.
fn gated(store: impl Store, status: u16) -> (App, Arc<Semaphore>) {
    let gate = Arc::new(Semaphore::new(0));
    let opened = Arc::clone(&gate);
    let layer = IdempotencyLayer::webhook(&Ledger::new(store), header("X-Id")).patience(LONG);
    let app = App::new(&layer, move |_, run| {
        let opened = Arc::clone(&opened);
        async move {
            opened.acquire().await?.forget();
            answer(status, format!("run {run}"))
        }
    });
    (app, gate)
}

fn deliver(app: &App) -> JoinHandle<Answer> {
    tokio::spawn(app.send(event("e")))
}

async fn answered(delivery: JoinHandle<Answer>) -> Answer {
    timeout(LONG, delivery).await.expect("nobody was told").unwrap()
}

/// Waits for a change of a key, already.
async fn watch(store: &RedisStore, n: u8) -> JoinHandle<()> {
    let store = store.clone();
    let watch = tokio::spawn(async move { store.changed(&key(n)).await });
    tokio::task::yield_now().await;
    watch
}

async fn woken(watch: JoinHandle<()>) {
    timeout(LONG, watch).await.expect("nobody was woken").unwrap();
}

async fn command(client: &mut MultiplexedConnection, line: &str) -> redis::Value {
    let mut words = line.split(' ');
    redis::cmd(words.next().unwrap()).arg(words.collect::<Vec<_>>()).query_async(client).await.unwrap()
}

/// The channels that somebody is subscribed to.
async fn channels(client: &mut MultiplexedConnection) -> Vec<String> {
    let mut channels: Vec<String> = redis::from_redis_value(command(client, "PUBSUB CHANNELS").await).unwrap();
    channels.sort();
    channels
}

/// How many connections listen.
async fn listeners(client: &mut MultiplexedConnection) -> usize {
    let list: String = redis::from_redis_value(command(client, "CLIENT LIST").await).unwrap();
    list.lines().filter(|line| line.contains("subscribe ")).count()
}

#[tokio::test]
async fn whatever_ends_a_claim_wakes_who_waits() {
    let server = RedisServer::start();
    let mut client = server.client().await;
    let (runs, waits) = (server.store(), server.store());
    for n in 0..3 {
        let mut claim = Claim::new(LONG, LONG);
        runs.claim(&key(n), &claim).await.unwrap();
        claim.attempt = 1;
        let (watch, other) = (watch(&waits, n).await, watch(&waits, 100 + n).await);
        until(async || channels(&mut client).await.contains(&name(n))).await;
        match n {
            0 => assert_eq!(runs.complete(&key(n), &claim, Bytes::new()).await.unwrap(), Hold::Held),
            1 => assert_eq!(runs.release(&key(n), &claim, LONG).await.unwrap(), Hold::Held),
            _ => drop(runs.forget(&key(n), true).await.unwrap()),
        }
        woken(watch).await;
        assert!(!other.is_finished(), "another key has not changed");
    }
    assert_eq!(listeners(&mut client).await, 1);
}

#[tokio::test]
async fn duplicates_in_another_process_are_woken_by_an_outcome() {
    let server = RedisServer::start();
    let (runner, gate) = gated(server.store(), 200);
    let first = deliver(&runner);
    until(async || runner.runs() == 1).await;
    let blind = Observed::blind(server.store());
    let (other, _) = gated(blind.clone(), 200);
    let duplicates: Vec<_> = (0..10).map(|_| deliver(&other)).collect();
    let mut client = server.client().await;
    until(async || channels(&mut client).await.len() == 1).await;
    gate.add_permits(1);
    let first = answered(first).await;
    for duplicate in duplicates {
        let duplicate = answered(duplicate).await;
        assert!(duplicate.is_replayed() && duplicate.body == first.body);
    }
    assert_paced(&blind.looks());
}

#[tokio::test]
async fn a_duplicate_in_another_process_is_woken_to_take_over() {
    let server = RedisServer::start();
    let (fails, gate) = gated(server.store(), 500);
    let first = deliver(&fails);
    until(async || fails.runs() == 1).await;
    let (succeeds, open) = gated(Observed::blind(server.store()), 200);
    open.add_permits(1);
    let duplicate = deliver(&succeeds);
    let mut client = server.client().await;
    until(async || channels(&mut client).await.len() == 1).await;
    gate.add_permits(1);
    assert_eq!(answered(first).await.status, 500);
    assert_eq!(answered(duplicate).await.status, 200);
    assert_eq!(succeeds.runs(), 1);
}

#[tokio::test]
async fn nobody_listens_where_nobody_waits_for_another_process() {
    let server = RedisServer::start();
    let mut client = server.client().await;
    let (runner, gate) = gated(server.store(), 200);
    let alone: Vec<_> = (0..10).map(|_| deliver(&runner)).collect();
    until(async || runner.runs() == 1).await;
    sleep(Duration::from_millis(100)).await;
    assert_eq!(listeners(&mut client).await, 0, "who runs a key need not be told");

    let (other, _) = gated(server.store(), 200);
    let duplicate = deliver(&other);
    until(async || channels(&mut client).await.len() == 1).await;
    assert_eq!(listeners(&mut client).await, 1);
    gate.add_permits(1);
    answered(duplicate).await;
    for alone in alone {
        answered(alone).await;
    }
    until(async || channels(&mut client).await.is_empty()).await;
    until(async || listeners(&mut client).await == 0).await;

    // The next one who waits is listened for again.
    let store = server.store();
    let watch = watch(&store, 1).await;
    until(async || channels(&mut client).await == [name(1)]).await;
    watch.abort();
}

#[tokio::test]
async fn a_channel_is_left_with_its_last_waiter_and_a_store_that_is_gone_listens_to_nothing() {
    let server = RedisServer::start();
    let mut client = server.client().await;
    let store = server.store();
    let (first, second, other) = (watch(&store, 1).await, watch(&store, 1).await, watch(&store, 2).await);
    until(async || channels(&mut client).await.len() == 2).await;
    first.abort();
    other.abort();
    until(async || channels(&mut client).await == [name(1)]).await;
    second.abort();
    until(async || channels(&mut client).await.is_empty()).await;
    assert_eq!(listeners(&mut client).await, 1, "it stays for a while");
    drop((first.await, second.await, other.await, store));
    until(async || listeners(&mut client).await == 0).await;
}

#[tokio::test]
async fn who_looks_and_goes_on_waiting_stays_subscribed() {
    let server = RedisServer::start();
    let (runner, _gate) = gated(server.store(), 200);
    let first = deliver(&runner);
    until(async || runner.runs() == 1).await;
    let started = Instant::now();
    let observed = Observed::new(server.store());
    let (other, _) = gated(observed.clone(), 200);
    let duplicates: Vec<_> = (0..3).map(|_| deliver(&other)).collect();
    until(async || observed.looks().len() > 6).await;
    let mut client = server.client().await;
    let stats: String = redis::from_redis_value(command(&mut client, "INFO commandstats").await).unwrap();
    let calls = stats.split("cmdstat_subscribe:calls=").nth(1).and_then(|rest| rest.split(',').next());
    let calls: u64 = calls.expect("a subscription").parse().unwrap();
    // The connection is tried once a second.
    assert!(calls <= 1 + started.elapsed().as_secs(), "{calls} subscriptions");
    assert!(!stats.contains("cmdstat_unsubscribe"));
    for waiting in duplicates.iter().chain([&first]) {
        waiting.abort();
    }
}

#[tokio::test]
async fn a_connection_that_is_cut_sends_everybody_to_look_and_comes_back() {
    let mut server = RedisServer::start();
    let mut client = server.client().await;
    let store = server.store();
    let all = [watch(&store, 1).await, watch(&store, 2).await];
    until(async || channels(&mut client).await.len() == 2).await;
    command(&mut client, "CLIENT KILL TYPE pubsub").await;
    for watch in all {
        woken(watch).await;
    }
    let again = watch(&store, 1).await;
    until(async || channels(&mut client).await == [name(1)]).await;
    server.kill();
    woken(again).await;
    let again = watch(&store, 1).await;
    server.restart();
    let mut client = server.client().await;
    until(async || channels(&mut client).await == [name(1)]).await;
    let claim = Claim::new(LONG, LONG);
    assert_eq!(server.store().complete(&key(1), &claim, Bytes::new()).await.unwrap(), Hold::Held);
    woken(again).await;
}

#[tokio::test]
async fn a_connection_whose_packets_vanish_is_found_out() {
    let server = RedisServer::start();
    let proxy = Proxy::to(server.port()).await;
    let store = RedisStore::new(&proxy.url()).unwrap();
    let lost = watch(&store, 1).await;
    let mut client = server.client().await;
    until(async || channels(&mut client).await.len() == 1).await;
    proxy.black_hole();
    woken(lost).await;
    let before = proxy.connections();
    let again = watch(&store, 2).await;
    until(async || channels(&mut client).await.contains(&name(2))).await;
    assert!(proxy.connections() > before);
    again.abort();
}

/// Who is not allowed or not able to listen polls, without an error, and does not besiege the server.
async fn polls(server: &RedisServer, waits: &RedisStore) {
    let mut client = server.client().await;
    let received = async |client: &mut MultiplexedConnection| -> u64 {
        let stats: String = redis::from_redis_value(command(client, "INFO stats").await).unwrap();
        let received = stats.split("total_connections_received:").nth(1).and_then(|rest| rest.lines().next());
        received.unwrap().parse().unwrap()
    };
    let (runner, gate) = gated(server.store(), 200);
    let first = deliver(&runner);
    until(async || runner.runs() == 1).await;
    let observed = Observed::new(waits.clone());
    let (other, _) = gated(observed.clone(), 200);
    let before = received(&mut client).await;
    let duplicate = deliver(&other);
    until(async || observed.looks().len() > 4).await;
    let made = received(&mut client).await - before;
    assert!((2..20).contains(&made), "{made} connections");
    assert_eq!(observed.hints(), 0);
    assert!(channels(&mut client).await.is_empty());
    gate.add_permits(1);
    assert_eq!(answered(duplicate).await.body, answered(first).await.body);
    assert_paced(&observed.looks());
}

#[tokio::test]
async fn without_rights_to_the_channel_waiting_is_polling() {
    let server = RedisServer::start();
    let mut client = server.client().await;
    command(&mut client, "ACL SETUSER app reset on >secret ~* resetchannels +@all").await;
    let url = format!("redis://app:secret@127.0.0.1:{}/", server.port());
    polls(&server, &RedisStore::new(&url).unwrap()).await;
}

#[tokio::test]
async fn without_the_protocol_waiting_is_polling() {
    let server = RedisServer::start_with(&["--rename-command", "HELLO", ""]);
    polls(&server, &server.store()).await;
}

#[tokio::test]
async fn what_cannot_be_connected_wakes_nobody_and_is_found_later() {
    let mut server = RedisServer::start();
    server.kill();
    let store = server.store();
    let key = key(1);
    let mut waits = pin!(store.changed(&key));
    assert!(timeout(Duration::from_millis(300), &mut waits).await.is_err());
    server.restart();
    let mut client = server.client().await;
    assert!(waits.as_mut().now_or_never().is_none());
    until(async || channels(&mut client).await == [name(1)]).await;
    command(&mut client, &format!("PUBLISH {} x", name(1))).await;
    timeout(LONG, waits).await.expect("nobody was woken");
}

#[tokio::test]
async fn a_flood_of_messages_changes_no_pace() {
    let server = RedisServer::start();
    let (runner, gate) = gated(server.store(), 200);
    let first = deliver(&runner);
    until(async || runner.runs() == 1).await;
    let observed = Observed::new(server.store());
    let (other, _) = gated(observed.clone(), 200);
    let duplicates: Vec<_> = (0..3).map(|_| deliver(&other)).collect();
    let mut client = server.client().await;
    until(async || channels(&mut client).await.len() == 1).await;
    let channel = channels(&mut client).await.remove(0);
    let (looked, started) = (observed.looks().len(), Instant::now());
    while started.elapsed() < Duration::from_secs(1) {
        command(&mut client, &format!("PUBLISH {channel} x")).await;
    }
    assert!(observed.hints() > 4, "{} hints", observed.hints());
    assert!(observed.looks().len() > looked);
    assert_paced(&observed.looks());
    gate.add_permits(1);
    let first = answered(first).await;
    for duplicate in duplicates {
        assert_eq!(answered(duplicate).await.body, first.body);
    }
}

#[tokio::test(start_paused = true)]
async fn a_store_that_hints_all_the_time_is_asked_at_the_same_pace() {
    let store = MemoryStore::new();
    let (runner, _gate) = gated(store.clone(), 200);
    let first = deliver(&runner);
    until(async || runner.runs() == 1).await;
    for observed in [Observed::restless(store.clone()), Observed::restless(store).vague()] {
        let layer = IdempotencyLayer::webhook(&Ledger::new(observed.clone()), header("X-Id"));
        let other = App::new(&layer.patience(Duration::from_secs(10)), |_, _| async { answer(200, "ran again") });
        assert_eq!(other.send(event("e")).await.status, 503);
        let looks = observed.looks().len();
        assert!((100..=202).contains(&looks), "{looks} looks in 10 s");
    }
    first.abort();
}

#[test]
fn a_runtime_that_ends_takes_no_wakening_with_it() {
    let server = RedisServer::start();
    let store = server.store();
    for n in 0..2 {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let watch = watch(&store, n).await;
            let mut client = server.client().await;
            until(async || channels(&mut client).await.contains(&name(n))).await;
            command(&mut client, &format!("PUBLISH {} x", name(n))).await;
            woken(watch).await;
        });
    }
}
