//! What can happen between the app and a Redis server.

use std::collections::BTreeSet;
use std::time::Duration;

use futures_util::FutureExt as _;
use futures_util::future::join_all;
use tokio::time::sleep;
use tower_idempotency::RedisStore;

use crate::app::{Point, Settings};
use crate::common::proxy::{Loss, Proxy};
use crate::common::redis::RedisServer;
use crate::experiment::{Doubles, Experiment};
use crate::sender::Target;
use crate::trial::Trial;

pub const EXPERIMENTS: [Experiment; 4] = [
    Experiment::new("tcp_black_holed_loses_and_doubles_nothing", Doubles::Nowhere, |trial| {
        black_holed(trial).boxed_local()
    })
    .back_within(Duration::from_secs(2)),
    Experiment::new("idle_connections_cut_cost_no_request_and_double_nothing", Doubles::Nowhere, |trial| {
        cut_while_idle(trial).boxed_local()
    })
    .back_within(Duration::from_secs(1)),
    Experiment::new("every_answer_of_each_command_cut_off_once_loses_and_doubles_nothing", Doubles::Nowhere, |trial| {
        every_answer_lost(trial, Loss::Cut).boxed_local()
    }),
    Experiment::new("every_answer_of_each_command_dropped_once_loses_and_doubles_nothing", Doubles::Nowhere, |trial| {
        every_answer_lost(trial, Loss::Silence).boxed_local()
    }),
];

/// How many attempts are in mid-flight when it happens.
const EVENTS: usize = 8;

const SOME_TIME: Duration = Duration::from_millis(300);

/// More than an event has steps, with all that is sent again.
const STEPS: usize = 16;

/// How many kinds of steps there are, and how often they are tried until the answer of each has been lost.
const KINDS: usize = 8;
const ROUNDS: usize = 3;

async fn black_holed(trial: Trial) {
    let server = RedisServer::start();
    let proxies = [Proxy::to(server.port()).await, Proxy::to(server.port()).await];
    // Two renewals may vanish before the connection is replaced.
    let settings = Settings::default().lease(Duration::from_secs(3)).work(Duration::from_millis(20));
    let stores = proxies.each_ref().map(|proxy| RedisStore::new(&proxy.url()).unwrap());
    let targets = stores.each_ref().map(|store| Target::from(&trial.app(store.clone(), &settings).0));
    let (held, stop) = trial.app(stores[0].clone(), &settings.stop(Point::AfterEffect));
    let first = [Target::from(&held), targets[1].clone()];
    let deliveries: Vec<_> = (0..EVENTS).map(|n| trial.sender.delivering(&first, &format!("event-{n}"))).collect();
    stop.reached(EVENTS).await;
    let load = trial.sender.load(&targets);
    sleep(SOME_TIME).await;
    proxies.iter().for_each(Proxy::black_hole);
    trial.fault_has_happened();
    stop.open();
    sleep(SOME_TIME).await;
    load.end().await;
    join_all(deliveries).await;
    trial.sender.late_duplicates(&targets).await;
}

async fn cut_while_idle(trial: Trial) {
    let server = RedisServer::start();
    let targets = [(); 2].map(|()| Target::from(&trial.app(server.store(), &Settings::default()).0));
    let mut client = server.client().await;
    for n in 0..20 {
        for (target, name) in targets.iter().zip(["a", "b"]) {
            let status = trial.sender.send(target, &format!("{name}-{n}")).await;
            assert_eq!(status.map(|status| status.as_u16()), Some(200), "a cut costs no request");
        }
        let mut kill = redis::cmd("CLIENT");
        let cut: u32 = kill.arg(&["KILL", "TYPE", "normal", "SKIPME", "yes"]).query_async(&mut client).await.unwrap();
        assert_eq!(cut, 2);
        trial.fault_is_over();
        sleep(Duration::from_millis(20)).await;
    }
    trial.sender.late_duplicates(&targets).await;
}

async fn every_answer_lost(trial: Trial, loss: Loss) {
    let mut lost = BTreeSet::new();
    // A machine that stands still for a moment changes the order of the steps, and then one is lost twice and one is not.
    for round in 0..ROUNDS {
        lost.extend(answers_lost(&trial, loss, round).await);
        if lost.len() >= KINDS {
            break;
        }
    }
    assert_eq!(
        lost.len(),
        KINDS,
        "SET, a renewal by its code, and a release, a takeover and a completion by hash and by code: {lost:?}"
    );
}

/// An event that is claimed, released, taken over, renewed, completed and replayed, by scripts that the server does not
/// know yet: once for each of its answers, which alone is lost. Returns what was asked for in those.
async fn answers_lost(trial: &Trial, loss: Loss, round: usize) -> BTreeSet<String> {
    let servers: Vec<RedisServer> = (1..=STEPS).map(|_| RedisServer::start()).collect();
    let trials = servers.iter().zip(1..).map(async |(server, nth)| {
        let proxy = Proxy::to(server.port()).await;
        let store = RedisStore::new(&proxy.url()).unwrap();
        // Long enough for one renewal, also where that is late, and too short for two.
        let settings = Settings::default().lease(Duration::from_secs(3)).work(Duration::from_millis(1100)).failures(1);
        let targets = [Target::from(&trial.app(store, &settings).0)];
        proxy.lose_answer(nth, loss);
        let id = format!("event-{round}-{nth}");
        trial.sender.deliver(&targets, &id).await;
        trial.sender.deliver(&targets, &id).await;
        proxy.lost()
    });
    let lost = join_all(trials).await;
    assert!(lost[STEPS - 1].is_empty(), "there are more answers to lose");
    lost.into_iter().flatten().collect()
}
