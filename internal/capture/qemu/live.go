package qemu

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/digitalocean/go-libvirt"

	"github.com/musterdr/muster/internal/dr"
	"github.com/musterdr/muster/internal/image"
)

// live captures a machine that runs.
func (p *pass) live(ctx context.Context) error {
	if err := p.endLeftover(ctx, p.m); err != nil {
		return err
	}
	base, err := p.begin(ctx)
	if err != nil {
		return err
	}
	name := checkpointName(p.sink.ID())
	if err := p.removeCheckpoints(ctx, p.m, func(c checkpoint) bool { return c.name == name }); err != nil {
		return err // of an earlier attempt at this snapshot
	}
	j := &job{Source: p.Source, m: p.m, checkpoint: name, base: base.name, tracked: p.judge(base)}
	if err := p.start(ctx, j); err != nil {
		return err
	}
	kept := false
	defer func() {
		clean := context.WithoutCancel(ctx)
		_ = j.end(clean) // or the next capture does
		if !kept && j.marked {
			_ = p.removeCheckpoints(clean, p.m, func(c checkpoint) bool { return c.name == name }) // or the next capture does
		}
	}()
	if err := p.readJob(ctx, j); err != nil {
		return err
	}
	if err := p.sink.Keep(ctx, p.out); err != nil {
		return err
	}
	kept = true
	// From now on this snapshot's checkpoint counts. Where none could be made, the base still says what was written since.
	stays := name
	if !j.marked {
		stays = base.name
	}
	server, before := p.sink.Server(), p.sink.Since(ctx, maxSince)
	_ = p.removeCheckpoints(context.WithoutCancel(ctx), p.m, func(c checkpoint) bool { // or a later capture does
		ancestor := slices.ContainsFunc(before, func(id string) bool { return checkpointName(id) == c.name })
		return c.name != stays && (ancestor || c.server == server)
	})
	return nil
}

// start begins the job, with the machine's file systems frozen if they can be.
func (p *pass) start(ctx context.Context, j *job) error {
	f := p.freeze(ctx)
	defer f.thaw()
	p.instant()
	refused, err := j.begin(ctx, p.sink.Server())
	if err != nil {
		return err
	}
	for i, why := range refused {
		if why != "" {
			p.out.Reasons[i] = why
		}
	}
	if j.unmarked != "" {
		p.note("no checkpoint could be made, so the next snapshot will compare everything: %s", j.unmarked)
	}
	f.thaw()
	p.out.Frozen = f.lasted
	if f.held {
		p.out.Consistency = dr.FilesystemConsistent
	} else {
		p.note("not frozen, so what is kept is as after a power cut: %s", f.why)
	}
	return nil
}

// readJob reads every disk of a job that has begun, and makes sure that the job held until the end.
func (p *pass) readJob(ctx context.Context, j *job) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	watched := make(chan struct{})
	go func() {
		defer close(watched)
		j.watchSpace(ctx, cancel)
	}()
	defer func() {
		cancel(nil)
		<-watched
	}()
	for i, d := range p.m.disks {
		bitmap := ""
		if j.tracked[i] {
			bitmap = exportBitmap
		}
		r, err := image.Dial(ctx, j.socket(), d.target, bitmap)
		if err != nil {
			return fmt.Errorf("read disk %s: %w", d.target, err)
		}
		err = p.read(ctx, i, r, bitmap != "")
		_ = r.Close()
		if err != nil {
			return err
		}
	}
	return j.end(ctx)
}

// endLeftover ends a job that a process of ours left when it died. Anybody else's is in the way.
func (s *Source) endLeftover(ctx context.Context, m machine) error {
	j := &job{Source: s, m: m}
	text, err := j.description(ctx)
	if err != nil {
		return err
	}
	if text == "" {
		var kind int32
		if err := s.conn.ask(ctx, func(l *libvirt.Libvirt) (err error) {
			kind, _, err = l.DomainGetJobStats(m.dom, 0)
			return err
		}); err != nil {
			return fmt.Errorf("see whether %s is busy: %w", m.name, err)
		}
		if t := libvirt.DomainJobType(kind); t == libvirt.DomainJobBounded || t == libvirt.DomainJobUnbounded {
			return fmt.Errorf("capture %s: libvirt does something else with it, a migration or a dump: wait for it to end ('virsh domjobinfo %s')", m.name, m.name)
		}
		return j.sweep()
	}
	if !strings.Contains(text, j.socket()) {
		return fmt.Errorf("capture %s: somebody else's backup of it is under way: wait for it to end, or end it with 'virsh domjobabort %s'", m.name, m.name)
	}
	j.begun = true
	if err := j.end(ctx); err != nil && !errors.Is(err, errEnded) {
		return fmt.Errorf("end the backup of %s that was left: %w", m.name, err)
	}
	return j.sweep()
}
