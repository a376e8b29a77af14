//! BLAKE3 over typed, length-prefixed parts.
//!
//! The prefix is what keeps `a` + `bc` from being `ab` + `c`, and the tag what keeps the number `1` from being the
//! string `"1"`. Everything that names a key or a payload is digested here.

use std::fmt;

/// A digest under way.
pub(crate) struct Digest(blake3::Hasher);

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
        let hasher = secret.map_or_else(blake3::Hasher::new, |secret| blake3::Hasher::new_keyed(&secret.0));
        let mut digest = Self(hasher);
        digest.part(b'#', domain.as_bytes());
        digest
    }

    pub(crate) fn part(&mut self, tag: u8, bytes: &[u8]) {
        self.0.update(&[tag]);
        self.0.update(&(bytes.len() as u64).to_le_bytes());
        self.0.update(bytes);
    }

    pub(crate) fn finish<const N: usize>(&self) -> [u8; N] {
        let mut out = [0; N];
        self.0.finalize_xof().fill(&mut out);
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
