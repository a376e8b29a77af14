//! The statements of a store, for one database and one table.

use std::sync::Arc;

use super::quoted;

/// How a database says it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Dialect {
    /// The time of its clock, in milliseconds since 1970.
    pub(super) now: &'static str,
    /// Whether a statement may write in a `WITH`, so that what it could not write it reads at once.
    pub(super) writes_in_with: bool,
}

/// What a step sends: a write, and where that is another statement, a read of what was in its way.
#[derive(Clone, Debug)]
pub(super) struct Step {
    pub(super) write: Arc<str>,
    pub(super) read: Option<Arc<str>>,
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
    pub(super) lookup: Step,
    /// That somebody waits. Without parameters but the key.
    #[cfg_attr(not(feature = "postgres"), allow(dead_code, reason = "SQLite tells nobody"))]
    pub(super) watch: Arc<str>,
    /// 1 how many.
    pub(super) sweep: Arc<str>,
}

/// Less than the default of [`Ledger::store_timeout`](crate::Ledger::store_timeout), so that it is refused and not given up.
const LOCK_TIMEOUT_MS: u32 = 200;

/// Where the end of an attempt is told that somebody waits for.
pub(super) const CHANNEL: &str = "idempotency";

const FREE: i64 = super::Phase::Free.number();
const RUNNING: i64 = super::Phase::Running.number();
const DONE: i64 = super::Phase::Done.number();

const COLUMNS: &str =
    "key, claim, state, attempt, lease_until, retention, fingerprint, forgotten, remembered, record, expires_at";

impl Statements {
    pub(super) fn of(table: &str, dialect: Dialect) -> Self {
        let table = &quoted(table);
        // No table has a name with a space.
        let now = if dialect.writes_in_with { "(SELECT ms FROM \"the clock\")" } else { dialect.now };
        let text = Text { table, dialect, now };
        let insert = |values: &str, set: &str, when: &str| {
            format!(
                "INSERT INTO {table} AS k ({COLUMNS}) VALUES ({values}) ON CONFLICT (key) DO UPDATE SET {set} WHERE {when}"
            )
        };
        let expired = format!("k.expires_at <= {now}");
        let mine = format!("{expired} OR k.claim = excluded.claim AND k.state = {RUNNING}");
        let all = "claim = excluded.claim, state = excluded.state, lease_until = excluded.lease_until, \
                   retention = excluded.retention, fingerprint = excluded.fingerprint, record = excluded.record, \
                   expires_at = excluded.expires_at, forgotten = false";
        let running = |attempt: &str| {
            format!("$1, $2, {RUNNING}, {attempt}, {now} + $3, $4, $5, false, false, NULL, {now} + $3 + $4")
        };
        let claim = insert(
            &running("1"),
            &format!(
                "{all}, attempt = CASE WHEN {expired} THEN 1 ELSE k.attempt + 1 END, \
                 remembered = k.expires_at > {now} AND (k.remembered OR k.state = {RUNNING})"
            ),
            &format!(
                "{expired} OR k.claim <> excluded.claim \
                 AND (NOT $6 OR k.forgotten OR k.fingerprint IS NOT DISTINCT FROM excluded.fingerprint) \
                 AND (k.state = {FREE} OR k.state = {RUNNING} AND k.lease_until <= {now})"
            ),
        );
        let renew = insert(
            &running("$6"),
            &format!("{all}, attempt = excluded.attempt, remembered = k.expires_at > {now} AND k.remembered"),
            &mine,
        );
        let complete = insert(
            &format!("$1, $2, {DONE}, $6, {now} + $3, $4, $5, false, false, $7, {now} + $4"),
            &format!("{all}, attempt = excluded.attempt, remembered = false"),
            &mine,
        );
        // What is gone is made free for one lease, so that a claim still on its way finds it taken.
        let life = "CASE WHEN k.remembered AND k.retention > $7 THEN k.retention ELSE $7 END";
        let release = insert(
            &format!("$1, $2, {FREE}, $6, {now}, $4, $5, false, false, NULL, {now} + $3"),
            &format!(
                "state = {FREE}, claim = excluded.claim, record = NULL, forgotten = false, \
                 retention = CASE WHEN {expired} THEN excluded.retention ELSE k.retention END, \
                 fingerprint = CASE WHEN {expired} THEN excluded.fingerprint ELSE k.fingerprint END, \
                 attempt = CASE WHEN {expired} THEN $6 WHEN $6 = 0 AND k.attempt > 0 THEN k.attempt - 1 ELSE k.attempt END, \
                 remembered = k.expires_at > {now} AND {life} >= k.retention, \
                 expires_at = CASE WHEN {expired} THEN {now} + $3 ELSE {now} + {life} END"
            ),
            &mine,
        );
        let forget = format!(
            "UPDATE {table} AS k SET state = {FREE}, forgotten = true, remembered = true, record = NULL, \
             expires_at = {now} + k.retention \
             WHERE k.key = $1 AND k.expires_at > {now} AND k.state IN ({FREE}, {RUNNING}, {DONE}) AND ($2 OR NOT (k.state = {RUNNING} AND k.lease_until > {now}))"
        );
        Self {
            claim: text.step(&claim, "claim = $2", false),
            renew: text.step(&renew, "claim = $2", false),
            complete: text.step(&complete, "claim = $2", true),
            release: text.step(&release, "claim = $2", true),
            forget: text.step(&forget, "false", true),
            lookup: Step { write: text.alone(&text.read("false")).into(), read: None },
            watch: format!("UPDATE {table} SET watched = true WHERE key = $1 AND state = {RUNNING} AND NOT watched")
                .into(),
            sweep: text.alone(&text.sweep()).into(),
        }
    }
}

