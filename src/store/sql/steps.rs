//! The steps of a store, whichever database it is in.

use std::time::Duration;

use bytes::Bytes;

use super::Parameter::{Bytes as Blob, Flag, Number, OptionalBytes};
use super::row::{FIRST, Meaning, Phase, Row};
use super::statements::{Statement, Step};
use super::{Contended, Database, Parameter, Sweeper, failed, is_undone, millis};
use crate::key::Key;
use crate::store::{Claim, Claimed, Entry, Forgotten, Hold, StoreError};

/// How often a step is tried that others were faster than, or that the database has undone for their sake.
const MAX_TRIES: usize = 8;

enum Sent {
    Wrote(u32),
    Read(Option<Row>),
}

pub(super) async fn claim<D: Database>(database: &D, key: &Key, claim: &Claim) -> Result<Claimed, StoreError> {
    let [key, id, lease, retention, fingerprint] = named(key, claim);
    let parameters = [key, id, lease, retention, fingerprint, Flag(claim.refuse_other)];
    let step = &database.statements().claim;
    let acquired = |attempt| Claimed::Acquired { attempt };
    let first = (!D::READS_FIRST).then_some(&step.insert);
    let claimed = settle(database, step, first, &parameters, acquired, |row| row?.claimed(claim)).await?;
    if let Claimed::Acquired { attempt: FIRST } = claimed {
        Sweeper::new_key(database);
    }
    Ok(claimed)
}

pub(super) async fn renew(database: &impl Database, key: &Key, claim: &Claim) -> Result<Hold, StoreError> {
    let [key, id, lease, retention, fingerprint] = named(key, claim);
    let parameters = [key, id, lease, retention, fingerprint, Number(claim.attempt.into())];
    hold(database, &database.statements().renew, &parameters, Phase::Done).await
}

pub(super) async fn complete(
    database: &impl Database,
    key: &Key,
    claim: &Claim,
    record: &Bytes,
) -> Result<Hold, StoreError> {
    let [key, id, lease, retention, fingerprint] = named(key, claim);
    let parameters = [key, id, lease, retention, fingerprint, Number(claim.attempt.into()), Blob(record)];
    hold(database, &database.statements().complete, &parameters, Phase::Done).await
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
    hold(database, &database.statements().release, &parameters, Phase::Free).await
}

pub(super) async fn forget(database: &impl Database, key: &Key, force: bool) -> Result<Forgotten, StoreError> {
    let parameters = [Blob(key.as_bytes()), Flag(force)];
    let step = &database.statements().forget;
    let was_there = |row: Option<Row>| row.map_or(Some(Forgotten::Absent), |row| row.forgotten());
    settle(database, step, Some(&step.update), &parameters, |_| Forgotten::Forgotten, was_there).await
}

pub(super) async fn lookup(database: &impl Database, key: &Key) -> Result<Option<Entry>, StoreError> {
    let row = database.read(&database.statements().lookup, &[Blob(key.as_bytes())]).await.map_err(failed)?;
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

/// A step of the claim that has the key. `held` is the phase in which it has, too, what is not running any more.
async fn hold(
    database: &impl Database,
    step: &Step,
    parameters: &[Parameter<'_>],
    held: Phase,
) -> Result<Hold, StoreError> {
    settle(database, step, Some(&step.update), parameters, |_| Hold::Held, |row| row?.hold(held)).await
}

/// Sends the statements of a step until one has written its row, or what is read instead means something: `wrote` says what it is to
/// have written, with the number of the attempt.
async fn settle<T>(
    database: &impl Database,
    step: &Step,
    first: Option<&Statement>,
    parameters: &[Parameter<'_>],
    wrote: impl Fn(u32) -> T,
    meaning: impl Fn(Option<Row>) -> Meaning<T>,
) -> Result<T, StoreError> {
    let mut write = first;
    for _ in 0..MAX_TRIES {
        match send(database, write, &step.read, parameters).await {
            Ok(Sent::Wrote(attempt)) => return Ok(wrote(attempt)),
            Ok(Sent::Read(row)) => {
                write = Some(if row.is_some() { &step.update } else { &step.insert });
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

/// Sends a write, and if that wrote nothing, a read of what was in its way.
async fn send(
    database: &impl Database,
    write: Option<&Statement>,
    read: &Statement,
    parameters: &[Parameter<'_>],
) -> Result<Sent, sqlx::Error> {
    if let Some(write) = write
        && let Some(attempt) = database.write(write, parameters).await?
    {
        return Ok(Sent::Wrote(attempt));
    }
    database.read(read, parameters).await.map(Sent::Read)
}
