//! The digest of a payload: does a request that brings a known key ask for the same thing?
//!
//! ```
//! use tower_idempotency::{IdempotencyLayer, Ledger, MemoryStore, caller, fingerprint};
//!
//! let ledger = Ledger::new(MemoryStore::new());
//! // The same order, however it is spelled, and whenever the client says that it sent it.
//! let payload = fingerprint::json().except(&["$.sent_at"]);
//! let orders = IdempotencyLayer::api(&ledger, caller::authorization()).fingerprint(payload);
//! # let _ = orders;
//! ```
//!
//! A record that was made with a fingerprint and a request without one, or the reverse, do not match: that a layer's
//! settings have changed in between is never taken for agreement.

use std::fmt;

use http::request;

use crate::canonical::Node;
use crate::digest::Digest;
use crate::key::Json;

/// A digest of what a request asks for. It is kept beside the key and compared with that of each duplicate.
#[derive(Clone, Copy)]
pub struct Fingerprint([u8; Self::LEN]);

/// What of a request goes into its [`Fingerprint`]. See the [module docs](self).
#[derive(Clone, Debug)]
pub struct Payload(Option<Compared>);

#[derive(Clone, Debug)]
struct Compared {
    query: bool,
    body: Comparison,
}

/// How bodies are compared.
#[derive(Clone, Debug)]
enum Comparison {
    /// As JSON: all of it or only some members, less some others.
    Json {
        only: Option<Vec<Member>>,
        except: Vec<Member>,
    },
    Raw,
}

#[derive(Clone, Debug)]
struct Member {
    text: String,
    path: Json,
}

/// How large a body may be to be compared as JSON. The tree of one may be many times as large.
const MAX_TREE: usize = 256 << 10;

/// Nothing: whatever brings the key is a duplicate. The webhook default, since senders resend an event with another
/// attempt counter, timestamp or signature.
#[must_use]
pub const fn ignored() -> Payload {
    Payload(None)
}

/// Method, path, query and raw body. The query is sorted by name, since clients build it from maps. The api default.
#[must_use]
pub const fn whole() -> Payload {
    Payload(Some(Compared { query: true, body: Comparison::Raw }))
}

/// As [`whole`], but a JSON body is compared by what it says: neither white space nor the order of members counts. The
/// order of an array does.
///
/// Numbers are compared by their value, to the last digit, and of a repeated member the last counts. A body that is no
/// JSON, larger than 256 KiB, or nested deeper than 32 levels, is compared raw.
#[must_use]
pub const fn json() -> Payload {
    Payload(Some(Compared { query: true, body: Comparison::Json { only: None, except: Vec::new() } }))
}

/// Method, path and query, and of a JSON body only these members, compared as by [`json`]. A body that is no JSON, too large
/// or too deep for that is compared raw.
///
/// # Panics
///
/// If one of `paths` is not a singular query of RFC 9535, as for [`key::json`](crate::key::json).
#[must_use]
pub fn members(paths: &[&str]) -> Payload {
    let only = Some(parsed(paths));
    Payload(Some(Compared { query: true, body: Comparison::Json { only, except: Vec::new() } }))
}

#[allow(clippy::expect_used, reason = "as documented: a programmer's mistake, found at start")]
fn parsed(paths: &[&str]) -> Vec<Member> {
    let parse =
        |text: &&str| Member { text: (*text).to_owned(), path: Json::parse(text).expect("not a singular JSON path") };
    paths.iter().map(parse).collect()
}

// === impl Fingerprint ===

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

impl PartialEq for Fingerprint {
    /// In constant time: how long it takes tells a stranger nothing about the payload that came first.
    fn eq(&self, other: &Self) -> bool {
        constant_time_eq::constant_time_eq_16(&self.0, &other.0)
    }
}

impl Eq for Fingerprint {}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Fingerprint(…)")
    }
}

// === impl Payload ===

