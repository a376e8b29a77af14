//! Which methods are unary.

use std::collections::HashSet;
use std::fmt;

use crate::wire::{Field, Fields, NotProtobuf, Value};

/// The paths of unary methods.
#[derive(Clone, Debug, Default)]
pub(crate) struct Methods(HashSet<String>);

/// It is no encoded `google.protobuf.FileDescriptorSet`.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct InvalidDescriptors(());

/// What `google/protobuf/descriptor.proto` says of a method, as far as it matters here.
#[derive(Default)]
struct Method<'a> {
    name: &'a str,
    streams: bool,
    is_safe: bool,
}

/// The numbers of the fields in `google/protobuf/descriptor.proto`.
mod number {
    pub(super) const FILE_DESCRIPTOR_SET_FILE: u32 = 1;
    pub(super) const FILE_PACKAGE: u32 = 2;
    pub(super) const FILE_SERVICE: u32 = 6;
    pub(super) const SERVICE_NAME: u32 = 1;
    pub(super) const SERVICE_METHOD: u32 = 2;
    pub(super) const METHOD_NAME: u32 = 1;
    pub(super) const METHOD_OPTIONS: u32 = 4;
    pub(super) const METHOD_CLIENT_STREAMING: u32 = 5;
    pub(super) const METHOD_SERVER_STREAMING: u32 = 6;
    pub(super) const OPTIONS_IDEMPOTENCY_LEVEL: u32 = 34;
}

/// `MethodOptions.IdempotencyLevel`: the method only reads.
const NO_SIDE_EFFECTS: u64 = 1;

// === impl Methods ===

impl Methods {
    pub(crate) fn contains(&self, path: &str) -> bool {
        self.0.contains(path)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Takes a method in, unless `path` is not `/package.Service/Method`.
    pub(crate) fn insert(&mut self, path: &str) -> bool {
        let parts = path.strip_prefix('/').and_then(|path| path.split_once('/'));
        let is_path =
            parts.is_some_and(|(service, method)| !service.is_empty() && !method.is_empty() && !method.contains('/'));
        if is_path {
            self.0.insert(path.to_owned());
        }
        is_path
    }

    /// Takes in every unary method of a descriptor set that does not declare itself free of effects.
    pub(crate) fn insert_all(&mut self, descriptors: &[u8]) -> Result<(), InvalidDescriptors> {
        for file in messages(descriptors, number::FILE_DESCRIPTOR_SET_FILE)? {
            let package = text(file, number::FILE_PACKAGE)?;
            for service in messages(file, number::FILE_SERVICE)? {
                let name = text(service, number::SERVICE_NAME)?;
                let dot = if package.is_empty() { "" } else { "." };
                for method in messages(service, number::SERVICE_METHOD)? {
                    let method = Method::read(method)?;
                    if !method.streams && !method.is_safe {
                        self.0.insert(format!("/{package}{dot}{name}/{}", method.name));
                    }
                }
            }
        }
        Ok(())
    }
}

// === impl Method ===

impl<'a> Method<'a> {
    fn read(method: &'a [u8]) -> Result<Self, InvalidDescriptors> {
        let mut read = Self { name: text(method, number::METHOD_NAME)?, ..Self::default() };
        for field in Fields::of(method) {
            match field? {
                Field { number: number::METHOD_CLIENT_STREAMING | number::METHOD_SERVER_STREAMING, value } => {
                    read.streams |= value != Value::Varint(0);
                }
                Field { number: number::METHOD_OPTIONS, value: Value::Bytes(options) } => {
                    for option in Fields::of(options) {
                        let option = option?;
                        if option.number == number::OPTIONS_IDEMPOTENCY_LEVEL {
                            read.is_safe = option.value == Value::Varint(NO_SIDE_EFFECTS);
                        }
                    }
                }
                _ => {}
            }
        }
        Ok(read)
    }
}

fn messages(message: &[u8], number: u32) -> Result<Vec<&[u8]>, InvalidDescriptors> {
    let mut found = Vec::new();
    for field in Fields::of(message) {
        match field? {
            Field { number: there, value: Value::Bytes(inner) } if there == number => found.push(inner),
            Field { number: there, .. } if there == number => return Err(InvalidDescriptors(())),
            _ => {}
        }
    }
    Ok(found)
}

/// The last one counts.
fn text(message: &[u8], number: u32) -> Result<&str, InvalidDescriptors> {
    let last = messages(message, number)?.pop().unwrap_or_default();
    std::str::from_utf8(last).map_err(|_| InvalidDescriptors(()))
}

// === impl InvalidDescriptors ===

impl From<NotProtobuf> for InvalidDescriptors {
    fn from(NotProtobuf: NotProtobuf) -> Self {
        Self(())
    }
}

impl fmt::Display for InvalidDescriptors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("not an encoded google.protobuf.FileDescriptorSet")
    }
}

