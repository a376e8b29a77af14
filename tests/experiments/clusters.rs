//! What can happen to a Redis Cluster.

use std::time::Duration;

use futures_util::FutureExt as _;
use futures_util::future::join_all;
use tokio::time::sleep;
use tower_idempotency::RedisStore;

use crate::app::{Point, Settings};
use crate::common::cluster::{Cluster, NODE_TIMEOUT};
use crate::experiment::{Doubles, Experiment};
use crate::sender::Target;
use crate::trial::Trial;

pub const EXPERIMENTS: [Experiment; 3] = [
    Experiment::new(
        "cluster_owner_frozen_in_mid_flight_doubles_nothing_and_is_back_in_node_timeout_and_5_s",
        Doubles::Nowhere,
        |trial| owner_lost(trial, Fault::Frozen).boxed_local(),
    )
    .back_within(BACK),
    Experiment::new(
        "cluster_owner_killed_in_mid_flight_doubles_nothing_and_is_back_in_node_timeout_and_5_s",
        Doubles::Nowhere,
        |trial| owner_lost(trial, Fault::Killed).boxed_local(),
    )
    .back_within(BACK),
    Experiment::new("cluster_slot_moved_under_load_loses_and_doubles_nothing", Doubles::Nowhere, |trial| {
        slot_moved(trial).boxed_local()
    }),
];

const BACK: Duration = NODE_TIMEOUT.saturating_add(Duration::from_secs(5));

/// How many attempts are in mid-flight when it happens.
const EVENTS: usize = 8;

/// Longer than a cluster does without an owner.
const LEASE: Duration = Duration::from_secs(20);

/// What is in braces decides the slot: all keys have the same owner, and all traffic is what the fault meets.
const PREFIX: &str = "{one}";

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Fault {
    Frozen,
    Killed,
}

fn store(cluster: &Cluster) -> RedisStore {
    cluster.store().prefix(PREFIX)
}

async fn owner_lost(trial: Trial, fault: Fault) {
    let mut cluster = Cluster::start().await;
    let slot = cluster.slot(PREFIX).await;
    let owner = cluster.owner_of(slot, 0).await;
    let settings = Settings::default().lease(LEASE).work(Duration::from_millis(20));
    let targets = [(); 2].map(|()| Target::from(&trial.app(store(&cluster), &settings).0));
    let (held, stop) = trial.app(store(&cluster), &settings.stop(Point::AfterEffect));
    for n in 0..EVENTS {
        trial.sender.deliver(&targets, &format!("done-{n}")).await;
    }
    let first = [Target::from(&held), targets[0].clone()];
    let deliveries: Vec<_> = (0..EVENTS).map(|n| trial.sender.delivering(&first, &format!("event-{n}"))).collect();
    stop.reached(EVENTS).await;
    // What an owner alone has is lost with it, and no store can prevent that.
    cluster.is_replicated(owner).await;
    match fault {
        Fault::Frozen => cluster.freeze(owner),
        Fault::Killed => cluster.kill(owner),
    }
    trial.fault_has_happened();
    stop.open();
    let load = trial.sender.load(&targets);
    trial.sender.deliver(&targets, "after").await;
    if fault == Fault::Frozen {
        // It is a replica before long, but does not know that yet.
        cluster.thaw(owner);
    }
    sleep(Duration::from_millis(500)).await;
    load.end().await;
    join_all(deliveries).await;
    trial.sender.late_duplicates(&targets).await;
}

async fn slot_moved(trial: Trial) {
    let cluster = Cluster::start().await;
    let slot = cluster.slot(PREFIX).await;
    let owner = cluster.owner_of(slot, 0).await;
    let settings = Settings::default().lease(LEASE).work(Duration::from_millis(20));
    let targets = [(); 2].map(|()| Target::from(&trial.app(store(&cluster), &settings).0));
    let (held, stop) = trial.app(store(&cluster), &settings.stop(Point::AfterEffect));
    let first = [Target::from(&held), targets[0].clone()];
    let deliveries: Vec<_> = (0..EVENTS).map(|n| trial.sender.delivering(&first, &format!("event-{n}"))).collect();
    stop.reached(EVENTS).await;
    let load = trial.sender.load(&targets);
    sleep(Duration::from_millis(300)).await;
    let next = (owner + 1) % 3;
    cluster.migrate(slot, owner, next).await;
    stop.open();
    cluster.migrate(slot, next, owner).await;
    cluster.migrate(slot, owner, next).await;
    trial.fault_is_over();
    load.end().await;
    join_all(deliveries).await;
    trial.sender.late_duplicates(&targets).await;
}