impl Payload {
    /// Leaves out these members of a JSON body, such as a timestamp or a counter of attempts; what is compared [whole] is then
    /// compared as by [`json`]. An item of an array leaves its place. Where nothing is compared, this changes nothing.
    ///
    /// # Panics
    ///
    /// If one of `paths` is not a singular query of RFC 9535, as for [`key::json`](crate::key::json).
    #[must_use]
    pub fn except(mut self, paths: &[&str]) -> Self {
        let paths = parsed(paths);
        match &mut self.0 {
            None => {}
            Some(Compared { body: Comparison::Json { except, .. }, .. }) => except.extend(paths),
            Some(Compared { body, .. }) => *body = Comparison::Json { only: None, except: paths },
        }
        self
    }

    /// Leaves out the query.
    #[must_use]
    pub fn without_query(mut self) -> Self {
        if let Some(compared) = &mut self.0 {
            compared.query = false;
        }
        self
    }

    pub(crate) const fn is_ignored(&self) -> bool {
        self.0.is_none()
    }

    pub(crate) fn fingerprint(&self, head: &request::Parts, body: &[u8]) -> Option<Fingerprint> {
        let Compared { query, body: comparison } = self.0.as_ref()?;
        let mut digest = Digest::new("fingerprint 1");
        digest.part(b'm', head.method.as_str().as_bytes());
        digest.part(b'p', head.uri.path().as_bytes());
        let query = head.uri.query().filter(|_| *query).unwrap_or_default();
        for pair in sorted_query(query) {
            digest.part(b'q', pair.as_bytes());
        }
        comparison.digest(body, &mut digest);
        Some(Fingerprint(digest.finish()))
    }
}

// === impl Comparison ===

