//! What the Redis store does to a server, and what a server can do to it.

#![allow(clippy::expect_used, clippy::unwrap_used, reason = "a test panics where it fails")]

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt as _;
use futures_util::future::join_all;
use redis::AsyncCommands as _;
use redis::aio::MultiplexedConnection;
use tokio::time::{Instant, sleep, timeout};
use tower_idempotency::key::{Key, header};
use tower_idempotency::store::{Claim, Claimed, Forgotten, Hold, Store as _, StoreError};
use tower_idempotency::{Attempt, IdempotencyLayer, Ledger, OnStoreError, RedisStore};

use common::app::{App, answer, event};
use common::proxy::Proxy;
use common::redis::RedisServer;
use common::until;

const LONG: Duration = Duration::from_secs(60);
/// What a request may take to be refused when Redis is down.
const AT_ONCE: Duration = Duration::from_millis(500);

fn app(store: RedisStore) -> App {
    let layer = IdempotencyLayer::webhook(&Ledger::new(store), header("X-Id"));
    App::new(&layer, |request, run| async move {
        let key = request.extensions().get::<Attempt>().unwrap().key();
        answer(200, format!("{run} {key}"))
    })
}

fn key() -> Key {
    Key::from([7; 24])
}

fn name() -> String {
    format!("idempotency:{{{}}}", key())
}

async fn claim(store: &RedisStore) -> (Claim, Result<Claimed, StoreError>) {
    let claim = Claim::new(LONG, LONG);
    let claimed = timeout(LONG, store.claim(&key(), &claim)).await.unwrap();
    (claim, claimed)
}

/// The commands that clients have sent while `work` was done, without those of scripts.
async fn commands(server: &RedisServer, work: impl Future) -> Vec<String> {
    let client = redis::Client::open(server.url()).unwrap();
    let mut lines = client.get_async_monitor().await.unwrap().into_on_message::<String>();
    work.await;
    server.client().await.ping::<()>().await.unwrap();
    let mut seen = Vec::new();
    loop {
        let line = timeout(LONG, lines.next()).await.unwrap().unwrap();
        let command = line.split('"').nth(1).unwrap_or_default().to_owned();
        match command.as_str() {
            "PING" => return seen,
            "CLIENT" | "CONFIG" | "HELLO" | "INFO" => {}
            _ if line.contains(" lua] ") => {}
            _ => seen.push(command),
        }
    }
}

/// Whether the server has no `SET` with both `NX` and `GET`.
async fn is_before_7(server: &RedisServer) -> bool {
    let info: String = redis::cmd("INFO").arg("server").query_async(&mut server.client().await).await.unwrap();
    let (_, version) = info.split_once("redis_version:").unwrap();
    version.split('.').next().unwrap().parse::<u32>().unwrap() < 7
}

/// Closes every connection but this one.
async fn cut_connections(client: &mut MultiplexedConnection) {
    let mut kill = redis::cmd("CLIENT");
    kill.arg(&["KILL", "TYPE", "normal", "SKIPME", "yes"]);
    let _: u32 = kill.query_async(client).await.unwrap();
}

#[tokio::test]
async fn a_first_delivery_costs_two_commands_and_a_duplicate_one() {
    let server = RedisServer::start();
    let app = app(server.store());
    app.send(event("warm-up")).await;
    let claim = if is_before_7(&server).await { "EVALSHA" } else { "SET" };
    assert_eq!(commands(&server, app.send(event("e"))).await, [claim, "EVALSHA"]);
    assert_eq!(commands(&server, app.send(event("e"))).await, [claim]);
}

#[tokio::test]
async fn a_server_is_found_by_its_name_and_by_its_socket() {
    // Not beside the others: what a socket is called may have no more than some hundred bytes.
    let socket = std::env::temp_dir().join(format!("idempotency-{}.sock", std::process::id()));
    let server = RedisServer::start_with(&["--unixsocket", socket.to_str().unwrap()]);
    let urls = [format!("redis://localhost:{}/", server.port()), format!("redis+unix://{}?db=0", socket.display())];
    for url in urls {
        assert_eq!(RedisStore::new(&url).unwrap().lookup(&key()).await.unwrap(), None, "{url}");
    }
    let nobody = RedisStore::new("redis://nobody.invalid/").unwrap();
    assert!(nobody.lookup(&key()).await.is_err());
    drop(server);
    std::fs::remove_file(socket).unwrap();
}

