//! A key in a header.

use std::borrow::Cow;

use base64::Engine as _;
use base64::alphabet::STANDARD;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue};
use sfv::{Parser, StringRef};

use super::{Found, Malformed, Part};

/// gRPC over HTTP/2: padded or not.
const BINARY: GeneralPurpose = GeneralPurpose::new(
    &STANDARD,
    GeneralPurposeConfig::new()
        .with_decode_padding_mode(DecodePaddingMode::Indifferent)
        .with_decode_allow_trailing_bits(true),
);

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
    /// A string of RFC 9651 §3.3.3 alone, with 1 to `max_len` characters: what
    /// draft-ietf-httpapi-idempotency-key-header-07 §2.1 prescribes, and refuses of others. Its parameters are ignored:
    /// `"abc";p=1` is `abc`. A bare key is malformed, and so are an empty one and a list.
    StructuredString {
        /// The longest key, in characters, without the quotes and the escapes.
        max_len: usize,
    },
    /// Visible ASCII, 1 to `max_len` characters, either bare or as a [structured string](Self::StructuredString), which
    /// are the same key. A bare key has no comma: it could not be told from two keys that a proxy joined. Empty is
    /// malformed. The api default, with 255 characters (the draft, and Stripe).
    Visible {
        /// The longest key, in characters, without the quotes.
        max_len: usize,
    },
}

/// Finds the one value that these headers agree on.
pub(super) fn extract(headers: &HeaderMap, names: &[HeaderName], syntax: HeaderSyntax) -> Found {
    agreed(names.iter().flat_map(|name| headers.get_all(name)).map(|value| syntax.parse(value)))
}

/// The same of metadata whose values are bytes. A proxy may have joined several by a comma.
pub(super) fn binary(headers: &HeaderMap, name: &HeaderName, syntax: HeaderSyntax) -> Found {
    let values = headers.get_all(name).iter().flat_map(|value| value.as_bytes().split(|byte| *byte == b','));
    agreed(values.map(|value| match BINARY.decode(value.trim_ascii()) {
        Ok(bytes) if bytes.is_empty() && matches!(syntax, HeaderSyntax::Opaque { .. }) => Ok(None),
        Ok(bytes) => within(syntax.max_len(), bytes.into()),
        Err(_) => Err(Malformed("the key is not base64")),
    }))
}

fn agreed(values: impl Iterator<Item = Result<Option<Bytes>, Malformed>>) -> Found {
    let mut key = None;
    for value in values {
        let Some(value) = value? else { continue };
        match &key {
            Some(first) if *first != value => return Err(Malformed("two different keys")),
            Some(_) => {}
            None => key = Some(value),
        }
    }
    Ok(key.map(Part::Text))
}

// === impl HeaderSyntax ===

impl HeaderSyntax {
    const fn max_len(self) -> usize {
        match self {
            Self::Opaque { max_len } | Self::StructuredString { max_len } | Self::Visible { max_len } => max_len,
        }
    }

    fn parse(self, value: &HeaderValue) -> Result<Option<Bytes>, Malformed> {
        let value = value.as_bytes();
        match self {
            Self::Opaque { .. } if value.is_empty() => Ok(None),
            Self::Opaque { max_len } => within(max_len, Bytes::copy_from_slice(value)),
            Self::StructuredString { max_len } => within(max_len, structured_string(value)?),
            Self::Visible { max_len } => {
                let key = match value {
                    [b'"', ..] => structured_string(value)?,
                    bare if bare.contains(&b',') => return Err(Malformed("the key is a list")),
                    bare => Bytes::copy_from_slice(bare),
                };
                match key.iter().all(u8::is_ascii_graphic) {
                    true => within(max_len, key),
                    false => Err(Malformed("the key is not visible ASCII")),
                }
            }
        }
    }
}

fn within(max_len: usize, key: Bytes) -> Result<Option<Bytes>, Malformed> {
    match key.len() {
        0 => Err(Malformed("the key is empty")),
        len if len > max_len => Err(Malformed("the key is too long")),
        _ => Ok(Some(key)),
    }
}

/// What a structured-field string says, without quotes, escapes and parameters.
fn structured_string(value: &[u8]) -> Result<Bytes, Malformed> {
    match Parser::new(value).parse_item::<Cow<'_, StringRef>>() {
        Ok(string) => Ok(Bytes::copy_from_slice(string.as_str().as_bytes())),
        Err(_) => Err(Malformed("the key is not one quoted string")),
    }
}
