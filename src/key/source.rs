//! The rule by which a key is found.

use std::cell::LazyCell;
use std::fmt;
use std::sync::Arc;

use bytes::Bytes;
use http::{HeaderName, request};

use super::{Extracted, FieldPath, Found, HeaderSyntax, Json, Malformed, Part, form, header, json, protobuf};
use crate::media_type;

/// Where the key of a request comes from. See the [module docs](super).
#[derive(Clone, Debug)]
pub struct KeySource {
    pub(super) rule: Rule,
    /// Every field of a form that the rule wants, so that one pass over the body finds them all.
    pub(super) fields: Vec<String>,
    /// Every JSON path of the rule, for the same reason.
    pub(super) paths: Vec<Json>,
    /// Every path into a protobuf message.
    pub(super) messages: Vec<FieldPath>,
}

#[derive(Clone)]
pub(super) enum Rule {
    All(Vec<(Self, Presence)>),
    Any(Vec<Self>),
    /// Metadata whose value is bytes.
    Binary(HeaderName),
    /// An index into the fields.
    Form(usize),
    FromFn(Arc<KeyFn>),
    /// Any of these names; where several are there, they have to agree.
    Header(Vec<HeaderName>),
    /// An index into the paths.
    Json(usize),
    /// An index into the messages.
    Protobuf(usize),
    /// A parameter of the query.
    Query(String),
    /// Another rule, whose every part has to pass.
    Valid(Box<Self>, Arc<ValidFn>),
}

type KeyFn = dyn Fn(&request::Parts, &Bytes) -> Option<Bytes> + Send + Sync;
type ValidFn = dyn Fn(&[u8]) -> bool + Send + Sync;

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

    /// A rule of your own for what a key is: each part that is there has to pass, or the key is malformed.
    ///
    /// ```
    /// # use tower_idempotency::key;
    /// // Long enough that two clients do not choose the same by chance.
    /// let source = key::header("Idempotency-Key").valid_if(|key| key.len() >= 20);
    /// ```
    #[must_use]
    pub fn valid_if(mut self, valid: impl Fn(&[u8]) -> bool + Send + Sync + 'static) -> Self {
        self.rule = Rule::Valid(Box::new(self.rule), Arc::new(valid));
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

    /// Takes over what `other` wants of the body and returns its rule, renumbered.
    fn adopt(&mut self, other: Self) -> Rule {
        let rule = other.rule.renumbered([self.fields.len(), self.paths.len(), self.messages.len()]);
        self.fields.extend(other.fields);
        self.paths.extend(other.paths);
        self.messages.extend(other.messages);
        rule
    }

    /// Whether the body has to be there before the key can be.
    pub(crate) fn reads_body(&self) -> bool {
        self.rule.reads_body()
    }

    /// The parts of the key of this request. A body that has to be unpacked is, to no more than `limit` bytes.
    pub(crate) fn extract(&self, head: &request::Parts, body: &Bytes, syntax: HeaderSyntax, limit: usize) -> Extracted {
        let fields = LazyCell::new(|| form::select(&head.headers, body, &self.fields));
        let members = LazyCell::new(|| json::select(body, &self.paths));
        let messages = LazyCell::new(|| protobuf::select(&head.headers, body, &self.messages, limit));
        let mut find = |rule: &Rule| match rule {
            Rule::Binary(name) => header::binary(&head.headers, name, syntax),
            Rule::Form(index) => fields[*index].clone(),
            Rule::FromFn(f) => Ok(f(head, body).filter(|key| !key.is_empty()).map(Part::Text)),
            Rule::Header(names) => header::extract(&head.headers, names, syntax),
            Rule::Json(_) if media_type::is_grpc(&head.headers) => Ok(None),
            Rule::Json(index) => members[*index].clone(),
            Rule::Protobuf(_) if media_type::is(&head.headers, b"application/json") => Ok(None),
            Rule::Protobuf(index) => messages[*index].clone(),
            Rule::Query(name) => form::query(&head.uri, name),
            Rule::All(_) | Rule::Any(_) | Rule::Valid(..) => Ok(None),
        };
        self.rule.evaluate(&mut find)
    }
}

