//! What can happen to the app, and to those who call it.

use std::future::poll_fn;
use std::pin::Pin;
use std::task::Poll;
use std::time::Duration;

use futures_util::FutureExt as _;
use futures_util::future::join_all;
use tokio::time::sleep;

use crate::app::{Point, Settings};
use crate::common::app::event;
use crate::common::redis::RedisServer;
use crate::experiment::{Doubles, Experiment};
use crate::sender::Target;
use crate::trial::Trial;

pub const EXPERIMENTS: [Experiment; 6] = [
    Experiment::new("app_killed_before_its_effect_loses_and_doubles_nothing", Doubles::Nowhere, |trial| {
        killed(trial, Point::BeforeEffect).boxed_local()
    }),
    Experiment::new("app_killed_between_effect_and_record_doubles_only_outside", Doubles::Outside, |trial| {
        killed(trial, Point::AfterEffect).boxed_local()
    }),
    Experiment::new("app_frozen_for_less_than_its_lease_loses_and_doubles_nothing", Doubles::Nowhere, |trial| {
        frozen(trial, Duration::from_millis(500)).boxed_local()
    }),
    Experiment::new("app_frozen_past_its_lease_doubles_only_outside", Doubles::Outside, |trial| {
        frozen(trial, Duration::from_millis(2500)).boxed_local()
    }),
    Experiment::new("500_duplicates_from_each_of_3_processes_are_one_run", Doubles::Nowhere, |trial| {
        duplicates(trial).boxed_local()
    }),
    Experiment::new("client_gone_at_every_await_point_loses_and_doubles_nothing", Doubles::Nowhere, |trial| {
        clients_gone(trial).boxed_local()
    }),
];

/// How many events are under way when it happens.
const EVENTS: usize = 8;

const PROCESSES: usize = 3;
const DUPLICATES: usize = 500;

async fn killed(trial: Trial, point: Point) {
    let server = RedisServer::start();
    let mut doomed = trial.process(&server.url(), Settings::default().stop(point)).await;
    let other = trial.process(&server.url(), Settings::default()).await;
    let targets = [Target::from(&doomed), Target::from(&other)];
    let deliveries: Vec<_> = (0..EVENTS).map(|n| trial.sender.delivering(&targets, &format!("event-{n}"))).collect();
    doomed.reached(|progress| progress.stopped == EVENTS).await;
    doomed.kill().await;
    trial.fault_has_happened();
    join_all(deliveries).await;
    trial.sender.late_duplicates(&[Target::from(&other)]).await;
}

async fn frozen(trial: Trial, pause: Duration) {
    let server = RedisServer::start();
    let settings = Settings::default().lease(Duration::from_millis(1500));
    let mut doomed = trial.process(&server.url(), settings.clone().stop(Point::BeforeEffect)).await;
    let other = trial.process(&server.url(), settings).await;
    let targets = [Target::from(&doomed), Target::from(&other)];
    let deliveries: Vec<_> = (0..EVENTS).map(|n| trial.sender.delivering(&targets, &format!("event-{n}"))).collect();
    doomed.reached(|progress| progress.stopped == EVENTS).await;
    doomed.freeze();
    // What the sender has for an answer by now comes from the other process.
    sleep(pause).await;
    doomed.thaw();
    trial.fault_is_over();
    doomed.open().await;
    doomed.reached(|progress| progress.past_effect == EVENTS).await;
    join_all(deliveries).await;
    trial.sender.late_duplicates(&targets).await;
}

async fn duplicates(trial: Trial) {
    let server = RedisServer::start();
    let mut processes = Vec::new();
    for _ in 0..PROCESSES {
        let settings = Settings::default().work(Duration::from_millis(300));
        processes.push(trial.process(&server.url(), settings).await);
    }
    let targets: Vec<Target> = processes.iter().map(Target::from).collect();
    let each = targets.iter().flat_map(|target| std::iter::repeat_n(target, DUPLICATES));
    let deliveries: Vec<_> = each.map(|to| trial.sender.delivering(std::slice::from_ref(to), "event")).collect();
    join_all(deliveries).await;
    trial.sender.late_duplicates(&targets).await;
    assert_eq!(trial.findings().runs, 1);
}

/// A client that leaves after so many polls, for every number there is; before, while and after its event runs.
async fn clients_gone(trial: Trial) {
    let server = RedisServer::start();
    // A claim that is left behind holds its key for longer than an experiment takes.
    let settings = Settings::default().lease(Duration::from_secs(300)).work(Duration::from_millis(30));
    for role in ["first", "duplicate", "late"] {
        let mut polls = 0;
        loop {
            // It is yet to connect.
            let (app, _) = trial.app(server.store(), &settings);
            let (target, id) = ([Target::from(&app)], format!("{role}-{polls}"));
            let first = match role {
                "first" => None,
                "duplicate" => Some(trial.sender.delivering(&target, &id)),
                _ => {
                    trial.sender.deliver(&target, &id).await;
                    None
                }
            };
            trial.sender.sends(&id);
            let has_ended = poll(app.call(event(&id)), polls).await;
            trial.sender.deliver(&target, &id).await;
            if let Some(first) = first {
                first.await.unwrap();
            }
            if has_ended {
                break;
            }
            polls += 1;
        }
        // A late one is sometimes told before it has to wait.
        assert!(polls > usize::from(role != "late"), "a {role} delivery has points to leave at");
    }
    let direct = [Target::from(&trial.app(server.store(), &settings).0)];
    trial.sender.late_duplicates(&direct).await;
}

/// Polls a future so many times, whenever it asks for it, and drops it. Tells whether it has ended by then.
async fn poll(mut future: impl Future + Unpin, times: usize) -> bool {
    let mut left = times;
    poll_fn(|context| {
        if left == 0 {
            return Poll::Ready(false);
        }
        left -= 1;
        match (Pin::new(&mut future).poll(context), left) {
            (Poll::Ready(_), _) => Poll::Ready(true),
            (Poll::Pending, 0) => Poll::Ready(false),
            (Poll::Pending, _) => Poll::Pending,
        }
    })
    .await
}
