//! Without the feature `metrics` nothing is counted, and nothing is timed.

use std::time::Duration;

use super::Shows;
use crate::policy::Contract;

pub(super) const CLAIM: () = ();
pub(super) const COMPLETE: () = ();

pub(crate) struct Shown;

pub(crate) struct RunTimer;

pub(crate) struct Timer;

pub(super) const fn describe() {}

pub(super) const fn ended(_: &'static str, _: &'static str, _: &'static str, _: Option<Duration>) {}

impl Timer {
    pub(crate) const fn start() -> Self {
        Self
    }
}

pub(super) const fn timed(_: Timer, _: (), _: Contract, _: &'static str) {}

impl Shown {
    pub(crate) const fn new(_: Shows) -> Self {
        Self
    }
}

impl RunTimer {
    pub(crate) const fn start(_: Contract) -> Self {
        Self
    }
}
