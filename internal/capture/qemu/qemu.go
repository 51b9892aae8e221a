// Package qemu captures virtual machines from outside, through the QEMU that runs them, on this host under libvirt. Nothing is
// installed in the machine.
//
//	Source      one machine; Host is what this host lends to it
//	machine     what libvirt says of it: its disks, whether it runs, what it is made of
//	checkpoint  a dirty bitmap a disk, kept in the qcow2 files by QEMU: what was written since a snapshot
//	job         one backup under way: QEMU shows every disk as it was when the job began, over NBD
//	watchdog    a process of its own that freezes and thaws the machine's file systems, and thaws them if we die
//
// A machine that runs is frozen through the guest agent if it has one, a backup begins, and the machine is thawed: what is
// read afterwards is that instant, however long it takes, because QEMU puts aside what the guest overwrites meanwhile. With the
// job a checkpoint begins. The next snapshot reads only what the checkpoint of the last kept one has as dirty; the old one goes
// when the new snapshot is kept, not before. Where no bitmap is to be trusted (a raw disk, a power cut, another file in the
// disk's place) that disk is read as a whole. A machine that is shut off is read from its files by qemu-nbd, bitmaps included;
// one that is started meanwhile voids the pass.
//
// Whatever happens to us, nothing stays: the watchdog thaws, and a job that a dead process left is ended by the next capture.
// Only checkpoints whose name has our prefix are ever touched.
//
// Knows: libvirt's domains, checkpoints and backup jobs, qemu-nbd.
// Must not know: SSH, agents of ours, what is on a disk.
package qemu

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/musterdr/muster/internal/api"
	"github.com/musterdr/muster/internal/capture"
	"github.com/musterdr/muster/internal/dr"
	"github.com/musterdr/muster/internal/image"
)

// ErrChanged is a machine that was started, stopped or written to while its disks were read at rest.
var ErrChanged = errors.New("the machine was started, or its disks were written to, while they were read")

// Host is what this host lends to captures.
type Host struct {
	Run string // folder for sockets, with a short path; made if it is missing
	// Scratch is where QEMU puts aside what a guest overwrites while a disk that is no file is read. For a file that is its own
	// folder.
	Scratch string
	// Watchdog is the command line of a process that calls Watchdog with the arguments that are appended: the socket of
	// libvirtd, the machine's UUID, a limit. Without it nothing is frozen.
	Watchdog []string
}

// Source is a virtual machine. It implements capture.Source.
type Source struct {
	vm   dr.VMSource
	host Host
	conn *connection
}

var _ capture.Source = (*Source)(nil)

// Open gives the source of a machine. libvirt is spoken to when it is needed.
func Open(vm dr.VMSource, host Host) (*Source, error) {
	socket, err := vm.Socket()
	if err != nil {
		return nil, err
	}
	return &Source{vm: vm, host: host, conn: &connection{path: socket}}, nil
}

// Close implements capture.Source.
func (s *Source) Close() error { return s.conn.close() }

// Contact implements capture.Source.
func (s *Source) Contact(ctx context.Context) (api.Contact, error) {
	m, err := s.look(ctx)
	if err != nil {
		return api.Contact{}, err
	}
	return api.Contact{Inventory: m.inventory}, nil
}

// Forget implements capture.Source: it removes our checkpoints, with their bitmaps. A machine that is gone has none.
func (s *Source) Forget(ctx context.Context) error {
	m, err := s.look(ctx)
	if errors.Is(err, errNoMachine) {
		return nil
	}
	if err != nil {
		return err
	}
	release, err := s.lock(m)
	if err != nil {
		return err
	}
	defer release()
	if m.running {
		if err := s.endLeftover(ctx, m); err != nil {
			return err
		}
	}
	return s.removeCheckpoints(ctx, m, func(checkpoint) bool { return true })
}

// Capture implements capture.Source.
func (s *Source) Capture(ctx context.Context, sink *capture.Sink, report dr.Progress) error {
	m, err := s.look(ctx)
	if err != nil {
		return err
	}
	release, err := s.lock(m)
	if err != nil {
		return err
	}
	defer release()
	p := &pass{Source: s, m: m, sink: sink, report: report, out: capture.Outcome{
		Inventory: m.inventory, Consistency: dr.CrashConsistent, Provider: dr.ProviderQEMU}}
	if m.running {
		return p.live(ctx)
	}
	return p.rest(ctx)
}

