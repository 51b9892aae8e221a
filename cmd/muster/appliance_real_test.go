package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"github.com/musterdr/muster/internal/store"
	"log/slog"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/musterdr/muster/internal/api"
	"github.com/musterdr/muster/internal/dr"
	"github.com/musterdr/muster/internal/lab"
	"github.com/musterdr/muster/internal/trust"
)

// office is a master, with a lab's make-believe silo, in a network of its own, and an appliance in another: processes with a
// veth between them.
type office struct {
	t     *testing.T
	l     *lab.Lab
	dir   string // of the appliance
	bin   string
	space string // network namespace of the appliance
	near  string // its interface
	run   *exec.Cmd
	log   *bytes.Buffer
}

func sh(t *testing.T, line string, args ...any) string {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), "sh", "-c", fmt.Sprintf(line, args...)).CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v\n%s", fmt.Sprintf(line, args...), err, out)
	}
	return string(out)
}

func newOffice(t *testing.T) *office {
	t.Helper()
	id := fmt.Sprintf("m%04x", os.Getpid()&0xffff)
	o := &office{t: t, dir: filepath.Join(t.TempDir(), "box"), space: id + "app", near: id + "a", log: &bytes.Buffer{}}
	sh(t, "ip netns add %s", o.space)
	t.Cleanup(func() { _ = exec.Command("ip", "netns", "del", o.space).Run() })
	sh(t, "ip link add %sb type veth peer name %s netns %s", id, o.near, o.space)
	t.Cleanup(func() { _ = exec.Command("ip", "link", "del", id+"b").Run() })
	sh(t, "ip addr add 10.213.77.1/30 dev %sb && ip link set %sb up", id, id)
	sh(t, "ip -n %s addr add 10.213.77.2/30 dev %s && ip -n %s link set %s up && ip -n %s link set lo up", o.space, o.near, o.space, o.near, o.space)
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	o.bin = filepath.Join(t.TempDir(), "muster") // under that name the test is the program
	if err := os.Symlink(self, o.bin); err != nil {
		t.Fatal(err)
	}
	o.l = lab.New(t, lab.Healthy)
	o.serveMaster()
	return o
}

// serveMaster lets nodes in, and has the appliance join.
func (o *office) serveMaster() {
	t := o.t
	home := install{Dir: t.TempDir()}
	listener, err := net.Listen("tcp", "10.213.77.1:0")
	if err != nil {
		t.Fatal(err)
	}
	plan := trust.Plan{Name: "hq", Listen: listener.Addr().String(), Addresses: []string{listener.Addr().String()}, KeyFile: home.masterKey()}
	if err := trust.Create(home.trustDir(), plan); err != nil {
		t.Fatal(err)
	}
	authority, err := home.openAuthority(serveCommand(), "")
	if err != nil {
		t.Fatal(err)
	}
	if err := authority.GiveCustomerKey("acme", lab.Password); err != nil {
		t.Fatal(err)
	}
	port := &nodePort{authority: authority, hub: trust.NewHub(authority, slog.New(slog.DiscardHandler)), log: slog.New(slog.DiscardHandler), listener: listener}
	o.l.Reach = port.site
	book, err := store.OpenCustomers(t.Context(), store.CustomersConfig{Own: o.l.Store, OwnOf: "acme"})
	if err != nil {
		t.Fatal(err)
	}
	handlers, end := nodeHandlers(o.l.Master, farStores{home, settings{Store: o.l.StoreFolder()}, book})
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- port.serve(ctx, handlers) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
		if err := end(); err != nil {
			t.Error(err)
		}
	})
	token, err := authority.Enrol(trust.Peer{Role: trust.Appliance, Customer: "acme", Name: "box"}, time.Hour, nil)
	if err != nil {
		t.Fatal(err)
	}
	sh(t, "ip netns exec %s %s appliance join '%s' --dir %s", o.space, o.bin, token, o.dir)
}

// serve starts the appliance's process.
func (o *office) serve() {
	o.t.Helper()
	o.run = exec.Command("ip", "netns", "exec", o.space, o.bin, "appliance", "serve", "--dir", o.dir)
	o.run.Stderr = o.log
	if err := o.run.Start(); err != nil {
		o.t.Fatal(err)
	}
	o.t.Cleanup(func() { o.kill() })
}

