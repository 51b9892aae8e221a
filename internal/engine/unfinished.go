package engine

import (
	"context"
	"fmt"
)

// unfinished gives the runs that are not over, the last first; only those of a key, if it is not "". The library asks with the
// states as parameters, for which no partial index is used: it would look at every run of the last month.
func (e *Engine) unfinished(ctx context.Context, key string) (ids []string, err error) {
	if err := e.open(); err != nil {
		return nil, err
	}
	table := "workflow_status"
	if e.db.q("$1") == "$1" { // PostgreSQL: the library's schema
		table = "dbos." + table
	}
	query, args := `SELECT workflow_uuid FROM `+table+` WHERE status IN ('ENQUEUED', 'PENDING') AND queue_name = $1`, []any{queueName}
	if key != "" {
		query, args = query+` AND queue_partition_key = $2`, append(args, partitionOf(key))
	}
	rows, err := e.db.sql.QueryContext(ctx, e.db.q(query+` ORDER BY created_at DESC`), args...)
	if err != nil {
		return nil, fmt.Errorf("find unfinished runs: %w", err)
	}
	defer rows.Close()
	for rows.Next() {
		var id string
		if err := rows.Scan(&id); err != nil {
			return nil, fmt.Errorf("find unfinished runs: %w", err)
		}
		ids = append(ids, id)
	}
	if err := rows.Err(); err != nil {
		return nil, fmt.Errorf("find unfinished runs: %w", err)
	}
	return ids, nil
}
