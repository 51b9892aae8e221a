package lab

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
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

// text is a disk full of text. Nobody writes to it.
var text = sync.OnceValue(func() []byte {
	data := make([]byte, 20<<20)
	r := rand.New(rand.NewPCG(3, 3))
	for i := range data[:19<<20] {
		if data[i] = byte('a' + r.IntN(26)); i > 64 && r.IntN(3) > 0 {
			data[i] = data[i-64]
		}
	}
	return data
})

// filled is a lab in which a server with a disk full of text is protected, with the content of its disk.
func filled(t *testing.T, guest func(vm.Spec) sim.Guest) (*Lab, []byte) {
	t.Helper()
	l, data := New(t, guest), text()
	l.write(t, data)
	_, err := l.AddServer(ctx, dr.Server{Name: "shop", Source: dr.Source{Disks: []string{l.path("shop.raw")}}, Schedule: dr.Schedule{Every: 24 * time.Hour}, Signs: dr.SignsHigh, // the disk is small
		Checks: []dr.Check{{Name: "page", Kind: dr.CheckHTTP, URL: "http://127.0.0.1/"}}})
	if err != nil {
		t.Fatal(err)
	}
	return l, data
}

// long leaves a test out of the run with the race detector, which makes it slow and which it would show nothing that the
// others here do not: they go the same ways through the parts.
func long(t *testing.T) {
	t.Helper()
	if testing.Short() {
		t.Skip("the race detector sees the same in the other tests of signs")
	}
}

func (l *Lab) write(t *testing.T, disk []byte) {
	t.Helper()
	if err := os.WriteFile(l.path("shop.raw"), disk, 0o600); err != nil {
		t.Fatal(err)
	}
}

// encrypt makes chance of everything a criminal would want.
func encrypt(disk []byte, seed uint64) []byte {
	out := append([]byte(nil), disk...)
	r := rand.NewChaCha8([32]byte{byte(seed)})
	_, _ = r.Read(out[1<<20 : 19<<20]) // never fails
	return out
}

// a little text that a day adds.
func day(disk []byte, n int) []byte {
	out := append([]byte(nil), disk...)
	copy(out[19<<20+n*4096:], strings.Repeat("an order came in\n", 200))
	return out
}

func (l *Lab) rule(t *testing.T, snapshot string, accept bool) api.Operation {
	t.Helper()
	return l.Finish(l.Rule(ctx, snapshot, api.RuleRequest{Accept: accept, By: "ann", Reason: "I looked"}))
}

func TestAnEncryptedServerThatBootsDoesNotBecomeLastKnownGood(t *testing.T) {
	t.Parallel()
	l, disk := filled(t, Healthy)
	l.snapshot(t)
	l.write(t, day(disk, 1))
	good := l.snapshot(t)
	if good.HeldBy != "" || l.lkg(t) != good.Snapshot.ID || good.Snapshot.Signs.Last.Blocks == nil {
		t.Fatalf("an ordinary day: held by %q, %+v", good.HeldBy, good.Snapshot.Signs)
	}
	bad := encrypt(disk, 1)
	l.write(t, bad)
	held := l.snapshot(t)
	if held.State != dr.Verified || held.HeldBy != held.Snapshot.ID || l.lkg(t) != good.Snapshot.ID {
		t.Fatalf("encrypted: %s, held by %q, last-known-good %s", held.State, held.HeldBy, l.lkg(t))
	}
	for n := range 2 { // quiet nights after it
		l.write(t, day(bad, n))
		if later := l.snapshot(t); later.HeldBy != held.Snapshot.ID || later.Snapshot.Suspicious() || l.lkg(t) != good.Snapshot.ID {
			t.Errorf("a quiet night after it: held by %q, %+v", later.HeldBy, later.Snapshot.Signs)
		}
	}
	tickets := l.openTickets(t)
	if len(tickets) != 1 || tickets[0].Problem != dr.ProblemTampering || tickets[0].Snapshot != held.Snapshot.ID || !strings.Contains(tickets[0].Detail, "became random") {
		t.Fatalf("tickets %+v, want one", tickets)
	}
	op := l.rule(t, held.Snapshot.ID, false)
	rec, err := l.Record(ctx, held.Snapshot.ID)
	if err != nil || op.State != api.OperationSucceeded || rec.State != dr.Rejected || l.lkg(t) != good.Snapshot.ID {
		t.Errorf("refused: %s, %s, last-known-good %s, %v", op.Error, rec.State, l.lkg(t), err)
	}
	// The server is brought back, and that ends it.
	l.write(t, day(disk, 2))
	back := l.snapshot(t)
	if back.HeldBy != "" || l.lkg(t) != back.Snapshot.ID || len(l.openTickets(t)) != 0 {
		t.Errorf("brought back: held by %q, %+v, tickets %+v", back.HeldBy, back.Snapshot.Signs.Trusted, l.openTickets(t))
	}
	l.mustLeaveNothing(t)
}

