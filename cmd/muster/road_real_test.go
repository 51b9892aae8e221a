package main

import (
	"bytes"
	"encoding/json"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/musterdr/muster/internal/api"
	"github.com/musterdr/muster/internal/dr"
)

// road is an installation on a lab host, used through its command line as people use it, with real machines.
type road struct {
	t     *testing.T
	dir   string
	bin   string
	serve *exec.Cmd
}

func newRoad(t *testing.T) *road {
	t.Helper()
	if os.Getenv("MUSTER_REAL") == "" {
		t.Skip("set MUSTER_REAL=1 on a lab host (scripts/test real)")
	}
	bin, err := filepath.Abs("../../bin/muster")
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("/var/lib", "muster-road") // where QEMU's user can reach it
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(dir, 0o711); err != nil {
		t.Fatal(err)
	}
	r := &road{t: t, dir: dir, bin: bin}
	t.Cleanup(func() {
		r.stop(syscall.SIGTERM)
		os.RemoveAll(dir)
	})
	r.ok("init")
	r.start()
	return r
}

// run types a command and gives its exit code and output.
func (r *road) run(args ...string) (int, string) {
	c := exec.Command(r.bin, append(args, "--dir", r.dir+"/inst")...)
	var out, both bytes.Buffer
	c.Stdout, c.Stderr = &out, &both
	err := c.Run()
	r.t.Logf("muster %s → %v\n%s%s", strings.Join(args, " "), err, out.String(), both.String())
	return c.ProcessState.ExitCode(), out.String()
}

func (r *road) ok(args ...string) string {
	r.t.Helper()
	code, out := r.run(args...)
	if code != exitOK {
		r.t.Fatalf("muster %s: exit code %d", strings.Join(args, " "), code)
	}
	return out
}

func (r *road) read(v any, args ...string) {
	r.t.Helper()
	if err := json.Unmarshal([]byte(r.ok(append(args, "--json")...)), v); err != nil {
		r.t.Fatal(err)
	}
}

func (r *road) start() {
	r.t.Helper()
	r.serve = exec.Command(r.bin, "serve", "--dir", r.dir+"/inst")
	r.serve.Stderr = os.Stderr
	if err := r.serve.Start(); err != nil {
		r.t.Fatal(err)
	}
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(100 * time.Millisecond) {
		if code, _ := r.run("server", "list"); code == exitOK {
			return
		}
		if time.Now().After(deadline) {
			r.t.Fatal("muster serve does not answer")
		}
	}
}

func (r *road) stop(sig syscall.Signal) {
	if r.serve != nil {
		_ = r.serve.Process.Signal(sig)
		_ = r.serve.Wait()
		r.serve = nil
	}
}

// image copies the shop's disk and lets a test spoil the copy.
func (r *road) image(name string, spoil func(f *os.File) error) string {
	r.t.Helper()
	path := filepath.Join(r.dir, name)
	if out, err := exec.Command("cp", "--sparse=always", os.Getenv("MUSTER_SHOP"), path).CombinedOutput(); err != nil {
		r.t.Fatalf("copy the shop's disk: %v: %s", err, out)
	}
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err == nil {
		err = spoil(f)
	}
	if err == nil {
		err = f.Close()
	}
	if err != nil {
		r.t.Fatal(err)
	}
	return path
}

func (r *road) newest(server string) dr.Record {
	r.t.Helper()
	var list []dr.Record
	r.read(&list, "snapshots", server)
	if len(list) == 0 {
		r.t.Fatalf("%s has no snapshot", server)
	}
	return list[0]
}

// mustBeClean insists that no machine, socket or scratch layer is left.
func (r *road) mustBeClean() {
	r.t.Helper()
	out, err := exec.Command("virsh", "-c", "qemu:///system", "list", "--all", "--name").Output()
	if err != nil || strings.TrimSpace(string(out)) != "" {
		r.t.Errorf("machines left: %q, %v", out, err)
	}
	for _, dir := range []string{"scratch", "live"} {
		left, err := os.ReadDir(r.dir + "/inst/silo/" + dir)
		if err != nil || len(left) > 0 {
			r.t.Errorf("left in %s: %v, %v", dir, left, err)
		}
	}
}

