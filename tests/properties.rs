//! What holds for every key: two requests share one exactly when their scope and their parts are equal.

#![allow(clippy::expect_used, clippy::unwrap_used, reason = "a test panics where it fails")]

use bytes::Bytes;
use http::{HeaderValue, Method, Request, request};
use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;
use proptest::sample::{Index, select};
use proptest::test_runner::Config;
use tower_idempotency::key::{HeaderSyntax, Key, KeySource, form, from_fn, header, json, query};
use tower_idempotency::{IdempotencyLayer, Ledger, MemoryStore, caller};

/// What a key is unique within.
#[derive(Clone, Debug, Eq, PartialEq)]
struct Scope {
    method: &'static str,
    path: String,
    contract: Contract,
    secret: Option<&'static str>,
    /// No function, one that knows nothing, and one that knows something.
    added: Option<Option<Vec<u8>>>,
}

#[derive(Clone, Debug, Eq, PartialEq)]
enum Contract {
    Webhook,
    ApiOfAll,
    ApiByFn(Option<Vec<u8>>),
    ApiByHeader(Vec<String>),
}

/// A part of a key, as a composite has it.
#[derive(Clone, Debug, Eq, PartialEq)]
enum Part {
    Absent,
    Bool(bool),
    Group(Vec<Self>),
    Number(&'static str),
    Text(String),
}

/// Where in a request a text stands; that makes no difference to the key.
#[derive(Clone, Copy, Debug)]
enum Place {
    Function,
    Header,
    Json,
    Query,
}

/// A request and the source that finds its parts, in the making.
struct Making<'a> {
    places: std::iter::Cycle<std::slice::Iter<'a, Place>>,
    request: request::Builder,
    members: Vec<String>,
    query: Vec<String>,
}

fn config(cases: u32) -> Config {
    Config { cases, failure_persistence: None, ..Config::default() }
}

/// Texts that meet each other, and what a digest has between its parts.
fn text() -> impl Strategy<Value = String> {
    prop_oneof![
        4 => "[at]{1,3}",
        1 => select(vec!["0", "1", "1.0", "true", "false"]).prop_map(str::to_owned),
        1 => select(vec!["t", "tt\u{1}\0\0\0\0\0\0\0a", "\u{1}", "\0", "-", ", ", "\"a\"", "é"]).prop_map(str::to_owned),
    ]
}

fn bytes() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![3 => vec(select(b"ab".to_vec()), 0..3), 1 => vec(any::<u8>(), 0..3)]
}

fn scope() -> impl Strategy<Value = Scope> {
    let contract = prop_oneof![
        Just(Contract::Webhook),
        Just(Contract::ApiOfAll),
        option::of(bytes()).prop_map(Contract::ApiByFn),
        vec("[ab]{0,2}", 0..3).prop_map(Contract::ApiByHeader),
    ];
    let secret = option::of(select(vec!["0123456789abcdef", "0123456789abcdef\0"]));
    (select(vec!["POST", "PATCH", "PUT"]), "/[ab/]{0,3}", contract, secret, option::of(option::of(bytes())))
        .prop_map(|(method, path, contract, secret, added)| Scope { method, path, contract, secret, added })
}

/// The parts of a key. The first of a composite is there, and a composite has at least two.
fn parts() -> impl Strategy<Value = Vec<Part>> {
    let there = prop_oneof![
        4 => text().prop_map(Part::Text),
        2 => select(vec!["0", "1", "1.0", "10", "-0"]).prop_map(Part::Number),
        1 => any::<bool>().prop_map(Part::Bool),
    ];
    let there = there.prop_recursive(2, 8, 3, |inner| {
        let rest = prop_oneof![3 => inner.clone(), 1 => Just(Part::Absent)];
        (inner, vec(rest, 1..3)).prop_map(|(first, rest)| Part::Group([vec![first], rest].concat()))
    });
    let rest = prop_oneof![3 => there.clone(), 1 => Just(Part::Absent)];
    (there, vec(rest, 0..3)).prop_map(|(first, rest)| canonical([vec![first], rest].concat()))
}

