//! The server: what stands under the one key, and the steps of the protocol, line by line those of `src/store/redis/*.lua`.

use crate::Broken;

/// Which claim. A delivery has one claim, so it is also the number of the delivery.
pub type Id = usize;

/// What stands under the key.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct Record {
    pub state: State,
    pub id: Id,
    pub attempt: u8,
    /// An attempt before this one died or failed, and is to be remembered for the retention.
    pub remembered: bool,
}

#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum State {
    Done,
    /// For how long it is remembered.
    Free(Life),
    /// Whether its lease is alive. Once that is over, the record stands for a retention.
    Running {
        alive: bool,
    },
}

#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum Life {
    Lease,
    Retention,
}

/// A step on its way to the server.
#[derive(Clone, Copy, Debug)]
pub struct Request {
    pub step: Step,
    pub id: Id,
    /// 0 for a claim that has not run.
    pub attempt: u8,
    /// For how long a release remembers the attempt.
    pub remember: Life,
}

#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum Step {
    /// `SET NX GET`.
    Claim,
    Complete,
    Release,
    Renew,
    TakeOver,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Answer {
    Acquired {
        attempt: u8,
    },
    /// Done by that claim.
    Done(Id),
    Held,
    Lost,
    Running,
    /// The server's clock has to decide: to be taken over, if it can be.
    Undecided,
}

impl Record {
    pub const fn is_running(&self) -> bool {
        matches!(self.state, State::Running { .. })
    }

    pub const fn is_alive(&self) -> bool {
        matches!(self.state, State::Running { alive: true })
    }

    const fn running(request: Request, attempt: u8) -> Self {
        Self { state: State::Running { alive: true }, id: request.id, attempt, remembered: false }
    }
}

/// Takes one step, and answers.
pub fn serve(key: &mut Option<Record>, request: Request, broken: Option<Broken>) -> Answer {
    match request.step {
        Step::Claim => claim(key, request, broken),
        Step::Complete => complete(key, request, broken),
        Step::Release => release(key, request, broken),
        Step::Renew => renew(key, request, broken),
        Step::TakeOver => take_over(key, request, broken),
    }
}

/// `SET NX GET`, and what `judge` makes of its answer.
fn claim(key: &mut Option<Record>, request: Request, broken: Option<Broken>) -> Answer {
    let Some(record) = *key else {
        let running = Record::running(request, 1);
        match broken {
            Some(Broken::ClaimLooksAndSets) => return Answer::Undecided,
            Some(Broken::ClaimRecordsDone) => *key = Some(Record { state: State::Done, ..running }),
            _ => *key = Some(running),
        }
        return Answer::Acquired { attempt: 1 };
    };
    match record.state {
        State::Running { .. } if record.id == request.id => Answer::Acquired { attempt: record.attempt },
        State::Done => Answer::Done(record.id),
        State::Free(_) if record.id == request.id && broken != Some(Broken::ClaimTakesItsReleasedKey) => {
            Answer::Running
        }
        State::Free(_) | State::Running { .. } => Answer::Undecided,
    }
}

fn take_over(key: &mut Option<Record>, request: Request, broken: Option<Broken>) -> Answer {
    let Some(before) = *key else {
        *key = Some(Record::running(request, 1));
        return Answer::Acquired { attempt: 1 };
    };
    let mine = before.id == request.id;
    match before.state {
        _ if broken == Some(Broken::ClaimLooksAndSets) => {}
        State::Done if broken == Some(Broken::TakeoverOfDone) => {}
        State::Done => return Answer::Done(before.id),
        State::Running { .. } if mine => return Answer::Acquired { attempt: before.attempt },
        State::Free(_) if mine && broken != Some(Broken::ClaimTakesItsReleasedKey) => return Answer::Running,
        State::Running { alive: true } if broken != Some(Broken::TakeoverOfTheLiving) => return Answer::Running,
        State::Running { .. } if broken == Some(Broken::TakeoverNever) => return Answer::Running,
        State::Free(_) | State::Running { .. } => {}
    }
    let attempt = if broken == Some(Broken::TakeoverCountsAnew) { 1 } else { before.attempt + 1 };
    let remembered = before.remembered || before.is_running();
    *key = Some(Record { remembered, ..Record::running(request, attempt) });
    Answer::Acquired { attempt }
}

fn renew(key: &mut Option<Record>, request: Request, broken: Option<Broken>) -> Answer {
    let Some(record) = key else {
        *key = Some(Record::running(request, request.attempt));
        return Answer::Held;
    };
    let other = record.id != request.id && broken != Some(Broken::RenewOfAnyones);
    match &mut record.state {
        _ if other => return Answer::Lost,
        State::Free(_) if broken == Some(Broken::RenewOfFree) => record.state = State::Running { alive: true },
        State::Free(_) => return Answer::Lost,
        State::Running { alive } => *alive = true,
        State::Done => {}
    }
    Answer::Held
}

fn complete(key: &mut Option<Record>, request: Request, broken: Option<Broken>) -> Answer {
    if let Some(record) = *key {
        let other = record.id != request.id;
        match record.state {
            State::Done if other && broken == Some(Broken::CompleteOverDone) => {}
            _ if other && broken != Some(Broken::CompleteOfAnyones) => return Answer::Lost,
            State::Free(_) => return Answer::Lost,
            State::Done if !other => return Answer::Held,
            State::Done | State::Running { .. } => {}
        }
    }
    *key = Some(Record { state: State::Done, ..Record::running(request, request.attempt) });
    Answer::Held
}

fn release(key: &mut Option<Record>, request: Request, broken: Option<Broken>) -> Answer {
    let Some(record) = *key else {
        // The claim may still be on its way: let it find the key taken.
        if broken != Some(Broken::ReleaseOfGoneLeavesNothing) {
            *key = Some(Record { state: State::Free(Life::Lease), ..Record::running(request, request.attempt) });
        }
        return Answer::Held;
    };
    let other = match broken {
        Some(Broken::ReleaseByNumber) => record.attempt != request.attempt,
        _ => record.id != request.id,
    };
    match record.state {
        _ if other => return Answer::Lost,
        State::Done => return Answer::Lost,
        State::Free(_) => return Answer::Held,
        State::Running { .. } => {}
    }
    let given_up = request.attempt == 0;
    let remembered = record.remembered && broken != Some(Broken::ReleaseForgetsTheDead);
    let life = if remembered { Life::Retention } else { request.remember };
    let free = Record {
        state: State::Free(life),
        attempt: if given_up { record.attempt.saturating_sub(1) } else { record.attempt },
        remembered: life == Life::Retention,
        ..record
    };
    *key = (broken != Some(Broken::ReleaseDeletes)).then_some(free);
    Answer::Held
}

/// Whether an operator's `forget` did it.
pub fn forget(key: &mut Option<Record>, force: bool, broken: Option<Broken>) -> bool {
    let Some(record) = key else { return false };
    if record.is_alive() && !force {
        return false;
    }
    *record = Record { state: State::Free(Life::Retention), remembered: true, ..*record };
    if broken == Some(Broken::ForgetDeletes) {
        *key = None;
    }
    true
}
