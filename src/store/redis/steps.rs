//! The steps of a claim, as commands to the server.

use std::pin::{Pin, pin};
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use redis::Value;

use super::RedisStore;
use super::answer::{bytes, held, judge, number, text, unexpected};
use super::durability::Unconfirmed;
use super::failure::{Failure, is_from_before_7, is_reply};
use super::layout::{self, Phase, millis};
use super::script::{self, AllowOom, Script};
use crate::key::Key;
use crate::store::{Claim, Claimed, Entry, Forgotten, Hold, State, Store, StoreError};

/// The largest record that a script gets as an argument, in bytes.
const MAX_ARGUMENT: usize = 16 << 10;

/// How long a staged record stays that nobody comes for: its next sending stages it again.
const STAGED_FOR: Duration = Duration::from_secs(60);

impl RedisStore {
    /// The key's name in Redis. The braces let other keys share its cluster slot.
    fn name(&self, key: &Key) -> String {
        key.with_text(|key| [&self.prefix, ":{", key, "}"].concat())
    }

    fn publish(&self) -> &'static [u8] {
        self.topology.publish().as_bytes()
    }

    /// `SET NX GET`: nothing where the key was absent and is now the claim's, else what stands there.
    async fn set(&self, name: &str, running: &[u8], life: u64) -> Result<Value, Failure> {
        let life = life.to_string();
        let size = name.len() + running.len() + "NXGETPX".len() + life.len();
        let mut set = script::sized("SET", 6, size);
        set.arg(name).arg(running).arg("NX").arg("GET").arg("PX").arg(&life);
        let before_7 = async || self.call(&script::CLAIM, name, &[running, life.as_bytes()]).await;
        let claimed = self.by_version(pin!(self.connector.query(name, &set)), before_7).await;
        match claimed {
            // What has finished can be told all the same.
            Err(failure) if failure.error().code() == Some("OOM") => {
                match Box::pin(self.connector.query(name, redis::cmd("GET").arg(name))).await {
                    Ok(Value::Nil) | Err(_) => Err(failure),
                    there => there,
                }
            }
            claimed => claimed,
        }
    }

    /// Does it the way of 7.0 until the server turns out to be older.
    fn by_version(
        &self,
        from_7: Pin<&mut impl Future<Output = Result<Value, Failure>>>,
        before_7: impl AsyncFnOnce() -> Result<Value, Failure>,
    ) -> impl Future<Output = Result<Value, Failure>> {
        async move {
            if self.before_7.load(Ordering::Relaxed) {
                return Box::pin(before_7()).await;
            }
            match from_7.await {
                Err(failure) if is_from_before_7(failure.error()) => {
                    self.before_7.store(true, Ordering::Relaxed);
                    Box::pin(before_7()).await.map_err(|next| failure.and_then(next))
                }
                answer => answer,
            }
        }
    }

    fn call(&self, script: &Script, name: &str, args: &[&[u8]]) -> impl Future<Output = Result<Value, Failure>> {
        script.call(&self.connector, name, args)
    }

    async fn take(&self, name: &str, claim: &Claim) -> Result<Claimed, StoreError> {
        let running = layout::encode(claim, Phase::Running, 1, &[]);
        let found = self.set(name, &running, millis(claim.lease) + millis(claim.retention)).await?;
        if found == Value::Nil {
            return Ok(Claimed::Acquired { attempt: 1 });
        }
        match judge(bytes(Some(found))?, claim)? {
            Some(answer) => Ok(answer),
            None => Box::pin(self.take_over(name, claim)).await,
        }
    }

    async fn take_over(&self, name: &str, claim: &Claim) -> Result<Claimed, StoreError> {
        let running = layout::encode(claim, Phase::Running, 1, &[]);
        let lease = millis(claim.lease);
        let life = (lease + millis(claim.retention)).to_string();
        let refuse_other: &[u8] = if claim.refuse_other { b"1" } else { b"0" };
        let args = [&running[..], life.as_bytes(), &lease.to_string().into_bytes(), refuse_other];
        let answer = self.call(&script::TAKEOVER, name, &args).await?;
        let mut answer = answer.into_sequence().unwrap_or_default().into_iter();
        let verdict = answer.next().ok_or_else(unexpected)?;
        match text(&verdict)? {
            b"acquired" => Ok(Claimed::Acquired { attempt: number(answer.next())? }),
            b"done" => judge(bytes(answer.next())?, claim)?.ok_or_else(unexpected),
            b"mismatch" => Ok(Claimed::Mismatch),
            b"running" => {
                let held = layout::decode(bytes(answer.next())?).map_err(StoreError::unreadable)?;
                let lease_left = Duration::from_millis(number(answer.next())?);
                Ok(Claimed::Running { fingerprint: held.fingerprint, lease_left })
            }
            _ => Err(unexpected()),
        }
    }

    /// Completes without the record in an argument of the script, which would hold the server while it is copied: with
    /// 64 KiB for 115 µs instead of 16, with 1 MiB for 1.8 ms instead of 35 µs. Nothing where it cannot be staged, as when the
    /// server is out of memory.
    async fn complete_staged(&self, name: &str, claim: &Claim, done: &Bytes) -> Result<Option<Hold>, StoreError> {
        let stage = format!("{name}:{:032x}", u128::from_be_bytes(*claim.id.as_bytes()));
        let mut set = redis::cmd("SET");
        set.arg(&stage).arg(&done[..]).arg("PX").arg(millis(STAGED_FOR));
        let (keys, life) = ([name, &*stage], millis(claim.retention).to_string());
        let args = [claim.id.as_bytes(), life.as_bytes(), self.publish()];
        let call = |script| Script::call_staged(script, &self.connector, keys, &set, &args);
        let script = &script::COMPLETE_STAGED;
        match self.by_version(pin!(call(&script.flagged)), async || call(&script.plain).await).await {
            Ok(Value::Int(-1)) => Ok(None),
            // Also where a slot is on its way to another node, which takes one command at a time: whatever came of staging, the
            // whole script may be sent after it.
            Err(failure) if is_reply(failure.error()) => Ok(None),
            answer => held(&answer?).map(Some),
        }
    }

    /// Waits until what a claim has written is as safe as was asked for.
    async fn confirm(&self, name: &str, claim: &Claim, phase: Phase) -> Result<(), Unconfirmed> {
        self.or_leave(self.confirmer.confirm(name, phase, &claim.id).await)
    }

    /// Gives the claim back where too few have it.
    async fn confirm_claim(&self, name: &str, key: &Key, claim: &Claim) -> Result<(), StoreError> {
        match self.confirm(name, claim, Phase::Running).await {
            Err(Unconfirmed::TooFew(too_few)) => {
                // Whatever comes of that, the claim has taken effect.
                let released = self.release(key, &Claim { attempt: 0, ..claim.clone() }, claim.lease).await;
                released.map_err(StoreError::unconfirmed)?;
                Err(StoreError::refused(too_few))
            }
            confirmed => Ok(confirmed?),
        }
    }

    /// A server that cannot have a write confirmed may be a master whose place another has taken.
    fn or_leave(&self, confirmed: Result<(), Unconfirmed>) -> Result<(), Unconfirmed> {
        if confirmed.is_err() {
            self.connector.leave();
        }
        confirmed
    }

    /// A step that is taken also when the server is out of memory, where it knows of that.
    async fn last_step(&self, script: &AllowOom, name: &str, args: &[&[u8]]) -> Result<Hold, StoreError> {
        let before_7 = async || self.call(&script.plain, name, args).await;
        held(&self.by_version(pin!(self.call(&script.flagged, name, args)), before_7).await?)
    }
}