fn places() -> impl Strategy<Value = Vec<Place>> {
    vec(select(vec![Place::Function, Place::Header, Place::Json, Place::Query]), 1..6)
}

/// A step from one key to another that must not be the same.
#[derive(Clone, Copy, Debug)]
enum Edit {
    Another,
    Flatten,
    Group,
    /// With the tag of a text between the two, as it stands in the digest.
    Merge,
    MoveAcross,
    None,
    OneAbsent,
    Retype,
    /// What follows a group goes into it.
    Swallow,
}

impl Edit {
    /// The parts after this step; they may be the same, where there is nothing to take it with.
    fn of(self, parts: &[Part], another: Vec<Part>, at: Index) -> Vec<Part> {
        let mut parts = parts.to_vec();
        let at = at.index(parts.len());
        let next = (at + 1 < parts.len()).then_some(at + 1);
        match (self, &parts[at], next.map(|next| &parts[next])) {
            (Self::Another, _, _) => return another,
            (Self::Flatten, Part::Group(inner), _) => {
                parts.splice(at..=at, inner.clone());
            }
            (Self::Group, first, Some(second)) if *first != Part::Absent => {
                parts.splice(at..=at + 1, [Part::Group(vec![first.clone(), second.clone()])]);
            }
            (Self::Merge, Part::Text(left), Some(Part::Text(right))) => {
                let merged = Part::Text(format!("{left}t{right}"));
                parts.splice(at..=at + 1, [merged]);
            }
            (Self::MoveAcross, Part::Text(left), Some(Part::Text(right))) if left.chars().nth(1).is_some() => {
                let mut left = left.clone();
                let right = left.pop().into_iter().chain(right.chars()).collect();
                parts.splice(at..=at + 1, [Part::Text(left), Part::Text(right)]);
            }
            (Self::OneAbsent, Part::Absent, _) => drop(parts.remove(at)),
            (Self::OneAbsent, _, _) => parts.insert(at + 1, Part::Absent),
            (Self::Retype, Part::Number(text), _) => parts[at] = Part::Text((*text).to_owned()),
            (Self::Retype, Part::Bool(value), _) => parts[at] = Part::Text(value.to_string()),
            (Self::Swallow, Part::Group(inner), Some(second)) => {
                let inner = [inner.clone(), vec![second.clone()]].concat();
                parts.splice(at..=at + 1, [Part::Group(inner)]);
            }
            _ => {}
        }
        canonical(parts)
    }
}

/// A composite of nothing but a composite is that composite.
fn canonical(mut parts: Vec<Part>) -> Vec<Part> {
    while let [Part::Group(inner)] = &parts[..] {
        parts = inner.clone();
    }
    parts
}

fn two_keys() -> impl Strategy<Value = (Vec<Part>, Vec<Part>)> {
    use Edit::{Another, Flatten, Group, Merge, MoveAcross, None, OneAbsent, Retype, Swallow};
    let edit = select(vec![Another, Flatten, Group, Merge, MoveAcross, None, OneAbsent, Retype, Swallow]);
    (parts(), parts(), edit, any::<Index>()).prop_map(|(a, another, edit, at)| {
        let b = edit.of(&a, another, at);
        (a, b)
    })
}

/// The same but for one aspect, most of the time.
fn two_scopes() -> impl Strategy<Value = (Scope, Scope)> {
    (scope(), scope(), 0..9_u8).prop_map(|(a, other, aspect)| {
        let mut b = a.clone();
        match aspect {
            0 => b.method = other.method,
            1 => b.path = other.path,
            2 => b.contract = other.contract,
            3 => b.added = other.added,
            4 => b.secret = other.secret,
            5 => b = other,
            _ => {}
        }
        (a, b)
    })
}

fn percent(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("%{byte:02x}")).collect()
}

