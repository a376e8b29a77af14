#![no_main]
#![allow(dead_code, reason = "there are other targets")]

#[path = "../../inputs/targets.rs"]
mod targets;

libfuzzer_sys::fuzz_target!(|input: &[u8]| targets::protobuf_key(input));
