package track

import (
	"bytes"
	"crypto/sha256"
	_ "embed" // the programs
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/btf"
	"github.com/cilium/ebpf/link"
	"github.com/cilium/ebpf/rlimit"
)

// One object serves every little-endian processor. A test compares the source with the sum that was taken of it then.
//
//go:generate clang -g -O2 -mcpu=v3 -target bpfel -Wall -Wextra -Werror -fdebug-prefix-map=$PWD=. -I bpf -c bpf/track.bpf.c -o bpf/track.bpf.o
//go:generate llvm-strip -g bpf/track.bpf.o
//go:generate sh -c "cat bpf/kernel.h bpf/track.bpf.c | sha256sum | cut -c1-64 >bpf/track.bpf.sum"

//go:embed bpf/track.bpf.o
var object []byte

// objectName tells these programs from those of other versions.
func objectName() string {
	sum := sha256.Sum256(object)
	return fmt.Sprintf("v%d-%s", recordVersion, hex.EncodeToString(sum[:6]))
}

// Programs in the order of attaching them, which is the order in which the kernel calls them: primaries before twins.
var (
	programsAlways  = []string{"issue", "request_primary", "request_twin"}
	programsForBios = []string{"queue_primary", "queue_twin", "bio_primary", "bio_twin"}
)

func programs(bios bool) []string {
	if bios {
		return slices.Concat(programsAlways, programsForBios)
	}
	return programsAlways
}

// mapNames are those that every disk shares and that are pinned.
var mapNames = []string{"disks", "counts", "current", "underway"}

// kernel is what runs there.
type kernel struct {
	disks, counts, current, underway *ebpf.Map
	links                            map[string]link.Link
}

func (k *kernel) maps() map[string]**ebpf.Map {
	return map[string]**ebpf.Map{"disks": &k.disks, "counts": &k.counts, "current": &k.current, "underway": &k.underway}
}

func (k *kernel) close() {
	for _, m := range k.maps() {
		(*m).Close() // of nil as well
	}
	for _, l := range k.links {
		l.Close()
	}
}

// spec gives the programs ready for loading into this kernel.
func spec(byteMode, bios bool) (*ebpf.CollectionSpec, error) {
	s, err := ebpf.LoadCollectionSpecFromReader(bytes.NewReader(object))
	if err != nil {
		return nil, fmt.Errorf("read the tracking programs: %w", err)
	}
	if !bios {
		for _, name := range programsForBios {
			delete(s.Programs, name)
		}
	}
	argument, err := beginArgument()
	if err != nil {
		return nil, err
	}
	for name, value := range map[string]uint32{"bytes": number(byteMode), "bios_used": number(bios), "begin_arg": argument} {
		if err := s.Variables[name].Set(value); err != nil {
			return nil, fmt.Errorf("prepare the tracking programs: %w", err)
		}
	}
	return s, nil
}

func number(b bool) uint32 {
	if b {
		return 1
	}
	return 0
}

// beginArgument says which argument of block_rq_issue and block_bio_queue is the request or bio: until Linux 5.10 the queue
// came first in both.
func beginArgument() (uint32, error) {
	types, err := btf.LoadKernelSpec()
	if err != nil {
		return 0, fmt.Errorf("read the kernel's types: %w", err)
	}
	var hook *btf.Typedef
	if err := types.TypeByName("btf_trace_block_rq_issue", &hook); err != nil {
		return 0, fmt.Errorf("find the tracepoint block_rq_issue: %w", err)
	}
	if p, ok := hook.Type.(*btf.Pointer); ok {
		if f, ok := p.Target.(*btf.FuncProto); ok && len(f.Params) >= 2 {
			return uint32(len(f.Params)) - 2, nil // the first is the tracepoint's own
		}
	}
	return 0, errors.New("find the tracepoint block_rq_issue: it has an unknown form")
}

// install loads the programs, pins maps and links in a folder that does not exist yet, and writes down what they are.
func install(pins string, rec *record) (*kernel, error) {
	// Before Linux 5.11 maps count as locked memory.
	if err := rlimit.RemoveMemlock(); err != nil {
		return nil, fmt.Errorf("raise the limit of locked memory: %w", err)
	}
	s, err := spec(rec.Bytes, rec.Bios)
	if err != nil {
		return nil, err
	}
	c, err := ebpf.NewCollection(s)
	if err != nil {
		return nil, fmt.Errorf("load the tracking programs: %w", err)
	}
	defer c.Close()
	if err := os.MkdirAll(pins, 0o700); err != nil {
		return nil, fmt.Errorf("make a place for the tracking programs: %w", err)
	}
	k := &kernel{links: map[string]link.Link{}}
	if err := k.take(c, pins, rec); err != nil {
		k.close()
		return nil, err
	}
	return k, nil
}

// take makes the maps and programs of a collection its own, pinned and attached.
func (k *kernel) take(c *ebpf.Collection, pins string, rec *record) (err error) {
	rec.Maps, rec.Links, rec.Runs = map[string]id{}, map[string]id{}, map[string]id{}
	for name, m := range k.maps() {
		*m = c.DetachMap(name)
		if err := (*m).Pin(filepath.Join(pins, name)); err != nil {
			return fmt.Errorf("pin the map %s: %w", name, err)
		}
		if rec.Maps[name], err = mapID(*m); err != nil {
			return err
		}
	}
	for _, name := range programs(rec.Bios) {
		l, err := link.AttachTracing(link.TracingOptions{Program: c.Programs[name]})
		if err != nil {
			return fmt.Errorf("attach the program %s: %w", name, err)
		}
		k.links[name] = l
		if err := l.Pin(filepath.Join(pins, "link-"+name)); err != nil {
			return fmt.Errorf("pin the program %s: %w", name, err)
		}
		info, err := l.Info()
		if err != nil {
			return fmt.Errorf("look at the program %s: %w", name, err)
		}
		rec.Links[name], rec.Runs[name] = id(info.ID), id(info.Program)
	}
	return nil
}

