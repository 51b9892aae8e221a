package capture

import (
	"context"
	"math/rand/v2"
	"os"
	"testing"
	"time"

	"github.com/musterdr/muster/internal/api"
	"github.com/musterdr/muster/internal/dr"
	"github.com/musterdr/muster/internal/image"
	"github.com/musterdr/muster/internal/store"
	"github.com/musterdr/muster/internal/store/folder"
)

// parted is a disk of which a source reads the parts that changed.
type parted struct {
	image.Image
	parts []image.Extent // nil: the whole
}

func (p *parted) Contact(context.Context) (api.Contact, error) { return api.Contact{}, nil }
func (p *parted) Forget(context.Context) error                 { return nil }
func (p *parted) Close() error                                 { return nil }

func (p *parted) Capture(ctx context.Context, sink *Sink, report dr.Progress) error {
	if _, err := sink.Begin(ctx, Layout{Disks: []Disk{{Name: "vda", Size: p.Size()}}}); err != nil {
		return err
	}
	read := func() error { return sink.Image(ctx, 0, p.Image, report) }
	if p.parts != nil {
		read = func() error { return sink.Part(ctx, 0, p.Image, p.parts, report) }
	}
	if err := read(); err != nil {
		return err
	}
	return sink.Keep(ctx, Outcome{Taken: time.Now(), Consistency: dr.CrashConsistent, Read: 1})
}

// What is not read of a disk is known from the snapshot before, and zeros that are not read from being told.
func TestSignsOfADiskThatIsReadInPartAreThoseOfAll(t *testing.T) {
	const block, blocks = store.DefaultBlockSize, 64
	drv := folder.Driver{Path: t.TempDir() + "/store"}
	if err := store.Create(t.Context(), drv, "x"); err != nil {
		t.Fatal(err)
	}
	st, err := store.Open(t.Context(), drv, "x")
	if err != nil {
		t.Fatal(err)
	}
	defer st.Close(t.Context())
	disk := make([]byte, block*blocks)
	for i := range disk {
		disk[i] = "a line of text\n"[i%15]
	}
	parent := ""
	take := func(parts ...image.Extent) *dr.Signs {
		t.Helper()
		task := api.SnapshotTask{ID: dr.NewSnapshotID(time.Now()), Server: dr.Server{ID: "srv-1", Name: "shop"}, Parent: parent, Trusted: parent}
		path := t.TempDir() + "/vda"
		if err := os.WriteFile(path, disk, 0o600); err != nil {
			t.Fatal(err)
		}
		f, err := image.OpenFile(path)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		s, err := Take(t.Context(), &parted{f, parts}, st, task, nil)
		if err != nil {
			t.Fatal(err)
		}
		parent = s.ID
		return s.Signs
	}
	if s := take(); s.Last != nil || s.Content.Readable != block*blocks || s.NoNames == "" {
		t.Errorf("the first: %+v", s)
	}
	random := rand.NewChaCha8([32]byte{1})
	_, _ = random.Read(disk[8*block : 16*block]) // never fails
	clear(disk[20*block : 24*block])
	s := take(image.Extent{Offset: 8 * block, Length: 8 * block}, image.Extent{Offset: 20 * block, Length: 4 * block, Zero: true})
	if b := s.Last.Blocks; b.Struck != 8 || b.Changed != 12 || s.Content.Random != 8*block || s.Content.Readable != (blocks-12)*block {
		t.Errorf("a part: %+v, %+v", *b, s.Content)
	}
	if s := take(image.Extent{}); s.Last.Blocks.Struck != 0 || s.Last.Blocks.Changed != 0 || s.Content.Random != 8*block {
		t.Errorf("nothing: %+v, %+v", *s.Last.Blocks, s.Content)
	}
}