impl From<Json> for KeySource {
    fn from(path: Json) -> Self {
        Self { paths: vec![path], ..Rule::Json(0).into() }
    }
}

impl From<Rule> for KeySource {
    fn from(rule: Rule) -> Self {
        Self { rule, fields: Vec::new(), paths: Vec::new(), messages: Vec::new() }
    }
}

// === impl Rule ===

impl Rule {
    /// The same rule, behind so many fields, paths and messages of others.
    fn renumbered(self, behind: [usize; 3]) -> Self {
        let renumbered = |rule: Self| rule.renumbered(behind);
        let [fields, paths, messages] = behind;
        match self {
            Self::All(rules) => Self::All(rules.into_iter().map(|(rule, p)| (renumbered(rule), p)).collect()),
            Self::Any(rules) => Self::Any(rules.into_iter().map(renumbered).collect()),
            Self::Form(index) => Self::Form(index + fields),
            Self::Json(index) => Self::Json(index + paths),
            Self::Protobuf(index) => Self::Protobuf(index + messages),
            Self::Valid(rule, valid) => Self::Valid(Box::new(renumbered(*rule)), valid),
            rule @ (Self::Binary(_) | Self::FromFn(_) | Self::Header(_) | Self::Query(_)) => rule,
        }
    }

    fn reads_body(&self) -> bool {
        match self {
            Self::All(rules) => rules.iter().any(|(rule, _)| rule.reads_body()),
            Self::Any(rules) => rules.iter().any(Self::reads_body),
            Self::Valid(rule, _) => rule.reads_body(),
            Self::Form(_) | Self::FromFn(_) | Self::Json(_) | Self::Protobuf(_) => true,
            Self::Binary(_) | Self::Header(_) | Self::Query(_) => false,
        }
    }

    fn is_composite(&self) -> bool {
        match self {
            Self::All(_) => true,
            Self::Valid(rule, _) => rule.is_composite(),
            _ => false,
        }
    }

    /// Composes what `find` says of the leaves.
    fn evaluate(&self, find: &mut dyn FnMut(&Self) -> Found) -> Extracted {
        match self {
            Self::All(rules) => {
                let mut parts = Vec::with_capacity(rules.len());
                for (position, (rule, presence)) in rules.iter().enumerate() {
                    // A rule for what a key is does not change the key: `a ∧ b` goes on with or without one.
                    let goes_on = position == 0 && matches!(rule, Self::Valid(..)) && rule.is_composite();
                    match (rule.evaluate(find)?, presence) {
                        (Some(mut group), _) if group.len() == 1 || goes_on => parts.append(&mut group),
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
            Self::Valid(rule, valid) => match rule.evaluate(find)? {
                Some(parts) if !parts.iter().all(|part| part.passes(&**valid)) => {
                    Err(Malformed("the key is not valid"))
                }
                parts => Ok(parts),
            },
            leaf @ (Self::Binary(_)
            | Self::Form(_)
            | Self::FromFn(_)
            | Self::Header(_)
            | Self::Json(_)
            | Self::Protobuf(_)
            | Self::Query(_)) => Ok(find(leaf)?.map(|part| vec![part])),
        }
    }
}

impl fmt::Debug for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::All(rules) => f.debug_tuple("All").field(rules).finish(),
            Self::Any(rules) => f.debug_tuple("Any").field(rules).finish(),
            Self::Binary(name) => f.debug_tuple("Binary").field(name).finish(),
            Self::Form(index) => f.debug_tuple("Form").field(index).finish(),
            Self::FromFn(_) => f.write_str("FromFn"),
            Self::Header(names) => f.debug_tuple("Header").field(names).finish(),
            Self::Json(index) => f.debug_tuple("Json").field(index).finish(),
            Self::Protobuf(index) => f.debug_tuple("Protobuf").field(index).finish(),
            Self::Query(name) => f.debug_tuple("Query").field(name).finish(),
            Self::Valid(rule, _) => f.debug_tuple("Valid").field(rule).finish(),
        }
    }
}
