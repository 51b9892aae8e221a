package lab

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/musterdr/muster/internal/api"
	"github.com/musterdr/muster/internal/dr"
	"github.com/musterdr/muster/internal/store"
)

// put writes a file of a live server.
func (l *Lab) put(t *testing.T, host, name, content string) {
	t.Helper()
	path := filepath.Join(l.path(host), name)
	if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(content), 0o644)); err != nil {
		t.Fatal(err)
	}
}

// liveShop is a lab in which a live server is protected: its disk every week, its data every day.
func liveShop(t *testing.T) *Lab {
	t.Helper()
	l := New(t, Healthy)
	writeDisk(t, l, 1)
	l.put(t, "web", "srv/page", "first")
	l.put(t, "web", "srv/cache/x", "left out")
	_, err := l.AddServer(ctx, dr.Server{Name: "shop", Source: live0("web"), Schedule: dr.Schedule{Every: 7 * 24 * time.Hour}, Tier: dr.TierImageData,
		Data:   dr.DataSet{Paths: []string{"/srv"}, Exclude: []string{"/srv/cache"}, Every: 24 * time.Hour},
		Checks: []dr.Check{{Name: "page", Kind: dr.CheckHTTP, URL: "http://127.0.0.1/"}}, Objectives: dr.Objectives{RPO: 30 * time.Hour}})
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func live0(host string) dr.Source {
	return dr.Source{SSH: &dr.SSHSource{User: "root", Host: host, Port: 22, KeyFile: "/key", HostKey: "ssh-ed25519 A"}}
}

// data takes the data alone.
func (l *Lab) data(t *testing.T, server string) dr.Record {
	t.Helper()
	op := l.Finish(l.SnapshotData(ctx, server))
	if op.State != api.OperationSucceeded {
		t.Fatalf("snapshot of data %s: %s", op.State, op.Error)
	}
	rec, err := l.Record(ctx, op.Subject)
	if err != nil {
		t.Fatal(err)
	}
	return rec
}

// kinds lists the snapshots of a server that are left, newest first: i an image, d data.
func (l *Lab) kinds(t *testing.T, server string) (kinds string, list []dr.Record) {
	t.Helper()
	all, err := l.Snapshots(ctx, server)
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range all {
		if r.State == dr.Expired {
			continue
		}
		list = append(list, r)
		if r.Snapshot.IsData() {
			kinds += "d"
		} else {
			kinds += "i"
		}
	}
	return kinds, list
}

func TestWhatIsTestedAndPromotedIsTheImageWithTheNewestData(t *testing.T) {
	t.Parallel()
	l := liveShop(t)
	first := l.snapshot(t)
	kinds, list := l.kinds(t, "shop")
	if kinds != "di" || first.State != dr.Verified || !first.LKG || first.Snapshot.Image != list[1].Snapshot.ID || list[1].State != dr.Kept || first.Snapshot.Files.Entries != 2 {
		t.Fatalf("%s: %+v, %+v", kinds, first.Snapshot, list)
	}
	if d := first.PreRecovery.Data; d == nil || d.Written != 1 || d.Bytes != 5 || d.Image != first.Snapshot.Image || d.Snapshot != first.Snapshot.ID {
		t.Errorf("merged: %+v", d)
	}
	delta, err := os.ReadFile(first.PreRecovery.Deltas[0])
	if err != nil || !strings.Contains(string(delta), `"/srv/page"`) {
		t.Errorf("the delta is of %.300s, %v", delta, err)
	}

	l.put(t, "web", "srv/page", "second")
	second := l.data(t, "shop")
	if second.Snapshot.Image != first.Snapshot.Image || second.Snapshot.Parent != first.Snapshot.ID || !second.LKG || l.lkg(t) != second.Snapshot.ID || second.PreRecovery.Data.Bytes != 6 {
		t.Errorf("%+v, %+v", second.Snapshot, second.PreRecovery.Data)
	}
	if len(l.openTickets(t)) > 0 {
		t.Errorf("tickets %+v", l.openTickets(t))
	}

	// It is the pair that runs.
	l.Finish(l.Invoke(ctx, api.InvokeRequest{Server: "shop"}))
	inv, err := l.Invocation(ctx, "shop")
	if err != nil || inv.State != dr.Running || inv.SnapshotID != second.Snapshot.ID || inv.RPA > time.Hour {
		t.Errorf("invocation: %+v, %v", inv, err)
	}
	l.Finish(l.EndInvocation(ctx, "shop", false))
	l.mustLeaveNothing(t)

	// And it is the pair that a lost catalog comes back to.
	l.Crash()
	for _, pattern := range []string{"catalog.db*", "engine.db*"} {
		files, _ := filepath.Glob(l.path(pattern))
		for _, f := range files {
			if err := os.Remove(f); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := os.RemoveAll(l.path("silo")); err != nil {
		t.Fatal(err)
	}
	l.Open()
	if op := l.Finish(l.AdoptStore(ctx)); op.State != api.OperationSucceeded {
		t.Fatalf("adopt %s: %s", op.State, op.Error)
	}
	s, err := l.Server(ctx, "shop")
	if err != nil || s.LKG == nil || s.LKG.Snapshot.ID != second.Snapshot.ID || s.LKG.Snapshot.Image != first.Snapshot.Image || s.Server.Tier != dr.TierImageData {
		t.Errorf("adopted: %+v, %v", s, err)
	}
	l.Finish(l.Invoke(ctx, api.InvokeRequest{Server: "shop"}))
	if inv, err := l.Invocation(ctx, "shop"); err != nil || inv.State != dr.Running {
		t.Errorf("invocation from an adopted store: %+v, %v", inv, err)
	}
	l.Finish(l.EndInvocation(ctx, "shop", false))
}

func TestDataAndImageHaveCadencesOfTheirOwnAndPairsAreKeptTogether(t *testing.T) {
	t.Parallel()
	l := liveShop(t)
	keep := 2
	if _, err := l.UpdateServer(ctx, "shop", api.ServerChange{KeepLast: &keep}); err != nil {
		t.Fatal(err)
	}
	wake := func(want string) []dr.Record {
		t.Helper()
		l.Master.Wake(ctx)
		ops, err := l.Operations(ctx)
		if err != nil {
			t.Fatal(err)
		}
		for _, op := range ops {
			if op = l.Finish(op, nil); op.Kind == "protect" && op.State != api.OperationSucceeded {
				t.Fatalf("%s: %s", op.ID, op.Error)
			}
		}
		kinds, list := l.kinds(t, "shop")
		if kinds != want {
			t.Fatalf("snapshots %q, want %q", kinds, want)
		}
		return list
	}
	wake("di") // the image first, then the data onto it
	wake("di") // neither is due
	l.Clock.Turn(25 * time.Hour)
	wake("ddi")
	l.Clock.Turn(25 * time.Hour)
	list := wake("ddi") // two are kept, and the image below them
	image := list[2].Snapshot.ID
	if err := l.Store.Forget(ctx, image); !errors.Is(err, store.ErrPinned) {
		t.Errorf("the image below data was forgotten: %v", err)
	}
	l.Clock.Turn(6 * 24 * time.Hour)
	wake("didi") // the older pair is kept as one of two, too
}

func TestDataGoesOntoAStandby(t *testing.T) {
	t.Parallel()
	l := protectedShop(t, Healthy) // the standby: a disk with a compatible system
	l.put(t, "web2", "srv/page", "only data")
	server := dr.Server{Name: "web2", Source: live0("web2"), Tier: dr.TierData, Data: dr.DataSet{Paths: []string{"/srv"}}, Standby: "shop"}
	if _, err := l.AddServer(ctx, dr.Server{Name: "web3", Source: live0("web2"), Tier: dr.TierData, Data: server.Data, Standby: "nobody"}); err == nil {
		t.Error("a standby that is not there was taken")
	}
	if _, err := l.AddServer(ctx, server); err != nil {
		t.Fatal(err)
	}
	if _, err := l.SnapshotData(ctx, "web2"); err == nil || !strings.Contains(err.Error(), "no image of shop yet") {
		t.Errorf("data without an image: %v", err)
	}
	image := l.snapshot(t)
	rec := l.data(t, "web2")
	if !rec.LKG || rec.Snapshot.Image != image.Snapshot.ID || rec.PreRecovery.Data.Written != 1 {
		t.Errorf("%+v", rec.Snapshot)
	}
	if err := l.RemoveServer(ctx, "shop"); err == nil {
		t.Error("a server that is a standby was removed")
	}
	l.mustLeaveNothing(t)
}

func TestABadImageDoesNotMakeEveryNightsDataBad(t *testing.T) {
	at := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	rec := func(id, image string, day int, outcome dr.Outcome, lkg bool) dr.Record {
		r := dr.Record{Snapshot: dr.Snapshot{ID: id, Image: image, Taken: at.AddDate(0, 0, day)}, State: dr.Kept, LKG: lkg}
		if image != "" {
			r.Snapshot.Kind = dr.SnapshotData
		}
		if outcome != "" {
			r.Verdict = &dr.Verdict{Outcome: outcome, Started: r.Snapshot.Taken}
		}
		return r
	}
	records := []dr.Record{rec("d2", "i2", 8, dr.Fail, false), rec("i2", "", 7, "", false), rec("d1", "i1", 1, dr.Pass, true), rec("i1", "", 0, "", false)}
	if got, ok := dr.ImageFor(records); !ok || got.ID != "i1" {
		t.Errorf("data goes onto %s", got.ID)
	}
	records[0].Verdict.Outcome = dr.Inconclusive
	if got, ok := dr.ImageFor(records); !ok || got.ID != "i2" {
		t.Errorf("data goes onto %s", got.ID)
	}
}
