package lab

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/musterdr/muster/internal/api"
	"github.com/musterdr/muster/internal/dr"
	"github.com/musterdr/muster/internal/vm"
)

// written is what an invoked machine writes in these tests, into its disk and into what its firmware remembers.
var written = map[string][]byte{"live-0.qcow2": bytes.Repeat([]byte("orders of the day\n"), 10_000), filepath.Join("machine", vm.NVRAMFile): []byte("boot this first")}

func (n *Node) live(invocation, file string) string {
	return filepath.Join(n.dir(), "live", invocation, file)
}

// serving has the server invoked and its machine write something.
func (l *Lab) serving(t *testing.T, p *patient) dr.Invocation {
	t.Helper()
	inv := l.invoked(t, p)
	for file, data := range written {
		if err := os.WriteFile(l.Nodes[inv.Silo].live(inv.ID, file), data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return inv
}

// runsOn requires that the machine runs on one silo, with all that it wrote, and that nothing of it is anywhere else.
func (l *Lab) runsOn(t *testing.T, silo string) {
	t.Helper()
	inv, err := l.Invocation(ctx, "shop")
	if err != nil || inv.State != dr.Running || inv.Silo != silo || inv.Failure != "" {
		t.Fatalf("it is not on %s: %+v, %v", silo, inv, err)
	}
	if n := len(l.Nodes[silo].machines(t)); n != 1 {
		t.Errorf("%d machines on %s", n, silo)
	}
	for file, data := range written {
		if got, err := os.ReadFile(l.Nodes[silo].live(inv.ID, file)); err != nil || !bytes.Equal(got, data) {
			t.Errorf("%s has %d bytes, not the %d that were written: %v", file, len(got), len(data), err)
		}
	}
	until(t, "the other silo has nothing of it", func() bool { return len(l.Nodes[other(silo)].Left()) == 0 })
	until(t, "no room is held", func() bool {
		leases, err := l.Master.Catalog.Leases(ctx)
		return err == nil && len(leases) == 1 && leases[0].Silo == silo && leases[0].Work.ID == inv.ID
	})
	kept, err := l.Master.Store.Kept(ctx, inv.SnapshotID)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range kept {
		if strings.HasPrefix(f.Name, api.KeptPrefix(inv.ID)) {
			t.Errorf("%s is still in the store", f.Name)
		}
	}
	if open := l.openTickets(t); len(open) > 0 {
		t.Errorf("tickets %+v", open)
	}
}

// endsOn requires that the machine runs on one silo, ends it, and requires that nothing is left anywhere.
func (l *Lab) endsOn(t *testing.T, silo string) {
	t.Helper()
	l.runsOn(t, silo)
	l.Finish(l.EndInvocation(ctx, "shop", false))
	l.clean(t)
}

var ann = api.MoveRequest{By: "ann", Reason: "new disks"}

func TestAnInvokedMachineIsMovedWithAllThatItWrote(t *testing.T) {
	t.Parallel()
	l, p := farm(t, "a", "b")
	inv := l.serving(t, p)
	if _, err := l.DrainSilo(ctx, inv.Silo, api.DrainRequest{Drain: true}); err != nil {
		t.Fatal(err)
	}
	if op := l.Finish(l.MoveInvocation(ctx, "shop", ann)); op.State != api.OperationSucceeded {
		t.Fatalf("%s: %s", op.State, op.Error)
	}
	l.runsOn(t, other(inv.Silo))
	if _, err := l.DrainSilo(ctx, inv.Silo, api.DrainRequest{}); err != nil {
		t.Fatal(err)
	}
	// And home again.
	back := ann
	back.To = inv.Silo
	if op := l.Finish(l.MoveInvocation(ctx, "shop", back)); op.State != api.OperationSucceeded {
		t.Fatalf("%s: %s", op.State, op.Error)
	}
	l.runsOn(t, inv.Silo)
	if n := l.count(t, "invocation.moved"); n != 2 {
		t.Errorf("it was told %d times", n)
	}
	now, err := l.Invocation(ctx, "shop")
	if err != nil || now.RTA != inv.RTA || !now.Served.Equal(*inv.Served) {
		t.Errorf("moving changed what was measured: %+v, %v", now, err)
	}
	l.Finish(l.EndInvocation(ctx, "shop", true))
	if inv, err = l.Invocation(ctx, inv.ID); err != nil {
		t.Fatal(err)
	}
	if got, err := os.ReadFile(filepath.Join(inv.KeptAt, "disk-0.qcow2")); err != nil || !bytes.Equal(got, written["live-0.qcow2"]) {
		t.Errorf("%d bytes were kept, %v", len(got), err)
	}
	l.clean(t)
}

func TestAMachineThatCannotGoThereRunsWhereItWas(t *testing.T) {
	t.Parallel()
	for _, at := range []string{"before hold", "before leave", "after leave", "before invoke", "after invoke"} {
		t.Run(at, func(t *testing.T) {
			if testing.Short() && at != "before invoke" {
				t.Skip("the race detector makes opening a store slow: one of these is enough for it")
			}
			t.Parallel()
			l, p := farm(t, "a", "b")
			inv := l.serving(t, p)
			var broken atomic.Int64
			l.Fault = func(_ context.Context, now string) error {
				if now == at && broken.Add(1) <= 3 { // the attempts of a step: what takes it back may work
					return errors.New("something broke")
				}
				return nil
			}
			op := l.Finish(l.MoveInvocation(ctx, "shop", ann))
			if op.State != api.OperationFailed || !strings.Contains(op.Error, "something broke") {
				t.Fatalf("%s: %s", op.State, op.Error)
			}
			if broken.Load() < 3 {
				t.Fatalf("it broke %d times", broken.Load())
			}
			l.runsOn(t, inv.Silo)
			if op = l.Finish(l.MoveInvocation(ctx, "shop", ann)); op.State != api.OperationSucceeded {
				t.Fatalf("tried again: %s: %s", op.State, op.Error)
			}
			l.endsOn(t, other(inv.Silo))
		})
	}
}

func TestAMoveIsFinishedByTheNextProcess(t *testing.T) {
	t.Parallel()
	for _, at := range []string{"after hold", "before leave", "after leave", "before invoke", "after invoke", "after check", "after end"} {
		t.Run(at, func(t *testing.T) {
			if testing.Short() && at != "after leave" {
				t.Skip("the race detector makes opening a store slow: one of these is enough for it")
			}
			t.Parallel()
			l, p := farm(t, "a", "b")
			inv := l.serving(t, p)
			dead := make(chan struct{})
			var once atomic.Bool
			l.Fault = func(ctx context.Context, now string) error {
				if now != at || !once.CompareAndSwap(false, true) {
					return nil
				}
				go func() {
					l.Crash()
					close(dead)
				}()
				<-ctx.Done()
				return ctx.Err()
			}
			op, err := l.MoveInvocation(ctx, "shop", ann)
			if err != nil {
				t.Fatal(err)
			}
			if op = l.finishOverCrash(t, op, dead); op.State != api.OperationSucceeded || !once.Load() {
				t.Fatalf("%s: %s (died: %t)", op.State, op.Error, once.Load())
			}
			if n := l.count(t, "invocation.moved"); n != 1 {
				t.Errorf("it was told %d times", n)
			}
			l.endsOn(t, other(inv.Silo))
		})
	}
}

func TestAMachineComesBackFromASiloThatDies(t *testing.T) {
	t.Parallel()
	l, p := farm(t, "a", "b")
	inv := l.serving(t, p)
	to := l.Nodes[other(inv.Silo)]
	l.Fault = func(_ context.Context, now string) error {
		if now == "after leave" {
			to.Kill()
		}
		return nil
	}
	if op := l.Finish(l.MoveInvocation(ctx, "shop", ann)); op.State != api.OperationFailed {
		t.Fatalf("%s: %s", op.State, op.Error)
	}
	l.Fault = nil
	to.Start()
	l.endsOn(t, inv.Silo)
}

func TestAMoveThatIsCancelledLeavesTheMachineWhereItWas(t *testing.T) {
	t.Parallel()
	l, p := farm(t, "a", "b")
	inv := l.serving(t, p)
	left := make(chan struct{})
	l.Fault = func(ctx context.Context, now string) error {
		if now == "after leave" {
			close(left)
			<-ctx.Done()
			return ctx.Err()
		}
		return nil
	}
	op, err := l.MoveInvocation(ctx, "shop", ann)
	if err != nil {
		t.Fatal(err)
	}
	<-left
	if _, err := l.EndInvocation(ctx, "shop", false); api.KindOf(err) != api.Conflict {
		t.Errorf("it is ended while it is moved: %v", err)
	}
	if err := l.CancelOperation(ctx, op.ID); err != nil {
		t.Fatal(err)
	}
	if op = l.Finish(op, nil); op.State != api.OperationCancelled {
		t.Fatalf("%s: %s", op.State, op.Error)
	}
	l.endsOn(t, inv.Silo)
}

func TestAMachineIsMovedOnlyWhereItCanGo(t *testing.T) {
	t.Parallel()
	l, p := farm(t, "a", "b")
	inv := l.serving(t, p)
	away := other(inv.Silo)
	for _, try := range []struct {
		request api.MoveRequest
		want    api.Kind
	}{
		{api.MoveRequest{By: "ann", To: "nowhere"}, api.NotFound},
		{api.MoveRequest{By: "ann", To: inv.Silo}, api.Conflict},
		{api.MoveRequest{}, api.Invalid},
		{api.MoveRequest{By: "ann", Reason: strings.Repeat("x", dr.MaxReason)}, api.Invalid},
	} {
		if _, err := l.MoveInvocation(ctx, "shop", try.request); api.KindOf(err) != try.want {
			t.Errorf("%.60v: %v", try.request, err)
		}
	}
	if _, err := l.DrainSilo(ctx, away, api.DrainRequest{Drain: true}); err != nil {
		t.Fatal(err)
	}
	for _, to := range []string{"", away} {
		if _, err := l.MoveInvocation(ctx, "shop", api.MoveRequest{By: "ann", To: to}); api.KindOf(err) != api.Refused {
			t.Errorf("to %q though it takes no work: %v", to, err)
		}
	}
	l.runsOn(t, inv.Silo)
	l.Finish(l.EndInvocation(ctx, "shop", false))
	if _, err := l.MoveInvocation(ctx, inv.ID, ann); api.KindOf(err) != api.Conflict {
		t.Errorf("it has ended: %v", err)
	}
}