func TestWhatAPersonAcceptsIsPromotedAndNotAskedAgain(t *testing.T) {
	t.Parallel()
	l, disk := filled(t, Healthy)
	first := l.snapshot(t)
	bad := encrypt(disk, 1)
	l.write(t, bad)
	held := l.snapshot(t)
	l.write(t, day(bad, 1))
	quiet := l.snapshot(t)
	if l.lkg(t) != first.Snapshot.ID || quiet.HeldBy == "" {
		t.Fatalf("last-known-good %s, held by %q", l.lkg(t), quiet.HeldBy)
	}
	if _, err := l.Rule(ctx, first.Snapshot.ID, api.RuleRequest{Accept: true, By: "ann", Reason: "x"}); api.KindOf(err) != api.Conflict {
		t.Errorf("accepted what is not held: %v", err)
	}
	if _, err := l.Rule(ctx, held.Snapshot.ID, api.RuleRequest{Accept: true, By: "ann"}); api.KindOf(err) != api.Invalid {
		t.Errorf("accepted without a reason: %v", err)
	}
	if op := l.rule(t, held.Snapshot.ID, true); op.State != api.OperationSucceeded {
		t.Fatal(op.Error)
	}
	if l.lkg(t) != quiet.Snapshot.ID || len(l.openTickets(t)) != 0 {
		t.Errorf("last-known-good %s, want the newest that builds on the accepted one; tickets %+v", l.lkg(t), l.openTickets(t))
	}
	if kept, err := l.Store.LKG(ctx); err != nil || len(kept) != 1 || kept[quiet.Snapshot.ServerID] != quiet.Snapshot.ID {
		t.Errorf("the store's last-known-good is %v, %v", kept, err)
	}
	l.write(t, encrypt(bad, 2)) // an encrypted volume is written to
	if next := l.snapshot(t); next.HeldBy != "" || !next.LKG {
		t.Errorf("the night after: held by %q, %+v", next.HeldBy, next.Snapshot.Signs.Last)
	}
	l.mustLeaveNothing(t)
}

func TestALostCatalogForgetsNoHold(t *testing.T) {
	t.Parallel()
	l, disk := filled(t, Healthy)
	good := l.snapshot(t)
	l.write(t, encrypt(disk, 1))
	held := l.snapshot(t)
	lose := func() {
		t.Helper()
		l.Crash()
		for _, f := range l.CatalogFiles() {
			if err := os.Remove(f); err != nil {
				t.Fatal(err)
			}
		}
		l.Open()
		if op := l.Finish(l.AdoptStore(ctx)); op.State != api.OperationSucceeded {
			t.Fatal(op.Error)
		}
	}
	lose()
	rec, err := l.Record(ctx, held.Snapshot.ID)
	if err != nil || rec.HeldBy != held.Snapshot.ID || l.lkg(t) != good.Snapshot.ID || len(l.openTickets(t)) != 1 {
		t.Fatalf("adopted: held by %q, last-known-good %s, tickets %+v, %v", rec.HeldBy, l.lkg(t), l.openTickets(t), err)
	}
	l.rule(t, held.Snapshot.ID, true)
	lose()
	rec, err = l.Record(ctx, held.Snapshot.ID)
	if err != nil || rec.HeldBy != "" || rec.Ruling == nil || rec.Ruling.By != "ann" || l.lkg(t) != held.Snapshot.ID {
		t.Errorf("adopted again: held by %q, %+v, last-known-good %s, %v", rec.HeldBy, rec.Ruling, l.lkg(t), err)
	}
}

