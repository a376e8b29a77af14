//! A refusal as gRPC says it: a response of trailers alone, with the standard details.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD_NO_PAD;
use bytes::Bytes;
use http::header::{CONTENT_LENGTH, CONTENT_TYPE, HeaderValue};
use http::{Response, StatusCode};
use percent_encoding::{AsciiSet, CONTROLS, utf8_percent_encode};
use tokio::time::Instant;

use super::{CONTENT_TYPE_GRPC, Code, GRPC_MESSAGE, GRPC_STATUS, GRPC_STATUS_DETAILS};
use crate::rejection::{PolicyPage, RETRY_AFTER_SECS, Rejection};
use crate::wire::{put_bytes, put_varint};

/// What is percent-encoded in `grpc-message`: all but printable ASCII, and the sign of it.
const ENCODED: &AsciiSet = &CONTROLS.add(b'%');

/// Whose reasons those of `google.rpc.ErrorInfo` are.
const DOMAIN: &str = "tower-idempotency";

/// The refusal. `running` is the HTTP status of [`Rejection::Running`]; `until` is when the reason will be gone, where that is
/// known.
pub(crate) fn refuse(
    refusal: Rejection,
    running: StatusCode,
    page: Option<&PolicyPage>,
    until: Option<Instant>,
) -> Response<Bytes> {
    let code = code(refusal, running);
    let mut response = Response::new(Bytes::new());
    response.headers_mut().insert(CONTENT_TYPE, CONTENT_TYPE_GRPC);
    response.headers_mut().insert(GRPC_STATUS, code.into());
    let details = STANDARD_NO_PAD.encode(status(refusal, code, page, until));
    let message = utf8_percent_encode(refusal.title(), ENCODED).to_string();
    for (name, value) in [(GRPC_MESSAGE, message), (GRPC_STATUS_DETAILS, details)] {
        if let Ok(value) = HeaderValue::try_from(value) {
            response.headers_mut().insert(name, value);
        }
    }
    response
}

/// What a user's function has made of a refusal, as far as it can be told: headers, and another code than `OK`.
pub(crate) fn refused_as(told: Response<Bytes>, refused: &Response<Bytes>) -> Response<Bytes> {
    let mut headers = told.into_parts().0.headers;
    headers.remove(CONTENT_LENGTH);
    headers.insert(CONTENT_TYPE, CONTENT_TYPE_GRPC);
    let mut codes = headers.get_all(GRPC_STATUS).iter().map(Code::read);
    if !matches!((codes.next(), codes.next()), (Some(Some(code)), None) if code != Code::Ok) {
        for name in [GRPC_STATUS, GRPC_MESSAGE, GRPC_STATUS_DETAILS] {
            headers.remove(&name);
            headers.extend(refused.headers().get(&name).map(|value| (name, value.clone())));
        }
    }
    let mut response = Response::new(Bytes::new());
    *response.headers_mut() = headers;
    response
}

/// The table is in the docs of [`grpc`](crate::grpc).
const fn code(refusal: Rejection, running: StatusCode) -> Code {
    match refusal {
        Rejection::BodyTooLarge => Code::ResourceExhausted,
        Rejection::BodyUnreadable => Code::Cancelled,
        Rejection::KeyMalformed | Rejection::KeyMissing | Rejection::KeyReused => Code::InvalidArgument,
        Rejection::OutcomeNotRetained => Code::AlreadyExists,
        Rejection::Running => match running {
            StatusCode::CONFLICT => Code::Aborted,
            StatusCode::TOO_MANY_REQUESTS => Code::ResourceExhausted,
            _ => Code::Unavailable,
        },
        Rejection::ScopeUnknown => Code::Internal,
        Rejection::AttemptFailed
        | Rejection::BodyTimeout
        | Rejection::InnerNotReady
        | Rejection::OutcomeUnknown
        | Rejection::Overloaded
        | Rejection::ShuttingDown
        | Rejection::StoreUnavailable => Code::Unavailable,
    }
}

/// A `google.rpc.Status` (<https://github.com/googleapis/googleapis/blob/master/google/rpc/status.proto>) with the details of
/// `error_details.proto` beside it.
fn status(refusal: Rejection, code: Code, page: Option<&PolicyPage>, until: Option<Instant>) -> Vec<u8> {
    let mut status = Vec::new();
    put_varint(&mut status, 1, code as u64);
    put_bytes(&mut status, 2, refusal.title().as_bytes());

    let mut error = Vec::new();
    put_bytes(&mut error, 1, refusal.code().to_uppercase().as_bytes());
    put_bytes(&mut error, 2, DOMAIN.as_bytes());
    put_detail(&mut status, "ErrorInfo", &error);

    let is_transient = (code == Code::Unavailable).then_some(RETRY_AFTER_SECS);
    if let Some(secs) = refusal.retry_after(until).or(is_transient) {
        let mut delay = Vec::new();
        put_varint(&mut delay, 1, secs);
        let mut retry = Vec::new();
        put_bytes(&mut retry, 1, &delay);
        put_detail(&mut status, "RetryInfo", &retry);
    }

    if let Some(page) = page {
        let mut link = Vec::new();
        put_bytes(&mut link, 1, refusal.title().as_bytes());
        put_bytes(&mut link, 2, format!("{}#{}", page.url, refusal.code()).as_bytes());
        let mut help = Vec::new();
        put_bytes(&mut help, 1, &link);
        put_detail(&mut status, "Help", &help);
    }
    status
}

/// Appends a `google.protobuf.Any`.
fn put_detail(status: &mut Vec<u8>, name: &str, detail: &[u8]) {
    let mut any = Vec::new();
    put_bytes(&mut any, 1, format!("type.googleapis.com/google.rpc.{name}").as_bytes());
    put_bytes(&mut any, 2, detail);
    put_bytes(status, 3, &any);
}
