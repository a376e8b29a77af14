//! The world around the server: deliveries, the messages on their way, time, an operator, and what can go wrong.
//!
//! A client sends a step again until it is answered, so what it sends is always on its way: it arrives unheard, or it is
//! answered. What it has sent when it goes on may still come, once, however late. A message that is lost is one that never
//! comes, and to be told late is to be told and to act late, so neither is an action.
//!
//! Time is what ends. The lease of a client at work ends by a mishap, for it is renewed; any other ends at any moment.

use stateright::{Model, Property};

use crate::server::{Answer, Id, Life, Record, Request, State, Step, forget, serve};
use crate::{Broken, promises};

const DELIVERIES: usize = 3;
const STEPS: [Step; 5] = [Step::Claim, Step::Complete, Step::Release, Step::Renew, Step::TakeOver];

/// The protocol, and how much may happen.
#[derive(Clone, Debug)]
pub struct Protocol {
    pub deliveries: usize,
    pub mishaps: Mishaps,
    pub broken: Option<Broken>,
}

/// How often what is rare may still happen.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct Mishaps {
    /// An operator forgets the key.
    pub forgets: u8,
    /// He does so whether or not an attempt is running.
    pub forced: bool,
    /// The server loses its data.
    pub losses: u8,
    /// A client is paused for longer than its lease, cut off from the server for as long, or overdue.
    pub pauses: u8,
    /// A retention passes.
    pub retentions: u8,
}

#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub struct World {
    pub key: Option<Record>,
    pub deliveries: [Delivery; DELIVERIES],
    pub left: Mishaps,
    /// There is a reason to run the event: it has not run, or what came of its last run was lost.
    pub reason: bool,
    /// The claim that was given back or forgotten, until another has the key or time has passed.
    pub given_back: Option<Id>,
    pub flaw: Option<Flaw>,
    /// The number of the last attempt that the key has to remember.
    last_attempt: u8,
    /// An attempt has died or failed, and is to be remembered for the retention.
    failed: bool,
}

/// A client with one claim. Who comes again is another delivery, with another claim.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct Delivery {
    pub phase: Phase,
    /// 0 until it has the claim.
    pub attempt: u8,
    /// The event has happened, and its outcome is to be kept.
    pub finished: bool,
    /// Its lease was over, or taken from it, when it was last looked at.
    pub stale: bool,
    /// For how long its failure is remembered.
    remember: Life,
    /// What is still on its way, though nobody waits for its answer.
    late: [bool; STEPS.len()],
}

#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum Phase {
    /// It asks for its claim, or is yet to come.
    Asking {
        /// The key was seen to be another's.
        takes_over: bool,
    },
    /// It has the claim, and the event happens.
    Running,
    /// The event has happened, and its outcome is to be stored.
    Completing,
    /// The claim is given back: it failed, or was not answered, or its client left. To be told so changes nothing.
    Releasing,
    Ended(End),
}

#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum End {
    Crashed,
    Kept,
    Lost,
    Unreleased,
}

/// What must never happen, where it shows in a step and not in what stands after it.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum Flaw {
    AcknowledgedUnfinished,
    ChangedAnothers,
    ForgotFailure,
    NumberedAnew,
    RanAgain,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Action {
    /// A step is taken, and its answer lost.
    Arrive(Id, Step),
    Crash(Id),
    Fail(Id, Life),
    /// An operator forgets the key.
    Forget,
    /// It was not answered, or its client has left, or its service is not ready.
    GiveUp(Id),
    /// A step is taken, and its answer heard.
    Hear(Id, Step),
    /// The lease is over.
    LeaseOver,
    /// The record is remembered no longer.
    LifeOver,
    LoseData,
    Succeed(Id),
}

// === impl Protocol ===

impl Protocol {
    fn is(&self, broken: Broken) -> bool {
        self.broken == Some(broken)
    }

    /// Whether the lease of a claim does not run out by itself.
    fn is_renewed(&self, delivery: &Delivery) -> bool {
        delivery.is_at_work() && !self.is(Broken::RenewNever)
    }

