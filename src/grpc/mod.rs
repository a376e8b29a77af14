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
//! let charge = IdempotencyLayer::api(&ledger, caller::header("authorization"))
//!     .unary("/payments.v1.Payments/Charge")
//!     .key(key::metadata("idempotency-key").or(key::protobuf([1])));
//! # let _ = charge;
//! ```
//!
//! # Which calls
//!
//! The head of a call does not say whether it streams, and to wait for the end of a stream that waits for an answer would never
//! end. So unary methods are named, by [path](crate::IdempotencyLayer::unary) or by a
//! [descriptor set](crate::IdempotencyLayer::unary_methods_of); every other call passes through untouched. So does
//! gRPC-Web, whose trailers are in its body: put this layer inside of the one that translates it.
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
//! A message comes back as it was encoded the first time. A client that repeats a call with another
//! `grpc-accept-encoding` may not be able to read it.
//!
//! # How they are refused
//!
//! With a response of trailers alone: `grpc-status`, a message, and in `grpc-status-details-bin` a `google.rpc.ErrorInfo` whose reason is
//! the [code](crate::Rejection::code) in capitals and whose domain is `tower-idempotency`; a `google.rpc.RetryInfo` where the call
//! may fare better later; and a `google.rpc.Help` with the [policy page](crate::IdempotencyLayer::policy_url), if there is one.
//! [`on_refusal`](crate::IdempotencyLayer::on_refusal) may change headers; a body, or a code that says `OK`, is not sent.
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
//! What is compared under a key by default is the bytes of the message. Not every encoder writes the same message in the same
//! bytes twice: Go's shuffles maps. A client library that repeats a call by itself sends the same bytes; where callers encode
//! anew, compare [nothing](crate::fingerprint::ignored).
//!
//! A duplicate waits for a running call no longer than its own `grpc-timeout` says.
//!
//! [`Server::layer`]: https://docs.rs/tonic/latest/tonic/transport/struct.Server.html#method.layer

mod methods;
mod refusal;
mod timeout;

use std::fmt;

use http::{HeaderMap, HeaderName, response};

pub use self::methods::InvalidDescriptors;
pub(crate) use self::methods::Methods;
pub(crate) use self::refusal::refuse;
pub(crate) use self::timeout::deadline;

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
    const ALL: [Self; 17] = [
        Self::Ok,
        Self::Cancelled,
        Self::Unknown,
        Self::InvalidArgument,
        Self::DeadlineExceeded,
        Self::NotFound,
        Self::AlreadyExists,
        Self::PermissionDenied,
        Self::ResourceExhausted,
        Self::FailedPrecondition,
        Self::Aborted,
        Self::OutOfRange,
        Self::Unimplemented,
        Self::Internal,
        Self::Unavailable,
        Self::DataLoss,
        Self::Unauthenticated,
    ];

    /// What these headers or trailers say; nothing if they have no `grpc-status`.
    pub(crate) fn stated(headers: &HeaderMap) -> Option<Self> {
        let mut values = headers.get_all(GRPC_STATUS).iter();
        let value = values.next()?;
        let is_stated = |code: &Self| value.as_bytes() == code.to_string().as_bytes();
        let stated = Self::ALL.into_iter().find(is_stated).filter(|_| values.next().is_none());
        Some(stated.unwrap_or(Self::Unknown))
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
            Self::Unknown
                | Self::DeadlineExceeded
                | Self::Aborted
                | Self::Internal
                | Self::Unavailable
                | Self::DataLoss
        )
    }
}

/// As `grpc-status` has it: its number.
impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        (*self as u8).fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    #[test]
    fn codes_stand_in_the_order_of_their_numbers() {
        for (number, code) in Code::ALL.into_iter().enumerate() {
            assert_eq!(code.to_string(), number.to_string());
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
        for none in [&["17"][..], &["00"], &["+0"], &[""], &["OK"], &["0", "0"]] {
            assert_eq!(stated(none), Some(Code::Unknown), "{none:?}");
        }
    }
}
