package s3_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/kopia/kopia/repo/blob"

	"github.com/musterdr/muster/internal/store"
	"github.com/musterdr/muster/internal/store/s3"
)

const beat = 100 * time.Millisecond

// TestMain is also a process that holds a lock: "muster-test hold ENDPOINT BUCKET FILE". It says what it did, a line each, and goes on with every
// line it is told.
func TestMain(m *testing.M) {
	if len(os.Args) == 5 && os.Args[1] == "hold" {
		if err := holdLock(s3.Driver{Endpoint: os.Args[2], Plain: true, Region: "us-east-1", Bucket: os.Args[3], Prefix: "near/", PathStyle: true, Credentials: os.Args[4]}.Hasty(beat)); err != nil {
			fmt.Println("error", err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func holdLock(d s3.Driver) error {
	ctx := context.Background()
	p, err := d.Open(ctx)
	if err != nil {
		return err
	}
	unlock, taken, err := p.TryLock("publish", true)
	if err != nil || !taken {
		return fmt.Errorf("lock: %t, %w", taken, err)
	}
	fmt.Println("held")
	in := bufio.NewScanner(os.Stdin)
	for n := 0; in.Scan(); n++ {
		if in.Text() == "release" {
			unlock()
			unlock, taken, err = p.TryLock("publish", true)
			fmt.Println("locked again", taken, err)
			continue
		}
		err := p.PutBlob(ctx, blob.ID(fmt.Sprintf("p%d", n)), store.Bytes("x"), blob.PutOptions{})
		fmt.Println("put", errors.Is(err, s3.ErrLost), err)
	}
	return p.Close(ctx)
}

// child starts a process that holds the lock.
func child(t *testing.T, d s3.Driver) (cmd *exec.Cmd, tell func(string), said func() string) {
	t.Helper()
	cmd = exec.Command(os.Args[0], "hold", d.Endpoint, d.Bucket, d.Credentials)
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	lines := bufio.NewScanner(out)
	said = func() string {
		t.Helper()
		if !lines.Scan() {
			t.Fatalf("the process ended: %v", lines.Err())
		}
		return lines.Text()
	}
	if s := said(); s != "held" {
		t.Fatal(s)
	}
	return cmd, func(s string) { io.WriteString(in, s+"\n") }, said
}

func create(t *testing.T, d s3.Driver) store.Place {
	t.Helper()
	p, err := d.Create(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Close(context.Background()) })
	return p
}

func open(t *testing.T, d s3.Driver) store.Place {
	t.Helper()
	p, err := d.Open(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Close(context.Background()) })
	return p
}

func try(t *testing.T, p store.Place, name string, exclusive, want bool) func() {
	t.Helper()
	unlock, taken, err := p.TryLock(name, exclusive)
	if err != nil || taken != want {
		t.Fatalf("lock %s: %t, %v", name, taken, err)
	}
	return unlock
}

// lockSoon tries until the lock is free.
func lockSoon(t *testing.T, p store.Place, name string) {
	t.Helper()
	for began := time.Now(); ; {
		_, taken, err := p.TryLock(name, true)
		if err != nil {
			t.Fatal(err)
		}
		if taken {
			return
		}
		if time.Since(began) > 20*time.Second {
			t.Fatal("the lock is never free")
		}
		<-time.After(beat / 2) // for another process to be silent
	}
}

func TestLocksHoldBetweenPlaces(t *testing.T) {
	g := start(t, t.TempDir())
	for _, versions := range []bool{false, true} {
		d := g.bucket(t, versions)
		a, b := create(t, d), open(t, d)
		one, two := try(t, a, "ingest", false, true), try(t, b, "ingest", false, true)
		again := try(t, a, "ingest", false, true)
		try(t, a, "ingest", true, false)
		one()
		one() // twice is once
		try(t, b, "ingest", true, false)
		two()
		try(t, b, "ingest", true, false)
		again()
		alone := try(t, b, "ingest", true, true)
		try(t, a, "ingest", false, false)
		other := try(t, a, "publish", true, true)
		alone()
		other()
		try(t, a, "ingest", true, true)
		if err := a.Close(t.Context()); err != nil { // lets go of all
			t.Fatal(err)
		}
		try(t, b, "ingest", true, true)()
		if err := b.Close(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
}

func TestManyPlacesCountTogether(t *testing.T) {
	g := start(t, t.TempDir())
	d := g.bucket(t, false)
	create(t, d)
	var inside, sum atomic.Int32
	done := make(chan error)
	const places, rounds = 4, 5
	for range places {
		p := open(t, d)
		go func() {
			for n := 0; n < rounds; {
				unlock, taken, err := p.TryLock("publish", true)
				if err != nil {
					done <- err
					return
				}
				if !taken {
					continue
				}
				if inside.Add(1) != 1 {
					done <- errors.New("two are inside")
					return
				}
				sum.Add(1)
				inside.Add(-1)
				unlock()
				n++
			}
			done <- nil
		}()
	}
	for range places {
		if err := <-done; err != nil {
			t.Fatal(err)
		}
	}
	if sum.Load() != places*rounds {
		t.Errorf("%d times", sum.Load())
	}
}

func TestALockOfAKilledProcessIsFreeAtOnce(t *testing.T) {
	g := start(t, t.TempDir())
	d := g.bucket(t, false)
	p := create(t, d) // with leases of a minute: nobody waits for them
	cmd, _, _ := child(t, d)
	try(t, p, "publish", true, false)
	cmd.Process.Kill()
	cmd.Wait()
	try(t, p, "publish", true, true)
}

func TestAHolderThatStoodStillMustNotWrite(t *testing.T) {
	g := start(t, t.TempDir())
	d := g.bucket(t, false)
	p := create(t, d.Hasty(beat))
	cmd, tell, said := child(t, d)
	tell("put")
	if s := said(); s != "put false <nil>" {
		t.Fatal(s)
	}
	cmd.Process.Signal(syscall.SIGSTOP)
	lockSoon(t, p, "publish")
	cmd.Process.Signal(syscall.SIGCONT)
	tell("put")
	if s := said(); !strings.HasPrefix(s, "put true") && !strings.Contains(s, "could not be renewed") {
		t.Fatalf("a holder that woke up: %s", s)
	}
	if _, err := p.GetMetadata(t.Context(), "p1"); !errors.Is(err, blob.ErrBlobNotFound) {
		t.Errorf("its blob: %v", err)
	}
	tell("release") // it lets go of what it lost, and may begin anew
	for said := said(); said != "locked again false <nil>"; {
		t.Fatal(said)
	}
	tell("put")
	if s := said(); s != "put false <nil>" {
		t.Fatal(s)
	}
}

func TestAHolderThatIsCutOffWaitsAndGoesOn(t *testing.T) {
	g := start(t, t.TempDir())
	d := g.bucket(t, false)
	var cut atomic.Bool
	a := create(t, proxy(t, g, d, func(w http.ResponseWriter, r *http.Request, pass http.Handler) {
		if cut.Load() {
			panic(http.ErrAbortHandler)
		}
		pass.ServeHTTP(w, r)
	}).Hasty(beat))
	unlock := try(t, a, "ingest", false, true)
	cut.Store(true)
	<-time.After(4 * beat) // the lease runs out
	err := a.PutBlob(t.Context(), "p1", store.Bytes("x"), blob.PutOptions{})
	if err == nil || !strings.Contains(err.Error(), "could not be renewed") {
		t.Fatalf("put without a lease: %v", err)
	}
	cut.Store(false)
	for began := time.Now(); err != nil; err = a.PutBlob(t.Context(), "p1", store.Bytes("x"), blob.PutOptions{}) {
		if errors.Is(err, s3.ErrLost) || time.Since(began) > 20*time.Second {
			t.Fatal(err)
		}
		<-time.After(beat)
	}
	unlock()
	try(t, open(t, d), "ingest", true, true)
}

func TestAServiceThatIgnoresConditionsIsRefused(t *testing.T) {
	g := start(t, t.TempDir())
	d := proxy(t, g, g.bucket(t, false), func(w http.ResponseWriter, r *http.Request, pass http.Handler) {
		if r.Method == http.MethodPut && strings.HasSuffix(r.URL.Path, "_muster.lock") {
			io.Copy(io.Discard, r.Body)
			w.Header().Set("ETag", `"0"`)
			return
		}
		pass.ServeHTTP(w, r)
	})
	if _, err := d.Create(t.Context()); err == nil || !strings.Contains(err.Error(), "locks would not hold") {
		t.Errorf("got %v", err)
	}
}
