package lab

import (
	"context"
	"errors"
	"io"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/musterdr/muster/internal/api"
	"github.com/musterdr/muster/internal/appliance"
	"github.com/musterdr/muster/internal/dr"
)

// branch is a lab with an appliance elsewhere that protects a server with one small disk.
func branch(t *testing.T) (*Lab, *Site) {
	t.Helper()
	l := New(t, Healthy)
	s := l.NewSite("box")
	writeDisk(t, l, 1)
	_, err := l.AddServer(ctx, dr.Server{Name: "shop", Appliance: "box", Source: dr.Source{Disks: []string{l.path("shop.raw")}}, Schedule: dr.Schedule{Every: 24 * time.Hour},
		Checks: []dr.Check{{Name: "page", Kind: dr.CheckHTTP, URL: "http://127.0.0.1/"}}})
	if err != nil {
		t.Fatal(err)
	}
	return l, s
}

// settled waits until the lab has nothing to do.
func (l *Lab) settled(t *testing.T) {
	t.Helper()
	ops, err := l.Operations(ctx)
	if err != nil {
		t.Fatal(err)
	}
	for _, op := range ops {
		if !op.State.Finished() {
			l.Finish(op, nil)
		}
	}
}

// states gives the states of the server's snapshots, newest first.
func (l *Lab) states(t *testing.T) (out []dr.State) {
	t.Helper()
	records, err := l.Snapshots(ctx, "shop")
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range records {
		out = append(out, r.State)
	}
	return out
}

func TestASnapshotOfABranchArrivesAndIsTestedAtOnce(t *testing.T) {
	t.Parallel()
	l, s := branch(t)
	l.Master.Wake(ctx)
	if ops, _ := l.Operations(ctx); len(ops) != 0 {
		t.Fatalf("the master captures a server of an appliance: %+v", ops)
	}
	s.Night()
	s.Night() // what was to be told is told
	l.settled(t)
	if got := l.states(t); !slices.Equal(got, []dr.State{dr.Verified}) {
		t.Fatalf("states %v", got)
	}
	if l.lkg(t) == "" {
		t.Error("no last-known-good")
	}
	st, err := l.Server(ctx, "shop")
	if err != nil || st.Near == nil || st.Near.Snapshots != 1 || st.Near.Owed != 0 {
		t.Errorf("the master knows %+v of the near store, %v", st.Near, err)
	}
	// Nothing happens twice, and last-known-good is marked in the near store as well.
	s.Night()
	lkg, err := s.Near.LKG(ctx)
	if err != nil || lkg[st.Server.ID] != l.lkg(t) {
		t.Errorf("near last-known-good %v, %v", lkg, err)
	}
	l.settled(t)
	if ops, _ := l.Operations(ctx); len(ops) != 1 {
		t.Errorf("%d operations for one snapshot", len(ops))
	}
	if open := l.openTickets(t); len(open) != 0 {
		t.Errorf("tickets %+v", open)
	}
}

// arriving counts what of a body arrives.
type arriving struct {
	io.ReadCloser
	n *atomic.Int64
}

func (a arriving) Read(p []byte) (int, error) {
	n, err := a.ReadCloser.Read(p)
	a.n.Add(int64(n))
	return n, err
}

