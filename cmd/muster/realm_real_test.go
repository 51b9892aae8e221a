package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/musterdr/muster/internal/api"
	"github.com/musterdr/muster/internal/database/pgserver"
	"github.com/musterdr/muster/internal/dr"
)

// realm is an installation on many machines: a master, two silos and an appliance, each the program as a process of its own in a
// network of its own, with a bridge between them. The master keeps its catalog and its work in a PostgreSQL. Machines of the silos are
// make-believe; everything else is as it is delivered.
type realm struct {
	t     *testing.T // of the whole
	net   string     // begins the names of its networks
	hosts string     // begins their addresses, as "10.213.78."
	dir   string
	bin   string
	hq    *place
	box   *place
	silos map[string]*place
	api   *api.Client // of the master
	pg    pgserver.Tested

	patience time.Duration
	day      uint64
	tests    []string // snapshots that have to be there at the end
}

const (
	realmDisk = 24 << 20  // bytes of the server, all different from one snapshot to the next
	realmRoom = 640 << 20 // bytes of the near store's disk, and of the far one's
	realmRate = "16mbit"  // of a slow line: a snapshot takes twelve seconds
)

// newGround makes the bridge, and the program that runs on it.
func newGround(t *testing.T, net, hosts string) *realm {
	t.Helper()
	if os.Getenv("MUSTER_REAL") == "" {
		t.Skip("set MUSTER_REAL=1 on a lab host (scripts/test real)")
	}
	t.Parallel()
	dir, err := os.MkdirTemp("/var/lib", "realm") // where QEMU's user can reach it
	if err == nil {
		err = os.Chmod(dir, 0o711)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	r := &realm{t: t, net: netID(net), hosts: hosts, dir: dir, bin: filepath.Join(dir, makeBelieve), silos: map[string]*place{}, patience: time.Minute}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	sh(t, "cp %s %s", self, r.bin) // no link to it: the program starts itself by its own name
	sh(t, "ip link add %sr type bridge && ip link set %sr up", r.net, r.net)
	t.Cleanup(func() { sh(t, "ip link del %sr", r.net) })
	return r
}

// files makes what make-believe machines are given for a test agent, and the checks of a server: each is where guest and checks say.
func (r *realm) files() {
	r.t.Helper()
	err := errors.Join(os.WriteFile(r.guest(), []byte("\x7fELF test agent"), 0o755),
		os.WriteFile(r.checks(), []byte("- name: page\n  kind: http\n  url: http://127.0.0.1/\n"), 0o600))
	if err != nil {
		r.t.Fatal(err)
	}
}

func (r *realm) guest() string  { return filepath.Join(r.dir, "muster-guest") }
func (r *realm) checks() string { return filepath.Join(r.dir, "checks.yaml") }

// newRealm makes the machines.
func newRealm(t *testing.T) *realm {
	t.Helper()
	r := newGround(t, "r", "10.213.78.")
	r.files()
	r.pg = pgserver.ForTest(t)
	r.hq = r.place("hq", "1", "serve")
	r.box = r.place("box", "2", "appliance", "serve")
	for _, disk := range []string{r.near(), r.far()} { // of a size that a test can fill
		sh(t, "mkdir -p %s && mount -t tmpfs -o size=%d tmpfs %s", disk, realmRoom, disk)
		t.Cleanup(func() { sh(t, "umount -l %s", disk) })
	}
	for i, name := range []string{"a", "b"} {
		r.silos[name] = r.place(name, fmt.Sprint(3+i), "silo", "serve")
	}
	return r
}

// place makes a machine on the bridge.
func (r *realm) place(name, host string, command ...string) *place {
	r.t.Helper()
	far := r.net + "f" + name
	return r.wire(newPlace(r.t, r.bin, r.net, name, filepath.Join(r.dir, name), r.hosts+host+"/24", far), far, command)
}

// wire puts the far end of a machine's cable into the bridge.
func (r *realm) wire(p *place, far string, command []string) *place {
	r.t.Helper()
	p.command = command
	sh(r.t, "ip link set %s master %sr", far, r.net)
	return p
}

// master makes the installation, and its process serves nodes. Its own silo is to take no work.
func (r *realm) master(init ...string) {
	t := r.t
	t.Helper()
	r.hq.ok(append([]string{"init"}, init...)...)
	r.hq.ok("master", "init", "--name", "hq", "--listen", r.hosts+"1:7443", "--address", r.hosts+"1:7443")
	if r.box != nil {
		r.hq.ok("master", "customer", "add", "acme", "--store", r.far())
	}
	r.hq.serve()
	r.api = api.Dial(r.hq.socket())
	t.Cleanup(r.api.Close)
	r.answers(t)
	var own []api.SiloStatus
	r.until(t, "the master's own silo is heard of", func() (there bool) {
		own, _ = r.api.ListSilos(t.Context())
		return len(own) == 1
	})
	r.hq.ok("silo", "drain", own[0].Silo.Name, "--reason", "the others are to work")
}

// joined has a silo join and serve.
func (r *realm) joined(silo string) {
	r.t.Helper()
	p := r.silos[silo]
	p.ok("silo", "join", r.invite("--silo", silo))
	p.serve()
	r.until(r.t, "silo "+silo+" is there", func() bool { return r.state(silo) == dr.SiloActive })
}

// found has everybody join, and protects a server.
func (r *realm) found() {
	t := r.t
	t.Helper()
	r.master("--database", r.pg.Database(t))
	r.joined("a")
	r.joined("b")
	r.box.ok("appliance", "join", r.invite("--customer", "acme", "--appliance", "box"))
	r.box.serve()
	r.until(t, "the appliance is there", r.connected)
	r.write()
	r.hq.ok("server", "add", "shop", "--appliance", "box", "--disk", r.disk(), "--every", "9000h", "--signs", "off", "--check", r.checks())
}

func (r *realm) near() string { return filepath.Join(r.box.dir, "near") }
func (r *realm) far() string  { return filepath.Join(r.hq.dir, "far") }
func (r *realm) disk() string { return filepath.Join(r.dir, "shop.raw") }

// write gives the server another day's content.
func (r *realm) write() {
	r.day++
	noise(r.t, r.disk(), realmDisk, r.day)
}

// invite gives a token.
func (r *realm) invite(who ...string) string {
	r.t.Helper()
	var token struct {
		Token string `json:"token"`
	}
	if err := json.Unmarshal([]byte(r.hq.ok(append(append([]string{"master", "enrol"}, who...), "--json")...)), &token); err != nil {
		r.t.Fatal(err)
	}
	return token.Token
}

// answers waits for the master.
func (r *realm) answers(t *testing.T) {
	t.Helper()
	r.until(t, "the master answers", func() bool {
		_, err := r.api.Version(context.Background())
		return err == nil
	})
}

// until waits for something that processes bring about by themselves.
func (r *realm) until(t *testing.T, what string, is func() bool) {
	t.Helper()
	for deadline := time.Now().Add(r.patience); !is(); {
		if time.Now().After(deadline) {
			for _, p := range []*place{r.hq, r.box, r.silos["a"], r.silos["b"]} {
				if p != nil {
					t.Logf("--- %s\n%s", p.name, p.said())
				}
			}
			t.Fatalf("waited in vain until %s", what)
		}
		time.Sleep(50 * time.Millisecond) // processes of their own: there is nothing to wait on
	}
}

func (r *realm) state(silo string) dr.SiloState {
	s, err := r.api.ShowSilo(context.Background(), silo)
	if err != nil {
		return ""
	}
	return s.Silo.State
}

// connected says whether the master reaches the appliance.
func (r *realm) connected() bool {
	all, err := r.api.Appliances(context.Background())
	return err == nil && len(all) == 1 && all[0].Connected
}

// status asks the appliance on its own machine.
func (r *realm) status() (s api.SiteStatus) {
	_ = r.box.read(&s, "appliance", "status") // one that does not answer says nothing
	return s
}

// sending says whether a snapshot is on its way. How far it is is seen only when a pack has arrived, and here one is most of it.
func (r *realm) sending() bool {
	return slices.ContainsFunc(r.status().Working, func(op api.Operation) bool { return op.Kind == "replicate" })
}

// begin asks for a snapshot of another day, as a person does.
func (r *realm) begin(t *testing.T) api.Operation {
	t.Helper()
	r.write()
	op, err := r.api.Snapshot(t.Context(), "shop")
	if err != nil {
		t.Fatal(err)
	}
	return op
}

// finish waits until an operation has finished, also if the master is started again meanwhile.
func (r *realm) finish(t *testing.T, op api.Operation) api.Operation {
	t.Helper()
	r.until(t, op.ID+" has finished", func() bool {
		now, err := r.api.Operation(context.Background(), op.ID, 0, 0)
		if err == nil {
			op = now
		}
		return err == nil && op.State.Finished()
	})
	return op
}

// hold has the machines of a silo not boot; let lets them.
func (r *realm) hold(t *testing.T, silos ...string) {
	t.Helper()
	for _, s := range silos {
		if err := os.WriteFile(filepath.Join(r.silos[s].dir, holdFile), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

func (r *realm) let(t *testing.T, silos ...string) {
	t.Helper()
	for _, s := range silos {
		if err := os.Remove(filepath.Join(r.silos[s].dir, holdFile)); err != nil {
			t.Fatal(err)
		}
	}
}

// machines counts those that a silo ever started.
func (r *realm) machines(silo string) int {
	list, _ := filepath.Glob(filepath.Join(r.silos[silo].dir, wentPrefix+"*"))
	return len(list)
}

// testing begins a snapshot, and waits until a machine of its test has been started: it says where, and which is the other silo.
func (r *realm) testing(t *testing.T) (op api.Operation, on, other string) {
	t.Helper()
	before := map[string]int{"a": r.machines("a"), "b": r.machines("b")}
	r.hold(t, "a", "b")
	op = r.begin(t)
	r.until(t, "a machine was started", func() bool {
		switch {
		case r.machines("a") > before["a"]:
			on, other = "a", "b"
		case r.machines("b") > before["b"]:
			on, other = "b", "a"
		}
		return on != ""
	})
	return op, on, other
}

// events gives those of a kind since a number, of one subject if that is not "".
func (r *realm) events(t *testing.T, kind, subject string) (found []dr.Event) {
	t.Helper()
	for after := int64(0); ; {
		page, err := r.api.Events(context.Background(), after, 500, "")
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range page {
			if e.Kind == kind && (subject == "" || e.Subject == subject) {
				found = append(found, e)
			}
			after = e.Seq
		}
		if len(page) == 0 {
			return found
		}
	}
}

// passed checks that an operation went well, on that silo if one is named, and that nothing of it was done twice: one snapshot, one arrival, one
// verdict, one promotion; and that nothing is left on any silo.
func (r *realm) passed(t *testing.T, op api.Operation, silo string) {
	t.Helper()
	op = r.finish(t, op)
	id := op.Subject
	rec, err := r.api.Record(t.Context(), id)
	if err != nil || op.State != api.OperationSucceeded || !rec.LKG || rec.Verdict == nil || silo != "" && rec.Verdict.Silo != silo {
		t.Fatalf("%s (%s), verdict %+v, LKG %v, %v; want a PASS of silo %s", op.State, op.Error, rec.Verdict, rec.LKG, err, silo)
	}
	for _, kind := range []string{"snapshot.kept", "snapshot.replicated", "snapshot.verified", "lkg.moved"} {
		if n := len(r.events(t, kind, id)); n != 1 {
			t.Errorf("%d events %s of %s", n, kind, id)
		}
	}
	verdicts := 0
	for _, e := range r.events(t, "verdict.recorded", "") {
		if strings.Contains(e.Message, id) {
			verdicts++
		}
	}
	if verdicts != 1 {
		t.Errorf("%d verdicts on %s", verdicts, id)
	}
	r.tests = append(r.tests, id)
	r.clean(t)
}

// clean waits until no silo has a lease or anything of a test left.
func (r *realm) clean(t *testing.T) {
	t.Helper()
	var left []string
	defer func() {
		if t.Failed() {
			t.Logf("left: %v", left)
		}
	}()
	r.until(t, "nothing is left", func() bool {
		left = r.left(slices.Collect(maps.Keys(r.silos))...)
		all, err := r.api.ListSilos(context.Background())
		for _, s := range all {
			for _, l := range s.Leases {
				left = append(left, "lease "+l.Work.ID)
			}
		}
		return err == nil && len(left) == 0
	})
}

// left lists what of tests there is on silos.
func (r *realm) left(silos ...string) (left []string) {
	for _, s := range silos {
		files, _ := filepath.Glob(filepath.Join(r.silos[s].dir, "silo/scratch/*"))
		left = append(left, files...)
	}
	return left
}

// told insists on an event.
func (r *realm) told(t *testing.T, kind, subject string) {
	t.Helper()
	if len(r.events(t, kind, subject)) == 0 {
		t.Errorf("no event %s of %s", kind, subject)
	}
}
