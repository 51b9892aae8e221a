package lab

import (
	"bytes"
	"context"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
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

var ctx = context.Background()

// protectedShop is a lab in which a server with one small disk is protected.
func protectedShop(t *testing.T, guest func(vm.Spec) sim.Guest) *Lab {
	t.Helper()
	l := New(t, guest)
	writeDisk(t, l, 1)
	_, err := l.AddServer(ctx, dr.Server{Name: "shop", Source: dr.Source{Disks: []string{l.path("shop.raw")}}, Schedule: dr.Schedule{Every: 24 * time.Hour},
		Checks: []dr.Check{{Name: "page", Kind: dr.CheckHTTP, URL: "http://127.0.0.1/"}}})
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// writeDisk gives the server's disk the content of one day.
func writeDisk(t *testing.T, l *Lab, day uint64) {
	t.Helper()
	data := make([]byte, 1<<20)
	rng := rand.New(rand.NewPCG(1, 1))
	for i := range data[:768<<10] {
		data[i] = byte(rng.Uint32())
	}
	rng = rand.New(rand.NewPCG(2, day))
	for i := range data[:128<<10] {
		data[i] = byte(rng.Uint32())
	}
	if err := os.WriteFile(l.path("shop.raw"), data, 0o600); err != nil {
		t.Fatal(err)
	}
}

func (l *Lab) snapshot(t *testing.T) dr.Record {
	t.Helper()
	op := l.Finish(l.Snapshot(ctx, "shop"))
	if op.State != api.OperationSucceeded {
		t.Fatalf("snapshot %s: %s", op.State, op.Error)
	}
	rec, err := l.Record(ctx, op.Subject)
	if err != nil {
		t.Fatal(err)
	}
	return rec
}

func (l *Lab) lkg(t *testing.T) string {
	t.Helper()
	s, err := l.Server(ctx, "shop")
	if err != nil {
		t.Fatal(err)
	}
	if s.LKG == nil {
		return ""
	}
	return s.LKG.Snapshot.ID
}

func (l *Lab) openTickets(t *testing.T) []dr.Ticket {
	t.Helper()
	list, err := l.Tickets(ctx, false)
	if err != nil {
		t.Fatal(err)
	}
	return list
}

func (l *Lab) mustLeaveNothing(t *testing.T) {
	t.Helper()
	if left := l.Left(); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

func TestASnapshotThatPassesBecomesLastKnownGood(t *testing.T) {
	t.Parallel()
	l := protectedShop(t, Healthy)
	first := l.snapshot(t)
	if !first.LKG || first.State != dr.Verified || first.Verdict.Outcome != dr.Pass {
		t.Fatalf("first snapshot: %s, LKG %v, %+v", first.State, first.LKG, first.Verdict)
	}
	writeDisk(t, l, 2)
	second := l.snapshot(t)
	if second.Snapshot.Parent != first.Snapshot.ID || l.lkg(t) != second.Snapshot.ID {
		t.Errorf("parent %s, LKG %s, want %s then %s", second.Snapshot.Parent, l.lkg(t), first.Snapshot.ID, second.Snapshot.ID)
	}
	if n := second.Snapshot.Stats.New; n > 256<<10 {
		t.Errorf("an increment of one block kept %d new bytes", n)
	}
	moves, err := l.Promotions(ctx, "shop")
	if err != nil || len(moves) != 2 {
		t.Errorf("promotions %v, %v", moves, err)
	}
	l.mustLeaveNothing(t)
}

func TestAnImageThatFailsOpensOneTicketAndLastKnownGoodStays(t *testing.T) {
	t.Parallel()
	var broken atomic.Bool
	l := protectedShop(t, func(spec vm.Spec) sim.Guest {
		if broken.Load() {
			return Panicking(spec)
		}
		return Healthy(spec)
	})
	good := l.snapshot(t)
	broken.Store(true)
	for night := range 3 {
		writeDisk(t, l, uint64(night+2))
		bad := l.snapshot(t)
		if bad.State != dr.Rejected || bad.Verdict.Code != dr.CodePanic {
			t.Fatalf("night %d: %s, %s (%s)", night, bad.State, bad.Verdict.Code, bad.Verdict.Summary)
		}
	}
	if l.lkg(t) != good.Snapshot.ID {
		t.Errorf("last-known-good is %s, want %s", l.lkg(t), good.Snapshot.ID)
	}
	if open := l.openTickets(t); len(open) != 1 || open[0].Count != 3 {
		t.Errorf("tickets %+v, want one seen three times", open)
	}
	broken.Store(false)
	l.snapshot(t)
	if open := l.openTickets(t); len(open) != 0 {
		t.Errorf("a passing test left tickets open: %+v", open)
	}
	l.mustLeaveNothing(t)
}

func TestAnInvokedMachineOutlivesTheProcessAndEndsWithNothingLeft(t *testing.T) {
	t.Parallel()
	l := protectedShop(t, Healthy)
	rec := l.snapshot(t)
	op := l.Finish(l.Invoke(ctx, api.InvokeRequest{Server: "shop", By: "ann", Reason: "fire"}))
	inv, err := l.Invocation(ctx, "shop")
	if err != nil || inv.State != dr.Running || inv.Failure != "" || inv.SnapshotID != rec.Snapshot.ID || inv.Served == nil {
		t.Fatalf("%s: %+v, %v", op.Error, inv, err)
	}
	if _, err := l.Invoke(ctx, api.InvokeRequest{Server: "shop"}); api.KindOf(err) != api.Conflict {
		t.Errorf("invoked twice: %v", err)
	}
	if err := l.RemoveServer(ctx, "shop"); api.KindOf(err) != api.Conflict {
		t.Errorf("an invoked server was removed: %v", err)
	}
	l.Reopen()
	inv, err = l.Invocation(ctx, "shop")
	if err != nil || inv.State != dr.Running {
		t.Fatalf("after a restart: %+v, %v", inv, err)
	}
	if open := l.openTickets(t); len(open) != 0 {
		t.Errorf("tickets after a restart: %+v", open)
	}
	op = l.Finish(l.EndInvocation(ctx, "shop", false))
	if inv, err = l.Invocation(ctx, inv.ID); err != nil || inv.State != dr.Ended {
		t.Errorf("%s: %+v, %v", op.Error, inv, err)
	}
	l.mustLeaveNothing(t)
}

func TestAnInvokedMachineThatDiesIsToldOnce(t *testing.T) {
	t.Parallel()
	l := protectedShop(t, Healthy)
	l.snapshot(t)
	l.Finish(l.Invoke(ctx, api.InvokeRequest{Server: "shop"}))
	if err := l.Host.Close(); err != nil {
		t.Fatal(err)
	}
	l.Master.Wake(ctx)
	l.Master.Wake(ctx)
	open := l.openTickets(t)
	if len(open) != 1 || open[0].Problem != dr.ProblemStopped || open[0].Count != 1 {
		t.Errorf("tickets %+v", open)
	}
	l.Finish(l.EndInvocation(ctx, "shop", false))
	if open := l.openTickets(t); len(open) != 0 {
		t.Errorf("tickets after the end: %+v", open)
	}
	l.mustLeaveNothing(t)
}

func TestNothingIsInvokedThatHasNotPassed(t *testing.T) {
	t.Parallel()
	l := protectedShop(t, Panicking)
	l.snapshot(t)
	if _, err := l.Invoke(ctx, api.InvokeRequest{Server: "shop"}); api.KindOf(err) != api.Refused {
		t.Errorf("error %v, want a refusal", err)
	}
	l.mustLeaveNothing(t)
}

// TestAProcessThatDiesAtAnyCallIsFinishedByTheNext kills the process before and after every call of an appliance or a
// silo, and lets another one finish.
func TestAProcessThatDiesAtAnyCallIsFinishedByTheNext(t *testing.T) {
	t.Parallel()
	for _, call := range Calls {
		for _, when := range []string{"before ", "after "} {
			t.Run(when+call, func(t *testing.T) {
				if testing.Short() && when+call != "after pre-recover" && when+call != "after invoke" {
					t.Skip("the race detector makes opening a store slow: two of these are enough for it")
				}
				t.Parallel()
				l := protectedShop(t, Healthy)
				dead := make(chan struct{})
				var once atomic.Bool
				var asking sync.Mutex // who asked has the answer before the process dies: that it may be lost is another promise
				l.Fault = func(ctx context.Context, at string) error {
					if at != when+call || !once.CompareAndSwap(false, true) {
						return nil
					}
					go func() {
						asking.Lock()
						defer asking.Unlock()
						l.Crash()
						close(dead)
					}()
					<-ctx.Done() // the process that called is no more
					return ctx.Err()
				}
				ops := []func() (api.Operation, error){
					func() (api.Operation, error) { return l.Snapshot(ctx, "shop") },
					func() (api.Operation, error) { return l.Invoke(ctx, api.InvokeRequest{Server: "shop"}) },
					func() (api.Operation, error) { return l.EndInvocation(ctx, "shop", false) },
				}
				for _, start := range ops {
					asking.Lock()
					op, err := start()
					asking.Unlock()
					if err != nil {
						t.Fatal(err)
					}
					op = l.finishOverCrash(t, op, dead)
					if op.State != api.OperationSucceeded {
						t.Fatalf("%s %s: %s", op.Kind, op.State, op.Error)
					}
				}
				if !once.Load() {
					t.Fatal("the process never died: the call was not made")
				}
				records, err := l.Snapshots(ctx, "shop")
				if err != nil || len(records) != 1 || !records[0].LKG || records[0].State != dr.Verified {
					t.Errorf("snapshots %+v, %v; want one, verified and last-known-good", records, err)
				}
				if open := l.openTickets(t); len(open) != 0 {
					t.Errorf("tickets %+v", open)
				}
				l.mustLeaveNothing(t)
			})
		}
	}
}

// finishOverCrash follows an operation; when the process dies, it starts another and goes on.
func (l *Lab) finishOverCrash(t *testing.T, op api.Operation, dead chan struct{}) api.Operation {
	t.Helper()
	for deadline := time.Now().Add(patience); !op.State.Finished(); {
		if time.Now().After(deadline) {
			t.Fatalf("%s has not finished: %+v", op.ID, op)
		}
		select {
		case <-dead:
			if l.stop == nil {
				l.Open()
			}
		default:
		}
		if next, err := l.Operation(ctx, op.ID, op.Seen, 200*time.Millisecond); err == nil {
			op = next
		} else {
			time.Sleep(5 * time.Millisecond) // between two processes nobody answers
		}
	}
	return op
}

func TestALostCatalogIsRebuiltFromTheStoreAlone(t *testing.T) {
	t.Parallel()
	l := protectedShop(t, Healthy)
	l.snapshot(t)
	writeDisk(t, l, 2)
	want := l.snapshot(t)
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
	if list, err := l.Servers(ctx, "", 0); err != nil || len(list) != 0 {
		t.Fatalf("servers of an empty catalog: %v, %v", list, err)
	}
	if op := l.Finish(l.AdoptStore(ctx)); op.State != api.OperationSucceeded {
		t.Fatalf("adopt %s: %s", op.State, op.Error)
	}
	if got := l.lkg(t); got != want.Snapshot.ID {
		t.Errorf("last-known-good %q, want %q", got, want.Snapshot.ID)
	}
	s, err := l.Server(ctx, "shop")
	if err != nil || len(s.Server.Checks) != 1 || s.Server.Source.Disks[0] != l.path("shop.raw") {
		t.Errorf("server %+v, %v", s.Server, err)
	}
	l.Finish(l.Invoke(ctx, api.InvokeRequest{Server: "shop"}))
	if inv, err := l.Invocation(ctx, "shop"); err != nil || inv.State != dr.Running {
		t.Errorf("invocation from an adopted store: %+v, %v", inv, err)
	}
	l.Finish(l.EndInvocation(ctx, "shop", false))
	l.mustLeaveNothing(t)
}

func TestAFlippedByteInTheStoreIsNamedAndNothingIsLost(t *testing.T) {
	t.Parallel()
	l := protectedShop(t, Healthy)
	good := l.snapshot(t)
	l.Crash()
	flipped := 0
	err := filepath.Walk(l.StoreFolder(), func(path string, info os.FileInfo, err error) error {
		if err != nil || info.IsDir() || info.Size() < 100<<10 {
			return err
		}
		raw, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		raw[len(raw)/2] ^= 1
		flipped++
		return os.WriteFile(path, raw, info.Mode())
	})
	if err != nil || flipped == 0 {
		t.Fatalf("flipped %d bytes, %v", flipped, err)
	}
	l.Open()
	op := l.Finish(l.VerifyStore(ctx, ""))
	if op.State != api.OperationFailed || !bytes.Contains(op.Result, []byte(`"offset"`)) {
		t.Errorf("verify %s: %s %s", op.State, op.Error, op.Result)
	}
	open := l.openTickets(t)
	if len(open) != 1 || open[0].Problem != dr.ProblemStore || !strings.Contains(open[0].Detail, "disk 0") {
		t.Errorf("tickets %+v", open)
	}
	if l.lkg(t) != good.Snapshot.ID {
		t.Error("last-known-good moved")
	}
}

func TestTwoSnapshotsOfOneServerWaitForEachOther(t *testing.T) {
	t.Parallel()
	l := protectedShop(t, Healthy)
	a, err := l.Snapshot(ctx, "shop")
	if err != nil {
		t.Fatal(err)
	}
	b, err := l.Snapshot(ctx, "shop")
	first, second := l.Finish(a, nil), l.Finish(b, err)
	if first.State != api.OperationSucceeded || second.State != api.OperationSucceeded {
		t.Fatalf("%s %s, %s %s", first.State, first.Error, second.State, second.Error)
	}
	if second.Finished.Before(*first.Finished) {
		t.Error("the second overtook the first")
	}
	list, err := l.Snapshots(ctx, "shop")
	if err != nil || len(list) != 2 || list[0].Snapshot.Parent != list[1].Snapshot.ID {
		t.Errorf("snapshots %+v, %v", list, err)
	}
}

func TestATestThatIsCancelledLeavesNothing(t *testing.T) {
	t.Parallel()
	booted := make(chan struct{}, 1)
	l := protectedShop(t, func(vm.Spec) sim.Guest {
		return sim.GuestFunc(func(ctx context.Context, _ *sim.Computer) sim.End {
			booted <- struct{}{}
			<-ctx.Done()
			return sim.PowerOff
		})
	})
	op, err := l.Snapshot(ctx, "shop")
	if err != nil {
		t.Fatal(err)
	}
	<-booted
	if err := l.CancelOperation(ctx, op.ID); err != nil {
		t.Fatal(err)
	}
	if op = l.Finish(op, nil); op.State != api.OperationCancelled {
		t.Errorf("%s: %s", op.State, op.Error)
	}
	if open := l.openTickets(t); len(open) != 0 {
		t.Errorf("cancelled work opened tickets: %+v", open)
	}
	l.mustLeaveNothing(t)
}

func TestSnapshotsAreTakenWhenDueAlsoAfterTheClockWasSteppedBack(t *testing.T) {
	t.Parallel()
	l := protectedShop(t, Healthy)
	wake := func(want int) {
		t.Helper()
		l.Master.Wake(ctx)
		l.settled(t)
		list, err := l.Snapshots(ctx, "shop")
		if err != nil || len(list) != want {
			t.Fatalf("%d snapshots, want %d; %v", len(list), want, err)
		}
	}
	wake(1) // never captured: at once
	wake(1) // not due
	l.Clock.Turn(25 * time.Hour)
	writeDisk(t, l, 2)
	wake(2)
	l.Clock.Turn(-48 * time.Hour)
	writeDisk(t, l, 3)
	wake(3) // a last snapshot that lies in the future must not stop the nights
}

func TestATestThatDidNotRunRaisesATicketAndIsHeld(t *testing.T) {
	t.Parallel()
	l := protectedShop(t, Healthy)
	l.Fault = func(_ context.Context, at string) error {
		if at == "before pre-recover" {
			return os.ErrDeadlineExceeded
		}
		return nil
	}
	op := l.Finish(l.Snapshot(ctx, "shop"))
	if op.State != api.OperationFailed {
		t.Fatalf("operation %s", op.State)
	}
	l.Clock.Turn(3 * time.Hour)
	for range 3 { // one that cannot be held is not begun anew at every tick
		l.Master.Wake(ctx)
		l.settled(t)
		l.Clock.Turn(time.Minute)
	}
	if ops, err := l.Operations(ctx); err != nil || len(ops) != 2 { // the snapshot, and one test
		t.Errorf("%d operations, %v", len(ops), err)
	}
	l.Fault = nil
	l.Clock.Turn(5 * time.Minute)
	l.Master.Wake(ctx)
	found := false
	for _, ticket := range l.openTickets(t) {
		found = found || ticket.Problem == dr.ProblemTestMissing
	}
	if !found {
		t.Errorf("no ticket says that a test is missing: %+v", l.openTickets(t))
	}
	l.settled(t)
	if l.lkg(t) == "" {
		t.Error("the missing test was not held")
	}
	if open := l.openTickets(t); len(open) != 0 {
		t.Errorf("tickets after it passed: %+v", open)
	}
}

func TestATestForWhichThereWasNoRoomIsHeldAgainByItself(t *testing.T) {
	t.Parallel()
	l := protectedShop(t, Healthy)
	hv := l.Host.Open()
	defer hv.Close()
	strangers, err := hv.Start(ctx, vm.Spec{Name: "vm-strangers", Owner: vm.Owner{Kind: "stranger", ID: "vm-strangers"}, Dir: l.Dir, Hardware: dr.Hardware{Memory: 64 << 10, CPUs: 1}}) // all that the host has
	if err != nil {
		t.Fatal(err)
	}
	l.Finish(l.Snapshot(ctx, "shop"))
	again := func(after time.Duration) {
		t.Helper()
		l.Clock.Turn(after)
		l.Master.Wake(ctx)
		l.settled(t)
	}
	outcomes := func(want ...dr.Outcome) {
		t.Helper()
		s, err := l.Server(ctx, "shop")
		if err != nil {
			t.Fatal(err)
		}
		verdicts, err := l.Master.Catalog.Verdicts(ctx, s.Server.ID, 10)
		if err != nil {
			t.Fatal(err)
		}
		var got []dr.Outcome
		for _, v := range verdicts {
			got = append(got, v.Outcome)
		}
		if !slices.Equal(got, want) {
			t.Errorf("verdicts %v, not %v", got, want)
		}
	}
	outcomes(dr.Inconclusive)
	if s, err := l.Server(ctx, "shop"); err != nil || s.Retest.IsZero() {
		t.Errorf("nobody is told that it is tested again: %+v, %v", s.Retest, err)
	}
	again(time.Minute)
	outcomes(dr.Inconclusive)
	again(10 * time.Minute)
	outcomes(dr.Inconclusive, dr.Inconclusive)
	if open := l.openTickets(t); len(open) != 1 || open[0].Problem != "test-inconclusive" {
		t.Errorf("tickets after two: %+v", open)
	}
	if err := strangers.Destroy(ctx); err != nil {
		t.Fatal(err)
	}
	l.Reopen()
	again(20 * time.Minute)
	outcomes(dr.Pass, dr.Inconclusive, dr.Inconclusive)
	if l.lkg(t) == "" {
		t.Error("it did not become last-known-good")
	}
	if open := l.openTickets(t); len(open) != 0 {
		t.Errorf("tickets after it passed: %+v", open)
	}
}

func TestASourceThatIsGoneOpensATicketAndKeepsNothing(t *testing.T) {
	t.Parallel()
	l := protectedShop(t, Healthy)
	good := l.snapshot(t)
	if err := os.Remove(l.path("shop.raw")); err != nil {
		t.Fatal(err)
	}
	if op := l.Finish(l.Snapshot(ctx, "shop")); op.State != api.OperationFailed || !strings.Contains(op.Error, "shop.raw") {
		t.Errorf("%s: %s", op.State, op.Error)
	}
	if open := l.openTickets(t); len(open) != 1 || open[0].Problem != dr.ProblemCapture {
		t.Errorf("tickets %+v", open)
	}
	if list, _ := l.Snapshots(ctx, "shop"); len(list) != 1 || l.lkg(t) != good.Snapshot.ID {
		t.Errorf("%d snapshots, last-known-good %s", len(list), l.lkg(t))
	}
}

func TestRetentionLetsOldSnapshotsGoButNeverLastKnownGood(t *testing.T) {
	t.Parallel()
	l := protectedShop(t, Healthy)
	keep := 2
	if _, err := l.UpdateServer(ctx, "shop", api.ServerChange{KeepLast: &keep}); err != nil {
		t.Fatal(err)
	}
	for day := range uint64(4) {
		writeDisk(t, l, day)
		l.Clock.Turn(time.Hour)
		l.snapshot(t)
	}
	list, err := l.Snapshots(ctx, "shop")
	if err != nil {
		t.Fatal(err)
	}
	var live []string
	for _, r := range list {
		if r.State != dr.Expired {
			live = append(live, r.Snapshot.ID)
		}
	}
	if len(live) != 2 || l.lkg(t) != live[0] {
		t.Errorf("%d snapshots are left, last-known-good %s", len(live), l.lkg(t))
	}
	if op := l.Finish(l.CollectStore(ctx, true)); op.State != api.OperationSucceeded {
		t.Errorf("collect %s: %s", op.State, op.Error)
	}
	if op := l.Finish(l.VerifyStore(ctx, "")); op.State != api.OperationSucceeded {
		t.Errorf("verify after collecting: %s: %s", op.State, op.Error)
	}
}

func TestErrorsKeepTheirKindOverTheWire(t *testing.T) {
	t.Parallel()
	l := protectedShop(t, Healthy)
	for name, c := range map[string]struct {
		err  error
		kind api.Kind
	}{
		"no such server":    {second(l.Server(ctx, "nobody")), api.NotFound},
		"no such snapshot":  {second(l.Record(ctx, "snap-20260101t000000-aaaaaaaa")), api.NotFound},
		"no such operation": {l.CancelOperation(ctx, "test.shop.none"), api.NotFound},
		"name taken":        {second(l.AddServer(ctx, dr.Server{Name: "shop", Source: dr.Source{Disks: []string{"/x"}}})), api.Conflict},
		"bad name":          {second(l.AddServer(ctx, dr.Server{Name: "Bad Name", Source: dr.Source{Disks: []string{"/x"}}})), api.Invalid},
		"no source":         {second(l.AddServer(ctx, dr.Server{Name: "empty"})), api.Invalid},
		"not invoked":       {second(l.Invocation(ctx, "shop")), api.NotFound},
		"no snapshot yet":   {second(l.Test(ctx, "shop", "")), api.NotFound},
	} {
		if c.err == nil || api.KindOf(c.err) != c.kind {
			t.Errorf("%s: kind %s (%v), want %s", name, api.KindOf(c.err), c.err, c.kind)
		}
	}
}

func second[T any](_ T, err error) error { return err }
