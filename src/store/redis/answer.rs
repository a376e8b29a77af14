//! What the server's answers mean.

use std::fmt;
use std::time::Duration;

use bytes::Bytes;
use redis::{FromRedisValue, Value};

use super::layout::{self, Corrupt, Phase};
use crate::store::{Claim, Claimed, Hold, StoreError};

/// The server answered in a way that none of its commands can.
#[derive(Debug)]
struct UnexpectedAnswer;

/// What a value that was found means for a claim; `None` where the server's clock has to decide.
pub(super) fn judge(value: Bytes, claim: &Claim) -> Result<Option<Claimed>, StoreError> {
    let value = layout::decode(value).map_err(StoreError::unreadable)?;
    let fingerprint = value.fingerprint;
    let mine = value.id == *claim.id.as_bytes();
    Ok(match value.phase {
        Phase::Running if mine => Some(Claimed::Acquired { attempt: value.attempt }),
        _ if claim.refuse_other && !value.forgotten && fingerprint != claim.fingerprint => Some(Claimed::Mismatch),
        Phase::Done => Some(Claimed::Done { fingerprint, record: value.record }),
        Phase::Free if mine => Some(Claimed::Running { fingerprint, lease_left: Duration::ZERO }),
        Phase::Free | Phase::Running => None,
    })
}

pub(super) fn held(answer: &Value) -> Result<Hold, StoreError> {
    match answer {
        Value::Int(1) => Ok(Hold::Held),
        Value::Int(0) => Ok(Hold::Lost),
        _ => Err(unexpected()),
    }
}

pub(super) fn unexpected() -> StoreError {
    StoreError::refused(UnexpectedAnswer)
}

pub(super) fn bytes(value: Option<Value>) -> Result<Bytes, StoreError> {
    match value {
        Some(Value::BulkString(bytes)) => Ok(bytes.into()),
        _ => Err(StoreError::unreadable(Corrupt)),
    }
}

pub(super) fn text(value: &Value) -> Result<&[u8], StoreError> {
    match value {
        Value::BulkString(text) => Ok(text),
        _ => Err(unexpected()),
    }
}

pub(super) fn number<T: FromRedisValue>(value: Option<Value>) -> Result<T, StoreError> {
    let number = value.and_then(|value| T::from_redis_value(value).ok());
    number.ok_or_else(unexpected)
}

// === impl UnexpectedAnswer ===

impl fmt::Display for UnexpectedAnswer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the server answered in a way that this version does not understand")
    }
}

impl std::error::Error for UnexpectedAnswer {}
