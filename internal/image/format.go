package image

import (
	"bytes"
	"fmt"
	"io"
)

// format is a kind of file that holds a disk but is not one.
type format struct {
	name   string
	magic  string
	offset int64  // of the magic; negative counts from the end
	fix    string // command that makes a raw disk of it, with the two paths left out
}

const convert = "qemu-img convert -O raw"

var formats = []format{
	{"qcow2 image", "QFI\xfb", 0, convert},
	{"QED image", "QED\x00", 0, convert},
	{"VMDK image", "KDMV", 0, convert},
	{"VMDK image", "COWD", 0, convert},
	{"VMDK descriptor", "# Disk DescriptorFile", 0, convert},
	{"VHDX image", "vhdxfile", 0, convert},
	{"VHD image", "conectix", 0, convert + " -f vpc"},
	{"VHD image", "conectix", -512, convert + " -f vpc"}, // of fixed size: a raw disk with a footer
	{"VDI image", "\x7f\x10\xda\xbe", 0x40, convert},
	{"Parallels image", "WithoutFreeSpace", 0, convert},
	{"Parallels image", "WithouFreSpacExt", 0, convert},
	{"gzip file", "\x1f\x8b\x08", 0, "gzip -dc"},
	{"xz file", "\xfd7zXZ\x00", 0, "xz -dc"},
	{"zstd file", "\x28\xb5\x2f\xfd", 0, "zstd -dc"},
	{"lz4 file", "\x04\x22\x4d\x18", 0, "lz4 -dc"},
	{"bzip2 file", "BZh", 0, "bzip2 -dc"},
	{"lzop file", "\x89LZO\x00\r\n\x1a\n", 0, "lzop -dc"},
	{"zip archive", "PK\x03\x04", 0, "unzip -p"},
	{"7z archive", "7z\xbc\xaf\x27\x1c", 0, "7z x -so"},
	{"tar archive (an OVA appliance?)", "ustar", 257, "tar -xOf"},
}

// refuseFormats says what to do about a file that is no raw disk.
func refuseFormats(r io.ReaderAt, size int64) error {
	head := make([]byte, min(size, 512))
	if _, err := r.ReadAt(head, 0); err != nil && err != io.EOF {
		return err
	}
	tail := make([]byte, min(size, 512))
	if _, err := r.ReadAt(tail, size-int64(len(tail))); err != nil && err != io.EOF {
		return err
	}
	for _, f := range formats {
		where, at := head, f.offset
		if at < 0 {
			where, at = tail, max(0, int64(len(tail))+at)
		}
		if at < int64(len(where)) && bytes.HasPrefix(where[at:], []byte(f.magic)) {
			return fmt.Errorf("it is a %s, not a raw disk: convert it first (%s)", f.name, f.command())
		}
	}
	return nil
}

func (f format) command() string {
	switch {
	case bytes.HasPrefix([]byte(f.fix), []byte(convert)):
		return f.fix + " FILE DISK.raw"
	case f.magic == "ustar":
		return f.fix + " FILE NAME-OF-THE-DISK > DISK, then convert that if it is no raw disk either"
	}
	return f.fix + " FILE > DISK.raw"
}
