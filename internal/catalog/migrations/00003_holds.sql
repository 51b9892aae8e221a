-- held_by: the suspicious snapshot for whose sake this one may not become last-known-good, '' for none (dr.Holds).
-- ruling: what a person said of it, JSON of dr.Ruling, '' for nothing.

-- +goose Up
ALTER TABLE snapshots ADD COLUMN held_by TEXT NOT NULL DEFAULT '';
ALTER TABLE snapshots ADD COLUMN ruling TEXT NOT NULL DEFAULT '';

-- +goose Down
ALTER TABLE snapshots DROP COLUMN ruling;
ALTER TABLE snapshots DROP COLUMN held_by;