impl Store for RedisStore {
    async fn claim(&self, key: &Key, claim: &Claim) -> Result<Claimed, StoreError> {
        let name = self.name(key);
        let claimed = self.take(&name, claim).await?;
        if matches!(claimed, Claimed::Acquired { .. }) && self.confirmer.waits() {
            Box::pin(self.confirm_claim(&name, key, claim)).await?;
        }
        Ok(claimed)
    }

    async fn renew(&self, key: &Key, claim: &Claim) -> Result<Hold, StoreError> {
        let running = layout::encode(claim, Phase::Running, claim.attempt, &[]);
        let life = (millis(claim.lease) + millis(claim.retention)).to_string();
        // Whole, since a server that is frozen takes it when it thaws, and its caller has gone by then: nobody would answer a
        // `NOSCRIPT`, and the lease would be over.
        let name = self.name(key);
        let hold = held(&script::RENEW.call_whole(&self.connector, &name, &[&running, life.as_bytes()]).await?)?;
        if hold == Hold::Held {
            // The master may be one whose place another has taken: there the lease would run out.
            let confirmed = self.confirmer.confirm_at_once(&name, Phase::Running, &claim.id).await;
            self.or_leave(confirmed)?;
        }
        Ok(hold)
    }

    async fn complete(&self, key: &Key, claim: &Claim, record: Bytes) -> Result<Hold, StoreError> {
        let name = self.name(key);
        let done = layout::encode(claim, Phase::Done, claim.attempt, &record);
        let life = millis(claim.retention).to_string();
        let is_large = record.len() > MAX_ARGUMENT;
        let staged = if is_large { Box::pin(self.complete_staged(&name, claim, &done)).await? } else { None };
        let hold = match staged {
            Some(hold) => hold,
            None => self.last_step(&script::COMPLETE, &name, &[&done, life.as_bytes(), self.publish()]).await?,
        };
        if hold == Hold::Held && self.confirmer.waits() {
            Box::pin(self.confirm(&name, claim, Phase::Done)).await?;
        }
        Ok(hold)
    }

