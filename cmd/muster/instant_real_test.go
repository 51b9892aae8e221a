package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/musterdr/muster/internal/api"
	"github.com/musterdr/muster/internal/dr"
)

// The deltas of last-known-good are on one silo more than is needed. Silo a opens the image with libguestfs and makes real deltas, which it tests
// on a make-believe machine, because two real boots do not fit into the time that a test has. Silo b, another lab host with a libvirtd of its own,
// gets them through the store, and boots them with real QEMU when a is gone for good. From there it is moved to silo c, a third lab host, where
// the system finds on its disk what it wrote on b.
func TestLosingASiloForGoodLeavesAnInstantBoot(t *testing.T) {
	r := newGround(t, "i", "10.213.79.")
	r.patience = 5 * time.Minute
	shop := os.Getenv("MUSTER_SHOP")
	bin, err := filepath.Abs("../../bin")
	if err != nil || shop == "" {
		t.Fatalf("set MUSTER_SHOP to the disk of the shop's server: %v", err)
	}
	sh(t, "cp %s/muster-guest %s", bin, r.dir)
	r.hq = r.place("hq", "1", "serve")
	r.silos["a"] = r.place("a", "3", "silo", "serve")
	r.silos["a"].env = []string{envImages + "=real"}
	for name, address := range map[string]string{"b": "4/24", "c": "5/24"} {
		far := r.net + "f" + name
		r.silos[name] = r.wire(newHost(t, bin+"/muster", r.net, name, filepath.Join(r.dir, name), r.hosts+address, far), far, []string{"silo", "serve"})
	}
	r.master()
	for _, name := range []string{"a", "b", "c"} {
		r.joined(name)
	}
	r.hq.ok("silo", "drain", "b")
	r.hq.ok("silo", "drain", "c")
	r.hq.ok("server", "add", "shop", "--disk", shop, "--every", "9000h")
	var good dr.Record
	r.until(t, "it is tested on a", func() bool {
		all, err := r.api.Snapshots(t.Context(), "shop")
		if err == nil && len(all) == 1 {
			good = all[0]
		}
		return good.LKG
	})
	if good.Verdict.Silo != "a" {
		t.Fatalf("it was tested on %s", good.Verdict.Silo)
	}
	r.hq.ok("silo", "resume", "b")
	r.until(t, "both hold the deltas", func() bool {
		s, err := r.api.Server(t.Context(), "shop")
		return err == nil && slices.Equal(s.Holders, []string{"a", "b"})
	})
	r.told(t, "deltas.held", good.Snapshot.ID)
	made := len(r.events(t, "snapshot.pre-recovered", ""))

	r.booted(t, 1)
	r.silos["a"].kill()
	began := time.Now()
	op, err := r.api.Invoke(t.Context(), api.InvokeRequest{Server: "shop", By: "ann", Reason: "fire"})
	if err != nil {
		t.Fatal(err)
	}
	machine := false
	r.until(t, "it runs", func() bool {
		now, err := r.api.Operation(context.Background(), op.ID, 0, 0)
		if err == nil {
			op = now
		}
		inv, err := r.api.Invocation(context.Background(), op.Subject)
		if err == nil && inv.Machine != "" && !machine {
			machine = true
			t.Logf("%5.1f s after the loss its machine was started on silo %s", time.Since(began).Seconds(), inv.Silo)
		}
		return op.State.Finished()
	})
	inv, err := r.api.Invocation(t.Context(), op.Subject)
	if err != nil || op.State != api.OperationSucceeded || inv.State != dr.Running || inv.Silo != "b" || inv.Failure != "" {
		t.Fatalf("%s: %s, %+v, %v", op.State, op.Error, inv, err)
	}
	t.Logf("%5.1f s after the loss it answered its checks: measured RTO %s", time.Since(began).Seconds(), inv.RTA)
	if n := len(r.events(t, "snapshot.pre-recovered", "")); n != made {
		t.Errorf("it was pre-recovered again")
	}

	r.hq.ok("silo", "resume", "c")
	r.hq.ok("silo", "drain", "b")
	r.booted(t, 2)
	t.Logf("moved:\n%s", r.hq.ok("invocation", "move", "shop", "--yes", "--reason", "new disks for b"))
	if inv, err = r.api.Invocation(t.Context(), inv.ID); err != nil || inv.Silo != "c" || inv.Failure != "" {
		t.Errorf("after it was moved: %+v, %v", inv, err)
	}
	r.told(t, "invocation.moved", inv.ID)
	if out := r.hq.ok("invocation", "end", "shop", "--discard"); out == "" {
		t.Error("nothing was said of its end")
	}
	r.hq.ok("silo", "remove", "b") // it has nothing left
}

// booted has the shop asked from now on whether its disk knows of so many boots for real.
func (r *realm) booted(t *testing.T, times int) {
	t.Helper()
	_, err := r.api.UpdateServer(t.Context(), "shop", api.ServerChange{Checks: &[]dr.Check{{Name: "boots", Kind: dr.CheckCommand, Timeout: time.Minute,
		Command: []string{"/bin/sh", "-c", "id=$(cat /proc/sys/kernel/random/boot_id); grep -qs $id /var/boots || echo $id >>/var/boots; sync; echo boots $(wc -l </var/boots)"},
		Expect:  fmt.Sprintf("^boots %d$", times)}}})
	if err != nil {
		t.Fatal(err)
	}
}
