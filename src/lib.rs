//! A `tower::Layer` that runs each webhook event or API request once, however often it is delivered.

pub mod caller;
mod digest;
pub mod fingerprint;
pub mod key;
pub mod store;