func TestRetentionKeepsTheEvidence(t *testing.T) {
	long(t)
	t.Parallel()
	l, disk := filled(t, Healthy)
	keep := 1
	if _, err := l.UpdateServer(ctx, "shop", api.ServerChange{KeepLast: &keep}); err != nil {
		t.Fatal(err)
	}
	good := l.snapshot(t)
	bad := encrypt(disk, 1)
	l.write(t, bad)
	held := l.snapshot(t)
	var between dr.Record
	for n := range 3 {
		l.write(t, day(bad, n))
		if rec := l.snapshot(t); n == 0 {
			between = rec
		}
	}
	for id, want := range map[string]bool{good.Snapshot.ID: false, held.Snapshot.ID: false, between.Snapshot.ID: true} {
		if rec, err := l.Record(ctx, id); err != nil || (rec.State == dr.Expired) != want {
			t.Errorf("%s is %s, %v", id, rec.State, err)
		}
	}
}

func TestAServerOfWhichSignsAreOffIsPromoted(t *testing.T) {
	long(t)
	t.Parallel()
	l, disk := filled(t, Healthy)
	off := dr.SignsOff
	if _, err := l.UpdateServer(ctx, "shop", api.ServerChange{Signs: &off}); err != nil {
		t.Fatal(err)
	}
	wrong := dr.SignLevel("loud")
	if _, err := l.UpdateServer(ctx, "shop", api.ServerChange{Signs: &wrong}); api.KindOf(err) != api.Invalid {
		t.Errorf("a level that there is not: %v", err)
	}
	l.snapshot(t)
	l.write(t, encrypt(disk, 1))
	if rec := l.snapshot(t); rec.HeldBy != "" || !rec.LKG || rec.Snapshot.Signs.Last.Blocks.Struck == 0 {
		t.Errorf("held by %q, %+v", rec.HeldBy, rec.Snapshot.Signs.Last)
	}
}

// A criminal with root may change the server's disks, so that the next snapshot is a full one.
func TestAFullSnapshotIsComparedAllTheSame(t *testing.T) {
	long(t)
	t.Parallel()
	l, disk := filled(t, Healthy)
	good := l.snapshot(t)
	l.write(t, append(encrypt(disk, 1), make([]byte, 4<<20)...)) // larger
	rec := l.snapshot(t)
	if rec.Snapshot.Pass.Kind != dr.PassFull || rec.HeldBy == "" || l.lkg(t) != good.Snapshot.ID {
		t.Errorf("%s, held by %q, %+v", rec.Snapshot.Pass.Kind, rec.HeldBy, rec.Snapshot.Signs)
	}
}

// Whatever the process dies in, the ruling is carried out once.
func TestARulingOutlivesTheProcess(t *testing.T) {
	t.Parallel()
	l, disk := filled(t, Healthy)
	l.snapshot(t)
	l.write(t, encrypt(disk, 1))
	held := l.snapshot(t)
	dead := make(chan struct{})
	var once atomic.Bool
	l.Fault = func(ctx context.Context, at string) error {
		if at != "after keep deltas" || !once.CompareAndSwap(false, true) {
			return nil
		}
		go func() { l.Crash(); close(dead) }()
		<-ctx.Done()
		return ctx.Err()
	}
	op, err := l.Rule(ctx, held.Snapshot.ID, api.RuleRequest{Accept: true, By: "ann", Reason: "I looked"})
	if err != nil {
		t.Fatal(err)
	}
	op = l.finishOverCrash(t, op, dead)
	if !once.Load() {
		t.Fatal("the process never died")
	}
	kept, err := l.Store.LKG(ctx)
	if err != nil || op.State != api.OperationSucceeded || l.lkg(t) != held.Snapshot.ID || kept[held.Snapshot.ServerID] != held.Snapshot.ID {
		t.Errorf("%s: last-known-good %s, in the store %v, %v", op.Error, l.lkg(t), kept, err)
	}
	l.mustLeaveNothing(t)
}

// office is a lab in which a live server is protected whose data is documents.
func office(t *testing.T) *Lab {
	t.Helper()
	l := liveShop(t)
	level := dr.SignsHigh // there are few files
	if _, err := l.UpdateServer(ctx, "shop", api.ServerChange{Signs: &level}); err != nil {
		t.Fatal(err)
	}
	l.documents(t, func(_ int, text []byte) []byte { return text })
	return l
}

