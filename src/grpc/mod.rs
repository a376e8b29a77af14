//! gRPC: which calls are protected, what of their outcome is kept, and how they are refused.
//!
//! The layer knows a call by its `Content-Type`, `application/grpc` with whatever follows a `+`, and serves any
//! implementation: tonic's is behind a [`Server::layer`] or a `named_layer`, as in
//! [`examples/grpc.rs`](https://docs.rs/crate/tower-idempotency/latest/source/examples/grpc.rs).
//!
//! ```
//! use tower_idempotency::{IdempotencyLayer, Ledger, MemoryStore, caller, key};
//!
//! let ledger = Ledger::new(MemoryStore::new());
//! let charge = IdempotencyLayer::api(&ledger, caller::authorization())
//!     .unary("/payments.v1.Payments/Charge")
//!     .key(key::metadata("idempotency-key").or(key::protobuf([1])));
//! # let _ = charge;
//! ```
//!
//! # Which calls
//!
//! The head of a call does not say whether it streams, and to wait for the end of a stream that waits for an answer would never
//! end. So unary methods are named, by [path](crate::IdempotencyLayer::unary) or by a
//! [descriptor set](crate::IdempotencyLayer::unary_methods_of); every other call passes through untouched. A layer that names none
//! warns of the first call. gRPC-Web passes through as well, since its trailers are in its body: put this layer inside of the
//! one that translates it.
//!
//! # What decides
//!
//! Not the HTTP status, which is 200 also for a failure, but `grpc-status`: in the trailers, or in the headers of a
//! response that has nothing else. [`keep_codes`](crate::IdempotencyLayer::keep_codes) says which codes are kept. Trailers are
//! kept with the message and replayed with it, and so are all pieces of metadata of both but those that
//! [never are](crate::IdempotencyLayer::drop_headers). A replay has `idempotent-replayed: true` among its metadata.
//!
//! An outcome that is not retained, since it was too large or too slow, or applied earlier, cannot be told as an empty message
//! without lying: it is refused as `ALREADY_EXISTS`. Under the webhook contract, whose senders do not read it, it is `OK`
//! with a message of defaults.
//!
//! A message comes back as it was encoded the first time. To a client that does not accept that coding (`grpc-accept-encoding`),
//! or that comes by plain HTTP this time, it is as if it had not been retained.
//!
//! # How they are refused
//!
//! With a response of trailers alone: `grpc-status`, a message, and in `grpc-status-details-bin` a `google.rpc.ErrorInfo` whose reason is
//! the [code](crate::Rejection::code) in capitals and whose domain is `tower-idempotency`; a `google.rpc.RetryInfo` where the call
//! may fare better later; and a `google.rpc.Help` with the [policy page](crate::IdempotencyLayer::policy_url), if there is one.
//!
//! | refusal | code | since |
//! |---|---|---|
//! | key missing, malformed, reused | `INVALID_ARGUMENT` | the call will never be right |
//! | running (api) | `ABORTED` | a conflict that passes: 409, by the table of `google.rpc.Code` |
//! | running (webhook), overloaded, store down, shutting down, not ready, attempts failed, outcome not known yet | `UNAVAILABLE` | what clients retry by themselves |
//! | the request did not arrive in time | `UNAVAILABLE` | nothing has run |
//! | the request is too large | `RESOURCE_EXHAUSTED` | what implementations say of a message over their limit |
//! | the request broke off | `CANCELLED` | by its client |
//! | outcome not retained | `ALREADY_EXISTS` | it has run, and a retry changes nothing |
//! | scope unknown | `INTERNAL` | |
//!
//! With another [`running_status`](crate::IdempotencyLayer::running_status), a running call is `ABORTED` for 409,
//! `RESOURCE_EXHAUSTED` for 429 and `UNAVAILABLE` for the rest.
//!
//! # Payloads
//!
//! What is compared under a key by default is the body, bytes for bytes, and compressed where it is. Not every encoder writes
//! the same message in the same bytes twice: Go's shuffles maps. A client library that repeats a call by itself sends the
//! same bytes; where callers encode anew, or may compress or not, compare [nothing](crate::fingerprint::ignored).
//!
//! A duplicate waits for a running call no longer than its own `grpc-timeout` says.
//!
//! [`Server::layer`]: https://docs.rs/tonic/latest/tonic/transport/struct.Server.html#method.layer