func TestImagesThatCannotBootAreRefusedByNameAndCode(t *testing.T) {
	r := newRoad(t)
	// A boot sector that hands back to the firmware at once (int 18h) looks like a boot loader until it is booted.
	noLoader := r.image("noloader.raw", func(f *os.File) error {
		_, err := f.WriteAt([]byte{0xcd, 0x18}, 0)
		return err
	})
	empty := filepath.Join(r.dir, "empty.raw")
	if err := os.WriteFile(empty, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	blank := filepath.Join(r.dir, "blank.raw")
	if err := os.WriteFile(blank, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(blank, 64<<20); err != nil {
		t.Fatal(err)
	}
	if code, _ := r.run("server", "add", "empty", "--disk", empty); code == exitOK {
		t.Error("an empty file was taken for a disk")
	}
	for server, c := range map[string]struct {
		disk string
		code dr.Code
	}{"noloader": {noLoader, dr.CodeNoBootable}, "blank": {blank, dr.CodeNotBooted}} {
		r.ok("server", "add", server, "--disk", c.disk, "--every", "9000h")
		r.settle(server)
		rec := r.newest(server)
		if rec.State != dr.Rejected || rec.Verdict == nil || rec.Verdict.Code != c.code {
			t.Errorf("%s: %s %+v, want FAIL (%s)", server, rec.State, rec.Verdict, c.code)
		}
		if code, _ := r.run("test", server); code != exitTestFailed {
			t.Errorf("%s: testing it again exits with %d, want %d", server, code, exitTestFailed)
		}
	}
	var tickets []dr.Ticket
	r.read(&tickets, "tickets")
	if len(tickets) != 2 {
		t.Errorf("%d tickets, want one a server: %+v", len(tickets), tickets)
	}
	if code, _ := r.run("invoke", "noloader", "--yes"); code != exitRefused {
		t.Errorf("an image that failed was invoked: exit code %d", code)
	}
	r.mustBeClean()
}

// settle waits until nothing is under way for a server that has been captured.
func (r *road) settle(server string) {
	r.t.Helper()
	for deadline := time.Now().Add(10 * time.Minute); ; time.Sleep(200 * time.Millisecond) {
		var s api.ServerStatus
		r.read(&s, "server", "show", server)
		if s.Newest != nil && s.Operation == nil {
			return
		}
		if time.Now().After(deadline) {
			r.t.Fatalf("%s does not come to rest: %+v", server, s.Operation)
		}
	}
}

func TestKilledInABootTestItGoesOnAndADamagedStoreIsNeverInvokedAsGood(t *testing.T) {
	r := newRoad(t)
	disk := r.image("shop.raw", func(*os.File) error { return nil })
	r.ok("server", "add", "shop", "--disk", disk, "--every", "9000h")
	r.whileTesting("shop")
	r.stop(syscall.SIGKILL)
	r.start()
	r.settle("shop")
	good := r.newest("shop")
	if !good.LKG || good.Verdict == nil || good.Verdict.Outcome != dr.Pass {
		t.Fatalf("after kill -9 in the boot test: %s, %+v", good.State, good.Verdict)
	}
	r.mustBeClean()
	r.ok("store", "verify")

	r.stop(syscall.SIGTERM)
	r.flipEveryPack()
	r.start()
	if code, out := r.run("store", "verify"); code != exitDamaged || !strings.Contains(out, "disk 0") {
		t.Errorf("verify of a damaged store: exit code %d: %s", code, out)
	}
	if code, _ := r.run("test", "shop"); code != exitTestFailed {
		t.Errorf("a boot from a damaged store: exit code %d, want %d", code, exitTestFailed)
	}
	bad := r.newest("shop")
	if bad.Verdict == nil || bad.Verdict.Code != dr.CodeDiskError || !bad.LKG {
		t.Errorf("verdict %+v, last-known-good %v; want FAIL (%s), and last-known-good as it was", bad.Verdict, bad.LKG, dr.CodeDiskError)
	}
	r.mustBeClean()
}

// whileTesting waits until a server's machine runs in a boot test.
func (r *road) whileTesting(server string) {
	r.t.Helper()
	for deadline := time.Now().Add(10 * time.Minute); ; time.Sleep(200 * time.Millisecond) {
		var s api.ServerStatus
		r.read(&s, "server", "show", server)
		if s.Operation != nil && s.Operation.Step == "test" && s.Operation.Part == "boot" {
			return
		}
		if time.Now().After(deadline) {
			r.t.Fatalf("%s is never tested: %+v", server, s.Operation)
		}
	}
}

// flipEveryPack changes bytes throughout every large blob of the store.
func (r *road) flipEveryPack() {
	r.t.Helper()
	flipped := 0
	err := filepath.WalkDir(r.dir+"/inst/store", func(path string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		info, err := e.Info()
		if err != nil || info.Size() < 4<<20 {
			return err
		}
		f, err := os.OpenFile(path, os.O_RDWR, 0)
		if err != nil {
			return err
		}
		defer f.Close()
		for off := int64(1 << 20); off < info.Size()-1<<20; off += 256 << 10 {
			if _, err := f.WriteAt([]byte("damage"), off); err != nil {
				return err
			}
			flipped++
		}
		return nil
	})
	if err != nil || flipped == 0 {
		r.t.Fatalf("damaged %d places: %v", flipped, err)
	}
}
