// Package guestfs opens images through libguestfs (guestfish): one guest is one appliance, from Open to Close.
//
// Short contents travel in the conversation, because a file costs the emulated appliance a new process; long ones through
// files in a work folder.
//
// Knows: which of guestfish's commands does what an overlay asks.
// Must not know: what is looked for in a guest, or why it is changed.
package guestfs
