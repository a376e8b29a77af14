//! What a store is: atomic, dumb, and replaceable.
//!
//! A [`Store`] knows claims, times and opaque bytes, and nothing of HTTP. Every method is one atomic step, and every
//! step may be sent twice with the same effect. A key goes from *absent* to **running** (one claim, an attempt number, a
//! lease) and from there to **done** (a record) or **free** (an attempt number). A claim takes an absent key, a free key,
//! or a running key whose lease has run out; the attempt number only grows.
//!
//! Authors of stores run the suite in `store::conformance` (feature `conformance`) against theirs.

#[cfg(feature = "conformance")]
pub mod conformance;
pub(crate) mod erased;
pub mod memory;
#[cfg(feature = "redis")]
pub mod redis;
#[cfg(any(feature = "postgres", feature = "sqlite"))]
mod sql;

#[cfg(any(feature = "postgres", feature = "sqlite"))]
pub use self::sql::InvalidTable;
#[cfg(any(feature = "postgres", feature = "sqlite"))]
pub use self::sql::dedup::{Dedup, Recorded};
#[cfg(feature = "postgres")]
pub use self::sql::postgres;
#[cfg(feature = "sqlite")]
pub use self::sql::sqlite;

use std::fmt;
use std::future::Future;
use std::time::Duration;

use bytes::Bytes;
use tower::BoxError;

use crate::fingerprint::Fingerprint;
use crate::key::Key;

/// The shortest duration a store has to tell from nothing.
pub const MIN_DURATION: Duration = Duration::from_millis(1);

/// The longest duration a store has to keep: 366 days.
pub const MAX_DURATION: Duration = Duration::from_secs(366 * 24 * 60 * 60);

/// Keeps who runs a key, and what came of it.
///
/// A method that fails with a [`StoreError`] may have taken effect, unless the error is
/// [definite](StoreError::is_definite). Dropping a call's future is such a failure too, and is how a call is given up: it may
/// take as long as its server does, and a ledger waits for [`store_timeout`](crate::Ledger::store_timeout). No method has a default: a store
/// that leaves one out would weaken the contract silently.
///
/// A task that a call leaves behind and others need, such as one that gives a connection back to a pool, must not wait for the
/// thread of the call, which a handler may block from then on. What is spawned after it, even if it does nothing, pushes it out of the
/// place where no other thread takes it.
pub trait Store: Send + Sync + 'static {
    /// Takes the key, or says who has it.
    ///
    /// Sent again with the same id while that claim runs, it answers [`Claimed::Acquired`] again and changes nothing.
    /// Sent again after that claim was released, it takes nothing: it is late.
    fn claim(&self, key: &Key, claim: &Claim) -> impl Future<Output = Result<Claimed, StoreError>> + Send;

    /// Starts the lease anew. A key that is gone is claimed again, which heals a store that lost its data.
    fn renew(&self, key: &Key, claim: &Claim) -> impl Future<Output = Result<Hold, StoreError>> + Send;

    /// Ends the claim with a record, kept for the claim's retention from now.
    ///
    /// A key that is gone is completed all the same: recording is better than running again. A caller that was told
    /// [`Hold::Lost`] must not complete any more.
    fn complete(
        &self,
        key: &Key,
        claim: &Claim,
        record: Bytes,
    ) -> impl Future<Output = Result<Hold, StoreError>> + Send;

    /// Ends the claim without a record and remembers the attempt number for `remember`; but for the claim's retention at
    /// least, if an attempt before it died or was remembered for its retention: what may have had an effect is not
    /// forgotten for what surely had none. A claim released with attempt 0 has not run, and is not counted.
    ///
    /// A key that is gone is made free for one lease, so that a claim given up on but still on its way finds it taken.
    fn release(
        &self,
        key: &Key,
        claim: &Claim,
        remember: Duration,
    ) -> impl Future<Output = Result<Hold, StoreError>> + Send;

    /// What is known of a key. For operators; it never decides who runs.
    fn lookup(&self, key: &Key) -> impl Future<Output = Result<Option<Entry>, StoreError>> + Send;

    /// Makes a key free, so that its next delivery runs, whatever its fingerprint is. A running key only with `force`, since it
    /// may then run twice.
    ///
    /// A key made free is remembered for its retention.
    fn forget(&self, key: &Key, force: bool) -> impl Future<Output = Result<Forgotten, StoreError>> + Send;

    /// The part of the store that keeps the key: what makes calls about one of its keys fail makes others fail, and says
    /// nothing about the other parts. 0 where it has no parts.
    fn failure_domain(&self, key: &Key) -> u16;

    /// Returns when the key may have changed: a hint to look again, which may be late, lost or spurious.
    ///
    /// Called once per key while somebody waits, and again, before anybody looks, when it has returned; dropped when nobody
    /// waits any more. Looking goes on without it: a store that has no hints never returns.
    fn changed(&self, key: &Key) -> impl Future<Output = ()> + Send;
}