impl Making<'_> {
    fn member(&mut self, json_text: String) -> KeySource {
        self.members.push(json_text);
        json(&format!("$[{}]", self.members.len() - 1))
    }

    fn text(&mut self, text: &str) -> KeySource {
        let number = self.members.len() + self.query.len() + self.request.headers_ref().unwrap().len();
        match (self.places.next().unwrap(), HeaderValue::from_str(text)) {
            (Place::Function, _) => {
                let text = Bytes::from(text.to_owned());
                from_fn(move |_, _| Some(text.clone()))
            }
            (Place::Header, Ok(value)) => {
                let name = format!("x-{number}");
                self.request.headers_mut().unwrap().insert(http::HeaderName::try_from(&name).unwrap(), value);
                header(&name)
            }
            (Place::Json, _) => self.member(serde_json::to_string(text).unwrap()),
            (Place::Header | Place::Query, _) => {
                self.query.push(format!("q{number}={}", percent(text.as_bytes())));
                query(&format!("q{number}"))
            }
        }
    }

    /// `None` where it is absent.
    fn part(&mut self, part: &Part) -> Option<KeySource> {
        match part {
            Part::Absent => None,
            Part::Bool(value) => Some(self.member(value.to_string())),
            // An alternative keeps a composite together that would else be gone on with.
            Part::Group(parts) => Some(self.composite(parts).or(header("x-none"))),
            Part::Number(text) => Some(self.member((*text).to_owned())),
            Part::Text(text) => Some(self.text(text)),
        }
    }

    fn composite(&mut self, parts: &[Part]) -> KeySource {
        let first = self.part(&parts[0]).unwrap();
        parts[1..].iter().fold(first, |source, part| match self.part(part) {
            Some(part) => source.and(part),
            None => source.and_optional(json("$.none")),
        })
    }
}

/// The stored key of a request with these parts, in these places.
fn key(scope: &Scope, parts: &[Part], places: &[Place]) -> Key {
    let request = Request::builder().method(scope.method);
    let mut making = Making { places: places.iter().cycle(), request, members: Vec::new(), query: Vec::new() };
    let source = making.composite(parts);
    let ledger = Ledger::new(MemoryStore::new());
    let layer = match &scope.contract {
        Contract::Webhook => IdempotencyLayer::webhook(&ledger, source),
        Contract::ApiOfAll => IdempotencyLayer::api(&ledger, caller::shared()).key(source),
        Contract::ApiByFn(name) => {
            let name = name.clone();
            IdempotencyLayer::api(&ledger, caller::from_fn(move |_| name.clone())).key(source)
        }
        Contract::ApiByHeader(values) => {
            let headers = making.request.headers_mut().unwrap();
            for value in values {
                headers.append("x-caller", value.parse().unwrap());
            }
            IdempotencyLayer::api(&ledger, caller::header("x-caller")).key(source)
        }
    };
    let layer = match scope.added.clone() {
        None => layer,
        Some(added) => layer.scope(move |_| added.clone()),
    };
    let layer = match scope.secret {
        None => layer,
        Some(secret) => layer.secret(secret),
    };
    let uri = format!("{}?{}", scope.path, making.query.join("&"));
    let (head, ()) = making.request.uri(uri).body(()).unwrap().into_parts();
    let body = format!("[{}]", making.members.join(","));
    let layer =
        layer.header_syntax(HeaderSyntax::Opaque { max_len: 1024 }).methods([Method::POST, Method::PATCH, Method::PUT]);
    layer.key_of(&head, &body.into()).expect("no part is missing")
}

/// The stored key by one source, and the body as it is.
fn key_by(source: KeySource, uri: &str, body: &[u8]) -> Option<Key> {
    let layer = IdempotencyLayer::webhook(&Ledger::new(MemoryStore::new()), source);
    let (head, ()) = Request::post(uri).body(()).unwrap().into_parts();
    layer.key_of(&head, &Bytes::copy_from_slice(body))
}

