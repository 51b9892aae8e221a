package capture_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/musterdr/muster/internal/agent"
	"github.com/musterdr/muster/internal/api"
	"github.com/musterdr/muster/internal/capture"
	"github.com/musterdr/muster/internal/capture/wire"
	"github.com/musterdr/muster/internal/dr"
	"github.com/musterdr/muster/internal/fileset"
	"github.com/musterdr/muster/internal/image"
	"github.com/musterdr/muster/internal/store"
	"github.com/musterdr/muster/internal/store/folder"
	"github.com/musterdr/muster/internal/store/storetest"
)

// shelf is a store with an image, and a server whose files lie in a folder.
type shelf struct {
	t     *testing.T
	st    *store.Store
	top   string
	image string
	rate  int64                                          // bytes a second
	serve func(ctx context.Context, conn net.Conn) error // nil: the agent
}

func newShelf(t *testing.T) *shelf {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("only root may make what is to be read")
	}
	drv := folder.Driver{Path: filepath.Join(t.TempDir(), "store")}
	if err := store.Create(t.Context(), drv, "p"); err != nil {
		t.Fatal(err)
	}
	st, err := store.Open(t.Context(), drv, "p")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = st.Close(context.Background()) })
	s := &shelf{t: t, st: st, top: t.TempDir(), image: "snap-image"}
	w, err := st.Begin(t.Context(), s.image, "")
	if err != nil {
		t.Fatal(err)
	}
	d, err := w.Disk(t.Context(), "sda", 1<<20, 0)
	if err == nil {
		err = d.Ingest(t.Context(), storetest.NewDisk(1<<20, 1), []image.Extent{{Length: 1 << 20}}, nil)
	}
	if err == nil {
		_, err = w.Commit(t.Context(), dr.Snapshot{ServerID: "srv-1", Server: "web", Taken: time.Now()})
	}
	if err = errors.Join(err, os.MkdirAll(s.top+"/srv", 0o755)); err != nil {
		t.Fatal(err)
	}
	return s
}

// Open, Contact, …: the shelf is its own source.
func (s *shelf) Contact(context.Context) (api.Contact, error) { return api.Contact{}, nil }
func (s *shelf) Capture(context.Context, *capture.Sink, dr.Progress) error {
	return errors.New("it has no disks")
}
func (s *shelf) Forget(context.Context) error { return nil }
func (s *shelf) Close() error                 { return nil }

func (s *shelf) CaptureFiles(ctx context.Context, sink *capture.FilesSink, report dr.Progress) error {
	ours, theirs := net.Pipe()
	ended := make(chan error, 1)
	go func() {
		defer theirs.Close()
		if s.serve != nil {
			ended <- s.serve(ctx, theirs)
			return
		}
		ended <- agent.Agent{Version: "test", Top: s.top}.Serve(ctx, theirs, theirs)
	}()
	talk, err := capture.NewSession(ours, ours)
	if err == nil {
		err = talk.Files(ctx, wire.FilesPlan{Rate: s.rate}, sink, report)
	}
	ours.Close()
	<-ended
	return err
}

func (s *shelf) try(id, parent string, exclude ...string) (dr.Snapshot, error) {
	server := dr.Server{ID: "srv-1", Name: "web", Tier: dr.TierImageData, Data: dr.DataSet{Paths: []string{"/srv"}, Exclude: exclude}}
	return capture.TakeFiles(s.t.Context(), s, s.st, api.SnapshotTask{ID: id, Server: server, Parent: parent, Image: s.image}, nil)
}

func (s *shelf) take(id, parent string, exclude ...string) dr.Snapshot {
	s.t.Helper()
	snap, err := s.try(id, parent, exclude...)
	if err != nil {
		s.t.Fatal(err)
	}
	return snap
}

// same compares what is kept with what is on the server, content by content.
func (s *shelf) same(id string) {
	s.t.Helper()
	f, err := s.st.Files(s.t.Context(), id)
	if err != nil {
		s.t.Fatal(err)
	}
	defer f.Close()
	names := map[string]bool{}
	for all := f.All(); ; {
		e, err := all.Next(s.t.Context())
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			s.t.Fatal(err)
		}
		names[e.Path] = true
		var st unix.Stat_t
		if err := unix.Lstat(s.top+e.Path, &st); err != nil || st.Mode&0o7777 != e.Mode || st.Uid != e.UID || st.Mtim.Sec != e.Mtime.Sec {
			s.t.Errorf("%q is kept as %+v, and is %+v, %v", e.Path, e.Entry, st, err)
		}
		if e.Kind != fileset.File {
			continue
		}
		r, err := f.Data(s.t.Context(), e)
		if err != nil {
			s.t.Fatal(err)
		}
		got, err := io.ReadAll(r)
		if err = errors.Join(err, r.Close()); err != nil {
			s.t.Fatal(err)
		}
		if want, err := os.ReadFile(s.top + e.Path); !e.Sparse && (err != nil || !bytes.Equal(got, want)) {
			s.t.Errorf("%q differs, %v", e.Path, err)
		}
	}
	err = filepath.WalkDir(s.top+"/srv", func(p string, _ os.DirEntry, err error) error {
		if name := strings.TrimPrefix(p, s.top); !names[name] {
			s.t.Errorf("%q is not kept", name)
		}
		return err
	})
	if err != nil {
		s.t.Fatal(err)
	}
}

