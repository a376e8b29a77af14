//! A key in a form: in the query, or in the body.

use std::borrow::Cow;
use std::convert::Infallible;
use std::future::ready;

use bytes::Bytes;
use futures_util::FutureExt as _;
use futures_util::stream;
use http::{HeaderMap, HeaderValue, Uri, header};
use multer::{Field, Multipart};
use percent_encoding::percent_decode;

use super::{Found, Malformed, Part};
use crate::media_type;

/// How many parts a multipart body may have.
const MAX_PARTS: usize = 1024;

/// What has been found of a field so far.
type Value = Result<Option<Bytes>, Malformed>;

/// The parameter of this name.
pub(super) fn query(uri: &Uri, name: &str) -> Found {
    let mut found = [Ok(None)];
    let wanted = [name.to_owned()];
    urlencoded(uri.query().unwrap_or_default().as_bytes(), &wanted, &mut found);
    let [value] = found;
    value.map(part)
}

/// What each of `fields` is in `body`, in their order; `None` where it is missing. What one of them is says nothing about the
/// others.
pub(super) fn select(headers: &HeaderMap, body: &Bytes, fields: &[String]) -> Vec<Found> {
    let mut found = vec![Ok(None); fields.len()];
    if media_type::is(headers, b"multipart/form-data") {
        if let Err(unreadable) = multipart(headers, body, fields, &mut found) {
            found.fill(Err(unreadable));
        }
    } else if media_type::is(headers, b"application/x-www-form-urlencoded") || body.iter().all(is_of_a_query) {
        urlencoded(body, fields, &mut found);
    }
    found.into_iter().map(|value| value.map(part)).collect()
}

/// RFC 3986 §3.4. A text inside JSON has a quote before it, and one inside XML an angle bracket: neither is here.
fn is_of_a_query(byte: &u8) -> bool {
    byte.is_ascii_alphanumeric() || b"-._~%!$&'()*+,;=:@/?".contains(byte)
}

/// An empty value is no key.
fn part(value: Option<Bytes>) -> Option<Part> {
    value.filter(|value| !value.is_empty()).map(Part::Text)
}

/// Takes down a value for every field that has this name.
fn take_down(name: &[u8], value: &Result<Bytes, Malformed>, fields: &[String], found: &mut [Value]) {
    for (_, slot) in fields.iter().zip(found).filter(|(field, _)| field.as_bytes() == name) {
        *slot = match (&*slot, value) {
            (Ok(None), value) => value.clone().map(Some),
            (Ok(Some(first)), Ok(value)) if first == value => continue,
            (Ok(Some(_)), Ok(_)) => Err(Malformed("two different keys")),
            (Err(malformed), _) | (_, Err(malformed)) => Err(*malformed),
        };
    }
}

fn urlencoded(text: &[u8], fields: &[String], found: &mut [Value]) {
    for pair in text.split(|byte| *byte == b'&') {
        let mut halves = pair.splitn(2, |byte| *byte == b'=');
        let name = decoded(halves.next().unwrap_or_default());
        if fields.iter().any(|field| field.as_bytes() == &*name) {
            let value = decoded(halves.next().unwrap_or_default());
            take_down(&name, &Ok(Bytes::from(value.into_owned())), fields, found);
        }
    }
}

/// The bytes that were meant. They stay bytes: a lossy conversion would make one key of two.
fn decoded(text: &[u8]) -> Cow<'_, [u8]> {
    if text.contains(&b'+') {
        let spaced: Vec<u8> = text.iter().map(|&byte| if byte == b'+' { b' ' } else { byte }).collect();
        return Cow::Owned(percent_decode(&spaced).collect());
    }
    percent_decode(text).into()
}

fn multipart(headers: &HeaderMap, body: &Bytes, fields: &[String], found: &mut [Value]) -> Result<(), Malformed> {
    let unreadable = Malformed("the body is not the multipart form that it is declared to be");
    let content_type = headers.get(header::CONTENT_TYPE).map(HeaderValue::as_bytes).unwrap_or_default();
    let boundary = std::str::from_utf8(content_type).ok().and_then(|text| multer::parse_boundary(text).ok());
    let whole = stream::once(ready(Ok::<_, Infallible>(body.clone())));
    let mut form = Multipart::new(whole, boundary.ok_or(unreadable)?);
    for _ in 0..=MAX_PARTS {
        // All of the body is there, so that nothing is ever pending.
        let Some(Ok(part)) = form.next_field().now_or_never() else { return Err(unreadable) };
        let Some(part) = part else { return Ok(()) };
        let Some(name) = part.name().filter(|name| fields.iter().any(|field| field == name)) else { continue };
        let (name, is_file) = (name.to_owned(), is_file(&part));
        let Some(Ok(value)) = part.bytes().now_or_never() else { return Err(unreadable) };
        let value = if is_file { Err(Malformed("the key is a file")) } else { Ok(value) };
        take_down(name.as_bytes(), &value, fields, found);
    }
    Err(Malformed("the body has too many parts"))
}

