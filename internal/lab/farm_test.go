package lab

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/musterdr/muster/internal/api"
	"github.com/musterdr/muster/internal/dr"
	"github.com/musterdr/muster/internal/vm"
	"github.com/musterdr/muster/internal/vm/sim"
)

// patient is a guest that boots when it is let: each machine tells where it is, and waits.
type patient struct {
	lab  *Lab
	went chan string // where a machine was started

	mu   sync.Mutex
	free map[string]chan struct{} // by node: closed, its machines boot
}

func newPatient() *patient {
	return &patient{went: make(chan string, 100), free: map[string]chan struct{}{}}
}

func (p *patient) gate(node string) chan struct{} {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.free[node] == nil {
		p.free[node] = make(chan struct{})
	}
	return p.free[node]
}

// let lets the machines of a node boot.
func (p *patient) let(nodes ...string) {
	for _, node := range nodes {
		close(p.gate(node))
	}
}

func (p *patient) guest(spec vm.Spec) sim.Guest {
	return sim.GuestFunc(func(ctx context.Context, c *sim.Computer) sim.End {
		for name, n := range p.lab.Nodes {
			if !n.Has(spec) {
				continue
			}
			p.went <- name
			select {
			case <-p.gate(name):
			case <-ctx.Done():
				return sim.PowerOff
			}
		}
		return Healthy(spec).Run(ctx, c)
	})
}

// farm is a lab with silos elsewhere, in which a server is protected.
func farm(t *testing.T, silos ...string) (*Lab, *patient) {
	t.Helper()
	p := newPatient()
	l := New(t, p.guest, silos...)
	p.lab = l
	writeDisk(t, l, 1)
	_, err := l.AddServer(ctx, dr.Server{Name: "shop", Source: dr.Source{Disks: []string{l.path("shop.raw")}}, Schedule: dr.Schedule{Every: 24 * time.Hour},
		Checks: []dr.Check{{Name: "page", Kind: dr.CheckHTTP, URL: "http://127.0.0.1/"}}})
	if err != nil {
		t.Fatal(err)
	}
	return l, p
}

// begun starts a snapshot and waits until a machine of its test has been started: it says where.
func (l *Lab) begun(t *testing.T, p *patient) (api.Operation, string) {
	t.Helper()
	op, err := l.Snapshot(ctx, "shop")
	if err != nil {
		t.Fatal(err)
	}
	return op, await(t, p.went)
}

func await(t *testing.T, went <-chan string) string {
	t.Helper()
	select {
	case name := <-went:
		return name
	case <-time.After(patience):
		t.Fatal("no machine was started")
		return ""
	}
}

func other(name string) string { return map[string]string{"a": "b", "b": "a"}[name] }

// until waits for something that the master brings about by itself.
func until(t *testing.T, what string, is func() bool) {
	t.Helper()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for end := time.After(patience); !is(); {
		select {
		case <-tick.C:
		case <-end:
			t.Fatalf("waited in vain until %s", what)
		}
	}
}

// told says whether there is an event of each kind, and gives all kinds.
func (l *Lab) told(t *testing.T, kinds ...string) {
	t.Helper()
	all, err := l.Events(ctx, 0, 0, "")
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, e := range all {
		got = append(got, e.Kind)
	}
	for _, k := range kinds {
		if !slices.Contains(got, k) {
			t.Errorf("no event %s among %v", k, got)
		}
	}
}

func (l *Lab) count(t *testing.T, kind string) (n int) {
	t.Helper()
	all, err := l.Events(ctx, 0, 0, "")
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range all {
		if e.Kind == kind {
			n++
		}
	}
	return n
}

// passedOn checks that an operation went well and that there is one verdict, of that silo, and one promotion.
func (l *Lab) passedOn(t *testing.T, op api.Operation, silo string) {
	t.Helper()
	op = l.Finish(op, nil)
	rec, err := l.Record(ctx, op.Subject)
	if err != nil || op.State != api.OperationSucceeded || !rec.LKG || rec.Verdict.Silo != silo {
		t.Fatalf("%s (%s), verdict %+v, LKG %v, %v; want a PASS of silo %s", op.State, op.Error, rec.Verdict, rec.LKG, err, silo)
	}
	moves, err := l.Promotions(ctx, "shop")
	if n := l.count(t, "lkg.moved"); err != nil || len(moves) != 1 || n != 1 {
		t.Errorf("promotions %v, events %d, %v", moves, n, err)
	}
}

