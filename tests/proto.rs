//! The code of `examples/proto` is what its schema says.
//!
//! `UPDATE=1 cargo test --test proto` writes it anew, with no `protoc` and no build script.

#![allow(clippy::unwrap_used, reason = "a test panics where it fails")]

mod common;

use std::path::{Path, PathBuf};
use std::{env, fs};

use prost::Message as _;
use tonic_prost_build::FileDescriptorSet;

use common::scratch::Scratch;

#[test]
fn generated_code_is_that_of_the_schema() {
    let proto = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/proto");
    let descriptors = protox::compile(["payments.proto"], [&proto]).unwrap();
    let scratch = Scratch::new();
    let generated = tonic_prost_build::configure().out_dir(scratch.path());
    generated.compile_fds(descriptors.clone()).unwrap();
    let files = [
        ("payments.v1.rs", fs::read(scratch.path().join("payments.v1.rs")).unwrap()),
        ("payments.binpb", encoded(descriptors)),
    ];
    for (name, now) in files {
        let path: PathBuf = proto.join(name);
        if env::var_os("UPDATE").is_some() {
            fs::write(&path, &now).unwrap();
        }
        assert!(fs::read(&path).unwrap() == now, "{name} is not that of the schema: UPDATE=1 cargo test --test proto");
    }
}

/// Without the comments.
fn encoded(mut descriptors: FileDescriptorSet) -> Vec<u8> {
    descriptors.file.iter_mut().for_each(|file| file.source_code_info = None);
    descriptors.encode_to_vec()
}
