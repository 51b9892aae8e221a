package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"sync/atomic"
	"time"

	"github.com/musterdr/muster/internal/dr"
	"github.com/musterdr/muster/internal/store"
	"github.com/musterdr/muster/internal/store/folder"
	"github.com/musterdr/muster/internal/store/remote"
	"github.com/musterdr/muster/internal/trust"
)

// line counts what goes over a line, both ways, and cuts it when it is told to.
type line struct {
	net.Listener
	bytes atomic.Int64
	in    atomic.Int64
	cutAt atomic.Int64 // of bytes that came in; 0: never
}

func (w *line) Accept() (net.Conn, error) {
	c, err := w.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return &counter{c, w}, nil
}

type counter struct {
	net.Conn
	w *line
}

func (c *counter) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	c.w.bytes.Add(int64(n))
	in := c.w.in.Add(int64(n))
	if at := c.w.cutAt.Load(); at > 0 && in >= at && c.w.cutAt.CompareAndSwap(at, 0) {
		return 0, errors.Join(errors.New("cut"), c.Conn.Close())
	}
	return n, err
}

func (c *counter) Write(p []byte) (int, error) {
	n, err := c.Conn.Write(p)
	c.w.bytes.Add(int64(n))
	return n, err
}

// away is a far store behind the line of a node to its master, which is counted.
type away struct {
	*line
	drv   store.Driver
	dir   string
	close func()
}

const awayAt = "/store" // where a master has its store

func (b *bench) newAway(name string) (*away, error) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	return b.newAwayAt(name, listener)
}

// newAwayAt makes one that is reached by a listener.
func (b *bench) newAwayAt(name string, listener net.Listener) (*away, error) {
	dir, err := b.fresh(name)
	if err != nil {
		return nil, errors.Join(err, listener.Close())
	}
	s := remote.NewServer(func(r *http.Request) (store.Driver, remote.Rights, error) {
		if _, ok := trust.PeerOf(r.Context()); !ok {
			return nil, remote.None, errors.New("only nodes have to do with this store")
		}
		return folder.Driver{Path: filepath.Join(dir, "store")}, remote.Make, nil
	})
	w := &line{Listener: listener}
	ctx, stop := context.WithCancel(context.Background())
	node, hub, err := join(ctx, dir, listener.Addr().String())
	if err != nil {
		stop()
		return nil, errors.Join(err, listener.Close())
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		if err := hub.Serve(ctx, w, map[string]http.Handler{awayAt + "/": http.StripPrefix(awayAt, s)}); err != nil {
			slog.Error("serve nodes", "error", err)
		}
	}()
	client, err := node()
	a := &away{line: w, dir: dir, close: func() {
		stop()
		<-ended
		_ = s.Close(context.Background())
		_ = os.RemoveAll(dir)
	}}
	if err != nil {
		a.close()
		return nil, err
	}
	a.drv = remote.New(client, "https://master"+awayAt)
	return a, nil
}

// join makes a master and an appliance that is about to join it: node does so once the hub serves.
func join(ctx context.Context, dir, address string) (node func() (*http.Client, error), hub *trust.Hub, err error) {
	at := filepath.Join(dir, "master")
	if err := trust.Create(at, trust.Plan{Name: "bench", Listen: address, KeyFile: filepath.Join(dir, "master.key")}); err != nil {
		return nil, nil, err
	}
	authority, err := trust.Open(at, nil)
	if err != nil {
		return nil, nil, err
	}
	if _, err := authority.MakeCustomerKey("bench"); err != nil {
		return nil, nil, err
	}
	token, err := authority.Enrol(trust.Peer{Role: trust.Appliance, Customer: "bench", Name: "box"}, time.Hour, []string{address})
	if err != nil {
		return nil, nil, err
	}
	return func() (*http.Client, error) {
		n, err := trust.Join(ctx, filepath.Join(dir, "box"), token)
		if err != nil {
			return nil, err
		}
		return n.Client(), nil
	}, trust.NewHub(authority, slog.New(slog.DiscardHandler)), nil
}

