package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/musterdr/muster/internal/boottest"
	"github.com/musterdr/muster/internal/dr"
	"github.com/musterdr/muster/internal/image"
	"github.com/musterdr/muster/internal/prerecover"
	"github.com/musterdr/muster/internal/prerecover/guestfs"
	"github.com/musterdr/muster/internal/vm"
	"github.com/musterdr/muster/internal/vm/libvirt"
	"github.com/musterdr/muster/internal/vm/network"
)

// rig is the protected shop: its last-known-good, the raw disk of the same content, and a hypervisor.
type rig struct {
	hv     *libvirt.Hypervisor
	record dr.Record
	raw    string // the snapshot's disk copied out, readable for machines
	delta  string
	socket string // the exporter's
	pid    int
	stop   func()
}

// ask runs the muster command on the installation and reads what it prints.
func (b *bench) ask(ctx context.Context, out any, args ...string) error {
	c := exec.CommandContext(ctx, filepath.Join(b.bin, "muster"), append(args, "--dir", b.dir, "--json")...)
	var stderr strings.Builder
	c.Stderr = &stderr
	raw, err := c.Output()
	if err != nil {
		return fmt.Errorf("muster %s: %w: %s", strings.Join(args, " "), err, stderr.String())
	}
	if out == nil {
		return nil
	}
	return json.Unmarshal(raw, out)
}

// newRig exports the server's last-known-good in a process of its own and copies its first disk out.
func (b *bench) newRig(ctx context.Context) (*rig, error) {
	if b.dir == "" {
		return nil, errors.New("give --dir: an installation that is served and has a last-known-good of the server 'shop'")
	}
	var status struct {
		LKG *dr.Record `json:"lkg"`
	}
	if err := b.ask(ctx, &status, "server", "show", "shop"); err != nil {
		return nil, err
	}
	if status.LKG == nil {
		return nil, errors.New("the server 'shop' has no last-known-good")
	}
	r := &rig{}
	if err := b.ask(ctx, &r.record, "snapshots", "shop", "--show", status.LKG.Snapshot.ID); err != nil {
		return nil, err
	}
	var err error
	if r.hv, err = libvirt.Open(ctx, libvirt.Config{ProbeFile: filepath.Join(b.dir, "kvm-probe.json")}); err != nil {
		return nil, err
	}
	dir, err := b.fresh("rig")
	if err != nil {
		return nil, err
	}
	r.socket = filepath.Join(dir, "x.sock")
	r.delta = r.record.PreRecovery.Deltas[0]
	_, gid := r.hv.User()
	c := exec.CommandContext(ctx, filepath.Join(b.bin, "muster"), "export", r.record.Snapshot.ID, "--dir", b.dir, "--socket", r.socket, "--group", strconv.Itoa(gid))
	c.Env = append(os.Environ(), "GOMEMLIMIT=120MiB")
	c.Stderr = os.Stderr
	c.Cancel = func() error { return c.Process.Signal(syscall.SIGTERM) }
	if err := c.Start(); err != nil {
		return nil, err
	}
	r.pid = c.Process.Pid
	r.stop = func() {
		_ = c.Process.Signal(syscall.SIGTERM)
		_ = c.Wait()
		_ = r.hv.Close()
		_ = os.RemoveAll(dir)
	}
	for start := time.Now(); ; time.Sleep(20 * time.Millisecond) {
		if _, err := os.Stat(r.socket); err == nil {
			break
		}
		if time.Since(start) > 30*time.Second {
			r.stop()
			return nil, errors.New("the exporter did not start")
		}
	}
	r.raw = filepath.Join(dir, "disk.raw")
	if out, err := exec.CommandContext(ctx, "nbdcopy", "nbd+unix:///?socket="+r.socket, r.raw).CombinedOutput(); err != nil {
		r.stop()
		return nil, fmt.Errorf("copy disk: %w: %s", err, out)
	}
	return r, os.Chmod(r.raw, 0o644)
}

func (r *rig) throughStore() []vm.Layer {
	return []vm.Layer{{Path: r.delta, Format: "qcow2"}, {Socket: r.socket, Export: r.record.Snapshot.ID + "/0", Format: "raw"}}
}

func (r *rig) fromRaw() []vm.Layer {
	return []vm.Layer{{Path: r.delta, Format: "qcow2"}, {Path: r.raw, Format: "raw"}}
}

