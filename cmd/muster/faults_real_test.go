package main

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/musterdr/muster/internal/api"
	"github.com/musterdr/muster/internal/dr"
)

// Of everything here it is insisted that nothing is lost, nothing is done twice, nothing is left behind, and an event tells the story.
func TestFaultsBetweenMachinesLoseNothingAndDoNothingTwice(t *testing.T) {
	r := newRealm(t)
	r.found()
	first := ""
	r.until(t, "the first snapshot", func() bool {
		all, err := r.api.Snapshots(t.Context(), "shop")
		if err != nil || len(all) != 1 || all[0].State != dr.Verified {
			return false
		}
		first = all[0].Snapshot.ID
		return true
	})
	r.tests = append(r.tests, first)
	for _, fault := range []struct {
		name string
		test func(t *testing.T)
	}{
		{"a token that was used lets nobody in", r.replayedToken},
		{"appliance and master are stopped and killed while a snapshot travels", r.killedOnTheWay},
		{"the line between appliance and master is cut while a snapshot travels", r.cutOnTheWay},
		{"a slow line that loses", r.badLine},
		{"the appliance's disk is full", r.nearFull},
		{"the master's disk is full", r.farFull},
		{"a silo is killed in a test", r.siloKilled},
		{"a silo that was stopped in a test wakes after its work was given away", r.siloStopped},
		{"the line between silo and master is cut in a test", r.siloCut},
		{"master and appliance are killed in a test", r.masterKilled},
		{"master and appliance are stopped in a test", r.masterStopped},
		{"PostgreSQL is restarted in the middle of everything", r.databaseRestarted},
		{"a silo is revoked in a test", r.siloRevoked},
		{"everything is there at the end", r.everything},
	} {
		began := time.Now()
		if !t.Run(fault.name, fault.test) {
			t.FailNow()
		}
		t.Logf("%5.1f s  %s", time.Since(began).Seconds(), fault.name)
	}
}

func (r *realm) replayedToken(t *testing.T) {
	token := r.invite("--silo", "c")
	one, other := *r.silos["a"], *r.silos["b"] // two more machines in the same networks
	one.dir, other.dir = one.dir+"-other", other.dir+"-other"
	one.ok("silo", "join", token)
	if out, code := other.tell("silo", "join", token); code != exitRefused || !strings.Contains(out, "was used already") {
		t.Errorf("a token that was used: exit code %d: %s", code, out)
	}
	once := func(kinds ...string) {
		for _, kind := range kinds {
			r.until(t, "there is an event "+kind, func() bool { return len(r.events(t, kind, "c")) == 1 })
		}
	}
	once("node.enrolled", "node.joined", "node.refused") // the book is looked at four times a second
	r.hq.ok("master", "revoke", "c")
	once("node.revoked")
}

func (r *realm) killedOnTheWay(t *testing.T) {
	r.box.slow(realmRate)
	defer r.box.good()
	op := r.begin(t)
	r.until(t, "it is on its way", func() bool { return r.sending() })
	r.box.stand(time.Second)
	r.hq.stand(time.Second)
	r.silos["a"].stand(time.Second)
	if !r.sending() {
		t.Error("it has arrived before anybody was killed: the test tests nothing")
	}
	r.box.restart()
	r.until(t, "it is on its way again", func() bool { return r.sending() })
	r.hq.restart()
	r.silos["b"].restart()
	r.answers(t)
	r.box.good()
	r.passed(t, op, "")
}

func (r *realm) cutOnTheWay(t *testing.T) {
	r.box.slow(realmRate)
	defer r.box.good()
	op := r.begin(t)
	r.until(t, "it is on its way", func() bool { return r.sending() })
	r.box.cut()
	time.Sleep(4 * time.Second)
	if s := r.status(); s.Hello.Owed == 0 {
		t.Errorf("while the line is cut %+v", s.Hello)
	}
	r.box.mend()
	r.box.good()
	r.passed(t, op, "")
}

func (r *realm) badLine(t *testing.T) {
	for _, p := range []*place{r.box, r.silos["a"], r.silos["b"]} {
		p.slow("40mbit")
		p.lossy(2)
		defer p.good()
	}
	r.passed(t, r.begin(t), "")
	for _, s := range []string{"a", "b"} {
		if r.state(s) != dr.SiloActive {
			t.Errorf("on a bad line silo %s is %s", s, r.state(s))
		}
	}
}