    fn actions_of(&self, id: Id, delivery: &Delivery, actions: &mut Vec<Action>) {
        for step in STEPS {
            if delivery.sends(step) || delivery.is_late(step) {
                actions.push(Action::Arrive(id, step));
            }
            if delivery.sends(step) && delivery.is_at_work() {
                actions.push(Action::Hear(id, step));
            }
        }
        match delivery.phase {
            Phase::Asking { .. } => actions.push(Action::GiveUp(id)),
            Phase::Running => {
                let fails = [Life::Lease, Life::Retention].map(|remember| Action::Fail(id, remember));
                actions.extend(fails);
                actions.extend([Action::Crash(id), Action::GiveUp(id), Action::Succeed(id)]);
            }
            Phase::Completing if self.is(Broken::CompletionNotPursued) => actions.push(Action::GiveUp(id)),
            Phase::Completing => actions.push(Action::Crash(id)),
            // Whoever crashes here, or asking, is one whose release never arrives.
            Phase::Releasing | Phase::Ended(_) => {}
        }
    }

    /// What time, an operator and the server do to a key.
    fn actions_on(&self, record: &Record, world: &World, actions: &mut Vec<Action>) {
        let ends = match record.state {
            State::Running { alive: true } => {
                let renewed = self.is_renewed(&world.deliveries[record.id]);
                (!renewed || world.left.pauses > 0).then_some(Action::LeaseOver)
            }
            State::Free(Life::Lease) => Some(Action::LifeOver),
            _ => (world.left.retentions > 0).then_some(Action::LifeOver),
        };
        actions.extend(ends);
        actions.extend((world.left.forgets > 0).then_some(Action::Forget));
        actions.extend((world.left.losses > 0).then_some(Action::LoseData));
    }
}

impl Model for Protocol {
    type State = World;
    type Action = Action;

    fn init_states(&self) -> Vec<World> {
        vec![World {
            key: None,
            deliveries: [Delivery::NEW; DELIVERIES],
            left: self.mishaps,
            reason: true,
            given_back: None,
            flaw: None,
            last_attempt: 0,
            failed: false,
        }]
    }

    fn actions(&self, world: &World, actions: &mut Vec<Action>) {
        // One delivery is like another, so they come in order.
        let come = world.deliveries.iter().take_while(|delivery| **delivery != Delivery::NEW).count();
        for (id, delivery) in world.deliveries.iter().enumerate().take(self.deliveries.min(come + 1)) {
            self.actions_of(id, delivery, actions);
        }
        if let Some(record) = &world.key {
            self.actions_on(record, world, actions);
        }
    }

    fn next_state(&self, before: &World, action: Action) -> Option<World> {
        let mut world = before.clone();
        match action {
            Action::Arrive(id, step) => {
                world.serve(id, step, self.broken);
                let delivery = &mut world.deliveries[id];
                if !delivery.sends(step) {
                    delivery.late[step as usize] = false;
                    // What comes late and changes nothing may as well come later.
                    if world.key == before.key {
                        return None;
                    }
                }
            }
            Action::Crash(id) => {
                world.come_to_nothing(id);
                world.deliveries[id].go_on(Phase::Ended(End::Crashed));
            }
            Action::Fail(id, remember) => {
                world.come_to_nothing(id);
                world.deliveries[id].remember = remember;
                world.deliveries[id].go_on(Phase::Releasing);
            }
            Action::Forget => world.forget(self)?,
            Action::GiveUp(id) => world.give_up(id, self.broken),
            Action::Hear(id, step) => {
                let answer = world.serve(id, step, self.broken);
                world.hear(id, step, answer);
            }
            Action::LeaseOver => {
                let holder = &mut world.deliveries[before.key?.id];
                if self.is_renewed(holder) {
                    holder.stale = true;
                    world.left.pauses -= 1;
                    world.reason = true;
                }
                world.end_lease();
            }
            Action::LifeOver => world.end_life(),
            Action::LoseData => {
                world.left.losses -= 1;
                world.reason = true;
                for delivery in &mut world.deliveries {
                    delivery.stale = true;
                }
                world.vanish();
            }
            Action::Succeed(id) => {
                world.deliveries[id].finished = true;
                world.deliveries[id].go_on(Phase::Completing);
            }
        }
        world.tidy();
        (world != *before).then_some(world)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        promises::all()
    }
}