proptest! {
    #![proptest_config(config(4000))]

    #[test]
    fn a_key_is_shared_exactly_where_scope_and_parts_are_equal(
        scopes in two_scopes(),
        parts in two_keys(),
        places in (places(), places()),
    ) {
        let a = key(&scopes.0, &parts.0, &places.0);
        let b = key(&scopes.1, &parts.1, &places.1);
        prop_assert_eq!(a == b, scopes.0 == scopes.1 && parts.0 == parts.1);
    }

    #[test]
    fn a_composite_without_one_of_its_parts_is_missing(
        parts in vec(text(), 2..5),
        without in any::<Index>(),
        nothing in select(vec!["null", "\"\"", ""]),
    ) {
        let without = without.index(parts.len());
        let member = |(at, text): (usize, &String)| match (at == without, nothing) {
            (true, "") => None,
            (true, nothing) => Some(format!("\"m{at}\":{nothing}")),
            (false, _) => Some(format!("\"m{at}\":{}", serde_json::to_string(text).unwrap())),
        };
        let body = format!("{{{}}}", parts.iter().enumerate().filter_map(member).collect::<Vec<_>>().join(","));
        let all = (1..parts.len()).fold(json("$.m0"), |all, at| all.and(json(&format!("$.m{at}"))));
        prop_assert_eq!(key_by(all, "/", body.as_bytes()), None);
    }

    #[test]
    fn bytes_in_a_query_and_in_a_form_are_the_key_however_they_are_escaped(
        value in vec(any::<u8>(), 1..6),
        change in option::of((any::<Index>(), any::<u8>())),
        escapes in (vec(any::<bool>(), 6), vec(any::<bool>(), 6)),
        others in vec("[abx+]{0,3}(=[a-z%]{0,3})?", 0..4),
    ) {
        let escaped = |value: &[u8], escapes: &[bool]| {
            value.iter().zip(escapes).map(|(byte, escape)| match byte {
                b' ' if !escape => "+".to_owned(),
                byte if byte.is_ascii_alphanumeric() && !escape => char::from(*byte).to_string(),
                byte => percent(&[*byte]),
            }).collect::<String>()
        };
        let text = |value, escapes| [&others[..], &[format!("i%64={}", escaped(value, escapes))]].concat().join("&");
        let mut other = value.clone();
        if let Some((at, byte)) = change {
            *at.get_mut(&mut other) = byte;
        }
        let (a, b) = (text(&value, &escapes.0), text(&other, &escapes.1));
        let by_query = key_by(query("id"), &format!("/?{a}"), b"");
        let by_form = key_by(form("id"), "/", b.as_bytes());
        prop_assert!(by_query.is_some() && by_form.is_some());
        prop_assert_eq!(by_query == by_form, value == other);
        let exact = Bytes::from(value);
        prop_assert_eq!(by_query, key_by(from_fn(move |_, _| Some(exact.clone())), "/", b""));
    }

    #[test]
    fn no_body_is_a_panic(
        content_type in select(vec!["multipart/form-data; boundary=b", "application/x-www-form-urlencoded", "text/plain"]),
        pieces in vec(prop_oneof![
            select(vec![
                "--b", "--", "\r\n", "\r\n\r\n", "Content-Disposition: form-data; name=", "id", "\"id\"", "; filename=x",
                "&", "=", "%", "+", "{", "[", "\"", ":", ",", "\\", "\\u", "d800", "0", "-", "e",
            ]).prop_map(|piece| piece.as_bytes().to_vec()),
            vec(any::<u8>(), 0..4),
        ], 0..24),
    ) {
        let ledger = Ledger::new(MemoryStore::new());
        let (head, ()) = Request::post("/").header("content-type", content_type).body(()).unwrap().into_parts();
        for source in [form("id"), json("$.id[-1]"), json("$[0]")] {
            let _ = IdempotencyLayer::webhook(&ledger, source).key_of(&head, &pieces.concat().into());
        }
    }
}
