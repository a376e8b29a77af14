//! Where a key comes from.
//!
//! A [`KeySource`] says which parts of a request identify the event it carries:
//!
//! ```
//! use tower_idempotency::key;
//!
//! // Postmark delivers, opens and clicks one message, for each of its recipients.
//! let postmark = key::json("$.MessageID")
//!     .and(key::json("$.Recipient"))
//!     .and_optional(key::json("$.RecordType"))
//!     .and_optional(key::json("$.ReceivedAt"));
//!
//! // A header where the sender has one, else a member of the body.
//! let shop = key::header("X-Idempotency-Key").or(key::json("$.event_id"));
//! # let _ = (postmark, shop);
//! ```
//!
//! A part that is absent, JSON `null` or an empty string is *missing*, and so is a composite of which a part is
//! missing: it never counts as an empty string, since that would make every event without an id a duplicate of the
//! last one. `0` and `false` are keys. Only the value counts, not where an alternative found it.

mod header;
mod json;
mod path;

use std::cell::LazyCell;
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use bytes::Bytes;
use http::HeaderName;
use http::request;

pub use self::header::HeaderSyntax;
pub use self::json::Json;
pub use self::path::InvalidPath;

use crate::digest::Digest;

/// How long a stored key is, in bytes: 192 bits.
const KEY_LEN: usize = 24;

/// The name under which the store knows one event: a digest of its scope and its parts.
///
/// It says nothing about the raw key, is the same in every process and for every delivery, and is therefore fit for
/// logs, for [`Ledger::lookup`](crate::Ledger::lookup), and as the idempotency key of a call downstream. It is displayed
/// and parsed as 32 characters of base64url (RFC 4648 §5).
#[derive(Clone, Copy, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct Key([u8; KEY_LEN]);

/// Where the key of a request comes from. See the [module docs](self).
#[derive(Clone, Debug)]
pub struct KeySource {
    rule: Rule,
    /// Every JSON path of the rule, so that one pass over the body finds them all.
    paths: Vec<Json>,
}

#[derive(Clone)]
enum Rule {
    All(Vec<(Self, Presence)>),
    Any(Vec<Self>),
    FromFn(Arc<KeyFn>),
    /// Any of these names; where several are there, they have to agree.
    Header(Vec<HeaderName>),
    /// An index into the paths.
    Json(usize),
}

type KeyFn = dyn Fn(&request::Parts, &Bytes) -> Option<Bytes> + Send + Sync;

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Presence {
    Optional,
    Required,
}

/// One part of a key. What it is compared by is its type and its exact bytes.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) enum Part {
    Absent,
    Bool(bool),
    /// The exact text: `1`, `1.0` and `1e0` are three keys.
    Number(Bytes),
    Text(Bytes),
}

/// The request has something where its key should be, but not a key.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Malformed(pub(crate) &'static str);

/// The parts of a key, `None` where it is missing.
pub(crate) type Extracted = Result<Option<Vec<Part>>, Malformed>;

/// The text is not a [`Key`].
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct InvalidKey(());

/// The key is the value of a header.
///
/// Under the webhook contract the value is opaque and has 1 to 1024 bytes; under the api contract it has 1 to 255 visible
/// ASCII characters, quoted or bare. Two different values are malformed: the first never wins.
///
/// # Panics
///
/// If `name` is not a header name.
#[must_use]
pub fn header(name: &str) -> KeySource {
    headers(&[name])
}

/// The key is the value of any of these headers. Where several are present, they have to agree.
///
/// # Panics
///
/// If one of `names` is not a header name, or if there is none.
#[must_use]
#[allow(clippy::expect_used, reason = "as documented: a programmer's mistake, found at start")]
pub fn headers(names: &[&str]) -> KeySource {
    assert!(!names.is_empty(), "a key needs at least one header name");
    let parse = |name: &&str| HeaderName::from_bytes(name.as_bytes()).expect("not a header name");
    KeySource { rule: Rule::Header(names.iter().map(parse).collect()), paths: Vec::new() }
}

/// The key is a scalar member of the JSON body, whatever its `Content-Type` says.
///
/// `path` is a singular query of RFC 9535 such as `$.data.id`, `$.items[0]['id']` or `$[-1]`. Strings, booleans and
/// numbers are keys by their exact text. A member repeated on the way makes the key malformed: parsers differ in which
/// of the two they believe.
///
/// # Panics
///
/// If `path` is not such a query. For a path from configuration there is [`Json::parse`].
#[must_use]
#[allow(clippy::expect_used, reason = "as documented: a programmer's mistake, found at start")]
pub fn json(path: &str) -> KeySource {
    Json::parse(path).expect("not a singular JSON path").into()
}

/// The key is what a function makes of the head and the buffered body. `None` and empty values are missing.
///
/// With [`stream_request_body`](crate::IdempotencyLayer::stream_request_body) the layer still buffers for it, since it
/// may look at the body.
#[must_use]
pub fn from_fn<F, K>(f: F) -> KeySource
where
    F: Fn(&request::Parts, &Bytes) -> Option<K> + Send + Sync + 'static,
    K: Into<Bytes>,
{
    let f = move |head: &request::Parts, body: &Bytes| f(head, body).map(Into::into);
    KeySource { rule: Rule::FromFn(Arc::new(f)), paths: Vec::new() }
}

