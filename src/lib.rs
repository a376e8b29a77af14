//! A `tower::Layer` that runs each webhook event or API request once, however often it is delivered.

mod attempt;
mod body;
pub mod caller;
mod digest;
pub mod fingerprint;
mod flight;
mod intake;
pub mod key;
mod layer;
mod ledger;
mod policy;
mod record;
mod rejection;
mod service;
pub mod store;
mod telemetry;

pub use self::attempt::Attempt;
pub use self::body::{RequestBody, ResponseBody};
pub use self::layer::IdempotencyLayer;
pub use self::ledger::{Ledger, StillRunning};
pub use self::policy::{OnBadKey, OnOtherPayload, OnStoreError, OverLimit, Replay};
pub use self::rejection::Rejection;
pub use self::service::{Idempotency, ResponseFuture};
pub use self::store::memory::MemoryStore;
#[cfg(feature = "redis")]
pub use self::store::redis::RedisStore;