func (s *shelf) put(name string, content []byte) {
	s.t.Helper()
	if err := errors.Join(os.MkdirAll(filepath.Dir(s.top+name), 0o755), os.WriteFile(s.top+name, content, 0o644)); err != nil {
		s.t.Fatal(err)
	}
}

func TestFilesTravelAndOnlyWhatChangedDoes(t *testing.T) {
	s := newShelf(t)
	large := make([]byte, 3<<20)
	storetest.Noise(large, 5)
	for i := range 700 {
		s.put(fmt.Sprintf("/srv/d%d/f%03d\xff", i%7, i), []byte(strings.Repeat("line\n", i)))
	}
	s.put("/srv/large", large)
	s.put("/srv/twin", large)
	if err := errors.Join(os.Link(s.top+"/srv/large", s.top+"/srv/other"), os.Symlink("../..", s.top+"/srv/d0/up"), os.Truncate(s.top+"/srv/d0/f000\xff", 1<<24)); err != nil {
		t.Fatal(err)
	}
	first := s.take("snap-1", "")
	s.same("snap-1")
	if first.Pass.Kind != dr.PassFull || first.Image != s.image || first.Consistency != dr.FileConsistent || first.Files.Entries != 712 || first.Stats.New > int64(len(large))+2<<20 {
		t.Errorf("%+v %+v", first, first.Files)
	}
	second := s.take("snap-2", "snap-1")
	s.same("snap-2")
	if second.Pass.Kind != dr.PassTracked || second.Stats.New != 0 {
		t.Errorf("nothing changed: %+v, %+v", second.Pass, second.Stats)
	}
	if err := errors.Join(os.RemoveAll(s.top+"/srv/d3"), os.Remove(s.top+"/srv/other"), os.Rename(s.top+"/srv/d4", s.top+"/srv/d9")); err != nil {
		t.Fatal(err)
	}
	s.put("/srv/d5/new", []byte("new"))
	third := s.take("snap-3", "snap-2", "*.none")
	s.same("snap-3")
	if third.Files.Gone != 101+1+101 || third.Stats.New > 1000 {
		t.Errorf("%+v %+v", third.Files, third.Stats)
	}
	if r, err := s.st.Verify(t.Context(), "snap-3", nil); err != nil {
		t.Errorf("%+v, %v", r, err)
	}
}

func TestFilesAreReadNoFasterThanTheLimit(t *testing.T) {
	s := newShelf(t)
	large := make([]byte, 3<<20)
	storetest.Noise(large, 5)
	s.put("/srv/large", large)
	for i := range 64 {
		s.put(fmt.Sprintf("/srv/small-%d", i), large[i<<14:(i+1)<<14])
	}
	s.rate = 8 << 20
	if snap := s.take("snap-1", ""); snap.Stats.Duration < 370*time.Millisecond { // 4 MiB, of which the first may come at once
		t.Errorf("%d bytes in %s", snap.Stats.Read, snap.Stats.Duration)
	}
	s.same("snap-1")
}

func TestAParentThatIsGoneMakesAFullOne(t *testing.T) {
	s := newShelf(t)
	s.put("/srv/a", []byte("a"))
	if snap := s.take("snap-2", "snap-1"); snap.Parent != "" || snap.Pass.Kind != dr.PassFull || !strings.Contains(snap.Pass.Reason, "cannot be read") {
		t.Errorf("%+v", snap)
	}
	s.same("snap-2")
}

func TestAFailureOnTheServerIsToldAndNothingIsKept(t *testing.T) {
	s := newShelf(t)
	if err := os.Remove(s.top + "/srv"); err != nil {
		t.Fatal(err)
	}
	if _, err := s.try("snap-1", ""); err == nil || !strings.Contains(err.Error(), "there is no such folder") {
		t.Errorf("error = %v", err)
	}
	if _, err := s.st.Snapshot(t.Context(), "snap-1"); !errors.Is(err, store.ErrNotFound) {
		t.Errorf("kept: %v", err)
	}
}