// What crossed the line for a snapshot is metered, that of an attempt which broke off too, and once.
func TestWhatABranchSendsIsMetered(t *testing.T) {
	t.Parallel()
	l, s := branch(t)
	var sent, arrived, broken atomic.Int64 // bytes that were begun to be sent, those of packs that arrived, and other blobs
	look := func(r *http.Request) error {
		if r.Method != http.MethodPut || !strings.Contains(r.URL.Path, "/blobs/") {
			return nil
		}
		if sent.Add(r.ContentLength); strings.Contains(r.URL.Path, "/blobs/p") {
			r.Body = arriving{r.Body, &arrived}
		} else if arrived.Load() > 0 && broken.Add(1) == 1 { // of a pack something has arrived
			r.Header.Set("X-Muster-Locks", "somebody-took-it-away")
		}
		return nil
	}
	s.line.broken.Store(&look)
	for range 3 {
		s.Night()
	}
	l.settled(t)
	if broken.Load() < 2 {
		t.Fatalf("%d other blobs after %d bytes of packs: nothing broke off", broken.Load(), arrived.Load())
	}
	list, err := l.Meter(ctx, l.Clock.Now().UTC().Format("2006-01"), "")
	if err != nil || len(list) != 1 {
		t.Fatalf("%+v, %v", list, err)
	}
	if got := list[0].Replicated; got < arrived.Load() || got > sent.Load() {
		t.Errorf("%d bytes are metered; of packs %d arrived, %d bytes were begun to be sent in all", got, arrived.Load(), sent.Load())
	}
}

func TestASnapshotOfABranchIsTakenWhenItIsAskedFor(t *testing.T) {
	t.Parallel()
	l, s := branch(t)
	ran, end := context.WithCancel(ctx)
	done := make(chan struct{})
	go func() { // it works by itself
		defer close(done)
		for ran.Err() == nil {
			s.Wake(ran)
			_ = s.Hail(ran)
			select {
			case <-ran.Done():
			case <-time.After(20 * time.Millisecond):
			}
		}
	}()
	defer func() { end(); <-done }()
	rec := l.snapshot(t)
	if rec.State != dr.Verified || !rec.LKG {
		t.Fatalf("state %s, LKG %t", rec.State, rec.LKG)
	}
	if op := l.Finish(l.Replicate(ctx, "shop", rec.Snapshot.ID)); op.State != api.OperationSucceeded {
		t.Errorf("replicate again: %s %s", op.State, op.Error)
	}
	if op := l.Finish(l.Replicate(ctx, "shop", "")); op.State != api.OperationSucceeded {
		t.Errorf("replicate the newest: %s %s", op.State, op.Error)
	}
	if op := l.Finish(l.Replicate(ctx, "shop", "snap-20200101t000000-aaaaaaaa")); op.State != api.OperationFailed || !strings.Contains(op.Error, "not in the near store") {
		t.Errorf("replicate what is not there: %s %s", op.State, op.Error)
	}
}

// An appliance that is cut off for days goes on, and when it is back the newest comes first.
func TestDaysWithoutTheMasterLoseNothing(t *testing.T) {
	t.Parallel()
	l, s := branch(t)
	s.Night()
	s.Night()
	l.settled(t)
	s.Cut(true)
	for day := uint64(2); day <= 5; day++ {
		writeDisk(t, l, day)
		s.Clock.Turn(25 * time.Hour)
		s.Night()
	}
	kept, err := s.Near.Snapshots(ctx)
	if err != nil || len(kept) != 5 {
		t.Fatalf("%d snapshots are kept, %v", len(kept), err)
	}
	if _, err := l.Snapshot(ctx, "shop"); api.KindOf(err) != api.Unavailable || !strings.Contains(err.Error(), "box is not connected") {
		t.Errorf("a snapshot wanted of an appliance that is away: %v", err)
	}
	if _, err := l.ListFiles(ctx, api.FilesQuery{Server: "shop"}); api.KindOf(err) != api.Unavailable {
		t.Errorf("files of an appliance that is away: %v", err)
	}
	l.Clock.Turn(3 * 25 * time.Hour)
	l.Master.Wake(ctx)
	var problems []string
	for _, ticket := range l.openTickets(t) {
		problems = append(problems, string(ticket.Problem))
	}
	slices.Sort(problems)
	if !slices.Equal(problems, []string{"appliance-away/box", "arrival-missing"}) {
		t.Errorf("tickets while it is away: %v", problems)
	}
	l.Clock.Turn(-3 * 25 * time.Hour) // what is captured in a lab is captured now
	s.Clock.Turn(-4 * 25 * time.Hour)
	l.Crash() // the master restarts meanwhile
	l.Open()
	s.Cut(false)
	s.Night()
	for range 6 {
		s.Night()
	}
	l.settled(t)
	l.Master.Wake(ctx)
	if got := l.states(t); len(got) != 5 || got[0] != dr.Verified || got[1] != dr.Replicated {
		t.Errorf("states %v: the newest is tested, those that came after it are only there", got)
	}
	events, err := l.Events(ctx, 0, 1000, "shop")
	if err != nil {
		t.Fatal(err)
	}
	var order []string
	for _, e := range events {
		if e.Kind == "snapshot.replicated" {
			order = append(order, e.Subject)
		}
	}
	records, err := l.Snapshots(ctx, "shop")
	if err != nil || len(order) != 5 || order[1] != records[0].Snapshot.ID {
		t.Errorf("arrived in the order %v, %v", order, err)
	}
	if open := l.openTickets(t); len(open) != 0 {
		t.Errorf("tickets after it is back: %+v", open)
	}
	for _, k := range kept {
		if _, err := l.Store.Verify(ctx, k.ID, nil); err != nil {
			t.Error(err)
		}
	}
}