/// By how many reads the server needs for them.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn claims_of_one_moment_arrive_together() {
    let server = RedisServer::start();
    let store = server.store();
    let claim_all = |keys: std::ops::Range<u8>| {
        let claims = keys.map(|n| {
            let store = store.clone();
            tokio::spawn(async move { store.claim(&Key::from([n; 24]), &Claim::new(LONG, LONG)).await })
        });
        join_all(claims.collect::<Vec<_>>())
    };
    let mut client = server.client().await;
    let mut reads = async || {
        let stats: String = redis::cmd("INFO").arg("stats").query_async(&mut client).await.unwrap();
        let reads = stats.lines().find_map(|line| line.strip_prefix("total_reads_processed:")).unwrap();
        reads.parse::<u32>().unwrap()
    };
    claim_all(0..1).await;
    let before = reads().await;
    // All are there when the only worker comes to them.
    let (all_there, waits) = std::sync::mpsc::channel::<()>();
    tokio::spawn(async move { waits.recv() });
    let claims = claim_all(1..65);
    drop(all_there);
    let claims = claims.await;
    let taken = reads().await - before;
    assert!(claims.iter().all(|claimed| matches!(claimed, Ok(Ok(Claimed::Acquired { .. })))));
    assert!(taken < 32, "{taken} reads for 64 claims");
}

#[tokio::test]
async fn scripts_that_the_server_forgot_are_sent_again() {
    let server = RedisServer::start();
    let app = app(server.store());
    app.send(event("warm-up")).await;
    let () = redis::cmd("SCRIPT").arg("FLUSH").query_async(&mut server.client().await).await.unwrap();
    let first = app.send(event("e")).await;
    assert!(first.status == 200 && first.is_stored());
    assert!(app.send(event("e")).await.is_replayed());
}

#[tokio::test]
async fn keys_say_nothing_and_expire() {
    let server = RedisServer::start();
    let mut client = server.client().await;
    let app = app(server.store().prefix("shop"));
    let secret = "alice@example.com";
    app.send(event(secret)).await;
    let keys: Vec<String> = client.keys("*").await.unwrap();
    assert_eq!(keys.len(), 1);
    assert!(keys[0].starts_with("shop:{") && keys[0].len() == "shop:{}".len() + 32);
    let value: Vec<u8> = client.get(&keys[0]).await.unwrap();
    assert!(!value.windows(5).any(|window| window == b"alice"));
    let ttl: i64 = client.ttl(&keys[0]).await.unwrap();
    assert!(ttl > 2 * 24 * 60 * 60 && ttl <= 3 * 24 * 60 * 60);
}

#[tokio::test]
async fn what_is_not_a_record_is_an_outage_and_never_a_run() {
    let server = RedisServer::start();
    let mut client = server.client().await;
    let app = app(server.store());
    let first = app.send(event("e")).await;
    let key = format!("idempotency:{{{}}}", std::str::from_utf8(&first.body).unwrap().split(' ').next_back().unwrap());
    let whole: Vec<u8> = client.get(&key).await.unwrap();
    let version = 49;
    let mut values = vec![vec![], b"rubbish".to_vec(), vec![0xFF; 100], whole[..48].to_vec(), whole[..60].to_vec()];
    for (at, byte) in [(0, b'x'), (2, b'X'), (version, 2), (version + 1, 0x80)] {
        let mut changed = whole.clone();
        changed[at] = byte;
        values.push(changed);
    }
    for value in &values {
        let () = client.set(&key, value).await.unwrap();
        let refused = app.send(event("e")).await;
        assert_eq!((refused.status.as_u16(), refused.code().as_deref()), (503, Some("store_unavailable")), "{value:?}");
    }
    let () = client.del(&key).await.unwrap();
    let () = client.rpush(&key, "a list").await.unwrap();
    assert_eq!(app.send(event("e")).await.status, 503);
    assert_eq!(app.runs(), 1);
    // It is there, so the event was seen: not even a bypass runs it.
    let layer = IdempotencyLayer::webhook(&Ledger::new(server.store()), header("X-Id"));
    let bypassing = App::new(&layer.on_store_error(OnStoreError::Bypass), |_, _| async { answer(200, "ran again") });
    assert_eq!((bypassing.send(event("e")).await.status.as_u16(), bypassing.runs()), (503, 0));
    let () = client.del(&key).await.unwrap();
    let () = client.set(&key, &whole).await.unwrap();
    assert_eq!(app.send(event("e")).await.body, first.body);
}

