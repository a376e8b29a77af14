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
//!
//! // A form that a person may send twice, with a token that is new in each page.
//! let order = key::form("token");
//!
//! // A parameter of the query, for senders that can configure only a URL.
//! let cron = key::query("run");
//!
//! // gRPC: the field `request_id` of the message, by its number, else a piece of metadata.
//! let charge = key::protobuf([1]).or(key::metadata("request-id"));
//! # let _ = (postmark, shop, order, cron, charge);
//! ```
//!
//! A part that is absent, JSON `null` or an empty string is *missing*, and so is a composite of which a part is
//! missing: it never counts as an empty string, since that would make every event without an id a duplicate of the
//! last one. `0` and `false` are keys. Only the value counts, not where an alternative found it.

mod form;
mod header;
mod json;
mod map;
mod path;
mod protobuf;
mod source;
mod stored;

use std::sync::Arc;

use bytes::Bytes;
use http::HeaderName;
use http::request;

pub use self::header::HeaderSyntax;
pub use self::json::Json;
pub(crate) use self::map::KeyMap;
pub use self::path::InvalidPath;
use self::protobuf::FieldPath;
pub use self::source::KeySource;
use self::source::Rule;
pub(crate) use self::stored::Keys;
pub use self::stored::{InvalidKey, Key};

use crate::digest::Digest;

/// One part of a key. What it is compared by is its type and its exact bytes.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) enum Part {
    Absent,
    Bool(bool),
    /// A composite inside a composite, kept together: alternatives may differ in how many parts they have.
    Group(Vec<Self>),
    /// The exact text: `1`, `1.0` and `1e0` are three keys.
    Number(Bytes),
    Text(Bytes),
}

/// The request has something where its key should be, but not a key.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Malformed(pub(crate) &'static str);

impl Malformed {
    /// It may well be there, in more than may be read.
    pub(crate) const TOO_LARGE: Self = Self("the message is too large when it is unpacked");
}

impl std::fmt::Display for Malformed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.0)
    }
}

impl std::error::Error for Malformed {}

/// One part, `None` where it is missing.
pub(crate) type Found = Result<Option<Part>, Malformed>;

/// The parts of a key, `None` where it is missing.
pub(crate) type Extracted = Result<Option<Vec<Part>>, Malformed>;

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
    Rule::Header(names.iter().map(parse).collect()).into()
}

/// The key is a piece of metadata of a gRPC call.
///
/// Metadata travels in headers. Where `name` ends in `-bin` its value is bytes, which stand there as base64, padded or not
/// ([gRPC over HTTP/2](https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md)): the bytes are the key. Any other
/// is what [`header()`] makes of it.
///
/// # Panics
///
/// If `name` is not a header name.
#[must_use]
#[allow(clippy::expect_used, reason = "as documented: a programmer's mistake, found at start")]
pub fn metadata(name: &str) -> KeySource {
    let name = HeaderName::from_bytes(name.as_bytes()).expect("not a header name");
    let rule = if name.as_str().ends_with("-bin") { Rule::Binary(name) } else { Rule::Header(vec![name]) };
    rule.into()
}

/// The key is a field of a protobuf message, such as the `request_id` of [AIP-155](https://google.aip.dev/155), by the
/// numbers of the schema: `protobuf([1, 3])` is field 3 of the message in field 1. No generated code is needed.
///
/// - Strings and bytes are keys by their bytes, numbers and booleans by the number on the wire. What has its default value
///   (empty, 0, `false`) is missing, since a client need not send it. Two different values are malformed. A repeated field
///   is no key.
/// - In a gRPC call the body is one message behind its prefix of 5 bytes; any other body is the message itself, unless it is
///   declared as JSON. What is neither is malformed. [`json()`] finds nothing in a gRPC call, so that a rule may have both.
/// - A compressed message is read where the feature `gzip` is on and it is gzip; any other has no key. One that has more than
///   [`max_request_body`](crate::IdempotencyLayer::max_request_body) when it is unpacked is [over the
///   limit](crate::IdempotencyLayer::over_limit).
///
/// # Panics
///
/// If `path` is empty, or has a number that no field can have.
#[must_use]
#[allow(clippy::expect_used, reason = "as documented: a programmer's mistake, found at start")]
pub fn protobuf(path: impl AsRef<[u32]>) -> KeySource {
    let path = FieldPath::new(path.as_ref()).expect("not a path of field numbers");
    KeySource { messages: vec![path], ..Rule::Protobuf(0).into() }
}

/// The key is a scalar member of the JSON body, whatever its `Content-Type` says, unless that is gRPC.
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

/// The key is a parameter of the query, such as `event` in `/hooks?event=e-1`.
///
/// It is read as `application/x-www-form-urlencoded` (WHATWG URL §5.1): split at `&` and `=`, `+` is a space, and names
/// and values are percent-decoded. What counts is the exact bytes, which need not be UTF-8. A parameter that is absent or
/// empty is missing. Two different values are malformed, be one of them empty: frameworks differ in which of the two they
/// believe.
///
/// # Panics
///
/// If `name` is empty.
#[must_use]
pub fn query(name: &str) -> KeySource {
    Rule::Query(named(name)).into()
}

/// The key is a field of a form in the body, `multipart/form-data` or `application/x-www-form-urlencoded`.
///
/// The rules are those of [`query`]: exact bytes; absent and empty are missing, and two different values malformed.
///
/// - `multipart/form-data` (RFC 7578) is what `Content-Type` says it is. It is read by `multer`, as axum reads it. A body
///   that does not parse, to its closing delimiter, is malformed; so are a missing boundary, more than 1024 parts, and a
///   file under this name. Other files are passed over.
/// - Any other body is taken as urlencoded, whatever its `Content-Type` says. If that does not declare it as such, only a
///   body of nothing but the characters of a query (RFC 3986 §3.4) is: a text inside some JSON could read `&token=…`, and
///   is no key. Beside that, no body is malformed, so that a form may have a fallback: `form("id").or(json("$.id"))`.
///
/// A browser that sends a multipart form again chooses another boundary. Under the api contract that is another payload,
/// unless the layer is told to compare [nothing](crate::fingerprint::ignored).
///
/// # Panics
///
/// If `name` is empty.
#[must_use]
pub fn form(name: &str) -> KeySource {
    KeySource { fields: vec![named(name)], ..Rule::Form(0).into() }
}

fn named(name: &str) -> String {
    assert!(!name.is_empty(), "a key needs the name of its parameter or field");
    name.to_owned()
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
    Rule::FromFn(Arc::new(f)).into()
}

// === impl Part ===

impl Part {
    /// Whether it is as it has to be, and each part of a composite with it. What is absent is.
    fn passes(&self, valid: &dyn Fn(&[u8]) -> bool) -> bool {
        match self {
            Self::Absent => true,
            Self::Bool(value) => valid(value.to_string().as_bytes()),
            Self::Group(parts) => parts.iter().all(|part| part.passes(valid)),
            Self::Number(text) | Self::Text(text) => valid(text),
        }
    }

    pub(crate) fn digest(&self, digest: &mut Digest) {
        match self {
            Self::Absent => digest.part(b'-', &[]),
            Self::Bool(value) => digest.part(b'b', &[u8::from(*value)]),
            Self::Group(parts) => {
                digest.part(b'g', &(parts.len() as u64).to_le_bytes());
                parts.iter().for_each(|part| part.digest(digest));
            }
            Self::Number(text) => digest.part(b'n', text),
            Self::Text(text) => digest.part(b't', text),
        }
    }
}

#[cfg(test)]
mod properties;
#[cfg(test)]
mod tests;
