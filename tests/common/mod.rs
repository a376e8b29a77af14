//! What the tests share: real servers, stores that can be made to fail, and a service behind the layer.

#![allow(dead_code, unreachable_pub, reason = "each test file uses its part")]
#![allow(clippy::expect_used, clippy::unwrap_used, reason = "a test panics where it fails")]

pub mod app;
pub mod observed;
pub mod proxy;
pub mod redis;
pub mod stores;
