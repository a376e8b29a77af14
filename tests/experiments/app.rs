//! The app under test: a webhook that makes one effect of each event.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tokio::time::sleep;
use tower_idempotency::key::header;
use tower_idempotency::{IdempotencyLayer, Ledger, RedisStore};

use crate::common::app::{App, Incoming, answer, attempt};
use crate::effects::Effects;

/// How an app is set up.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Settings {
    pub lease: Duration,
    pub store_timeout: Duration,
    /// How long a run works before its effect.
    pub work: Duration,
    /// Where every run stops until it is let go.
    pub stop: Option<Point>,
    /// How many runs fail before one does not.
    pub failures: u32,
}

/// A place in the handler.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub enum Point {
    BeforeEffect,
    AfterEffect,
}

/// Holds the runs of an app at a point of the handler. Clones are one.
#[derive(Clone)]
pub struct Stop {
    point: Option<Point>,
    opened: watch::Sender<bool>,
    pub progress: watch::Sender<Progress>,
}

/// How far the runs of an app have come.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
pub struct Progress {
    /// How many have come to where they stop.
    pub stopped: usize,
    /// How many have passed their effect.
    pub past_effect: usize,
}

impl Default for Settings {
    fn default() -> Self {
        let (lease, store_timeout) = (Duration::from_secs(1), Duration::from_millis(250));
        Self { lease, store_timeout, work: Duration::ZERO, stop: None, failures: 0 }
    }
}

impl Settings {
    pub fn lease(self, lease: Duration) -> Self {
        Self { lease, ..self }
    }

    pub fn store_timeout(self, store_timeout: Duration) -> Self {
        Self { store_timeout, ..self }
    }

    pub fn work(self, work: Duration) -> Self {
        Self { work, ..self }
    }

    pub fn stop(self, point: Point) -> Self {
        Self { stop: Some(point), ..self }
    }

    pub fn failures(self, failures: u32) -> Self {
        Self { failures, ..self }
    }
}

impl Stop {
    fn at(point: Option<Point>) -> Self {
        Self { point, opened: watch::Sender::new(false), progress: watch::Sender::default() }
    }

    /// Lets go of those who have stopped, and stops nobody any more.
    pub fn open(&self) {
        self.opened.send_replace(true);
    }

    /// Returns when so many have stopped.
    pub async fn reached(&self, runs: usize) {
        self.progress.subscribe().wait_for(|progress| progress.stopped >= runs).await.unwrap();
    }

    async fn pass(&self, point: Point) {
        if self.point == Some(point) {
            self.progress.send_modify(|progress| progress.stopped += 1);
            self.opened.subscribe().wait_for(|opened| *opened).await.unwrap();
        }
    }
}

/// One process's app.
pub fn app(store: RedisStore, effects: &Effects, settings: &Settings) -> (App, Stop) {
    let ledger = Ledger::new(store).store_timeout(settings.store_timeout);
    let layer = IdempotencyLayer::webhook(&ledger, header("X-Id"));
    // A sender waits for 2 s.
    let layer = layer.lease(settings.lease).patience(Duration::from_millis(500));
    let stop = Stop::at(settings.stop);
    let (effects, stopping, settings) = (effects.clone(), stop.clone(), settings.clone());
    let app = App::new(&layer, move |request: Incoming, run| {
        let (effects, stop, settings) = (effects.clone(), stopping.clone(), settings.clone());
        async move {
            let (event, attempt) = (request.headers()["x-id"].to_str()?.to_owned(), attempt(&request));
            effects.runs(&event);
            sleep(settings.work).await;
            if run <= settings.failures {
                return answer(500, "failed");
            }
            stop.pass(Point::BeforeEffect).await;
            effects.make(&event, &attempt).await;
            stop.progress.send_modify(|progress| progress.past_effect += 1);
            stop.pass(Point::AfterEffect).await;
            answer(200, event)
        }
    });
    (app, stop)
}
