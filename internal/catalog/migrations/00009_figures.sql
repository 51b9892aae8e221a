-- What metrics say of every server is kept with it too, so that a scrape does not look for three rows of each: when what last-known-good
-- shows was taken, the same of the newest snapshot that has not expired, 0 for none, and the outcome of the last boot test, '' for none.

-- +goose Up
ALTER TABLE servers ADD COLUMN lkg_at BIGINT NOT NULL DEFAULT 0;
ALTER TABLE servers ADD COLUMN shown_at BIGINT NOT NULL DEFAULT 0;
ALTER TABLE servers ADD COLUMN outcome TEXT NOT NULL DEFAULT '';
UPDATE servers SET lkg_at = COALESCE((SELECT l.taken FROM snapshots AS l WHERE l.id = servers.lkg), 0),
    shown_at = COALESCE((SELECT s.taken FROM snapshots AS s WHERE s.server_id = servers.id AND s.state <> 'expired' ORDER BY s.taken DESC LIMIT 1), 0),
    outcome = COALESCE((SELECT v.outcome FROM verdicts AS v WHERE v.server_id = servers.id ORDER BY v.seq DESC LIMIT 1), '');

-- +goose Down
ALTER TABLE servers DROP COLUMN outcome;
ALTER TABLE servers DROP COLUMN shown_at;
ALTER TABLE servers DROP COLUMN lkg_at;
