package main

import (
	"context"
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
// gets them through the store, and boots them with real QEMU when a is gone for good.
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
	far := r.net + "fb"
	r.silos["b"] = r.wire(newHost(t, bin+"/muster", r.net, "b", filepath.Join(r.dir, "b"), r.hosts+"4/24", far), far, []string{"silo", "serve"})
	r.master()
	r.joined("a")
	r.joined("b")
	r.hq.ok("silo", "drain", "b")
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
	if err != nil || op.State != api.OperationSucceeded || inv.State != dr.Running || inv.Silo != "b" {
		t.Fatalf("%s: %s, %+v, %v", op.State, op.Error, inv, err)
	}
	t.Logf("%5.1f s after the loss it answered its checks: measured RTO %s", time.Since(began).Seconds(), inv.RTA)
	if n := len(r.events(t, "snapshot.pre-recovered", "")); n != made {
		t.Errorf("it was pre-recovered again")
	}
	if out := r.hq.ok("invocation", "end", "shop", "--discard"); out == "" {
		t.Error("nothing was said of its end")
	}
}