mod methods;
mod refusal;
mod timeout;

use std::fmt;

use http::{HeaderMap, HeaderName, HeaderValue, header, response};

pub use self::methods::InvalidDescriptors;
pub(crate) use self::methods::Methods;
pub(crate) use self::refusal::{refuse, refused_as};
pub(crate) use self::timeout::deadline;

pub(crate) const CONTENT_TYPE_GRPC: HeaderValue = HeaderValue::from_static("application/grpc");
pub(crate) const GRPC_ACCEPT_ENCODING: HeaderName = HeaderName::from_static("grpc-accept-encoding");
pub(crate) const GRPC_ENCODING: HeaderName = HeaderName::from_static("grpc-encoding");
pub(crate) const GRPC_STATUS: HeaderName = HeaderName::from_static("grpc-status");
const GRPC_MESSAGE: HeaderName = HeaderName::from_static("grpc-message");
const GRPC_STATUS_DETAILS: HeaderName = HeaderName::from_static("grpc-status-details-bin");

/// What came of a call ([status codes](https://grpc.github.io/grpc/core/md_doc_statuscodes.html)).
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
#[repr(u8)]
pub enum Code {
    /// It succeeded.
    Ok = 0,
    /// It was cancelled, mostly by the caller.
    Cancelled = 1,
    /// Nobody knows; also a status that is missing or is none of these.
    Unknown = 2,
    /// The arguments are wrong whatever the state of the system is.
    InvalidArgument = 3,
    /// It took longer than it may.
    DeadlineExceeded = 4,
    /// What was asked for is not there.
    NotFound = 5,
    /// What was to be made is there.
    AlreadyExists = 6,
    /// The caller may not do this.
    PermissionDenied = 7,
    /// A quota or a resource is used up.
    ResourceExhausted = 8,
    /// The system is not in the state that this needs.
    FailedPrecondition = 9,
    /// A conflict with something that ran at the same time.
    Aborted = 10,
    /// Past the end of what there is.
    OutOfRange = 11,
    /// There is no such method here.
    Unimplemented = 12,
    /// Something is broken.
    Internal = 13,
    /// It cannot be done now.
    Unavailable = 14,
    /// Data is lost or damaged.
    DataLoss = 15,
    /// The caller is not who it has to be.
    Unauthenticated = 16,
}

// === impl Code ===