/// What all statements for one table have in common.
struct Text<'a> {
    table: &'a str,
    dialect: Dialect,
    now: &'a str,
}

impl Text<'_> {
    /// A write, and what was in its way. The end of an attempt is told, where somebody waits for it.
    fn step(&self, write: &str, mine: &str, ends: bool) -> Step {
        let wrote = self.row("true", "false", "NULL");
        let write = format!("{write} RETURNING {wrote}");
        if !self.dialect.writes_in_with {
            return Step { write: write.into(), read: Some(self.read(mine).into()) };
        }
        let told =
            if ends { "CASE WHEN watched THEN pg_notify('{channel}', encode($1, 'hex'))::text END" } else { "NULL" };
        let told = told.replace("{channel}", CHANNEL);
        let columns = "wrote, attempt, state, mine, fingerprint, forgotten, lease_left, expires_in, record";
        let read = self.select(&format!("{}, NULL", self.row("false", mine, "record")));
        Step {
            write: format!(
                "WITH {}, \"the write\" AS ({write}, watched) SELECT {columns}, {told} AS told FROM \"the write\" \
                 UNION ALL ({read} AND NOT EXISTS (SELECT FROM \"the write\"))",
                self.clock(),
            )
            .into(),
            read: None,
        }
    }

    fn read(&self, mine: &str) -> String {
        self.select(&self.row("false", mine, "record"))
    }

    fn select(&self, columns: &str) -> String {
        format!("SELECT {columns} FROM {} WHERE key = $1", self.table)
    }

    fn row(&self, wrote: &str, mine: &str, record: &str) -> String {
        let now = self.now;
        // What is written is not told again.
        let record = if record == "NULL" && self.dialect.writes_in_with { "NULL::bytea" } else { record };
        format!(
            "{wrote} AS wrote, attempt, state, {mine} AS mine, fingerprint, forgotten, \
             lease_until - {now} AS lease_left, expires_at - {now} AS expires_in, {record} AS record"
        )
    }

    /// What others hold at the moment is left for another time.
    fn sweep(&self) -> String {
        let (table, now) = (self.table, self.now);
        let unheld = if self.dialect.writes_in_with { "FOR UPDATE SKIP LOCKED" } else { "" };
        let some = format!("SELECT key FROM {table} WHERE expires_at <= {now} ORDER BY expires_at LIMIT $1 {unheld}");
        format!("DELETE FROM {table} WHERE key IN ({some}) AND expires_at <= {now}")
    }

    fn alone(&self, statement: &str) -> String {
        if self.dialect.writes_in_with { format!("WITH {} {statement}", self.clock()) } else { statement.to_owned() }
    }

    /// The time, which is looked at first, and with it how long the statement may wait for a row that somebody else holds: a
    /// caller that gives up leaves its statement waiting, on a connection that others need.
    fn clock(&self) -> String {
        let now = self.dialect.now;
        format!(
            "\"the clock\" AS MATERIALIZED (SELECT {now} AS ms, set_config('lock_timeout', '{LOCK_TIMEOUT_MS}', true))"
        )
    }
}
