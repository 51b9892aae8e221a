-- Silos, the leases of their work, and which of them hold the deltas of which pre-recovery. "data" is JSON of dr.Silo and dr.Work.
-- "beats" counts how often a silo was heard of: masters watch it change, each by its own clock. "term" is the fencing number of a
-- lease, "run" that of the master's run that it was given to.

-- +goose Up
INSERT INTO counters (name, value) VALUES ('lease', 0);

CREATE TABLE silos (
    name  TEXT PRIMARY KEY,
    state TEXT NOT NULL,
    beats BIGINT NOT NULL,
    seen  BIGINT NOT NULL,
    data  TEXT NOT NULL
);

CREATE TABLE leases (
    work    TEXT PRIMARY KEY,
    silo    TEXT NOT NULL REFERENCES silos (name),
    kind    TEXT NOT NULL,
    term    BIGINT NOT NULL,
    run     BIGINT NOT NULL,
    granted BIGINT NOT NULL,
    expires BIGINT NOT NULL,
    data    TEXT NOT NULL
);
CREATE INDEX leases_by_silo ON leases (silo);

CREATE TABLE deltas (
    pre_recovery TEXT NOT NULL,
    silo         TEXT NOT NULL REFERENCES silos (name),
    snapshot_id  TEXT NOT NULL REFERENCES snapshots (id),
    digest       TEXT NOT NULL,
    PRIMARY KEY (pre_recovery, silo)
);
CREATE INDEX deltas_by_snapshot ON deltas (snapshot_id);
CREATE INDEX deltas_by_silo ON deltas (silo);

-- +goose Down
DROP TABLE deltas;
DROP TABLE leases;
DROP TABLE silos;
DELETE FROM counters WHERE name = 'lease';
