-- carries: 1 if data goes onto this image, or once did: it is tested with the data. Otherwise every tick of the scheduler would look
-- for the data of every image that has no verdict.

-- +goose Up
ALTER TABLE snapshots ADD COLUMN carries BIGINT NOT NULL DEFAULT 0;
UPDATE snapshots SET carries = 1 WHERE id IN (SELECT image FROM snapshots WHERE image <> '');
DROP INDEX snapshots_untested;
CREATE INDEX snapshots_untested ON snapshots (recorded) WHERE verdict = '' AND carries = 0 AND state IN ('kept', 'replicated', 'pre-recovered');

-- +goose Down
DROP INDEX snapshots_untested;
CREATE INDEX snapshots_untested ON snapshots (recorded) WHERE verdict = '' AND state IN ('kept', 'replicated', 'pre-recovered');
ALTER TABLE snapshots DROP COLUMN carries;
