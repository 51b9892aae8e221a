package image

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os/exec"
	"path/filepath"
	"sort"
	"strings"
	"testing"
	"time"
)

// BenchmarkAgainstOtherServers reads one file of random data through us, nbdkit and qemu-nbd by turns, and reports our
// throughput as a ratio to each of theirs: the median of the rounds.
func BenchmarkAgainstOtherServers(b *testing.B) {
	needTools(b)
	const size = 512 << 20
	path := filepath.Join(b.TempDir(), "disk.raw")
	tool(b, "fio", "--name=fill", "--filename="+path, "--rw=write", "--bs=1m", fmt.Sprintf("--size=%d", size),
		"--refill_buffers")
	dir := shortDir(b)
	uris := map[string]string{
		"muster":   offer(b, quiet(), "disk/0", openFile(b, path)),
		"nbdkit":   start(b, filepath.Join(dir, "nbdkit"), "nbdkit", "-f", "-r", "-U", filepath.Join(dir, "nbdkit"), "file", path),
		"qemu-nbd": start(b, filepath.Join(dir, "qemu"), "qemu-nbd", "-r", "-t", "-e", "8", "-f", "raw", "-k", filepath.Join(dir, "qemu"), path),
	}
	for what, measure := range map[string]func(uri string) float64{
		"nbdcopy": func(uri string) float64 {
			begun := time.Now()
			tool(b, "nbdcopy", uri, "null:")
			return size / time.Since(begun).Seconds()
		},
		"randread-4k-16": func(uri string) float64 { return randread(b, uri, 16) },
		"randread-4k-1":  func(uri string) float64 { return randread(b, uri, 1) },
	} {
		b.Run(what, func(b *testing.B) {
			seen := map[string][]float64{}
			for range b.N {
				for _, server := range []string{"muster", "nbdkit", "qemu-nbd"} {
					seen[server] = append(seen[server], measure(uris[server]))
				}
			}
			ours := median(seen["muster"])
			b.ReportMetric(ours, "ours/s")
			b.ReportMetric(ours/median(seen["nbdkit"]), "/nbdkit")
			b.ReportMetric(ours/median(seen["qemu-nbd"]), "/qemu-nbd")
		})
	}
}

func randread(b *testing.B, uri string, depth int) float64 {
	out := tool(b, "fio", "--name=read", "--ioengine=nbd", "--uri="+uri, "--readonly", "--rw=randread", "--bs=4k",
		fmt.Sprintf("--iodepth=%d", depth), "--size=512m", "--time_based", "--runtime=3", "--output-format=json")
	var result struct {
		Jobs []struct{ Read struct{ IOPS float64 } }
	}
	if err := json.Unmarshal([]byte(out[max(0, strings.Index(out, "{")):]), &result); err != nil || len(result.Jobs) != 1 {
		b.Fatalf("fio said %s, %v", out, err)
	}
	return result.Jobs[0].Read.IOPS
}

func median(all []float64) float64 {
	sort.Float64s(all)
	return all[len(all)/2]
}

// start runs a server until the benchmark ends and waits for its socket.
func start(b *testing.B, socket, name string, args ...string) (uri string) {
	b.Helper()
	cmd := exec.CommandContext(context.Background(), name, args...)
	if err := cmd.Start(); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	waitFor(b, name, func() bool {
		conn, err := net.Dial("unix", socket)
		if err == nil {
			_ = conn.Close()
		}
		return err == nil
	})
	return "nbd+unix:///?socket=" + socket
}
