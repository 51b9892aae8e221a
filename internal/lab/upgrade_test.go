package lab

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/musterdr/muster/internal/api"
	"github.com/musterdr/muster/internal/dr"
	"github.com/musterdr/muster/internal/vm"
	"github.com/musterdr/muster/internal/vm/sim"
)

// Installations that earlier releases left, each a file RELEASE.tar.gz. A release's own is written by scripts/fixture before it
// is published, and never changed again.
const installations = "testdata/installations"

// left is what an installation held when its release wrote it, and what every later release has to see in it.
type left struct {
	Release    string            `json:"release"`
	Servers    []string          `json:"servers"`
	Snapshots  map[string]string `json:"snapshots"` // id → state and outcome
	LKG        string            `json:"lkg"`
	Disk       string            `json:"disk"` // SHA-256 of last-known-good's disk
	Promotions int               `json:"promotions"`
	Tickets    []string          `json:"tickets"`
	Ended      string            `json:"ended"`      // an invocation
	Unfinished string            `json:"unfinished"` // an operation that the process died in
	Events     int               `json:"events"`
}

// installed is the file of an archive in which what was left is written.
const installed = "left.json"

// see says what an installation holds.
func (l *Lab) see(t *testing.T) (is left) {
	t.Helper()
	servers, err := l.Servers(ctx)
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range servers {
		is.Servers = append(is.Servers, s.Server.Name+" "+s.Server.ID)
	}
	records, err := l.Snapshots(ctx, "shop")
	if err != nil {
		t.Fatal(err)
	}
	is.Snapshots = map[string]string{}
	for _, r := range records {
		proven := string(r.State)
		if r.Verdict != nil {
			proven += " " + string(r.Verdict.Outcome) + " " + string(r.Verdict.Code)
		}
		is.Snapshots[r.Snapshot.ID] = proven
		if r.LKG {
			is.LKG = r.Snapshot.ID
		}
	}
	is.Disk = l.diskSum(t, is.LKG)
	moves, err := l.Client.Promotions(ctx, "shop")
	if err != nil {
		t.Fatal(err)
	}
	is.Promotions = len(moves)
	for _, ticket := range l.openTickets(t) {
		is.Tickets = append(is.Tickets, string(ticket.Problem)+" "+ticket.ID)
	}
	all, err := l.Invocations(ctx, true)
	if err != nil {
		t.Fatal(err)
	}
	for _, inv := range all {
		if inv.State == dr.Ended {
			is.Ended = inv.ID
		}
	}
	return is
}