// seconds that it takes to replicate a snapshot, and what went over the line.
func (a *away) replicate(ctx context.Context, near *store.Store, id string) (took float64, sent int64, err error) {
	took, sent, _, err = a.replicated(ctx, near, id)
	return took, sent, err
}

func (a *away) replicated(ctx context.Context, near *store.Store, id string) (took float64, sent int64, what store.Replicated, err error) {
	far, err := store.Open(ctx, a.drv, password)
	if err != nil {
		return 0, 0, what, err
	}
	defer far.Close(ctx)
	before, began := a.bytes.Load(), time.Now()
	for range maxTries {
		if what, err = store.Replicate(ctx, near, far, id, store.ReplicateOptions{}, nil); err == nil || ctx.Err() != nil {
			break
		}
	}
	return time.Since(began).Seconds(), a.bytes.Load() - before, what, err
}

// maxTries is how often a replication over a line that is cut is tried.
const maxTries = 50

// replicates measures the road from a near store to a far one.
func replicates(ctx context.Context, b *bench) (rows []Row, err error) {
	dir, err := b.fresh("replicate")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	disk := filepath.Join(dir, "disk.raw")
	if out, err := exec.CommandContext(ctx, "cp", "--sparse=always", b.image, disk).CombinedOutput(); err != nil {
		return nil, fmt.Errorf("copy image: %w: %s", err, out)
	}
	near, nearDir, err := b.newStore(ctx, "replicate-near")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(nearDir)
	defer near.Close(ctx)
	first := dr.NewSnapshotID(time.Now())
	if err := keepFile(ctx, near, first, "", disk, nil, nil); err != nil {
		return nil, err
	}
	row, err := b.throughput(ctx, near, filepath.Join(nearDir, "store"), first)
	if err != nil {
		return nil, err
	}
	rows = append(rows, row)
	if row, err = b.cuts(ctx, near, filepath.Join(dir, "noise.raw")); err != nil {
		return rows, err
	}
	rows = append(rows, row)
	if row, err = b.distance(ctx, near, first); err != nil {
		return rows, err
	}
	rows = append(rows, row)

	far, err := b.newAway("replicate-far")
	if err != nil {
		return rows, err
	}
	defer far.close()
	if err := store.CreateLike(ctx, far.drv, password, near); err != nil {
		return rows, err
	}
	_, full, err := far.replicate(ctx, near, first)
	if err != nil {
		return rows, err
	}
	// A second server of the customer with the same system on it, behind an appliance of its own.
	twinID := dr.NewSnapshotID(time.Now())
	second, secondDir, err := b.second(ctx, near, disk, twinID)
	if err != nil {
		return rows, err
	}
	_, twin, err := far.replicate(ctx, second, twinID)
	_ = second.Close(ctx)
	_ = os.RemoveAll(secondDir)
	if err != nil {
		return rows, err
	}
	snap, err := near.Snapshot(ctx, first)
	if err != nil {
		return rows, err
	}
	size := snap.Disks[0].Data
	rows = append(rows, lower("replicate: the same again / size", float64(twin)/float64(size), 0.01,
		"bytes on the line, both ways, to replicate a second server with the same disk, which another appliance of the customer captured, over what the disk holds",
		fmt.Sprintf("%.2f MB for %.0f MB; the first took %.1f MB", float64(twin)/1e6, float64(size)/1e6, float64(full)/1e6)))

	extents, together, err := scatter(ctx, disk, dir)
	if err != nil {
		return rows, err
	}
	peer, err := zstdBlocks(ctx, filepath.Join(dir, "changed"))
	if err != nil {
		return rows, err
	}
	next := dr.NewSnapshotID(time.Now().Add(time.Second))
	if err := keepFile(ctx, near, next, first, disk, extents, nil); err != nil {
		return rows, err
	}
	took, inc, what, err := far.replicated(ctx, near, next)
	if err != nil {
		return rows, err
	}
	rows = append(rows, lower("replicate: increment on the line / zstd -1", float64(inc)/float64(peer), 1.05,
		"bytes on the line, both ways, with TLS and all questions, to replicate an increment of 1 % of the disk's non-zero blocks, over the sum of these blocks, each compressed by 'zstd -1'",
		fmt.Sprintf("%.2f MB on the line, %.2f MB of them blobs; by zstd %.2f MB, %.2f MB as one file; %.1f s", float64(inc)/1e6, float64(what.Sent)/1e6, float64(peer)/1e6, float64(together)/1e6, took)))
	return rows, nil
}

