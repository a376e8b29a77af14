//! One experiment, tried in one place: what it may use, and what came of it.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::time::{Instant, sleep};
use tower_idempotency::RedisStore;

use crate::app::{Settings, Stop, app};
use crate::common::app::App;
use crate::common::scratch::Scratch;
use crate::effects::{Effects, Place};
use crate::process::Process;
use crate::sender::{Sender, Target};

/// How many deliveries are refused to know how long that takes.
const REFUSALS: usize = 200;

/// How long answers may be on their way.
const UNDER_WAY: Duration = Duration::from_millis(20);

/// Clones are one trial.
#[derive(Clone)]
pub struct Trial {
    pub sender: Sender,
    pub effects: Effects,
    place: Place,
    dir: Arc<Scratch>,
    notes: Arc<Mutex<Notes>>,
}

#[derive(Default)]
struct Notes {
    over: Option<Instant>,
    /// A 2xx before that was on its way when the fault happened.
    recovers_from: Option<Instant>,
    refusal: Option<Duration>,
}

/// What came of a trial.
#[derive(Clone, Debug)]
pub struct Findings {
    pub requests: usize,
    pub runs: usize,
    pub lost: Vec<String>,
    /// Effects beyond the first of each event.
    pub doubled: usize,
    /// From the end of the fault to the first 2xx.
    pub recovery: Option<Duration>,
    /// The median time to a refusal while there is no store.
    pub refusal: Option<Duration>,
}

impl Trial {
    pub fn new(place: Place) -> Self {
        let dir = Arc::new(Scratch::new());
        let effects = Effects::open(dir.path(), place);
        Self { sender: Sender::new(), effects, place, dir, notes: Arc::default() }
    }

    /// An app in this process, as if it were in one of its own.
    pub fn app(&self, store: RedisStore, settings: &Settings) -> (App, Stop) {
        app(store, &self.effects, settings)
    }

    pub async fn process(&self, url: &str, settings: Settings) -> Process {
        Process::start(url, self.dir.path().to_owned(), self.place, settings).await
    }

    /// From here on the recovery is timed.
    pub fn fault_is_over(&self) {
        let now = Some(Instant::now());
        let mut notes = self.notes.lock().unwrap();
        (notes.over, notes.recovers_from) = (now, now);
    }

    /// From here on the recovery is timed, since nothing ends the fault.
    pub fn fault_has_happened(&self) {
        self.fault_is_over();
        self.notes.lock().unwrap().recovers_from = Some(Instant::now() + UNDER_WAY);
    }

    /// Delivers to an app without a store, one delivery after the other, and notes how long a refusal takes.
    pub async fn time_refusals(&self, app: &App) {
        // In the first moments nobody knows that there is none.
        sleep(Duration::from_millis(600)).await;
        let mut took = Vec::new();
        for n in 0..REFUSALS {
            let started = Instant::now();
            let status = self.sender.send(&Target::from(app), &format!("refused-{}", n % 4)).await;
            took.push(started.elapsed());
            assert_eq!(status.map(|status| status.as_u16()), Some(503));
        }
        took.sort_unstable();
        self.notes.lock().unwrap().refusal = Some(took[REFUSALS / 2]);
    }

    /// What has come of it by now.
    pub fn findings(&self) -> Findings {
        let log = self.sender.log();
        let effects = Effects::count(self.dir.path(), self.place);
        let lost = log.events.iter().filter(|id| !(log.acknowledged.contains(*id) && effects.contains_key(*id)));
        let notes = self.notes.lock().unwrap();
        let first = log.accepted.iter().find(|at| notes.recovers_from.is_some_and(|from| **at >= from));
        Findings {
            requests: log.requests,
            runs: Effects::count_runs(self.dir.path()).values().sum::<u32>() as usize,
            lost: lost.cloned().collect(),
            doubled: effects.values().map(|made| made - 1).sum::<u32>() as usize,
            recovery: first.zip(notes.over).map(|(first, over)| *first - over),
            refusal: notes.refusal,
        }
    }
}