// clean waits until no silo has a lease or anything left.
func (l *Lab) clean(t *testing.T) {
	t.Helper()
	var left []string
	defer func() {
		if t.Failed() {
			t.Logf("left: %v", left)
		}
	}()
	until(t, "nothing is left", func() bool {
		left = l.Left()
		all, err := l.ListSilos(ctx)
		for _, s := range all {
			for _, lease := range s.Leases {
				left = append(left, "lease "+lease.Work.ID)
			}
		}
		return err == nil && len(left) == 0
	})
}

func (l *Lab) state(t *testing.T, silo string) dr.SiloState {
	t.Helper()
	s, err := l.ShowSilo(ctx, silo)
	if err != nil {
		t.Fatal(err)
	}
	return s.Silo.State
}

func TestTheTestOfASiloThatIsKilledIsHeldByAnother(t *testing.T) {
	t.Parallel()
	l, p := farm(t, "a", "b")
	op, first := l.begun(t, p)
	l.Nodes[first].Kill()
	p.let(other(first))
	if next := await(t, p.went); next != other(first) {
		t.Fatalf("the second machine is on %s", next)
	}
	l.passedOn(t, op, other(first))
	l.told(t, "silo.lost", "lease.taken")
	if n := l.count(t, "lease.taken"); n != 1 {
		t.Errorf("its work was taken %d times", n)
	}
	if left := l.Nodes[first].Left(); len(left) == 0 {
		t.Error("a silo that was killed tidied up: the test tests nothing")
	}
	l.Nodes[first].Start()
	until(t, "the silo is back", func() bool { return l.state(t, first) == dr.SiloActive })
	l.told(t, "silo.back", "silo.reaped")
	l.clean(t)
}

func TestASiloThatIsStartedAgainSoonLosesOnlyTime(t *testing.T) {
	t.Parallel()
	l, p := farm(t, "a")
	op, _ := l.begun(t, p)
	l.Nodes["a"].Kill()
	p.let("a")
	l.Nodes["a"].Start()
	l.passedOn(t, op, "a")
	if n := l.count(t, "silo.lost"); n != 0 {
		t.Errorf("it was taken for lost")
	}
	l.clean(t)
}

func TestASiloThatTheMasterDoesNotReachStopsItsTestBeforeAnotherBegins(t *testing.T) {
	t.Parallel()
	l, p := farm(t, "a", "b")
	op, first := l.begun(t, p)
	l.Nodes[first].Cut()
	p.let(other(first))
	await(t, p.went)
	if left := l.Nodes[first].Left(); len(left) > 0 {
		t.Errorf("while another silo holds the test, this one still has %v", left)
	}
	l.passedOn(t, op, other(first))
	l.Nodes[first].Join()
	until(t, "the silo is back", func() bool { return l.state(t, first) == dr.SiloActive })
	l.told(t, "silo.lost", "lease.taken", "silo.back")
	l.clean(t)
}

func TestWhatAZombieFindsCountsForNothing(t *testing.T) {
	t.Parallel()
	l, p := farm(t, "a", "b")
	op, first := l.begun(t, p)
	l.Nodes[first].StopClock() // it will not notice by itself how long it was away
	l.Nodes[first].Cut()
	p.let(other(first))
	await(t, p.went)
	l.passedOn(t, op, other(first))
	p.let(first) // it wakes, and its machine passes
	l.Nodes[first].Join()
	until(t, "the silo is back", func() bool { return l.state(t, first) == dr.SiloActive })
	l.clean(t)
	l.passedOn(t, op, other(first))
	if open := l.openTickets(t); len(open) > 0 {
		t.Errorf("tickets %+v", open)
	}
}

