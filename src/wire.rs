//! The wire format of protocol buffers, without generated code.
//!
//! Written down at <https://protobuf.dev/programming-guides/encoding/>.

/// How deep groups may be nested, as in Google's parsers.
const MAX_DEPTH: usize = 100;

/// The fields of a message, in the order in which they stand.
pub(crate) struct Fields<'a> {
    rest: &'a [u8],
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Field<'a> {
    pub(crate) number: u32,
    pub(crate) value: Value<'a>,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Value<'a> {
    /// A string, bytes, a message, or packed numbers.
    Bytes(&'a [u8]),
    Fixed32(u32),
    Fixed64(u64),
    /// A message that its end delimits (`message_encoding = DELIMITED` since edition 2023).
    Group(&'a [u8]),
    Varint(u64),
}

/// It is no message.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct NotProtobuf;

enum Token<'a> {
    Field(Value<'a>),
    GroupEnd,
    GroupStart,
}

// === impl Fields ===

impl<'a> Fields<'a> {
    pub(crate) fn of(message: &'a [u8]) -> Self {
        Self { rest: message }
    }

    fn next_field(&mut self) -> Result<Option<Field<'a>>, NotProtobuf> {
        if self.rest.is_empty() {
            return Ok(None);
        }
        let (number, token) = self.token()?;
        let value = match token {
            Token::Field(value) => value,
            Token::GroupStart => Value::Group(self.group(number)?),
            Token::GroupEnd => return Err(NotProtobuf),
        };
        Ok(Some(Field { number, value }))
    }

    /// What stands in a group that has begun, to its end and without it.
    fn group(&mut self, number: u32) -> Result<&'a [u8], NotProtobuf> {
        let inner = self.rest;
        let mut open = vec![number];
        loop {
            let before = self.rest.len();
            match self.token()? {
                (_, Token::Field(_)) => {}
                (number, Token::GroupStart) if open.len() < MAX_DEPTH => open.push(number),
                (number, Token::GroupEnd) if open.pop() == Some(number) => {}
                (_, Token::GroupStart | Token::GroupEnd) => return Err(NotProtobuf),
            }
            if open.is_empty() {
                return inner.get(..inner.len() - before).ok_or(NotProtobuf);
            }
        }
    }

    fn token(&mut self) -> Result<(u32, Token<'a>), NotProtobuf> {
        let tag = u32::try_from(self.varint()?).map_err(|_| NotProtobuf)?;
        let number = tag >> 3;
        if number == 0 {
            return Err(NotProtobuf);
        }
        let token = match tag & 7 {
            0 => Token::Field(Value::Varint(self.varint()?)),
            1 => Token::Field(Value::Fixed64(u64::from_le_bytes(self.array()?))),
            2 => {
                let len = usize::try_from(self.varint()?).map_err(|_| NotProtobuf)?;
                let (bytes, rest) = self.rest.split_at_checked(len).ok_or(NotProtobuf)?;
                self.rest = rest;
                Token::Field(Value::Bytes(bytes))
            }
            3 => Token::GroupStart,
            4 => Token::GroupEnd,
            5 => Token::Field(Value::Fixed32(u32::from_le_bytes(self.array()?))),
            _ => return Err(NotProtobuf),
        };
        Ok((number, token))
    }

    fn varint(&mut self) -> Result<u64, NotProtobuf> {
        let mut value = 0;
        for shift in (0..u64::BITS).step_by(7) {
            let [byte] = self.array()?;
            let low = u64::from(byte & 0x7f);
            if low << shift >> shift != low {
                return Err(NotProtobuf);
            }
            value |= low << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err(NotProtobuf)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], NotProtobuf> {
        let (array, rest) = self.rest.split_first_chunk().ok_or(NotProtobuf)?;
        self.rest = rest;
        Ok(*array)
    }
}

impl<'a> Iterator for Fields<'a> {
    type Item = Result<Field<'a>, NotProtobuf>;

    fn next(&mut self) -> Option<Self::Item> {
        let field = self.next_field().transpose();
        if let Some(Err(NotProtobuf)) = field {
            self.rest = &[];
        }
        field
    }
}

// === writing ===

/// Appends a number, unless it is 0, which goes without saying.
pub(crate) fn put_varint(message: &mut Vec<u8>, number: u32, value: u64) {
    if value != 0 {
        put_raw_varint(message, u64::from(number) << 3);
        put_raw_varint(message, value);
    }
}

/// Appends a string, bytes or a message.
pub(crate) fn put_bytes(message: &mut Vec<u8>, number: u32, value: &[u8]) {
    put_raw_varint(message, u64::from(number) << 3 | 2);
    put_raw_varint(message, value.len() as u64);
    message.extend_from_slice(value);
}

fn put_raw_varint(message: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        message.push(value as u8 | 0x80);
        value >>= 7;
    }
    message.push(value as u8);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn read(message: &[u8]) -> Result<Vec<Field<'_>>, NotProtobuf> {
        Fields::of(message).collect()
    }

    #[test]
    fn fields_of_every_type_are_read() {
        let message = b"\x08\x96\x01\x12\x03abc\x1d\x01\0\0\0\x21\x02\0\0\0\0\0\0\0";
        let fields = read(message).unwrap();
        let expected = [Value::Varint(150), Value::Bytes(b"abc"), Value::Fixed32(1), Value::Fixed64(2)];
        assert_eq!(fields.iter().map(|field| field.number).collect::<Vec<_>>(), [1, 2, 3, 4]);
        assert_eq!(fields.iter().map(|field| field.value).collect::<Vec<_>>(), expected);
    }

    #[test]
    fn a_group_is_what_stands_between_its_ends() {
        let fields = read(b"\x0b\x13\x08\x01\x14\x0c\x08\x02").unwrap();
        let group = Value::Group(b"\x13\x08\x01\x14");
        assert_eq!(fields, [Field { number: 1, value: group }, Field { number: 1, value: Value::Varint(2) }]);
        for broken in [&b"\x0b"[..], b"\x0c", b"\x0b\x14", b"\x0b\x13\x0c\x14"] {
            assert_eq!(read(broken), Err(NotProtobuf));
        }
        assert_eq!(read(&[0x0b; MAX_DEPTH + 1]), Err(NotProtobuf));
        let deep = [[0x0b; MAX_DEPTH], [0x0c; MAX_DEPTH]].concat();
        assert_eq!(read(&deep), Ok(vec![Field { number: 1, value: Value::Group(&deep[1..deep.len() - 1]) }]));
    }

    #[test]
    fn what_is_no_message_is_told_from_one() {
        let broken: [&[u8]; 9] = [
            b"\x08",                                             // a field without its value
            b"\x00\x01",                                         // number 0
            b"\x0e\x01",                                         // a type that there is not
            b"\x12\x04abc",                                      // longer than the message
            b"\x12\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",     // much longer
            b"\x1d\x01\0\0",                                     // half a number
            b"\x08\xff\xff\xff\xff\xff\xff\xff\xff\xff\x02",     // more than 64 bits
            b"\x08\x80\x80\x80\x80\x80\x80\x80\x80\x80\x80\x00", // more than 10 bytes
            b"\x80\x80\x80\x80\x10\x01",                         // a number of more than 29 bits
        ];
        for broken in broken {
            assert_eq!(read(broken), Err(NotProtobuf), "{broken:x?}");
        }
        assert_eq!(read(b""), Ok(vec![]));
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(number in 1u32..1 << 29, value: u64, bytes: Vec<u8>) {
            let mut message = Vec::new();
            put_varint(&mut message, number, value);
            put_bytes(&mut message, number, &bytes);
            let fields = read(&message).unwrap();
            let last = Field { number, value: Value::Bytes(&bytes) };
            let expected = [Field { number, value: Value::Varint(value) }, last];
            prop_assert_eq!(&fields[..], &expected[usize::from(value == 0)..]);
        }

        #[test]
        fn any_bytes_end(message: Vec<u8>) {
            prop_assert!(Fields::of(&message).count() <= message.len());
        }
    }
}