// The process dies at each step in turn, and each time what it was about to do is done by the next one, once.
func TestAnApplianceThatDiesAtAnyStepLosesNothing(t *testing.T) {
	for _, step := range SiteSteps {
		t.Run(strings.ReplaceAll(step, " ", "-"), func(t *testing.T) {
			t.Parallel()
			l, s := branch(t)
			if err := s.Hail(ctx); err != nil {
				t.Fatal(err)
			}
			s.Crash()
			dead := make(chan struct{})
			var once atomic.Bool
			s.Fault = func(ctx context.Context, at string) error {
				if at != step || !once.CompareAndSwap(false, true) {
					return nil
				}
				go func() { s.Crash(); close(dead) }()
				select {
				case <-ctx.Done(): // the process that called is no more
				case <-dead:
				}
				return errors.New("killed")
			}
			s.Open()
			night, end := context.WithCancel(ctx)
			ended := make(chan struct{})
			go func() {
				defer close(ended)
				for night.Err() == nil {
					s.Wake(night)
					_ = s.Hail(night)
					select {
					case <-night.Done():
					case <-time.After(20 * time.Millisecond):
					}
				}
			}()
			select {
			case <-dead:
			case <-time.After(patience):
				t.Fatal("the process never died: the step was not reached")
			}
			end()
			<-ended
			s.Open()
			s.Night()
			s.Night()
			l.settled(t)
			if got := l.states(t); !slices.Equal(got, []dr.State{dr.Verified}) {
				t.Errorf("states %v", got)
			}
			if kept, err := s.Near.Snapshots(ctx); err != nil || len(kept) != 1 {
				t.Errorf("%d snapshots in the near store, %v", len(kept), err)
			}
			if open := l.openTickets(t); len(open) != 0 {
				t.Errorf("tickets %+v", open)
			}
		})
	}
}

