//! A key in a field of a protobuf message.

use std::borrow::Cow;

use bytes::Bytes;
use http::HeaderMap;

use super::{Found, Malformed, Part};
use crate::media_type;
use crate::wire::{Fields, NotProtobuf, Value};

/// The largest number a field may have.
const MAX_NUMBER: u32 = (1 << 29) - 1;

/// Which field: its number, behind those of the messages that it is in.
#[derive(Clone, Debug)]
pub(super) struct FieldPath(Vec<u32>);

impl FieldPath {
    /// `None` if it is none.
    pub(super) fn new(numbers: &[u32]) -> Option<Self> {
        let is_path = !numbers.is_empty() && numbers.iter().all(|number| (1..=MAX_NUMBER).contains(number));
        is_path.then(|| Self(numbers.to_vec()))
    }
}

/// What stands in each of these fields.
pub(super) fn select(headers: &HeaderMap, body: &Bytes, paths: &[FieldPath], limit: usize) -> Vec<Found> {
    match message(headers, body, limit) {
        Ok(Some(message)) => paths.iter().map(|path| find(&message, path)).collect(),
        Ok(None) => vec![Ok(None); paths.len()],
        Err(malformed) => vec![Err(malformed); paths.len()],
    }
}

/// The message of a request; none where it is compressed and cannot be read here.
fn message<'a>(headers: &HeaderMap, body: &'a Bytes, limit: usize) -> Result<Option<Cow<'a, [u8]>>, Malformed> {
    if !media_type::is_grpc(headers) {
        return Ok(Some(Cow::Borrowed(body)));
    }
    // gRPC over HTTP/2: Length-Prefixed-Message → Compressed-Flag Message-Length Message
    let Some(([flag, len @ ..], message)) = body.split_first_chunk::<5>() else {
        return Err(Malformed("the call has no message"));
    };
    if u32::from_be_bytes(*len) as usize != message.len() {
        return Err(Malformed("the call is not one message"));
    }
    match flag {
        0 => Ok(Some(Cow::Borrowed(message))),
        1 => Ok(decompressed(headers, message, limit)?.map(Cow::Owned)),
        _ => Err(Malformed("the message has an unknown flag")),
    }
}

/// By `gzip` alone, which is what all implementations of gRPC have in common.
#[cfg(feature = "gzip")]
fn decompressed(headers: &HeaderMap, message: &[u8], limit: usize) -> Result<Option<Vec<u8>>, Malformed> {
    use std::io::Read as _;

    if headers.get("grpc-encoding").is_none_or(|encoding| encoding != "gzip") {
        return Ok(None);
    }
    let mut plain = Vec::new();
    let read = flate2::read::GzDecoder::new(message).take((limit as u64).saturating_add(1)).read_to_end(&mut plain);
    match read {
        Ok(len) if len > limit => Err(Malformed::TOO_LARGE),
        Ok(_) => Ok(Some(plain)),
        Err(_) => Err(Malformed("the message is not compressed as it says")),
    }
}

#[cfg(not(feature = "gzip"))]
#[allow(clippy::unnecessary_wraps, reason = "with `gzip` it may be malformed")]
fn decompressed(_: &HeaderMap, _: &[u8], _: usize) -> Result<Option<Vec<u8>>, Malformed> {
    Ok(None)
}

fn find(message: &[u8], path: &FieldPath) -> Found {
    let mut found = None;
    search(message, &path.0, &mut found)?;
    Ok(found.and_then(part))
}

/// A message that stands twice is merged, so each of them is searched.
fn search<'a>(message: &'a [u8], path: &[u32], found: &mut Option<Value<'a>>) -> Result<(), Malformed> {
    let Some((number, inner)) = path.split_first() else { return Ok(()) };
    for field in Fields::of(message) {
        let field = field.map_err(|NotProtobuf| Malformed("the message is no protobuf"))?;
        if field.number != *number {
            continue;
        }
        match field.value {
            value if inner.is_empty() => {
                if found.is_some_and(|first| first != value) {
                    return Err(Malformed("two different keys"));
                }
                *found = Some(value);
            }
            Value::Bytes(message) | Value::Group(message) => search(message, inner, found)?,
            // A field of another type than the schema says counts as one that is not there.
            Value::Fixed32(_) | Value::Fixed64(_) | Value::Varint(_) => {}
        }
    }
    Ok(())
}

