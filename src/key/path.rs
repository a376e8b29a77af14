//! Singular queries of RFC 9535: the JSON paths that select at most one node.

use std::fmt;
use std::iter::Peekable;
use std::str::Chars;

/// How deep a path may go. It is walked recursively, and `serde_json` stops at 128.
const MAX_SEGMENTS: usize = 64;

/// One step of a path.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) enum Segment {
    /// From the start, or from the end where negative.
    Index(i64),
    Name(String),
}

/// The text is not a singular query of RFC 9535 with at most 64 segments.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct InvalidPath {
    reason: &'static str,
    /// In characters.
    position: usize,
}

struct Parser<'a> {
    rest: Peekable<Chars<'a>>,
    position: usize,
}

pub(super) fn parse(path: &str) -> Result<Vec<Segment>, InvalidPath> {
    let mut parser = Parser { rest: path.chars().peekable(), position: 0 };
    if parser.next() != Some('$') {
        return Err(parser.invalid("a path starts with $"));
    }
    let mut segments = Vec::new();
    while parser.rest.peek().is_some() {
        parser.blank();
        segments.push(match parser.next().unwrap_or_default() {
            '.' => Segment::Name(parser.shorthand()?),
            '[' => parser.bracketed()?,
            _ => return Err(parser.invalid("expected . or [")),
        });
        if segments.len() > MAX_SEGMENTS {
            return Err(parser.invalid("a path has at most 64 segments"));
        }
    }
    Ok(segments)
}

// === impl Parser ===

impl Parser<'_> {
    fn next(&mut self) -> Option<char> {
        let next = self.rest.next();
        self.position += usize::from(next.is_some());
        next
    }

    fn invalid(&self, reason: &'static str) -> InvalidPath {
        InvalidPath { reason, position: self.position }
    }

    /// `S` of RFC 9535 §2.1.1.
    fn blank(&mut self) {
        while let Some(' ' | '\t' | '\n' | '\r') = self.rest.peek() {
            self.next();
        }
    }

    /// `member-name-shorthand` of RFC 9535 §2.5.1.1.
    fn shorthand(&mut self) -> Result<String, InvalidPath> {
        let mut name = String::new();
        while let Some(&c) = self.rest.peek() {
            let first = c.is_ascii_alphabetic() || c == '_' || !c.is_ascii();
            if !(first || c.is_ascii_digit() && !name.is_empty()) {
                break;
            }
            name.push(c);
            self.next();
        }
        if name.is_empty() { Err(self.invalid("expected a member name; others go into ['…']")) } else { Ok(name) }
    }

    fn bracketed(&mut self) -> Result<Segment, InvalidPath> {
        self.blank();
        let segment = match self.rest.peek() {
            Some(&quote @ ('\'' | '"')) => {
                self.next();
                Segment::Name(self.quoted(quote)?)
            }
            Some('-' | '0'..='9') => Segment::Index(self.index()?),
            _ => return Err(self.invalid("expected a quoted name or an index: wildcards select more than one node")),
        };
        self.blank();
        match self.next() {
            Some(']') => Ok(segment),
            _ => Err(self.invalid("expected ]")),
        }
    }

    /// `int` of RFC 9535 §2.3.3: no leading zeros, no `-0`, within ±(2⁵³ − 1).
    fn index(&mut self) -> Result<i64, InvalidPath> {
        let mut text = String::new();
        while let Some(&c @ ('-' | '0'..='9')) = self.rest.peek() {
            text.push(c);
            self.next();
        }
        let digits = text.strip_prefix('-').unwrap_or(&text);
        let leading_zero = digits.starts_with('0') && text != "0";
        match text.parse::<i64>() {
            Ok(index) if !leading_zero && index.unsigned_abs() < 1 << 53 => Ok(index),
            _ => Err(self.invalid("not an index")),
        }
    }

    /// `string-literal` of RFC 9535 §2.3.1.1, after its opening quote.
    fn quoted(&mut self, quote: char) -> Result<String, InvalidPath> {
        let mut name = String::new();
        loop {
            match self.next() {
                None => return Err(self.invalid("a quoted name does not end")),
                Some(c) if c == quote => return Ok(name),
                Some('\\') => name.push(self.escape(quote)?),
                Some(c) if c < ' ' => return Err(self.invalid("a control character in a name")),
                Some(c) => name.push(c),
            }
        }
    }

    fn escape(&mut self, quote: char) -> Result<char, InvalidPath> {
        match self.next() {
            Some('b') => Ok('\u{8}'),
            Some('f') => Ok('\u{c}'),
            Some('n') => Ok('\n'),
            Some('r') => Ok('\r'),
            Some('t') => Ok('\t'),
            Some(c @ ('/' | '\\')) => Ok(c),
            Some(c) if c == quote => Ok(c),
            Some('u') => self.unicode(),
            _ => Err(self.invalid("not an escape")),
        }
    }

    /// `\uXXXX`, or a surrogate pair of two.
    fn unicode(&mut self) -> Result<char, InvalidPath> {
        let high = self.hex4()?;
        let units = match high {
            0xD800..=0xDBFF if self.next() == Some('\\') && self.next() == Some('u') => vec![high, self.hex4()?],
            unit => vec![unit],
        };
        let mut decoded = char::decode_utf16(units);
        match (decoded.next(), decoded.next()) {
            (Some(Ok(c)), None) => Ok(c),
            _ => Err(self.invalid("not a pair of surrogates")),
        }
    }

    fn hex4(&mut self) -> Result<u16, InvalidPath> {
        let mut unit = 0;
        for _ in 0..4 {
            let digit = self.next().and_then(|c| c.to_digit(16)).ok_or_else(|| self.invalid("not a hex digit"))?;
            unit = unit * 16 + digit as u16;
        }
        Ok(unit)
    }
}

