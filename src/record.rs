//! The kept outcome, and its one versioned codec.
//!
//! A store keeps these bytes and knows nothing of them. All integers are big-endian:
//!
//! ```text
//! version  u8    1
//! flags    u8    1: tombstone, 2: trailers
//! status   u16
//! headers  u16 count, then for each: u16 length, name, u32 length, value; the first bit of the latter: it is sensitive;
//!          or u16 0, u8 which of those that most outcomes have
//! trailers as headers, where flagged
//! body     u32 length, bytes, to the end; none in a tombstone
//! ```
//!
//! The body comes last and is replayed as a slice of what the store returned.

use std::fmt;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use http::StatusCode;
use http::header::{CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue};

use crate::grpc::Code;
use crate::media_type;
use crate::store::{Entry, State};

const VERSION: u8 = 1;

/// How many values of headers, or of trailers, a record may have, and how long each may be.
const MAX_HEADERS: usize = u16::MAX as usize;
const MAX_VALUE: usize = SENSITIVE as usize - 1;

const SENSITIVE: u32 = 1 << 31;

/// Headers that are written by their place in here: to spell one out would be a tenth of what a key takes in Redis. More may
/// follow, but none may change its place.
static COMMON: [(HeaderName, HeaderValue); 4] = [
    (CONTENT_TYPE, HeaderValue::from_static("application/json")),
    (CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8")),
    (CONTENT_TYPE, HeaderValue::from_static("application/grpc")),
    (CONTENT_TYPE, HeaderValue::from_static("application/json; charset=utf-8")),
];

const TOMBSTONE: u8 = 1;
const TRAILERS: u8 = 2;

/// What an attempt answered, as it is replayed.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Record {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    pub(crate) content: Content,
}

#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) enum Content {
    Kept {
        body: Bytes,
        trailers: Option<HeaderMap>,
    },
    /// It ran; the body was too large, or streaming, or the effect had been applied by an earlier attempt.
    Tombstone,
}

/// The bytes are not a record that this version can read.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct UnreadableRecord(&'static str);

// === impl Record ===

impl Record {
    /// What came of the call, where it is one of gRPC.
    pub(crate) fn code(&self) -> Option<Code> {
        match &self.content {
            Content::Tombstone => Code::stated(&self.headers),
            Content::Kept { trailers, .. } if media_type::is_grpc(&self.headers) => {
                let stated = trailers.as_ref().and_then(Code::stated).or_else(|| Code::stated(&self.headers));
                Some(stated.unwrap_or(Code::Unknown))
            }
            Content::Kept { .. } => None,
        }
    }

    /// The record, or where it could not be encoded, that there was one.
    pub(crate) fn fitting(self) -> Self {
        let fits = |headers: &HeaderMap| {
            headers.len() <= MAX_HEADERS && headers.values().all(|value| value.len() <= MAX_VALUE)
        };
        let trailers = match &self.content {
            Content::Kept { trailers, .. } => trailers.as_ref(),
            Content::Tombstone => None,
        };
        match fits(&self.headers) && trailers.is_none_or(fits) {
            true => self,
            false => Self { status: self.status, headers: HeaderMap::new(), content: Content::Tombstone },
        }
    }

    pub(crate) fn encode(&self) -> Bytes {
        let empty = Bytes::new();
        let (body, trailers, tombstone) = match &self.content {
            Content::Kept { body, trailers } => (body, trailers.as_ref(), 0),
            Content::Tombstone => (&empty, None, TOMBSTONE),
        };
        let size = |headers: &HeaderMap| headers.iter().map(|(n, v)| n.as_str().len() + v.len() + 6).sum::<usize>();
        let size = 12 + size(&self.headers) + trailers.map_or(0, size) + body.len();
        let mut out = BytesMut::with_capacity(size);
        out.put_u8(VERSION);
        out.put_u8(tombstone | if trailers.is_some() { TRAILERS } else { 0 });
        out.put_u16(self.status.as_u16());
        put_headers(&mut out, &self.headers);
        if let Some(trailers) = trailers {
            put_headers(&mut out, trailers);
        }
        // `max_kept_body` is below 4 GiB, see its setter.
        out.put_u32(u32::try_from(body.len()).unwrap_or(u32::MAX));
        out.put_slice(body);
        out.freeze()
    }

