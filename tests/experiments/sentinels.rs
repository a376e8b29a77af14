//! What can happen to a master behind sentinels.

use std::time::Duration;

use futures_util::FutureExt as _;
use futures_util::future::join_all;
use tokio::time::sleep;
use tower_idempotency::store::redis::Durability;

use crate::app::{Point, Settings};
use crate::common::sentinel::Sentinels;
use crate::experiment::{Doubles, Experiment};
use crate::sender::Target;
use crate::trial::Trial;

pub const EXPERIMENTS: [Experiment; 3] = [
    Experiment::new("sentinel_failover_in_mid_flight_loses_and_doubles_nothing", Doubles::Nowhere, |trial| {
        failover(trial).boxed_local()
    })
    .back_within(Duration::from_secs(10)),
    Experiment::new("partition_with_failover_and_durability_off_doubles_only_outside", Doubles::Outside, |trial| {
        partition(trial, Durability::Master).boxed_local()
    }),
    Experiment::new("partition_with_failover_and_durability_on_loses_and_doubles_nothing", Doubles::Nowhere, |trial| {
        partition(trial, Durability::Replicated { replicas: 1, timeout: Duration::from_millis(300) }).boxed_local()
    }),
];

/// How many attempts are in mid-flight when it happens.
const EVENTS: usize = 8;

/// Longer than a failover takes.
const LEASE: Duration = Duration::from_secs(30);

async fn failover(trial: Trial) {
    let mut servers = Sentinels::start().await;
    let settings = Settings::default().lease(LEASE).work(Duration::from_millis(20));
    let targets = [(); 2].map(|()| Target::from(&trial.app(servers.store(), &settings).0));
    let (held, stop) = trial.app(servers.store(), &settings.stop(Point::AfterEffect));
    for n in 0..EVENTS {
        trial.sender.deliver(&targets, &format!("done-{n}")).await;
    }
    let first = [Target::from(&held), targets[0].clone()];
    let deliveries: Vec<_> = (0..EVENTS).map(|n| trial.sender.delivering(&first, &format!("event-{n}"))).collect();
    stop.reached(EVENTS).await;
    // What a master alone has is lost with it: see the partitions.
    servers.is_replicated().await;
    servers.kill_master().await;
    trial.fault_has_happened();
    stop.open();
    let load = trial.sender.load(&targets);
    trial.sender.deliver(&targets, "after").await;
    sleep(Duration::from_millis(500)).await;
    load.end().await;
    join_all(deliveries).await;
    trial.sender.late_duplicates(&targets).await;
}

/// The app still reaches the old master, while the sentinels promote its replica.
async fn partition(trial: Trial, durability: Durability) {
    let servers = Sentinels::start().await;
    // A claim may take as long as its replication is waited for.
    let settings = Settings::default().lease(LEASE).store_timeout(Duration::from_millis(500));
    let (inside, _) = trial.app(servers.store().durability(durability), &settings);
    let inside = [Target::from(&inside)];
    for n in 0..EVENTS {
        trial.sender.deliver(&inside, &format!("done-{n}")).await;
    }
    servers.is_replicated().await;
    servers.part().await;
    trial.fault_is_over();
    let deliveries: Vec<_> = (0..EVENTS).map(|n| trial.sender.delivering(&inside, &format!("event-{n}"))).collect();
    servers.has_failed_over().await;
    // A process that starts now asks the sentinels.
    let (outside, _) = trial.app(servers.store().durability(Durability::Master), &settings);
    let outside = [Target::from(&outside)];
    for n in 0..EVENTS {
        trial.sender.deliver(&outside, &format!("event-{n}")).await;
    }
    servers.heal().await;
    join_all(deliveries).await;
    trial.sender.late_duplicates(&inside).await;
    trial.sender.late_duplicates(&outside).await;
}
