package main

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"filippo.io/age"

	"github.com/musterdr/muster/internal/api"
	"github.com/musterdr/muster/internal/database/pgserver"
	"github.com/musterdr/muster/internal/dr"
	"github.com/musterdr/muster/internal/lab"
)

// said runs a command as typed and gives what it said.
func said(t *testing.T, args ...string) string {
	t.Helper()
	var out bytes.Buffer
	cmd := rootCommand()
	cmd.SetArgs(args)
	cmd.SetOut(&out)
	cmd.SetErr(&out)
	if err := cmd.ExecuteContext(t.Context()); err != nil {
		t.Fatalf("muster %s: %v: %s", strings.Join(args, " "), err, out.String())
	}
	return out.String()
}

// rehearse backs a master up in the middle of work, loses it, and goes on with what is restored.
func rehearse(t *testing.T, l *lab.Lab, restoreArgs ...string) (restored string) {
	t.Helper()
	ctx := context.Background()
	i := install{Dir: l.Dir}
	if err := i.writeSettings(settings{Store: l.StoreFolder(), Database: l.Database}); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(i.path("store.key"), []byte("the key\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	l.AddCustomer("acme")                            // whose far store is no part of a backup either
	disk := filepath.Join(l.Dir, "silo", "shop.raw") // of a silo: no part of a backup
	if err := os.WriteFile(disk, bytes.Repeat([]byte("shop"), 256<<10), 0o600); err != nil {
		t.Fatal(err)
	}
	_, err := l.AddServer(ctx, dr.Server{Name: "shop", Source: dr.Source{Disks: []string{disk}}, Schedule: dr.Schedule{Every: 24 * time.Hour}})
	if err != nil {
		t.Fatal(err)
	}
	first := l.Finish(l.Snapshot(ctx, "shop"))
	if first.State != api.OperationSucceeded {
		t.Fatalf("snapshot %s: %s", first.State, first.Error)
	}
	if _, err := l.AddServer(ctx, dr.Server{Name: "gone", Source: dr.Source{Disks: []string{"/nowhere/disk"}}, Schedule: dr.Schedule{Every: 24 * time.Hour}}); err != nil {
		t.Fatal(err)
	}
	l.Finish(l.Snapshot(ctx, "gone")) // raises a ticket

	testing := make(chan struct{}, 9)
	l.Fault = func(ctx context.Context, call string) error {
		if call == "before test" {
			testing <- struct{}{}
			<-ctx.Done() // it dies here
			return ctx.Err()
		}
		return nil
	}
	second, err := l.Snapshot(ctx, "shop")
	if err != nil {
		t.Fatal(err)
	}
	<-testing
	before := facts(t, l)
	file := filepath.Join(t.TempDir(), "master.age")
	id, err := age.GenerateX25519Identity()
	if err != nil {
		t.Fatal(err)
	}
	key := filepath.Join(t.TempDir(), "key")
	if err := os.WriteFile(key, []byte(id.String()+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	said(t, "--dir", l.Dir, "master", "backup", "--recipient", id.Recipient().String(), file)

	l.Crash()
	compared := make(chan struct{})
	l.Fault = func(ctx context.Context, call string) error { // what is under way goes on when all was compared
		select {
		case <-compared:
		case <-ctx.Done():
		}
		return ctx.Err()
	}
	restored = filepath.Join(t.TempDir(), "elsewhere", "muster")
	said(t, append([]string{"--dir", restored, "master", "restore", "--identity", key, file}, restoreArgs...)...)
	if far, err := filepath.Glob(filepath.Join(restored, "store.customers", "acme", "*")); err != nil || len(far) != 0 {
		t.Errorf("the far store of a customer is in the backup: %v, %v", far, err)
	}
	if key, err := os.ReadFile(filepath.Join(restored, "store.key")); err != nil || string(key) != "the key\n" {
		t.Errorf("the key of the store: %q, %v", key, err)
	}
	set, err := install{Dir: restored}.settings()
	if err != nil {
		t.Fatal(err)
	}
	l.Database = set.Database
	if set.Database == "" {
		for _, name := range []string{"catalog.db", "engine.db"} {
			for _, end := range []string{"-wal", "-shm"} {
				_ = os.Remove(filepath.Join(l.Dir, name+end))
			}
			if err := os.Rename(filepath.Join(restored, name), filepath.Join(l.Dir, name)); err != nil {
				t.Fatal(err)
			}
		}
	}
	l.Open()
	if after := facts(t, l); after != before {
		t.Errorf("known after\n%s\nbefore\n%s", after, before)
	}
	close(compared)
	op, err := l.Operation(ctx, second.ID, 0, 0)
	if op = l.Finish(op, err); op.State != api.OperationSucceeded {
		t.Errorf("what was under way: %s: %s", op.State, op.Error)
	}
	s, err := l.Server(ctx, "shop")
	if err != nil || s.LKG == nil || s.LKG.Snapshot.ID != second.Subject {
		t.Errorf("last-known-good after what was under way: %+v, %v", s.LKG, err)
	}
	return restored
}

// facts is what a master knows: servers, last-known-good, snapshots, tickets.
func facts(t *testing.T, l *lab.Lab) string {
	t.Helper()
	ctx := context.Background()
	var out strings.Builder
	for _, name := range []string{"gone", "shop"} {
		s, err := l.Server(ctx, name)
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(&out, "%s %s", s.Server.ID, s.Server.Name)
		if s.LKG != nil {
			fmt.Fprintf(&out, " %s", s.LKG.Snapshot.ID)
		}
		snaps, err := l.Snapshots(ctx, name)
		if err != nil {
			t.Fatal(err)
		}
		for _, r := range snaps {
			fmt.Fprintf(&out, "\n  %s %s", r.Snapshot.ID, r.State)
		}
		out.WriteString("\n")
	}
	tickets, err := l.Tickets(ctx, true)
	if err != nil || len(tickets) == 0 {
		t.Fatalf("tickets %v, %v", tickets, err)
	}
	for _, ticket := range tickets {
		fmt.Fprintf(&out, "%s %s %s\n", ticket.ID, ticket.Server, ticket.Title)
	}
	return out.String()
}

func TestAMasterBackedUpUnderLoadIsRestoredElsewhereAndGoesOn(t *testing.T) {
	t.Run("files", func(t *testing.T) { rehearse(t, lab.New(t, lab.Healthy)) })
	t.Run("PostgreSQL", func(t *testing.T) {
		server := pgserver.ForTest(t)
		l := lab.New(t, lab.Healthy)
		l.Use(server.Database(t))
		rehearse(t, l, "--database", server.Database(t))
	})
}
