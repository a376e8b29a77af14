//! The suite every store must pass, ours and yours.
//!
//! [`store_conformance!`](crate::store_conformance) makes a test of each case:
//!
//! ```
//! use tower_idempotency::store::memory::MemoryStore;
//!
//! mod memory {
//!     # use super::*;
//!     // How a test is declared, and what makes a store. What comes beside the store lives as long as the test.
//!     tower_idempotency::store_conformance!(#[tokio::test(start_paused = true)], async { (MemoryStore::new(), ()) });
//! }
//! # fn main() {}
//! ```
//!
//! The cases sleep for up to two seconds. A store whose time is `tokio::time` runs them on a paused clock, a server in
//! real time.

#![allow(clippy::missing_panics_doc, clippy::unwrap_used, reason = "a test panics where it fails")]

use std::time::Duration;

use bytes::Bytes;
use futures_util::future::join_all;
use tokio::time::sleep;

use super::{Claim, ClaimId, Claimed, Forgotten, Hold, State, Store};
use crate::fingerprint::Fingerprint;
use crate::key::Key;

/// A lease that runs out within a test, and long enough to be held on a busy machine.
const SHORT: Duration = Duration::from_millis(600);
/// Longer than any test.
const LONG: Duration = Duration::from_secs(60);
/// Over at once.
const BLINK: Duration = Duration::from_millis(1);

const RECORD: Bytes = Bytes::from_static(b"\x00record\xff\r\n");

/// Makes a test of every case of the suite, for one store.
#[macro_export]
macro_rules! store_conformance {
    (#[$test:meta], $store:expr) => {
        $crate::store_conformance!(@cases #[$test], $store;
            a_claim_takes_an_absent_key
            a_claim_sent_twice_is_one_claim
            a_claim_that_comes_after_its_release_takes_nothing
            a_finished_key_is_done_for_everyone
            a_completion_sent_twice_is_one_completion
            a_released_key_is_free_and_its_attempts_are_counted
            a_release_sent_twice_is_one_release
            a_claim_given_up_before_it_ran_is_not_counted
            a_lease_that_ran_out_is_taken_over
            a_renewed_lease_is_not_taken_over
            a_stale_claim_changes_nothing
            a_lease_that_ran_out_unnoticed_is_still_held
            a_finished_claim_is_neither_renewed_nor_released
            a_released_claim_is_neither_renewed_nor_completed
            a_gone_key_is_renewed
            a_gone_key_is_completed
            a_gone_key_is_released_ahead_of_a_late_claim
            another_fingerprint_refuses_where_that_is_asked_for
            another_fingerprint_is_told_where_it_does_not_refuse
            a_record_is_kept_for_its_retention_from_completion
            a_retention_shorter_than_the_lease_works
            a_free_key_is_remembered_as_long_as_asked
            an_attempt_number_outlives_a_crash
            a_failure_is_not_forgotten_for_what_surely_had_no_effect
            a_record_may_be_empty_or_large
            a_forgotten_key_runs_again
            a_running_key_is_forgotten_by_force_only
            one_of_many_racing_claims_wins
            one_of_many_racing_takeovers_wins
            a_completion_and_a_takeover_do_not_both_win
        );
    };
    (@cases #[$test:meta], $store:expr; $($case:ident)+) => {
        $(
            #[$test]
            async fn $case() {
                let (store, _alive) = $store.await;
                $crate::store::conformance::$case(&store).await;
            }
        )+
    };
}

fn key() -> Key {
    Key::from(rand::random::<[u8; 24]>())
}

fn claim(lease: Duration) -> Claim {
    Claim::new(lease, LONG)
}

fn with(fingerprint: u8, refuse_other: bool) -> Claim {
    Claim { fingerprint: Some(Fingerprint::from_bytes([fingerprint; 16])), refuse_other, ..claim(LONG) }
}

/// Claims a key that can be claimed, and notes the number of the attempt as a caller has to.
async fn acquire_as(store: &impl Store, key: &Key, claim: Claim) -> Claim {
    match store.claim(key, &claim).await.unwrap() {
        Claimed::Acquired { attempt } => Claim { attempt, ..claim },
        other => panic!("not acquired but {other:?}"),
    }
}

async fn acquire(store: &impl Store, key: &Key, lease: Duration) -> Claim {
    acquire_as(store, key, claim(lease)).await
}

