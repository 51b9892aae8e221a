package windows

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
	"unsafe"

	"github.com/mxk/go-vss"
	"golang.org/x/sys/windows"

	"github.com/musterdr/muster/internal/capture/view"
)

// Dir is the only folder on a server that captures write to.
const Dir = `C:\ProgramData\Muster`

// Shadows are the shadow copies of the volumes on some disks.
type Shadows struct {
	disks   []*Disk
	volumes []volume
	copies  []string // identifiers
	open    []*os.File
	Since   time.Time
}

// Plan finds the volumes that need a shadow copy. It changes nothing.
func Plan(disks []*Disk) (*Shadows, error) {
	all, err := volumes()
	if err != nil {
		return nil, err
	}
	var numbers []uint32
	for _, d := range disks {
		numbers = append(numbers, d.number)
	}
	s := &Shadows{disks: disks}
	s.volumes, err = shadowed(all, numbers)
	return s, err
}

// Rest is what of a disk no shadow copy will hold.
func (s *Shadows) Rest(d *Disk) []view.Range {
	var held []view.Range
	for _, v := range s.volumes {
		if v.on[0].Disk == d.number {
			held = append(held, v.on[0].Range)
		}
	}
	return view.Without([]view.Range{{Length: d.Size}}, held)
}

// Take makes the shadow copies and gives the disks as they were then. On an error some may have been made: Remove them.
func (s *Shadows) Take() ([]*view.View, error) {
	s.Since = time.Now()
	parts := map[uint32][]view.Part{}
	for _, v := range s.volumes {
		id, err := vss.Create(v.name)
		if err != nil {
			return nil, fmt.Errorf("make a shadow copy of %s: %w", v.paths[0], err)
		}
		s.copies = append(s.copies, id)
		if err := remember(id); err != nil {
			return nil, err
		}
		copied, err := vss.Get(id)
		if err != nil {
			return nil, fmt.Errorf("find the shadow copy of %s: %w", v.paths[0], err)
		}
		f, err := os.Open(copied.DeviceObject)
		if err != nil {
			return nil, fmt.Errorf("open the shadow copy of %s: %w", v.paths[0], err)
		}
		s.open = append(s.open, f)
		on := v.on[0]
		parts[on.Disk] = append(parts[on.Disk], place(on, view.Part{From: f}, free(f, copied.DeviceObject, on.Length))...)
	}
	var out []*view.View
	for _, d := range s.disks {
		v, err := view.New(d, d.Size, parts[d.number])
		if err != nil {
			return nil, err
		}
		out = append(out, v)
	}
	return out, nil
}

// free gives what a shadow copy says holds nothing; none if it does not say.
func free(f *os.File, device string, size int64) []view.Range {
	root, err := windows.UTF16PtrFromString(device + `\`)
	if err != nil {
		return nil
	}
	var perCluster, perSector, clustersFree, clusters uint32
	getDiskFreeSpace := windows.NewLazySystemDLL("kernel32.dll").NewProc("GetDiskFreeSpaceW")
	ok, _, _ := getDiskFreeSpace.Call(uintptr(unsafe.Pointer(root)), uintptr(unsafe.Pointer(&perCluster)), uintptr(unsafe.Pointer(&perSector)),
		uintptr(unsafe.Pointer(&clustersFree)), uintptr(unsafe.Pointer(&clusters)))
	if ok == 0 {
		return nil
	}
	const head = 16
	answer, err := ask(f, fsctlVolumeBitmap, binary.LittleEndian.AppendUint64(nil, 0), head+1<<20)
	if err != nil {
		return nil
	}
	ranges, err := FreeClusters(answer, int64(perCluster)*int64(perSector), size)
	if err != nil || len(ranges) > view.MaxParts/4 {
		return nil // in so many pieces it is not worth it
	}
	return ranges
}

// Remove removes the shadow copies. It may be called again.
func (s *Shadows) Remove() error {
	for _, f := range s.open {
		f.Close()
	}
	var errs []error
	for _, id := range s.copies {
		errs = append(errs, remove(id))
	}
	s.open, s.copies = nil, nil
	return errors.Join(errs...)
}

const remembered = "shadow-"

// remember notes a shadow copy as ours, and who made it: Windows keeps it when we are gone.
func remember(id string) error {
	if err := os.MkdirAll(Dir, 0o700); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(Dir, remembered+strings.Trim(id, "{}")), []byte(strconv.Itoa(os.Getpid())), 0o600)
}

func remove(id string) error {
	id = strings.Trim(id, "{}")
	if err := vss.Remove("{" + id + "}"); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("remove shadow copy %s: %w", id, err)
	}
	return os.Remove(filepath.Join(Dir, remembered+id))
}

// RemoveShadows removes the shadow copies that agents which are gone have left behind.
func RemoveShadows() error {
	notes, err := filepath.Glob(filepath.Join(Dir, remembered+"*"))
	if err != nil {
		return err
	}
	var errs []error
	for _, note := range notes {
		b, err := os.ReadFile(note)
		if err != nil {
			continue
		}
		if pid, err := strconv.Atoi(string(b)); err == nil && pid != os.Getpid() {
			if p, err := windows.OpenProcess(windows.PROCESS_QUERY_LIMITED_INFORMATION, false, uint32(pid)); err == nil {
				_ = windows.CloseHandle(p)
				continue // it may be an agent at work: the next capture looks again
			}
		}
		errs = append(errs, remove(strings.TrimPrefix(filepath.Base(note), remembered)))
	}
	return errors.Join(errs...)
}