func TestDefinitionsThatChangedMeanwhileAreTakenOver(t *testing.T) {
	t.Parallel()
	l, s := branch(t)
	s.Night()
	s.Cut(true)
	every := 2 * time.Hour
	if _, err := l.UpdateServer(ctx, "shop", api.ServerChange{Every: &every}); err != nil {
		t.Fatal(err)
	}
	s.Crash() // it has to remember what it knew
	s.Open()
	s.Clock.Turn(3 * time.Hour)
	s.Night()
	if kept, _ := s.Near.Snapshots(ctx); len(kept) != 1 {
		t.Fatalf("%d snapshots by the old definition", len(kept))
	}
	s.Cut(false)
	s.Night()
	s.Night()
	if kept, _ := s.Near.Snapshots(ctx); len(kept) != 2 {
		t.Fatalf("%d snapshots by the new definition", len(kept))
	}
	l.settled(t)
	s.Cut(true)
	if err := l.RemoveServer(ctx, "shop"); err != nil {
		t.Fatal(err)
	}
	s.Clock.Turn(3 * time.Hour)
	s.Night() // it does not know yet
	s.Cut(false)
	s.Night()
	s.Clock.Turn(3 * time.Hour)
	s.Night()
	if kept, _ := s.Near.Snapshots(ctx); len(kept) != 3 {
		t.Errorf("%d snapshots of a server that was removed: none is lost, and none is taken", len(kept))
	}
	if st, err := s.Status(ctx); err != nil || len(st.Hello.Servers) != 0 || st.Hello.Owed != 0 {
		t.Errorf("status %+v, %v", st.Hello, err)
	}
}

// dataOfABranch is a lab in which an appliance elsewhere has captured the image of a server and twice its data, of which all has arrived
// and was tested.
func dataOfABranch(t *testing.T, at func(l *Lab) *Site) (*Lab, *Site) {
	t.Helper()
	l := New(t, Healthy)
	s := at(l)
	writeDisk(t, l, 1)
	l.put(t, "web", "srv/page", "first")
	_, err := l.AddServer(ctx, dr.Server{Name: "shop", Appliance: "box", Source: live0("web"), Schedule: dr.Schedule{Every: 7 * 24 * time.Hour}, Tier: dr.TierImageData,
		Data: dr.DataSet{Paths: []string{"/srv"}, Every: 24 * time.Hour}, Checks: []dr.Check{{Name: "page", Kind: dr.CheckHTTP, URL: "http://127.0.0.1/"}}})
	if err != nil {
		t.Fatal(err)
	}
	for range 3 {
		s.Night()
	}
	l.settled(t)
	l.put(t, "web", "srv/page", "second")
	s.Clock.Turn(25 * time.Hour)
	for range 2 {
		s.Night()
	}
	l.settled(t)
	return l, s
}

// Of a server with data both arrive, and what is tested is the pair. Its files are looked into, and put back, over the line.
func TestDataOfABranchArrivesWithItsImage(t *testing.T) {
	t.Parallel()
	l, _ := dataOfABranch(t, func(l *Lab) *Site { return l.NewSite("box") })
	kinds, list := l.kinds(t, "shop")
	if kinds != "ddi" || list[0].State != dr.Verified || list[1].State != dr.Verified || list[2].State != dr.Replicated {
		t.Fatalf("snapshots %s: %s, %s, %s", kinds, list[0].State, list[1].State, list[2].State)
	}
	if l.lkg(t) != list[0].Snapshot.ID {
		t.Error("the newest data is not last-known-good")
	}
	found, err := l.FileVersions(ctx, api.VersionsQuery{Server: "shop", Path: "/srv/page"})
	if err != nil || len(found.Versions) != 2 {
		t.Errorf("versions over the line %+v, %v", found, err)
	}
	var page strings.Builder
	if err := l.GetFile(ctx, api.GetQuery{Server: "shop", Snapshot: list[1].Snapshot.ID, Path: "/srv/page"}, &page); err != nil || page.String() != "first" {
		t.Errorf("a file over the line %q, %v", page.String(), err)
	}
	l.put(t, "web", "srv/page", "third")
	back, err := l.RestoreFiles(ctx, api.RestoreRequest{Server: "shop", Snapshot: list[0].Snapshot.ID, Paths: []string{"/srv/page"}, Overwrite: true})
	if err != nil || back.Replaced != 1 || l.read("web", "srv/page") != "second" {
		t.Errorf("put back over the line %+v, %v", back, err)
	}
}

