//! A claim whose answer is seen when its lease is over.
//!
//! An answer may wait for its thread, which a handler blocks, for a process that stands still, or, while secrets rotate, for the
//! claim of the other key. By then somebody else may have the key, so no attempt begins before the store has said that nobody has.

use std::fmt;

use tokio::time::sleep;

use super::ask::{Asked, MAX_SENDINGS};
use super::{Backoff, Lease};
use crate::store::{Claim, ClaimId, Hold, StoreError};
use crate::within::within;

/// Every answer came when the lease was over.
#[derive(Debug)]
struct TooLate;

impl Lease {
    /// Renews it, or asks anew where somebody else has taken the key.
    pub(super) async fn ask_again(mut self) -> Result<Asked, StoreError> {
        for _ in 0..MAX_SENDINGS {
            if self.hold().await? == Hold::Held {
                return Ok(Asked::Acquired(self));
            }
            let (ledger, keys) = (self.ledger.clone(), self.keys());
            let claim = Claim { id: ClaimId::random(), attempt: 0, ..self.claim.clone() };
            self.give_back().await;
            match Self::ask_once(&ledger, keys, claim).await? {
                Asked::Acquired(lease) if lease.is_over() => self = lease,
                asked => return Ok(asked),
            }
        }
        Err(StoreError::unknown(TooLate))
    }

    /// Renews it until it is not over any more.
    async fn hold(&self) -> Result<Hold, StoreError> {
        let mut backoff = Backoff::new();
        for sending in 1..=MAX_SENDINGS {
            match self.renew_now().await {
                Ok(Hold::Held) if self.is_over() => {}
                Err(_) if sending < MAX_SENDINGS => sleep(backoff.next()).await,
                renewed => return renewed,
            }
        }
        // It is shorter than the way to the store, where nobody else has come upon it so far.
        Ok(Hold::Held)
    }

    async fn renew_now(&self) -> Result<Hold, StoreError> {
        if let Some(previous) = &self.previous
            && Box::pin(previous.renew_now()).await? == Hold::Lost
        {
            return Ok(Hold::Lost);
        }
        self.renew_once().await
    }

    /// While secrets rotate, what is left of it would be in the way of the next. Beyond the time of one call it goes on in the
    /// background, as for any claim that is given up.
    async fn give_back(mut self) {
        // It has not run, and is not counted.
        self.claim.attempt = 0;
        if let Some(previous) = &mut self.previous {
            previous.claim.attempt = 0;
        }
        if within(self.ledger.call_timeout(), Box::pin(self.release(self.claim.lease))).await.is_some() {
            self.begin();
        }
    }
}

impl fmt::Display for TooLate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("each answer to a claim came when its lease was over")
    }
}

impl std::error::Error for TooLate {}
