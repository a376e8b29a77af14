//! The steps of a store, whichever database it is in.

use std::time::Duration;

use bytes::Bytes;

use super::Parameter::{Bytes as Blob, Flag, Number, OptionalBytes};
use super::row::{Meaning, Phase, Row};
use super::statements::Step;
use super::{Contended, Database, Parameter, Sweeper, failed, is_undone, millis};
use crate::key::Key;
use crate::store::{Claim, Claimed, Entry, Forgotten, Hold, StoreError};

/// How often a step is tried that others were faster than, or that the database has undone for their sake.
const MAX_TRIES: usize = 8;

pub(super) async fn claim<D: Database>(database: &D, key: &Key, claim: &Claim) -> Result<Claimed, StoreError> {
    let [key, id, lease, retention, fingerprint] = named(key, claim);
    let parameters = [key, id, lease, retention, fingerprint, Flag(claim.refuse_other)];
    let step = &database.statements().claim;
    if D::READS_FIRST {
        let seen = database.query(&step.read, &parameters[..step.reads]).await.map_err(failed)?;
        if let Some(answer) = seen.and_then(|row| row.claimed(claim)) {
            return Ok(answer);
        }
    }
    let claimed = settle(database, step, &parameters, |row| row?.claimed(claim)).await?;
    if let Claimed::Acquired { attempt: 1 } = claimed {
        Sweeper::new_key(database);
    }
    Ok(claimed)
}

pub(super) async fn renew(database: &impl Database, key: &Key, claim: &Claim) -> Result<Hold, StoreError> {
    let [key, id, lease, retention, fingerprint] = named(key, claim);
    let parameters = [key, id, lease, retention, fingerprint, Number(claim.attempt.into())];
    settle(database, &database.statements().renew, &parameters, |row| row?.hold(Phase::Done)).await
}

pub(super) async fn complete(
    database: &impl Database,
    key: &Key,
    claim: &Claim,
    record: &Bytes,
) -> Result<Hold, StoreError> {
    let [key, id, lease, retention, fingerprint] = named(key, claim);
    let parameters = [key, id, lease, retention, fingerprint, Number(claim.attempt.into()), Blob(record)];
    settle(database, &database.statements().complete, &parameters, |row| row?.hold(Phase::Done)).await
}

pub(super) async fn release(
    database: &impl Database,
    key: &Key,
    claim: &Claim,
    remember: Duration,
) -> Result<Hold, StoreError> {
    let [key, id, lease, retention, fingerprint] = named(key, claim);
    let number = Number(claim.attempt.into());
    let parameters = [key, id, lease, retention, fingerprint, number, Number(millis(remember))];
    settle(database, &database.statements().release, &parameters, |row| row?.hold(Phase::Free)).await
}

pub(super) async fn forget(database: &impl Database, key: &Key, force: bool) -> Result<Forgotten, StoreError> {
    let parameters = [Blob(key.as_bytes()), Flag(force)];
    let forgotten = |row: Option<Row>| row.map_or(Some(Forgotten::Absent), |row| row.forgotten());
    settle(database, &database.statements().forget, &parameters, forgotten).await
}

pub(super) async fn lookup(database: &impl Database, key: &Key) -> Result<Option<Entry>, StoreError> {
    let row = database.query(&database.statements().lookup, &[Blob(key.as_bytes())]).await.map_err(failed)?;
    Ok(row.and_then(Row::entry))
}

/// What every step says of a claim.
fn named<'a>(key: &'a Key, claim: &'a Claim) -> [Parameter<'a>; 5] {
    [
        Blob(key.as_bytes()),
        Blob(claim.id.as_bytes()),
        Number(millis(claim.lease)),
        Number(millis(claim.retention)),
        OptionalBytes(claim.fingerprint.as_ref().map(|fingerprint| &fingerprint.as_bytes()[..])),
    ]
}

/// Sends a step, and returns the row that it wrote or that was in its way.
async fn send(database: &impl Database, step: &Step, parameters: &[Parameter<'_>]) -> Result<Option<Row>, sqlx::Error> {
    match database.query(&step.write, parameters).await? {
        None => database.query(&step.read, &parameters[..parameters.len().min(step.reads)]).await,
        written => Ok(written),
    }
}

/// Sends a step until what it finds means something.
async fn settle<T>(
    database: &impl Database,
    step: &Step,
    parameters: &[Parameter<'_>],
    meaning: impl Fn(Option<Row>) -> Meaning<T>,
) -> Result<T, StoreError> {
    for _ in 0..MAX_TRIES {
        match send(database, step, parameters).await {
            Ok(row) => {
                if let Some(answer) = meaning(row) {
                    return Ok(answer);
                }
            }
            Err(error) if is_undone(&error) => {}
            Err(error) => return Err(failed(error)),
        }
    }
    Err(StoreError::refused(Contended))
}