// zstdBlocks is how large the blocks in a file are, each compressed by 'zstd -1'.
func zstdBlocks(ctx context.Context, file string) (total int64, err error) {
	dir, err := os.MkdirTemp(filepath.Dir(file), "blocks-")
	if err != nil {
		return 0, err
	}
	defer os.RemoveAll(dir)
	if _, err := timed(ctx, os.Environ(), "split", "-b", fmt.Sprint(store.DefaultBlockSize), file, filepath.Join(dir, "b")); err != nil {
		return 0, err
	}
	if _, err := timed(ctx, os.Environ(), "zstd", "-1", "-q", "--no-check", "-r", dir); err != nil {
		return 0, err
	}
	packed, err := filepath.Glob(filepath.Join(dir, "*.zst"))
	if err != nil || len(packed) == 0 {
		return 0, errors.Join(err, errors.New("zstd left nothing"))
	}
	for _, p := range packed {
		info, err := os.Stat(p)
		if err != nil {
			return 0, err
		}
		total += info.Size()
	}
	return total, nil
}

// second is the near store of another appliance of the customer, with a snapshot of the same disk.
func (b *bench) second(ctx context.Context, like *store.Store, disk, id string) (*store.Store, string, error) {
	dir, err := b.fresh("replicate-second")
	if err != nil {
		return nil, "", err
	}
	drv := folder.Driver{Path: filepath.Join(dir, "store")}
	if err := store.CreateLike(ctx, drv, password, like); err != nil {
		return nil, dir, err
	}
	st, err := store.Open(ctx, drv, password)
	if err != nil {
		return nil, dir, err
	}
	return st, dir, keepFile(ctx, st, id, "", disk, nil, nil)
}

// throughput compares a first copy with rsync of the same sealed bytes over SSH, both over loopback into empty folders.
func (b *bench) throughput(ctx context.Context, near *store.Store, nearPath, id string) (Row, error) {
	ssh, err := b.newSSH(ctx)
	if err != nil {
		return Row{}, err
	}
	defer ssh.close()
	var ours, theirs []float64
	var bytes int64
	for range max(b.runs, 9) { // one is a second, and disks have moods
		far, err := b.newAway("replicate-far")
		if err != nil {
			return Row{}, err
		}
		if err := store.CreateLike(ctx, far.drv, password, near); err != nil {
			far.close()
			return Row{}, err
		}
		took, sent, err := far.replicate(ctx, near, id)
		far.close()
		if err != nil {
			return Row{}, err
		}
		ours, bytes = append(ours, took), sent
		peer, err := ssh.rsync(ctx, nearPath)
		if err != nil {
			return Row{}, err
		}
		theirs = append(theirs, peer)
	}
	return higher("replicate: first copy vs rsync", median(theirs)/median(ours), 1.5,
		"seconds 'rsync -a' takes to copy the near store's folder over SSH on loopback, without syncing, over seconds Muster takes to replicate the snapshot in it over a node's line to its master on loopback: proven here, synced, read back from the medium there, published; medians",
		fmt.Sprintf("%.0f MB: muster %.1f s (%.0f MB/s), rsync %.1f s (%.0f MB/s)", float64(bytes)/1e6, median(ours), float64(bytes)/1e6/median(ours), median(theirs), float64(bytes)/1e6/median(theirs))), nil
}

// noise writes a file of bytes that do not compress.
func noise(path string, size int64) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	_, err = io.CopyN(f, rand.NewChaCha8([32]byte{1}), size)
	return errors.Join(err, f.Close())
}

