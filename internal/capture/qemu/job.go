package qemu

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"time"

	"github.com/digitalocean/go-libvirt"
	"golang.org/x/sys/unix"
	"libvirt.org/go/libvirtxml"

	"github.com/musterdr/muster/internal/image"
)

const (
	exportBitmap  = "changed"         // name of the bitmap in an export
	scratchSuffix = ".muster-scratch" // of the file in which QEMU puts aside what the guest overwrites
	// spaceFloor is how much must be free where the scratch files are, in bytes. A guest whose scratch file cannot grow is
	// stopped or gets an error, so the backup is given up before that.
	spaceFloor  = 256 << 20
	spaceEvery  = 500 * time.Millisecond
	endLimit    = time.Minute // for a job to end
	endPoll     = 20 * time.Millisecond
	maxAttempts = 40 // at beginning a job: one for each disk's bitmap that is broken, and some
)

// errEnded is a job that was not there any more when it was to be ended, or that QEMU gave up.
var errEnded = errors.New("the backup ended before everything was read: what was read is no longer one instant")

// job is a backup in which QEMU shows every disk as it was at one instant.
type job struct {
	*Source
	m          machine
	checkpoint string // that begins with it
	base       string // the checkpoint since which changes are wanted
	tracked    []bool // of each disk: whether they are

	begun    bool
	marked   bool   // the checkpoint was made
	unmarked string // why not
}

// socket is where QEMU serves the disks. Its folder lets in nobody but root and QEMU.
func (j *job) socket() string { return filepath.Join(j.room(j.m), "backup.sock") }

// scratch is where QEMU puts aside what is overwritten of a disk. The name is always the same, so that one that is left over
// is found.
func (j *job) scratch(d disk) string {
	if d.file {
		return d.path + scratchSuffix
	}
	return filepath.Join(j.host.Scratch, j.m.uuid+"-"+d.target+scratchSuffix)
}

// sweep removes scratch files and a socket that were left over.
func (j *job) sweep() error {
	for _, d := range j.m.disks {
		path := j.scratch(d)
		info, err := os.Lstat(path)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err == nil && !info.Mode().IsRegular() {
			err = errors.New("it is no file")
		}
		if err == nil {
			err = os.Remove(path)
		}
		if err != nil {
			return fmt.Errorf("remove scratch file %s that was left: %w", path, err)
		}
	}
	if err := os.Remove(j.socket()); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove a socket that was left: %w", err)
	}
	return nil
}

// prepare makes the folder of the socket, which QEMU must be able to enter and write to.
func (j *job) prepare() error {
	if n := len(j.socket()); n > image.MaxSocketPath {
		return fmt.Errorf("make a socket %s: its path has %d bytes and may have %d: choose a shorter folder", j.socket(), n, image.MaxSocketPath)
	}
	dir := j.room(j.m)
	if err := os.Chown(dir, 0, j.m.group); err != nil {
		return fmt.Errorf("let QEMU make a socket: %w", err)
	}
	if err := os.Chmod(dir, 0o770); err != nil {
		return fmt.Errorf("let QEMU make a socket: %w", err)
	}
	for _, d := range j.m.disks {
		if err := os.MkdirAll(filepath.Dir(j.scratch(d)), 0o711); err != nil {
			return fmt.Errorf("make a folder for scratch files: %w", err)
		}
	}
	return j.space()
}

var brokenBitmap = regexp.MustCompile(`bitmap '[^']*' for disk '([^']*)'`)

// begin begins the job with as much as libvirt allows: it does without the bitmap of a disk that is broken, then without any,
// then without a checkpoint. It says of each disk why its bitmap was not used after all.
func (j *job) begin(ctx context.Context, server string) (refused []string, err error) {
	if err := j.prepare(); err != nil {
		return nil, err
	}
	refused = make([]string, len(j.m.disks))
	mark := j.m.persistent && slices.ContainsFunc(j.m.disks, func(d disk) bool { return d.format == "qcow2" })
	if !j.m.persistent {
		j.unmarked = "the machine is a transient one, of which libvirt keeps no checkpoints ('virsh define' makes it lasting)"
	}
	drop := func(i int, why error) {
		j.tracked[i], refused[i] = false, plain(why)
	}
	for range maxAttempts {
		err := j.try(ctx, server, mark)
		if err == nil {
			j.begun, j.marked = true, mark
			return refused, nil
		}
		if ctx.Err() != nil || code(err) == 0 {
			_ = j.abort(context.WithoutCancel(ctx)) // it may have begun without our hearing of it
			return nil, fmt.Errorf("begin a backup of %s: %w", j.m.name, err)
		}
		named := -1
		if m := brokenBitmap.FindStringSubmatch(err.Error()); m != nil && code(err) == libvirt.ErrCheckpointInconsistent {
			named = slices.IndexFunc(j.m.disks, func(d disk) bool { return d.target == m[1] })
		}
		switch {
		case named >= 0 && j.tracked[named]:
			drop(named, fmt.Errorf("its dirty bitmap is broken or gone, as after a power cut (%w)", err))
		case slices.Contains(j.tracked, true):
			for i, was := range j.tracked {
				if was {
					drop(i, fmt.Errorf("libvirt gives no changes (%w)", err))
				}
			}
		case mark:
			mark, j.unmarked = false, plain(err)
		default:
			return nil, fmt.Errorf("begin a backup of %s: %w", j.m.name, err)
		}
	}
	return nil, fmt.Errorf("begin a backup of %s: given up after %d attempts", j.m.name, maxAttempts)
}

