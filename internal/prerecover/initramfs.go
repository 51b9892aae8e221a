package prerecover

import (
	"bytes"
	"compress/bzip2"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"path"
	"strings"

	"github.com/cavaliergopher/cpio"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/pierrec/lz4/v4"
	"github.com/ulikunitz/xz"
	"github.com/ulikunitz/xz/lzma"
)

// Limits of reading an initramfs.
const (
	maxInitramfs        = 512 << 20 // bytes as it lies in /boot
	maxInitramfsContent = 2 << 30   // bytes unpacked
	maxInitramfsEntries = 200_000
	maxInitramfsParts   = 16        // archives one after the other
	maxDictionary       = 128 << 20 // bytes of history a compressor may ask for
)

// initramfsModules lists the kernel modules in an initramfs by name. An initramfs is a row of cpio archives, some plain
// (microcode, sometimes modules), the last one usually compressed. On an error the names found until then are returned
// with it.
func initramfsModules(content []byte) (map[string]bool, error) {
	scan := initramfsScan{modules: map[string]bool{}}
	rest := content
	for range maxInitramfsParts {
		rest = bytes.TrimLeft(rest, "\x00")
		if len(rest) == 0 {
			break
		}
		if !isCPIO(rest) {
			unpacked, err := unpack(rest)
			if err != nil {
				return scan.modules, fmt.Errorf("read initramfs: %w", err)
			}
			// What follows a compressed archive cannot be found without unpacking past it; nobody puts anything there.
			return scan.modules, scan.archives(io.LimitReader(unpacked, maxInitramfsContent))
		}
		r := bytes.NewReader(rest)
		if err := scan.archive(r); err != nil {
			return scan.modules, fmt.Errorf("read initramfs: %w", err)
		}
		rest = rest[len(rest)-r.Len():]
	}
	if scan.complete == 0 {
		return scan.modules, errors.New("read initramfs: it holds no archive")
	}
	return scan.modules, nil
}

type initramfsScan struct {
	modules  map[string]bool
	entries  int
	complete int // archives read to their end
}

func isCPIO(b []byte) bool {
	return bytes.HasPrefix(b, []byte("070701")) || bytes.HasPrefix(b, []byte("070702"))
}

// archive reads one cpio archive to its end and leaves r right behind it.
func (s *initramfsScan) archive(r io.Reader) error {
	archive := cpio.NewReader(r)
	for {
		h, err := archive.Next()
		if errors.Is(err, io.EOF) {
			s.complete++
			return nil
		}
		if err != nil {
			return fmt.Errorf("an archive in it is damaged or cut short: %w", err)
		}
		if h.Size < 0 {
			return errors.New("an archive in it is damaged: a file of negative length")
		}
		if s.entries++; s.entries > maxInitramfsEntries {
			return fmt.Errorf("it holds more than %d files", maxInitramfsEntries)
		}
		if name, ok := moduleName(h.Name); ok {
			s.modules[name] = true
		}
	}
}

// archives reads cpio archives, with zeros between them, to the end of r.
func (s *initramfsScan) archives(r io.Reader) error {
	before := s.complete
	for range maxInitramfsParts {
		var first [1]byte
		for first[0] == 0 {
			if _, err := io.ReadFull(r, first[:]); err != nil {
				if s.complete > before {
					return nil // the end, or rubbish behind a complete archive: the kernel does not mind either
				}
				return fmt.Errorf("read initramfs: it is cut short: %w", err)
			}
		}
		if s.complete > before && first[0] != '0' {
			return nil
		}
		if err := s.archive(io.MultiReader(bytes.NewReader(first[:]), r)); err != nil {
			return fmt.Errorf("read initramfs: %w", err)
		}
	}
	return nil
}

// unpack finds out how the rest is compressed.
func unpack(rest []byte) (io.Reader, error) {
	r := bytes.NewReader(rest)
	starts := func(magic string) bool { return bytes.HasPrefix(rest, []byte(magic)) }
	switch {
	case starts("\x1f\x8b"):
		return gzip.NewReader(r)
	case starts("\x28\xb5\x2f\xfd"):
		d, err := zstd.NewReader(r, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxWindow(maxDictionary))
		if err != nil {
			return nil, err
		}
		return d.IOReadCloser(), nil
	case starts("\xfd7zXZ\x00"):
		if err := checkXZ(rest); err != nil {
			return nil, err
		}
		return xz.NewReader(r)
	case starts("\x5d\x00\x00"):
		return lzma.ReaderConfig{DictCap: maxDictionary}.NewReader(r)
	case starts("\x02\x21\x4c\x18"), starts("\x04\x22\x4d\x18"):
		return lz4.NewReader(r), nil
	case starts("BZh"):
		return bzip2.NewReader(r), nil
	case starts("\x89LZO"):
		return nil, errors.New("it is packed with lzop, which this release cannot unpack")
	}
	return nil, fmt.Errorf("it is packed in an unknown way (it begins with % x)", rest[:min(len(rest), 6)])
}

// checkXZ refuses a stream whose first block wants an unreasonable amount of memory.
func checkXZ(b []byte) error {
	const header = 12 // of the stream
	if len(b) < header+24 {
		return errors.New("it is cut short")
	}
	// A block header without the optional sizes: length, flags, then LZMA2's id, property length and dictionary size.
	block := b[header:]
	if block[1]&0xc0 == 0 && block[2] == 0x21 && block[3] == 1 {
		if size, err := lzma.DecodeDictCap(block[4]); err != nil || size > maxDictionary {
			return errors.New("it asks for too much memory to unpack")
		}
	}
	return nil
}

// moduleName says which module a path of an initramfs or of modules.dep holds.
func moduleName(name string) (string, bool) {
	base := path.Base(name)
	for _, ext := range []string{".gz", ".xz", ".zst"} {
		base = strings.TrimSuffix(base, ext)
	}
	base, ok := strings.CutSuffix(base, ".ko")
	if !ok || base == "" {
		return "", false
	}
	return strings.ReplaceAll(base, "-", "_"), true
}

// moduleList reads modules.dep ("path: paths…") or modules.builtin ("path") into module names.
func moduleList(content []byte) map[string]bool {
	names := map[string]bool{}
	for line := range bytes.Lines(content) {
		file, _, _ := bytes.Cut(bytes.TrimSpace(line), []byte(":"))
		if name, ok := moduleName(string(file)); ok {
			names[name] = true
		}
	}
	return names
}

// elfArch says for which processor a program is built, from its first bytes.
func elfArch(head []byte) string {
	if len(head) < 20 || !bytes.HasPrefix(head, []byte("\x7fELF")) {
		return ""
	}
	order := binary.ByteOrder(binary.LittleEndian)
	if head[5] == 2 {
		order = binary.BigEndian
	}
	switch order.Uint16(head[18:]) {
	case 62:
		return "x86_64"
	case 3:
		return "i386"
	case 183:
		return "aarch64"
	case 21:
		return "ppc64"
	case 22:
		return "s390x"
	case 243:
		return "riscv64"
	}
	return "unknown"
}