async fn state(store: &impl Store, key: &Key) -> Option<State> {
    store.lookup(key).await.unwrap().map(|entry| entry.state)
}

fn is_running(claimed: &Claimed) -> bool {
    matches!(claimed, Claimed::Running { .. })
}

/// An absent key is the claimant's, as attempt 1; others are told that it is running and for how long.
pub async fn a_claim_takes_an_absent_key<S: Store>(store: &S) {
    let key = key();
    assert_eq!(store.lookup(&key).await.unwrap(), None);
    assert_eq!(store.claim(&key, &claim(LONG)).await.unwrap(), Claimed::Acquired { attempt: 1 });
    match store.claim(&key, &claim(LONG)).await.unwrap() {
        Claimed::Running { lease_left, .. } => assert!(lease_left > LONG / 2 && lease_left <= LONG, "{lease_left:?}"),
        other => panic!("{other:?}"),
    }
    let entry = store.lookup(&key).await.unwrap().unwrap();
    assert_eq!((entry.state, entry.attempt), (State::Running, 1));
}

/// The answer to a claim was lost; sent again, it is answered as the first time, and its lease is the first one's.
pub async fn a_claim_sent_twice_is_one_claim<S: Store>(store: &S) {
    let key = key();
    let first = claim(SHORT);
    assert_eq!(store.claim(&key, &first).await.unwrap(), Claimed::Acquired { attempt: 1 });
    sleep(SHORT / 2).await;
    assert_eq!(store.claim(&key, &first).await.unwrap(), Claimed::Acquired { attempt: 1 });
    sleep(SHORT * 3 / 4).await;
    assert_eq!(store.claim(&key, &claim(LONG)).await.unwrap(), Claimed::Acquired { attempt: 2 });
    // The same after a takeover, whose answer may be lost as well.
    let second = claim(LONG);
    assert!(is_running(&store.claim(&key, &second).await.unwrap()));
}

/// Nobody waits for the answer of a claim that was given up: if it arrives after all, it must not hold the key.
pub async fn a_claim_that_comes_after_its_release_takes_nothing<S: Store>(store: &S) {
    let key = key();
    let held = acquire(store, &key, LONG).await;
    assert_eq!(store.release(&key, &held, LONG).await.unwrap(), Hold::Held);
    assert!(is_running(&store.claim(&key, &held).await.unwrap()));
    assert_eq!(state(store, &key).await, Some(State::Free));
    assert_eq!(store.claim(&key, &claim(LONG)).await.unwrap(), Claimed::Acquired { attempt: 2 });
}

/// Every later claim gets the record, whatever its lease or id.
pub async fn a_finished_key_is_done_for_everyone<S: Store>(store: &S) {
    let key = key();
    let held = acquire(store, &key, LONG).await;
    assert_eq!(store.complete(&key, &held, RECORD).await.unwrap(), Hold::Held);
    let done = Claimed::Done { fingerprint: None, record: RECORD };
    assert_eq!(store.claim(&key, &claim(SHORT)).await.unwrap(), done);
    assert_eq!(store.claim(&key, &held).await.unwrap(), done);
    assert_eq!(state(store, &key).await, Some(State::Done(RECORD)));
}

/// The second completion is held and changes nothing.
pub async fn a_completion_sent_twice_is_one_completion<S: Store>(store: &S) {
    let key = key();
    let held = acquire(store, &key, LONG).await;
    assert_eq!(store.complete(&key, &held, RECORD).await.unwrap(), Hold::Held);
    assert_eq!(store.complete(&key, &held, Bytes::from_static(b"other")).await.unwrap(), Hold::Held);
    assert_eq!(state(store, &key).await, Some(State::Done(RECORD)));
}

/// The next attempt has the next number.
pub async fn a_released_key_is_free_and_its_attempts_are_counted<S: Store>(store: &S) {
    let key = key();
    for attempt in 1..=3 {
        let held = acquire(store, &key, LONG).await;
        assert_eq!(held.attempt, attempt);
        assert_eq!(store.release(&key, &held, LONG).await.unwrap(), Hold::Held);
        assert_eq!(state(store, &key).await, Some(State::Free));
    }
}