// kill ends it as a power cut does.
func (o *office) kill() {
	if o.run != nil {
		_ = o.run.Process.Signal(syscall.SIGKILL) // ip has become it
		_ = o.run.Wait()
		o.run = nil
	}
}

// status asks the appliance on its own machine.
func (o *office) status() (s api.SiteStatus, err error) {
	out, err := exec.Command(o.bin, "appliance", "status", "--json", "--dir", o.dir).Output()
	if err == nil {
		err = json.Unmarshal(out, &s)
	}
	return s, err
}

// until waits for something to become true.
func (o *office) until(what string, is func() bool) {
	o.t.Helper()
	for deadline := time.Now().Add(2 * time.Minute); !is(); {
		if time.Now().After(deadline) {
			o.t.Fatalf("%s has not come about; the appliance says\n%s", what, o.log)
		}
		time.Sleep(100 * time.Millisecond) // processes of their own: there is nothing to wait on
	}
}

func (o *office) write(day uint64) {
	o.t.Helper()
	data := make([]byte, 48<<20)
	rng := rand.New(rand.NewPCG(1, day))
	for i := 0; i < len(data); i += 8 {
		v := rng.Uint64()
		for k := range 8 {
			data[i+k] = byte(v >> (8 * k))
		}
	}
	if err := os.WriteFile(o.disk(), data, 0o600); err != nil {
		o.t.Fatal(err)
	}
}

func (o *office) disk() string { return filepath.Join(filepath.Dir(o.dir), "shop.raw") }

func (o *office) states() (out []dr.State) {
	records, err := o.l.Snapshots(o.t.Context(), "shop")
	if err != nil {
		o.t.Fatal(err)
	}
	for _, r := range records {
		out = append(out, r.State)
	}
	return out
}

func verified(states []dr.State, n int) bool {
	return len(states) == n && !slices.ContainsFunc(states, func(s dr.State) bool { return s != dr.Verified })
}