#[tokio::test]
async fn a_claim_whose_deadline_somebody_removed_is_forgotten_only_by_force() {
    let server = RedisServer::start();
    let store = server.store();
    claim(&store).await.1.unwrap();
    let () = server.client().await.persist(name()).await.unwrap();
    assert_eq!(store.forget(&key(), false).await.unwrap(), Forgotten::Running);
    assert_eq!(store.forget(&key(), true).await.unwrap(), Forgotten::Forgotten);
}

#[tokio::test]
async fn steps_refuse_what_is_not_a_record() {
    let server = RedisServer::start();
    let store = server.store();
    let (held, _) = claim(&store).await;
    for value in ["", "rubbish", &"x".repeat(100)] {
        let () = server.client().await.set(name(), value).await.unwrap();
        assert!(store.renew(&key(), &held).await.unwrap_err().is_definite());
        assert!(store.complete(&key(), &held, Bytes::new()).await.unwrap_err().is_definite());
        assert!(store.release(&key(), &held, LONG).await.unwrap_err().is_definite());
        assert!(store.forget(&key(), true).await.unwrap_err().is_definite());
        assert!(store.lookup(&key()).await.is_err());
        let there: String = server.client().await.get(name()).await.unwrap();
        assert_eq!(there, value);
    }
}

#[tokio::test]
async fn a_running_key_without_a_deadline_gets_one() {
    let server = RedisServer::start();
    let store = server.store();
    let running = Claim::new(Duration::from_millis(300), LONG);
    store.claim(&key(), &running).await.unwrap();
    let () = server.client().await.persist(name()).await.unwrap();
    let brief = || Claim::new(Duration::from_millis(300), LONG);
    assert!(matches!(store.claim(&key(), &brief()).await.unwrap(), Claimed::Running { .. }));
    sleep(Duration::from_millis(400)).await;
    assert_eq!(store.claim(&key(), &brief()).await.unwrap(), Claimed::Acquired { attempt: 2 });
}

#[tokio::test]
async fn finished_work_is_stored_when_new_claims_are_refused_for_want_of_memory() {
    let server = RedisServer::start_with(&["--maxmemory-policy", "noeviction"]);
    let store = server.store();
    let (mut held, claimed) = claim(&store).await;
    held.attempt = 1;
    assert_eq!(claimed.unwrap(), Claimed::Acquired { attempt: 1 });
    let mut client = server.client().await;
    let () = redis::cmd("CONFIG").arg(&["SET", "maxmemory", "1"]).query_async(&mut client).await.unwrap();
    let other = Key::from([8; 24]);
    assert!(store.claim(&other, &Claim::new(LONG, LONG)).await.unwrap_err().is_definite());
    assert_eq!(store.renew(&key(), &held).await.unwrap(), Hold::Held);
    assert_eq!(store.complete(&key(), &held, Bytes::from_static(b"done")).await.unwrap(), Hold::Held);
    assert!(matches!(claim(&store).await.1.unwrap(), Claimed::Done { .. }), "what has finished is told all the same");
}