/// The second release is held, and harms no successor.
pub async fn a_release_sent_twice_is_one_release<S: Store>(store: &S) {
    let key = key();
    let held = acquire(store, &key, LONG).await;
    assert_eq!(store.release(&key, &held, LONG).await.unwrap(), Hold::Held);
    assert_eq!(store.release(&key, &held, BLINK).await.unwrap(), Hold::Held);
    let successor = acquire(store, &key, LONG).await;
    assert_eq!(successor.attempt, 2);
    assert_eq!(store.release(&key, &held, LONG).await.unwrap(), Hold::Lost);
    assert_eq!(state(store, &key).await, Some(State::Running));
}

/// Its number goes to the first attempt that does run.
pub async fn a_claim_given_up_before_it_ran_is_not_counted<S: Store>(store: &S) {
    let key = key();
    let unanswered = claim(LONG);
    store.claim(&key, &unanswered).await.unwrap();
    assert_eq!(store.release(&key, &unanswered, LONG).await.unwrap(), Hold::Held);
    assert_eq!(acquire(store, &key, LONG).await.attempt, 1);
}

/// Nobody renewed it: the next claim has the key, with the next number.
pub async fn a_lease_that_ran_out_is_taken_over<S: Store>(store: &S) {
    let key = key();
    acquire(store, &key, SHORT).await;
    sleep(SHORT + SHORT / 4).await;
    assert_eq!(acquire(store, &key, LONG).await.attempt, 2);
    assert!(is_running(&store.claim(&key, &claim(LONG)).await.unwrap()));
}

/// A lease counts from its last renewal.
pub async fn a_renewed_lease_is_not_taken_over<S: Store>(store: &S) {
    let key = key();
    let held = acquire(store, &key, SHORT).await;
    for _ in 0..2 {
        sleep(SHORT * 2 / 3).await;
        assert_eq!(store.renew(&key, &held).await.unwrap(), Hold::Held);
    }
    assert!(is_running(&store.claim(&key, &claim(LONG)).await.unwrap()));
}

/// Who lost the claim can neither overwrite, nor extend, nor delete its successor's.
pub async fn a_stale_claim_changes_nothing<S: Store>(store: &S) {
    let key = key();
    let stale = acquire(store, &key, BLINK).await;
    sleep(SHORT / 4).await;
    let successor = acquire(store, &key, LONG).await;
    for _ in 0..2 {
        assert_eq!(store.renew(&key, &stale).await.unwrap(), Hold::Lost);
        assert_eq!(store.complete(&key, &stale, Bytes::from_static(b"stale")).await.unwrap(), Hold::Lost);
        assert_eq!(store.release(&key, &stale, LONG).await.unwrap(), Hold::Lost);
    }
    assert_eq!(state(store, &key).await, Some(State::Running));
    assert_eq!(store.complete(&key, &successor, RECORD).await.unwrap(), Hold::Held);
    assert_eq!(store.renew(&key, &stale).await.unwrap(), Hold::Lost);
    assert_eq!(store.complete(&key, &stale, Bytes::from_static(b"stale")).await.unwrap(), Hold::Lost);
    assert_eq!(store.release(&key, &stale, LONG).await.unwrap(), Hold::Lost);
    assert_eq!(state(store, &key).await, Some(State::Done(RECORD)));
}

/// As long as nobody took it, a claim that is late is still good.
pub async fn a_lease_that_ran_out_unnoticed_is_still_held<S: Store>(store: &S) {
    let (renewed, completed) = (key(), key());
    let late = acquire(store, &renewed, BLINK).await;
    let later = acquire(store, &completed, BLINK).await;
    sleep(SHORT / 4).await;
    assert_eq!(store.renew(&renewed, &Claim { lease: LONG, ..late }).await.unwrap(), Hold::Held);
    assert!(is_running(&store.claim(&renewed, &claim(LONG)).await.unwrap()));
    assert_eq!(store.complete(&completed, &later, RECORD).await.unwrap(), Hold::Held);
}

/// A renewal that crosses its completion is no loss; a release that follows it is.
pub async fn a_finished_claim_is_neither_renewed_nor_released<S: Store>(store: &S) {
    let key = key();
    let held = acquire(store, &key, LONG).await;
    assert_eq!(store.complete(&key, &held, RECORD).await.unwrap(), Hold::Held);
    assert_eq!(store.renew(&key, &held).await.unwrap(), Hold::Held);
    assert_eq!(store.release(&key, &held, LONG).await.unwrap(), Hold::Lost);
    assert_eq!(state(store, &key).await, Some(State::Done(RECORD)));
}

