// Package image is the content of one disk at one instant, readable at any offset, and the ways of offering it.
//
//	Image     a size and ReadAt; a file, a block device or a snapshot's disk in the store
//	Extent    a byte range that holds data or is known to read as zeros
//	File      a raw disk image file or a block device as an Image
//	Server    an NBD export of images over a unix socket, for QEMU and for people
//	Remote    somebody else's NBD export as an Image; QEMU's tell what is dirty as well
//
// An Image never changes while it is open. What changes it, a delta or a live layer, lies above it in qcow2.
//
// Knows: byte ranges, NBD.
// Must not know: what is on a disk, where blocks are kept, who reads.
package image

import (
	"context"
	"io"
)

// Image is the content of one disk. ReadAt may be called from many goroutines at once; like every io.ReaderAt it
// returns fewer bytes than asked only with an error, io.EOF at the end.
type Image interface {
	io.ReaderAt
	// Size is the length in bytes. It need not be a multiple of any block size.
	Size() int64
	// Extents calls yield for consecutive, non-overlapping extents that together cover [off, off+length), which must
	// lie inside the image, in order, until yield returns false. Adjacent extents may be of the same kind.
	Extents(ctx context.Context, off, length int64, yield func(Extent) bool) error
}

// Extent is a byte range of an image. A Zero extent reads as zeros and takes no space; one that is not Zero may still
// hold zeros.
type Extent struct {
	Offset int64
	Length int64
	Zero   bool
}

// Prefetcher is an Image that can be told what will be read soon. Prefetch returns at once.
type Prefetcher interface {
	Prefetch(off, length int64)
}
