//! What a Redis Cluster can do to a store, beside what `tests/experiments` counts.

#![allow(clippy::expect_used, clippy::unwrap_used, reason = "a test panics where it fails")]

mod common;

use std::collections::HashMap;
use std::time::Duration;

use redis::aio::MultiplexedConnection;
use redis::{AsyncCommands as _, Value};
use tokio::runtime::Builder;
use tokio::time::{sleep, timeout};
use tower_idempotency::key::{Key, header};
use tower_idempotency::store::{Claim, Hold, Store as _};
use tower_idempotency::{IdempotencyLayer, Ledger, RedisStore};

use common::app::{App, answer, event};
use common::cluster::Cluster;
use common::until;

const LONG: Duration = Duration::from_secs(60);

fn app(store: RedisStore) -> App {
    let layer = IdempotencyLayer::webhook(&Ledger::new(store), header("X-Id"));
    App::new(&layer, |_, _| async { answer(200, "ran") })
}

/// Keys that this master has.
async fn keys_of(cluster: &Cluster, master: usize) -> Vec<Key> {
    let mut keys = Vec::new();
    for key in (0..30).map(|n| Key::from([n; 24])) {
        if cluster.owner_of(cluster.slot(&format!("{{{key}}}")).await, 0).await == master {
            keys.push(key);
        }
    }
    keys
}

/// A prefix under which all keys are this master's.
async fn prefix_of(cluster: &Cluster, master: usize) -> String {
    for tag in 'a'..='z' {
        let prefix = format!("{{{tag}}}");
        if cluster.owner_of(cluster.slot(&prefix).await, 0).await == master {
            return prefix;
        }
    }
    panic!("a master without a letter")
}

async fn clients(cluster: &Cluster) -> Vec<MultiplexedConnection> {
    let mut clients = Vec::new();
    for url in cluster.urls() {
        clients.push(redis::Client::open(url).unwrap().get_multiplexed_async_connection().await.unwrap());
    }
    clients
}

async fn set(client: &mut MultiplexedConnection, name: &str, value: &str) {
    let () = redis::cmd("CONFIG").arg(&["SET", name, value]).query_async(client).await.unwrap();
}