/// What was given back stays free.
pub async fn a_released_claim_is_neither_renewed_nor_completed<S: Store>(store: &S) {
    let key = key();
    let held = acquire(store, &key, LONG).await;
    assert_eq!(store.release(&key, &held, LONG).await.unwrap(), Hold::Held);
    assert_eq!(store.renew(&key, &held).await.unwrap(), Hold::Lost);
    assert_eq!(store.complete(&key, &held, RECORD).await.unwrap(), Hold::Lost);
    assert_eq!(state(store, &key).await, Some(State::Free));
}

/// A key of which the store knows nothing any more.
async fn gone<S: Store>(store: &S) -> (Key, Claim) {
    let key = key();
    let brief = acquire_as(store, &key, Claim::new(BLINK, BLINK)).await;
    sleep(SHORT / 4).await;
    assert_eq!(store.lookup(&key).await.unwrap(), None);
    (key, Claim { lease: SHORT, retention: LONG, attempt: 7, ..brief })
}

/// A store that lost its data is told again who runs.
pub async fn a_gone_key_is_renewed<S: Store>(store: &S) {
    let (key, held) = gone(store).await;
    assert_eq!(store.renew(&key, &held).await.unwrap(), Hold::Held);
    assert!(is_running(&store.claim(&key, &claim(LONG)).await.unwrap()));
    sleep(SHORT + SHORT / 4).await;
    assert_eq!(acquire(store, &key, LONG).await.attempt, 8);
}

/// Recording is better than running again.
pub async fn a_gone_key_is_completed<S: Store>(store: &S) {
    let (key, held) = gone(store).await;
    assert_eq!(store.complete(&key, &held, RECORD).await.unwrap(), Hold::Held);
    assert_eq!(state(store, &key).await, Some(State::Done(RECORD)));
}

/// The claim that is released has not arrived yet. When it does, it finds the key taken.
pub async fn a_gone_key_is_released_ahead_of_a_late_claim<S: Store>(store: &S) {
    let key = key();
    let late = claim(SHORT);
    assert_eq!(store.release(&key, &late, LONG).await.unwrap(), Hold::Held);
    assert!(is_running(&store.claim(&key, &late).await.unwrap()));
    assert_eq!(acquire(store, &key, LONG).await.attempt, 1);

    let (key, late) = gone(store).await;
    assert_eq!(store.release(&key, &late, LONG).await.unwrap(), Hold::Held);
    sleep(SHORT + SHORT / 4).await;
    assert_eq!(store.lookup(&key).await.unwrap(), None, "it is remembered for a lease and no longer");
}

/// Whatever state the key is in, and nothing is taken over.
pub async fn another_fingerprint_refuses_where_that_is_asked_for<S: Store>(store: &S) {
    let key = key();
    let held = acquire_as(store, &key, with(1, true)).await;
    let none = Claim { refuse_other: true, ..claim(LONG) };
    for other in [with(2, true), none] {
        assert_eq!(store.claim(&key, &other).await.unwrap(), Claimed::Mismatch);
    }
    assert!(is_running(&store.claim(&key, &with(1, true)).await.unwrap()));

    assert_eq!(store.release(&key, &held, LONG).await.unwrap(), Hold::Held);
    assert_eq!(store.claim(&key, &with(2, true)).await.unwrap(), Claimed::Mismatch);
    assert_eq!(state(store, &key).await, Some(State::Free));

    let held = acquire_as(store, &key, with(1, true)).await;
    assert_eq!(store.complete(&key, &held, RECORD).await.unwrap(), Hold::Held);
    assert_eq!(store.claim(&key, &with(2, true)).await.unwrap(), Claimed::Mismatch);
    assert!(matches!(store.claim(&key, &with(1, true)).await.unwrap(), Claimed::Done { .. }));
}

/// The claimant sees the fingerprint that is there, and a free key is taken.
pub async fn another_fingerprint_is_told_where_it_does_not_refuse<S: Store>(store: &S) {
    let key = key();
    let held = acquire_as(store, &key, with(1, false)).await;
    let there = held.fingerprint;
    match store.claim(&key, &with(2, false)).await.unwrap() {
        Claimed::Running { fingerprint, .. } => assert_eq!(fingerprint, there),
        other => panic!("{other:?}"),
    }
    assert_eq!(store.complete(&key, &held, RECORD).await.unwrap(), Hold::Held);
    let done = Claimed::Done { fingerprint: there, record: RECORD };
    assert_eq!(store.claim(&key, &with(2, false)).await.unwrap(), done);
    assert_eq!(store.forget(&key, false).await.unwrap(), Forgotten::Forgotten);
    assert_eq!(store.claim(&key, &with(2, false)).await.unwrap(), Claimed::Acquired { attempt: 2 });
}