#[tokio::test]
async fn the_rights_in_the_docs_are_enough() {
    let server = RedisServer::start();
    let mut client = server.client().await;
    let (_, rights) = include_str!("../README.md").split_once("An ACL user needs `").unwrap();
    let rights: Vec<_> = rights.split_once('`').unwrap().0.split_whitespace().collect();
    assert!(rights.contains(&"+evalsha") && rights.contains(&"+unsubscribe"), "{rights:?}");
    let mut acl = redis::cmd("ACL");
    acl.arg(&["SETUSER", "app", "reset", "on", ">secret", "resetchannels"]).arg(&rights);
    let () = acl.query_async(&mut client).await.unwrap();
    let store = |user: &str| RedisStore::new(&format!("redis://{user}:secret@127.0.0.1:{}/", server.port())).unwrap();
    let limited = app(store("app"));
    assert!(limited.send(event("e")).await.is_stored());
    assert!(limited.send(event("e")).await.is_replayed());

    // Every step, and an outcome that is staged.
    let (steps, third) = (store("app"), Key::from([9; 24]));
    for lease in [Duration::from_millis(1), LONG] {
        let held = Claim::new(lease, LONG);
        assert!(matches!(steps.claim(&third, &held).await.unwrap(), Claimed::Acquired { .. }));
        sleep(Duration::from_millis(20)).await;
    }
    assert!(steps.lookup(&third).await.unwrap().is_some());
    steps.forget(&third, true).await.unwrap();
    let held = Claim::new(LONG, LONG);
    steps.claim(&third, &held).await.unwrap();
    assert_eq!(steps.renew(&third, &held).await.unwrap(), Hold::Held);
    assert_eq!(steps.complete(&third, &held, vec![0; 100_000].into()).await.unwrap(), Hold::Held);
    assert_eq!(steps.release(&third, &held, LONG).await.unwrap(), Hold::Lost);

    // Who waits is woken, and what nobody waits for any more is left.
    let (waits, other) = (store("app"), Key::from([8; 24]));
    let channel = format!("idempotency:{{{other}}}");
    let count = async |client: &mut MultiplexedConnection| -> u32 {
        let counts = redis::cmd("PUBSUB").arg("NUMSUB").arg(&channel).query_async(client).await;
        let (_, count): (String, u32) = counts.unwrap();
        count
    };
    let woken = tokio::spawn(async move {
        waits.changed(&other).await;
        waits
    });
    while count(&mut client).await == 0 {
        sleep(Duration::from_millis(5)).await;
    }
    store("app").complete(&other, &Claim::new(LONG, LONG), Bytes::new()).await.unwrap();
    let _waits = timeout(LONG, woken).await.unwrap().unwrap();
    while count(&mut client).await == 1 {
        sleep(Duration::from_millis(5)).await;
    }
    let refused: redis::Value = redis::cmd("ACL").arg("LOG").query_async(&mut client).await.unwrap();
    assert!(!format!("{refused:?}").contains("subscribe"), "{refused:?}");

    // Without rights to the channel nobody is woken, and nothing is lost.
    let () =
        redis::cmd("ACL").arg(&["SETUSER", "app", "resetchannels", "-publish"]).query_async(&mut client).await.unwrap();
    let silent = app(store("app"));
    assert!(silent.send(event("f")).await.is_stored());
    assert!(silent.send(event("f")).await.is_replayed());
}