impl std::error::Error for InvalidDescriptors {}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::{put_bytes, put_varint};

    fn message(fields: &[(u32, &[u8])]) -> Vec<u8> {
        let mut message = Vec::new();
        fields.iter().for_each(|(number, bytes)| put_bytes(&mut message, *number, bytes));
        message
    }

    fn method(name: &str, flags: &[(u32, u64)], idempotency_level: u64) -> Vec<u8> {
        let mut options = Vec::new();
        put_varint(&mut options, number::OPTIONS_IDEMPOTENCY_LEVEL, idempotency_level);
        let mut method = message(&[(number::METHOD_NAME, name.as_bytes()), (number::METHOD_OPTIONS, &options)]);
        flags.iter().for_each(|(number, flag)| put_varint(&mut method, *number, *flag));
        method
    }

    #[test]
    fn unary_methods_are_read_from_descriptors() {
        let methods = [
            method("Charge", &[], 0),
            method("Refund", &[], 2),
            method("Look", &[], NO_SIDE_EFFECTS),
            method("Watch", &[(number::METHOD_SERVER_STREAMING, 1)], 0),
            method("Upload", &[(number::METHOD_CLIENT_STREAMING, 1)], 0),
        ];
        let mut service = message(&[(number::SERVICE_NAME, b"Payments")]);
        methods.iter().for_each(|method| put_bytes(&mut service, number::SERVICE_METHOD, method));
        let file =
            message(&[(1, b"payments.proto"), (number::FILE_PACKAGE, b"pay.v1"), (number::FILE_SERVICE, &service)]);
        let bare = message(&[(number::FILE_SERVICE, &service)]);
        let mut known = Methods::default();
        known.insert_all(&message(&[(1, &file), (1, &bare)])).unwrap();
        let mut paths: Vec<_> = known.0.iter().map(String::as_str).collect();
        paths.sort_unstable();
        assert_eq!(
            paths,
            ["/Payments/Charge", "/Payments/Refund", "/pay.v1.Payments/Charge", "/pay.v1.Payments/Refund"]
        );
        assert!(known.contains("/pay.v1.Payments/Charge") && !known.contains("/pay.v1.Payments/charge"));
    }

    #[test]
    fn what_is_no_descriptor_set_is_refused() {
        for broken in [&b"\x0a\xff"[..], b"\x08\x01", b"\x0a\x02\x12\xff", b"\x0a\x03\x12\x01\xff\x32\0", b"{}"] {
            assert_eq!(Methods::default().insert_all(broken), Err(InvalidDescriptors(())), "{broken:?}");
        }
        assert_eq!(Methods::default().insert_all(b""), Ok(()));
    }

    #[test]
    fn a_method_has_the_path_of_one() {
        let mut methods = Methods::default();
        assert!(methods.insert("/pay.v1.Payments/Charge") && methods.insert("/Payments/Charge"));
        for none in ["", "/", "Payments/Charge", "/Payments", "/Payments/", "//Charge", "/a/b/c"] {
            assert!(!methods.insert(none), "{none}");
        }
    }
}
