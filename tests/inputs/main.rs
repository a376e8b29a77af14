//! Inputs that nobody meant: what is fuzzed in `tests/fuzz`, tried briefly and without a special compiler.
//!
//! Each seed is tried as it is, and then with changes that chance makes of it.

#![allow(clippy::expect_used, clippy::unwrap_used, reason = "a test panics where it fails")]

mod targets;

use std::fs;
use std::path::Path;

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::Index;
use proptest::test_runner::{Config, TestRunner};

/// How many inputs are made of the seeds of a target.
const CASES: u32 = 2000;

/// What is done to an input, at a place in it.
#[derive(Clone, Debug)]
enum Change {
    /// What is there from here on comes from another seed.
    Crossed(Index, Index),
    Cut(Index),
    Inserted(Index, Vec<u8>),
    Overwritten(Index, u8),
    Repeated(Index, Index),
}

fn change() -> impl Strategy<Value = Change> {
    let place = any::<Index>;
    // Bytes that mean something to a parser, and any.
    let byte = prop_oneof![prop::sample::select(&b"\"\\{}[],:;%&=.-0e\r\n\t \0\xff"[..]), any::<u8>()];
    prop_oneof![
        (place(), place()).prop_map(|(at, seed)| Change::Crossed(at, seed)),
        place().prop_map(Change::Cut),
        (place(), vec(byte.clone(), 1..4)).prop_map(|(at, bytes)| Change::Inserted(at, bytes)),
        (place(), byte).prop_map(|(at, byte)| Change::Overwritten(at, byte)),
        (place(), place()).prop_map(|(from, to)| Change::Repeated(from, to)),
    ]
}

impl Change {
    fn apply(&self, input: &mut Vec<u8>, seeds: &[Vec<u8>]) {
        let at = |index: &Index| index.index(input.len() + 1);
        match self {
            Self::Crossed(place, seed) => {
                let (place, seed) = (at(place), &seeds[seed.index(seeds.len())]);
                input.truncate(place);
                input.extend(seed.iter().skip(place));
            }
            Self::Cut(place) => input.truncate(at(place)),
            Self::Inserted(place, bytes) => {
                let place = at(place);
                input.splice(place..place, bytes.iter().copied());
            }
            Self::Overwritten(place, byte) => {
                let place = at(place);
                if let Some(there) = input.get_mut(place) {
                    *there = *byte;
                }
            }
            Self::Repeated(from, to) => {
                let (from, to) = (at(from), at(to));
                let repeated = input[from.min(to)..from.max(to)].to_vec();
                input.splice(to..to, repeated);
            }
        }
    }
}

fn seeds(target: &str) -> Vec<Vec<u8>> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/inputs/seeds").join(target);
    let mut files: Vec<_> = fs::read_dir(dir).unwrap().map(|file| file.unwrap().path()).collect();
    files.sort();
    files.iter().map(|file| fs::read(file).unwrap()).collect()
}

fn try_all(target: &str, run: fn(&[u8])) {
    let seeds = seeds(target);
    seeds.iter().for_each(|seed| run(seed));
    let config = Config { cases: CASES, failure_persistence: None, ..Config::default() };
    let inputs = (any::<Index>(), vec(change(), 1..6)).prop_map(|(seed, changes)| {
        let mut input = seeds[seed.index(seeds.len())].clone();
        changes.iter().for_each(|change| change.apply(&mut input, &seeds));
        input
    });
    let tried = TestRunner::new(config).run(&inputs, |input| {
        run(&input);
        Ok(())
    });
    tried.unwrap_or_else(|failed| panic!("{failed}"));
}

#[test]
fn a_record_of_any_bytes_is_replayed_or_refused_and_never_run() {
    try_all("record", targets::record);
}

#[test]
fn a_json_key_of_any_bytes_is_what_a_parser_finds_there() {
    try_all("json_key", targets::json_key);
}

#[test]
fn a_protobuf_key_of_any_bytes_is_one_that_is_written_there() {
    try_all("protobuf_key", targets::protobuf_key);
}

#[test]
fn a_header_key_of_any_bytes_is_one_value_or_none() {
    try_all("header_key", targets::header_key);
}

#[test]
fn a_payload_of_any_bytes_is_the_same_when_it_comes_again() {
    try_all("payload", targets::payload);
}

#[test]
fn a_connection_of_any_bytes_is_answered_to_its_end() {
    try_all("request", targets::request);
}
