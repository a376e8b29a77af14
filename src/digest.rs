//! BLAKE3 over typed, length-prefixed parts.
//!
//! The prefix is what keeps `a` + `bc` from being `ab` + `c`, and the tag what keeps the number `1` from being the
//! string `"1"`. Everything that names a key or a payload is digested here.

use std::fmt;

/// How much is digested in one go, in bytes: all that makes up most keys and small payloads, and no more than a chunk of BLAKE3.
const SHORT: usize = 512;

/// What stands before each part, at most, in bytes: its tag, and its length, with seven bits to a byte and the lowest first.
/// A hash has a price for every 64 bytes, and most parts need one for their length.
const MAX_HEAD: usize = 1 + (u64::BITS as usize).div_ceil(7);

/// A digest under way.
pub(crate) struct Digest {
    secret: Option<Secret>,
    short: [u8; SHORT],
    len: usize,
    /// From where it is no longer short.
    long: Option<Box<blake3::Hasher>>,
}

/// What nobody but this service knows: without it, a digest cannot be told from a guess.
#[derive(Clone, Copy)]
pub(crate) struct Secret([u8; blake3::KEY_LEN]);

impl Digest {
    /// Starts a digest for one use, so that no two uses can produce each other's values.
    pub(crate) fn new(domain: &'static str) -> Self {
        Self::keyed(domain, None)
    }

    /// As [`Digest::new`], under a secret where there is one.
    pub(crate) fn keyed(domain: &'static str, secret: Option<&Secret>) -> Self {
        let mut digest = Self { secret: secret.copied(), short: [0; SHORT], len: 0, long: None };
        digest.part(b'#', domain.as_bytes());
        digest
    }

    pub(crate) fn part(&mut self, tag: u8, bytes: &[u8]) {
        match bytes.len() {
            len @ 0..128 => self.add(&[tag, len as u8], bytes),
            len => {
                let (head, head_len) = long_head(tag, len as u64);
                self.add(&head[..head_len], bytes);
            }
        }
    }

    #[inline(always)]
    fn add(&mut self, head: &[u8], bytes: &[u8]) {
        let len = head.len() + bytes.len();
        if self.long.is_none()
            && let Some(room) = self.short.get_mut(self.len..self.len + len)
        {
            room[..head.len()].copy_from_slice(head);
            room[head.len()..].copy_from_slice(bytes);
            self.len += len;
        } else {
            self.add_long(head);
            self.add_long(bytes);
        }
    }

    /// Adds to what is no longer short.
    fn add_long(&mut self, bytes: &[u8]) {
        let start = || {
            let mut hasher = match &self.secret {
                None => blake3::Hasher::new(),
                Some(secret) => blake3::Hasher::new_keyed(&secret.0),
            };
            hasher.update(&self.short[..self.len]);
            Box::new(hasher)
        };
        self.long.get_or_insert_with(start).update(bytes);
    }

    /// Its first bytes, of 32.
    pub(crate) fn finish<const N: usize>(&self) -> [u8; N] {
        const { assert!(N <= blake3::OUT_LEN) };
        let short = &self.short[..self.len];
        let hash = match (&self.long, &self.secret) {
            (Some(hasher), _) => hasher.finalize(),
            (None, None) => blake3::hash(short),
            (None, Some(secret)) => blake3::keyed_hash(&secret.0, short),
        };
        let mut out = [0; N];
        out.copy_from_slice(&hash.as_bytes()[..N]);
        out
    }
}

/// What stands before a part of 128 bytes or more, and how many bytes of it.
fn long_head(tag: u8, mut length: u64) -> ([u8; MAX_HEAD], usize) {
    let (mut head, mut len) = ([tag; MAX_HEAD], 1);
    while length >= 0x80 {
        head[len] = length as u8 | 0x80;
        length >>= 7;
        len += 1;
    }
    head[len] = length as u8;
    (head, len + 1)
}

impl Secret {
    /// A secret of any length.
    pub(crate) fn new(secret: &[u8]) -> Self {
        Self(blake3::derive_key("tower-idempotency 2026-11 secret of stored keys", secret))
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(…)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Short, long, and about where the one becomes the other.
    #[test]
    fn a_digest_is_that_of_all_its_bytes() {
        let bytes = vec![7; 5000];
        for secret in [None, Some(Secret::new(b"a secret"))] {
            for lengths in [
                vec![],
                vec![1],
                vec![127],
                vec![128],
                vec![502],
                vec![503],
                vec![504],
                vec![499, 1, 1],
                vec![5000],
                vec![3, 4000, 0, 9],
            ] {
                let mut digest = Digest::keyed("test", secret.as_ref());
                let mut whole = b"#\x04test".to_vec();
                for length in lengths {
                    digest.part(b'p', &bytes[..length]);
                    whole.push(b'p');
                    match length {
                        0..128 => whole.push(length as u8),
                        _ => whole.extend([length as u8 | 0x80, (length >> 7) as u8]),
                    }
                    whole.extend(&bytes[..length]);
                }
                let hash = match &secret {
                    None => blake3::hash(&whole),
                    Some(secret) => blake3::keyed_hash(&secret.0, &whole),
                };
                assert_eq!(digest.finish::<24>(), hash.as_bytes()[..24], "of {} bytes", whole.len());
            }
        }
    }
}
