-- When the inconclusive test of a server's newest snapshot is to be held again; 0 for not.

-- +goose Up
ALTER TABLE servers ADD COLUMN retest BIGINT NOT NULL DEFAULT 0;
CREATE INDEX servers_retest ON servers (retest) WHERE retest <> 0;

-- +goose Down
DROP INDEX servers_retest;
ALTER TABLE servers DROP COLUMN retest;
