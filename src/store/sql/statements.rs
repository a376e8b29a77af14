//! The statements of a store, for one database and one table.

use std::sync::Arc;

use super::row::Phase;
use super::sweeper;
use super::table::quoted;

/// How a database says it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Dialect {
    /// The time of its clock, in milliseconds since 1970.
    pub(super) now: &'static str,
    /// The same, where a write has yet to wait for a row that somebody else holds: with a bound on how long it does, where
    /// that is to be said. A caller that gives up leaves its statement waiting, on a connection that others need.
    pub(super) bounded_now: &'static str,
    /// What tells those who wait, where anything does.
    pub(super) tell: Option<&'static str>,
    /// What stands before and after a query for keys, for a condition that a key is one of them.
    pub(super) one_of: [&'static str; 2],
}

/// What a step may send. Each statement takes effect only where the state of its row allows it.
#[derive(Clone, Debug)]
pub(super) struct Step {
    /// For a key that has no row.
    pub(super) insert: Statement,
    /// For a key that has one.
    pub(super) update: Statement,
    /// Says what was in the way.
    pub(super) read: Statement,
}

#[derive(Clone, Debug)]
pub(super) struct Statement {
    pub(super) sql: Arc<str>,
    /// How many of its step's parameters it has.
    pub(super) parameters: usize,
    /// It writes, and answers with the row.
    pub(super) returns: bool,
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
    pub(super) lookup: Statement,
    /// 1 how many.
    pub(super) sweep: Arc<str>,
}

/// The most that a step has.
const MAX_PARAMETERS: usize = 7;

const FREE: i64 = Phase::Free.number();
const RUNNING: i64 = Phase::Running.number();
const DONE: i64 = Phase::Done.number();

impl Statements {
    pub(super) fn of(table: &str, dialect: Dialect) -> Self {
        let table = &quoted(table);
        let Dialect { now, bounded_now, tell, .. } = dialect;
        // The end of an attempt is told, where somebody waits for it.
        let told = tell.map(|tell| format!(", watched = CASE WHEN k.watched THEN {tell} IS NULL ELSE false END"));
        let told = told.unwrap_or_default();
        let insert = |state: i64, attempt: &str, record: &str, life: &str| {
            Statement::new(&format!(
                "INSERT INTO {table} (key, claim, state, attempt, lease_until, retention, fingerprint, forgotten, remembered, record, \
                 expires_at, sweep_after) \
                 VALUES ($1, $2, {state}, {attempt}, {bounded_now} + $3, $4, $5, false, false, {record}, \
                 {now} + {life}, {now} + {life}) \
                 ON CONFLICT (key) DO NOTHING"
            ))
        };
        // The index moves only for more than a lease: what an attempt makes of its row, it writes within one, and then once.
        let lives = |life: &str| {
            format!(
                "expires_at = {now} + {life}, sweep_after = CASE \
                 WHEN k.sweep_after - {now} - ({life}) BETWEEN 0 AND $3 THEN k.sweep_after ELSE {now} + {life} END"
            )
        };
        let update = |set: &str, when: &str| format!("UPDATE {table} AS k SET {set} WHERE k.key = $1 AND ({when})");
        let read = |mine: &str| {
            Statement::new(&format!(
                "SELECT attempt, state, {mine} AS mine, fingerprint, forgotten, \
                 lease_until - {now} AS lease_left, expires_at - {now} AS expires_in, record FROM {table} WHERE key = $1"
            ))
        };
        let step = |insert, update: String| Step { insert, update: Statement::new(&update), read: read("claim = $2") };

        let expired = format!("k.expires_at <= {now}");
        let expired_bounded = format!("k.expires_at <= {bounded_now}");
        let mine = format!("{expired_bounded} OR k.claim = $2 AND k.state = {RUNNING}");
        let held = "claim = $2, retention = $4, fingerprint = $5, forgotten = false";
        let claim = update(
            &format!(
                "{held}, state = {RUNNING}, lease_until = {now} + $3, record = NULL, {}, \
                 attempt = CASE WHEN {expired} THEN 1 ELSE k.attempt + 1 END, \
                 remembered = k.expires_at > {now} AND (k.remembered OR k.state = {RUNNING})",
                lives("$3 + $4")
            ),
            &format!(
                "{expired_bounded} OR k.claim <> $2 \
                 AND (NOT $6 OR k.forgotten OR k.fingerprint IS NOT DISTINCT FROM $5) \
                 AND (k.state = {FREE} OR k.state = {RUNNING} AND k.lease_until <= {now})"
            ),
        ) + " RETURNING attempt";
        let renew = update(
            &format!(
                "{held}, state = {RUNNING}, lease_until = {now} + $3, attempt = $6, \
                 record = NULL, remembered = k.expires_at > {now} AND k.remembered, {}",
                lives("$3 + $4")
            ),
            &mine,
        );
        let complete = update(
            &format!("{held}, state = {DONE}, attempt = $6, record = $7, remembered = false, {}{told}", lives("$4")),
            &mine,
        );
        let life = "CASE WHEN k.remembered AND k.retention > $7 THEN k.retention ELSE $7 END";
        let release = update(
            &format!(
                "state = {FREE}, claim = $2, record = NULL, forgotten = false, \
                 retention = CASE WHEN {expired} THEN $4 ELSE k.retention END, \
                 fingerprint = CASE WHEN {expired} THEN $5 ELSE k.fingerprint END, \
                 attempt = CASE WHEN {expired} THEN $6 WHEN $6 = 0 AND k.attempt > 0 THEN k.attempt - 1 ELSE k.attempt END, \
                 remembered = k.expires_at > {now} AND {life} >= k.retention, {}{told}",
                lives(&format!("CASE WHEN {expired} THEN $3 ELSE {life} END"))
            ),
            &mine,
        );
        let forget = update(
            &format!(
                "state = {FREE}, forgotten = true, remembered = true, record = NULL, \
                 expires_at = {now} + k.retention, sweep_after = {now} + k.retention{told}"
            ),
            &format!(
                "k.expires_at > {bounded_now} AND k.state IN ({FREE}, {RUNNING}, {DONE}) \
                 AND ($2 OR NOT (k.state = {RUNNING} AND k.lease_until > {now}))"
            ),
        );
        Self {
            claim: step(insert(RUNNING, "1", "NULL", "$3 + $4"), claim),
            renew: step(insert(RUNNING, "$6", "NULL", "$3 + $4"), renew),
            complete: step(insert(DONE, "$6", "$7", "$4"), complete),
            // What is gone is made free for one lease, so that a claim still on its way finds it taken.
            release: step(insert(FREE, "$6", "NULL", "$3"), release),
            // There is nothing to forget where there is no row.
            forget: Step { insert: Statement::new(&forget), update: Statement::new(&forget), read: read("false") },
            lookup: read("false"),
            sweep: sweeper::statement(table, "sweep_after", dialect).into(),
        }
    }
}

impl Statement {
    fn new(sql: &str) -> Self {
        let parameters = (1..=MAX_PARAMETERS).rev().find(|number| sql.contains(&format!("${number}"))).unwrap_or(0);
        let returns = sql.ends_with(" RETURNING attempt");
        Self { sql: sql.into(), parameters, returns }
    }
}
