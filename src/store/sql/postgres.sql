CREATE TABLE IF NOT EXISTS {table} (
    key bytea PRIMARY KEY,
    claim bytea NOT NULL,
    attempt bigint NOT NULL,
    -- Times are milliseconds since 1970, durations milliseconds.
    lease_until bigint NOT NULL,
    retention bigint NOT NULL,
    fingerprint bytea,
    forgotten boolean NOT NULL,
    remembered boolean NOT NULL,
    -- Whether somebody waits for the attempt that runs.
    watched boolean NOT NULL DEFAULT false,
    -- When to look whether it has expired: then, or up to a lease later. What is indexed changes seldom.
    sweep_after bigint NOT NULL,
    -- 0 free, 1 running, 2 done. What the end of an attempt changes comes last: less is logged.
    state bigint NOT NULL,
    expires_at bigint NOT NULL,
    record bytea
);
CREATE INDEX IF NOT EXISTS {index} ON {table} (sweep_after);
