//! The value under a key: a fixed header that never changes its layout, then the record of a done key.
//!
//! Scripts of any version of this crate find their way in records of any other by this header alone:
//!
//! ```text
//!  0   2  "ti"
//!  2   1  state: R running, D done, F free
//!  3   1  1 where there is a fingerprint, 0 where there is none, 2 where the key was forgotten and any will do
//!  4  16  claim id
//! 20   4  attempt, big-endian; 0 for a claim that was given up before it ran
//! 24   8  retention in ms, big-endian
//! 32  16  fingerprint, else zeros
//! 48   1  1 where an attempt before this one died or failed, and is to be remembered for the retention
//! 49      record
//! ```
//!
//! A running record lives for its retention and its lease, so its lease is alive exactly while the key's PTTL is above
//! its retention: the server's clock alone decides.

use std::fmt;
use std::time::Duration;

use bytes::{Buf, BufMut, Bytes, BytesMut};

use crate::fingerprint::Fingerprint;
use crate::store::{Claim, ClaimId};

const MAGIC: &[u8; 2] = b"ti";
const HEADER_LEN: usize = 49;

/// In the place of whether there is a fingerprint.
const FORGOTTEN: u8 = 2;

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Phase {
    Done,
    Free,
    Running,
}

impl Phase {
    pub(super) const fn byte(self) -> u8 {
        match self {
            Self::Done => b'D',
            Self::Free => b'F',
            Self::Running => b'R',
        }
    }
}

/// What stands under a key.
#[derive(Debug)]
pub(super) struct Value {
    pub(super) phase: Phase,
    pub(super) id: [u8; ClaimId::LEN],
    pub(super) attempt: u32,
    pub(super) fingerprint: Option<Fingerprint>,
    pub(super) forgotten: bool,
    pub(super) record: Bytes,
}

/// What stands under a key is not of this crate, or of a version to come.
#[derive(Debug)]
pub(super) struct Corrupt;

pub(super) fn encode(claim: &Claim, phase: Phase, attempt: u32, record: &[u8]) -> Bytes {
    let mut out = BytesMut::with_capacity(HEADER_LEN + record.len());
    out.put_slice(MAGIC);
    out.put_u8(phase.byte());
    out.put_u8(u8::from(claim.fingerprint.is_some()));
    out.put_slice(claim.id.as_bytes());
    out.put_u32(attempt);
    out.put_u64(millis(claim.retention));
    out.put_slice(claim.fingerprint.unwrap_or(Fingerprint::from_bytes([0; Fingerprint::LEN])).as_bytes());
    out.put_u8(0);
    out.put_slice(record);
    out.freeze()
}

pub(super) fn decode(mut value: Bytes) -> Result<Value, Corrupt> {
    if value.len() < HEADER_LEN || value.split_to(2) != MAGIC[..] {
        return Err(Corrupt);
    }
    let phase = match value.get_u8() {
        b'D' => Phase::Done,
        b'F' => Phase::Free,
        b'R' => Phase::Running,
        _ => return Err(Corrupt),
    };
    let compared = value.get_u8();
    let mut id = [0; ClaimId::LEN];
    value.copy_to_slice(&mut id);
    let attempt = value.get_u32();
    let _retention = value.get_u64();
    let mut fingerprint = [0; Fingerprint::LEN];
    value.copy_to_slice(&mut fingerprint);
    let _remembered = value.get_u8();
    let fingerprint = (compared == 1).then(|| Fingerprint::from_bytes(fingerprint));
    Ok(Value { phase, id, attempt, fingerprint, forgotten: compared == FORGOTTEN, record: value })
}

/// At least 1, since Redis knows no shorter life.
pub(super) fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX).max(1)
}

impl fmt::Display for Corrupt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("what stands under the key is not a record of this version")
    }
}

impl std::error::Error for Corrupt {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_header_does_not_change() {
        let mut claim = Claim::new(Duration::from_secs(1), Duration::from_millis(0x0102_0304));
        claim.fingerprint = Some(Fingerprint::from_bytes([0xF0; 16]));
        let value = encode(&claim, Phase::Done, 0x0A0B_0C0D, b"record");
        let golden = [
            b"tiD\x01",
            &claim.id.as_bytes()[..],
            b"\x0a\x0b\x0c\x0d\x00\x00\x00\x00\x01\x02\x03\x04",
            &[0xF0; 16],
            b"\x00record",
        ]
        .concat();
        assert_eq!(value, golden);
        let value = decode(value).unwrap();
        assert_eq!((value.phase, value.attempt), (Phase::Done, 0x0A0B_0C0D));
        assert_eq!((value.fingerprint, &value.id), (claim.fingerprint, claim.id.as_bytes()));
        assert_eq!(value.record, "record");
    }

    #[test]
    fn rubbish_is_not_read() {
        let claim = Claim::new(Duration::from_secs(1), Duration::from_secs(1));
        let value = encode(&claim, Phase::Running, 1, b"");
        assert!(decode(value.slice(..48)).is_err());
        assert!(decode(Bytes::from_static(b"")).is_err());
        for at in [0, 2] {
            let mut changed = value.to_vec();
            changed[at] = b'x';
            assert!(decode(changed.into()).is_err());
        }
    }
}
