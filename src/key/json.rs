//! A key in the JSON body.
//!
//! One pass over the bytes finds every wanted path and builds no tree. It recurses along the wanted paths alone, so
//! that neither the depth nor the width of what a stranger sends decides how much stack or memory is used.

use std::collections::VecDeque;
use std::fmt;
use std::str::FromStr;

use bytes::Bytes;
use serde::Deserialize;
use serde::de::{DeserializeSeed, Deserializer, Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::value::RawValue;

use super::path::{self, InvalidPath, Segment};
use super::{Found, Malformed, Part};
use crate::canonical::Node;

/// A path into a JSON body: a singular query of RFC 9535, with at most 64 segments.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Json {
    segments: Vec<Segment>,
}

impl Json {
    /// Parses a path that comes from configuration.
    ///
    /// ```
    /// use tower_idempotency::key::{self, Json, KeySource};
    ///
    /// fn configured(path: &str) -> Result<KeySource, String> {
    ///     let id = Json::parse(path).map_err(|error| format!("EVENT_ID={path}: {error}"))?;
    ///     Ok(key::header("X-Event-Id").or(id))
    /// }
    /// # assert!(configured("$.data.id").is_ok());
    /// # assert_eq!(configured("$.*").unwrap_err().split(": ").next(), Some("EVENT_ID=$.*"));
    /// ```
    ///
    /// # Errors
    ///
    /// If `path` is not a singular query, or is deeper than 64 segments.
    pub fn parse(path: &str) -> Result<Self, InvalidPath> {
        path::parse(path).map(|segments| Self { segments })
    }

    /// The node it selects.
    pub(crate) fn find_in<'v, 'b>(&self, node: &'v Node<'b>) -> Option<&'v Node<'b>> {
        self.segments.iter().try_fold(node, |node, segment| match (node, segment) {
            (Node::Object(members), Segment::Name(name)) => members.get(&**name),
            (Node::Array(items), Segment::Index(index)) => items.get(position(*index, items.len())?),
            _ => None,
        })
    }

    /// Takes away the node it selects, where there is one. An item of an array leaves its place, or others would move.
    pub(crate) fn remove_from(&self, node: &mut Node<'_>) {
        let Some((last, way)) = self.segments.split_last() else { return *node = Node::null() };
        let parent = way.iter().try_fold(node, |node, segment| match (node, segment) {
            (Node::Object(members), Segment::Name(name)) => members.get_mut(&**name),
            (Node::Array(items), Segment::Index(index)) => {
                let position = position(*index, items.len())?;
                items.get_mut(position)
            }
            _ => None,
        });
        match (parent, last) {
            (Some(Node::Object(members)), Segment::Name(name)) => {
                members.remove(&**name);
            }
            (Some(Node::Array(items)), Segment::Index(index)) => {
                if let Some(item) = position(*index, items.len()).and_then(|position| items.get_mut(position)) {
                    *item = Node::null();
                }
            }
            _ => {}
        }
    }
}

/// Where in an array of that length an index points, which may count from the end.
fn position(index: i64, length: usize) -> Option<usize> {
    let magnitude = usize::try_from(index.unsigned_abs()).ok()?;
    if index < 0 { length.checked_sub(magnitude) } else { Some(magnitude) }
}

impl FromStr for Json {
    type Err = InvalidPath;

    fn from_str(path: &str) -> Result<Self, InvalidPath> {
        Self::parse(path)
    }
}

/// What each of `paths` selects in `body`, in their order; `None` where it is missing. What one of them selects says nothing
/// about the others.
///
/// An empty body has no members; in a body that is not JSON, to its last byte, all are malformed.
pub(super) fn select(body: &[u8], paths: &[Json]) -> Vec<Found> {
    if body.is_empty() {
        return vec![Ok(None); paths.len()];
    }
    let found = match str::from_utf8(body) {
        // Checked here once, and not for each name.
        Ok(text) => read_through(|| serde_json::Deserializer::from_str(text), paths),
        // A text that is not looked into may be in any encoding.
        Err(_) => read_through(|| serde_json::Deserializer::from_slice(body), paths),
    };
    found.unwrap_or_else(|_| vec![Err(Malformed("the body is not JSON")); paths.len()])
}

/// Once over the body, or twice where there is a number in it that no double can hold.
fn read_through<'b, R: serde_json::de::Read<'b>>(
    read: impl Fn() -> serde_json::Deserializer<R>,
    paths: &[Json],
) -> Result<Vec<Found>, serde_json::Error> {
    let pass = |careful| {
        let mut found = vec![Ok(None); paths.len()];
        let wanted = paths.iter().enumerate().map(|(slot, path)| Wanted { slot, rest: &path.segments }).collect();
        let mut deserializer = read();
        let select = Select { wanted, found: &mut found, careful };
        select.deserialize(&mut deserializer).and_then(|()| deserializer.end()).map(|()| found)
    };
    pass(false).or_else(|_| pass(true))
}

#[derive(Clone, Copy)]
struct Wanted<'p> {
    slot: usize,
    rest: &'p [Segment],
}

/// Looks for what is wanted inside one value.
struct Select<'p, 'f> {
    wanted: Vec<Wanted<'p>>,
    found: &'f mut [Found],
    /// Looks first whether a value can have anything inside: a number that no double can hold is an error to who reads it.
    careful: bool,
}

/// Reads a member's name and says which of the wanted ones it is.
struct Name<'w, 'p>(&'w [Wanted<'p>]);

impl<'p> Wanted<'p> {
    fn name(self) -> Option<&'p str> {
        match self.rest.first() {
            Some(Segment::Name(name)) => Some(name),
            _ => None,
        }
    }

    fn index(self) -> Option<i64> {
        match self.rest.first() {
            Some(Segment::Index(index)) => Some(*index),
            _ => None,
        }
    }
}

