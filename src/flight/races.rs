//! Flights in every order that chance comes upon. `crate::races` says how.

#![allow(clippy::expect_used, clippy::unwrap_used, reason = "a test panics where it fails")]

use std::pin::pin;
use std::time::Duration;

use futures_util::FutureExt as _;
use futures_util::future::{join_all, select};
use shuttle::future::{spawn, yield_now};
use shuttle::rand::{Rng as _, thread_rng};

use super::*;
use crate::MemoryStore;
use crate::policy::Contract;
use crate::races::{LONG, in_many_orders, pass_time};
use crate::sync::atomic::{AtomicU32, Ordering};
use crate::telemetry::Report;

const KEY: Key = Key::new([7; 24]);

/// Who comes, waits, leads if it is its turn, and hands on in one way or the other. Some leave before.
async fn member(ledger: Ledger, leading: Arc<AtomicU32>, time_passes: bool) {
    let print = Fingerprint::from_bytes([thread_rng().gen_range(0..2); 16]);
    let mut seat = Seat::take(&ledger, KEY, Some(print), thread_rng().gen_bool(0.5));
    let leaves = thread_rng().gen_bool(0.4);
    let stays = async {
        for _ in 0..thread_rng().gen_range(0..6) {
            yield_now().await;
        }
        if !leaves {
            std::future::pending::<()>().await;
        }
    };
    let part = async {
        let mut report = Report::open(Contract::Webhook);
        while let Turn::Lead(lead) = seat.turn(Instant::now() + LONG, &mut report).await {
            assert_eq!(leading.fetch_add(1, Ordering::SeqCst), 0, "two have the lead");
            Leads { lead: Some(lead), leading: &leading, time_passes }.goes_on(print).await;
        }
    };
    select(pin!(stays), pin!(part)).await;
}

/// A lead, and that it is had.
struct Leads<'a> {
    lead: Option<Lead>,
    leading: &'a AtomicU32,
    time_passes: bool,
}

impl Leads<'_> {
    async fn goes_on(mut self, print: Fingerprint) {
        yield_now().await;
        // The last is for where time passes.
        let way = thread_rng().gen_range(0..if self.time_passes { 6 } else { 5 });
        if way < 2 {
            self.lead.as_ref().unwrap().running(Some(print));
            yield_now().await;
        }
        let lead = self.lead.take().unwrap();
        self.leading.fetch_sub(1, Ordering::SeqCst);
        match way {
            0 | 3 => lead.land(Landing::Failed),
            1 => lead.failed(),
            2 => lead.step_down(),
            4 => drop(lead),
            _ => lead.running_elsewhere(Some(print), Duration::from_millis(30)),
        }
    }
}

impl Drop for Leads<'_> {
    fn drop(&mut self) {
        if self.lead.is_some() {
            self.leading.fetch_sub(1, Ordering::SeqCst);
        }
    }
}

/// Five of them, with one who has a seat and does nothing, so that the flight stays.
async fn all_come_to_their_end(ledger: Ledger, time_passes: bool) {
    let seat = Seat::take(&ledger, KEY, None, false);
    let leading = Arc::new(AtomicU32::new(0));
    let members = (0..5).map(|_| spawn(member(ledger.clone(), Arc::clone(&leading), time_passes)));
    for ended in join_all(members.collect::<Vec<_>>()).await {
        ended.unwrap();
    }
    assert_eq!(ledger.waiting(), 0);
    let places = lock(&seat.flight.state).waiting;
    assert!(seat.flight.landed.get().is_some() || places == 0, "{places} places are left");
    drop(seat);
    assert!(ledger.flights().is_empty(), "a flight is left");
}

#[test]
fn whoever_waits_is_told_or_leads_and_leaves_nothing_behind() {
    in_many_orders(|_| all_come_to_their_end(Ledger::new(MemoryStore::new()), false).boxed());
}

#[test]
fn so_does_who_may_not_wait() {
    in_many_orders(|_| {
        all_come_to_their_end(Ledger::new(MemoryStore::new()).max_waiting(2).max_waiting_per_key(2), false).boxed()
    });
}

#[test]
fn so_does_who_waits_for_another_process() {
    in_many_orders(|clock| {
        pass_time(clock);
        all_come_to_their_end(Ledger::new(MemoryStore::new()), true).boxed()
    });
}