/// The right to run a key, as it is asked for, renewed, and given back.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Claim {
    /// Which attempt this is, among all that ever were.
    pub id: ClaimId,
    /// How long the claim lives without being renewed.
    pub lease: Duration,
    /// How long a record is kept, counted from completion.
    pub retention: Duration,
    /// What the request asks for.
    pub fingerprint: Option<Fingerprint>,
    /// Whether another fingerprint under this key refuses the claim, rather than being told.
    pub refuse_other: bool,
    /// The number of the attempt: 0 when asking, then what [`Claimed::Acquired`] said. Released with 0, it never ran and is
    /// not counted.
    pub attempt: u32,
}

/// 128 random bits that name one claim.
#[derive(Clone, Copy, Eq, Hash, PartialEq)]
pub struct ClaimId([u8; Self::LEN]);

/// What came of a claim.
#[derive(Clone, Eq, PartialEq)]
pub enum Claimed {
    /// The key is the claimant's, as this attempt of it.
    Acquired {
        /// 1 for the first attempt, then growing as long as the store remembers the key.
        attempt: u32,
    },
    /// An attempt has finished.
    Done {
        /// The fingerprint of that attempt's request.
        fingerprint: Option<Fingerprint>,
        /// What it recorded.
        record: Bytes,
    },
    /// The key has another fingerprint, and the claim said that this refuses it. Nothing was taken over.
    Mismatch,
    /// Another claim has the key.
    Running {
        /// The fingerprint of its request.
        fingerprint: Option<Fingerprint>,
        /// How long its lease still lasts, as far as is known.
        lease_left: Duration,
    },
}

/// Whether a claim still has its key.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Hold {
    /// It has.
    Held,
    /// It has not, and never will again: the step changed nothing.
    Lost,
}

/// What [`Store::forget`] did.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Forgotten {
    /// There was nothing to forget.
    Absent,
    /// The next delivery runs.
    Forgotten,
    /// An attempt is running and force was not used.
    Running,
}

/// What a store knows of a key.
#[derive(Clone, Debug, Eq, PartialEq)]
#[non_exhaustive]
pub struct Entry {
    /// How many attempts there have been.
    pub attempt: u32,
    /// When the store forgets the key, if nothing happens before.
    pub expires_in: Duration,
    /// What the last of them was asked for.
    pub fingerprint: Option<Fingerprint>,
    /// What the last of them came to.
    pub state: State,
}

/// How far a key has come.
#[derive(Clone, Eq, PartialEq)]
pub enum State {
    /// The last attempt finished, with this record: bytes of the layer's own, not for parsing.
    Done(Bytes),
    /// The last attempt failed: the next delivery runs.
    Free,
    /// An attempt has the key, or had it and its lease has run out.
    Running,
}

/// A store did not do what it was asked for, or did not say so.
#[derive(Debug)]
pub struct StoreError {
    kind: Kind,
    source: BoxError,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Kind {
    Refused,
    Unconfirmed,
    Unknown,
    Unreachable,
    Unreadable,
}

// === impl Claim ===

impl Claim {
    /// A claim of a new, random id, without a fingerprint.
    ///
    /// Durations outside of [`MIN_DURATION`] and [`MAX_DURATION`] are brought to the nearer of the two.
    #[must_use]
    pub fn new(lease: Duration, retention: Duration) -> Self {
        Self {
            id: ClaimId::random(),
            lease: lease.clamp(MIN_DURATION, MAX_DURATION),
            retention: retention.clamp(MIN_DURATION, MAX_DURATION),
            fingerprint: None,
            refuse_other: false,
            attempt: 0,
        }
    }
}

// === impl ClaimId ===

impl ClaimId {
    /// How long it is, in bytes.
    pub const LEN: usize = 16;

