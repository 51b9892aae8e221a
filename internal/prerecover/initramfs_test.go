package prerecover

import (
	"bytes"
	"io"
	"slices"
	"strings"
	"testing"

	"github.com/cavaliergopher/cpio"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/pierrec/lz4/v4"
	"github.com/ulikunitz/xz"
	"github.com/ulikunitz/xz/lzma"
)

func packCPIO(t testing.TB, names ...string) []byte {
	t.Helper()
	var b bytes.Buffer
	w := cpio.NewWriter(&b)
	for _, n := range names {
		if err := w.WriteHeader(&cpio.Header{Name: n, Mode: 0o644 | cpio.TypeReg, Size: 3}); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, "abc"); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// packers compress as distributions do.
var packers = map[string]func(io.Writer) (io.WriteCloser, error){
	"plain": func(w io.Writer) (io.WriteCloser, error) { return nopCloser{w}, nil },
	"gzip":  func(w io.Writer) (io.WriteCloser, error) { return gzip.NewWriter(w), nil },
	"zstd":  func(w io.Writer) (io.WriteCloser, error) { return zstd.NewWriter(w) },
	"xz":    func(w io.Writer) (io.WriteCloser, error) { return xz.WriterConfig{CheckSum: xz.CRC32}.NewWriter(w) },
	"lzma":  func(w io.Writer) (io.WriteCloser, error) { return lzma.NewWriter(w) },
	"lz4":   func(w io.Writer) (io.WriteCloser, error) { return lz4.NewWriter(w), nil },
	"lz4 -l": func(w io.Writer) (io.WriteCloser, error) {
		l := lz4.NewWriter(w)
		return l, l.Apply(lz4.LegacyOption(true))
	},
}

type nopCloser struct{ io.Writer }

func (nopCloser) Close() error { return nil }

func packed(t testing.TB, how string, content []byte) []byte {
	t.Helper()
	var b bytes.Buffer
	w, err := packers[how](&b)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(content); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func TestModulesAreFoundHoweverAnInitramfsIsPacked(t *testing.T) {
	early := append(packCPIO(t, "kernel/x86/microcode/AuthenticAMD.bin"), make([]byte, 400)...)
	plainModules := append(packCPIO(t, "usr/lib/modules/6.8/kernel/drivers/nvme/host/nvme.ko.zst"), make([]byte, 8)...)
	var files []string
	for range 3000 { // longer than a block of any packer
		files = append(files, "usr/share/some/file/that/is/not/a/module")
	}
	main := packCPIO(t, append(files, "lib/modules/6.8/kernel/drivers/block/virtio_blk.ko.xz", "lib/modules/6.8/kernel/drivers/ata/ahci.ko")...)
	two := slices.Concat(main, make([]byte, 512), packCPIO(t, "lib/modules/6.8/kernel/drivers/scsi/sd-mod.ko"))
	for how := range packers {
		t.Run(how, func(t *testing.T) {
			got, err := initramfsModules(slices.Concat(early, plainModules, packed(t, how, two)))
			if err != nil {
				t.Fatal(err)
			}
			if want := []string{"ahci", "nvme", "sd_mod", "virtio_blk"}; !slices.Equal(onLadder(got), want) {
				t.Errorf("modules = %v", got)
			}
		})
		t.Run(how+" cut short", func(t *testing.T) {
			whole := packed(t, how, main)
			got, err := initramfsModules(slices.Concat(early, plainModules, whole[:len(whole)/2]))
			if err == nil || !got["nvme"] {
				t.Errorf("modules = %v, error = %v", got, err)
			}
		})
	}
}

func TestWhatIsNoInitramfsIsAnError(t *testing.T) {
	for name, content := range map[string][]byte{"empty": nil, "zeros": make([]byte, 5000), "text": []byte("hello, this is text"),
		"lzop": []byte("\x89LZO\x00\x0d\x0a"), "xz of 4 GiB": append([]byte("\xfd7zXZ\x00\x00\x01ABCD\x02\x00\x21\x01\x28"), make([]byte, 64)...)} {
		if got, err := initramfsModules(content); err == nil || len(got) > 0 {
			t.Errorf("%s: %v, %v", name, got, err)
		}
	}
}

func FuzzInitramfs(f *testing.F) {
	archive := packCPIO(f, "lib/modules/6/kernel/nvme.ko", "etc/x")
	for how := range packers {
		f.Add(packed(f, how, archive))
	}
	f.Add(slices.Concat(archive, make([]byte, 100), archive))
	f.Fuzz(func(t *testing.T, content []byte) {
		got, _ := initramfsModules(content)
		for name := range got {
			if name == "" || strings.ContainsAny(name, "/-") {
				t.Errorf("module %q", name)
			}
		}
	})
}
