//! BLAKE3 over typed, length-prefixed parts.
//!
//! The prefix is what keeps `a` + `bc` from being `ab` + `c`, and the tag what keeps the number `1` from being the
//! string `"1"`. Everything that names a key or a payload is digested here.

use std::fmt;

/// How much is digested in one go, in bytes: all that makes up most keys and small payloads, and no more than a chunk of BLAKE3.
const SHORT: usize = 512;

/// What stands before each part: its tag and its length.
const HEAD: usize = 1 + size_of::<u64>();

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
        let mut head = [tag; HEAD];
        head[1..].copy_from_slice(&(bytes.len() as u64).to_le_bytes());
        let rest = self.short[self.len..].split_at_mut_checked(HEAD).filter(|_| self.long.is_none());
        if let Some((start, rest)) = rest
            && let Some(rest) = rest.get_mut(..bytes.len())
        {
            start.copy_from_slice(&head);
            rest.copy_from_slice(bytes);
            self.len += HEAD + bytes.len();
            return;
        }
        self.add(&head);
        self.add(bytes);
    }

    /// Adds to what is no longer short.
    fn add(&mut self, bytes: &[u8]) {
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
            for lengths in
                [vec![], vec![1], vec![490], vec![491], vec![492], vec![499, 1, 1], vec![5000], vec![3, 4000, 0, 9]]
            {
                let mut digest = Digest::keyed("test", secret.as_ref());
                let mut whole = b"#\x04\0\0\0\0\0\0\0test".to_vec();
                for length in lengths {
                    digest.part(b'p', &bytes[..length]);
                    whole.push(b'p');
                    whole.extend((length as u64).to_le_bytes());
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