// adopt finds what was installed. Its error says what is gone.
func adopt(pins string, rec *record) (*kernel, error) {
	k := &kernel{links: map[string]link.Link{}}
	for name, m := range k.maps() {
		var err error
		if *m, err = pinnedMap(pins, name, rec.Maps[name]); err != nil {
			k.close()
			return nil, err
		}
	}
	for _, name := range programs(rec.Bios) {
		l, err := link.LoadPinnedLink(filepath.Join(pins, "link-"+name), nil)
		if err != nil {
			k.close()
			return nil, fmt.Errorf("the program %s is not attached any more: %w", name, err)
		}
		k.links[name] = l
		info, err := l.Info()
		if err != nil || id(info.ID) != rec.Links[name] || id(info.Program) != rec.Runs[name] {
			k.close()
			return nil, fmt.Errorf("the program %s is not the one that was attached", name)
		}
	}
	return k, nil
}

// attached says whether everything is still pinned: what is not ends with this process.
func attached(pins string, rec *record) error {
	for _, name := range programs(rec.Bios) {
		if _, err := os.Stat(filepath.Join(pins, "link-"+name)); err != nil {
			return fmt.Errorf("the program %s is not attached for good: %w", name, err)
		}
	}
	for _, name := range mapNames {
		if _, err := os.Stat(filepath.Join(pins, name)); err != nil {
			return fmt.Errorf("the map %s is gone: %w", name, err)
		}
	}
	return nil
}

func pinnedMap(pins, name string, want id) (*ebpf.Map, error) {
	m, err := ebpf.LoadPinnedMap(filepath.Join(pins, name), nil)
	if err != nil {
		return nil, fmt.Errorf("the map %s is gone: %w", name, err)
	}
	if got, err := mapID(m); err != nil || got != want {
		m.Close()
		return nil, fmt.Errorf("the map %s is not the one that was made", name)
	}
	return m, nil
}

func mapID(m *ebpf.Map) (id, error) {
	info, err := m.Info()
	if err != nil {
		return 0, fmt.Errorf("look at a map: %w", err)
	}
	n, ok := info.ID()
	if !ok {
		return 0, errors.New("look at a map: the kernel gives it no number")
	}
	return id(n), nil
}

// misses gives how many runs of primaries and of twins the kernel skipped since they were loaded, because they ran already
// on that CPU. Either alone is no loss.
func (k *kernel) misses() (primaries, twins uint64) {
	for name, l := range k.links {
		info, err := l.Info()
		if err != nil {
			continue
		}
		p, err := ebpf.NewProgramFromID(info.Program)
		if err != nil {
			continue
		}
		if stats, err := p.Stats(); err == nil {
			switch {
			case strings.HasSuffix(name, "_twin"):
				twins += stats.RecursionMisses
			case strings.HasSuffix(name, "_primary"):
				primaries += stats.RecursionMisses
			}
		}
		p.Close()
	}
	return primaries, twins
}

// needsBytes says whether this kernel knows no atomic OR, which came with Linux 5.12.
func needsBytes() bool {
	p, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Type: ebpf.SocketFilter, License: "MIT",
		Instructions: asm.Instructions{
			asm.Mov.Imm(asm.R0, 0),
			asm.StoreMem(asm.RFP, -8, asm.R0, asm.DWord),
			asm.OrAtomic.Mem(asm.RFP, asm.R0, asm.DWord, -8),
			asm.Return(),
		},
	})
	if err != nil {
		return true
	}
	p.Close()
	return false
}

// Supported says why this system cannot track; nil if it can. It loads the programs to find out, which takes a second or
// two, and attaches none.
func Supported() error {
	if _, err := os.Stat("/sys/kernel/btf/vmlinux"); err != nil {
		return errors.New("track changes: this kernel does not describe its types (no /sys/kernel/btf/vmlinux): it is older than 5.10, or was built without CONFIG_DEBUG_INFO_BTF")
	}
	if known := text("/proc/filesystems"); !strings.Contains(known+"\n", "\tbpf\n") {
		return errors.New("track changes: this kernel has no bpf file system to keep programs in (CONFIG_BPF_SYSCALL)")
	}
	if err := rlimit.RemoveMemlock(); err != nil {
		return fmt.Errorf("track changes: raise the limit of locked memory: %w", err)
	}
	s, err := spec(needsBytes(), false)
	if err != nil {
		return fmt.Errorf("track changes: %w", err)
	}
	c, err := ebpf.NewCollection(s)
	if errors.Is(err, os.ErrPermission) {
		return fmt.Errorf("track changes: this process may load no programs into the kernel: it needs CAP_BPF and CAP_PERFMON, or CAP_SYS_ADMIN, and a kernel that is not locked down: %w", err)
	}
	if err != nil {
		return fmt.Errorf("track changes: the kernel does not take the programs; Linux 5.10 or newer is needed: %w", err)
	}
	c.Close()
	return nil
}
