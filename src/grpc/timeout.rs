//! How long a call may take, by its client.

use std::time::Duration;

use http::HeaderMap;

use crate::store::MAX_DURATION;

/// What `grpc-timeout` says, if it says something (gRPC over HTTP/2: 1 to 8 digits and a unit).
pub(crate) fn deadline(headers: &HeaderMap) -> Option<Duration> {
    let value = headers.get("grpc-timeout")?.as_bytes();
    let (unit, digits) = value.split_last()?;
    if digits.len() > 8 || !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let number: u64 = std::str::from_utf8(digits).ok()?.parse().ok()?;
    let timeout = match unit {
        b'H' => Duration::from_secs(number * 60 * 60),
        b'M' => Duration::from_secs(number * 60),
        b'S' => Duration::from_secs(number),
        b'm' => Duration::from_millis(number),
        b'u' => Duration::from_micros(number),
        b'n' => Duration::from_nanos(number),
        _ => return None,
    };
    Some(timeout.min(MAX_DURATION))
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    #[test]
    fn a_timeout_is_digits_and_a_unit() {
        let deadline = |value| {
            let headers = HeaderMap::from_iter([("grpc-timeout".parse().unwrap(), HeaderValue::from_static(value))]);
            deadline(&headers)
        };
        assert_eq!(deadline("1H"), Some(Duration::from_secs(3600)));
        assert_eq!(deadline("2M"), Some(Duration::from_secs(120)));
        assert_eq!(deadline("3S"), Some(Duration::from_secs(3)));
        assert_eq!(deadline("100m"), Some(Duration::from_millis(100)));
        assert_eq!(deadline("5u"), Some(Duration::from_micros(5)));
        assert_eq!(deadline("99999999n"), Some(Duration::from_nanos(99_999_999)));
        assert_eq!(deadline("99999999H"), Some(MAX_DURATION));
        for none in ["", "S", "1", "1s", "-1S", "+1S", "1.5S", "100000000S", " 1S"] {
            assert_eq!(deadline(none), None, "{none}");
        }
    }
}