func TestTheMasterMayDieWhileASiloTests(t *testing.T) {
	t.Parallel()
	l, p := farm(t, "a")
	op, _ := l.begun(t, p)
	l.Crash()
	p.let("a")
	l.Open()
	l.passedOn(t, op, "a")
	l.clean(t)
}

func TestADrainingSiloFinishesAndTakesNothingNew(t *testing.T) {
	t.Parallel()
	l, p := farm(t, "a", "b")
	op, first := l.begun(t, p)
	s, err := l.DrainSilo(ctx, first, api.DrainRequest{Drain: true, Reason: "new disks"})
	if err != nil || s.Silo.State != dr.SiloDraining || len(s.Leases) != 1 || s.Leases[0].Work.Kind != dr.WorkTest {
		t.Fatalf("%+v, %v", s, err)
	}
	if err := l.RemoveSilo(ctx, first); api.KindOf(err) != api.Conflict {
		t.Errorf("removed with work: %v", err)
	}
	p.let("a", "b")
	l.passedOn(t, op, first)
	writeDisk(t, l, 2)
	op, next := l.begun(t, p)
	if next != other(first) {
		t.Errorf("a silo that drains was given work")
	}
	l.Finish(op, nil)
	if err := l.RemoveSilo(ctx, other(first)); api.KindOf(err) != api.Refused {
		t.Errorf("a silo that works was removed: %v", err)
	}
	if s, err = l.DrainSilo(ctx, first, api.DrainRequest{}); err != nil || s.Silo.State != dr.SiloActive {
		t.Errorf("resumed: %+v, %v", s, err)
	}
	l.told(t, "silo.draining", "silo.resumed")
	l.clean(t)
}

func TestLosingASiloLeavesAnInstantBoot(t *testing.T) {
	t.Parallel()
	l, p := farm(t, "a", "b")
	p.let("a", "b")
	op, first := l.begun(t, p)
	l.passedOn(t, op, first)
	if n := len(l.Nodes[other(first)].Deltas()); n != 0 {
		t.Fatalf("the other silo has %d deltas already", n)
	}
	l.Master.Wake(ctx)
	until(t, "both hold the deltas", func() bool {
		s, err := l.Server(ctx, "shop")
		return err == nil && slices.Equal(s.Holders, []string{"a", "b"})
	})
	if n := len(l.Nodes[other(first)].Deltas()); n != 1 {
		t.Errorf("the other silo has %d deltas", n)
	}
	until(t, "it is told", func() bool { return l.count(t, "deltas.held") == 1 })
	l.Nodes[first].Kill()
	l.Finish(l.Invoke(ctx, api.InvokeRequest{Server: "shop", By: "ann", Reason: "fire"}))
	if inv, err := l.Invocation(ctx, "shop"); err != nil || inv.State != dr.Running || inv.Silo != other(first) || inv.Failure != "" {
		t.Errorf("%+v, %v", inv, err)
	}
}

// invoked has the server run for real, and says where.
func (l *Lab) invoked(t *testing.T, p *patient) dr.Invocation {
	t.Helper()
	p.let("a", "b")
	l.snapshot(t)
	op := l.Finish(l.Invoke(ctx, api.InvokeRequest{Server: "shop", By: "ann", Reason: "fire"}))
	inv, err := l.Invocation(ctx, "shop")
	if err != nil || inv.State != dr.Running || inv.Silo == "" {
		t.Fatalf("%s: %+v, %v", op.Error, inv, err)
	}
	return inv
}

func (n *Node) machines(t *testing.T) (out []string) {
	t.Helper()
	for _, what := range n.Left() {
		if strings.Contains(what, "machine ") {
			out = append(out, what)
		}
	}
	return out
}