impl Code {
    /// Each with the name that it has everywhere, in the order of their numbers.
    const ALL: [(Self, &'static str); 17] = [
        (Self::Ok, "OK"),
        (Self::Cancelled, "CANCELLED"),
        (Self::Unknown, "UNKNOWN"),
        (Self::InvalidArgument, "INVALID_ARGUMENT"),
        (Self::DeadlineExceeded, "DEADLINE_EXCEEDED"),
        (Self::NotFound, "NOT_FOUND"),
        (Self::AlreadyExists, "ALREADY_EXISTS"),
        (Self::PermissionDenied, "PERMISSION_DENIED"),
        (Self::ResourceExhausted, "RESOURCE_EXHAUSTED"),
        (Self::FailedPrecondition, "FAILED_PRECONDITION"),
        (Self::Aborted, "ABORTED"),
        (Self::OutOfRange, "OUT_OF_RANGE"),
        (Self::Unimplemented, "UNIMPLEMENTED"),
        (Self::Internal, "INTERNAL"),
        (Self::Unavailable, "UNAVAILABLE"),
        (Self::DataLoss, "DATA_LOSS"),
        (Self::Unauthenticated, "UNAUTHENTICATED"),
    ];

    /// What these headers or trailers say; nothing if they have no `grpc-status`. Two that differ say nothing either, but
    /// that is [`Unknown`](Self::Unknown).
    pub(crate) fn stated(headers: &HeaderMap) -> Option<Self> {
        let mut values = headers.get_all(GRPC_STATUS).iter();
        let first = values.next()?;
        let agree = values.all(|value| value == first);
        Some(Self::read(first).filter(|_| agree).unwrap_or(Self::Unknown))
    }

    fn read(status: &HeaderValue) -> Option<Self> {
        let number = status.to_str().ok()?;
        let number = number.parse::<usize>().ok().filter(|parsed| parsed.to_string() == number)?;
        Self::ALL.get(number).map(|(code, _)| *code)
    }

    /// What came of a call whose response has ended, with these trailers.
    pub(crate) fn of(head: &response::Parts, trailers: Option<&HeaderMap>) -> Self {
        let stated = trailers.and_then(Self::stated).or_else(|| Self::stated(&head.headers));
        stated.unwrap_or(Self::Unknown)
    }

    /// Whether a call that comes again would be answered the same, as the api contract takes it: also
    /// [`NotFound`](Self::NotFound), which is the handler's word here and not a router's.
    pub(crate) const fn is_deterministic(self) -> bool {
        match self {
            Self::Ok
            | Self::InvalidArgument
            | Self::NotFound
            | Self::AlreadyExists
            | Self::FailedPrecondition
            | Self::OutOfRange => true,
            Self::Cancelled
            | Self::Unknown
            | Self::DeadlineExceeded
            | Self::PermissionDenied
            | Self::ResourceExhausted
            | Self::Aborted
            | Self::Unimplemented
            | Self::Internal
            | Self::Unavailable
            | Self::DataLoss
            | Self::Unauthenticated => false,
        }
    }

    /// Whether it is a failure of the service, and no refusal that anybody can bring about who calls it.
    pub(crate) const fn is_failure(self) -> bool {
        matches!(
            self,
            Self::Cancelled
                | Self::Unknown
                | Self::DeadlineExceeded
                | Self::Aborted
                | Self::Internal
                | Self::Unavailable
                | Self::DataLoss
        )
    }
}

/// Its name, as in `UNAVAILABLE`.
impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(Self::ALL[usize::from(*self as u8)].1)
    }
}

impl From<Code> for HeaderValue {
    fn from(code: Code) -> Self {
        Self::from(code as u16)
    }
}

/// What of the headers of a response is metadata.
pub(crate) fn metadata(headers: &HeaderMap) -> HeaderMap {
    let is_metadata = |name: &HeaderName| *name != header::CONTENT_TYPE && !name.as_str().starts_with("grpc-");
    headers.iter().filter(|(name, _)| is_metadata(name)).map(|(name, value)| (name.clone(), value.clone())).collect()
}

/// Whether whoever accepts these codings can read a response with these headers.
pub(crate) fn accepts(accepted: Option<&HeaderValue>, headers: &HeaderMap) -> bool {
    let Some(coding) = headers.get(GRPC_ENCODING).map(HeaderValue::as_bytes) else { return true };
    let mut accepted = accepted.map(HeaderValue::as_bytes).unwrap_or_default().split(|byte| *byte == b',');
    coding == b"identity" || accepted.any(|accepted| accepted.trim_ascii() == coding)
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    #[test]
    fn codes_stand_in_the_order_of_their_numbers() {
        for (number, (code, name)) in Code::ALL.into_iter().enumerate() {
            assert_eq!((code as usize, code.to_string()), (number, name.to_owned()));
        }
    }

    #[test]
    fn what_is_no_status_is_unknown() {
        let stated = |values: &[&'static str]| {
            let values = values.iter().map(|value| (GRPC_STATUS, HeaderValue::from_static(value)));
            let mut headers = HeaderMap::new();
            values.for_each(|(name, value)| {
                headers.append(name, value);
            });
            Code::stated(&headers)
        };
        assert_eq!(stated(&[]), None);
        assert_eq!(stated(&["0"]), Some(Code::Ok));
        assert_eq!(stated(&["16"]), Some(Code::Unauthenticated));
        assert_eq!(stated(&["0", "0"]), Some(Code::Ok), "as clients read it");
        for none in [&["17"][..], &["00"], &["+0"], &[""], &["OK"], &["0", "3"]] {
            assert_eq!(stated(none), Some(Code::Unknown), "{none:?}");
        }
    }
}
