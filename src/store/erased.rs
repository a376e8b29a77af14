//! A store without its type, which is what lets a ledger have no type parameter.

use std::time::Duration;

use bytes::Bytes;
use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;

use super::{Claim, Claimed, Entry, Forgotten, Hold, Store, StoreError};
use crate::key::Key;

pub(crate) type StoreFuture<'a, T> = BoxFuture<'a, Result<T, StoreError>>;

pub(crate) trait ErasedStore: Send + Sync {
    fn claim<'a>(&'a self, key: &'a Key, claim: &'a Claim) -> StoreFuture<'a, Claimed>;
    fn renew<'a>(&'a self, key: &'a Key, claim: &'a Claim) -> StoreFuture<'a, Hold>;
    fn complete<'a>(&'a self, key: &'a Key, claim: &'a Claim, record: Bytes) -> StoreFuture<'a, Hold>;
    fn release<'a>(&'a self, key: &'a Key, claim: &'a Claim, remember: Duration) -> StoreFuture<'a, Hold>;
    fn lookup<'a>(&'a self, key: &'a Key) -> StoreFuture<'a, Option<Entry>>;
    fn forget<'a>(&'a self, key: &'a Key, force: bool) -> StoreFuture<'a, Forgotten>;
    fn failure_domain(&self, key: &Key) -> u16;
    fn changed<'a>(&'a self, key: &'a Key) -> BoxFuture<'a, ()>;
}

impl<S: Store> ErasedStore for S {
    fn claim<'a>(&'a self, key: &'a Key, claim: &'a Claim) -> StoreFuture<'a, Claimed> {
        Store::claim(self, key, claim).boxed()
    }

    fn renew<'a>(&'a self, key: &'a Key, claim: &'a Claim) -> StoreFuture<'a, Hold> {
        Store::renew(self, key, claim).boxed()
    }

    fn complete<'a>(&'a self, key: &'a Key, claim: &'a Claim, record: Bytes) -> StoreFuture<'a, Hold> {
        Store::complete(self, key, claim, record).boxed()
    }

    fn release<'a>(&'a self, key: &'a Key, claim: &'a Claim, remember: Duration) -> StoreFuture<'a, Hold> {
        Store::release(self, key, claim, remember).boxed()
    }

    fn lookup<'a>(&'a self, key: &'a Key) -> StoreFuture<'a, Option<Entry>> {
        Store::lookup(self, key).boxed()
    }

    fn forget<'a>(&'a self, key: &'a Key, force: bool) -> StoreFuture<'a, Forgotten> {
        Store::forget(self, key, force).boxed()
    }

    fn failure_domain(&self, key: &Key) -> u16 {
        Store::failure_domain(self, key)
    }

    fn changed<'a>(&'a self, key: &'a Key) -> BoxFuture<'a, ()> {
        Store::changed(self, key).boxed()
    }
}