func TestAnAgentThatLiesAboutFilesIsNotBelieved(t *testing.T) {
	root := &fileset.Entry{Kind: fileset.Folder, Path: "/srv"}
	file := func(size int64) *fileset.Entry {
		return &fileset.Entry{Kind: fileset.File, Path: "/srv/a", Size: size}
	}
	s := newShelf(t)
	s.put("/srv/a", []byte("a"))
	s.take("snap-1", "")
	for name, say := range map[string]func(w *wire.Writer) error{
		"more than there is":  func(w *wire.Writer) error { return w.Same(3) },
		"gone that never was": func(w *wire.Writer) error { return w.Gone(1 << 62) },
		"outside":             func(w *wire.Writer) error { return w.Entry(&fileset.Entry{Kind: fileset.File, Path: "/etc/passwd"}) },
		"no root":             func(w *wire.Writer) error { return w.Entry(file(0)) },
		"below a link": func(w *wire.Writer) error {
			return errors.Join(w.Gone(2), w.Entry(root), w.Entry(&fileset.Entry{Kind: fileset.Symlink, Path: "/srv/a", Target: "/"}), w.Entry(&fileset.Entry{Kind: fileset.File, Path: "/srv/a/b"}))
		},
		"less content": func(w *wire.Writer) error {
			return errors.Join(w.Entry(root), w.Piece(false, []byte("x")), w.Entry(file(2)))
		},
		"more content": func(w *wire.Writer) error {
			return errors.Join(w.Entry(root), w.Piece(false, []byte("xyz")), w.Entry(file(2)))
		},
		"content of nothing": func(w *wire.Writer) error { return errors.Join(w.Piece(false, []byte("xyz")), w.Entry(root)) },
		"content without an end": func(w *wire.Writer) error {
			return errors.Join(w.Gone(1), w.Entry(root), w.Piece(false, []byte("x")), w.Message(wire.KindDone, wire.FilesDone{Entries: 1}))
		},
		"a bomb": func(w *wire.Writer) error { return w.Piece(true, bomb()) },
		"not all was dealt with": func(w *wire.Writer) error {
			return errors.Join(w.Entry(root), w.Message(wire.KindDone, wire.FilesDone{Entries: 1}))
		},
		"another number of names": func(w *wire.Writer) error {
			return errors.Join(w.Same(2), w.Message(wire.KindDone, wire.FilesDone{Entries: 7}))
		},
		"a frame of disks": func(w *wire.Writer) error { return w.Zeros(wire.Zeros{Count: 1}) },
		"silence":          func(*wire.Writer) error { return nil },
	} {
		t.Run(name, func(t *testing.T) {
			s.serve = func(_ context.Context, conn net.Conn) error {
				go func() { _, _ = io.Copy(io.Discard, conn) }()
				w := wire.NewWriter(conn)
				return errors.Join(w.Greet(), w.Message(wire.KindHello, wire.Hello{}), say(w), w.Flush())
			}
			if _, err := s.try("snap-2", "snap-1"); err == nil {
				t.Error("it was believed")
			}
			if _, err := s.st.Snapshot(t.Context(), "snap-2"); !errors.Is(err, store.ErrNotFound) {
				t.Errorf("kept: %v", err)
			}
		})
	}
}

// bomb is a few bytes that unpack to far more than a piece may have.
func bomb() []byte {
	frame := []byte{0x28, 0xb5, 0x2f, 0xfd, 0xa0, 0, 0, 0, 0x40} // a content of 1 GiB
	for range 100 {
		frame = append(frame, 0x02, 0, 0x10, 0) // 128 KiB of one byte
	}
	return frame
}

// TestManyFilesAreReadFast is measured by make bench, too; here it says how long it takes.
func TestManyFilesAreReadFast(t *testing.T) {
	if os.Getenv("MUSTER_REAL") == "" {
		t.Skip("set MUSTER_REAL=1")
	}
	s := newShelf(t)
	r := rand.New(rand.NewPCG(1, 2))
	body := make([]byte, 200<<10)
	storetest.Noise(body, 3)
	for i := range 20000 {
		n := r.IntN(20 << 10)
		s.put(fmt.Sprintf("/srv/%02d/%02d/f%05d", i%40, i/40%40, i), body[n:n+r.IntN(20<<10)])
	}
	time.Sleep(4 * time.Second) //nolint:forbidigo // the file system's clock is what is waited for
	for _, id := range []string{"snap-1", "snap-2", "snap-3"} {
		if id == "snap-3" {
			for i := 0; i < 20000; i += 100 {
				s.put(fmt.Sprintf("/srv/%02d/%02d/f%05d", i%40, i/40%40, i), body[i:i+10<<10])
			}
		}
		parent := map[string]string{"snap-2": "snap-1", "snap-3": "snap-2"}[id]
		began := time.Now()
		snap := s.take(id, parent)
		t.Logf("%s: %d entries, %d changed, read %d bytes, sent %d, new %d, stored %d in %s", id, snap.Files.Entries, snap.Files.Changed, snap.Stats.Read,
			snap.Stats.Sent, snap.Stats.New, snap.Stats.Stored, time.Since(began).Round(time.Millisecond))
	}
}