/// What a field's default is would often not even be sent, and is missing.
fn part(value: Value<'_>) -> Option<Part> {
    let number = |value: u64| (value != 0).then(|| Part::Number(value.to_string().into()));
    match value {
        Value::Bytes(bytes) => (!bytes.is_empty()).then(|| Part::Text(Bytes::copy_from_slice(bytes))),
        Value::Fixed32(value) => number(value.into()),
        Value::Fixed64(value) | Value::Varint(value) => number(value),
        Value::Group(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use http::header::{CONTENT_TYPE, HeaderValue};

    use super::*;
    use crate::wire::{put_bytes, put_varint};

    const LIMIT: usize = 1000;

    fn plain(path: &[u32], message: &[u8]) -> Found {
        let path = FieldPath::new(path).unwrap();
        select(&HeaderMap::new(), &Bytes::copy_from_slice(message), &[path], LIMIT).remove(0)
    }

    fn call(encoding: &'static str, body: &[u8]) -> Found {
        let mut headers = HeaderMap::new();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
        headers.insert("grpc-encoding", HeaderValue::from_static(encoding));
        let path = FieldPath::new(&[1]).unwrap();
        select(&headers, &Bytes::copy_from_slice(body), &[path], LIMIT).remove(0)
    }

    fn text(text: &'static str) -> Found {
        Ok(Some(Part::Text(Bytes::from_static(text.as_bytes()))))
    }

    fn number(number: u64) -> Found {
        Ok(Some(Part::Number(number.to_string().into())))
    }

    fn framed(flag: u8, message: &[u8]) -> Vec<u8> {
        [&[flag][..], &u32::try_from(message.len()).unwrap().to_be_bytes(), message].concat()
    }

    #[test]
    fn a_field_is_found_by_its_numbers() {
        let mut inner = Vec::new();
        put_bytes(&mut inner, 3, b"abc");
        put_varint(&mut inner, 4, 7);
        let mut message = Vec::new();
        put_bytes(&mut message, 3, b"not this");
        put_bytes(&mut message, 1, &inner);
        assert_eq!(plain(&[1, 3], &message), text("abc"));
        assert_eq!(plain(&[1, 4], &message), number(7));
        assert_eq!(plain(&[3], &message), text("not this"));
        assert_eq!(plain(&[2], &message), Ok(None));
        assert_eq!(plain(&[1, 4, 1], &message), Ok(None), "a number has no fields");
        assert_eq!(plain(&[5], b"\x2d\x09\0\0\0"), number(9));
        assert_eq!(plain(&[5], b"\x29\x09\0\0\0\0\0\0\0"), number(9));
        assert_eq!(plain(&[5], b"\x28\x89\x00"), number(9), "in more bytes than it needs");
        assert_eq!(plain(&[2, 1], b"\x13\x0a\x01a\x14"), text("a"), "in a message with an end");
        assert_eq!(plain(&[2], b"\x13\x0a\x01a\x14"), Ok(None));
    }

    #[test]
    fn a_default_is_missing_whether_it_is_sent_or_not() {
        for default in [&b""[..], b"\x0a\x00", b"\x08\x00", b"\x0d\0\0\0\0", b"\x09\0\0\0\0\0\0\0\0"] {
            assert_eq!(plain(&[1], default), Ok(None));
        }
    }

    #[test]
    fn parts_of_a_message_that_come_apart_are_one() {
        assert_eq!(plain(&[1, 1], b"\x0a\x02\x10\x05\x0a\x03\x0a\x01a"), text("a"));
        assert_eq!(plain(&[1, 1], b"\x0a\x03\x0a\x01a\x0a\x03\x0a\x01a"), text("a"));
        assert!(plain(&[1, 1], b"\x0a\x03\x0a\x01a\x0a\x03\x0a\x01b").is_err());
        assert!(plain(&[1], b"\x0a\x01a\x0a\x00").is_err(), "be one of them empty");
    }

    #[test]
    fn what_is_no_message_is_malformed() {
        assert!(plain(&[1], b"{\"id\":1}").is_err());
        assert!(plain(&[1], b"\x0a\x01a\x0a").is_err(), "also behind the key");
        assert!(plain(&[1, 1], b"\x0a\x01\x0a").is_err());
    }

    #[test]
    fn a_path_has_numbers_that_fields_may_have() {
        assert!(FieldPath::new(&[]).is_none() && FieldPath::new(&[1, 0]).is_none());
        assert!(FieldPath::new(&[MAX_NUMBER]).is_some() && FieldPath::new(&[MAX_NUMBER + 1]).is_none());
    }

    #[test]
    fn a_call_is_one_message_to_its_last_byte() {
        let one = framed(0, b"\x0a\x01a");
        assert_eq!(call("identity", &one), text("a"));
        let two = [&one[..], &one].concat();
        for broken in [&b""[..], &one[..4], &one[..one.len() - 1], &two, &framed(2, b"\x0a\x01a"), b"\0\x06\x40\0\0a"] {
            assert!(call("identity", broken).is_err(), "{broken:x?}");
        }
    }

    #[test]
    fn a_message_in_an_unknown_coding_has_no_key() {
        assert_eq!(call("zstd", &framed(1, b"?")), Ok(None));
        assert_eq!(call("gzip", &framed(0, b"\x0a\x01a")), text("a"), "the flag says that it is not");
    }

    #[cfg(feature = "gzip")]
    #[test]
    fn a_compressed_message_is_read_up_to_the_limit() {
        use std::io::Write as _;

        let gzip = |message: &[u8]| {
            let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
            encoder.write_all(message).unwrap();
            framed(1, &encoder.finish().unwrap())
        };
        assert_eq!(call("gzip", &gzip(b"\x0a\x01a")), text("a"));
        let fits = gzip(&[b"\x0a\x01a\x12\xe2\x07", &[0; LIMIT - 6][..]].concat());
        assert_eq!(call("gzip", &fits), text("a"));
        let bomb = gzip(&[b"\x0a\x01a\x12\xe3\x07", &[0; LIMIT - 5][..]].concat());
        assert_eq!(call("gzip", &bomb), Err(Malformed::TOO_LARGE));
        assert!(call("gzip", &framed(1, b"\x0a\x01a")).is_err());
    }
}
