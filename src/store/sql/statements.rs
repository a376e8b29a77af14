//! The statements of a store, for one database and one table.

use std::sync::Arc;

use super::row::Phase;
use super::table::quoted;

/// How a database says it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Dialect {
    /// The time of its clock, in milliseconds since 1970.
    pub(super) now: &'static str,
    /// The same, where a statement has yet to wait for a row that somebody else holds: with a bound on how long it does, where
    /// that is to be said. A caller that gives up leaves its statement waiting, on a connection that others need.
    pub(super) bounded_now: &'static str,
    /// What tells those who wait, where anything does.
    pub(super) tell: Option<&'static str>,
    /// What leaves rows that others hold for another time, where that is to be said.
    pub(super) unheld: &'static str,
}

/// What a step sends: a write, and if that wrote nothing, a read of what was in its way.
#[derive(Clone, Debug)]
pub(super) struct Step {
    pub(super) write: Arc<str>,
    pub(super) read: Arc<str>,
    /// How many of the parameters the read has.
    pub(super) reads: usize,
}

/// Everything that a store says. Parameters: 1 the key, 2 the claim, then as listed.
#[derive(Clone, Debug)]
pub(super) struct Statements {
    /// 3 lease, 4 retention, 5 fingerprint, 6 whether another refuses.
    pub(super) claim: Step,
    /// 3 lease, 4 retention, 5 fingerprint, 6 attempt.
    pub(super) renew: Step,
    /// 3 lease, 4 retention, 5 fingerprint, 6 attempt, 7 record.
    pub(super) complete: Step,
    /// 3 lease, 4 retention, 5 fingerprint, 6 attempt, 7 for how long it is remembered.
    pub(super) release: Step,
    /// 2 whether by force.
    pub(super) forget: Step,
    pub(super) lookup: Arc<str>,
    /// 1 how many.
    pub(super) sweep: Arc<str>,
}

const FREE: i64 = Phase::Free.number();
const RUNNING: i64 = Phase::Running.number();
const DONE: i64 = Phase::Done.number();

const COLUMNS: &str =
    "key, claim, state, attempt, lease_until, retention, fingerprint, forgotten, remembered, record, expires_at";

impl Statements {
    pub(super) fn of(table: &str, dialect: Dialect) -> Self {
        let table = &quoted(table);
        let Dialect { now, bounded_now, tell, unheld } = dialect;
        // Every write names the end of its lease, so that the time is asked for once, before any wait.
        let then = "(excluded.lease_until - $3)";
        let insert = |values: &str, set: &str, when: &str| {
            format!(
                "INSERT INTO {table} AS k ({COLUMNS}) VALUES ({values}) ON CONFLICT (key) DO UPDATE SET {set} WHERE {when}"
            )
        };
        let expired = format!("k.expires_at <= {then}");
        let mine = format!("{expired} OR k.claim = excluded.claim AND k.state = {RUNNING}");
        let all = "claim = excluded.claim, state = excluded.state, lease_until = excluded.lease_until, \
                   retention = excluded.retention, fingerprint = excluded.fingerprint, record = excluded.record, \
                   expires_at = excluded.expires_at, forgotten = false";
        let values = |state: i64, attempt: &str, record: &str, life: &str| {
            format!("$1, $2, {state}, {attempt}, {bounded_now} + $3, $4, $5, false, false, {record}, {now} + {life}")
        };
        let claim = insert(
            &values(RUNNING, "1", "NULL", "$3 + $4"),
            &format!(
                "{all}, attempt = CASE WHEN {expired} THEN 1 ELSE k.attempt + 1 END, \
                 remembered = k.expires_at > {then} AND (k.remembered OR k.state = {RUNNING})"
            ),
            &format!(
                "{expired} OR k.claim <> excluded.claim \
                 AND (NOT $6 OR k.forgotten OR k.fingerprint IS NOT DISTINCT FROM excluded.fingerprint) \
                 AND (k.state = {FREE} OR k.state = {RUNNING} AND k.lease_until <= {then})"
            ),
        );
        let renew = insert(
            &values(RUNNING, "$6", "NULL", "$3 + $4"),
            &format!("{all}, attempt = excluded.attempt, remembered = k.expires_at > {then} AND k.remembered"),
            &mine,
        );
        let complete = insert(
            &values(DONE, "$6", "$7", "$4"),
            &format!("{all}, attempt = excluded.attempt, remembered = false"),
            &mine,
        );
        // What is gone is made free for one lease, so that a claim still on its way finds it taken.
        let life = "CASE WHEN k.remembered AND k.retention > $7 THEN k.retention ELSE $7 END";
        let release = insert(
            &values(FREE, "$6", "NULL", "$3"),
            &format!(
                "state = {FREE}, claim = excluded.claim, record = NULL, forgotten = false, \
                 retention = CASE WHEN {expired} THEN excluded.retention ELSE k.retention END, \
                 fingerprint = CASE WHEN {expired} THEN excluded.fingerprint ELSE k.fingerprint END, \
                 attempt = CASE WHEN {expired} THEN $6 WHEN $6 = 0 AND k.attempt > 0 THEN k.attempt - 1 ELSE k.attempt END, \
                 remembered = k.expires_at > {then} AND {life} >= k.retention, \
                 expires_at = CASE WHEN {expired} THEN excluded.expires_at ELSE {then} + {life} END"
            ),
            &mine,
        );
        let forget = format!(
            "UPDATE {table} AS k SET state = {FREE}, forgotten = true, remembered = true, record = NULL, \
             expires_at = {now} + k.retention \
             WHERE k.key = $1 AND k.expires_at > {bounded_now} AND k.state IN ({FREE}, {RUNNING}, {DONE}) \
             AND ($2 OR NOT (k.state = {RUNNING} AND k.lease_until > {now}))"
        );
        let row = |wrote: &str, mine: &str, record: &str| {
            format!(
                "{wrote} AS wrote, attempt, state, {mine} AS mine, fingerprint, forgotten, \
                 lease_until - {now} AS lease_left, expires_at - {now} AS expires_in, {record} AS record"
            )
        };
        let read = |mine: &str| format!("SELECT {} FROM {table} WHERE key = $1", row("false", mine, "record"));
        // What is written is not told again. The end of an attempt is, where somebody waits for it.
        let nothing = if tell.is_some() { "NULL::bytea" } else { "NULL" };
        let step = |write: &str, mine: &str, tell: Option<&str>| {
            let told = tell.map(|tell| format!(", CASE WHEN watched THEN {tell} END AS told")).unwrap_or_default();
            Step {
                write: format!("{write} RETURNING {}{told}", row("true", "false", nothing)).into(),
                read: read(mine).into(),
                reads: if mine.contains("$2") { 2 } else { 1 },
            }
        };
        let some = format!("SELECT key FROM {table} WHERE expires_at <= {now} ORDER BY expires_at LIMIT $1 {unheld}");
        Self {
            claim: step(&claim, "claim = $2", None),
            renew: step(&renew, "claim = $2", None),
            complete: step(&complete, "claim = $2", tell),
            release: step(&release, "claim = $2", tell),
            forget: step(&forget, "false", tell),
            lookup: read("false").into(),
            sweep: format!("DELETE FROM {table} WHERE key IN ({some}) AND expires_at <= {now}").into(),
        }
    }
}
