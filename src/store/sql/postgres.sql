CREATE TABLE IF NOT EXISTS {table} (
    key bytea PRIMARY KEY,
    claim bytea NOT NULL,
    -- 0 free, 1 running, 2 done
    state bigint NOT NULL,
    attempt bigint NOT NULL,
    -- Times are milliseconds since 1970, durations milliseconds.
    lease_until bigint NOT NULL,
    retention bigint NOT NULL,
    fingerprint bytea,
    forgotten boolean NOT NULL,
    remembered boolean NOT NULL,
    record bytea,
    expires_at bigint NOT NULL,
    -- Whether somebody waits for the attempt that runs.
    watched boolean NOT NULL DEFAULT false
);
CREATE INDEX IF NOT EXISTS {index} ON {table} (expires_at);