    pub(crate) fn decode(mut rest: Bytes) -> Result<Self, UnreadableRecord> {
        let cut = UnreadableRecord("it is cut short");
        if rest.try_get_u8() != Ok(VERSION) {
            return Err(UnreadableRecord("its version is unknown"));
        }
        let flags = rest.try_get_u8().map_err(|_| cut)?;
        if flags & !(TOMBSTONE | TRAILERS) != 0 {
            return Err(UnreadableRecord("its flags are unknown"));
        }
        let status = rest.try_get_u16().map_err(|_| cut)?;
        let status = StatusCode::from_u16(status).ok().filter(|status| !status.is_informational());
        let status = status.ok_or(UnreadableRecord("its status is none of a final response"))?;
        let headers = get_headers(&mut rest)?;
        let trailers = if flags & TRAILERS != 0 { Some(get_headers(&mut rest)?) } else { None };
        let length = rest.try_get_u32().map_err(|_| cut)?;
        if rest.len() as u64 != u64::from(length) {
            return Err(UnreadableRecord("its length is off"));
        }
        let content = match flags & TOMBSTONE {
            0 => Content::Kept { body: rest, trailers },
            _ => Content::Tombstone,
        };
        Ok(Self { status, headers, content })
    }
}

/// A record of more or longer headers is never made: see [`Record::fitting`].
fn put_headers(out: &mut BytesMut, headers: &HeaderMap) {
    out.put_u16(u16::try_from(headers.len()).unwrap_or(u16::MAX));
    for (name, value) in headers {
        let is_this = |(common, at): &(HeaderName, HeaderValue)| common == name && at == value && !value.is_sensitive();
        if let Some(place) = COMMON.iter().position(is_this) {
            out.put_u16(0);
            out.put_u8(place as u8);
            continue;
        }
        // An `http::HeaderName` has less than 2¹⁶ bytes.
        out.put_u16(u16::try_from(name.as_str().len()).unwrap_or(u16::MAX));
        out.put_slice(name.as_str().as_bytes());
        let sensitive = if value.is_sensitive() { SENSITIVE } else { 0 };
        out.put_u32(u32::try_from(value.len()).unwrap_or(u32::MAX) | sensitive);
        out.put_slice(value.as_bytes());
    }
}

fn get_headers(rest: &mut Bytes) -> Result<HeaderMap, UnreadableRecord> {
    let cut = UnreadableRecord("it is cut short");
    let count = rest.try_get_u16().map_err(|_| cut)?;
    let mut headers = HeaderMap::new();
    for _ in 0..count {
        let length = rest.try_get_u16().map_err(|_| cut)?;
        let (name, value) = match length {
            0 => {
                let place = rest.try_get_u8().map_err(|_| cut)?;
                COMMON.get(usize::from(place)).cloned().ok_or(UnreadableRecord("a header is none that is known"))?
            }
            _ => get_header(rest, usize::from(length))?,
        };
        headers.try_append(name, value).map_err(|_| UnreadableRecord("it has too many headers"))?;
    }
    Ok(headers)
}

fn get_header(rest: &mut Bytes, name_length: usize) -> Result<(HeaderName, HeaderValue), UnreadableRecord> {
    let name = take(rest, name_length)?;
    let length = rest.try_get_u32().map_err(|_| UnreadableRecord("it is cut short"))?;
    let value = take(rest, (length & !SENSITIVE) as usize)?;
    let name = HeaderName::from_bytes(&name).map_err(|_| UnreadableRecord("a header name is none"))?;
    let mut value = HeaderValue::from_maybe_shared(value).map_err(|_| UnreadableRecord("a header value is none"))?;
    value.set_sensitive(length & SENSITIVE != 0);
    Ok((name, value))
}

