// Package catalog is the master's memory: which servers there are, what was kept of them, what was proven of it, and
// what happened, in SQL.
//
//	Catalog    the database; one verb is one transaction, and every change of a state writes an event in it
//	dr.Record  a snapshot with what is known of it by now
//	Judged     what a verdict led to: last-known-good moved or not, a ticket or none
//
// # What holds after every transaction, whatever was asked in which order, and after a power cut
//
//   - Last-known-good of a server is empty or a snapshot with a passing verdict; it only ever moved to one whose disks
//     show a later instant; it is not expired.
//   - A server has at most one open ticket for one problem, and at most one active invocation.
//   - A snapshot's state went only where dr.Follow lets it.
//   - A piece of work has at most one lease, and each new one a higher term than every lease before; the leases of a silo need
//     no more memory than it has.
//   - Events are numbered without a gap in the order in which the transactions took effect, whatever the clock said.
//
// # One writer
//
// Write transactions follow each other: SQLite does that by itself, on PostgreSQL each begins by locking the row that
// numbers the events. A master writes a few dozen times a night for each server, and what is read before a write is
// then still true when it is written. That row is also why events have no gaps: a reader that has seen number n has
// seen all before it.
//
// The rules are not here: what a verdict proves, promotes and raises is dr's. A lost catalog is rebuilt from what the
// stores hold: see Adopt.
//
// Knows: SQL, the rules of dr.
// Must not know: how snapshots are made, tested or run; what is in a store.
package catalog
