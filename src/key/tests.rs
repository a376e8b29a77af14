use http::Request;

use super::*;

const WEBHOOK: HeaderSyntax = HeaderSyntax::Opaque { max_len: 1024 };
const API: HeaderSyntax = HeaderSyntax::Visible { max_len: 255 };

fn text(text: &str) -> Part {
    Part::Text(Bytes::copy_from_slice(text.as_bytes()))
}

fn number(text: &str) -> Part {
    Part::Number(Bytes::copy_from_slice(text.as_bytes()))
}

fn of_body(source: &KeySource, body: &str) -> Extracted {
    let (head, ()) = Request::new(()).into_parts();
    source.extract(&head, &Bytes::copy_from_slice(body.as_bytes()), WEBHOOK, usize::MAX)
}

fn of_headers(source: &KeySource, headers: &[(&str, &[u8])], syntax: HeaderSyntax) -> Extracted {
    let mut request = Request::builder();
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    let (head, ()) = request.body(()).unwrap().into_parts();
    source.extract(&head, &Bytes::new(), syntax, usize::MAX)
}

fn malformed(extracted: &Extracted) -> bool {
    extracted.is_err()
}

#[test]
fn scalars_are_keys_by_their_type_and_exact_text() {
    let id = json("$.id");
    assert_eq!(of_body(&id, r#"{"id":"1"}"#), Ok(Some(vec![text("1")])));
    assert_eq!(of_body(&id, r#"{"id":1}"#), Ok(Some(vec![number("1")])));
    assert_eq!(of_body(&id, r#"{"id":1.0}"#), Ok(Some(vec![number("1.0")])));
    assert_eq!(of_body(&id, r#"{"id":0}"#), Ok(Some(vec![number("0")])));
    assert_eq!(of_body(&id, r#"{"id":false}"#), Ok(Some(vec![Part::Bool(false)])));
    let long = "123456789012345678901234567890.5";
    assert_eq!(of_body(&id, &format!(r#"{{"id":{long}}}"#)), Ok(Some(vec![number(long)])));
    assert_eq!(of_body(&id, r#"{"id":"a\r\nDEL x"}"#), Ok(Some(vec![text("a\r\nDEL x")])));
    assert_eq!(of_body(&json("$"), r#""whole""#), Ok(Some(vec![text("whole")])));
}

#[test]
fn absent_null_and_empty_are_missing() {
    for body in ["", "{}", r#"{"id":null}"#, r#"{"id":""}"#, r#"{"other":"id"}"#, "[]", "7", "null", r#""id""#] {
        assert_eq!(of_body(&json("$.id"), body), Ok(None), "{body}");
    }
    assert_eq!(of_body(&json("$.a.b"), r#"{"a":"b"}"#), Ok(None));
    assert_eq!(of_body(&from_fn(|_, _| Some("")), ""), Ok(None));
}

#[test]
fn repeated_members_on_the_way_are_malformed_and_elsewhere_they_are_not() {
    let id = json("$.data.id");
    for body in [
        r#"{"data":{"id":1,"id":1}}"#,
        r#"{"data":{"id":1},"data":{"id":1}}"#,
        r#"{"data":{"id":1},"d\u0061ta":{}}"#,
        r#"{"data":{"id":1,"\u0069d":2}}"#,
    ] {
        assert!(malformed(&of_body(&id, body)), "{body}");
    }
    assert_eq!(of_body(&id, r#"{"x":1,"data":{"id":1,"y":2,"y":2},"x":1}"#), Ok(Some(vec![number("1")])));
}

#[test]
fn what_is_not_a_scalar_or_not_json_is_malformed() {
    for body in [
        r#"{"id":{}}"#,
        r#"{"id":[1]}"#,
        r#"{"id":1"#,
        r#"{"id":1} x"#,
        r#"{"id":1}{"id":2}"#,
        "id=1",
        " ",
        "{'id':1}",
        r#"{"id":"\ud800"}"#,
        r#"{"id":01}"#,
        "\u{feff}{}",
    ] {
        assert!(malformed(&of_body(&json("$.id"), body)), "{body}");
    }
}

/// As old senders write it, who know no other encoding than theirs.
#[test]
fn text_that_is_not_utf_8_is_no_matter_where_nobody_looks() {
    let (head, ()) = Request::new(()).into_parts();
    let extract = |body| json("$.id").extract(&head, &Bytes::from_static(body), WEBHOOK, usize::MAX);
    assert_eq!(extract(b"{\"note\":\"caf\xe9\",\"id\":1}"), Ok(Some(vec![number("1")])));
    assert_eq!(extract(b"{\"note\":1e999,\"cafe\":[\"\xc3\xa9\"],\"id\":1}"), Ok(Some(vec![number("1")])));
    assert!(malformed(&extract(b"{\"id\":\"\xff\"}")));
    assert!(malformed(&extract(b"{\"caf\xe9\":2,\"id\":1}")));
}

#[test]
fn depth_is_no_danger() {
    let deep = format!(r#"{{"deep":{}{},"id":1}}"#, "[".repeat(1_000_000), "]".repeat(1_000_000));
    assert_eq!(of_body(&json("$.id"), &deep), Ok(Some(vec![number("1")])));
    assert!(malformed(&of_body(&json("$.deep"), &deep)));
    let nested = (0..64).fold("1".to_owned(), |inner, _| format!(r#"{{"a":{inner}}}"#));
    assert_eq!(of_body(&json(&format!("${}", ".a".repeat(64))), &nested), Ok(Some(vec![number("1")])));
}

#[test]
fn elements_are_found_from_both_ends() {
    let body = r#"{"a":[{"id":1},{"id":2},{"id":3}]}"#;
    assert_eq!(of_body(&json("$.a[0].id"), body), Ok(Some(vec![number("1")])));
    assert_eq!(of_body(&json("$.a[-1].id"), body), Ok(Some(vec![number("3")])));
    assert_eq!(of_body(&json("$.a[-3]['id']").and(json("$.a[1].id")), body), Ok(Some(vec![number("1"), number("2")])));
    assert_eq!(of_body(&json("$.a[3].id"), body), Ok(None));
    assert_eq!(of_body(&json("$.a[-4].id"), body), Ok(None));
}

#[test]
fn a_path_and_what_is_below_it_can_both_be_wanted() {
    let either = json("$.id.value").or(json("$.id"));
    assert_eq!(of_body(&either, r#"{"id":7}"#), Ok(Some(vec![number("7")])));
    assert_eq!(of_body(&either, r#"{"id":{"value":7}}"#), Ok(Some(vec![number("7")])));
    assert!(malformed(&of_body(&either, r#"{"id":{"value":null}}"#)), "it falls back to what is no scalar");
}

#[test]
fn what_a_fallback_would_find_does_not_matter_where_there_is_a_key() {
    let either = json("$.event_id").or(json("$.id"));
    let found = Ok(Some(vec![text("e1")]));
    for rest in [r#""id":2"#, r#""id":{"a":1}"#, r#""id":1,"id":2"#, r#""id":"\ud800""#] {
        assert_eq!(of_body(&either, &format!(r#"{{"event_id":"e1",{rest}}}"#)), found, "{rest}");
    }
    assert!(malformed(&of_body(&either, r#"{"id":1,"id":2}"#)));
    assert!(malformed(&of_body(&either, r#"{"event_id":"e1","event_id":"e1","id":2}"#)));
    assert!(malformed(&of_body(&either, r#"{"event_id":"e1""#)), "no JSON has no key");
    let deep = json("$.event.id").or(json("$.event"));
    assert!(malformed(&of_body(&deep, r#"{"event":{"id":"e1"},"event":{"id":"e2"}}"#)));
}

#[test]
fn a_number_that_no_double_can_hold_is_a_number() {
    let either = json("$.a.b").or(json("$.id"));
    assert_eq!(of_body(&either, r#"{"a":1e999,"id":"x"}"#), Ok(Some(vec![text("x")])));
    assert_eq!(of_body(&either, r#"{"a":[1e999],"id":1e999}"#), Ok(Some(vec![number("1e999")])));
    assert_eq!(of_body(&json("$[-1].id"), r#"[1e999,{"id":1,"x":-1e999}]"#), Ok(Some(vec![number("1")])));
    assert!(malformed(&of_body(&either, r#"{"a":1e999,"id":"x""#)));
}

#[test]
fn a_composite_with_a_missing_part_is_missing() {
    let both = json("$.MessageID").and(json("$.Recipient")).and_optional(json("$.RecordType"));
    assert_eq!(of_body(&both, r#"{"MessageID":"m"}"#), Ok(None));
    assert_eq!(of_body(&both, r#"{"MessageID":"m","Recipient":""}"#), Ok(None));
    let parts = vec![text("m"), text("r"), Part::Absent];
    assert_eq!(of_body(&both, r#"{"MessageID":"m","Recipient":"r"}"#), Ok(Some(parts)));
    let parts = vec![text("m"), text("r"), text("Open")];
    assert_eq!(of_body(&both, r#"{"RecordType":"Open","Recipient":"r","MessageID":"m"}"#), Ok(Some(parts)));
}

#[test]
fn composites_inside_composites_do_not_run_into_each_other() {
    let nested = json("$.a").and(json("$.b")).or(json("$.c")).and(json("$.d").and(json("$.e")).or(json("$.f")));
    let left = of_body(&nested, r#"{"a":"x","b":"y","f":"z"}"#);
    let right = of_body(&nested, r#"{"c":"x","d":"y","e":"z"}"#);
    assert_eq!(left, Ok(Some(vec![Part::Group(vec![text("x"), text("y")]), text("z")])));
    assert_eq!(right, Ok(Some(vec![text("x"), Part::Group(vec![text("y"), text("z")])])));
}

#[test]
fn the_value_counts_and_not_where_an_alternative_found_it() {
    let either = header("X-Id").or(json("$.id"));
    let (head, ()) = Request::builder().header("x-id", "e1").body(()).unwrap().into_parts();
    let by_header = either.extract(&head, &Bytes::from_static(b"not json"), WEBHOOK, usize::MAX);
    assert_eq!(by_header, Ok(Some(vec![text("e1")])));
    assert_eq!(of_body(&either, r#"{"id":"e1"}"#), by_header);
    assert_ne!(of_body(&json("$.a").or(json("$.id")), r#"{"id":"e1"}"#), Ok(None));
}

#[test]
fn a_malformed_alternative_does_not_fall_back() {
    let either = header("X-Id").or(json("$.id"));
    assert!(malformed(&of_headers(&either, &[("x-id", b"a"), ("x-id", b"b")], WEBHOOK)));
}

#[test]
fn webhook_header_keys_are_opaque() {
    let id = header("X-Id");
    assert_eq!(of_headers(&id, &[], WEBHOOK), Ok(None));
    assert_eq!(of_headers(&id, &[("x-id", b"")], WEBHOOK), Ok(None));
    let bytes = Part::Text(Bytes::from_static(b"\"\xff, "));
    assert_eq!(of_headers(&id, &[("x-id", b"\"\xff, ")], WEBHOOK), Ok(Some(vec![bytes])));
    assert_eq!(of_headers(&id, &[("x-id", b"a"), ("x-id", b"a")], WEBHOOK), Ok(Some(vec![text("a")])));
    assert!(of_headers(&id, &[("x-id", &[b'k'; 1024])], WEBHOOK).is_ok());
    assert!(malformed(&of_headers(&id, &[("x-id", &[b'k'; 1025])], WEBHOOK)));
}

#[test]
fn api_header_keys_are_visible_ascii_quoted_or_bare() {
    let id = headers(&["Idempotency-Key", "X-Idempotency-Key"]);
    let one = |value: &[u8]| of_headers(&id, &[("idempotency-key", value)], API);
    assert_eq!(one(b"abc"), Ok(Some(vec![text("abc")])));
    assert_eq!(one(b"\"abc\""), one(b"abc"));
    assert_eq!(one(br#""a\"\\,""#), Ok(Some(vec![text(r#"a"\,"#)])));
    assert_eq!(one(b"\"abc\";p=1;q"), one(b"abc"));
    assert_eq!(one(&[b'k'; 255]), Ok(Some(vec![text(&"k".repeat(255))])));
    for bad in [
        &b""[..],
        b"\"\"",
        b"\"",
        b"\"a",
        b"\"a\"b\"",
        b"\"a\\b\"",
        b"\"a\\\"",
        b"a,b",
        b"a b",
        b"\xffa",
        b"a\tb",
        b"\"abc\";P=1",
        b"\"a b\"",
        b"\"a\", \"a\"",
        &[b'k'; 256],
    ] {
        assert!(malformed(&one(bad)), "{bad:?}");
    }
}

#[test]
fn structured_header_keys_are_quoted_strings_alone() {
    let id = headers(&["Idempotency-Key", "X-Idempotency-Key"]);
    let strict = HeaderSyntax::StructuredString { max_len: 10 };
    let one = |value: &[u8]| of_headers(&id, &[("idempotency-key", value)], strict);
    assert_eq!(one(b"\"abc\""), Ok(Some(vec![text("abc")])));
    assert_eq!(one(b"\"abc\";p=1"), one(b"\"abc\""));
    assert_eq!(one(b" \"abc\" "), one(b"\"abc\""));
    assert_eq!(one(br#""a \"\\,""#), Ok(Some(vec![text(r#"a "\,"#)])));
    // The escapes do not count.
    assert_eq!(one(&[&b"\""[..], &br"\\".repeat(10), b"\""].concat()), Ok(Some(vec![text(&r"\".repeat(10))])));
    assert_eq!(of_headers(&id, &[], strict), Ok(None));
    for bad in [
        &b""[..],
        b"abc",
        b"\"\"",
        b"\"abc",
        b"\"abc\", \"abc\"",
        b"(\"abc\")",
        b"\"abc\" ;p=1",
        b"\"a\"b",
        b"\"\xff\"",
        b"\"a\tb\"",
        b":YWJj:",
        b"%\"abc\"",
        b"1",
        b"\"12345678901\"",
    ] {
        assert!(malformed(&one(bad)), "{bad:?}");
    }
    let two = |a: &[u8], b: &[u8]| of_headers(&id, &[("idempotency-key", a), ("idempotency-key", b)], strict);
    assert_eq!(two(b"\"abc\"", b"\"abc\";p=1"), one(b"\"abc\""));
    assert!(malformed(&two(b"\"abc\"", b"abc")));
    assert!(malformed(&two(b"\"abc\"", b"\"abd\"")));
}

#[test]
fn paths_come_from_configuration_too() {
    let id: Json = "$.id".parse().unwrap();
    assert_eq!(of_body(&id.into(), r#"{"id":1}"#), Ok(Some(vec![number("1")])));
    assert!("$.*".parse::<Json>().is_err());
}

#[test]
fn api_header_names_have_to_agree() {
    let id = headers(&["Idempotency-Key", "X-Idempotency-Key"]);
    let both = |a: &[u8], b: &[u8]| of_headers(&id, &[("idempotency-key", a), ("x-idempotency-key", b)], API);
    assert_eq!(both(b"\"a\"", b"a"), Ok(Some(vec![text("a")])));
    assert!(malformed(&both(b"a", b"b")));
}

#[test]
fn keys_are_shown_and_parsed() {
    let key = Key::new([251; 24]);
    assert_eq!(key.to_string().len(), 32);
    assert_eq!(key.to_string().parse(), Ok(key));
    for bad in ["", "abc", &"a".repeat(31), &"a".repeat(33), &"+".repeat(32)] {
        assert!(bad.parse::<Key>().is_err(), "{bad}");
    }
}

#[test]
fn a_part_that_does_not_pass_is_malformed_and_one_that_is_absent_passes() {
    let short = json("$.a").and_optional(json("$.b").and(json("$.c"))).valid_if(|key| key.len() < 3);
    assert_eq!(of_body(&short, r#"{"a":"x"}"#), Ok(Some(vec![text("x"), Part::Absent])));
    assert!(malformed(&of_body(&short, r#"{"a":"xyz"}"#)));
    assert!(malformed(&of_body(&short, r#"{"a":"x","b":100,"c":1}"#)));
    assert!(malformed(&of_body(&json("$.a").valid_if(|key| key != b"true"), r#"{"a":true}"#)));
    assert_eq!(of_body(&short, "{}"), Ok(None), "missing is not malformed");
    let plain = json("$.a").and(json("$.b")).and(json("$.c"));
    let ruled = json("$.a").and(json("$.b")).valid_if(|_| true).and(json("$.c"));
    let body = r#"{"a":1,"b":2,"c":3}"#;
    assert_eq!(of_body(&plain, body), of_body(&ruled, body), "a rule changes no key");
    // The paths of both sides are still told apart.
    let both = json("$.a").and(json("$.b").valid_if(|key| key == b"2"));
    assert_eq!(of_body(&both, r#"{"a":1,"b":2}"#), Ok(Some(vec![number("1"), number("2")])));
}

#[test]
fn binary_metadata_is_the_bytes_that_it_stands_for() {
    let key = |values: &[&str]| {
        let values: Vec<_> = values.iter().map(|value| ("id-bin", value.as_bytes())).collect();
        of_headers(&metadata("id-bin"), &values, WEBHOOK)
    };
    let bytes = |bytes: &'static [u8]| Ok(Some(vec![Part::Text(Bytes::from_static(bytes))]));
    assert_eq!(key(&["AP8="]), bytes(b"\0\xff"));
    assert_eq!(key(&["AP8"]), bytes(b"\0\xff"), "padded or not");
    assert_eq!(key(&["AP8, AP8="]), bytes(b"\0\xff"), "joined by a proxy");
    assert_eq!(key(&[""]), Ok(None));
    assert!(malformed(&key(&["AP8", "APA="])) && malformed(&key(&["AP8,AAAA"])) && malformed(&key(&["not base64!"])));
    let too_long = "A".repeat(1368);
    assert!(malformed(&key(&[&too_long])), "1026 bytes");
    assert_eq!(
        of_headers(&metadata("id"), &[("id", b"AP8=")], WEBHOOK),
        of_headers(&header("id"), &[("id", b"AP8=")], WEBHOOK)
    );
}

#[test]
fn a_field_of_a_message_is_part_of_a_composite() {
    let source = protobuf([1]).and_optional(protobuf([2]).or(protobuf([3, 1])));
    let extract = |message: &str| of_body(&source, message);
    assert_eq!(extract("\x0a\x01a\x12\x01b"), Ok(Some(vec![text("a"), text("b")])));
    assert_eq!(extract("\x0a\x01a\x1a\x03\x0a\x01c"), Ok(Some(vec![text("a"), text("c")])));
    assert_eq!(extract("\x0a\x01a"), Ok(Some(vec![text("a"), Part::Absent])));
    assert_eq!(extract("\x12\x01b"), Ok(None));
    assert!(source.reads_body() && !metadata("id-bin").reads_body());
}
