//! How requests end, and the stable names of that.

use crate::rejection::Rejection;

/// How a request ended. The names are the stable values of the field `outcome`.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Outcome {
    /// The client left before anything was decided.
    Abandoned,
    /// It ran without protection, because the store is down and the layer was told to bypass it.
    Bypassed,
    /// It ran.
    Executed(Executed),
    /// The layer had nothing to do with it.
    PassedThrough(PassedThrough),
    Refused(Rejection),
    /// It was answered with the outcome of an attempt.
    Replayed {
        /// The request that brought the key first had another payload.
        other_payload: bool,
    },
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Executed {
    /// The handler found that an earlier attempt had made the effect.
    AlreadyApplied,
    /// The inner service returned an error.
    Error,
    /// Its response body failed.
    FailedBody,
    Kept,
    /// Another attempt had taken its place.
    Lost,
    Panicked,
    /// The outcome is none that is kept; the next delivery runs.
    Released,
    /// It ran without its body being kept.
    Tombstone,
    /// The store did not take the outcome before the pursuit ended.
    Unstored,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum PassedThrough {
    BodyOverLimit,
    KeyMalformed,
    KeyMissing,
    NotApplicable,
}

// === impl Outcome ===

impl Outcome {
    /// Whether an operator has to see it. A malformed key is its sender's affair, and the first of each layer is warned of.
    pub(super) const fn is_alarming(self) -> bool {
        matches!(
            self,
            Self::Bypassed
                | Self::Executed(Executed::Lost | Executed::Panicked | Executed::Unstored)
                | Self::Refused(
                    Rejection::OutcomeUnknown
                        | Rejection::Overloaded
                        | Rejection::ScopeUnknown
                        | Rejection::StoreUnavailable
                )
        )
    }

    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Abandoned => "abandoned",
            Self::Bypassed => "bypassed",
            Self::Executed(_) => "executed",
            Self::PassedThrough(_) => "passed_through",
            Self::Refused(_) => "refused",
            Self::Replayed { .. } => "replayed",
        }
    }

    pub(super) const fn reason(self) -> &'static str {
        match self {
            Self::Abandoned | Self::Bypassed | Self::Replayed { other_payload: false } => "",
            Self::Executed(Executed::AlreadyApplied) => "already_applied",
            Self::Executed(Executed::Error) => "error",
            Self::Executed(Executed::FailedBody) => "failed_body",
            Self::Executed(Executed::Kept) => "kept",
            Self::Executed(Executed::Lost) => "lost",
            Self::Executed(Executed::Panicked) => "panicked",
            Self::Executed(Executed::Released) => "released",
            Self::Executed(Executed::Tombstone) => "tombstone",
            Self::Executed(Executed::Unstored) => "unstored",
            Self::PassedThrough(PassedThrough::BodyOverLimit) => "body_over_limit",
            Self::PassedThrough(PassedThrough::KeyMalformed) => "key_malformed",
            Self::PassedThrough(PassedThrough::KeyMissing) => "key_missing",
            Self::PassedThrough(PassedThrough::NotApplicable) => "not_applicable",
            Self::Refused(rejection) => rejection.code(),
            Self::Replayed { other_payload: true } => "other_payload",
        }
    }
}