/// Whether a part has the name of a file, in the way of RFC 7578 §4.2 or, against its advice, in that of RFC 5987.
fn is_file(part: &Field<'_>) -> bool {
    let disposition = part.headers().get(header::CONTENT_DISPOSITION).map(HeaderValue::as_bytes).unwrap_or_default();
    let has_extended = disposition.split(|byte| *byte == b';').any(|parameter| {
        let name = parameter.split(|byte| *byte == b'=').next().unwrap_or_default();
        name.trim_ascii().eq_ignore_ascii_case(b"filename*")
    });
    part.file_name().is_some() || has_extended
}

#[cfg(test)]
mod tests {
    use http::Request;

    use super::*;
    use crate::key::{self, Extracted, HeaderSyntax, KeySource};

    const MULTIPART: &str = "multipart/form-data; boundary=xx";
    const URLENCODED: &str = "application/x-www-form-urlencoded";

    fn text(bytes: &[u8]) -> Part {
        Part::Text(Bytes::copy_from_slice(bytes))
    }

    fn key(bytes: &[u8]) -> Extracted {
        Ok(Some(vec![text(bytes)]))
    }

    fn extract(source: &KeySource, uri: &str, content_type: &str, body: impl AsRef<[u8]>) -> Extracted {
        let mut request = Request::post(uri);
        if !content_type.is_empty() {
            request = request.header("content-type", content_type);
        }
        let (head, ()) = request.body(()).unwrap().into_parts();
        let body = Bytes::copy_from_slice(body.as_ref());
        source.extract(&head, &body, HeaderSyntax::Opaque { max_len: 1024 }, usize::MAX)
    }

    fn of_query(query: &str) -> Extracted {
        extract(&key::query("id"), &format!("/hooks?{query}"), "", "")
    }

    fn of_form(content_type: &str, body: impl AsRef<[u8]>) -> Extracted {
        extract(&key::form("id"), "/", content_type, body)
    }

    /// A multipart body of these parts, each a head and a value.
    fn parts(parts: &[(&str, &str)]) -> String {
        let part = |(head, value): &(&str, &str)| format!("--xx\r\n{head}\r\n\r\n{value}\r\n");
        parts.iter().map(part).collect::<String>() + "--xx--\r\n"
    }

    fn field(name: &str) -> String {
        format!("Content-Disposition: form-data; name=\"{name}\"")
    }

    #[test]
    fn parameters_are_compared_by_their_exact_bytes() {
        assert_eq!(of_query("id=e-1"), key(b"e-1"));
        assert_eq!(of_query("a=b&id=e+1%2B%20"), key(b"e 1+ "));
        assert_eq!(of_query("%69d=e%3D1=2"), key(b"e=1=2"));
        assert_eq!(of_query("id=%zz%2"), key(b"%zz%2"));
        // A lossy conversion would make these one key.
        assert_eq!(of_query("id=%ff"), key(b"\xff"));
        assert_eq!(of_query("id=%fe"), key(b"\xfe"));
        assert_eq!(of_query("id=a;id=b"), key(b"a;id=b"));
    }

    #[test]
    fn absent_and_empty_parameters_are_missing_and_different_ones_malformed() {
        for query in ["", "id", "id=", "id=&id", "ID=1", "id%00=1", "xid=1&idx=1", "=id", "&&"] {
            assert_eq!(of_query(query), Ok(None), "{query}");
            assert_eq!(of_form(URLENCODED, query), Ok(None), "{query}");
        }
        assert_eq!(extract(&key::query("id"), "/", "", "id=1"), Ok(None));
        assert_eq!(extract(&key::form("id"), "/?id=1", "", ""), Ok(None));
        for query in ["id=a&id=b", "id=a&id=", "id&i%64=b"] {
            assert!(of_query(query).is_err(), "{query}");
            assert!(of_form(URLENCODED, query).is_err(), "{query}");
        }
        assert_eq!(of_query("id=a&x=1&id=%61"), key(b"a"));
        assert_eq!(of_form(URLENCODED, "id=a&x=1&id=%61"), key(b"a"));
    }