// === impl World ===

impl World {
    /// Whose lease is alive.
    pub fn holder(&self) -> Option<&Delivery> {
        self.key.filter(Record::is_alive).map(|record| &self.deliveries[record.id])
    }

    /// What a new delivery is told when the lease is over.
    pub fn next_answer(&self, broken: Option<Broken>) -> Answer {
        let mut world = self.clone();
        world.end_lease();
        let ask = |step| Request { step, id: DELIVERIES, attempt: 0, remember: Life::Lease };
        match serve(&mut world.key, ask(Step::Claim), broken) {
            Answer::Undecided => serve(&mut world.key, ask(Step::TakeOver), broken),
            answer => answer,
        }
    }

    /// The server takes a step. What that does to the key is held against the promises.
    fn serve(&mut self, id: Id, step: Step, broken: Option<Broken>) -> Answer {
        let Delivery { attempt, remember, .. } = self.deliveries[id];
        let before = self.key;
        let answer = serve(&mut self.key, Request { step, id, attempt, remember }, broken);
        // A lease that is alive starts anew, though it looks the same.
        let renewed = step == Step::Renew && answer == Answer::Held;
        let anothers = before.filter(|record| record.id != id && (self.key != before || renewed));
        if anothers.is_some() {
            self.given_back = None;
        }
        match (step, answer) {
            (Step::Claim | Step::TakeOver, _) => self.failed |= anothers.is_some_and(|record| record.is_running()),
            _ if anothers.is_some() => self.flaw(Flaw::ChangedAnothers),
            (Step::Release, Answer::Held) => {
                self.given_back = Some(id);
                self.failed |= remember == Life::Retention && before.is_some_and(|record| record.is_running());
            }
            (Step::Renew, Answer::Held) => self.deliveries[id].stale = false,
            _ => {}
        }
        answer
    }

    /// The answer reaches who waits for it.
    fn hear(&mut self, id: Id, step: Step, answer: Answer) {
        let delivery = &mut self.deliveries[id];
        match (delivery.phase, answer) {
            (Phase::Asking { .. }, Answer::Acquired { attempt }) => {
                delivery.attempt = attempt;
                delivery.stale = !self.key.is_some_and(|record| record.is_alive());
                delivery.go_on(Phase::Running);
                self.begin(id);
            }
            (Phase::Asking { .. }, Answer::Undecided) => delivery.phase = Phase::Asking { takes_over: true },
            (Phase::Asking { .. }, answer) => {
                // An earlier sending may still take the key.
                delivery.go_on(Phase::Releasing);
                if let Answer::Done(by) = answer
                    && !self.deliveries[by].finished
                {
                    self.flaw(Flaw::AcknowledgedUnfinished);
                }
            }
            (Phase::Completing, Answer::Held) if step == Step::Complete => delivery.go_on(Phase::Ended(End::Kept)),
            (Phase::Running, Answer::Lost) => {
                delivery.go_on(Phase::Ended(End::Lost));
                // When it fails, it gives back what it has not.
                delivery.late[Step::Release as usize] = true;
            }
            (_, Answer::Lost) => delivery.go_on(Phase::Ended(End::Lost)),
            _ => {}
        }
    }

    fn begin(&mut self, id: Id) {
        let Delivery { attempt, stale, .. } = self.deliveries[id];
        if attempt <= self.last_attempt {
            self.flaw(Flaw::NumberedAnew);
        }
        self.last_attempt = attempt;
        if !stale {
            if !self.reason {
                self.flaw(Flaw::RanAgain);
            }
            self.reason = false;
        }
    }