// takeRoom takes the room of the file system that a folder is on but for so many bytes, until it is given back.
func takeRoom(t *testing.T, dir string, leave int64) (free func()) {
	t.Helper()
	path := filepath.Join(dir, "fill")
	var fs unix.Statfs_t
	err := unix.Statfs(dir, &fs)
	if err == nil {
		err = os.WriteFile(path, nil, 0o600)
	}
	if err == nil {
		var f *os.File
		if f, err = os.OpenFile(path, os.O_WRONLY, 0); err == nil {
			err = errors.Join(unix.Fallocate(int(f.Fd()), 0, 0, int64(fs.Bavail)*fs.Bsize-leave), f.Close())
		}
	}
	if err != nil {
		t.Fatal(err)
	}
	return func() {
		if err := os.Remove(path); err != nil {
			t.Error(err)
		}
	}
}

// problems lists the kinds of the open tickets.
func (r *realm) problems(t *testing.T) (open []dr.Problem) {
	t.Helper()
	all, err := r.api.Tickets(t.Context(), false)
	if err != nil {
		t.Fatal(err)
	}
	for _, one := range all {
		open = append(open, one.Problem)
	}
	return open
}

func (r *realm) nearFull(t *testing.T) {
	free := takeRoom(t, r.near(), realmDisk/2)
	op := r.finish(t, r.begin(t))
	open := r.problems(t)
	free()
	if op.State != api.OperationFailed || !strings.Contains(op.Error, "no space") || !slices.Contains(open, dr.ProblemCapture) {
		t.Errorf("without room for it the capture %s: %s; tickets %v", op.State, op.Error, open)
	}
	r.passed(t, r.begin(t), "")
	r.until(t, "nobody worries any more", func() bool { return len(r.problems(t)) == 0 })
}

func (r *realm) farFull(t *testing.T) {
	free := takeRoom(t, r.far(), realmDisk/4)
	before := len(r.box.said())
	op := r.begin(t)
	r.until(t, "the appliance knows that the master has no room", func() bool { return strings.Contains(r.box.said()[before:], "no space") })
	if s := r.status(); s.Hello.Owed != 1 {
		t.Errorf("%+v", s.Hello)
	}
	free()
	r.passed(t, op, "")
	if open := r.problems(t); len(open) > 0 {
		t.Errorf("tickets %v", open)
	}
}

// back waits until a silo works again.
func (r *realm) back(t *testing.T, silo string) {
	t.Helper()
	r.until(t, "silo "+silo+" is back", func() bool { return r.state(silo) == dr.SiloActive })
}

// takenOver checks the story of a test whose silo was lost and is back.
func (r *realm) takenOver(t *testing.T, lost int, op api.Operation, on, other string) {
	t.Helper()
	r.passed(t, op, other)
	if n := len(r.events(t, "silo.lost", on)) - lost; n != 1 {
		t.Errorf("silo %s was lost %d times", on, n)
	}
	r.told(t, "silo.back", on)
	taken := r.events(t, "lease.taken", "")
	if len(taken) == 0 || !strings.Contains(taken[len(taken)-1].Message, "silo "+on) {
		t.Errorf("that its work was taken is told as %+v", taken)
	}
}

func (r *realm) siloKilled(t *testing.T) {
	op, on, other := r.testing(t)
	lost := len(r.events(t, "silo.lost", on))
	r.silos[on].kill()
	r.let(t, other)
	r.finish(t, op)
	if len(r.left(on)) == 0 {
		t.Error("a silo that was killed tidied up: the test tests nothing")
	}
	r.let(t, on)
	r.silos[on].serve()
	r.back(t, on)
	r.takenOver(t, lost, op, on, other)
	r.told(t, "silo.reaped", "")
}

func (r *realm) siloStopped(t *testing.T) {
	op, on, other := r.testing(t)
	lost := len(r.events(t, "silo.lost", on))
	r.silos[on].signal(syscall.SIGSTOP)
	r.let(t, other)
	r.finish(t, op)
	if len(r.left(on)) == 0 {
		t.Error("a silo that stands still tidied up: the test tests nothing")
	}
	r.let(t, on) // its machine could pass the moment it wakes
	r.silos[on].signal(syscall.SIGCONT)
	r.back(t, on)
	r.takenOver(t, lost, op, on, other)
}

func (r *realm) siloCut(t *testing.T) {
	op, on, other := r.testing(t)
	lost, before := len(r.events(t, "silo.lost", on)), r.machines(other)
	r.silos[on].cut()
	r.until(t, "the other silo has begun", func() bool { return r.machines(other) > before })
	if left := r.left(on); len(left) > 0 {
		t.Errorf("while another silo holds the test, this one still has %v", left)
	}
	r.let(t, other)
	r.finish(t, op)
	r.let(t, on)
	r.silos[on].mend()
	r.back(t, on)
	r.takenOver(t, lost, op, on, other)
}

