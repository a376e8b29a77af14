//! The name under which a store knows an event.

use std::fmt;
use std::str::FromStr;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;

/// How long a stored key is, in bytes: 192 bits.
const KEY_LEN: usize = 24;

/// How long it is as text.
const TEXT_LEN: usize = KEY_LEN / 3 * 4;

/// The name under which the store knows one event: a digest of its scope and its parts.
///
/// It says nothing about the raw key, is the same in every process and for every delivery, and is therefore fit for
/// logs, for [`Ledger::lookup`](crate::Ledger::lookup), and as the idempotency key of a call downstream. It is displayed
/// and parsed as 32 characters of base64url (RFC 4648 §5).
#[derive(Clone, Copy, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct Key([u8; KEY_LEN]);

/// The names of one event: one for each secret that is in use.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Keys {
    pub(crate) current: Key,
    /// The name under the secret before this one, while secrets rotate.
    pub(crate) previous: Option<Key>,
}

impl Keys {
    /// Whether both can be names of one event.
    pub(crate) fn meet(self, other: Self) -> bool {
        let names = |keys: Self| [Some(keys.current), keys.previous].into_iter().flatten();
        names(self).any(|name| names(other).any(|other| name == other))
    }
}

/// The text is not a [`Key`].
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct InvalidKey(());

// === impl Key ===

impl Key {
    pub(crate) const fn new(digest: [u8; KEY_LEN]) -> Self {
        Self(digest)
    }

    /// It as text, without a thing allocated.
    pub(crate) fn with_text<T>(&self, read: impl FnOnce(&str) -> T) -> T {
        let mut text = [0; TEXT_LEN];
        // It fits, and is ASCII.
        let written = URL_SAFE_NO_PAD.encode_slice(self.0, &mut text).unwrap_or(0);
        read(str::from_utf8(&text[..written]).unwrap_or_default())
    }

    /// The digest itself.
    #[must_use]
    pub const fn as_bytes(&self) -> &[u8; KEY_LEN] {
        &self.0
    }
}

impl From<[u8; KEY_LEN]> for Key {
    /// A key made elsewhere, as the tests of a store need them.
    fn from(digest: [u8; KEY_LEN]) -> Self {
        Self(digest)
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.with_text(|text| f.write_str(text))
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Key({self})")
    }
}

impl FromStr for Key {
    type Err = InvalidKey;

    fn from_str(text: &str) -> Result<Self, InvalidKey> {
        let bytes = URL_SAFE_NO_PAD.decode(text).map_err(|_| InvalidKey(()))?;
        bytes.try_into().map(Self).map_err(|_| InvalidKey(()))
    }
}

impl fmt::Display for InvalidKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a key is 32 characters of base64url")
    }
}

impl std::error::Error for InvalidKey {}
