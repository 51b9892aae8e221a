package store_test

import (
	"bytes"
	"context"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"sort"
	"strings"
	"testing"
	"time"

	"github.com/musterdr/muster/internal/dr"
	"github.com/musterdr/muster/internal/image"
	"github.com/musterdr/muster/internal/store/storetest"
)

// stockKopia builds the kopia command from the module this one uses.
func stockKopia(t *testing.T) string {
	t.Helper()
	if os.Getenv("MUSTER_REAL") == "" {
		t.Skip("set MUSTER_REAL=1 to check with the stock kopia command")
	}
	out, err := exec.Command("go", "list", "-m", "-f", "{{.Dir}}", "github.com/kopia/kopia").Output()
	if err != nil {
		t.Fatal(err)
	}
	bin := filepath.Join(t.TempDir(), "kopia")
	build := exec.Command("go", "build", "-o", bin, ".")
	build.Dir = strings.TrimSpace(string(out))
	build.Env = append(os.Environ(), "GOFLAGS=-mod=mod", "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build kopia: %v\n%s", err, out)
	}
	return bin
}

func TestStockKopiaReadsWhatIsKept(t *testing.T) {
	kopia := stockKopia(t)
	dir := t.TempDir()
	path := filepath.Join(dir, "store")
	s := newStore(t, path)
	d := storetest.NewDisk(70<<20+777, 1)
	clear(d.Data[2<<20 : 3<<20])
	old := digest(d.Data)
	full := ingest(t, s, "snap-1", "", d, nil)
	storetest.Noise(d.Data[5<<20:6<<20], 2)
	inc := ingest(t, s, "snap-2", "snap-1", d, []image.Extent{{Offset: 5 << 20, Length: 1 << 20}})
	if err := s.Keep(t.Context(), "snap-2", "delta", strings.NewReader("kept")); err != nil {
		t.Fatal(err)
	}
	if err := s.PutRecord(t.Context(), "server", "srv-1", dr.Server{ID: "srv-1"}); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(context.Background()); err != nil {
		t.Fatal(err)
	}

	env := []string{"KOPIA_PASSWORD=secret", "KOPIA_CONFIG_PATH=" + filepath.Join(dir, "kopia.config"), "KOPIA_CHECK_FOR_UPDATES=false",
		"KOPIA_CACHE_DIRECTORY=" + filepath.Join(dir, "cache"), "KOPIA_LOG_DIR=" + filepath.Join(dir, "log"), "HOME=" + dir}
	stock := func(args ...string) string {
		t.Helper()
		cmd := exec.Command(kopia, args...)
		cmd.Env = append(os.Environ(), env...)
		var errs bytes.Buffer
		cmd.Stderr = &errs
		out, err := cmd.Output()
		if err != nil {
			t.Fatalf("kopia %s: %v\n%s%s", strings.Join(args, " "), err, out, errs.String())
		}
		return string(out)
	}
	stock("repository", "connect", "filesystem", "--path", path)
	if list := stock("snapshot", "list", "--all"); strings.Count(list, "shop") == 0 {
		t.Errorf("kopia snapshot list does not show the server:\n%s", list)
	} else {
		t.Log("\n" + list)
	}
	stock("snapshot", "verify", "--verify-files-percent=100")
	stock("content", "verify", "--full")
	if got := digest([]byte(stock("show", full.Disks[0].Root))); got != old {
		t.Error("kopia shows another disk than was kept")
	}
	if got := digest([]byte(stock("show", inc.Disks[0].Root))); got != digest(d.Data) {
		t.Error("kopia shows another increment than was kept")
	}
	// The maintenance of a stock command must keep its hands off.
	cmd := exec.Command(kopia, "maintenance", "run", "--full")
	cmd.Env = append(os.Environ(), env...)
	if out, err := cmd.CombinedOutput(); err == nil || !bytes.Contains(out, []byte("muster@muster")) {
		t.Errorf("a stock command may run maintenance: %v\n%s", err, out)
	}
	restored := restoreByKopia(t, stock, dir)
	if digest(restored) != digest(d.Data) {
		t.Error("the segments kopia restores are not the disk")
	}
	s = openStore(t, path)
	if _, err := s.Verify(t.Context(), "snap-2", nil); err != nil {
		t.Error(err)
	}
}

// restoreByKopia restores snap-2 with the stock command and puts its first disk together.
func restoreByKopia(t *testing.T, stock func(...string) string, dir string) []byte {
	t.Helper()
	var list []struct {
		ID   string            `json:"id"`
		Tags map[string]string `json:"tags"`
	}
	if err := json.Unmarshal([]byte(stock("snapshot", "list", "--all", "--json")), &list); err != nil {
		t.Fatal(err)
	}
	for _, m := range list {
		if m.Tags["tag:snapshot"] != "snap-2" || m.Tags["tag:muster"] != "snapshot" {
			continue
		}
		to := filepath.Join(dir, "restored")
		stock("snapshot", "restore", m.ID, to)
		files, err := filepath.Glob(filepath.Join(to, "disk0", "disk.segs", "*.seg"))
		if err != nil {
			t.Fatal(err)
		}
		sort.Strings(files)
		var all bytes.Buffer
		for _, f := range files {
			data, err := os.ReadFile(f)
			if err != nil {
				t.Fatal(err)
			}
			all.Write(data)
		}
		var doc struct{ Snapshot dr.Snapshot }
		data, err := os.ReadFile(filepath.Join(to, "snapshot.json"))
		if err != nil {
			t.Fatal(err)
		}
		if err := json.Unmarshal(data, &doc); err != nil || doc.Snapshot.ID != "snap-2" || doc.Snapshot.Taken.After(time.Now()) {
			t.Errorf("the manifest kopia restores: %+v, %v", doc, err)
		}
		return all.Bytes()
	}
	t.Fatal("kopia does not list the snapshot")
	return nil
}