fn take(rest: &mut Bytes, length: usize) -> Result<Bytes, UnreadableRecord> {
    if rest.len() < length {
        return Err(UnreadableRecord("it is cut short"));
    }
    Ok(rest.split_to(length))
}

impl Entry {
    /// The status of the outcome that is kept, where there is one that this version can read.
    #[must_use]
    pub fn status(&self) -> Option<StatusCode> {
        Some(self.outcome()?.status)
    }

    /// What came of the call, where the outcome that is kept is one of [gRPC](crate::grpc), whose status is always 200.
    #[must_use]
    pub fn code(&self) -> Option<Code> {
        self.outcome()?.code()
    }

    fn outcome(&self) -> Option<Record> {
        match &self.state {
            State::Done(record) => Record::decode(record.clone()).ok(),
            State::Free | State::Running => None,
        }
    }
}

// === impl UnreadableRecord ===

impl fmt::Display for UnreadableRecord {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a kept outcome cannot be read: {}", self.0)
    }
}

impl std::error::Error for UnreadableRecord {}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(headers: &[(&'static str, &[u8])]) -> HeaderMap {
        let mut map = HeaderMap::new();
        for (name, value) in headers {
            map.append(*name, HeaderValue::from_bytes(value).unwrap());
        }
        map
    }

    fn kept(status: StatusCode, headers: HeaderMap) -> Record {
        let content = Content::Kept { body: Bytes::from_static(b"body"), trailers: Some(trailers()) };
        Record { status, headers, content }
    }

    fn trailers() -> HeaderMap {
        HeaderMap::from_iter([(HeaderName::from_static("grpc-status"), HeaderValue::from_static("0"))])
    }

    #[test]
    fn the_layout_does_not_change() {
        let headers = headers(&[("x-a", b"1"), ("x-a", b"\xff")]);
        let kept = kept(StatusCode::CREATED, headers.clone());
        let golden: &[u8] = b"\x01\x02\x00\xc9\
            \x00\x02\x00\x03x-a\x00\x00\x00\x011\x00\x03x-a\x00\x00\x00\x01\xff\
            \x00\x01\x00\x0bgrpc-status\x00\x00\x00\x010\
            \x00\x00\x00\x04body";
        assert_eq!(kept.encode(), golden);
        assert_eq!(Record::decode(Bytes::from_static(golden)), Ok(kept));

        let tombstone = Record { status: StatusCode::CREATED, headers, content: Content::Tombstone };
        let golden: &[u8] = b"\x01\x01\x00\xc9\
            \x00\x02\x00\x03x-a\x00\x00\x00\x011\x00\x03x-a\x00\x00\x00\x01\xff\
            \x00\x00\x00\x00";
        assert_eq!(tombstone.encode(), golden);
        assert_eq!(Record::decode(Bytes::from_static(golden)), Ok(tombstone));
    }

    #[test]
    fn the_places_of_common_headers_do_not_change() {
        let types: [&[u8]; 4] = [
            b"application/json",
            b"text/plain; charset=utf-8",
            b"application/grpc",
            b"application/json; charset=utf-8",
        ];
        for (place, value) in types.into_iter().enumerate() {
            let mut headers = headers(&[("content-type", value)]);
            let record = |headers| Record { status: StatusCode::CREATED, headers, content: Content::Tombstone };
            let golden =
                Bytes::from([b"\x01\x01\x00\xc9\x00\x01\x00\x00", &[place as u8][..], b"\x00\x00\x00\x00"].concat());
            assert_eq!(record(headers.clone()).encode(), golden);
            assert_eq!(Record::decode(golden.clone()), Ok(record(headers.clone())));
            headers.get_mut("content-type").unwrap().set_sensitive(true);
            assert!(record(headers).encode().len() > golden.len());
        }
        let beyond = Bytes::from_static(b"\x01\x01\x00\xc9\x00\x01\x00\x00\x04\x00\x00\x00\x00");
        assert!(Record::decode(beyond).is_err());
    }

    #[test]
    fn nothing_but_a_whole_record_is_read() {
        let whole = kept(StatusCode::OK, headers(&[("x-a", b"1")])).encode();
        for length in 0..whole.len() {
            assert!(Record::decode(whole.slice(..length)).is_err(), "{length} bytes were read");
        }
        for (at, byte) in [(0, 2), (1, 4), (2, 0), (7, b' ')] {
            let mut changed = whole.to_vec();
            changed[at] = byte;
            changed[3] = if at == 2 { 0 } else { changed[3] };
            let changed = Bytes::from(changed);
            if at != 7 {
                assert!(Record::decode(changed).is_err(), "byte {at} as {byte} was read");
            }
        }
        for status in [0, 99, 100, 101, 199, 1000_u16] {
            let mut changed = whole.to_vec();
            changed[2..4].copy_from_slice(&status.to_be_bytes());
            assert!(Record::decode(changed.into()).is_err(), "status {status} was read");
        }
        let longer = Bytes::from([&whole[..], b"x"].concat());
        assert!(Record::decode(longer).is_err());
        assert!(Record::decode(Bytes::from_static(b"rubbish under the key")).is_err());
    }
}

#[cfg(test)]
mod properties {
    use proptest::collection::vec;
    use proptest::prelude::*;
    use proptest::test_runner::Config;

    use super::*;

    fn headers() -> impl Strategy<Value = HeaderMap> {
        let name = "[a-c!#$%&'*+.^_`|~-]{1,2}".prop_map(|name| HeaderName::from_bytes(name.as_bytes()).unwrap());
        let byte = prop_oneof![Just(b'\t'), b' '..=b'~', 0x80..=0xff_u8];
        let value = vec(byte, 0..12).prop_map(|value| HeaderValue::from_bytes(&value).unwrap());
        let common = (0..COMMON.len()).prop_map(|place| COMMON[place].clone());
        vec(prop_oneof![4 => (name, value), 1 => common], 0..8).prop_map(HeaderMap::from_iter)
    }

    fn record() -> impl Strategy<Value = Record> {
        let body = vec(any::<u8>(), 0..40).prop_map(Bytes::from);
        let kept = (body, proptest::option::of(headers()));
        let kept = kept.prop_map(|(body, trailers)| Content::Kept { body, trailers });
        let content = prop_oneof![3 => kept, 1 => Just(Content::Tombstone)];
        let status = (200..=999_u16).prop_map(|status| StatusCode::from_u16(status).unwrap());
        (status, headers(), content).prop_map(|(status, headers, content)| Record { status, headers, content })
    }

    /// Reads what may be no record, and whatever it is read as is read again as the same.
    fn read(bytes: &Bytes) {
        if let Ok(record) = Record::decode(bytes.clone()) {
            assert_eq!(Record::decode(record.encode()), Ok(record));
        }
    }

    proptest! {
        #![proptest_config(Config { cases: 2000, failure_persistence: None, ..Config::default() })]

        #[test]
        fn what_is_written_is_read(record in record()) {
            prop_assert_eq!(Record::decode(record.encode()), Ok(record));
        }

        #[test]
        fn nothing_that_is_read_is_a_panic(
            record in record(),
            changes in vec((any::<proptest::sample::Index>(), any::<u8>()), 0..4),
            cut in any::<proptest::sample::Index>(),
            rubbish in vec(any::<u8>(), 0..60),
        ) {
            let mut changed = record.encode().to_vec();
            for (at, byte) in changes {
                *at.get_mut(&mut changed) = byte;
            }
            read(&Bytes::from(changed.clone()));
            changed.truncate(cut.index(changed.len() + 1));
            read(&[&changed[..], &rubbish].concat().into());
            read(&rubbish.into());
        }
    }
}