// diskSum reads a snapshot's disk out of the store.
func (l *Lab) diskSum(t *testing.T, snapshot string) string {
	t.Helper()
	img, err := l.Store.Image(ctx, snapshot, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer img.Close()
	sum := sha256.New()
	if _, err := io.Copy(sum, io.NewSectionReader(img, 0, img.Size())); err != nil {
		t.Fatal(err)
	}
	return hex.EncodeToString(sum.Sum(nil))
}

func textDisk(t *testing.T, path, day string) {
	t.Helper()
	data := make([]byte, 1<<20)
	copy(data[64<<10:], strings.Repeat("what the shop sold on "+day+"\n", 500))
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
}

// TestAnInstallationIsWrittenForLaterReleases writes this release's archive where MUSTER_FIXTURE says, named for MUSTER_RELEASE.
// It dies in the middle of an operation, as releases do when they are replaced.
func TestAnInstallationIsWrittenForLaterReleases(t *testing.T) {
	to := os.Getenv("MUSTER_FIXTURE")
	if to == "" {
		t.Skip("scripts/fixture runs it")
	}
	var broken atomic.Bool
	l := New(t, func(spec vm.Spec) sim.Guest {
		if broken.Load() {
			return Panicking(spec)
		}
		return Healthy(spec)
	})
	for _, name := range []string{"shop", "till"} {
		if _, err := l.AddServer(ctx, dr.Server{Name: name, Source: dr.Source{Disks: []string{l.path(name + ".raw")}}, Schedule: dr.Schedule{Every: 24 * time.Hour},
			Objectives: dr.Objectives{RTO: time.Hour, RPO: 26 * time.Hour}, Checks: []dr.Check{{Name: "page", Kind: dr.CheckHTTP, URL: "http://127.0.0.1/"}}}); err != nil {
			t.Fatal(err)
		}
	}
	for _, day := range []string{"monday", "tuesday", "wednesday"} {
		broken.Store(day == "wednesday")
		textDisk(t, l.path("shop.raw"), day)
		l.snapshot(t)
	}
	broken.Store(false)
	inv := l.Finish(l.Invoke(ctx, api.InvokeRequest{Server: "shop", By: "ada", Reason: "fire"}))
	if end := l.Finish(l.EndInvocation(ctx, inv.Subject, false)); end.State != api.OperationSucceeded {
		t.Fatal(end.Error)
	}
	died := make(chan struct{})
	var once sync.Once
	l.Fault = func(ctx context.Context, at string) error {
		if at != "before prerecover" && at != "before pre-recover" {
			return nil
		}
		once.Do(func() { go func() { l.Crash(); close(died) }() })
		<-ctx.Done()
		return ctx.Err()
	}
	textDisk(t, l.path("shop.raw"), "thursday")
	op, err := l.Snapshot(ctx, "shop")
	if err != nil {
		t.Fatal(err)
	}
	<-died
	l.Fault = func(ctx context.Context, _ string) error { <-ctx.Done(); return ctx.Err() } // look, and go no further
	l.Open()
	is := l.see(t)
	is.Release, is.Unfinished = os.Getenv("MUSTER_RELEASE"), op.ID
	events, err := l.Events(ctx, 0, 0, "")
	if err != nil {
		t.Fatal(err)
	}
	is.Events = len(events)
	l.Crash()
	if is.LKG == "" || is.Promotions != 2 || len(is.Tickets) == 0 || is.Ended == "" || len(is.Snapshots) != 4 {
		t.Fatalf("the installation is not worth keeping: %+v", is)
	}
	if err := os.WriteFile(to, l.pack(t, is), 0o644); err != nil {
		t.Fatal(err)
	}
}

// pack makes an archive of what is kept, with what was left in it.
func (l *Lab) pack(t *testing.T, is left) []byte {
	t.Helper()
	var out bytes.Buffer
	zip, err := gzip.NewWriterLevel(&out, gzip.BestCompression)
	if err != nil {
		t.Fatal(err)
	}
	archive := tar.NewWriter(zip)
	add := func(name string, mode fs.FileMode, data []byte) {
		header := &tar.Header{Name: name, Mode: int64(mode.Perm()), Size: int64(len(data)), Typeflag: tar.TypeReg}
		if mode.IsDir() {
			header.Typeflag, header.Size = tar.TypeDir, 0
		}
		if err := archive.WriteHeader(header); err != nil {
			t.Fatal(err)
		}
		if _, err := archive.Write(data); err != nil {
			t.Fatal(err)
		}
	}
	text, err := json.MarshalIndent(is, "", "  ")
	if err != nil {
		t.Fatal(err)
	}
	add(installed, 0o644, text)
	err = fs.WalkDir(os.DirFS(l.Dir), ".", func(name string, entry fs.DirEntry, err error) error {
		top, _, _ := strings.Cut(name, "/")
		kept := strings.HasPrefix(top, catalogFile) || strings.HasPrefix(top, engineFile) || top == "store"
		switch {
		case err != nil || name == ".":
			return err
		case !kept && entry.IsDir():
			return fs.SkipDir
		case !kept || !entry.IsDir() && !entry.Type().IsRegular():
			return nil
		}
		info, err := entry.Info()
		if err != nil {
			return err
		}
		var data []byte
		if !entry.IsDir() {
			if data, err = os.ReadFile(l.path(name)); err != nil {
				return err
			}
		}
		add(name, info.Mode(), data)
		return nil
	})
	if err := errors.Join(err, archive.Close(), zip.Close()); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

// unpack puts an archive in the place of a lab's installation, and gives what was left in it.
func (l *Lab) unpack(t *testing.T, path string) (was left) {
	t.Helper()
	for _, f := range append(l.CatalogFiles(), l.path(engineFile), l.path(engineFile+"-wal"), l.path(engineFile+"-shm"), l.StoreFolder()) {
		if err := os.RemoveAll(f); err != nil {
			t.Fatal(err)
		}
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	zip, err := gzip.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	for archive := tar.NewReader(zip); ; {
		header, err := archive.Next()
		if errors.Is(err, io.EOF) {
			return was
		}
		if err != nil {
			t.Fatal(err)
		}
		data, err := io.ReadAll(archive)
		switch {
		case err != nil:
		case header.Name == installed:
			err = json.Unmarshal(data, &was)
		case header.Typeflag == tar.TypeDir:
			err = os.MkdirAll(l.path(header.Name), fs.FileMode(header.Mode))
		default:
			err = os.WriteFile(l.path(header.Name), data, fs.FileMode(header.Mode))
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

func TestAnInstallationOfEveryReleaseIsOpenedSeenAndGoesOn(t *testing.T) {
	archives, err := filepath.Glob(installations + "/*.tar.gz")
	if err != nil || len(archives) == 0 {
		t.Fatalf("there are no installations of earlier releases: %v", err)
	}
	for _, path := range archives {
		t.Run(strings.TrimSuffix(filepath.Base(path), ".tar.gz"), func(t *testing.T) {
			t.Parallel()
			l := New(t, Healthy)
			l.Crash()
			was := l.unpack(t, path)
			// Nothing goes on before it was looked at: what was unfinished does at once.
			look := make(chan struct{})
			l.Fault = func(ctx context.Context, _ string) error {
				select {
				case <-look:
					return nil
				case <-ctx.Done():
					return ctx.Err()
				}
			}
			l.Open()
			l.seesWhatWasLeft(t, was)
			close(look)
			l.goesOn(t, was)
			l.mustLeaveNothing(t)
		})
	}
}

func (l *Lab) seesWhatWasLeft(t *testing.T, was left) {
	t.Helper()
	is := l.see(t)
	is.Release, is.Unfinished, is.Events = was.Release, was.Unfinished, was.Events
	before, err := json.MarshalIndent(was, "", " ")
	if err != nil {
		t.Fatal(err)
	}
	after, err := json.MarshalIndent(is, "", " ")
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(before, after) {
		t.Errorf("release %s left\n%s\nand this one sees\n%s", was.Release, before, after)
	}
	events, err := l.Events(ctx, 0, 0, "")
	if err != nil || len(events) < was.Events {
		t.Errorf("%d events of %d are there, %v", len(events), was.Events, err)
	}
}

// goesOn has the night go on where the earlier release stopped.
func (l *Lab) goesOn(t *testing.T, was left) {
	t.Helper()
	op, err := l.Operation(ctx, was.Unfinished, 0, 0)
	op = l.Finish(op, err)
	if op.State != api.OperationSucceeded && !strings.Contains(op.Error, "start it again") {
		t.Errorf("the operation that %s left unfinished: %s, %s", was.Release, op.State, op.Error)
	}
	server, err := l.Master.Catalog.Server(ctx, "shop")
	if err != nil {
		t.Fatal(err)
	}
	server.Source.Disks = []string{l.path("shop.raw")} // its disk is elsewhere today
	if err := l.Master.Catalog.UpdateServer(ctx, server); err != nil {
		t.Fatal(err)
	}
	textDisk(t, l.path("shop.raw"), "friday")
	rec := l.snapshot(t)
	if _, known := was.Snapshots[rec.Snapshot.Parent]; !known || !rec.LKG {
		t.Errorf("the next snapshot has parent %q, last-known-good %t", rec.Snapshot.Parent, rec.LKG)
	}
	if sum := l.diskSum(t, was.LKG); sum != was.Disk {
		t.Error("the disk of what was last-known-good has changed")
	}
	if op := l.Finish(l.VerifyStore(ctx, "")); op.State != api.OperationSucceeded {
		t.Errorf("verify: %s", op.Error)
	}
	inv := l.Finish(l.Invoke(ctx, api.InvokeRequest{Server: "shop", By: "ada", Reason: "fire"}))
	if inv.State != api.OperationSucceeded {
		t.Fatalf("invoke: %s", inv.Error)
	}
	l.Finish(l.EndInvocation(ctx, inv.Subject, false))
	l.Reopen()
	if got := l.lkg(t); got != rec.Snapshot.ID {
		t.Errorf("after another start last-known-good is %s, want %s", got, rec.Snapshot.ID)
	}
}
