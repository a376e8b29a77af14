//! What can happen to a Redis server.

use std::time::Duration;

use futures_util::FutureExt as _;
use futures_util::future::join_all;
use tokio::time::{Instant, sleep, timeout};
use tower_idempotency::RedisStore;

use crate::app::{Point, Settings};
use crate::common::proxy::Proxy;
use crate::common::redis::RedisServer;
use crate::experiment::{Doubles, Experiment};
use crate::sender::Target;
use crate::trial::Trial;

pub const EXPERIMENTS: [Experiment; 7] = [
    Experiment::new(
        "redis_frozen_for_less_than_the_lease_doubles_nothing_refuses_in_1_ms_and_is_back_in_1_s",
        Doubles::Nowhere,
        |trial| frozen_briefly(trial).boxed_local(),
    )
    .refuses_within(Duration::from_millis(1))
    .back_within(Duration::from_secs(1)),
    Experiment::new("redis_frozen_for_longer_than_the_lease_doubles_only_outside", Doubles::Outside, |trial| {
        frozen_for_long(trial).boxed_local()
    }),
    Experiment::new(
        "redis_killed_with_its_data_kept_doubles_nothing_refuses_in_1_ms_and_is_back_in_1_s",
        Doubles::Nowhere,
        |trial| {
            killed(trial, RedisServer::start_with(&["--appendonly", "yes", "--appendfsync", "always"])).boxed_local()
        },
    )
    .refuses_within(Duration::from_millis(1))
    .back_within(Duration::from_secs(1)),
    Experiment::new(
        "redis_killed_with_its_data_lost_doubles_only_outside_refuses_in_1_ms_and_is_back_in_1_s",
        Doubles::Outside,
        |trial| killed(trial, RedisServer::start()).boxed_local(),
    )
    .refuses_within(Duration::from_millis(1))
    .back_within(Duration::from_secs(1)),
    Experiment::new("redis_that_evicts_doubles_only_outside", Doubles::Outside, |trial| evicting(trial).boxed_local()),
    Experiment::new("redis_out_of_memory_loses_and_doubles_nothing", Doubles::Nowhere, |trial| {
        out_of_memory(trial).boxed_local()
    })
    .back_within(Duration::from_secs(1)),
    Experiment::new("redis_whose_scripts_are_flushed_loses_and_doubles_nothing", Doubles::Nowhere, |trial| {
        flushed(trial).boxed_local()
    }),
];

/// How many attempts are in mid-flight when it happens.
const EVENTS: usize = 8;

const SOME_TIME: Duration = Duration::from_millis(300);

async fn frozen_briefly(trial: Trial) {
    let server = RedisServer::start();
    let settings = Settings::default().lease(Duration::from_secs(10)).work(Duration::from_millis(20));
    let (a, _) = trial.app(server.store(), &settings);
    let (b, _) = trial.app(server.store(), &settings);
    let (held, stop) = trial.app(server.store(), &settings.stop(Point::AfterEffect));
    let targets = [Target::from(&a), Target::from(&b)];
    let first = [Target::from(&held), Target::from(&a)];
    let deliveries: Vec<_> = (0..EVENTS).map(|n| trial.sender.delivering(&first, &format!("event-{n}"))).collect();
    stop.reached(EVENTS).await;
    let load = trial.sender.load(&targets);
    sleep(SOME_TIME).await;
    server.freeze();
    sleep(SOME_TIME).await;
    // What has finished by now cannot be stored.
    stop.open();
    trial.time_refusals(&a).await;
    server.thaw();
    trial.fault_is_over();
    sleep(SOME_TIME).await;
    load.end().await;
    join_all(deliveries).await;
    trial.sender.late_duplicates(&targets).await;
}

