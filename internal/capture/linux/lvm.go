package linux

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// How much room a snapshot of a thick volume takes in its volume group: a fifth of the volume and at least bestRoom, if
// there is so much; at least a fiftieth and leastRoom, or none is made. A thin one takes what is written meanwhile from its
// pool, which must have poolRoom percent of its data and metadata left.
const (
	bestShare = 5
	bestRoom  = 256 << 20 // bytes
	leastPart = 50
	leastRoom = 64 << 20 // bytes
	poolRoom  = 10.0     // percent
)

// logical is a logical volume as lvm reports it.
type logical struct {
	VG, Name string
	Dev      string // "major:minor"; "" if it is not active
	Size     int64  // bytes
	Free     int64  // bytes of its volume group
	Extent   int64  // bytes
	Pool     string // name of its thin pool; "" for a thick one
	Data     float64
	Metadata float64 // percent of a thin pool that is in use
}

// physical is a physical volume as lvm reports it.
type physical struct {
	Path, VG     string
	Start        int64 // where its extents begin, bytes
	Count        int64 // of extents
	Extent, Size int64 // bytes
}

// report is the form of lvm's reports: every value is a string.
type report struct {
	Report []map[string][]map[string]string `json:"report"`
}

func parseReport(text, kind string) ([]map[string]string, error) {
	var r report
	if err := json.Unmarshal([]byte(text), &r); err != nil {
		return nil, fmt.Errorf("read what lvm says: %w", err)
	}
	var out []map[string]string
	for _, part := range r.Report {
		out = append(out, part[kind]...)
	}
	return cut(out), nil
}

func whole(s string) int64 {
	n, _ := strconv.ParseInt(s, 10, 64)
	return max(0, n)
}

func parseLogical(text string) ([]logical, error) {
	rows, err := parseReport(text, "lv")
	var out []logical
	for _, r := range rows {
		l := logical{VG: r["vg_name"], Name: r["lv_name"], Size: whole(r["lv_size"]), Free: whole(r["vg_free"]), Extent: whole(r["vg_extent_size"]), Pool: r["pool_lv"]}
		if minor := r["lv_kernel_minor"]; minor != "" && minor != "-1" {
			l.Dev = r["lv_kernel_major"] + ":" + minor
		}
		l.Data, _ = strconv.ParseFloat(r["data_percent"], 64)
		l.Metadata, _ = strconv.ParseFloat(r["metadata_percent"], 64)
		out = append(out, l)
	}
	return out, err
}

func parsePhysical(text string) ([]physical, error) {
	rows, err := parseReport(text, "pv")
	var out []physical
	for _, r := range rows {
		out = append(out, physical{Path: r["pv_name"], VG: r["vg_name"], Start: whole(r["pe_start"]), Count: whole(r["pv_pe_count"]), Extent: whole(r["vg_extent_size"]), Size: whole(r["dev_size"])})
	}
	return out, err
}

// room says how large a snapshot of a thick volume may be where its volume group is shared by some that are to have one,
// or why there can be none.
func (l logical) room(sharers int64) (int64, error) {
	if l.Extent <= 0 {
		return 0, fmt.Errorf("how large the extents of volume group %s are is not known", l.VG)
	}
	want, least := max(l.Size/bestShare, bestRoom), max(l.Size/leastPart, leastRoom)
	want = max(least, min(want, l.Size+l.Size/64+l.Extent)) // with all of the volume in it there is nothing more to come
	room := min(want, l.Free/max(1, sharers)) / l.Extent * l.Extent
	if room < least {
		return 0, fmt.Errorf("volume group %s has %d MiB free for %d snapshots: that of %s needs at least %d MiB, and %d MiB are good", l.VG, l.Free>>20, sharers, l.Name, least>>20, want>>20)
	}
	return room, nil
}

// program finds one of the administrator's programs.
func program(name string) (string, error) {
	for _, dir := range []string{"/usr/sbin", "/sbin", "/usr/bin", "/bin", "/usr/local/sbin"} {
		path := filepath.Join(dir, name)
		if info, err := os.Stat(path); err == nil && info.Mode().IsRegular() && info.Mode()&0o111 != 0 {
			return path, nil
		}
	}
	return "", fmt.Errorf("the program %s is not there", name)
}

// lvm runs one of lvm's commands to its end: one that was stopped in the middle might leave a volume suspended.
func lvm(ctx context.Context, args ...string) (string, error) {
	path, err := program("lvm")
	if err != nil {
		return "", err
	}
	return undisturbed(ctx, path, args...)
}

// tables gives the device-mapper tables.
func tables(ctx context.Context) (string, error) {
	path, err := program("dmsetup")
	if err != nil {
		return "", err
	}
	return undisturbed(ctx, path, "table")
}

