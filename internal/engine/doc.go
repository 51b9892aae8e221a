// Package engine is durable work: a run is a function whose finished steps are remembered, so that after a crash, a
// restart or a power cut it goes on where it stood and does nothing twice that it had finished.
//
//	Engine  a database of runs and the process that carries them out
//	Run     one piece of work, started under an id of the caller's; starting it again under that id does nothing
//	Step    one part of a run with a limit; its result is remembered as soon as it ends, and it is never run again
//	undo    what takes a step back if the run fails or is cancelled; undos run in reverse, and are steps themselves
//	key     what a run works on ("server/srv-…"): two runs of one key never run at once
//	term    a number that grows with every start of any run; the fencing number of what the run does
//
// # What a crash may do
//
// A step runs at least once and, once it has ended, never again: a process that dies inside a step runs that step again
// under a higher term. So every step must be safe to repeat, and every undo must be right when the step it takes back
// never began, ended, or was cut short. The code between the steps runs again from the top at every start, and must
// decide by nothing but its input and the results of its steps: no clock, no random number, no file.
//
//	                ┌──────────── crash, Close ───────────┐
//	                ▼                                     │
//	Start ──► queued ──► running ──┬── fn returns nil ────┼──────────────► succeeded
//	                               ├── fn returns an error┴─ undos ──────► failed
//	                               └── Cancel: the step's context ends,
//	                                   no other step begins ── undos ────► cancelled
//
// A run that began under one Version is not carried on by another, whose steps may be others: it fails and says so.
//
// # Hosts
//
// A SQLite file is one process's; a second one is refused at Open, and what a dead process left is resumed at once. A
// PostgreSQL database is shared by as many processes as there are, called hosts: any of them carries out any run, and all
// see and cancel it. Each holds a lease (see host). Of one that is gone the others take over, each of its runs once; one
// that comes back finds its sessions with the database ended and its steps' contexts too. What it still does to the world
// meanwhile bears a term lower than that of whoever took over. Resources are counted on each host.
//
// Knows: steps, order, retries, exclusion, fencing, the workflow library, where its rows are kept.
// Must not know: what any step does, what a server or a snapshot is.
package engine
