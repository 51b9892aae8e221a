// Package files shows what is in a snapshot as people see it: folders and files by their paths, which can be listed, searched
// over the whole history, and read.
//
//	Browser  answers for the snapshots of one store
//	Index    every name of an image, made when the image is first opened and kept with the snapshot
//	Opener   opens the disks of an image, read-only (files/guestfs is the way there is); Guest is such an image, open
//	Item     an entry of a snapshot, with what tells its content apart where that is known
//	Pick     what was chosen to be read, entry by entry with the content
//
// A snapshot shows what it holds. An image shows its system as that mounts its file systems, and every file system that the
// system does not mount below a folder of its own, /@NAME. A snapshot of data shows the folders that were captured, straight
// from its file set, which needs no index. Which snapshot of a server a path is looked for in, if none is named, is the newest
// that can hold it.
//
// Names are bytes. Text is how they are shown and given: control characters, what is no UTF-8 and backslashes are escapes, so
// that no name reaches a terminal as anything but a name.
//
// Knows: paths, snapshots, the store, NBD.
// Must not know: how a snapshot was captured, how files get onto a server, libguestfs, boot tests.
package files