// An appliance in a network of its own listens nowhere, and what is captured arrives through a line that is slow, loses, is cut,
// and through the death of the process in the middle of sending.
func TestAnApplianceListensNowhereAndSendsThroughABadLine(t *testing.T) {
	if os.Getenv("MUSTER_REAL") == "" {
		t.Skip("set MUSTER_REAL=1 to make network namespaces and run processes in them")
	}
	o := newOffice(t)
	o.write(1)
	ctx := t.Context()
	if _, err := o.l.AddServer(ctx, dr.Server{Name: "shop", Appliance: "box", Source: dr.Source{Disks: []string{o.disk()}}, Schedule: dr.Schedule{Every: time.Hour},
		Checks: []dr.Check{{Name: "page", Kind: dr.CheckHTTP, URL: "http://127.0.0.1/"}}}); err != nil {
		t.Fatal(err)
	}
	o.serve()
	o.until("the first snapshot", func() bool { return verified(o.states(), 1) })
	sockets := func() string { return strings.TrimSpace(sh(t, "ip netns exec %s ss -H -lntup", o.space)) }
	if open := sockets(); open != "" {
		t.Errorf("the appliance listens: %s", open)
	}
	if files, err := exec.Command(o.bin, "appliance", "status", "--dir", o.dir).CombinedOutput(); err != nil || !strings.Contains(string(files), "connected") {
		t.Errorf("status: %s %v", files, err)
	} else {
		t.Logf("\n%s", files)
	}

	t.Log("a slow line that loses; then a kill in the middle of sending")
	o.badLine()
	o.write(2)
	first := o.begin(ctx, t)
	o.until("a snapshot on its way", func() bool { return o.sending(4 << 20) })
	if open := sockets(); open != "" {
		t.Errorf("the appliance listens while it sends: %s", open)
	}
	o.kill()
	o.serve()
	o.until("a snapshot on its way again", func() bool { return o.sending(1 << 20) })

	t.Log("a cut in the middle of sending")
	sh(t, "ip netns exec %s nft 'add table inet cut; add chain inet cut out { type filter hook output priority 0; }; add rule inet cut out oif %s drop'", o.space, o.near)
	time.Sleep(3 * time.Second)
	if s, err := o.status(); err != nil || s.Hello.Owed == 0 {
		t.Errorf("while the line is cut %+v, %v", s.Hello, err)
	}
	sh(t, "ip netns exec %s nft delete table inet cut", o.space)
	o.goodLine()
	o.until("the second snapshot", func() bool { return verified(o.states(), 2) })
	op := o.l.Finish(o.l.Operation(ctx, first.ID, 0, 0))
	if op.State != api.OperationSucceeded {
		t.Errorf("the snapshot that was asked for %s: %s", op.State, op.Error)
	}
	records, err := o.l.Snapshots(ctx, "shop")
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range records {
		if _, err := o.l.Store.Verify(ctx, r.Snapshot.ID, nil); err != nil {
			t.Error(err)
		}
	}
	if open := sockets(); open != "" {
		t.Errorf("the appliance listens: %s", open)
	}

	t.Log("a disk carried by hand, while the appliance runs")
	disk := filepath.Join(t.TempDir(), "usb")
	var seed seedShown
	o.tell(&seed, "appliance", "seed", "export", disk, "shop", "--dir", o.dir)
	if seed.Packs == 0 || seed.Bytes < 40<<20 || len(seed.Snapshots) != 1 || seed.Snapshots[0] != records[0].Snapshot.ID {
		t.Errorf("seed %+v", seed)
	}
	hq := t.TempDir()
	if err := os.WriteFile(filepath.Join(hq, "muster.yaml"), fmt.Appendf(nil, "store: %s\ncustomer: acme\n", o.l.StoreFolder()), 0o600); err != nil {
		t.Fatal(err)
	}
	var taken seedShown
	o.tell(&taken, "master", "seed", "import", disk, "--customer", "acme", "--digest", seed.Digest, "--dir", hq)
	if taken.Packs != seed.Packs || taken.Bytes != seed.Bytes {
		t.Errorf("taken in %+v of %+v", taken, seed)
	}
}

// tell runs a command and reads what it prints as JSON.
func (o *office) tell(into any, args ...string) {
	o.t.Helper()
	out, err := exec.Command(o.bin, append(args, "--json")...).Output()
	if err == nil {
		err = json.Unmarshal(out, into)
	}
	if err != nil {
		o.t.Fatalf("muster %s: %v\n%s", strings.Join(args, " "), err, out)
	}
}

// begin asks for a snapshot, as a person does.
func (o *office) begin(ctx context.Context, t *testing.T) api.Operation {
	t.Helper()
	op, err := o.l.Snapshot(ctx, "shop")
	if err != nil {
		t.Fatal(err)
	}
	return op
}

// badLine makes the line slow, and lets it lose packets. A kernel without netem adds no delay: there packets are dropped by nftables.
func (o *office) badLine() {
	if exec.Command("tc", "-n", o.space, "qdisc", "add", "dev", o.near, "root", "netem", "delay", "15ms", "loss", "1%", "rate", "40mbit").Run() == nil {
		return
	}
	o.t.Log("this kernel has no netem: packets are lost, and not delayed")
	sh(o.t, "ip netns exec %s nft 'add table inet bad; add chain inet bad out { type filter hook output priority 1; }; "+
		"add rule inet bad out oif %s numgen random mod 100 < 1 drop; add rule inet bad out oif %s limit rate over 4 mbytes/second burst 64 kbytes drop'",
		o.space, o.near, o.near)
}

func (o *office) goodLine() {
	if exec.Command("tc", "-n", o.space, "qdisc", "del", "dev", o.near, "root").Run() != nil {
		sh(o.t, "ip netns exec %s nft delete table inet bad", o.space)
	}
}

// sending says whether so many bytes of a snapshot are on their way.
func (o *office) sending(least int64) bool {
	s, err := o.status()
	if err != nil {
		return false
	}
	return slices.ContainsFunc(s.Working, func(op api.Operation) bool { return op.Kind == "replicate" && op.Done >= least })
}