/// Those of `wanted` whose first segment passes, without it.
fn below<'p>(wanted: &[Wanted<'p>], matches: impl Fn(Wanted<'p>) -> bool) -> Vec<Wanted<'p>> {
    let step = |wanted: &Wanted<'p>| Wanted { rest: &wanted.rest[1..], ..*wanted };
    wanted.iter().filter(|wanted| matches(**wanted)).map(step).collect()
}

/// A scalar is a key, `null` and `""` are missing, anything else is malformed.
fn scalar(raw: &str) -> Found {
    match raw.as_bytes().first() {
        Some(b'"') => {
            let text: String = serde_json::from_str(raw).map_err(|_| Malformed("the key is no text"))?;
            Ok((!text.is_empty()).then(|| Part::Text(Bytes::from(text))))
        }
        Some(b'n') => Ok(None),
        Some(b't' | b'f') => Ok(Some(Part::Bool(raw == "true"))),
        Some(b'-' | b'0'..=b'9') => Ok(Some(Part::Number(Bytes::copy_from_slice(raw.as_bytes())))),
        _ => Err(Malformed("the key is no scalar")),
    }
}

// === impl Select ===

impl<'p> Select<'p, '_> {
    /// The same for what is inside.
    fn below<'s>(&'s mut self, wanted: Vec<Wanted<'p>>) -> Select<'p, 's> {
        Select { wanted, found: &mut *self.found, careful: self.careful }
    }

    /// Looks inside a value whose text is at hand.
    fn look_into(self, raw: &str) -> Result<(), serde_json::Error> {
        let (here, deeper): (Vec<_>, Vec<_>) = self.wanted.into_iter().partition(|wanted| wanted.rest.is_empty());
        for wanted in here {
            self.found[wanted.slot] = scalar(raw);
        }
        if deeper.is_empty() || !raw.starts_with(['{', '[']) {
            return Ok(());
        }
        let mut deserializer = serde_json::Deserializer::from_str(raw);
        deserializer.deserialize_any(Select { wanted: deeper, ..self })
    }
}

impl<'de> DeserializeSeed<'de> for Select<'_, '_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        if self.careful || self.wanted.iter().any(|wanted| wanted.rest.is_empty()) {
            let raw = <&RawValue>::deserialize(deserializer)?;
            return self.look_into(raw.get()).map_err(D::Error::custom);
        }
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Select<'_, '_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON")
    }

    fn visit_map<A: MapAccess<'de>>(mut self, mut map: A) -> Result<(), A::Error> {
        let (mut seen, mut repeated) = (Vec::new(), Vec::new());
        while let Some(name) = map.next_key_seed(Name(&self.wanted))? {
            let Some(name) = name else {
                map.next_value::<IgnoredAny>()?;
                continue;
            };
            let wanted = below(&self.wanted, |wanted| wanted.name() == Some(name));
            if seen.contains(&name) {
                map.next_value::<IgnoredAny>()?;
                repeated.extend(wanted);
            } else {
                map.next_value_seed(self.below(wanted))?;
                seen.push(name);
            }
        }
        for wanted in repeated {
            self.found[wanted.slot] = Err(Malformed("a member on its way is repeated"));
        }
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(mut self, mut seq: A) -> Result<(), A::Error> {
        // Which element a negative index means is known at the end only: that many are remembered, unparsed.
        let from_end = self.wanted.iter().filter_map(|wanted| wanted.index()).min().unwrap_or(0).min(0).unsigned_abs();
        let mut last: VecDeque<&'de RawValue> = VecDeque::new();
        for index in 0_i64.. {
            let wanted = below(&self.wanted, |wanted| wanted.index() == Some(index));
            if from_end > 0 {
                let Some(raw) = seq.next_element::<&RawValue>()? else { break };
                if last.len() as u64 == from_end {
                    last.pop_front();
                }
                last.push_back(raw);
                self.below(wanted).look_into(raw.get()).map_err(A::Error::custom)?;
            } else if wanted.is_empty() {
                let Some(IgnoredAny) = seq.next_element()? else { break };
            } else {
                let Some(()) = seq.next_element_seed(self.below(wanted))? else { break };
            }
        }
        for (back, raw) in (1_i64..).zip(last.iter().rev()) {
            let wanted = below(&self.wanted, |wanted| wanted.index() == Some(-back));
            self.below(wanted).look_into(raw.get()).map_err(A::Error::custom)?;
        }
        Ok(())
    }

    // A scalar has no members: what is wanted inside it is missing.

    fn visit_bool<E>(self, _: bool) -> Result<(), E> {
        Ok(())
    }

    fn visit_i64<E>(self, _: i64) -> Result<(), E> {
        Ok(())
    }

    fn visit_u64<E>(self, _: u64) -> Result<(), E> {
        Ok(())
    }

    fn visit_f64<E>(self, _: f64) -> Result<(), E> {
        Ok(())
    }

    fn visit_str<E>(self, _: &str) -> Result<(), E> {
        Ok(())
    }

    fn visit_unit<E>(self) -> Result<(), E> {
        Ok(())
    }
}

// === impl Name ===

impl<'de, 'p> DeserializeSeed<'de> for Name<'_, 'p> {
    type Value = Option<&'p str>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_str(self)
    }
}

impl<'p> Visitor<'_> for Name<'_, 'p> {
    type Value = Option<&'p str>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a member name")
    }

    fn visit_str<E>(self, name: &str) -> Result<Self::Value, E> {
        Ok(self.0.iter().filter_map(|wanted| wanted.name()).find(|wanted| *wanted == name))
    }
}
