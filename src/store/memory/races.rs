//! The store in every order that chance comes upon. `crate::races` says how.

#![allow(clippy::expect_used, clippy::unwrap_used, reason = "a test panics where it fails")]

use std::collections::BTreeSet;

use futures_util::FutureExt as _;
use futures_util::future::join_all;
use shuttle::future::{spawn, yield_now};
use shuttle::rand::{Rng as _, thread_rng};

use super::*;
use crate::races::{LONG, SHORT, in_any_order, pass_time};

fn key(n: u8) -> Key {
    Key::from([n; 24])
}

fn keys_of(store: &MemoryStore) -> usize {
    store.used.keys.load(Ordering::Relaxed)
}

/// What is known of all keys together has to be the sum of what is known of each.
fn adds_up(store: &MemoryStore) {
    let slots: Vec<_> = store.shards.iter().map(|shard| lock(&shard.slots)).collect();
    let keys: usize = slots.iter().map(|slots| slots.by_key.len()).sum();
    let bytes: usize = slots.iter().flat_map(|slots| slots.by_key.values()).map(Slot::bytes).sum();
    let expiring: usize = slots.iter().map(|slots| slots.by_expiry.len()).sum();
    assert_eq!((keys, bytes, keys), (keys_of(store), store.used.bytes.load(Ordering::Relaxed), expiring));
}

#[test]
fn one_of_those_who_claim_a_key_together_has_it() {
    in_any_order(|_| {
        async {
            let store = MemoryStore::new();
            let claims = (0..3).map(|_| {
                let store = store.clone();
                spawn(async move { store.claim(&key(7), &Claim::new(LONG, LONG)).await.unwrap() })
            });
            let claimed = join_all(claims.collect::<Vec<_>>()).await.into_iter().map(Result::unwrap);
            let acquired = claimed.filter(|claimed| matches!(claimed, Claimed::Acquired { attempt: 1 })).count();
            assert_eq!(acquired, 1);
            adds_up(&store);
        }
        .boxed()
    });
}

/// Each of them claims, works, renews, and completes or gives up, as time passes and an operator forgets.
#[test]
fn a_key_has_one_outcome_and_its_attempts_are_numbered_in_their_order() {
    in_any_order(|clock| {
        async {
            let store = MemoryStore::new();
            pass_time(clock);
            let attempts = (0..4).map(|_| spawn(attempt(store.clone())));
            let operator = {
                let store = store.clone();
                spawn(async move { store.forget(&key(7), false).await.unwrap() })
            };
            let attempts = join_all(attempts.collect::<Vec<_>>()).await.into_iter().filter_map(Result::unwrap);
            let (numbers, held): (Vec<u32>, Vec<bool>) = attempts.unzip();
            let distinct: BTreeSet<u32> = numbers.iter().copied().collect();
            assert_eq!(distinct.len(), numbers.len(), "two attempts have one number");
            let forgotten = operator.await.unwrap() == Forgotten::Forgotten;
            let outcomes = held.into_iter().filter(|held| *held).count();
            assert!(outcomes <= 1 || forgotten, "{outcomes} outcomes of an event that nobody has forgotten");
            let entry = store.lookup(&key(7)).await.unwrap().expect("an entry");
            assert_eq!(Some(&entry.attempt), distinct.last());
            assert!(outcomes == 0 || forgotten || matches!(entry.state, State::Done(_)), "{:?}", entry.state);
            adds_up(&store);
        }
        .boxed()
    });
}

/// The number of an attempt, and whether its outcome is kept.
async fn attempt(store: MemoryStore) -> Option<(u32, bool)> {
    let mut claim = Claim::new(SHORT, LONG);
    let Claimed::Acquired { attempt } = store.claim(&key(7), &claim).await.unwrap() else { return None };
    claim.attempt = attempt;
    yield_now().await;
    let renewed = store.renew(&key(7), &claim).await.unwrap();
    yield_now().await;
    let kept = match thread_rng().gen_bool(0.7) {
        true => store.complete(&key(7), &claim, Bytes::from_static(b"done")).await.unwrap() == Hold::Held,
        false => store.release(&key(7), &claim, LONG).await.is_err(),
    };
    assert!(!kept || renewed == Hold::Held, "who has lost never holds again");
    Some((attempt, kept))
}

#[test]
fn a_store_never_holds_more_keys_than_it_may_and_drops_none_that_counts() {
    in_any_order(|_| {
        async {
            let store = MemoryStore::new().max_keys(2);
            // In one shard and in others.
            let claims = [1, 2, 65, 3].map(|n| {
                let store = store.clone();
                spawn(async move {
                    let claim = Claim::new(LONG, LONG);
                    let claimed = store.claim(&key(n), &claim).await;
                    assert!(keys_of(&store) <= 2, "there are {} keys", keys_of(&store));
                    claimed.is_ok().then_some((n, claim))
                })
            });
            let held: Vec<_> = join_all(claims).await.into_iter().filter_map(Result::unwrap).collect();
            assert_eq!(held.len(), 2);
            for (n, claim) in held {
                assert_eq!(store.renew(&key(n), &claim).await.unwrap(), Hold::Held);
            }
            adds_up(&store);
        }
        .boxed()
    });
}

#[test]
fn what_expires_while_it_is_swept_and_claimed_is_counted_once() {
    in_any_order(|clock| {
        async {
            let store = MemoryStore::new();
            pass_time(clock);
            let deliveries = (0..3).map(|n| {
                let store = store.clone();
                spawn(async move {
                    for _ in 0..3 {
                        let mut claim = Claim::new(SHORT, SHORT);
                        if let Claimed::Acquired { attempt } = store.claim(&key(n % 2), &claim).await.unwrap() {
                            claim.attempt = attempt;
                            store.complete(&key(n % 2), &claim, Bytes::from_static(b"done")).await.unwrap();
                        }
                        yield_now().await;
                    }
                })
            });
            join_all(deliveries.collect::<Vec<_>>()).await;
            adds_up(&store);
        }
        .boxed()
    });
}
