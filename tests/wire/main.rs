//! The layer at the edges of HTTP, byte by byte over TCP.

#![allow(unreachable_pub, reason = "what the files of a test share")]
#![allow(clippy::expect_used, clippy::unwrap_used, reason = "a test panics where it fails")]

#[path = "../common/mod.rs"]
mod common;

mod content;
mod framing;
mod http2;
mod peers;
mod sizes;
mod upgrades;