// With the appliance gone its servers' files come out of the customer's far store, onto servers that the master itself reaches.
func TestFilesOfABranchThatIsGoneAreInTheFarStore(t *testing.T) {
	t.Parallel()
	if os.Getuid() != 0 {
		t.Skip("only root may give files to others")
	}
	l, s := dataOfABranch(t, func(l *Lab) *Site {
		l.AddCustomer("acme")
		return l.NewSiteOf("acme", "box")
	})
	s.Cut(true)
	_, list := l.kinds(t, "shop")
	if _, err := l.ListFiles(ctx, api.FilesQuery{Server: "shop", Path: "/srv"}); api.KindOf(err) != api.Unavailable || !strings.Contains(err.Error(), "--far") {
		t.Errorf("without its appliance: %v", err)
	}
	for range 2 {
		listing, err := l.ListFiles(ctx, api.FilesQuery{Server: "shop", Path: "/srv", Far: true})
		if err != nil || len(listing.Files) != 1 || listing.Snapshot != list[0].Snapshot.ID {
			t.Fatalf("%+v, %v", listing, err)
		}
		l.Reopen()
	}
	found, err := l.FindFiles(ctx, api.FindQuery{Server: "shop", Pattern: "pag*", Far: true})
	if err != nil || len(found.Found) != 2 {
		t.Errorf("%+v, %v", found, err)
	}
	versions, err := l.FileVersions(ctx, api.VersionsQuery{Server: "shop", Path: "/srv/page", Far: true})
	if err != nil || len(versions.Versions) != 2 {
		t.Errorf("%+v, %v", versions, err)
	}
	var page strings.Builder
	if err := l.GetFile(ctx, api.GetQuery{Server: "shop", Snapshot: list[1].Snapshot.ID, Path: "/srv/page", Far: true}, &page); err != nil || page.String() != "first" {
		t.Errorf("%q, %v", page.String(), err)
	}
	if _, err := l.AddServer(ctx, dr.Server{Name: "spare", Source: live0("spare"), Schedule: dr.Schedule{Every: 24 * time.Hour}}); err != nil {
		t.Fatal(err)
	}
	l.put(t, "spare", "mnt/x", "x")
	ask := api.RestoreRequest{Server: "shop", Paths: []string{"/srv/page"}, By: "an engineer", Far: true}
	if _, err := l.RestoreFiles(ctx, ask); api.KindOf(err) != api.Invalid || !strings.Contains(err.Error(), "only appliance box reaches it") {
		t.Errorf("onto the server whose appliance is gone: %v", err)
	}
	ask.ToServer = "spare"
	if _, err := l.RestoreFiles(ctx, ask); api.KindOf(err) != api.Invalid {
		t.Errorf("onto another server's own places: %v", err)
	}
	ask.ToPath = "/mnt"
	if r, err := l.RestoreFiles(ctx, ask); err != nil || r.Restored != 1 || l.read("spare", "mnt/page") != "second" {
		t.Errorf("%+v, %v", r, err)
	}
	if told := l.restores(t); len(told) != 1 || !strings.Contains(told[0], "an engineer") {
		t.Errorf("told %v", told)
	}
	s.Cut(false)
	if listing, err := l.ListFiles(ctx, api.FilesQuery{Server: "shop", Path: "/srv"}); err != nil || len(listing.Files) != 1 {
		t.Errorf("with its appliance: %+v, %v", listing, err)
	}
}

