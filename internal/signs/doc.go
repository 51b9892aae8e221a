// Package signs finds what tampering leaves in a snapshot: content that became unreadable, and files that were renamed,
// deleted or given a new ending.
//
//	Map      what each cell of a disk holds: nothing, something readable, something packed, chance; two bits a cell
//	Listing  the names of a server's files in a bounded form: numbers, endings, a sample of hashes
//	Lister   makes a listing, name after name
//
// Both are kept with each snapshot and compared with those of an earlier one. That a block is random says little: media,
// archives and encrypted volumes always are. That it was readable and is random says much.
//
// Nothing here is proof. Whoever has root on a server and knows this package can stay below the limits, by writing what
// is encrypted as text, or by going slowly; and what an agent lists is what that server shows it.
//
// Knows: bytes, names.
// Must not know: what is suspicious (dr says), where blocks and names come from, what becomes of it.
package signs