/// However long the attempt took.
pub async fn a_record_is_kept_for_its_retention_from_completion<S: Store>(store: &S) {
    let key = key();
    let held = acquire_as(store, &key, Claim::new(LONG, SHORT)).await;
    sleep(SHORT).await;
    assert_eq!(store.complete(&key, &held, RECORD).await.unwrap(), Hold::Held);
    sleep(SHORT / 2).await;
    assert_eq!(state(store, &key).await, Some(State::Done(RECORD)));
    sleep(SHORT).await;
    assert_eq!(store.claim(&key, &claim(LONG)).await.unwrap(), Claimed::Acquired { attempt: 1 });
}

/// And claims of other settings judge a lease by the settings it was made with.
pub async fn a_retention_shorter_than_the_lease_works<S: Store>(store: &S) {
    let key = key();
    let held = acquire_as(store, &key, Claim::new(SHORT * 2, BLINK)).await;
    assert!(is_running(&store.claim(&key, &Claim::new(BLINK, LONG)).await.unwrap()));
    sleep(SHORT).await;
    assert!(is_running(&store.claim(&key, &Claim::new(BLINK, LONG)).await.unwrap()));
    assert_eq!(store.renew(&key, &held).await.unwrap(), Hold::Held);
    sleep(SHORT).await;
    assert!(is_running(&store.claim(&key, &Claim::new(BLINK, LONG)).await.unwrap()));
}

/// Then its next attempt is the first again.
pub async fn a_free_key_is_remembered_as_long_as_asked<S: Store>(store: &S) {
    let key = key();
    let held = acquire(store, &key, LONG).await;
    assert_eq!(store.release(&key, &held, SHORT).await.unwrap(), Hold::Held);
    assert_eq!(state(store, &key).await, Some(State::Free));
    sleep(SHORT + SHORT / 4).await;
    assert_eq!(store.lookup(&key).await.unwrap(), None);
    assert_eq!(acquire(store, &key, LONG).await.attempt, 1);
}

/// So does the fingerprint: another payload does not take over what crashed.
pub async fn an_attempt_number_outlives_a_crash<S: Store>(store: &S) {
    let key = key();
    let crashed = Claim { lease: BLINK, ..with(1, true) };
    store.claim(&key, &crashed).await.unwrap();
    sleep(SHORT / 4).await;
    assert_eq!(store.claim(&key, &with(2, true)).await.unwrap(), Claimed::Mismatch);
    assert_eq!(store.claim(&key, &with(1, true)).await.unwrap(), Claimed::Acquired { attempt: 2 });
}

/// An attempt that failed or died may have had its effect. What comes after it without one, a claim given up or a forged
/// request refused, is remembered briefly on its own, but does not shorten the memory of the other.
pub async fn a_failure_is_not_forgotten_for_what_surely_had_no_effect<S: Store>(store: &S) {
    let (failed, died, alone) = (key(), key(), key());
    let held = acquire(store, &failed, LONG).await;
    assert_eq!(store.release(&failed, &held, LONG).await.unwrap(), Hold::Held);
    acquire(store, &died, BLINK).await;
    sleep(SHORT / 4).await;
    for key in [&failed, &died, &alone] {
        for given_up in [false, true] {
            let held = acquire(store, key, LONG).await;
            let held = if given_up { Claim { attempt: 0, ..held } } else { held };
            assert_eq!(store.release(key, &held, SHORT).await.unwrap(), Hold::Held);
        }
    }
    sleep(SHORT + SHORT / 4).await;
    assert_eq!(acquire(store, &failed, LONG).await.attempt, 3);
    assert_eq!(acquire(store, &died, LONG).await.attempt, 3);
    assert_eq!(acquire(store, &alone, LONG).await.attempt, 1);
}

/// Up to what the layer keeps by default, and a little more.
pub async fn a_record_may_be_empty_or_large<S: Store>(store: &S) {
    for record in [Bytes::new(), (0..=u8::MAX).cycle().take((1 << 20) + 4096).collect()] {
        let key = key();
        let held = acquire(store, &key, LONG).await;
        assert_eq!(store.complete(&key, &held, record.clone()).await.unwrap(), Hold::Held);
        assert_eq!(store.claim(&key, &claim(LONG)).await.unwrap(), Claimed::Done { fingerprint: None, record });
    }
}

