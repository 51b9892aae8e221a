// Package guestfish talks to guestfish, libguestfs' shell: a customer's file system is parsed by the kernel of a small
// virtual machine that is thrown away, never by the host's.
//
//	Fish  one guestfish process, which is one appliance
//
// Commands go in on its standard input, one a line; a random word echoed after each marks the end of its answer, so that
// nothing a guest contains can be taken for the end. Complaints come on a pipe of their own, which is read when the mark has
// arrived. Names are written as quoted strings in which every byte that could mean something is an escape. Long contents
// travel through files and named pipes.
//
// Knows: guestfish's language and answers.
// Must not know: what is looked for in a guest, or why.
package guestfish
