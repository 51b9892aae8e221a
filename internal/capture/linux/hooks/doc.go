// Package hooks brings the applications of a running Linux server to rest for the instant of a snapshot, and lets them go
// again whatever happens.
//
//	find      the database servers that run, from their processes and sockets
//	postgres  PostgreSQL: a checkpoint and backup mode; it never stands still
//	mysql     MariaDB, MySQL: a lock that lets nobody write, for the freeze alone
//	script    a hook of the server's own: an executable file in a folder, run with "pre" and "post"
//	Keep      the keeper, a process of its own that holds all of them
//	Keeper    the agent's side of it
//
// A database is spoken to with its own client program, as the user that its server runs as, over its unix socket: no
// password, no driver. The client is one long-lived session on a pipe of the keeper's. Locks and backup mode belong to
// the session, so they end with the client, and the client ends with the keeper.
//
// The keeper lives in a session of its own and outlives the agent: when the agent is gone it waits for the watchdog to have
// thawed, lets go of everything and runs every hook that was begun with "post". What a database, its files or a hook say is
// hostile input: limited, never executed, and shown as text.
//
// Knows: /proc, the clients' SQL, processes.
// Must not know: disks, freezing, the wire, why somebody asks.
package hooks

import (
	"strings"
	"time"
	"unicode"
)

// Limits.
const (
	maxProcesses = 1 << 18 // looked at
	maxFiles     = 1 << 16 // open files looked at of one process
	maxTable     = 8 << 20 // bytes of the table of sockets
	maxDatabases = 16      // brought to rest; more are named and left alone
	maxScripts   = 16
	maxLine      = 64 << 10 // bytes of one line that a client says
	maxAnswer    = 64       // lines of one answer that are kept
	maxReason    = 300      // characters of one reason
	maxOutput    = 4 << 10  // bytes of what a hook says that are kept
	maxNotes     = 24

	connectLimit = 5 * time.Second  // for a client to connect
	lockLimit    = 3 * time.Second  // for a database to let nobody write any more; as long may its users have to wait for nothing
	unlockLimit  = 5 * time.Second  // for a database to answer that it was let go; then its client is killed
	thawLimit    = 15 * time.Second // for the watchdog to be gone before a hook is run with "post"
	tickEvery    = 20 * time.Second // the agent says that it lives
	idleLimit    = 2 * time.Minute  // for the agent to say anything, while applications may wait for it
	killGrace    = time.Second      // for the output of a killed process to end
)

// plain makes foreign text fit for a log: one line, limited.
func plain(text string) string {
	text = strings.Join(strings.FieldsFunc(text, func(r rune) bool { return unicode.IsSpace(r) || unicode.IsControl(r) }), " ")
	if r := []rune(text); len(r) > maxReason {
		text = string(r[:maxReason]) + "…"
	}
	return text
}
