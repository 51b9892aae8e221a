-- Which appliance captures a server, '' for the master itself: an appliance asks for its own servers twice a minute. Opening the catalog
-- works it out for those that are there (due = -1).

-- +goose Up
ALTER TABLE servers ADD COLUMN appliance TEXT NOT NULL DEFAULT '';
CREATE INDEX servers_by_appliance ON servers (appliance, name) WHERE removed = 0;
CREATE INDEX snapshots_arrived ON snapshots (server_id, kind, taken) WHERE state <> 'kept'; -- the newest that has arrived
UPDATE servers SET due = -1;

-- +goose Down
DROP INDEX snapshots_arrived;
DROP INDEX servers_by_appliance;
ALTER TABLE servers DROP COLUMN appliance;
