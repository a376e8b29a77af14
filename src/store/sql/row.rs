//! The row of a key, and what it means for a step.

use std::fmt;
use std::time::Duration;

use bytes::Bytes;
use sqlx::{ColumnIndex, Decode, Type};

use crate::fingerprint::Fingerprint;
use crate::store::{Claim, Claimed, Entry, Forgotten, Hold, State};

/// What a step has found under the key.
pub(super) struct Row {
    attempt: u32,
    phase: Phase,
    /// The claim that asks has it, or had it last.
    is_mine: bool,
    fingerprint: Option<Fingerprint>,
    forgotten: bool,
    lease_left: Duration,
    expires_in: Duration,
    record: Bytes,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Phase {
    Done,
    Free,
    Running,
}

/// A row that none of these stores has written.
#[derive(Debug)]
struct Unreadable(&'static str);

/// What a step's row means, if it is not outdated.
pub(super) type Meaning<T> = Option<T>;

// === impl Row ===

impl Row {
    /// Reads the columns that every read names.
    pub(super) fn read<R>(row: &R) -> Result<Self, sqlx::Error>
    where
        R: sqlx::Row,
        usize: ColumnIndex<R>,
        for<'a> &'a str: ColumnIndex<R>,
        bool: for<'r> Decode<'r, R::Database> + Type<R::Database>,
        i64: for<'r> Decode<'r, R::Database> + Type<R::Database>,
        Vec<u8>: for<'r> Decode<'r, R::Database> + Type<R::Database>,
    {
        let unreadable = |error: Unreadable| sqlx::Error::Decode(error.into());
        let expires_in = left(row.try_get("expires_in")?);
        if expires_in.is_zero() {
            return Ok(Self::expired());
        }
        let phase = Phase::of(row.try_get("state")?).map_err(unreadable)?;
        let record: Option<Vec<u8>> = row.try_get("record")?;
        if phase == Phase::Done && record.is_none() {
            return Err(unreadable(Unreadable("an outcome without a record")));
        }
        Ok(Self {
            attempt: attempt(row)?,
            phase,
            is_mine: row.try_get("mine")?,
            fingerprint: read_fingerprint(row.try_get("fingerprint")?).map_err(unreadable)?,
            forgotten: row.try_get("forgotten")?,
            lease_left: left(row.try_get("lease_left")?),
            expires_in,
            record: record.unwrap_or_default().into(),
        })
    }

    /// Nobody's row, whatever is in it.
    fn expired() -> Self {
        Self {
            attempt: 0,
            phase: Phase::Free,
            is_mine: false,
            fingerprint: None,
            forgotten: false,
            lease_left: Duration::ZERO,
            expires_in: Duration::ZERO,
            record: Bytes::new(),
        }
    }

    /// What came of a claim.
    pub(super) fn claimed(self, claim: &Claim) -> Meaning<Claimed> {
        let (attempt, fingerprint) = (self.attempt, self.fingerprint);
        if self.expires_in.is_zero() {
            return None;
        }
        match self.phase {
            Phase::Running if self.is_mine => Some(Claimed::Acquired { attempt }),
            _ if claim.refuse_other && !self.forgotten && fingerprint != claim.fingerprint => Some(Claimed::Mismatch),
            Phase::Done => Some(Claimed::Done { fingerprint, record: self.record }),
            // Its own claim, released: this sending of it is late.
            Phase::Free if self.is_mine => Some(Claimed::Running { fingerprint, lease_left: Duration::ZERO }),
            Phase::Running if !self.lease_left.is_zero() => {
                Some(Claimed::Running { fingerprint, lease_left: self.lease_left })
            }
            Phase::Free | Phase::Running => None,
        }
    }

    /// Whether a claim that was renewed, completed or released still has the key. It has, too, where the step has already led
    /// to where it leads, or a renewal has nothing to do any more.
    pub(super) fn hold(&self, held: Phase) -> Meaning<Hold> {
        match self.phase {
            _ if self.expires_in.is_zero() => None,
            _ if !self.is_mine => Some(Hold::Lost),
            Phase::Running => None,
            phase if phase == held => Some(Hold::Held),
            Phase::Done | Phase::Free => Some(Hold::Lost),
        }
    }

    pub(super) fn forgotten(&self) -> Meaning<Forgotten> {
        if self.expires_in.is_zero() {
            return Some(Forgotten::Absent);
        }
        (self.phase == Phase::Running && !self.lease_left.is_zero()).then_some(Forgotten::Running)
    }

    pub(super) fn entry(self) -> Option<Entry> {
        let state = match self.phase {
            Phase::Done => State::Done(self.record),
            Phase::Free => State::Free,
            Phase::Running => State::Running,
        };
        (!self.expires_in.is_zero()).then(|| Entry::new(state, self.attempt, self.fingerprint, self.expires_in))
    }
}

// === impl Phase ===

impl Phase {
    pub(super) const fn number(self) -> i64 {
        match self {
            Self::Free => 0,
            Self::Running => 1,
            Self::Done => 2,
        }
    }

    fn of(number: i64) -> Result<Self, Unreadable> {
        match number {
            0 => Ok(Self::Free),
            1 => Ok(Self::Running),
            2 => Ok(Self::Done),
            _ => Err(Unreadable("a state that there is not")),
        }
    }
}

/// The attempt that a claim begins whose key is new.
pub(super) const FIRST: u32 = 1;

/// The number of the attempt, which every statement that returns a row returns first.
pub(super) fn attempt<R>(row: &R) -> Result<u32, sqlx::Error>
where
    R: sqlx::Row,
    usize: ColumnIndex<R>,
    i64: for<'r> Decode<'r, R::Database> + Type<R::Database>,
{
    Ok(u32::try_from(row.try_get::<i64, _>(0)?).unwrap_or(u32::MAX))
}

/// What is left of a time, none where it is over.
fn left(millis: i64) -> Duration {
    Duration::from_millis(u64::try_from(millis).unwrap_or(0))
}

fn read_fingerprint(bytes: Option<Vec<u8>>) -> Result<Option<Fingerprint>, Unreadable> {
    let whole = |bytes: Vec<u8>| bytes.try_into().map_err(|_| Unreadable("a fingerprint of another length"));
    Ok(bytes.map(whole).transpose()?.map(Fingerprint::from_bytes))
}

// === impl Unreadable ===

impl fmt::Display for Unreadable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0)
    }
}

impl std::error::Error for Unreadable {}
