//! The digest of a payload: does a request that brings a known key ask for the same thing?

use std::fmt;

use http::request;

use crate::digest::Digest;

/// A digest of what a request asks for. It is kept beside the key and compared with that of each duplicate.
#[derive(Clone, Copy, Eq, PartialEq)]
pub struct Fingerprint([u8; Self::LEN]);

/// What of a request goes into its [`Fingerprint`].
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[non_exhaustive]
pub enum Payload {
    /// Nothing: whatever brings the key is a duplicate. The webhook default, since senders resend an event with another
    /// attempt counter, timestamp or signature.
    Ignored,
    /// Method, path, query and raw body. The query is sorted by name, since clients build it from maps. The api default.
    Whole,
}

impl Fingerprint {
    /// How long it is, in bytes.
    pub const LEN: usize = 16;

    /// A fingerprint from its bytes, as a store has kept them.
    #[must_use]
    pub const fn from_bytes(bytes: [u8; Self::LEN]) -> Self {
        Self(bytes)
    }

    /// Its bytes, as a store keeps them.
    #[must_use]
    pub const fn as_bytes(&self) -> &[u8; Self::LEN] {
        &self.0
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Fingerprint(…)")
    }
}

impl Payload {
    pub(crate) fn fingerprint(self, head: &request::Parts, body: &[u8]) -> Option<Fingerprint> {
        match self {
            Self::Ignored => None,
            Self::Whole => {
                let mut digest = Digest::new("tower-idempotency fingerprint 1");
                digest.part(b'm', head.method.as_str().as_bytes());
                digest.part(b'p', head.uri.path().as_bytes());
                for pair in sorted_query(head.uri.query().unwrap_or_default()) {
                    digest.part(b'q', pair.as_bytes());
                }
                digest.part(b'b', body);
                Some(Fingerprint(digest.finish()))
            }
        }
    }
}

/// The pairs sorted by name; pairs of one name keep their order, which may mean something.
fn sorted_query(query: &str) -> Vec<&str> {
    let name = |pair: &&str| pair.split_once('=').map_or(pair.len(), |(name, _)| name.len());
    let mut pairs: Vec<&str> = query.split('&').filter(|pair| !pair.is_empty()).collect();
    pairs.sort_by(|a, b| a[..name(a)].cmp(&b[..name(b)]));
    pairs
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fingerprint(uri: &str, body: &[u8]) -> Option<Fingerprint> {
        let (head, ()) = http::Request::post(uri).body(()).unwrap().into_parts();
        Payload::Whole.fingerprint(&head, body)
    }

    #[test]
    fn the_order_of_query_names_does_not_matter_and_that_of_values_does() {
        assert_eq!(fingerprint("/a?a=1&b=2", b""), fingerprint("/a?b=2&a=1", b""));
        assert_eq!(fingerprint("/a?", b""), fingerprint("/a", b""));
        assert_ne!(fingerprint("/a?a=1&a=2", b""), fingerprint("/a?a=2&a=1", b""));
        assert_ne!(fingerprint("/a?a=1", b""), fingerprint("/a?a=2", b""));
    }

    #[test]
    fn parts_do_not_run_into_each_other() {
        assert_ne!(fingerprint("/12", b"3"), fingerprint("/123", b""));
        assert_ne!(fingerprint("/a?b", b""), fingerprint("/a", b"b"));
    }

    #[test]
    fn nothing_is_compared_where_the_payload_is_ignored() {
        let (head, ()) = http::Request::new(()).into_parts();
        assert_eq!(Payload::Ignored.fingerprint(&head, b"x"), None);
    }
}
