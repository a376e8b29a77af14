//! What a JSON text says, however it is spelled: for fingerprints.
//!
//! A number counts by its value, to its last digit, since two amounts must not become one. So this is no
//! `serde_json::Value`, which makes doubles of large numbers; nor does it take a member of a certain name for a text to be
//! parsed in its turn, as a `Value` does where raw values are turned on.

use std::borrow::Cow;
use std::collections::BTreeMap;

use serde_json::value::RawValue;

/// How deep a text may be nested. Each level is looked through once more by those around it.
pub(crate) const MAX_DEPTH: usize = 32;

/// A JSON value, spelled in one way.
#[derive(Debug)]
pub(crate) enum Node<'a> {
    Array(Vec<Self>),
    /// Of a repeated member the last.
    Object(BTreeMap<Cow<'a, str>, Self>),
    Scalar(Cow<'a, str>),
}

impl<'a> Node<'a> {
    /// Nothing where a text is no JSON, or too deep.
    pub(crate) fn parse(text: &'a [u8]) -> Option<Self> {
        Self::of(serde_json::from_slice(text).ok()?, MAX_DEPTH)
    }

    fn of(raw: &'a RawValue, depth: usize) -> Option<Self> {
        let text = raw.get();
        Some(match text.as_bytes() {
            [b'[', ..] => {
                let items: Vec<&RawValue> = serde_json::from_str(text).ok()?;
                let depth = depth.checked_sub(1)?;
                Self::Array(items.into_iter().map(|item| Self::of(item, depth)).collect::<Option<_>>()?)
            }
            [b'{', ..] => {
                let members: BTreeMap<Cow<'_, str>, &RawValue> = serde_json::from_str(text).ok()?;
                let depth = depth.checked_sub(1)?;
                let member = |(name, value)| Some((name, Self::of(value, depth)?));
                Self::Object(members.into_iter().map(member).collect::<Option<_>>()?)
            }
            [b'"', ..] => {
                let string: Cow<'_, str> = serde_json::from_str(text).ok()?;
                Self::Scalar(serde_json::to_string(&string).ok()?.into())
            }
            [b'-' | b'0'..=b'9', ..] => Self::Scalar(number(text)),
            _ => Self::Scalar(text.into()),
        })
    }

    pub(crate) const fn null() -> Self {
        Self::Scalar(Cow::Borrowed("null"))
    }

    /// Spells it out.
    pub(crate) fn write(&self, out: &mut String) {
        let separate = |out: &mut String, position: usize| {
            if position > 0 {
                out.push(',');
            }
        };
        match self {
            Self::Array(items) => {
                out.push('[');
                for (position, item) in items.iter().enumerate() {
                    separate(out, position);
                    item.write(out);
                }
                out.push(']');
            }
            Self::Object(members) => {
                out.push('{');
                for (position, (name, value)) in members.iter().enumerate() {
                    separate(out, position);
                    out.push_str(&serde_json::Value::from(&**name).to_string());
                    out.push(':');
                    value.write(out);
                }
                out.push('}');
            }
            Self::Scalar(text) => out.push_str(text),
        }
    }
}

/// A number as its digits and a power of ten, so that `1.10`, `1.1` and `11e-1` are one.
fn number(text: &str) -> Cow<'_, str> {
    let (sign, unsigned) = text.split_at(usize::from(text.starts_with('-')));
    let (mantissa, exponent) = unsigned.split_once(['e', 'E']).unwrap_or((unsigned, "0"));
    let (whole, fraction) = mantissa.split_once('.').unwrap_or((mantissa, ""));
    let digits = [whole, fraction].concat();
    let significant = digits.trim_start_matches('0').trim_end_matches('0');
    if significant.is_empty() {
        return "0".into();
    }
    let zeros = digits.len() - digits.trim_end_matches('0').len();
    let shift = i64::try_from(zeros).ok().zip(i64::try_from(fraction.len()).ok()).map(|(up, down)| up - down);
    let exponent = exponent.parse::<i64>().ok().zip(shift).and_then(|(exponent, shift)| exponent.checked_add(shift));
    match exponent {
        Some(exponent) => format!("{sign}{significant}e{exponent}").into(),
        // Nobody means that. It is what it is.
        None => text.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spelled(text: &str) -> Option<String> {
        let mut out = String::new();
        Node::parse(text.as_bytes())?.write(&mut out);
        Some(out)
    }

    #[test]
    fn numbers_are_one_by_value_to_the_last_digit() {
        for same in [
            &["1", "1.0", "1e0", "10E-1", "0.1e+1", "1.000"][..],
            &["-120", "-1.2e2", "-12e1"],
            &["0", "-0", "0.0", "0e9", "-0.00E-5"],
            &["100000000000000000001", "1.00000000000000000001e20"],
        ] {
            for text in same {
                assert_eq!(spelled(text), spelled(same[0]), "{text}");
            }
        }
        for (a, b) in [
            ("100000000000000000001", "100000000000000000002"),
            ("0.1", "0.10000000000000001"),
            ("1", "-1"),
            ("1", "10"),
            ("1e99999999999999999999", "1e99999999999999999998"),
            ("9007199254740993", "9007199254740992"),
        ] {
            assert!(spelled(a).is_some() && spelled(a) != spelled(b), "{a} is {b}");
        }
    }

    #[test]
    fn a_member_of_any_name_is_a_member() {
        let (raw, plain) = (r#"{"$serde_json::private::RawValue":"{\"amount\":1}"}"#, r#"{"amount":1}"#);
        assert_eq!(spelled(raw).as_deref(), Some(raw));
        assert_ne!(spelled(raw), spelled(plain));
        let number = r#"{"$serde_json::private::Number":"1"}"#;
        assert_eq!(spelled(number).as_deref(), Some(number));
    }

    #[test]
    fn depth_is_bounded_whatever_stands_inside() {
        let nested = |depth: usize| format!("{}1{}", "[".repeat(depth), "]".repeat(depth));
        assert!(spelled(&nested(MAX_DEPTH)).is_some());
        assert!(spelled(&nested(MAX_DEPTH + 1)).is_none());
        assert!(spelled(&nested(100_000)).is_none());
    }
}