// === impl KeySource ===

impl KeySource {
    /// A composite: both parts together are the key, and where one is missing the key is missing.
    #[must_use]
    pub fn and(self, other: impl Into<Self>) -> Self {
        self.composite(other.into(), Presence::Required)
    }

    /// A composite whose second part may be absent; absent is then part of the key.
    #[must_use]
    pub fn and_optional(self, other: impl Into<Self>) -> Self {
        self.composite(other.into(), Presence::Optional)
    }

    /// A fallback for where this key is missing. A malformed key does not fall back.
    #[must_use]
    pub fn or(mut self, other: impl Into<Self>) -> Self {
        let other = self.adopt(other.into());
        self.rule = match self.rule {
            Rule::Any(mut rules) => {
                rules.push(other);
                Rule::Any(rules)
            }
            rule => Rule::Any(vec![rule, other]),
        };
        self
    }

    fn composite(mut self, other: Self, presence: Presence) -> Self {
        let other = self.adopt(other);
        self.rule = match self.rule {
            Rule::All(mut rules) => {
                rules.push((other, presence));
                Rule::All(rules)
            }
            rule => Rule::All(vec![(rule, Presence::Required), (other, presence)]),
        };
        self
    }

    /// Takes over the paths of `other` and returns its rule, renumbered.
    fn adopt(&mut self, other: Self) -> Rule {
        let by = self.paths.len();
        self.paths.extend(other.paths);
        other.rule.renumbered(by)
    }

    /// Whether the body has to be there before the key can be.
    pub(crate) fn reads_body(&self) -> bool {
        self.rule.reads_body()
    }

    /// The parts of the key of this request.
    pub(crate) fn extract(&self, head: &request::Parts, body: &Bytes, syntax: HeaderSyntax) -> Extracted {
        let found = LazyCell::new(|| json::select(body, &self.paths));
        let mut find = |rule: &Rule| match rule {
            Rule::FromFn(f) => Ok(f(head, body).filter(|key| !key.is_empty()).map(Part::Text)),
            Rule::Header(names) => header::extract(&head.headers, names, syntax),
            Rule::Json(index) => found.as_ref().map(|found| found[*index].clone()).map_err(|malformed| *malformed),
            Rule::All(_) | Rule::Any(_) => Ok(None),
        };
        self.rule.evaluate(&mut find)
    }
}

impl From<Json> for KeySource {
    fn from(path: Json) -> Self {
        Self { rule: Rule::Json(0), paths: vec![path] }
    }
}

// === impl Rule ===

impl Rule {
    fn renumbered(self, by: usize) -> Self {
        match self {
            Self::All(rules) => Self::All(rules.into_iter().map(|(rule, p)| (rule.renumbered(by), p)).collect()),
            Self::Any(rules) => Self::Any(rules.into_iter().map(|rule| rule.renumbered(by)).collect()),
            Self::Json(index) => Self::Json(index + by),
            rule @ (Self::FromFn(_) | Self::Header(_)) => rule,
        }
    }

    fn reads_body(&self) -> bool {
        match self {
            Self::All(rules) => rules.iter().any(|(rule, _)| rule.reads_body()),
            Self::Any(rules) => rules.iter().any(Self::reads_body),
            Self::FromFn(_) | Self::Json(_) => true,
            Self::Header(_) => false,
        }
    }

    /// Composes what `find` says of the leaves.
    fn evaluate(&self, find: &mut dyn FnMut(&Self) -> Result<Option<Part>, Malformed>) -> Extracted {
        match self {
            Self::All(rules) => {
                let mut parts = Vec::with_capacity(rules.len());
                for (rule, presence) in rules {
                    match (rule.evaluate(find)?, presence) {
                        (Some(more), _) => parts.extend(more),
                        (None, Presence::Optional) => parts.push(Part::Absent),
                        (None, Presence::Required) => return Ok(None),
                    }
                }
                Ok(Some(parts))
            }
            Self::Any(rules) => {
                for rule in rules {
                    if let Some(parts) = rule.evaluate(find)? {
                        return Ok(Some(parts));
                    }
                }
                Ok(None)
            }
            leaf @ (Self::FromFn(_) | Self::Header(_) | Self::Json(_)) => Ok(find(leaf)?.map(|part| vec![part])),
        }
    }
}

impl fmt::Debug for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::All(rules) => f.debug_tuple("All").field(rules).finish(),
            Self::Any(rules) => f.debug_tuple("Any").field(rules).finish(),
            Self::FromFn(_) => f.write_str("FromFn"),
            Self::Header(names) => f.debug_tuple("Header").field(names).finish(),
            Self::Json(index) => f.debug_tuple("Json").field(index).finish(),
        }
    }
}

// === impl Part ===

impl Part {
    pub(crate) fn digest(&self, digest: &mut Digest) {
        match self {
            Self::Absent => digest.part(b'-', &[]),
            Self::Bool(value) => digest.part(b'b', &[u8::from(*value)]),
            Self::Number(text) => digest.part(b'n', text),
            Self::Text(text) => digest.part(b't', text),
        }
    }
}

// === impl Key ===

impl Key {
    pub(crate) const fn new(digest: [u8; KEY_LEN]) -> Self {
        Self(digest)
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
        f.write_str(&URL_SAFE_NO_PAD.encode(self.0))
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

#[cfg(test)]
mod tests;
