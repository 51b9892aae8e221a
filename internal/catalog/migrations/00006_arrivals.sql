-- What came over the line for a snapshot, so that it can be metered: "arrived" is when the far store had it, 0 if it never came
-- that way; "sent" is how many bytes crossed the line for it. Of snapshots that arrived before there were these columns nothing is known.

-- +goose Up
ALTER TABLE snapshots ADD COLUMN arrived BIGINT NOT NULL DEFAULT 0;
ALTER TABLE snapshots ADD COLUMN sent BIGINT NOT NULL DEFAULT 0;

-- +goose Down
ALTER TABLE snapshots DROP COLUMN sent;
ALTER TABLE snapshots DROP COLUMN arrived;
