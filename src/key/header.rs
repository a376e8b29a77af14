//! A key in a header.

use bytes::{BufMut, Bytes, BytesMut};
use http::{HeaderMap, HeaderName, HeaderValue};

use super::{Malformed, Part};

/// What may stand in a key header.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[non_exhaustive]
pub enum HeaderSyntax {
    /// Any bytes, 1 to `max_len` of them; empty counts as missing. The webhook default, with 1024 bytes: senders do not
    /// agree on a form and cannot correct themselves.
    Opaque {
        /// The longest key, in bytes.
        max_len: usize,
    },
    /// Visible ASCII, 1 to `max_len` characters, either bare or as a quoted string (RFC 9651 §3.3.3), which are the same
    /// key. A bare key has no comma: it could not be told from two keys that a proxy joined. Empty is malformed. The api
    /// default, with 255 characters (draft-ietf-httpapi-idempotency-key-header-07 §2.1, Stripe).
    Visible {
        /// The longest key, in characters, without the quotes.
        max_len: usize,
    },
}

/// Finds the one value that these headers agree on.
pub(super) fn extract(
    headers: &HeaderMap,
    names: &[HeaderName],
    syntax: HeaderSyntax,
) -> Result<Option<Part>, Malformed> {
    let mut key = None;
    for value in names.iter().flat_map(|name| headers.get_all(name)) {
        let Some(value) = syntax.parse(value)? else { continue };
        match &key {
            Some(first) if *first != value => return Err(Malformed("two different keys")),
            Some(_) => {}
            None => key = Some(value),
        }
    }
    Ok(key.map(Part::Text))
}

impl HeaderSyntax {
    fn parse(self, value: &HeaderValue) -> Result<Option<Bytes>, Malformed> {
        let value = value.as_bytes();
        match self {
            Self::Opaque { .. } if value.is_empty() => Ok(None),
            Self::Opaque { max_len } if value.len() > max_len => Err(Malformed("the key is too long")),
            Self::Opaque { .. } => Ok(Some(Bytes::copy_from_slice(value))),
            Self::Visible { max_len } => {
                let key = match value {
                    [b'"', quoted @ .., b'"'] => unquote(quoted)?,
                    [b'"', ..] => return Err(Malformed("the key is not one quoted string")),
                    bare if bare.contains(&b',') => return Err(Malformed("the key is a list")),
                    bare => Bytes::copy_from_slice(bare),
                };
                match key.len() {
                    0 => Err(Malformed("the key is empty")),
                    len if len > max_len => Err(Malformed("the key is too long")),
                    _ if !key.iter().all(u8::is_ascii_graphic) => Err(Malformed("the key is not visible ASCII")),
                    _ => Ok(Some(key)),
                }
            }
        }
    }
}

/// The inside of a structured-field string, without its escapes (RFC 9651 §4.2.5).
fn unquote(quoted: &[u8]) -> Result<Bytes, Malformed> {
    let mut plain = BytesMut::with_capacity(quoted.len());
    let mut bytes = quoted.iter();
    while let Some(&byte) = bytes.next() {
        plain.put_u8(match byte {
            b'"' => return Err(Malformed("the key has a quote inside")),
            b'\\' => match bytes.next() {
                Some(&escaped @ (b'"' | b'\\')) => escaped,
                _ => return Err(Malformed("the key has a stray backslash")),
            },
            byte => byte,
        });
    }
    Ok(plain.freeze())
}
