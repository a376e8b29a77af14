//! Real servers for tests: started on free ports, ended with the test that started them.

#![allow(dead_code, unreachable_pub, reason = "each test file uses its part")]

pub mod redis;