/// An attempt renews its lease also at a server that is frozen: what it has sent is read when the server is thawed, and
/// before anything that is sent from then on. What no store can prevent is a takeover that was sent before.
async fn frozen_for_long(trial: Trial) {
    let server = RedisServer::start();
    let proxy = Proxy::to(server.port()).await;
    let lease = Duration::from_millis(1500);
    let settings = Settings::default().lease(lease);
    let rival = [Target::from(&trial.app(RedisStore::new(&proxy.url()).unwrap(), &settings).0)];
    let (holder, stop) = trial.app(server.store(), &settings.clone().stop(Point::AfterEffect));
    // It is released, taken over and renewed: from here on the server knows all scripts.
    let (thorough, _) = trial.app(server.store(), &settings.work(lease / 2).failures(1));
    trial.sender.deliver(&[Target::from(&thorough)], "before").await;
    trial.sender.deliver(&rival, "before").await;
    let (sender, target) = (trial.sender.clone(), Target::from(&holder));
    let first = tokio::spawn(async move { sender.send(&target, "event").await });
    stop.reached(1).await;
    let running = Instant::now();
    proxy.freeze_at("EVALSHA");
    let second = trial.sender.delivering(&rival, "event");
    while proxy.frozen() == 0 {
        sleep(Duration::from_millis(1)).await;
    }
    server.freeze();
    proxy.thaw();
    assert!(running.elapsed() < lease / 4, "the takeover was to be sent before the lease is renewed");
    sleep(lease * 3 / 2).await;
    server.thaw();
    trial.fault_is_over();
    // If it did not take over, it waits for ever.
    timeout(lease * 4, second).await.expect("a takeover").unwrap();
    stop.open();
    first.await.unwrap();
    trial.sender.late_duplicates(&rival).await;
}

async fn killed(trial: Trial, mut server: RedisServer) {
    // It is down for a second.
    let settings = Settings::default().lease(Duration::from_secs(10)).work(Duration::from_millis(20));
    let (a, _) = trial.app(server.store(), &settings);
    let (b, _) = trial.app(server.store(), &settings);
    let targets = [Target::from(&a), Target::from(&b)];
    let load = trial.sender.load(&targets);
    sleep(SOME_TIME).await;
    server.kill();
    trial.time_refusals(&a).await;
    server.restart();
    trial.fault_is_over();
    sleep(SOME_TIME).await;
    load.end().await;
    trial.sender.late_duplicates(&targets).await;
}

async fn evicting(trial: Trial) {
    let server = RedisServer::start_with(&["--maxmemory", "3mb", "--maxmemory-policy", "allkeys-lru"]);
    let (app, _) = trial.app(server.store(), &Settings::default());
    let targets = [Target::from(&app)];
    for n in 0..EVENTS {
        trial.sender.deliver(&targets, &format!("event-{n}")).await;
    }
    // Somebody else keeps a cache there.
    let mut client = server.client().await;
    let mut cache = redis::pipe();
    for n in 0..1000 {
        cache.set(format!("cache:{n}"), vec![b'x'; 10 << 10]).ignore();
    }
    let () = cache.query_async(&mut client).await.unwrap();
    trial.sender.late_duplicates(&targets).await;
}

async fn out_of_memory(trial: Trial) {
    let server = RedisServer::start_with(&["--maxmemory-policy", "noeviction"]);
    let mut client = server.client().await;
    let mut limit = async |bytes: u32| {
        let mut set = redis::cmd("CONFIG");
        set.arg("SET").arg("maxmemory").arg(bytes);
        let () = set.query_async(&mut client).await.unwrap();
    };
    let settings = Settings::default().work(Duration::from_millis(20));
    let (app, _) = trial.app(server.store(), &settings);
    let (held, stop) = trial.app(server.store(), &settings.stop(Point::AfterEffect));
    let (targets, first) = ([Target::from(&app)], [Target::from(&held)]);
    let deliveries: Vec<_> = (0..EVENTS).map(|n| trial.sender.delivering(&first, &format!("event-{n}"))).collect();
    stop.reached(EVENTS).await;
    let load = trial.sender.load(&targets);
    sleep(SOME_TIME).await;
    limit(1).await;
    let refused = trial.sender.send(&targets[0], "refused").await;
    assert_eq!(refused.map(|status| status.as_u16()), Some(503));
    // What has finished is stored all the same.
    stop.open();
    join_all(deliveries).await;
    sleep(SOME_TIME).await;
    limit(0).await;
    trial.fault_is_over();
    load.end().await;
    trial.sender.late_duplicates(&targets).await;
}

async fn flushed(trial: Trial) {
    let server = RedisServer::start();
    let settings = Settings::default().work(Duration::from_millis(20));
    let (a, _) = trial.app(server.store(), &settings);
    let (b, _) = trial.app(server.store(), &settings);
    let targets = [Target::from(&a), Target::from(&b)];
    let load = trial.sender.load(&targets);
    let mut client = server.client().await;
    for _ in 0..100 {
        let () = redis::cmd("SCRIPT").arg("FLUSH").query_async(&mut client).await.unwrap();
        sleep(Duration::from_millis(5)).await;
    }
    load.end().await;
    trial.sender.late_duplicates(&targets).await;
}