    fn give_up(&mut self, id: Id, broken: Option<Broken>) {
        let delivery = self.deliveries[id];
        if delivery.phase == Phase::Running {
            // It has not run, and its number is given back.
            self.come_to_nothing(id);
            self.deliveries[id].attempt = 0;
            self.last_attempt = self.last_attempt.min(delivery.attempt - 1);
        }
        let asking = matches!(delivery.phase, Phase::Asking { .. });
        let silent = asking && broken == Some(Broken::GivenUpIsNotReleased);
        self.deliveries[id].go_on(if silent { Phase::Ended(End::Unreleased) } else { Phase::Releasing });
    }

    /// What came of an attempt is lost. If its lease was over, that was the reason to run again.
    fn come_to_nothing(&mut self, id: Id) {
        self.reason |= !self.deliveries[id].stale;
    }

    fn forget(&mut self, protocol: &Protocol) -> Option<()> {
        let record = self.key?;
        forget(&mut self.key, protocol.mishaps.forced, protocol.broken).then_some(())?;
        self.left.forgets -= 1;
        self.deliveries[record.id].stale = true;
        self.reason = true;
        self.failed = true;
        self.given_back = Some(record.id);
        Some(())
    }

    fn end_lease(&mut self) {
        if let Some(Record { state: State::Running { alive }, .. }) = &mut self.key {
            *alive = false;
        }
    }

    fn end_life(&mut self) {
        if self.key.is_some_and(|record| record.state != State::Free(Life::Lease)) {
            self.left.retentions -= 1;
            self.reason = true;
        } else if self.failed {
            self.flaw(Flaw::ForgotFailure);
        }
        self.vanish();
    }

    /// The key is gone, and with it what was known.
    fn vanish(&mut self) {
        self.key = None;
        self.given_back = None;
        self.last_attempt = 0;
        self.failed = false;
    }

    fn flaw(&mut self, flaw: Flaw) {
        self.flaw = self.flaw.or(Some(flaw));
    }

    /// Drops what cannot matter any more, so that worlds that differ in nothing else are one.
    fn tidy(&mut self) {
        for (id, delivery) in self.deliveries.iter_mut().enumerate() {
            let sender = *delivery;
            let may_come = |step| sender.sends(step) || sender.is_late(step);
            if !may_come(Step::Complete) && self.key.is_none_or(|record| record.id != id) {
                delivery.finished = false;
            }
            if !may_come(Step::Release) {
                delivery.remember = Life::Lease;
            }
            if ![Step::Complete, Step::Release, Step::Renew].into_iter().any(may_come) {
                delivery.attempt = 0;
            }
            if !matches!(delivery.phase, Phase::Running | Phase::Completing) {
                delivery.stale = false;
            }
        }
    }
}

// === impl Delivery ===

impl Delivery {
    const NEW: Self = Self {
        phase: Phase::Asking { takes_over: false },
        attempt: 0,
        finished: false,
        stale: false,
        remember: Life::Lease,
        late: [false; STEPS.len()],
    };

    /// It renews its lease, or is about to.
    pub const fn is_at_work(&self) -> bool {
        matches!(self.phase, Phase::Asking { .. } | Phase::Running | Phase::Completing)
    }

    pub const fn is_late(&self, step: Step) -> bool {
        self.late[step as usize]
    }

    /// What it sends until it is answered.
    const fn sends(&self, step: Step) -> bool {
        match self.phase {
            Phase::Asking { takes_over } => match step {
                Step::Claim => true,
                Step::TakeOver => takes_over,
                Step::Complete | Step::Release | Step::Renew => false,
            },
            Phase::Running => matches!(step, Step::Renew),
            Phase::Completing => matches!(step, Step::Complete | Step::Renew),
            Phase::Releasing => matches!(step, Step::Release),
            Phase::Ended(_) => false,
        }
    }

    /// What it has sent so far may come late.
    fn go_on(&mut self, phase: Phase) {
        for step in STEPS {
            self.late[step as usize] |= self.sends(step);
        }
        self.phase = phase;
    }
}