// boot times the same machine with the same delta over the store's export and over a raw file, in turn.
func boot(ctx context.Context, b *bench) ([]Row, error) {
	r, err := b.newRig(ctx)
	if err != nil {
		return nil, err
	}
	defer r.stop()
	var store, raw []float64
	for range b.runs {
		s, err := b.timeBoot(ctx, r, r.throughStore())
		if err != nil {
			return nil, err
		}
		f, err := b.timeBoot(ctx, r, r.fromRaw())
		if err != nil {
			return nil, err
		}
		store, raw = append(store, s), append(raw, f)
	}
	peak, err := peakMemory(r.pid)
	if err != nil {
		return nil, err
	}
	return []Row{
		lower("boot to login: store / raw file", median(store)/median(raw), 1.10,
			"seconds from starting the shop's machine until it is up (its test agent answers, init has no job left, every port of the original listens), reading its disk through the store, over the same from a raw file; medians, in turn",
			fmt.Sprintf("store %.1f s, raw %.1f s", median(store), median(raw))),
		lower("memory of the export, MiB", float64(peak)/(1<<20), 192,
			"largest resident memory of the process that exports the disk, over those boots and one copy of the whole disk", ""),
	}, nil
}

func (b *bench) timeBoot(ctx context.Context, r *rig, layers []vm.Layer) (float64, error) {
	dir, err := b.fresh("boot")
	if err != nil {
		return 0, err
	}
	defer os.RemoveAll(dir)
	v, err := boottest.Run(ctx, r.hv, boottest.Request{VerdictID: dr.NewID("verdict"), Snapshot: r.record.Snapshot, PreRecovery: *r.record.PreRecovery,
		Disks: []vm.Disk{{Layers: layers}}, ScratchDir: dir, EvidenceDir: filepath.Join(dir, "evidence")}, nil)
	if err != nil {
		return 0, err
	}
	if v.Outcome != dr.Pass {
		return 0, fmt.Errorf("the shop did not pass: %s %s", v.Outcome, v.Summary)
	}
	var total time.Duration
	for _, p := range v.Phases {
		switch p.Name {
		case dr.PhaseFirmware, dr.PhaseKernel, dr.PhaseUserspace, dr.PhaseStable:
			total += p.Duration
		}
	}
	return total.Seconds(), nil
}

func peakMemory(pid int) (int64, error) {
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(raw)) {
		if rest, ok := strings.CutPrefix(line, "VmHWM:"); ok {
			kib, err := strconv.ParseInt(strings.Fields(rest)[0], 10, 64)
			return kib << 10, err
		}
	}
	return 0, errors.New("the kernel does not say VmHWM")
}

// prerecoverSize times making a rescue image of the shop's disk and of one of 200 GB with the same content.
func prerecoverSize(ctx context.Context, b *bench) ([]Row, error) {
	small, err := b.timePreRecover(ctx, 0)
	if err != nil {
		return nil, err
	}
	large, err := b.timePreRecover(ctx, 200<<30)
	if err != nil {
		return nil, err
	}
	return []Row{lower("pre-recovery: 200 GB / 4 GB", large/small, 1.2,
		"seconds to make a rescue image of a sparse disk of 200 GB, over those for one of 4 GB with the same content; medians",
		fmt.Sprintf("4 GB %.1f s, 200 GB %.1f s", small, large))}, nil
}

func (b *bench) timePreRecover(ctx context.Context, size int64) (float64, error) {
	dir, err := b.fresh("size")
	if err != nil {
		return 0, err
	}
	defer os.RemoveAll(dir)
	disk := filepath.Join(dir, "disk.raw")
	if out, err := exec.CommandContext(ctx, "cp", "--sparse=always", b.image, disk).CombinedOutput(); err != nil {
		return 0, fmt.Errorf("copy image: %w: %s", err, out)
	}
	if size > 0 {
		if err := os.Truncate(disk, size); err != nil {
			return 0, err
		}
		if out, err := exec.CommandContext(ctx, "sgdisk", "--move-second-header", disk).CombinedOutput(); err != nil {
			return 0, fmt.Errorf("move the second partition table: %w: %s", err, out)
		}
	}
	st, stDir, err := b.newStore(ctx, "size-store")
	if err != nil {
		return 0, err
	}
	defer os.RemoveAll(stDir)
	defer st.Close(ctx)
	id := dr.NewSnapshotID(time.Now())
	if err := keepFile(ctx, st, id, "", disk, nil, nil); err != nil {
		return 0, err
	}
	snap, err := st.Snapshot(ctx, id)
	if err != nil {
		return 0, err
	}
	img, err := st.Image(ctx, id, 0)
	if err != nil {
		return 0, err
	}
	defer img.Close()
	server := image.NewServer()
	if err := server.Add(id+"/0", img); err != nil {
		return 0, err
	}
	socket := filepath.Join(dir, "x.sock")
	l, err := image.Listen(socket, 0o600, -1)
	if err != nil {
		return 0, err
	}
	go func() { _ = server.Serve(ctx, l) }()
	defer server.Close()
	agent, err := os.ReadFile(filepath.Join(b.bin, "muster-guest"))
	if err != nil {
		return 0, err
	}
	var times []float64
	for n := range b.runs + 1 {
		deltas := filepath.Join(dir, fmt.Sprint("deltas", n))
		if err := os.MkdirAll(deltas, 0o711); err != nil {
			return 0, err
		}
		start := time.Now()
		_, err := prerecover.Run(ctx, guestfs.Driver{Work: dir, Cache: filepath.Join(b.work, "guestfs")}, prerecover.Request{ID: dr.NewID("pre"), Snapshot: snap,
			Base: []vm.Layer{{Socket: socket, Export: id + "/0", Format: "raw"}}, Dir: deltas, Agent: agent}, nil)
		if err != nil {
			return 0, err
		}
		if n > 0 { // the first run may build the appliance
			times = append(times, time.Since(start).Seconds())
		}
	}
	return median(times), nil
}