func (l *Lab) documents(t *testing.T, make func(i int, text []byte) []byte) {
	t.Helper()
	for i := range 160 {
		text := []byte(strings.Repeat(fmt.Sprintf("the order of customer %d came in and was sent\n", i), 100))
		l.put(t, "web", fmt.Sprintf("srv/docs/%d.txt", i), string(make(i, text)))
	}
}

func chance(i int, text []byte) []byte {
	_, _ = rand.NewChaCha8([32]byte{byte(i), 9}).Read(text) // never fails
	return text
}

func TestDataThatWasEncryptedWaitsForAPerson(t *testing.T) {
	t.Parallel()
	l := office(t)
	l.snapshot(t)
	l.put(t, "web", "srv/docs/new.txt", "an order came in")
	good := l.data(t, "shop")
	if good.HeldBy != "" || !good.LKG || good.Snapshot.Signs.Last.Blocks.Changed != 1 || good.Snapshot.Signs.Files != 162 {
		t.Fatalf("an ordinary day: held by %q, %+v", good.HeldBy, good.Snapshot.Signs)
	}
	l.documents(t, chance)
	held := l.data(t, "shop")
	if held.State != dr.Verified || held.HeldBy != held.Snapshot.ID || l.lkg(t) != good.Snapshot.ID {
		t.Fatalf("encrypted: %s, held by %q, last-known-good %s, %+v", held.State, held.HeldBy, l.lkg(t), held.Snapshot.Signs)
	}
	if tickets := l.openTickets(t); len(tickets) != 1 || tickets[0].Problem != dr.ProblemTampering || tickets[0].Snapshot != held.Snapshot.ID || !strings.Contains(tickets[0].Detail, "became random") {
		t.Fatalf("tickets %+v, want one", tickets)
	}
	// Disks that show nothing and the data that goes onto them wait as well.
	quiet := l.snapshot(t)
	image, err := l.Record(ctx, quiet.Snapshot.Image)
	if err != nil || quiet.HeldBy != held.Snapshot.ID || image.HeldBy != held.Snapshot.ID || quiet.Snapshot.Suspicious() || l.lkg(t) != good.Snapshot.ID {
		t.Errorf("a quiet night after it: held by %q, its image by %q, %v", quiet.HeldBy, image.HeldBy, err)
	}
	if op := l.rule(t, held.Snapshot.ID, true); op.State != api.OperationSucceeded || l.lkg(t) != quiet.Snapshot.ID || len(l.openTickets(t)) != 0 {
		t.Errorf("accepted: %s, last-known-good %s, tickets %+v", op.Error, l.lkg(t), l.openTickets(t))
	}
	l.put(t, "web", "srv/docs/new.txt", "another order came in")
	if next := l.data(t, "shop"); next.HeldBy != "" || !next.LKG {
		t.Errorf("a day after it: held by %q, %+v", next.HeldBy, next.Snapshot.Signs)
	}
	l.mustLeaveNothing(t)
}

func TestDataThatIsBroughtBackIsPromoted(t *testing.T) {
	t.Parallel()
	l := office(t)
	good := l.snapshot(t)
	l.documents(t, chance)
	held := l.data(t, "shop")
	if held.HeldBy != held.Snapshot.ID || l.lkg(t) != good.Snapshot.ID {
		t.Fatalf("encrypted: held by %q, %+v", held.HeldBy, held.Snapshot.Signs)
	}
	if op := l.rule(t, held.Snapshot.ID, false); op.State != api.OperationSucceeded {
		t.Errorf("refused: %s", op.Error)
	}
	image := l.snapshot(t) // its disks show no damage, and never did
	if image.HeldBy != held.Snapshot.ID {
		t.Errorf("the next night is held by %q", image.HeldBy)
	}
	l.documents(t, func(_ int, text []byte) []byte { return text })
	back := l.data(t, "shop")
	if back.HeldBy != "" || !back.LKG || len(l.openTickets(t)) != 0 || back.Snapshot.Signs.Trusted == nil || back.Snapshot.Signs.Trusted.Against != good.Snapshot.ID {
		t.Errorf("brought back: held by %q, %+v, tickets %+v", back.HeldBy, back.Snapshot.Signs.Trusted, l.openTickets(t))
	}
	l.mustLeaveNothing(t)
}
