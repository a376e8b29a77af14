//! What the test suites of other systems, the IETF draft and the documents of senders expect of a layer like this one,
//! case by case. Where a store matters, a case is tried on each.

#![allow(clippy::expect_used, clippy::unwrap_used, reason = "a test panics where it fails")]

#[path = "../common/mod.rs"]
mod common;

/// Runs cases on every store: in memory with a paused clock, and on a Redis server with a real one.
macro_rules! on_every_store {
    ($($name:ident)+) => {
        mod memory {
            $(#[tokio::test(start_paused = true)]
            async fn $name() {
                super::$name($crate::common::stores::Stores::memory()).await;
            })+
        }

        mod redis {
            $(#[tokio::test]
            async fn $name() {
                super::$name($crate::common::stores::Stores::redis()).await;
            })+
        }
    };
}

mod bodies;
mod concurrency;
mod events;
mod failures;
mod keys;
mod payloads;
mod replays;
mod rotation;
mod scopes;
mod service;
