-- What a status page and a tick of the scheduler ask of every server is kept with the server, so that neither looks at a
-- million snapshots. image_at, data_at: when the snapshot of that kind which was recorded last and has not expired was
-- taken, 0 for none; last_at: the same of either kind; newest_at: the later of the first two. due: when the next one is to
-- be taken, by dr.Server.Dues; -1 means that it is still to be worked out, which opening the catalog does.

-- +goose Up
ALTER TABLE servers ADD COLUMN image_at BIGINT NOT NULL DEFAULT 0;
ALTER TABLE servers ADD COLUMN data_at BIGINT NOT NULL DEFAULT 0;
ALTER TABLE servers ADD COLUMN last_at BIGINT NOT NULL DEFAULT 0;
ALTER TABLE servers ADD COLUMN newest_at BIGINT NOT NULL DEFAULT 0;
ALTER TABLE servers ADD COLUMN due BIGINT NOT NULL DEFAULT -1;
CREATE INDEX servers_due ON servers (due, id) WHERE removed = 0;
CREATE INDEX servers_newest ON servers (newest_at) WHERE removed = 0;
CREATE INDEX servers_any_name ON servers (name);
CREATE INDEX snapshots_last ON snapshots (server_id, kind, seq) WHERE state <> 'expired';
CREATE INDEX tickets_by_seq ON tickets (seq);
CREATE INDEX tickets_open_by_seq ON tickets (seq) WHERE closed = 0;

-- +goose Down
DROP INDEX tickets_open_by_seq;
DROP INDEX tickets_by_seq;
DROP INDEX snapshots_last;
DROP INDEX servers_any_name;
DROP INDEX servers_newest;
DROP INDEX servers_due;
ALTER TABLE servers DROP COLUMN due;
ALTER TABLE servers DROP COLUMN newest_at;
ALTER TABLE servers DROP COLUMN last_at;
ALTER TABLE servers DROP COLUMN data_at;
ALTER TABLE servers DROP COLUMN image_at;