// The shop as the world sees it.
const (
	shopURL  = "http://10.77.0.10/"
	shopBody = "order"
	shopGate = "10.77.0.1/24"
)

// invokeTime times the real command until the shop answers over the network, and the plain boot of the same machine
// from a raw disk until it gives the same answer, in turn.
func invokeTime(ctx context.Context, b *bench) ([]Row, error) {
	r, err := b.newRig(ctx)
	if err != nil {
		return nil, err
	}
	defer r.stop()
	var invoked, plain []float64
	for range b.runs {
		i, err := b.timeInvoke(ctx)
		if err != nil {
			return nil, err
		}
		p, err := b.timePlain(ctx, r)
		if err != nil {
			return nil, err
		}
		invoked, plain = append(invoked, i), append(plain, p)
	}
	return []Row{lower("invoke to HTTP answer / plain boot", median(invoked)/median(plain), 1.15,
		"seconds from typing 'muster invoke' until the shop's page is answered, over those of the same machine with the same disk as a raw file, started by the hypervisor alone; medians, in turn",
		fmt.Sprintf("invoked %.1f s, plain %.1f s", median(invoked), median(plain)))}, nil
}

func (b *bench) timeInvoke(ctx context.Context) (float64, error) {
	start := time.Now()
	if err := b.ask(ctx, nil, "invoke", "shop", "--yes", "--no-wait", "--reason", "measured"); err != nil {
		return 0, err
	}
	if err := answered(ctx); err != nil {
		return 0, err
	}
	took := time.Since(start).Seconds()
	for { // until it is handed over, it cannot be ended
		err := b.ask(ctx, nil, "invocation", "end", "shop", "--discard")
		if err == nil {
			return took, nil
		}
		if time.Since(start) > 10*time.Minute {
			return 0, err
		}
		time.Sleep(time.Second)
	}
}

func (b *bench) timePlain(ctx context.Context, r *rig) (took float64, err error) {
	dir, err := b.fresh("plain")
	if err != nil {
		return 0, err
	}
	defer os.RemoveAll(dir)
	layers := r.fromRaw()
	top, err := vm.NewLayer(ctx, filepath.Join(dir, "top.qcow2"), layers[0])
	if err != nil {
		return 0, err
	}
	const bridge = "mubench0"
	if err := network.Create(ctx, network.Spec{Name: bridge, Address: netip.MustParsePrefix(shopGate)}); err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, network.Remove(ctx, bridge)) }()
	start := time.Now()
	spec := vm.Spec{Name: "mb-plain", Owner: vm.Owner{Kind: "bench", ID: "bench-plain"}, Hardware: r.record.PreRecovery.Hardware,
		Disks: []vm.Disk{{Layers: append([]vm.Layer{top}, layers...)}}, Dir: dir}
	for range spec.Hardware.NICs {
		spec.Networks = append(spec.Networks, vm.Network{Bridge: bridge})
	}
	m, err := r.hv.Start(ctx, spec)
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, m.Destroy(ctx)) }()
	err = answered(ctx)
	return time.Since(start).Seconds(), err
}

// answered waits until the shop's page is right.
func answered(ctx context.Context) error {
	c := &http.Client{Timeout: time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
	for start := time.Now(); ; {
		resp, err := c.Get(shopURL)
		if err == nil {
			body, _ := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
			resp.Body.Close()
			if resp.StatusCode == http.StatusOK && strings.Contains(strings.ToLower(string(body)), shopBody) {
				return nil
			}
		}
		if time.Since(start) > 5*time.Minute || ctx.Err() != nil {
			return fmt.Errorf("the shop did not answer: %w", errors.Join(err, ctx.Err()))
		}
		time.Sleep(50 * time.Millisecond)
	}
}