/// An operator wants an event to run once more.
pub async fn a_forgotten_key_runs_again<S: Store>(store: &S) {
    let key = key();
    assert_eq!(store.forget(&key, true).await.unwrap(), Forgotten::Absent);
    let held = acquire(store, &key, LONG).await;
    assert_eq!(store.complete(&key, &held, RECORD).await.unwrap(), Hold::Held);
    assert_eq!(store.forget(&key, false).await.unwrap(), Forgotten::Forgotten);
    assert_eq!(store.complete(&key, &held, RECORD).await.unwrap(), Hold::Lost, "a late completion");
    let corrected = Claim { fingerprint: Some(Fingerprint::from_bytes([7; 16])), refuse_other: true, ..claim(LONG) };
    let acquired = Claimed::Acquired { attempt: 2 };
    assert_eq!(store.claim(&key, &corrected).await.unwrap(), acquired, "whatever it brings");
    assert_eq!(store.release(&key, &Claim { attempt: 2, ..corrected.clone() }, LONG).await.unwrap(), Hold::Held);
    let another = Claim { id: ClaimId::random(), fingerprint: None, ..corrected };
    assert_eq!(store.claim(&key, &another).await.unwrap(), Claimed::Mismatch, "it was forgotten once");
}

/// And the attempt that is forced out cannot finish any more.
pub async fn a_running_key_is_forgotten_by_force_only<S: Store>(store: &S) {
    let key = key();
    let held = acquire(store, &key, LONG).await;
    assert_eq!(store.forget(&key, false).await.unwrap(), Forgotten::Running);
    assert_eq!(store.renew(&key, &held).await.unwrap(), Hold::Held);
    assert_eq!(store.forget(&key, true).await.unwrap(), Forgotten::Forgotten);
    assert_eq!(store.renew(&key, &held).await.unwrap(), Hold::Lost);
    assert_eq!(store.complete(&key, &held, RECORD).await.unwrap(), Hold::Lost);
    assert_eq!(acquire(store, &key, LONG).await.attempt, 2);

    let crashed = self::key();
    acquire(store, &crashed, BLINK).await;
    sleep(SHORT / 4).await;
    assert_eq!(store.forget(&crashed, false).await.unwrap(), Forgotten::Forgotten, "nothing runs there any more");
}

/// How many of 32 claims on one key win at once, and the attempt they win.
async fn race<S: Store>(store: &S, key: &Key) -> Vec<u32> {
    let claims: Vec<Claim> = (0..32).map(|_| claim(LONG)).collect();
    let claimed = join_all(claims.iter().map(|claim| store.claim(key, claim))).await;
    let attempt = |claimed| match claimed {
        Claimed::Acquired { attempt } => Some(attempt),
        _ => None,
    };
    claimed.into_iter().filter_map(|claimed| attempt(claimed.unwrap())).collect()
}

/// One at a time.
pub async fn one_of_many_racing_claims_wins<S: Store>(store: &S) {
    for _ in 0..16 {
        assert_eq!(race(store, &key()).await, [1]);
    }
}

/// Whether the key is free or its lease is over.
pub async fn one_of_many_racing_takeovers_wins<S: Store>(store: &S) {
    for _ in 0..4 {
        let (crashed, free) = (key(), key());
        acquire(store, &crashed, BLINK).await;
        let held = acquire(store, &free, LONG).await;
        assert_eq!(store.release(&free, &held, LONG).await.unwrap(), Hold::Held);
        sleep(SHORT / 8).await;
        assert_eq!(race(store, &crashed).await, [2]);
        assert_eq!(race(store, &free).await, [2]);
    }
}

/// An attempt whose lease has run out completes while others try to take over: either it is done, or one of them has it.
pub async fn a_completion_and_a_takeover_do_not_both_win<S: Store>(store: &S) {
    for _ in 0..16 {
        let key = key();
        let late = acquire(store, &key, BLINK).await;
        sleep(BLINK * 4).await;
        let (completed, taken) = futures_util::join!(store.complete(&key, &late, RECORD), race(store, &key));
        match completed.unwrap() {
            Hold::Held => assert!(taken.is_empty() && state(store, &key).await == Some(State::Done(RECORD))),
            Hold::Lost => assert!(taken == [2] && state(store, &key).await == Some(State::Running)),
        }
    }
}
