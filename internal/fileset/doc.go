// Package fileset describes files one by one: what a file set captured file by file consists of, from the server on which it
// is read to the rescue image into which it is put.
//
//	Entry    one name with everything that Linux keeps of it but the content: owner, mode, times, attributes, holes
//	Set      which names belong: roots, and what is left out below them
//	Compare  the order in which entries come, everywhere: a folder, then what is in it, names by their bytes
//	Checker  says that a sequence of entries is a tree: sorted, each below a folder that came before
//	Identity what must be the same for a file to be taken as unchanged without reading it
//
// Names are bytes. An entry has one encoding, on the wire and in the store, so that what is known of a file is written down
// once. Whoever decodes one takes it for hostile: every length is limited, and a name that could lead anywhere but below the
// roots does not decode.
//
// Knows: what Linux keeps of a file.
// Must not know: where the content lies, how a tree is walked, what is done with it.
package fileset
