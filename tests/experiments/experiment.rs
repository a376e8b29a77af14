//! What an experiment is, and when it has passed.

use std::fmt::Write as _;
use std::panic::AssertUnwindSafe;
use std::time::Duration;

use futures_util::FutureExt as _;
use futures_util::future::LocalBoxFuture;
use tokio::time::timeout;

use crate::effects::Place;
use crate::trial::{Findings, Trial};

/// No experiment takes longer than that, in one place.
const LONG: Duration = Duration::from_secs(90);

/// Where an event may have more than one effect. Where it may, it has to: else the experiment shows nothing.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Doubles {
    Nowhere,
    Outside,
}

/// A fault, and what has to come of it.
pub struct Experiment {
    pub name: &'static str,
    doubles: Doubles,
    back_within: Option<Duration>,
    refuses_within: Option<Duration>,
    run: fn(Trial) -> LocalBoxFuture<'static, ()>,
}

/// What came of an experiment in both places.
pub struct Row {
    pub name: &'static str,
    pub outside: Findings,
    pub fenced: Findings,
    /// What it has not passed for.
    pub faults: String,
}

impl Experiment {
    /// Its name ends with its criterion.
    pub const fn new(name: &'static str, doubles: Doubles, run: fn(Trial) -> LocalBoxFuture<'static, ()>) -> Self {
        Self { name, doubles, back_within: None, refuses_within: None, run }
    }

    pub const fn back_within(self, recovery: Duration) -> Self {
        Self { back_within: Some(recovery), ..self }
    }

    pub const fn refuses_within(self, refusal: Duration) -> Self {
        Self { refuses_within: Some(refusal), ..self }
    }

    /// Runs it in both places, one after the other. Fails if it does not come to its end.
    pub async fn run(&self) -> Result<Row, String> {
        let (outside, fenced) = (self.run_in(Place::Outside).await?, self.run_in(Place::Fenced).await?);
        let mut row = Row { name: self.name, outside, fenced, faults: String::new() };
        row.faults = self.judge(&row);
        Ok(row)
    }

    async fn run_in(&self, place: Place) -> Result<Findings, String> {
        let trial = Trial::new(place);
        let run = AssertUnwindSafe((self.run)(trial.clone())).catch_unwind();
        match timeout(LONG, run).await {
            Ok(Ok(())) => Ok(trial.findings()),
            Ok(Err(_panic)) => Err(format!("{place:?}: it panicked, after {:?}", trial.findings())),
            Err(_) => Err(format!("{place:?}: it does not end, after {:?}", trial.findings())),
        }
    }

    /// What is wrong with what came of it.
    fn judge(&self, row: &Row) -> String {
        let mut faults = String::new();
        let mut wrong = |fault: String| writeln!(faults, "{fault}").unwrap();
        if self.doubles == Doubles::Nowhere && row.outside.doubled > 0 {
            wrong(format!("{} doubled outside", row.outside.doubled));
        }
        if self.doubles == Doubles::Outside && row.outside.doubled == 0 {
            wrong("nothing doubled outside, so it shows nothing".to_owned());
        }
        if row.fenced.doubled > 0 {
            wrong(format!("{} doubled behind the fence", row.fenced.doubled));
        }
        for (place, findings) in [("outside", &row.outside), ("fenced", &row.fenced)] {
            if !findings.lost.is_empty() {
                wrong(format!("{place}: lost {:?}", findings.lost));
            }
            let mut within = |what: &str, limit: Option<Duration>, took: Option<Duration>| {
                if let Some(limit) = limit
                    && took.is_none_or(|took| took > limit)
                {
                    wrong(format!("{place}: {what} took {took:?}, and may take {limit:?}"));
                }
            };
            within("the recovery", self.back_within, findings.recovery);
            within("a refusal", self.refuses_within, findings.refusal);
        }
        faults
    }
}
