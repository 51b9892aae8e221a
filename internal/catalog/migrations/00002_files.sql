-- +goose Up
-- "kind" is image or data; "image" is the image that data goes onto, and may be of another server.
ALTER TABLE snapshots ADD COLUMN kind TEXT NOT NULL DEFAULT 'image';
ALTER TABLE snapshots ADD COLUMN image TEXT NOT NULL DEFAULT '';
CREATE INDEX snapshots_by_image ON snapshots (image) WHERE image <> '';

-- +goose Down
DROP INDEX snapshots_by_image;
ALTER TABLE snapshots DROP COLUMN image;
ALTER TABLE snapshots DROP COLUMN kind;