// A master believes an appliance only about its own servers.
func TestAnApplianceSpeaksForItsOwnServersOnly(t *testing.T) {
	t.Parallel()
	l, s := branch(t)
	s.Night()
	l.settled(t)
	records, err := l.Snapshots(ctx, "shop")
	if err != nil || len(records) != 1 {
		t.Fatal(len(records), err)
	}
	whole, err := l.Record(ctx, records[0].Snapshot.ID)
	if err != nil {
		t.Fatal(err)
	}
	other := whole.Snapshot
	other.ID = dr.NewSnapshotID(time.Now())
	for from, want := range map[string]string{"elsewhere": "not captured by appliance elsewhere", "box": "not in the far store"} {
		answers, err := l.Master.Arrived(ctx, from, []api.Arrival{{Snapshot: other}})
		text := answers[other.ID]
		if err != nil {
			text = err.Error()
		}
		if !strings.Contains(text, want) {
			t.Errorf("%s is answered %q", from, text)
		}
	}
	bad := other
	bad.Disks = nil
	if answers, _ := l.Master.Arrived(ctx, "box", []api.Arrival{{Snapshot: bad}}); !strings.Contains(answers[bad.ID], "disks") {
		t.Errorf("a snapshot without disks is answered %v", answers)
	}
	if got := l.states(t); len(got) != 1 {
		t.Errorf("%d snapshots are believed", len(got))
	}
}

func TestAWrongClockIsSaidAndStopsNothing(t *testing.T) {
	t.Parallel()
	l, s := branch(t)
	s.Clock.Turn(400 * 24 * time.Hour)
	s.Night()
	s.Night()
	l.settled(t)
	if open := l.openTickets(t); len(open) != 1 || open[0].Problem != "clock-wrong/box" {
		t.Errorf("tickets %+v", open)
	}
	s.Clock.Turn(-400 * 24 * time.Hour)
	s.Night()
	if open := l.openTickets(t); len(open) != 0 {
		t.Errorf("tickets when the clock is right again: %+v", open)
	}
	kept, _ := s.Near.Snapshots(ctx)
	s.Night()
	if again, _ := s.Near.Snapshots(ctx); len(kept) == 0 || len(again) != len(kept) {
		t.Errorf("%d snapshots, then %d", len(kept), len(again))
	}
}

// A near store that is full lets go of what is in the far store, and captures nothing rather than lose what is not.
func TestAFullNearStoreLosesNothingThatIsOwed(t *testing.T) {
	t.Parallel()
	l, s := branch(t)
	s.Crash()
	var reserve atomic.Int64
	reserve.Store(1)
	s.Config = func(c *appliance.NodeConfig) { c.Reserve, c.Floor = reserve.Load(), 1 }
	s.Open()
	for day := uint64(1); day <= 4; day++ {
		writeDisk(t, l, day)
		s.Clock.Turn(25 * time.Hour)
		s.Night()
		s.Night()
	}
	l.settled(t)
	s.Night()
	s.Cut(true)
	for day := uint64(5); day <= 6; day++ {
		writeDisk(t, l, day)
		s.Clock.Turn(25 * time.Hour)
		s.Night()
	}
	s.Crash()
	reserve.Store(1 << 60) // no disk is as large as that
	s.Open()
	s.Clock.Turn(25 * time.Hour)
	s.Night()
	kept, err := s.Near.Snapshots(ctx)
	if err != nil || len(kept) != 3 { // last-known-good, which is the last one that arrived, and two that are owed
		t.Fatalf("%d snapshots stay, %v", len(kept), err)
	}
	s.Cut(false)
	s.Night()
	s.Night()
	l.settled(t)
	full := false
	for _, ticket := range l.openTickets(t) {
		full = full || ticket.Problem == "near-store-full/box"
	}
	if !full {
		t.Errorf("no ticket says that it is full: %+v", l.openTickets(t))
	}
	s.Crash()
	reserve.Store(1)
	s.Open()
	s.Night()
	s.Night()
	l.settled(t)
	if again, _ := s.Near.Snapshots(ctx); len(again) <= 1 {
		t.Errorf("%d snapshots when there is room again", len(again))
	}
	s.Clock.Turn(-7 * 25 * time.Hour)
	s.Night()
	if open := l.openTickets(t); len(open) != 0 {
		t.Errorf("tickets when there is room again: %+v", open)
	}
	if records, _ := l.Snapshots(ctx, "shop"); len(records) != 7 {
		t.Errorf("%d snapshots arrived of 7", len(records))
	}
}