#[tokio::test]
async fn a_node_that_is_silent_holds_up_nobody_but_its_own_keys() {
    let cluster = Cluster::start().await;
    // Else the other nodes themselves refuse, from the node timeout until the replica has taken over.
    for mut client in clients(&cluster).await {
        set(&mut client, "cluster-require-full-coverage", "no").await;
    }
    let store = cluster.store();
    let others = app(store.clone().prefix(&prefix_of(&cluster, 0).await));
    let its_own = app(store.prefix(&prefix_of(&cluster, 1).await));
    for app in [&others, &its_own] {
        assert_eq!(app.send(event("before")).await.status, 200);
    }
    cluster.freeze(1);
    let back = async {
        for n in 0.. {
            if its_own.send(event(&format!("own-{n}"))).await.status == 200 {
                break;
            }
            sleep(Duration::from_millis(20)).await;
        }
    };
    let served = async {
        for n in 0.. {
            let status = others.send(event(&format!("other-{n}"))).await.status;
            assert_eq!(status, 200, "delivery {n} has nothing to do with the node");
            sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::select! {
        ended = timeout(LONG, back) => ended.expect("the replica takes over"),
        () = served => {}
    }
    cluster.thaw(1);
}

#[test]
fn a_runtime_that_ends_takes_no_connection_with_it() {
    let starting = Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let cluster = starting.block_on(Cluster::start());
    let app = app(cluster.store());
    for runtime in 0..2 {
        Builder::new_current_thread().enable_all().build().unwrap().block_on(async {
            let deliver = async || app.send(event(&runtime.to_string())).await.status == 200;
            until(deliver).await;
        });
    }
}

#[tokio::test]
async fn who_is_strict_looks_at_every_master() {
    let cluster = Cluster::start().await;
    let strict = app(cluster.store().strict());
    assert_eq!(strict.send(event("e")).await.status, 503, "they persist nothing");
    for mut client in clients(&cluster).await {
        set(&mut client, "appendonly", "yes").await;
    }
    until(async || strict.send(event("e")).await.status == 200).await;
}

#[tokio::test]
async fn the_rights_in_the_docs_are_enough() {
    let cluster = Cluster::start().await;
    let readme = include_str!("../README.md");
    let (_, rest) = readme.split_once("An ACL user needs `").unwrap();
    let (rights, rest) = rest.split_once('`').unwrap();
    let (_, rest) = rest.split_once("in a cluster `").unwrap();
    let of_a_cluster = rest.split_once('`').unwrap().0;
    let single = ["+publish", "+subscribe", "+unsubscribe"];
    let rights =
        rights.split_whitespace().filter(|right| !single.contains(right)).chain(of_a_cluster.split_whitespace());
    let mut acl = redis::cmd("ACL");
    acl.arg(&["SETUSER", "app", "reset", "on", ">secret", "resetchannels"]).arg(rights.collect::<Vec<_>>());
    let mut clients = clients(&cluster).await;
    for client in &mut clients {
        let () = acl.query_async(client).await.unwrap();
    }
    let urls: Vec<_> = cluster.urls().iter().map(|url| url.replace("redis://", "redis://app:secret@")).collect();
    let store = RedisStore::cluster(&urls.iter().map(String::as_str).collect::<Vec<_>>()).unwrap();
    let (key, held) = (Key::from([9; 24]), Claim::new(LONG, LONG));
    let (waits, waiting) = (store.clone(), key);
    let woken = tokio::spawn(async move { waits.changed(&waiting).await });
    // By each node's count of those who listen.
    let channel = format!("idempotency:{{{key}}}");
    until(async || {
        let mut listeners = 0;
        for client in &mut clients {
            let mut count = redis::cmd("PUBSUB");
            let (_, here): (String, u32) = count.arg("SHARDNUMSUB").arg(&channel).query_async(client).await.unwrap();
            listeners += here;
        }
        listeners == 1
    })
    .await;
    store.claim(&key, &held).await.unwrap();
    assert_eq!(store.complete(&key, &held, vec![0; 100_000].into()).await.unwrap(), Hold::Held);
    timeout(LONG, woken).await.expect("a message").unwrap();
    // The client looks for slots that have moved.
    let slot = cluster.slot(&channel).await;
    let owner = cluster.owner_of(slot, 0).await;
    cluster.migrate(slot, owner, (owner + 1) % 3).await;
    assert!(store.lookup(&key).await.unwrap().is_some());
    for client in &mut clients {
        let denied: Vec<HashMap<String, Value>> = redis::cmd("ACL").arg("LOG").query_async(client).await.unwrap();
        let look = [Value::BulkString(b"info".to_vec()), Value::BulkString(b"config|get".to_vec())];
        let denied: Vec<_> = denied.iter().filter(|entry| !look.contains(&entry["object"])).collect();
        assert!(denied.is_empty(), "{denied:?}");
    }
}

#[tokio::test]
async fn a_shard_that_is_silent_takes_no_wakening_from_others() {
    let cluster = Cluster::start().await;
    let store = cluster.store();
    let (others, its_own) = (keys_of(&cluster, 0).await, keys_of(&cluster, 1).await);
    let mut owner = clients(&cluster).await.swap_remove(0);
    cluster.freeze(1);
    let watch = |key: Key| {
        let store = store.clone();
        tokio::spawn(async move { store.changed(&key).await })
    };
    let silent: Vec<_> = its_own.into_iter().map(watch).collect();
    let woken = watch(others[0]);
    let channel = format!("idempotency:{{{}}}", others[0]);
    until(async || owner.spublish::<_, _, u32>(&channel, "").await.unwrap() == 1).await;
    timeout(LONG, woken).await.expect("it was subscribed to").unwrap();
    cluster.thaw(1);
    silent.iter().for_each(tokio::task::JoinHandle::abort);
}
