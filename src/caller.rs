//! Whose key it is.
//!
//! Two callers of an API may choose the same key, and neither may see what the other was answered. The api contract
//! therefore has no default for this: [`IdempotencyLayer::api`](crate::IdempotencyLayer::api) asks for a [`Caller`].
//!
//! A request that names no caller (no such header, or a function that returns `None`) belongs to the anonymous caller,
//! which is one. Where that must not be, authenticate first: the layer belongs inside of authentication.

use std::fmt;
use std::sync::Arc;

use bytes::Bytes;
use http::{HeaderName, header, request};

use crate::digest::Digest;

/// Tells callers apart. See the [module docs](self).
#[derive(Clone)]
pub struct Caller(Kind);

#[derive(Clone)]
enum Kind {
    FromFn(Arc<CallerFn>),
    Header(HeaderName),
    Shared,
}

type CallerFn = dyn Fn(&request::Parts) -> Option<Bytes> + Send + Sync;

/// A caller is who presents the same `Authorization`.
///
/// Only for credentials that stay the same between retries: with a token that is renewed in between, or a signature made
/// per request, the retry is a stranger and runs again.
#[must_use]
pub const fn authorization() -> Caller {
    Caller(Kind::Header(header::AUTHORIZATION))
}

/// A caller is who presents the same value of this header, such as `x-api-key`.
///
/// # Panics
///
/// If `name` is not a header name.
#[must_use]
#[allow(clippy::expect_used, reason = "as documented: a programmer's mistake, found at start")]
pub fn header(name: &str) -> Caller {
    Caller(Kind::Header(HeaderName::from_bytes(name.as_bytes()).expect("not a header name")))
}

/// A caller is what a function makes of the request's head, for instance the account that authentication left in its
/// extensions.
#[must_use]
pub fn from_fn<F, C>(f: F) -> Caller
where
    F: Fn(&request::Parts) -> Option<C> + Send + Sync + 'static,
    C: Into<Bytes>,
{
    Caller(Kind::FromFn(Arc::new(move |head| f(head).map(Into::into))))
}

/// All callers are one: whoever knows a key gets its outcome.
#[must_use]
pub const fn shared() -> Caller {
    Caller(Kind::Shared)
}

impl Caller {
    pub(crate) fn digest(&self, head: &request::Parts, digest: &mut Digest) {
        match &self.0 {
            Kind::Shared => digest.part(b's', &[]),
            Kind::Header(name) => {
                let values = head.headers.get_all(name);
                digest.part(b'c', &(values.iter().count() as u64).to_le_bytes());
                values.iter().for_each(|value| digest.part(b'v', value.as_bytes()));
            }
            Kind::FromFn(f) => match f(head) {
                Some(caller) => digest.part(b'f', &caller),
                None => digest.part(b'-', &[]),
            },
        }
    }
}

impl fmt::Debug for Caller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Kind::FromFn(_) => f.write_str("Caller::FromFn"),
            Kind::Header(name) => f.debug_tuple("Caller::Header").field(name).finish(),
            Kind::Shared => f.write_str("Caller::Shared"),
        }
    }
}