    #[test]
    fn only_what_could_be_a_form_is_read_as_one() {
        for content_type in ["", URLENCODED, "Application/X-WWW-Form-Urlencoded ;charset=utf-8", "application/json"] {
            assert_eq!(of_form(content_type, "note=%7B&id=e+1"), key(b"e 1"), "{content_type}");
        }
        for text in [r#"{"note":"a&id=b&c"}"#, r#""&id=b&""#, "<a>&id=b&</a>", "a\n&id=b", "[&id=b", "\u{fc}&id=b"] {
            for content_type in ["", "application/json", "text/plain", "multipart/mixed; boundary=xx"] {
                assert_eq!(of_form(content_type, text), Ok(None), "{content_type}: {text}");
            }
        }
        // What is declared as a form is one, as careless as its sender may be.
        assert_eq!(of_form(URLENCODED, "note=J\u{fc}rgen&id=my key"), key(b"my key"));
        assert_eq!(of_form(URLENCODED, r#"{"id":"e"}"#), Ok(None));
    }

    #[test]
    fn fields_of_a_multipart_form_are_found() {
        let file = "Content-Disposition: form-data; name=\"scan\"; filename=\"id\"\r\nContent-Type: image/png";
        let body = parts(&[(file, "id=x"), (&field("id"), "e&1+%20\r\n"), (&field("other"), "1")]);
        assert_eq!(of_form(MULTIPART, &body), key(b"e&1+%20\r\n"));
        assert_eq!(of_form("Multipart/Form-Data; charset=utf-8; boundary=\"xx\"", &body), key(b"e&1+%20\r\n"));
        let bytes = [b"--xx\r\n", field("id").as_bytes(), b"\r\n\r\n\xff\x00\r\n--xx--"].concat();
        assert_eq!(of_form(MULTIPART, bytes), key(b"\xff\x00"));
        assert_eq!(of_form(MULTIPART, parts(&[(&field("id"), "a"), (&field("id"), "a")])), key(b"a"));
        for missing in [parts(&[]), parts(&[(file, "")]), parts(&[(&field("id"), "")]), parts(&[("X: id", "a")])] {
            assert_eq!(of_form(MULTIPART, &missing), Ok(None), "{missing}");
        }
    }

    #[test]
    fn what_is_no_multipart_form_is_malformed() {
        let good = parts(&[(&field("id"), "a")]);
        for content_type in ["multipart/form-data", "multipart/form-data; boundary=yy", "multipart/form-data; =;"] {
            assert!(of_form(content_type, &good).is_err(), "{content_type}");
        }
        for cut in 0..good.len() - 4 {
            assert!(of_form(MULTIPART, &good[..cut]).is_err(), "{cut} bytes were read");
        }
        let file = "Content-Disposition: form-data; name=\"id\"; filename=\"\"";
        let named_at_length = "Content-Disposition: form-data; name=\"id\"; FileName*=UTF-8''a.png";
        for bad in [
            parts(&[(named_at_length, "a")]),
            parts(&[(&field("id"), "a"), (&field("id"), "b")]),
            parts(&[(&field("id"), ""), (&field("id"), "b")]),
            parts(&[(file, "a")]),
            parts(&[(&field("id"), "a"), ("no header", "a")]),
        ] {
            assert!(of_form(MULTIPART, &bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn what_a_fallback_would_find_does_not_matter_where_there_is_a_key() {
        let either = key::form("token").or(key::form("id"));
        assert_eq!(extract(&either, "/", URLENCODED, "token=t&id=1&id=2"), key(b"t"));
        assert!(extract(&either, "/", URLENCODED, "id=1&id=2").is_err());
        let file = "Content-Disposition: form-data; name=\"id\"; filename=\"x\"";
        assert_eq!(extract(&either, "/", MULTIPART, parts(&[(file, "a"), (&field("token"), "t")])), key(b"t"));
        let cut = parts(&[(&field("token"), "t")]);
        assert!(extract(&either, "/", MULTIPART, &cut[..cut.len() - 6]).is_err());
    }

    #[test]
    fn parts_are_bounded() {
        let of_parts = |count: usize| {
            let field = field("x");
            let many = vec![(field.as_str(), "1"); count];
            of_form(MULTIPART, parts(&many))
        };
        assert_eq!(of_parts(MAX_PARTS), Ok(None));
        assert!(of_parts(MAX_PARTS + 1).is_err());
    }

    #[test]
    fn forms_go_together_with_other_sources() {
        let order = key::form("user").and(key::form("id")).and_optional(key::query("v"));
        let found = extract(&order, "/?v=2", URLENCODED, "id=e&user=u");
        assert_eq!(found, Ok(Some(vec![text(b"u"), text(b"e"), text(b"2")])));
        assert_eq!(extract(&order, "/?v=2", URLENCODED, "id=e"), Ok(None));

        let either = key::json("$.a").and(key::form("x")).or(key::form("id")).or(key::json("$.id"));
        assert!(extract(&either, "/", "", "id=e").is_err(), "a form is no JSON");
        assert_eq!(extract(&either, "/", "", r#"{"id":"e"}"#), key(b"e"));
        let either = key::form("no").or(key::form("id")).or(key::json("$.no")).or(key::json("$.id"));
        assert_eq!(extract(&either, "/", "", "id=e"), key(b"e"));
        assert_eq!(extract(&either, "/", "", r#"{"id":"e"}"#), key(b"e"));

        assert!(either.reads_body() && order.reads_body() && key::form("id").reads_body());
        assert!(!key::query("id").or(key::header("x-id")).reads_body());
    }
}