// undisturbed runs a program that may be frozen with the file system that it needs, and that nobody must end in the middle: in
// a session of its own, without a limit. What freezes is thawed by the watchdog.
func undisturbed(ctx context.Context, path string, args ...string) (string, error) {
	if err := ctx.Err(); err != nil {
		return "", err
	}
	cmd := exec.Command(path, args...)
	cmd.Env = append(os.Environ(), "LC_ALL=C", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LVM_SUPPRESS_FD_WARNINGS=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	cmd.Dir = "/"
	var out, problem bounded
	cmd.Stdout, cmd.Stderr = &out, &problem
	if err := cmd.Run(); err != nil {
		said := strings.Join(strings.Fields(problem.String()), " ")
		return "", fmt.Errorf("run %s %s: %w: %.300s", filepath.Base(path), args[0], err, said)
	}
	return out.String(), nil
}

func reportLogical(ctx context.Context) ([]logical, error) {
	out, err := lvm(ctx, "lvs", "--reportformat", "json", "--units", "b", "--nosuffix",
		"--options", "vg_name,lv_name,lv_size,vg_free,vg_extent_size,pool_lv,lv_kernel_major,lv_kernel_minor,data_percent,metadata_percent")
	if err != nil {
		return nil, err
	}
	return parseLogical(out)
}

func reportPhysical(ctx context.Context) ([]physical, error) {
	out, err := lvm(ctx, "pvs", "--reportformat", "json", "--units", "b", "--nosuffix", "--options", "pv_name,vg_name,pe_start,pv_pe_count,vg_extent_size,dev_size")
	if err != nil {
		return nil, err
	}
	return parsePhysical(out)
}

// Snapshots are known by their name, which says which agent made them, and by their tag. Nothing else is ever removed.
const snapshotTag = "muster_snapshot"

var snapshotName = regexp.MustCompile(`^muster_(\d+)_(\d+)_\d+$`)

// mark gives what tells this process from any other of this boot.
func mark(pid string) (string, error) {
	stat := text("/", "proc", pid, "stat")
	const started = 19 // of what follows the name, which may hold anything
	f := strings.Fields(stat[strings.LastIndexByte(stat, ')')+1:])
	if len(f) <= started {
		return "", fmt.Errorf("there is no process %s", pid)
	}
	return pid + "_" + f[started], nil
}

// alive says whether the agent that made a snapshot still runs.
func alive(name string) bool {
	m := snapshotName.FindStringSubmatch(name)
	if m == nil {
		return false
	}
	now, err := mark(m[1])
	return err == nil && now == m[1]+"_"+m[2]
}

// RemoveSnapshots removes the snapshots that agents which are gone have left behind. Where there is no LVM it does nothing.
func RemoveSnapshots(ctx context.Context) error {
	if !slices.ContainsFunc(names("/", "sys/block"), func(name string) bool { return isLogical("/", name) }) {
		return nil
	}
	return removeSnapshots(ctx, func(name string) bool { return !alive(name) })
}

// isLogical says whether a block device is a logical volume, or a part of one.
func isLogical(root, name string) bool {
	return strings.HasPrefix(text(root, "sys/block", name, "dm/uuid"), "LVM-")
}

func removeSnapshots(ctx context.Context, which func(name string) bool) error {
	out, err := lvm(ctx, "lvs", "--reportformat", "json", "--options", "vg_name,lv_name", "@"+snapshotTag)
	if err != nil {
		return fmt.Errorf("look for snapshots of earlier captures: %w", err)
	}
	rows, err := parseReport(out, "lv")
	if err != nil {
		return err
	}
	var errs []error
	for _, r := range rows {
		if name := r["lv_name"]; snapshotName.MatchString(name) && which(name) {
			if _, err := lvm(ctx, "lvremove", "--force", "--yes", "--config", quietly, r["vg_name"]+"/"+name); err != nil {
				errs = append(errs, fmt.Errorf("remove snapshot %s of volume group %s: %w", name, r["vg_name"], err))
			}
		}
	}
	return errors.Join(errs...)
}

// quietly has lvm write nothing to /etc, which may stand still, and start nothing that stays.
const quietly = "backup{backup=0 archive=0} activation{monitoring=0}"

// nests says whether the kernel lets lvm freeze a file system that is frozen already. Before that a snapshot can only be made
// of a volume whose file system is left to lvm to freeze, so only one can be had at the same instant as anything else.
//
// Source: FREEZE_MAY_NEST, since Linux 6.8. It has been run, and is used, from 6.12 on.
func nests(release string) bool {
	var major, minor int
	_, err := fmt.Sscanf(release, "%d.%d", &major, &minor)
	return err == nil && (major > 6 || major == 6 && minor >= 12)
}

func release() string {
	var u unix.Utsname
	if unix.Uname(&u) != nil {
		return ""
	}
	return unix.ByteSliceToString(u.Release[:])
}
