-- What a server had in a month, added up when it happened (dr.Book), so that metering a month does not read what a million snapshots
-- say. "month" counts from the year 0, in UTC. stored: by how much what is kept of it grew or shrank in the month; image_*, data_*: the
-- newest of each kind that was kept at its end, taken 0 for none. A month without a row is like the one before, with nothing added.
-- booked: 0 means that a server's history is still to be added up, which opening the catalog does.

-- +goose Up
CREATE TABLE books (
    server_id    TEXT NOT NULL REFERENCES servers (id),
    month        BIGINT NOT NULL,
    snapshots    BIGINT NOT NULL DEFAULT 0,
    added        BIGINT NOT NULL DEFAULT 0,
    sent         BIGINT NOT NULL DEFAULT 0,
    replicated   BIGINT NOT NULL DEFAULT 0,
    stored       BIGINT NOT NULL DEFAULT 0,
    image_taken  BIGINT NOT NULL DEFAULT 0,
    image_size   BIGINT NOT NULL DEFAULT 0,
    data_taken   BIGINT NOT NULL DEFAULT 0,
    data_size    BIGINT NOT NULL DEFAULT 0,
    tests        BIGINT NOT NULL DEFAULT 0,
    test_seconds BIGINT NOT NULL DEFAULT 0,
    test_memory  BIGINT NOT NULL DEFAULT 0,
    test_cpus    BIGINT NOT NULL DEFAULT 0,
    PRIMARY KEY (server_id, month)
);
ALTER TABLE servers ADD COLUMN booked BIGINT NOT NULL DEFAULT 0;
CREATE INDEX servers_unbooked ON servers (id) WHERE booked = 0;

-- +goose Down
DROP INDEX servers_unbooked;
ALTER TABLE servers DROP COLUMN booked;
DROP TABLE books;
