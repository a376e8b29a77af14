//! What a message says of its connection.

use http::header::{self, HeaderMap, HeaderName};
use http::{Version, request};

/// Whether a request asks for another protocol.
///
/// RFC 9110 §7.8: HTTP/1.1 has them, HTTP/1.0 must ignore them, and HTTP/2 has none but those by CONNECT.
///
/// An offer of HTTP/2 or of TLS is none: there are clients that make it with any request, and servers ignore it (RFC 9113
/// §3.1; RFC 2817, which nobody serves and Apache HttpClient 5.4 offers).
pub(crate) fn is_upgrade(head: &request::Parts) -> bool {
    let is_http = |token: &[u8]| {
        let protocol = token.split(|byte| *byte == b'/').next().unwrap_or_default();
        [&b"h2c"[..], b"h2", b"http", b"tls"].iter().any(|http| protocol.eq_ignore_ascii_case(http))
    };
    head.version == Version::HTTP_11
        && tokens(&head.headers, &header::CONNECTION).any(|token| token.eq_ignore_ascii_case(b"upgrade"))
        && tokens(&head.headers, &header::UPGRADE).any(|token| !is_http(token))
}

/// The members of a header that is a list.
pub(crate) fn tokens<'a>(headers: &'a HeaderMap, name: &HeaderName) -> impl Iterator<Item = &'a [u8]> {
    let lines = headers.get_all(name).iter();
    let members = lines.flat_map(|line| line.as_bytes().split(|byte| *byte == b','));
    members.map(<[u8]>::trim_ascii).filter(|token| !token.is_empty())
}
