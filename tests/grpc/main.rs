//! The layer in front of a real tonic server, called by real tonic clients over TCP, and by clients that say what no client of
//! tonic would.

#![allow(clippy::expect_used, clippy::unwrap_used, reason = "a test panics where it fails")]

#[path = "../common/mod.rs"]
mod common;

mod bank;
mod codes;
mod example;
mod frames;
mod keys;
mod refusals;
mod replays;
mod rules;
mod steering;
mod strangers;
mod streams;

#[allow(clippy::all, unreachable_pub, reason = "generated")]
mod payments {
    include!("../../examples/proto/payments.v1.rs");

    pub(crate) const DESCRIPTORS: &[u8] = include_bytes!("../../examples/proto/payments.binpb");
}