    async fn release(&self, key: &Key, claim: &Claim, remember: Duration) -> Result<Hold, StoreError> {
        let free = layout::encode(claim, Phase::Free, claim.attempt, &[]);
        let (life, lease) = (millis(remember).to_string(), millis(claim.lease).to_string());
        self.last_step(&script::RELEASE, &self.name(key), &[&free, life.as_bytes(), lease.as_bytes(), self.publish()])
            .await
    }

    async fn lookup(&self, key: &Key) -> Result<Option<Entry>, StoreError> {
        let name = self.name(key);
        let value = self.connector.query(&name, redis::cmd("GET").arg(&name)).await?;
        let ttl = self.connector.query(&name, redis::cmd("PTTL").arg(&name)).await?;
        if value == Value::Nil {
            return Ok(None);
        }
        let value = layout::decode(bytes(Some(value))?).map_err(StoreError::unreadable)?;
        let state = match value.phase {
            Phase::Done => State::Done(value.record),
            Phase::Free => State::Free,
            Phase::Running => State::Running,
        };
        // Negative where the key has gone in between, or has no end.
        let expires_in = Duration::from_millis(u64::try_from(number::<i64>(Some(ttl))?).unwrap_or(0));
        Ok(Some(Entry::new(state, value.attempt, value.fingerprint, expires_in)))
    }

    async fn forget(&self, key: &Key, force: bool) -> Result<Forgotten, StoreError> {
        let force: &[u8] = if force { b"1" } else { b"0" };
        let answer = self.call(&script::FORGET, &self.name(key), &[force, self.publish()]).await?;
        match text(&answer)? {
            b"absent" => Ok(Forgotten::Absent),
            b"forgotten" => Ok(Forgotten::Forgotten),
            b"running" => Ok(Forgotten::Running),
            _ => Err(unexpected()),
        }
    }

    fn failure_domain(&self, key: &Key) -> u16 {
        if self.topology.is_cluster() { self.topology.domain(&self.name(key)) } else { 0 }
    }

    async fn changed(&self, key: &Key) {
        self.push.changed(&self.name(key)).await;
    }
}
