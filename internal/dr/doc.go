// Package dr holds the nouns of disaster recovery and the pure rules over them: what a server, a snapshot, a
// verdict and a last-known-good are, when one follows from another, and what may be promoted, thrown away or
// raised as a ticket. Nothing here reads a clock, a disk or a network: every rule is a function of its arguments,
// so that the same rule holds in a test, in the catalog's transaction and on paper.
//
// # Nouns
//
//	Server    what is protected: a Source to capture it from, a schedule, objectives, Checks
//	Inventory the hardware and software facts of a server at the instant of a snapshot
//	Snapshot  every disk of a server at one instant; immutable; what the store keeps
//	Hardware  the virtual hardware on which an image boots without being changed
//	Edit      one change an overlay made to an unbooted image, with the reason
//	Verdict   the answer to all checks of one boot, with evidence
//	Ticket    one open problem, found again by its Problem key and not once a night
//	Invocation a rescue image running for real
//	Silo      a host that makes, tests and runs rescue images; Work is for one of them, and a Lease says whose it is (Place)
//
// # What has been proven
//
//	Kept ──► PreRecovered ──► Verified
//	  │           │
//	  └───────────┴──► Rejected        any ──► Expired (never last-known-good)
//
// A snapshot's State says only what was proven of it. What is being tried is work of the engine.
//
// Knows: the words of the field and the rules over them.
// Must not know: files, networks, SQL, Kopia, libvirt, or that any of them exist.
package dr
