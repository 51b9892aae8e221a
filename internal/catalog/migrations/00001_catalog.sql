-- The same statements make the catalog on SQLite and on PostgreSQL: TEXT, BIGINT, and partial indexes only.
-- Instants are nanoseconds since 1970 UTC. "data" columns are JSON of the types of internal/dr; the other columns are
-- what is searched, sorted or guarded by.

-- +goose Up
CREATE TABLE counters (
    name  TEXT PRIMARY KEY,
    value BIGINT NOT NULL
);
INSERT INTO counters (name, value) VALUES ('event', 0);

CREATE TABLE servers (
    id      TEXT PRIMARY KEY,
    name    TEXT NOT NULL,
    data    TEXT NOT NULL,
    lkg     TEXT NOT NULL DEFAULT '',
    removed BIGINT NOT NULL DEFAULT 0
);
CREATE UNIQUE INDEX servers_name ON servers (name) WHERE removed = 0;

CREATE TABLE snapshots (
    id           TEXT PRIMARY KEY,
    server_id    TEXT NOT NULL REFERENCES servers (id),
    seq          BIGINT NOT NULL,
    taken        BIGINT NOT NULL,
    recorded     BIGINT NOT NULL,
    state        TEXT NOT NULL,
    pre_recovery TEXT NOT NULL DEFAULT '',
    verdict      TEXT NOT NULL DEFAULT '',
    data         TEXT NOT NULL,
    inventory    TEXT NOT NULL
);
CREATE INDEX snapshots_by_taken ON snapshots (server_id, taken, seq);
CREATE INDEX snapshots_by_seq ON snapshots (server_id, seq);
CREATE INDEX snapshots_untested ON snapshots (recorded) WHERE verdict = '' AND state IN ('kept', 'replicated', 'pre-recovered');

CREATE TABLE pre_recoveries (
    id          TEXT PRIMARY KEY,
    snapshot_id TEXT NOT NULL REFERENCES snapshots (id),
    seq         BIGINT NOT NULL,
    brief       TEXT NOT NULL,
    data        TEXT NOT NULL
);
CREATE INDEX pre_recoveries_by_snapshot ON pre_recoveries (snapshot_id, seq);

CREATE TABLE verdicts (
    id           TEXT PRIMARY KEY,
    snapshot_id  TEXT NOT NULL REFERENCES snapshots (id),
    server_id    TEXT NOT NULL REFERENCES servers (id),
    seq          BIGINT NOT NULL,
    outcome      TEXT NOT NULL,
    pre_recovery TEXT NOT NULL,
    ticket       TEXT NOT NULL DEFAULT '',
    brief        TEXT NOT NULL,
    data         TEXT NOT NULL
);
CREATE INDEX verdicts_by_server ON verdicts (server_id, seq);
CREATE INDEX verdicts_by_snapshot ON verdicts (snapshot_id, outcome, seq);

CREATE TABLE promotions (
    seq         BIGINT PRIMARY KEY,
    server_id   TEXT NOT NULL REFERENCES servers (id),
    snapshot_id TEXT NOT NULL REFERENCES snapshots (id),
    previous    TEXT NOT NULL,
    verdict_id  TEXT NOT NULL UNIQUE REFERENCES verdicts (id),
    at          BIGINT NOT NULL
);
CREATE INDEX promotions_by_server ON promotions (server_id, seq);

CREATE TABLE tickets (
    id        TEXT PRIMARY KEY,
    seq       BIGINT NOT NULL,
    server_id TEXT NOT NULL,
    server    TEXT NOT NULL,
    problem   TEXT NOT NULL,
    title     TEXT NOT NULL,
    detail    TEXT NOT NULL,
    snapshot  TEXT NOT NULL,
    opened    BIGINT NOT NULL,
    last_seen BIGINT NOT NULL,
    count     BIGINT NOT NULL,
    closed    BIGINT NOT NULL DEFAULT 0,
    reason    TEXT NOT NULL DEFAULT ''
);
CREATE UNIQUE INDEX tickets_open ON tickets (server_id, problem) WHERE closed = 0;
CREATE INDEX tickets_by_server ON tickets (server_id, seq);

CREATE TABLE invocations (
    id          TEXT PRIMARY KEY,
    seq         BIGINT NOT NULL,
    server_id   TEXT NOT NULL REFERENCES servers (id),
    snapshot_id TEXT NOT NULL REFERENCES snapshots (id),
    state       TEXT NOT NULL,
    data        TEXT NOT NULL
);
CREATE UNIQUE INDEX invocations_active ON invocations (server_id) WHERE state IN ('invoking', 'running');

CREATE TABLE events (
    seq       BIGINT PRIMARY KEY,
    at        BIGINT NOT NULL,
    kind      TEXT NOT NULL,
    server_id TEXT NOT NULL,
    server    TEXT NOT NULL,
    subject   TEXT NOT NULL,
    message   TEXT NOT NULL
);
CREATE INDEX events_by_server ON events (server_id, seq);

-- +goose Down
DROP TABLE events;
DROP TABLE invocations;
DROP TABLE tickets;
DROP TABLE promotions;
DROP TABLE verdicts;
DROP TABLE pre_recoveries;
DROP TABLE snapshots;
DROP TABLE servers;
DROP TABLE counters;
