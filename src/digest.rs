//! BLAKE3 over typed, length-prefixed parts.
//!
//! The prefix is what keeps `a` + `bc` from being `ab` + `c`, and the tag what keeps the number `1` from being the
//! string `"1"`. Everything that names a key or a payload is digested here.

/// A digest under way.
pub(crate) struct Digest(blake3::Hasher);

impl Digest {
    /// Starts a digest for one use, so that no two uses can produce each other's values.
    pub(crate) fn new(domain: &'static str) -> Self {
        let mut digest = Self(blake3::Hasher::new());
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