func TestAnInvokedMachineOutlivesTheMastersSight(t *testing.T) {
	t.Parallel()
	l, p := farm(t, "a", "b")
	inv := l.invoked(t, p)
	node := l.Nodes[inv.Silo]
	node.Cut()
	until(t, "the silo is lost", func() bool { return l.state(t, inv.Silo) == dr.SiloLost })
	until(t, "somebody is told", func() bool {
		open := l.openTickets(t)
		return len(open) == 1 && open[0].Problem == dr.ProblemSiloLost
	})
	if n := len(node.machines(t)); n != 1 {
		t.Errorf("there are %d machines of an invocation whose silo the master does not see", n)
	}
	if n := len(l.Nodes[other(inv.Silo)].machines(t)); n != 0 {
		t.Error("a second machine was started beside one that may be serving people")
	}
	if _, err := l.Invoke(ctx, api.InvokeRequest{Server: "shop", By: "ann", Reason: "fire"}); api.KindOf(err) != api.Conflict {
		t.Errorf("invoked twice: %v", err)
	}
	op := l.Finish(l.EndInvocation(ctx, "shop", false))
	if op.State != api.OperationFailed || !strings.Contains(op.Error, "--abandon") {
		t.Errorf("ending it %s: %s", op.State, op.Error)
	}
	node.Join()
	until(t, "nobody worries any more", func() bool { return len(l.openTickets(t)) == 0 })
	if n := len(node.machines(t)); n != 1 {
		t.Errorf("after that there are %d machines", n)
	}
	if op := l.Finish(l.EndInvocation(ctx, "shop", false)); op.State != api.OperationSucceeded {
		t.Errorf("ending it: %s", op.Error)
	}
	l.told(t, "silo.lost", "silo.back")
	l.clean(t)
}

func TestAMachineThatAPersonGaveUpIsStoppedWhenItsSiloIsBack(t *testing.T) {
	t.Parallel()
	l, p := farm(t, "a", "b")
	inv := l.invoked(t, p)
	why := api.AbandonRequest{By: "ann", Reason: "its port is closed"}
	if _, err := l.AbandonInvocation(ctx, "shop", why); api.KindOf(err) != api.Refused {
		t.Errorf("given up though its silo is there: %v", err)
	}
	node := l.Nodes[inv.Silo]
	node.Kill()
	until(t, "the silo is lost", func() bool { return l.state(t, inv.Silo) == dr.SiloLost })
	if _, err := l.AbandonInvocation(ctx, "shop", api.AbandonRequest{By: "ann"}); api.KindOf(err) != api.Invalid {
		t.Errorf("given up without a reason: %v", err)
	}
	if got, err := l.AbandonInvocation(ctx, "shop", why); err != nil || got.State != dr.Ended || !strings.Contains(got.Failure, why.Reason) {
		t.Fatalf("%+v, %v", got, err)
	}
	op := l.Finish(l.Invoke(ctx, api.InvokeRequest{Server: "shop", By: "ann", Reason: "fire"}))
	again, err := l.Invocation(ctx, "shop")
	if err != nil || again.State != dr.Running || again.Silo != other(inv.Silo) {
		t.Fatalf("%s: %+v, %v", op.Error, again, err)
	}
	if n := len(node.machines(t)); n != 1 {
		t.Fatalf("the machine of a silo that was killed is gone: the test tests nothing")
	}
	node.Start()
	until(t, "the old machine is stopped", func() bool { return len(node.Left()) == 0 })
	until(t, "it is told", func() bool { return l.count(t, "invocation.fenced") == 1 })
	if old, err := l.Invocation(ctx, inv.ID); err != nil || !old.Kept || old.KeptAt == "" {
		t.Errorf("what it wrote is not kept: %+v, %v", old, err)
	}
	l.Finish(l.EndInvocation(ctx, "shop", false))
	l.clean(t)
}