func (r *realm) masterKilled(t *testing.T) {
	op, on, other := r.testing(t)
	r.box.restart()
	r.hq.restart()
	r.answers(t)
	r.let(t, on, other)
	r.passed(t, op, "")
}

func (r *realm) masterStopped(t *testing.T) {
	op, on, other := r.testing(t)
	lost := len(r.events(t, "silo.lost", ""))
	r.box.signal(syscall.SIGSTOP)
	r.hq.signal(syscall.SIGSTOP)
	r.until(t, "the silo has ended what nobody renews", func() bool { return len(r.left(on)) == 0 })
	time.Sleep(simGrace + time.Second) // by now the master itself could take silos for lost
	r.hq.signal(syscall.SIGCONT)
	r.let(t, on, other)
	r.box.signal(syscall.SIGCONT)
	r.passed(t, op, "")
	if n := len(r.events(t, "silo.lost", "")) - lost; n > 0 {
		t.Errorf("a master that slept took %d silos for lost", n)
	}
}

func (r *realm) databaseRestarted(t *testing.T) {
	r.box.slow(realmRate)
	defer r.box.good()
	r.hold(t, "a", "b")
	before := r.machines("a") + r.machines("b")
	op := r.begin(t)
	r.until(t, "it is on its way", func() bool { return r.sending() })
	r.pg.Restart(t)
	r.box.good()
	r.until(t, "a machine was started", func() bool { return r.machines("a")+r.machines("b") > before })
	r.pg.Restart(t)
	r.let(t, "a", "b")
	r.passed(t, op, "")
}

func (r *realm) siloRevoked(t *testing.T) {
	op, on, other := r.testing(t)
	lost := len(r.events(t, "silo.lost", on))
	r.hq.ok("master", "revoke", on)
	r.until(t, "it has ended what it may do no longer", func() bool { return len(r.left(on)) == 0 })
	r.let(t, other)
	r.finish(t, op)
	if s := r.state(on); s != dr.SiloLost {
		t.Errorf("a silo that was revoked is %s", s)
	}
	r.told(t, "node.revoked", on)
	r.until(t, "it knows why", func() bool { return strings.Contains(r.silos[on].said(), "was revoked") })
	r.let(t, on)
	r.silos[on].kill()
	r.silos[on].ok("silo", "join", r.invite("--silo", on))
	r.silos[on].serve()
	r.back(t, on)
	r.takenOver(t, lost, op, on, other)
}

func (r *realm) everything(t *testing.T) {
	ctx := context.Background()
	all, err := r.api.Snapshots(ctx, "shop")
	if err != nil {
		t.Fatal(err)
	}
	if len(all) != len(r.tests) || all[0].Snapshot.ID != r.tests[len(r.tests)-1] || !all[0].LKG {
		t.Errorf("%d snapshots, of %d that were taken; the newest is %s", len(all), len(r.tests), all[0].Snapshot.ID)
	}
	for _, rec := range all {
		if rec.State != dr.Verified || !slices.Contains(r.tests, rec.Snapshot.ID) {
			t.Errorf("%s is %s", rec.Snapshot.ID, rec.State)
		}
	}
	op, err := r.api.VerifyStore(ctx, "")
	if err != nil {
		t.Fatal(err)
	}
	if op = r.finish(t, op); op.State != api.OperationSucceeded {
		t.Errorf("verify: %s: %s", op.Error, op.Result)
	}
	r.until(t, "nothing is owed", func() bool {
		s := r.status()
		return s.Link == "connected" && s.Hello.Owed == 0 && len(s.Hello.Problems) == 0
	})
	if open := r.problems(t); len(open) > 0 {
		t.Errorf("tickets %v", open)
	}
	for _, p := range []*place{r.box, r.silos["a"], r.silos["b"]} {
		if open := p.sockets(); open != "" {
			t.Errorf("%s listens: %s", p.name, open)
		}
	}
	if health, _ := r.hq.tell("health"); !strings.Contains(health, "3 of 3 connected; silo c is revoked") {
		t.Error("health says nothing of the nodes")
	}
	figures, err := r.hq.there("metrics").Output()
	if err != nil || !strings.Contains(string(figures), `muster_node_connected{customer="acme",node="box",role="appliance"} 1`) ||
		!strings.Contains(string(figures), `muster_node_revoked{customer="",node="c",role="silo"} 1`) {
		t.Errorf("the metrics say nothing of the nodes: %v", err)
	}
}
