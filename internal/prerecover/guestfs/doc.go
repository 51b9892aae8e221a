// Package guestfs opens images through libguestfs: a customer's file system is parsed by the kernel of a small virtual
// machine that is thrown away, never by the host's.
//
// One guest is one guestfish process, which is one appliance, from Open to Close. Commands go in on its standard input,
// one a line; a random word echoed after each marks the end of its answer, so that nothing a guest contains can be taken
// for the end. Complaints come on a pipe of their own, which is read when the mark has arrived. Names are written as
// quoted strings in which every byte that could mean something is an escape. Long contents travel through files in a work
// folder; short ones in the conversation, because a file costs the emulated appliance a new process.
//
// Knows: guestfish's language and answers.
// Must not know: what is looked for in a guest, or why it is changed.
package guestfs
