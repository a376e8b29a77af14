CREATE TABLE IF NOT EXISTS {table} (
    key BLOB PRIMARY KEY NOT NULL,
    claim BLOB NOT NULL,
    -- 0 free, 1 running, 2 done
    state INTEGER NOT NULL,
    attempt INTEGER NOT NULL,
    -- Times are milliseconds since 1970, durations milliseconds.
    lease_until INTEGER NOT NULL,
    retention INTEGER NOT NULL,
    fingerprint BLOB,
    forgotten BOOLEAN NOT NULL,
    remembered BOOLEAN NOT NULL,
    record BLOB,
    expires_at INTEGER NOT NULL
);
CREATE INDEX IF NOT EXISTS {index} ON {bare} (expires_at);