// === impl InvalidPath ===

impl fmt::Display for InvalidPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (at character {})", self.reason, self.position)
    }
}

impl std::error::Error for InvalidPath {}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(name: &str) -> Segment {
        Segment::Name(name.to_owned())
    }

    #[test]
    fn singular_queries_are_parsed() {
        assert_eq!(parse("$"), Ok(vec![]));
        assert_eq!(parse("$.a_1.é"), Ok(vec![name("a_1"), name("é")]));
        assert_eq!(parse("$.a['b c'][0][-2]"), Ok(vec![name("a"), name("b c"), Segment::Index(0), Segment::Index(-2)]));
        assert_eq!(parse(r#"$["it's"]['a\'b']"#), Ok(vec![name("it's"), name("a'b")]));
        assert_eq!(parse("$ .a\n[ 'b' ]\t[\r0 ]"), Ok(vec![name("a"), name("b"), Segment::Index(0)]));
        assert_eq!(parse(r"$['\u0041\ud83d\ude00\n']"), Ok(vec![name("A😀\n")]));
    }

    #[test]
    fn everything_else_is_refused() {
        for path in [
            "",
            "a",
            "a.b",
            "$.",
            "$..a",
            "$.*",
            "$[*]",
            "$[0:1]",
            "$[?@.a]",
            "$['a','b']",
            "$['a",
            "$[a]",
            "$[01]",
            "$[-0]",
            "$[-]",
            "$[9007199254740992]",
            "$.1a",
            "$.a-b",
            "$ ",
            " $.a",
            "$. a",
            "$.a ",
            r"$['\x']",
            r"$['\ud800']",
            r"$['\udc00']",
            r#"$['\"']"#,
            "$['a'",
            "$[]",
            "$a",
        ] {
            assert!(parse(path).is_err(), "{path} was accepted");
        }
        assert!(parse(&format!("${}", ".a".repeat(64))).is_ok());
        assert!(parse(&format!("${}", ".a".repeat(65))).is_err());
    }
}
