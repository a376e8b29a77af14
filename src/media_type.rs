//! What kind of content a message says it has.

use http::header::{CONTENT_TYPE, HeaderMap, HeaderValue};

/// Whether it is this media type, whatever its parameters are (RFC 9110 §8.3.1: in any case).
pub(crate) fn is(headers: &HeaderMap, media_type: &[u8]) -> bool {
    essence(headers).eq_ignore_ascii_case(media_type)
}

/// Whether it is gRPC in any encoding: `application/grpc`, `application/grpc+proto`.
pub(crate) fn is_grpc(headers: &HeaderMap) -> bool {
    matches!(behind_grpc(headers), Some([] | [b'+', ..]))
}

/// Whether it is gRPC as browsers speak it: `application/grpc-web`, `application/grpc-web-text+proto`.
pub(crate) fn is_grpc_web(headers: &HeaderMap) -> bool {
    let suffix = behind_grpc(headers).and_then(|suffix| suffix.get(..4));
    suffix.is_some_and(|suffix| suffix.eq_ignore_ascii_case(b"-web"))
}

fn behind_grpc(headers: &HeaderMap) -> Option<&[u8]> {
    const GRPC: &[u8] = b"application/grpc";
    // Each request and response is asked, and hardly one has parameters behind that.
    let (grpc, rest) = content_type(headers).trim_ascii_start().split_at_checked(GRPC.len())?;
    grpc.eq_ignore_ascii_case(GRPC).then(|| without_parameters(rest))
}

fn essence(headers: &HeaderMap) -> &[u8] {
    without_parameters(content_type(headers)).trim_ascii_start()
}

fn content_type(headers: &HeaderMap) -> &[u8] {
    headers.get(CONTENT_TYPE).map(HeaderValue::as_bytes).unwrap_or_default()
}

fn without_parameters(content_type: &[u8]) -> &[u8] {
    content_type.split(|byte| *byte == b';').next().unwrap_or_default().trim_ascii_end()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(content_type: &'static str) -> HeaderMap {
        HeaderMap::from_iter([(CONTENT_TYPE, HeaderValue::from_static(content_type))])
    }

    #[test]
    fn a_media_type_is_what_it_is_in_any_case_and_with_any_parameters() {
        assert!(is(&headers("Text/Event-Stream ; charset=utf-8"), b"text/event-stream"));
        assert!(!is(&headers("text/event-streams"), b"text/event-stream"));
        assert!(!is(&HeaderMap::new(), b"text/event-stream"));
    }

    #[test]
    fn grpc_is_known_in_all_its_kinds() {
        let kinds = |content_type| (is_grpc(&headers(content_type)), is_grpc_web(&headers(content_type)));
        for grpc in ["application/grpc", "Application/gRPC", "application/grpc+proto; a=b"] {
            assert_eq!(kinds(grpc), (true, false), "{grpc}");
        }
        for web in ["application/grpc-web", "application/gRPC-Web-text", "application/grpc-web+proto"] {
            assert_eq!(kinds(web), (false, true), "{web}");
        }
        for other in ["", "application/grp", "application/grpcish", "application/grpc-status+json", "text/grpc"] {
            assert_eq!(kinds(other), (false, false), "{other}");
        }
    }
}