    /// An id that no other claim has.
    #[must_use]
    pub fn random() -> Self {
        Self(rand::random())
    }

    /// Its bytes, as a store keeps them.
    #[must_use]
    pub const fn as_bytes(&self) -> &[u8; Self::LEN] {
        &self.0
    }
}

impl fmt::Debug for ClaimId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ClaimId({:032x})", u128::from_be_bytes(self.0))
    }
}

// === impl Claimed ===

impl fmt::Debug for Claimed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Acquired { attempt } => f.debug_struct("Acquired").field("attempt", attempt).finish(),
            Self::Done { fingerprint, record } => {
                f.debug_struct("Done").field("fingerprint", fingerprint).field("record", &Redacted(record)).finish()
            }
            Self::Mismatch => f.write_str("Mismatch"),
            Self::Running { fingerprint, lease_left } => {
                f.debug_struct("Running").field("fingerprint", fingerprint).field("lease_left", lease_left).finish()
            }
        }
    }
}

// === impl State ===

impl fmt::Debug for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Done(record) => f.debug_tuple("Done").field(&Redacted(record)).finish(),
            Self::Free => f.write_str("Free"),
            Self::Running => f.write_str("Running"),
        }
    }
}

/// A record holds a response's body, which has no place in a log.
struct Redacted<'a>(&'a Bytes);

impl fmt::Debug for Redacted<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "<{} bytes>", self.0.len())
    }
}

// === impl Entry ===

impl Entry {
    /// What a store answers to [`Store::lookup`].
    #[must_use]
    pub const fn new(state: State, attempt: u32, fingerprint: Option<Fingerprint>, expires_in: Duration) -> Self {
        Self { attempt, expires_in, fingerprint, state }
    }
}

// === impl StoreError ===

impl StoreError {
    /// The step may have taken effect: no answer came, or not in time.
    pub fn unknown(source: impl Into<BoxError>) -> Self {
        Self { kind: Kind::Unknown, source: source.into() }
    }

    /// The step has taken effect, and the store says that this may not last, as when too few replicas have it. The store lives.
    pub fn unconfirmed(source: impl Into<BoxError>) -> Self {
        Self { kind: Kind::Unconfirmed, source: source.into() }
    }

    /// The step took no effect: the store refused it.
    pub fn refused(source: impl Into<BoxError>) -> Self {
        Self { kind: Kind::Refused, source: source.into() }
    }

    /// The step took no effect: it was not sent, because the store cannot be reached.
    pub fn unreachable(source: impl Into<BoxError>) -> Self {
        Self { kind: Kind::Unreachable, source: source.into() }
    }

    /// The step took no effect, because what the store has under the key is none of its records, or of a version to come.
    pub fn unreadable(source: impl Into<BoxError>) -> Self {
        Self { kind: Kind::Unreadable, source: source.into() }
    }

    /// Whether the step is known to have taken no effect.
    #[must_use]
    pub fn is_definite(&self) -> bool {
        !matches!(self.kind, Kind::Unconfirmed | Kind::Unknown)
    }

    /// Whether the store gave no sign of life.
    #[must_use]
    pub fn is_outage(&self) -> bool {
        matches!(self.kind, Kind::Unknown | Kind::Unreachable)
    }

    /// Whether there is something under the key that cannot be read: an event that was seen, whatever came of it.
    #[must_use]
    pub fn is_unreadable(&self) -> bool {
        self.kind == Kind::Unreadable
    }
}

impl fmt::Display for StoreError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.kind {
            Kind::Refused => "the store refused",
            Kind::Unconfirmed => "the store does not say that it lasts",
            Kind::Unknown => "the store did not answer",
            Kind::Unreachable => "the store cannot be reached",
            Kind::Unreadable => "what the store keeps cannot be read",
        })
    }
}

impl std::error::Error for StoreError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&*self.source)
    }
}
