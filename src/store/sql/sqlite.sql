CREATE TABLE IF NOT EXISTS {table} (
    key BLOB PRIMARY KEY NOT NULL,
    claim BLOB NOT NULL,
    attempt INTEGER NOT NULL,
    -- Times are milliseconds since 1970, durations milliseconds.
    lease_until INTEGER NOT NULL,
    retention INTEGER NOT NULL,
    fingerprint BLOB,
    forgotten BOOLEAN NOT NULL,
    remembered BOOLEAN NOT NULL,
    -- When to look whether it has expired: then, or up to a lease later. What is indexed changes seldom.
    sweep_after INTEGER NOT NULL,
    -- 0 free, 1 running, 2 done. What the end of an attempt changes comes last: less is logged.
    state INTEGER NOT NULL,
    expires_at INTEGER NOT NULL,
    record BLOB
);
CREATE INDEX IF NOT EXISTS {index} ON {bare} (sweep_after);