func TestAnInvocationDoesNotWaitForTests(t *testing.T) {
	t.Parallel()
	l, p := farm(t, "a")
	p.let("a")
	l.snapshot(t)
	await(t, p.went)
	p.mu.Lock()
	delete(p.free, "a") // from now on they wait
	p.mu.Unlock()
	rec, err := l.Record(ctx, l.lkg(t))
	if err != nil {
		t.Fatal(err)
	}
	l.Nodes["a"].Kill()
	l.Nodes["a"].Host.Memory = int64(rec.PreRecovery.Hardware.Memory) << 20 * 3 / 2 // room for one, seven eighths of that
	l.Nodes["a"].Start()
	until(t, "the silo says how much it has", func() bool {
		s, err := l.ShowSilo(ctx, "a")
		return err == nil && s.Silo.Memory < 2*rec.PreRecovery.Hardware.Memory
	})
	_, err = l.AddServer(ctx, dr.Server{Name: "mail", Source: dr.Source{Disks: []string{l.path("shop.raw")}}, Schedule: dr.Schedule{Every: 24 * time.Hour}})
	if err != nil {
		t.Fatal(err)
	}
	test, err := l.Snapshot(ctx, "mail")
	if err != nil {
		t.Fatal(err)
	}
	await(t, p.went) // the test has all the memory
	inv, err := l.Invoke(ctx, api.InvokeRequest{Server: "shop", By: "ann", Reason: "fire"})
	if err != nil {
		t.Fatal(err)
	}
	await(t, p.went)
	p.let("a")
	if inv = l.Finish(inv, nil); inv.State != api.OperationSucceeded {
		t.Fatalf("%s: %s", inv.State, inv.Error)
	}
	if test, err = l.Operation(ctx, test.ID, 0, 0); err != nil || test.State.Finished() || !strings.Contains(test.Part, "waiting") {
		t.Errorf("the test %+v, %v", test, err)
	}
	l.Finish(l.EndInvocation(ctx, "shop", false))
	if test = l.Finish(test, nil); test.State != api.OperationSucceeded {
		t.Errorf("the test that made way: %s", test.Error)
	}
	l.clean(t)
}

func TestAServerThatNoSiloCouldHoldRaisesATicket(t *testing.T) {
	t.Parallel()
	l, p := farm(t, "a")
	p.let("a")
	l.Nodes["a"].Kill()
	l.Nodes["a"].Host.Memory = 512 << 20
	l.Nodes["a"].Start()
	until(t, "the silo says how much it has", func() bool {
		s, err := l.ShowSilo(ctx, "a")
		return err == nil && s.Silo.Memory == 448
	})
	op := l.Finish(l.Snapshot(ctx, "shop"))
	if want := fmt.Sprintf("it needs %d MiB", 1024); op.State != api.OperationFailed || !strings.Contains(op.Error, want) {
		t.Errorf("%s: %s; want %q", op.State, op.Error, want)
	}
	if open := l.openTickets(t); len(open) != 1 || open[0].Problem != dr.ProblemPreRecovery {
		t.Errorf("tickets %+v", open)
	}
}

// A silo that has joined with a token is asked down its own connection, and has a customer's key only while it works for it.
func TestASiloOnAnotherMachineDoesTheWholeRoad(t *testing.T) {
	t.Parallel()
	l, p := farm(t, "a")
	l.Crash()
	node := l.Nodes["a"]
	node.Kill()
	node.Link = l.Connect(t, "a")
	node.Start()
	l.Open()
	until(t, "it is heard of", func() bool {
		s, err := l.ShowSilo(ctx, "a")
		return err == nil && s.Silo.State == dr.SiloActive && s.Silo.Beats > 1
	})
	p.let("a")
	op, _ := l.begun(t, p)
	l.passedOn(t, op, "a")
	inv := l.Finish(l.Invoke(ctx, api.InvokeRequest{Server: "shop", By: "ann", Reason: "fire"}))
	if inv.State != api.OperationSucceeded {
		t.Fatalf("invoke: %s", inv.Error)
	}
	before, err := l.ShowSilo(ctx, "a")
	if err != nil {
		t.Fatal(err)
	}
	node.Kill()
	node.Start()
	until(t, "it is heard of again", func() bool {
		s, err := l.ShowSilo(ctx, "a")
		return err == nil && s.Silo.State == dr.SiloActive && s.Silo.Beats > before.Silo.Beats+1
	})
	if end := l.Finish(l.EndInvocation(ctx, "shop", true)); end.State != api.OperationSucceeded {
		t.Errorf("end: %s", end.Error)
	}
	if got, err := l.Invocation(ctx, inv.Subject); err != nil || got.State != dr.Ended || !got.Kept {
		t.Errorf("%+v, %v", got, err)
	}
	l.clean(t)
}