// lock makes sure that this is the only process that captures the machine for this installation. The kernel lets go of it when
// we die, which is how a job that is left over is told from one that is under way.
func (s *Source) lock(m machine) (release func(), err error) {
	dir := s.room(m)
	if err := os.MkdirAll(dir, 0o711); err != nil {
		return nil, fmt.Errorf("make a folder for sockets: %w", err)
	}
	f, err := os.OpenFile(dir+".lock", os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("lock machine %s: %w", m.name, err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		_ = f.Close()
		return nil, fmt.Errorf("lock machine %s: another capture of it is under way; wait for it to end", m.name)
	}
	return func() {
		// Not by closing alone: a program that is being started has the file as well until it runs.
		_ = unix.Flock(int(f.Fd()), unix.LOCK_UN)
		_ = f.Close()
	}, nil
}

// room is the folder of a machine's sockets.
func (s *Source) room(m machine) string { return filepath.Join(s.host.Run, "vm-"+m.uuid) }

// pass is one capture.
type pass struct {
	*Source
	m      machine
	sink   *capture.Sink
	report dr.Progress
	out    capture.Outcome
}

// begin opens the snapshot, and says which kept snapshot's checkpoint to read from on, if there is one.
func (p *pass) begin(ctx context.Context) (base checkpoint, err error) {
	layout := capture.Layout{Inventory: p.m.inventory}
	for _, d := range p.m.disks {
		layout.Disks = append(layout.Disks, capture.Disk{Name: d.target, Size: d.size})
	}
	p.out.Reasons = make([]string, len(p.m.disks))
	if _, err := p.sink.Begin(ctx, layout); err != nil {
		return base, err
	}
	since := p.sink.Since(ctx, maxSince)
	if len(since) == 0 {
		return base, nil // a full one reads everything
	}
	all, err := p.checkpoints(ctx, p.m)
	if err != nil {
		return base, err
	}
	for _, id := range since {
		for _, c := range all {
			if c.name == checkpointName(id) {
				return c, nil
			}
		}
	}
	return base, nil
}

// judge says of each disk whether the base has a bitmap of it, and if not, why it is read as a whole.
func (p *pass) judge(base checkpoint) (tracked []bool) {
	tracked = make([]bool, len(p.m.disks))
	for i, d := range p.m.disks {
		var why string
		switch identity, covered := base.disks[d.target]; {
		case d.format != "qcow2":
			why = fmt.Sprintf("a %s image holds no dirty bitmap", d.format)
		case base.name == "":
			why = "there is no checkpoint of an earlier snapshot"
		case !covered:
			why = "it was attached since the last snapshot, or holds no dirty bitmap"
		case identity != d.identity:
			why = "another image is in its place"
		}
		p.out.Reasons[i], tracked[i] = why, why == ""
	}
	return tracked
}

// read reads one disk from an export: what its bitmap calls dirty, or all that is not known to be zeros. It is cut off when the
// context ends.
func (p *pass) read(ctx context.Context, disk int, r *image.Remote, tracked bool) (err error) {
	d := p.m.disks[disk]
	stop := context.AfterFunc(ctx, func() { _ = r.Close() })
	defer stop()
	if r.Size() != d.size {
		return fmt.Errorf("read disk %s: it has %d bytes and had %d a moment ago: it was resized, try again", d.target, r.Size(), d.size)
	}
	counted := &counted{Remote: r}
	if !tracked {
		err = p.sink.Image(ctx, disk, counted, p.report)
	} else {
		var dirty []image.Extent
		if dirty, err = r.Dirty(ctx); err == nil {
			err = p.sink.Part(ctx, disk, counted, dirty, p.report)
		}
	}
	p.out.Read += counted.read.Load()
	if err != nil && ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	if err != nil {
		return fmt.Errorf("read disk %s: %w", d.target, err)
	}
	return nil
}

func (p *pass) note(format string, args ...any) {
	p.out.Notes = append(p.out.Notes, fmt.Sprintf(format, args...))
}

// plain makes a message of libvirt's or the guest's fit for a note.
func plain(err error) string {
	const most = 300
	text := strings.Join(strings.Fields(err.Error()), " ")
	return text[:min(len(text), most)]
}

// maxSince is how many earlier snapshots a checkpoint is looked for.
const maxSince = 64

// instant is when the disks are as they will be read.
func (p *pass) instant() { p.out.Taken = time.Now() }
