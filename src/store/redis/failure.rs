//! Why a command has no result, and what that says.

use redis::{ErrorKind, RedisError, ServerErrorKind};

use crate::store::StoreError;

/// Why a command has no result.
#[derive(Debug)]
pub(super) enum Failure {
    /// The server said so, and has done nothing.
    Refused(RedisError),
    /// It may have been done.
    Unknown(RedisError),
    /// It has not been sent.
    Unsent(RedisError),
}

/// Whether the server itself said so. Everything else leaves open what it has done.
pub(super) fn is_reply(error: &RedisError) -> bool {
    matches!(error.kind(), ErrorKind::Server(_) | ErrorKind::Extension)
}

/// Whether it says so before a step could have done anything: of the others a second sending may be told what the first one
/// brought about.
pub(super) fn comes_before_any_effect(error: &RedisError) -> bool {
    use ServerErrorKind::{NoPerm, NoScript, ResponseError};
    matches!(error.kind(), ErrorKind::Server(NoPerm | NoScript | ResponseError))
        || matches!(error.code(), Some("CORRUPT" | "OOM" | "WRONGTYPE"))
}

/// Whether it says where a key is, or that nobody has it now.
pub(super) fn is_about_topology(error: &RedisError) -> bool {
    use ServerErrorKind::{Ask, BusyLoading, ClusterDown, MasterDown, Moved, ReadOnly, TryAgain};
    match error.kind() {
        ErrorKind::Server(kind) => {
            matches!(kind, Ask | BusyLoading | ClusterDown | MasterDown | Moved | ReadOnly | TryAgain)
        }
        _ => false,
    }
}

/// Whether the server cannot write, and another may have taken its place.
pub(super) fn is_from_replica(error: &RedisError) -> bool {
    match error.kind() {
        ErrorKind::Server(ServerErrorKind::ReadOnly | ServerErrorKind::MasterDown) => true,
        // From inside a script, before 7.0.
        ErrorKind::Server(ServerErrorKind::ResponseError) => {
            error.detail().is_some_and(|detail| detail.contains("-READONLY") || detail.contains("-MASTERDOWN"))
        }
        _ => false,
    }
}

/// Whether another server may do what this one will not, or this one by another connection: it is a master that its replicas
/// have left, or was never told who asks.
pub(super) fn is_worth_leaving(error: &RedisError) -> bool {
    let code = error.code();
    // From inside a script, before 7.0.
    let in_script = || error.detail().is_some_and(|detail| detail.contains("-NOREPLICAS"));
    matches!(code, Some("NOREPLICAS" | "NOAUTH")) || code == Some("ERR") && in_script()
}

/// Without what a server repeats of the command that it does not know: where that is the greeting, it is a password.
pub(super) fn without_arguments(error: RedisError) -> RedisError {
    match error.detail() {
        Some(detail) if detail.contains("args beginning with") => {
            RedisError::from((error.kind(), "the server does not know a command of the greeting"))
        }
        _ => error,
    }
}

/// Whether what stands under the key is none of our records. `CORRUPT` is the scripts' own word for it.
fn is_of_no_record(error: &RedisError) -> bool {
    // Before 7.0 an error inside a script has its code in the text.
    let in_script = || error.detail().is_some_and(|detail| detail.contains(" WRONGTYPE "));
    matches!(error.code(), Some("WRONGTYPE" | "CORRUPT")) || error.code() == Some("ERR") && in_script()
}

/// How a server before 7.0 answers to `SET` with `NX` and `GET`, and to a script with flags.
pub(super) fn is_from_before_7(reply: &RedisError) -> bool {
    reply.kind() == ErrorKind::Server(ServerErrorKind::ResponseError)
        && reply.detail().is_some_and(|detail| detail.contains("syntax error") || detail.contains("compiling script"))
}

// === impl Failure ===

impl Failure {
    /// What has been done by a sending that failed like this, and another after it that failed like `next`.
    pub(super) fn and_then(self, next: Self) -> Self {
        match (self, next) {
            (Self::Unknown(_), Self::Refused(error) | Self::Unsent(error)) => Self::Unknown(error),
            (Self::Refused(_), Self::Unsent(error)) => Self::Refused(error),
            (_, next) => next,
        }
    }

    /// What went wrong last.
    pub(super) fn error(&self) -> &RedisError {
        match self {
            Self::Refused(error) | Self::Unknown(error) | Self::Unsent(error) => error,
        }
    }
}

impl From<Failure> for StoreError {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Refused(error) if is_of_no_record(&error) => Self::unreadable(error),
            Failure::Refused(error) => Self::refused(error),
            Failure::Unsent(error) => Self::unreachable(error),
            Failure::Unknown(error) => Self::unknown(error),
        }
    }
}
