package folder

import (
	"errors"
	"fmt"
	"hash/fnv"
	"os"
	"path/filepath"
	"sync"

	"golang.org/x/sys/unix"
)

// TryLock locks one byte of the lock file, at an offset made of the name. Such a lock belongs to the open file: it
// holds against other locks of this process too, and the kernel drops it when the process is gone.
func (p *place) TryLock(name string, exclusive bool) (func(), bool, error) {
	f, err := os.OpenFile(filepath.Join(p.root, lockFile), os.O_RDWR, 0)
	if err != nil {
		return nil, false, fmt.Errorf("open lock file: %w", err)
	}
	h := fnv.New64a()
	_, _ = h.Write([]byte(name))
	how := int16(unix.F_RDLCK)
	if exclusive {
		how = unix.F_WRLCK
	}
	lock := unix.Flock_t{Type: how, Whence: 0, Start: int64(h.Sum64() >> 2), Len: 1}
	err = unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, &lock)
	if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EACCES) {
		return nil, false, f.Close()
	}
	if err != nil {
		return nil, false, errors.Join(err, f.Close())
	}
	var once sync.Once
	return func() {
		once.Do(func() {
			// Not by closing alone: a program that is being started has the file as well until it runs.
			lock.Type = unix.F_UNLCK
			_ = unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, &lock)
			_ = f.Close()
		})
	}, true, nil
}