#[tokio::test]
async fn a_server_that_is_down_refuses_at_once_and_is_found_again() {
    let mut server = RedisServer::start();
    server.kill();
    let app = app(server.store());
    for _ in 0..5 {
        let started = Instant::now();
        let refused = app.send(event("e")).await;
        assert_eq!((refused.status.as_u16(), refused.code().as_deref()), (503, Some("store_unavailable")));
        assert!(started.elapsed() < AT_ONCE, "{:?}", started.elapsed());
    }
    server.restart();
    let back = Instant::now();
    while app.send(event("e")).await.status != 200 {
        assert!(back.elapsed() < Duration::from_secs(2), "traffic is not back");
        sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(app.runs(), 1);
}

#[tokio::test]
async fn a_connection_that_was_cut_while_idle_costs_no_request() {
    let server = RedisServer::start();
    let app = app(server.store());
    let mut client = server.client().await;
    for n in 0..5 {
        assert_eq!(app.send(event(&n.to_string())).await.status, 200);
        cut_connections(&mut client).await;
        sleep(Duration::from_millis(20)).await;
    }
    assert!(join_all((0..5).map(|n| app.send(event(&n.to_string())))).await.iter().all(|answer| answer.is_replayed()));
}

#[tokio::test]
async fn a_frozen_server_refuses_in_time_and_what_it_did_late_is_given_up() {
    let server = RedisServer::start();
    let app = app(server.store());
    app.send(event("warm-up")).await;
    server.freeze();
    for _ in 0..3 {
        let started = Instant::now();
        assert_eq!(app.send(event("e")).await.status, 503);
        assert!(started.elapsed() < AT_ONCE, "{:?}", started.elapsed());
    }
    server.thaw();
    // The claims arrive now, and their releases with them: nobody has to wait for a lease of 30 s.
    let thawed = Instant::now();
    while app.send(event("e")).await.status != 200 {
        assert!(thawed.elapsed() < Duration::from_secs(5), "the key is stuck");
    }
    assert_eq!(app.runs(), 2);
}

#[tokio::test]
async fn a_connection_whose_packets_vanish_is_replaced() {
    let server = RedisServer::start();
    for store_timeout in [50, 250] {
        let proxy = Proxy::to(server.port()).await;
        let ledger = Ledger::new(RedisStore::new(&proxy.url()).unwrap());
        let layer =
            IdempotencyLayer::webhook(&ledger.store_timeout(Duration::from_millis(store_timeout)), header("X-Id"));
        let app = App::new(&layer, |_, _| async { answer(200, "ran") });
        assert_eq!(app.send(event(&format!("before-{store_timeout}"))).await.status, 200);
        proxy.black_hole();
        let vanished = Instant::now();
        while app.send(event(&format!("after-{store_timeout}"))).await.status != 200 {
            assert!(vanished.elapsed() < Duration::from_secs(3), "with {store_timeout} ms it does not heal");
        }
        assert_eq!(app.runs(), 2);
    }
}

#[tokio::test]
async fn a_claim_that_was_done_and_cut_off_is_given_up_whatever_is_said_after_it() {
    let server = RedisServer::start();
    let proxy = Proxy::to(server.port()).await;
    let app = app(RedisStore::new(&proxy.url()).unwrap());
    assert_eq!(app.send(event("before")).await.status, 200);
    proxy.cut_next_answer();
    proxy.loading(true);
    assert_eq!(app.send(event("e")).await.status, 503);
    proxy.loading(false);
    let healed = Instant::now();
    while app.send(event("e")).await.status != 200 {
        assert!(healed.elapsed() < Duration::from_secs(5), "the key is stuck behind a claim that nobody has");
    }
    assert_eq!(app.runs(), 2);
}

#[tokio::test]
async fn a_server_that_was_demoted_is_left_and_one_without_a_successor_is_not_stormed() {
    let (old, new) = (RedisServer::start(), RedisServer::start());
    let proxy = Proxy::to(old.port()).await;
    let app = app(RedisStore::new(&proxy.url()).unwrap());
    assert_eq!(app.send(event("before")).await.status, 200);
    let mut demote = redis::cmd("REPLICAOF");
    let () = demote.arg("127.0.0.1").arg(new.port()).query_async(&mut old.client().await).await.unwrap();

    let before = proxy.connections();
    let demoted = Instant::now();
    while demoted.elapsed() < Duration::from_secs(1) {
        assert_eq!(app.send(event("e")).await.status, 503);
    }
    let made = proxy.connections() - before;
    assert!((1..30).contains(&made), "{made} connections in a second");

    proxy.retarget(new.port());
    let promoted = Instant::now();
    while app.send(event("e")).await.status != 200 {
        assert!(promoted.elapsed() < Duration::from_secs(2), "the old server is not left");
        sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test]
async fn a_master_that_its_replicas_have_left_is_left() {
    let (old, new) = (RedisServer::start(), RedisServer::start());
    let proxy = Proxy::to(old.port()).await;
    let app = app(RedisStore::new(&proxy.url()).unwrap());
    assert_eq!(app.send(event("before")).await.status, 200);
    let mut set = redis::cmd("CONFIG");
    set.arg(&["SET", "min-replicas-to-write", "1"]);
    let () = set.query_async(&mut old.client().await).await.unwrap();
    let refused = app.send(event("e")).await;
    assert_eq!((refused.status.as_u16(), app.runs()), (503, 1), "it says NOREPLICAS");
    // No connection is cut: what tells is that it does not write.
    proxy.retarget(new.port());
    until(async || app.send(event("e")).await.status == 200).await;
    assert_eq!(app.runs(), 2);
}

#[tokio::test]
async fn a_factory_that_learns_its_password_late_is_asked_again() {
    let server = RedisServer::start_with(&["--requirepass", "late"]);
    let (port, is_known) = (server.port(), Arc::new(AtomicBool::new(false)));
    let known = Arc::clone(&is_known);
    let app = app(RedisStore::from_factory(move || {
        let password = if known.load(Ordering::SeqCst) { ":late@" } else { "" };
        let url = format!("redis://{password}127.0.0.1:{port}/");
        async move { redis::Client::open(url)?.get_multiplexed_async_connection().await }
    }));
    assert_eq!(app.send(event("e")).await.status, 503);
    is_known.store(true, Ordering::SeqCst);
    until(async || app.send(event("e")).await.status == 200).await;
}

#[tokio::test]
async fn many_clients_that_leave_together_are_no_silence() {
    let server = RedisServer::start();
    let proxy = Proxy::to(server.port()).await;
    let app = app(RedisStore::new(&proxy.url()).unwrap());
    app.send(event("before")).await;
    let before = proxy.connections();
    for round in 0..5 {
        let leaving: Vec<_> = (0..400).map(|n| tokio::spawn(app.send(event(&format!("{round}-{n}"))))).collect();
        sleep(Duration::from_millis(1)).await;
        leaving.iter().for_each(tokio::task::JoinHandle::abort);
        sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(proxy.connections(), before, "the connection was good all the time");
}

/// A server that does not know `HELLO` repeats what it was sent with it.
#[tokio::test]
async fn p9_a_password_is_in_no_error() {
    let server = RedisServer::start_with(&["--rename-command", "HELLO", ""]);
    let url = format!("redis://default:s3cr3t@127.0.0.1:{}/?protocol=resp3", server.port());
    let store = RedisStore::new(&url).unwrap();
    let error = claim(&store).await.1.unwrap_err();
    assert!(!format!("{error:?} {store:?}").contains("s3cr3t"), "{error:?}");
}

#[tokio::test]
async fn an_outcome_outlives_a_freeze_and_a_cut() {
    let server = RedisServer::start();
    let frozen = server.store();
    let ledger = Ledger::new(frozen);
    let layer = IdempotencyLayer::webhook(&ledger, header("X-Id"));
    let layer = layer.complete_wait(Duration::from_millis(300));
    let (entered, mut is_entered) = tokio::sync::mpsc::channel(1);
    let app = App::new(&layer, move |_, run| {
        let entered = entered.clone();
        async move {
            entered.send(()).await?;
            sleep(Duration::from_millis(100)).await;
            answer(200, format!("run {run}"))
        }
    });
    let first = tokio::spawn(app.send(event("e")));
    is_entered.recv().await.unwrap();
    server.freeze();
    let first = first.await.unwrap();
    assert_eq!((first.status.as_u16(), first.is_stored()), (200, false));
    server.thaw();
    cut_connections(&mut server.client().await).await;
    ledger.drain(Duration::from_secs(10)).await.unwrap();
    assert!(app.send(event("e")).await.is_replayed());
    assert_eq!(app.runs(), 1);
}

#[tokio::test]
async fn a_server_that_lost_its_data_is_told_who_runs() {
    let server = RedisServer::start();
    let layer =
        |store| IdempotencyLayer::webhook(&Ledger::new(store), header("X-Id")).lease(Duration::from_millis(600));
    let app = App::new(&layer(server.store()), |_, run| async move {
        sleep(Duration::from_secs(2)).await;
        answer(200, format!("run {run}"))
    });
    let first = tokio::spawn(app.send(event("e")));
    sleep(Duration::from_millis(100)).await;
    let () = redis::cmd("FLUSHALL").query_async(&mut server.client().await).await.unwrap();
    // By now the lease has been renewed, and the claim is there again.
    sleep(Duration::from_millis(500)).await;
    let other = App::new(&layer(server.store()), |_, _| async { answer(200, "ran again") });
    assert_eq!(other.send(event("e")).await.body, "run 1");
    assert_eq!(first.await.unwrap().body, "run 1");
}

#[test]
fn what_is_no_url_is_refused() {
    assert!(RedisStore::new("http://127.0.0.1/").is_err());
    assert!(RedisStore::new("").is_err());
}
