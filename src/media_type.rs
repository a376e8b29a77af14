//! What kind of content a message says it has.

use http::header::{CONTENT_TYPE, HeaderMap, HeaderValue};

/// Whether it is this media type, whatever its parameters are (RFC 9110 §8.3.1: in any case).
pub(crate) fn is(headers: &HeaderMap, media_type: &[u8]) -> bool {
    essence(headers).eq_ignore_ascii_case(media_type)
}

/// Whether it is gRPC in one of its encodings and framings: `application/grpc`, `application/grpc+proto`,
/// `application/grpc-web-text`.
pub(crate) fn is_grpc(headers: &HeaderMap) -> bool {
    const GRPC: &[u8] = b"application/grpc";
    let essence = essence(headers);
    let Some((grpc, suffix)) = essence.split_at_checked(GRPC.len()) else { return false };
    let is_known = match suffix {
        [] | [b'+', ..] => true,
        _ => suffix.get(..4).is_some_and(|web| web.eq_ignore_ascii_case(b"-web")),
    };
    grpc.eq_ignore_ascii_case(GRPC) && is_known
}

fn essence(headers: &HeaderMap) -> &[u8] {
    let content_type = headers.get(CONTENT_TYPE).map(HeaderValue::as_bytes).unwrap_or_default();
    content_type.split(|byte| *byte == b';').next().unwrap_or_default().trim_ascii()
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
        for grpc in ["application/grpc", "Application/gRPC", "application/grpc+proto; a=b", "application/gRPC-Web-text"]
        {
            assert!(is_grpc(&headers(grpc)), "{grpc}");
        }
        for other in ["", "application/grp", "application/grpcish", "application/grpc-status+json", "text/grpc"] {
            assert!(!is_grpc(&headers(other)), "{other}");
        }
    }
}
