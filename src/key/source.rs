//! The rule by which a key is found.

use std::cell::LazyCell;
use std::fmt;
use std::sync::Arc;

use bytes::Bytes;
use http::{HeaderName, request};

use super::{Extracted, HeaderSyntax, Json, Malformed, Part, header, json};

/// Where the key of a request comes from. See the [module docs](super).
#[derive(Clone, Debug)]
pub struct KeySource {
    pub(super) rule: Rule,
    /// Every JSON path of the rule, so that one pass over the body finds them all.
    pub(super) paths: Vec<Json>,
}

#[derive(Clone)]
pub(super) enum Rule {
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
pub(super) enum Presence {
    Optional,
    Required,
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
                        (Some(mut group), _) if group.len() == 1 => parts.append(&mut group),
                        (Some(group), _) => parts.push(Part::Group(group)),
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
