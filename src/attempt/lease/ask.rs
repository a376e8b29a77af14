//! A claim as it is asked for.

use std::time::Duration;

use bytes::Bytes;
use tokio::time::{Instant, sleep};

use super::{Backoff, Lease, Pursued};
use crate::fingerprint::Fingerprint;
use crate::key::{Key, Keys};
use crate::ledger::{Ledger, bounded_by};
use crate::store::{Claim, Claimed, Entry, MIN_DURATION, StoreError};
use crate::sync::atomic::{AtomicBool, AtomicU32};
use crate::telemetry;

/// How often a claim is sent, at most.
pub(super) const MAX_SENDINGS: u32 = 3;

/// What came of asking for a claim: what the store answered, and the lease where it is ours.
pub(crate) enum Asked {
    Acquired(Lease),
    Done { fingerprint: Option<Fingerprint>, record: Bytes },
    Mismatch,
    Running { fingerprint: Option<Fingerprint>, lease_left: Duration },
}

impl Lease {
    /// Asks for the claim, for each key up to three times and within 1.6 times the store's timeout, and again where its answer came
    /// too late.
    pub(crate) async fn ask(ledger: &Ledger, keys: Keys, claim: Claim) -> Result<Asked, StoreError> {
        match Self::ask_once(ledger, keys, claim).await? {
            Asked::Acquired(lease) if lease.is_over() => Box::pin(lease.ask_again()).await,
            asked => Ok(asked),
        }
    }

    pub(super) async fn ask_once(ledger: &Ledger, keys: Keys, claim: Claim) -> Result<Asked, StoreError> {
        match keys.previous {
            None => Self::ask_for(ledger, keys.current, claim).await,
            Some(previous) => Box::pin(Self::ask_for_both(ledger, keys.current, previous, claim)).await,
        }
    }

    async fn ask_for_both(ledger: &Ledger, key: Key, previous: Key, claim: Claim) -> Result<Asked, StoreError> {
        let previous = match Self::ask_for(ledger, previous, claim.clone()).await? {
            Asked::Acquired(previous) => previous,
            answer => return Ok(answer),
        };
        let mut asked = Self::ask_for(ledger, key, claim).await?;
        match &mut asked {
            Asked::Acquired(lease) => lease.previous = Some(Box::new(previous)),
            // Whoever ran it knew only the current key: now the previous one tells, too.
            Asked::Done { fingerprint, record } => previous.hand_on(key, *fingerprint, record).await,
            // Without both, the one is dropped and given back.
            Asked::Mismatch | Asked::Running { .. } => {}
        }
        Ok(asked)
    }

    /// Ends the claim with the outcome under another key, for as long as it is kept there.
    async fn hand_on(mut self, from: Key, fingerprint: Option<Fingerprint>, record: &Bytes) {
        self.claim.fingerprint = fingerprint;
        let Ok(Some(Entry { expires_in, .. })) = self.ledger.lookup(&from).await else { return };
        if self.complete(record, expires_in.max(MIN_DURATION), Duration::ZERO).await == Pursued::Held {
            self.begin();
        }
    }

    async fn ask_for(ledger: &Ledger, key: Key, claim: Claim) -> Result<Asked, StoreError> {
        let trial = ledger.breaker().admit(ledger.store().failure_domain(&key), key)?;
        let asked = Self::send(ledger, key, claim).await;
        trial.ended(&asked);
        asked
    }

    async fn send(ledger: &Ledger, key: Key, claim: Claim) -> Result<Asked, StoreError> {
        let timeout = ledger.call_timeout();
        let started = Instant::now();
        let budget = timeout * 8 / 5;
        let (ledger, adrift) = (ledger.clone(), AtomicBool::new(true));
        let renewed_after = AtomicU32::new(0);
        let mut lease =
            Self { ledger, key, claim, asked: started, renewed_after, is_unsure: false, adrift, previous: None };
        let mut backoff = Backoff::new();
        let mut sending = 1;
        let mut left = timeout;
        let claimed = loop {
            let error = match bounded_by(left, lease.ledger.store().claim(&lease.key, &lease.claim)).await {
                Ok(claimed) => break Ok(claimed),
                Err(error) => error,
            };
            telemetry::store_error("claim", &lease.key, &error);
            if error.is_definite() {
                break Err(error);
            }
            let pause = backoff.next();
            if sending == MAX_SENDINGS || started.elapsed() + pause >= budget {
                return Err(error);
            }
            Box::pin(sleep(pause)).await;
            sending += 1;
            left = budget.saturating_sub(started.elapsed()).min(timeout);
        };
        // An earlier sending may still be on its way, whatever came of this one.
        let is_first = sending == 1;
        *lease.adrift.get_mut() = !is_first;
        Ok(match claimed? {
            Claimed::Acquired { attempt } => {
                *lease.adrift.get_mut() = true;
                lease.claim.attempt = attempt;
                // The lease counts from the first sending.
                lease.is_unsure = !is_first;
                Asked::Acquired(lease)
            }
            Claimed::Done { fingerprint, record } => Asked::Done { fingerprint, record },
            Claimed::Mismatch => Asked::Mismatch,
            Claimed::Running { fingerprint, lease_left } => Asked::Running { fingerprint, lease_left },
        })
    }
}