impl Comparison {
    fn digest(&self, body: &[u8], digest: &mut Digest) {
        let tree = match self {
            Self::Json { only, except } if body.len() <= MAX_TREE => Node::parse(body).map(|tree| (only, except, tree)),
            Self::Json { .. } | Self::Raw => None,
        };
        let Some((only, except, mut tree)) = tree else { return digest.part(b'b', body) };
        except.iter().for_each(|member| member.path.remove_from(&mut tree));
        let spelled = |node: &Node<'_>| {
            let mut text = String::new();
            node.write(&mut text);
            text
        };
        let Some(members) = only else { return digest.part(b'j', spelled(&tree).as_bytes()) };
        for Member { text, path } in members {
            digest.part(b'P', text.as_bytes());
            match path.find_in(&tree) {
                Some(member) => digest.part(b'v', spelled(member).as_bytes()),
                None => digest.part(b'-', &[]),
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

    fn by(payload: &Payload, uri: &str, body: &[u8]) -> Option<Fingerprint> {
        let (head, ()) = http::Request::post(uri).body(()).unwrap().into_parts();
        payload.fingerprint(&head, body)
    }

    fn fingerprint(uri: &str, body: &[u8]) -> Option<Fingerprint> {
        by(&whole(), uri, body)
    }

    #[test]
    fn the_order_of_query_names_does_not_matter_and_that_of_values_does() {
        assert_eq!(fingerprint("/a?a=1&b=2", b""), fingerprint("/a?b=2&a=1", b""));
        assert_eq!(fingerprint("/a?", b""), fingerprint("/a", b""));
        assert_ne!(fingerprint("/a?a=1&a=2", b""), fingerprint("/a?a=2&a=1", b""));
        assert_ne!(fingerprint("/a?a=1", b""), fingerprint("/a?a=2", b""));
        assert_eq!(by(&whole().without_query(), "/a?a=1", b"x"), by(&whole().without_query(), "/a?a=2", b"x"));
    }

    #[test]
    fn parts_do_not_run_into_each_other() {
        assert_ne!(fingerprint("/12", b"3"), fingerprint("/123", b""));
        assert_ne!(fingerprint("/a?b", b""), fingerprint("/a", b"b"));
    }

    #[test]
    fn nothing_is_compared_where_the_payload_is_ignored() {
        assert_eq!(by(&ignored(), "/", b"x"), None);
    }

    #[test]
    fn json_is_compared_by_what_it_says() {
        let json = json();
        let is_same = |a: &[u8], b: &[u8]| by(&json, "/", a) == by(&json, "/", b);
        assert!(is_same(br#"{"a":1,"b":{"c":2,"d":3}}"#, b" {\"b\": {\"d\":3, \"c\":2},\n\"a\":1}"));
        assert!(is_same(br#"{"a":"\u0041"}"#, br#"{"a":"A"}"#));
        assert!(is_same(br#"{"a":1.10}"#, br#"{"a":11E-1}"#));
        for (a, b) in [
            (r#"{"i":[1,2]}"#, r#"{"i":[2,1]}"#),
            (r#"{"a":1}"#, r#"{"a":"1"}"#),
            (r#"{"a":9007199254740993}"#, r#"{"a":9007199254740992}"#),
            (r#"{"wei":100000000000000000001}"#, r#"{"wei":100000000000000000002}"#),
            (r#"{"a":1}"#, r#"{"$serde_json::private::RawValue":"{\"a\":1}"}"#),
            (r#"{"a":null}"#, "{}"),
            (r#"{"a":{"b":1}}"#, r#"{"a":1,"b":1}"#),
            ("not json", "not  json"),
            ("", "null"),
        ] {
            assert!(!is_same(a.as_bytes(), b.as_bytes()), "{a} is {b}");
        }
        let deep = |inner: &str| format!("{}{inner}{}", "[".repeat(200), "]".repeat(200)).into_bytes();
        assert!(is_same(&deep("1"), &deep("1")) && !is_same(&deep("1"), &deep(" 1")), "too deep: compared raw");
    }

    #[test]
    fn members_are_selected_and_left_out() {
        let selected = members(&["$.amount", "$.items[0]"]);
        let is_same =
            |payload: &Payload, a: &str, b: &str| by(payload, "/", a.as_bytes()) == by(payload, "/", b.as_bytes());
        assert!(is_same(&selected, r#"{"amount":1,"note":"a"}"#, r#"{"note":"b", "amount":1}"#));
        assert!(!is_same(&selected, r#"{"amount":1}"#, r#"{"amount":2}"#));
        assert!(!is_same(&selected, r#"{"amount":null}"#, "{}"));
        assert!(!is_same(&selected, r#"{"amount":1,"items":[{"a":1}]}"#, r#"{"amount":1,"items":[{"a":2}]}"#));

        let without = whole().except(&["$.sent_at", "$.tries[-1]"]);
        assert!(is_same(&without, r#"{"a":1,"sent_at":1}"#, r#"{"a":1}"#));
        assert!(is_same(&without, r#"{"tries":[1,2]}"#, r#"{"tries":[1,3]}"#));
        assert!(!is_same(&without, r#"{"a":1,"sent_at":1}"#, r#"{"a":2,"sent_at":1}"#));
        assert!(is_same(&selected.except(&["$.amount"]), r#"{"amount":1}"#, r#"{"amount":2}"#));

        let two = json().except(&["$.items[0]", "$.items[1]"]);
        assert!(
            is_same(&two, r#"{"items":[1,2,100]}"#, r#"{"items":[3,4,100]}"#),
            "none moves into the place of another"
        );
        assert!(!is_same(&two, r#"{"items":[1,2,100]}"#, r#"{"items":[1,2,999]}"#));
        let inner = members(&["$.order"]).except(&["$.order.sent_at"]);
        assert!(is_same(&inner, r#"{"order":{"a":1,"sent_at":1}}"#, r#"{"order":{"a":1,"sent_at":2}}"#));
        let (a, b) = (members(&["$.a"]), members(&["$.b"]));
        assert_ne!(
            by(&a, "/", br#"{"a":1,"b":1}"#),
            by(&b, "/", br#"{"a":1,"b":1}"#),
            "a changed setting is no agreement"
        );
        assert_eq!(by(&ignored().except(&["$.a"]), "/", b"{}"), None);
    }

    #[test]
    fn what_would_be_a_forest_is_compared_raw() {
        let large = |space: &str| format!("[{}{space}1]", "1,".repeat(MAX_TREE / 2)).into_bytes();
        assert_ne!(by(&json(), "/", &large("")), by(&json(), "/", &large(" ")));
    }
}
