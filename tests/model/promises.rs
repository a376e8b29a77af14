//! What holds in every state, and what happens in some. The numbers are those of `DESIGN.md` §3.

use stateright::Property;

use crate::server::{Answer, State, Step};
use crate::world::{Delivery, End, Flaw, Phase, Protocol, World};

pub const ONE_AT_A_TIME: &str = "1 one at a time";
pub const RUNS_FOR_A_REASON: &str = "1 an event runs again only for a reason";
pub const ACKNOWLEDGED: &str = "2 unfinished work is never acknowledged";
pub const NOT_LOST: &str = "3 no event is lost";
pub const REMEMBERED: &str = "3 what failed is remembered";
pub const STALE: &str = "4 a stale attempt changes nothing";
pub const NUMBERED: &str = "4 the attempt number only grows";
pub const NOT_STUCK: &str = "6 no key is stuck longer than its lease";
pub const RELEASED: &str = "6 a claim given up is released";
pub const GIVEN_BACK: &str = "6 what is given back stays given back";

type Condition = fn(&Protocol, &World) -> bool;

pub const ALWAYS: [(&str, Condition); 10] = [
    (ONE_AT_A_TIME, |_, world| {
        let live = |delivery: &&Delivery| delivery.phase == Phase::Running && !delivery.stale;
        world.deliveries.iter().filter(live).count() <= 1
    }),
    (RUNS_FOR_A_REASON, |_, world| world.flaw != Some(Flaw::RanAgain)),
    (ACKNOWLEDGED, |_, world| world.flaw != Some(Flaw::AcknowledgedUnfinished)),
    // What the next delivery would be told has happened, or still can.
    (NOT_LOST, |protocol, world| match world.next_answer(protocol.broken) {
        Answer::Done(by) => world.deliveries[by].finished || world.deliveries[by].is_at_work(),
        _ => true,
    }),
    (REMEMBERED, |_, world| world.flaw != Some(Flaw::ForgotFailure)),
    (STALE, |_, world| world.flaw != Some(Flaw::ChangedAnothers)),
    (NUMBERED, |_, world| world.flaw != Some(Flaw::NumberedAnew)),
    (NOT_STUCK, |protocol, world| {
        matches!(world.next_answer(protocol.broken), Answer::Acquired { .. } | Answer::Done(_))
    }),
    (RELEASED, |_, world| world.holder().is_none_or(|holder| holder.phase != Phase::Ended(End::Unreleased))),
    (GIVEN_BACK, |_, world| {
        let free = |state| matches!(state, State::Free(_));
        world.key.is_none_or(|key| world.given_back != Some(key.id) || free(key.state))
    }),
];

/// What would leave the promises empty if it never happened.
pub const SOMETIMES: [(&str, Condition); 7] = [
    ("a crash is taken over", |_, world| {
        let running = |delivery: &Delivery| delivery.phase == Phase::Running && delivery.attempt == 2;
        ended(world, End::Crashed) && world.holder().is_some_and(running)
    }),
    ("an outcome is replayed", |_, world| matches!(world.next_answer(None), Answer::Done(_))),
    ("an attempt is told that it lost", |_, world| ended(world, End::Lost)),
    ("an attempt past its lease keeps its outcome", |_, world| {
        let kept = |delivery: &Delivery| delivery.stale && delivery.phase == Phase::Completing;
        world.key.is_some_and(|key| key.state == State::Done && kept(&world.deliveries[key.id]))
    }),
    ("two attempts run, one of them past its lease", |_, world| {
        world.deliveries.iter().filter(|delivery| delivery.phase == Phase::Running).count() == 2
    }),
    ("a claim comes after its release", |_, world| {
        let freed = world.key.filter(|key| matches!(key.state, State::Free(_)));
        freed.is_some_and(|key| world.deliveries[key.id].is_late(Step::Claim))
    }),
    ("a renewal heals a server that lost its data", |protocol, world| {
        let healed = |holder: &Delivery| holder.phase == Phase::Running && !holder.stale;
        let lost_alone = world.left.losses < protocol.mishaps.losses && world.left.pauses == protocol.mishaps.pauses;
        lost_alone && world.reason && world.holder().is_some_and(healed)
    }),
];

pub fn all() -> Vec<Property<Protocol>> {
    let always = ALWAYS.map(|(name, condition)| Property::always(name, condition));
    let sometimes = SOMETIMES.map(|(name, condition)| Property::sometimes(name, condition));
    always.into_iter().chain(sometimes).collect()
}

fn ended(world: &World, end: End) -> bool {
    world.deliveries.iter().any(|delivery| delivery.phase == Phase::Ended(end))
}