// try asks libvirt once.
func (j *job) try(ctx context.Context, server string, mark bool) error {
	if err := j.sweep(); err != nil {
		return err
	}
	x := libvirtxml.DomainBackup{Pull: &libvirtxml.DomainBackupPull{
		Server: &libvirtxml.DomainBackupPullServer{UNIX: &libvirtxml.DomainBackupPullServerUNIX{Socket: j.socket()}},
		Disks:  &libvirtxml.DomainBackupPullDisks{},
	}}
	for i, d := range j.m.disks {
		one := libvirtxml.DomainBackupPullDisk{Name: d.target, Backup: "yes", BackupMode: "full", ExportName: d.target,
			Driver:  &libvirtxml.DomainBackupDiskDriver{Type: "qcow2"},
			Scratch: &libvirtxml.DomainDiskSource{File: &libvirtxml.DomainDiskSourceFile{File: j.scratch(d)}}}
		if j.tracked[i] {
			one.BackupMode, one.Incremental, one.ExportBitmap = "incremental", j.base, exportBitmap
		}
		x.Pull.Disks.Disks = append(x.Pull.Disks.Disks, one)
	}
	text, err := x.Marshal()
	if err != nil {
		return err
	}
	var begins libvirt.OptString
	if mark {
		c, err := checkpointXML(j.checkpoint, server, j.m.disks)
		if err != nil {
			return err
		}
		begins = libvirt.OptString{c}
	}
	return j.conn.call(ctx, false, func(l *libvirt.Libvirt) error { return l.DomainBackupBegin(j.m.dom, text, begins, 0) })
}

// end ends the job. It is errEnded if the job did not last until now.
func (j *job) end(ctx context.Context) error {
	if !j.begun {
		return nil
	}
	j.begun = false
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), endLimit)
	defer cancel()
	if text, err := j.description(ctx); err != nil {
		return err
	} else if text == "" {
		return errEnded
	}
	if err := j.abort(ctx); err != nil {
		return err
	}
	// What QEMU gave up, for want of space, has failed; what we ended was cancelled.
	var kind int32
	err := j.conn.ask(ctx, func(l *libvirt.Libvirt) (err error) {
		kind, _, err = l.DomainGetJobStats(j.m.dom, libvirt.DomainJobStatsCompleted)
		return err
	})
	if err != nil {
		return fmt.Errorf("see how the backup of %s ended: %w", j.m.name, err)
	}
	if libvirt.DomainJobType(kind) == libvirt.DomainJobFailed {
		return errEnded
	}
	return nil
}

// abort has libvirt end the job and waits until it is gone. None is no error.
func (j *job) abort(ctx context.Context) error {
	err := j.conn.ask(ctx, func(l *libvirt.Libvirt) error { return l.DomainAbortJob(j.m.dom) })
	if err != nil && code(err) != libvirt.ErrOperationInvalid {
		return fmt.Errorf("end the backup of %s: %w", j.m.name, err)
	}
	for {
		text, err := j.description(ctx)
		if err != nil || text == "" {
			return err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("end the backup of %s: %w", j.m.name, context.Cause(ctx))
		case <-time.After(endPoll):
		}
	}
}

// description is libvirt's of the backup that is under way, whoever began it; "" if there is none.
func (j *job) description(ctx context.Context) (text string, err error) {
	err = j.conn.ask(ctx, func(l *libvirt.Libvirt) (err error) {
		text, err = l.DomainBackupGetXMLDesc(j.m.dom, 0)
		return err
	})
	switch code(err) {
	case libvirt.ErrNoDomainBackup, libvirt.ErrOperationInvalid: // the second: the machine was shut off
		return "", nil
	}
	if err != nil {
		return "", fmt.Errorf("see whether a backup of %s is under way: %w", j.m.name, err)
	}
	return text, nil
}

// space complains if there is too little of it for the scratch files.
func (j *job) space() error {
	for _, d := range j.m.disks {
		dir := filepath.Dir(j.scratch(d))
		var st unix.Statfs_t
		if err := unix.Statfs(dir, &st); err != nil {
			return fmt.Errorf("see how much space %s has: %w", dir, err)
		}
		if free := int64(st.Bavail) * st.Bsize; free < spaceFloor {
			return fmt.Errorf("back up %s: only %d MiB are free in %s, where QEMU puts aside what the machine overwrites meanwhile: make room, at least %d MiB",
				j.m.name, free>>20, dir, spaceFloor>>20)
		}
	}
	return nil
}

// watchSpace gives the backup up when space runs out, before the machine would notice.
func (j *job) watchSpace(ctx context.Context, giveUp context.CancelCauseFunc) {
	every := time.NewTicker(spaceEvery)
	defer every.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-every.C:
			if err := j.space(); err != nil {
				giveUp(err)
				return
			}
		}
	}
}