// cuts replicates a snapshot over a line that is cut at twenty random bytes.
func (b *bench) cuts(ctx context.Context, near *store.Store, disk string) (Row, error) {
	const times, size = 20, 1 << 30
	if err := noise(disk, size); err != nil {
		return Row{}, err
	}
	defer os.Remove(disk)
	id := dr.NewSnapshotID(time.Now())
	if err := keepFile(ctx, near, id, "", disk, nil, nil); err != nil {
		return Row{}, err
	}
	defer func() { _ = near.Forget(ctx, id) }()
	var sent [2]int64
	for i := range sent {
		far, err := b.newAway("replicate-cut")
		if err != nil {
			return Row{}, err
		}
		err = store.CreateLike(ctx, far.drv, password, near)
		if err != nil {
			far.close()
			return Row{}, err
		}
		done := make(chan struct{})
		cut := 0
		if i == 1 {
			go func() {
				defer close(done)
				r := rand.New(rand.NewPCG(7, 7))
				for cut < times && far.in.Load() < sent[0] {
					far.cutAt.Store(far.in.Load() + 1 + r.Int64N(sent[0]/(times+5)*2))
					for far.cutAt.Load() != 0 && far.in.Load() < sent[0] {
						time.Sleep(time.Millisecond)
					}
					cut++
				}
			}()
		}
		_, sent[i], err = far.replicate(ctx, near, id)
		far.close()
		if err != nil {
			return Row{}, err
		}
		if i == 1 {
			<-done
			return lower("replicate: sent with 20 cuts / without", float64(sent[1])/float64(sent[0]), 1.02,
				"bytes on the line to replicate the first snapshot of a disk of 1 GiB while the connection is cut at random bytes, over bytes on the line without a cut",
				fmt.Sprintf("%.1f MB with %d cuts, %.1f MB without", float64(sent[1])/1e6, cut, float64(sent[0])/1e6)), nil
		}
	}
	return Row{}, nil
}

// sshd is an SSH server on loopback for rsync.
type sshd struct {
	dir  string
	port string
	end  func()
}

func (b *bench) newSSH(ctx context.Context) (*sshd, error) {
	dir, err := b.fresh("replicate-ssh")
	if err != nil {
		return nil, err
	}
	s := &sshd{dir: dir}
	for _, key := range []string{"host", "user"} {
		if out, err := exec.CommandContext(ctx, "ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", filepath.Join(dir, key)).CombinedOutput(); err != nil {
			return nil, fmt.Errorf("make key: %w: %s", err, out)
		}
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	_, s.port, _ = net.SplitHostPort(l.Addr().String())
	_ = l.Close()
	if err := os.MkdirAll("/run/sshd", 0o755); err != nil {
		return nil, err
	}
	c := exec.CommandContext(ctx, "/usr/sbin/sshd", "-D", "-e", "-f", "/dev/null", "-p", s.port, "-o", "ListenAddress=127.0.0.1", "-o", "HostKey="+filepath.Join(dir, "host"),
		"-o", "AuthorizedKeysFile="+filepath.Join(dir, "user.pub"), "-o", "StrictModes=no", "-o", "PidFile=none")
	if err := c.Start(); err != nil {
		return nil, err
	}
	s.end = func() { _ = c.Process.Kill(); _ = c.Wait() }
	for range 100 {
		if conn, err := net.Dial("tcp", "127.0.0.1:"+s.port); err == nil {
			return s, conn.Close()
		}
		time.Sleep(50 * time.Millisecond)
	}
	s.end()
	return nil, errors.New("the SSH server does not answer")
}

func (s *sshd) close() {
	s.end()
	_ = os.RemoveAll(s.dir)
}

func (s *sshd) rsync(ctx context.Context, from string) (float64, error) {
	to := filepath.Join(s.dir, "copy")
	if err := os.RemoveAll(to); err != nil {
		return 0, err
	}
	shell := "ssh -p " + s.port + " -i " + filepath.Join(s.dir, "user") + " -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR"
	return timed(ctx, os.Environ(), "rsync", "-a", "-e", shell, from+"/", "127.0.0.1:"+to+"/")
}
