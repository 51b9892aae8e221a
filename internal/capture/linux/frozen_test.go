package linux

import (
	"strings"
	"testing"
)

func TestInnerFileSystemsAreFrozenBeforeOuterOnesAndTheRootLast(t *testing.T) {
	root := tree(t, map[string]string{
		"proc/self/mountinfo": strings.Join([]string{
			"1 0 8:1 / / rw - ext4 /dev/sda1 rw",
			"2 1 8:17 / /srv rw - xfs /dev/sdb1 rw",
			"3 2 8:18 / /srv/db rw - xfs /dev/sdb2 rw",
			"4 1 8:17 /x /bind rw - xfs /dev/sdb1 rw",  // the same file system again
			"5 1 8:33 / /other rw - ext4 /dev/sdc1 rw", // on a disk that is not captured
			"6 1 8:19 / /ro ro - ext4 /dev/sdb3 ro",    // cannot change
			"7 1 8:20 / /ro2 ro - ext4 /dev/sdb4 rw",   // can, through another mount
			"8 1 7:0 / /img rw - ext4 /dev/loop0 rw",   // lives in a file on /srv
			"9 1 0:30 / /run rw - tmpfs tmpfs rw",
		}, "\n") + "\n",
		"sys/block/sda/dev": "8:0", "sys/block/sda/sda1/partition": "1", "sys/block/sda/sda1/dev": "8:1",
		"sys/block/sdb/dev": "8:16", "sys/block/sdb/sdb1/partition": "1", "sys/block/sdb/sdb1/dev": "8:17",
		"sys/block/sdb/sdb2/partition": "2", "sys/block/sdb/sdb2/dev": "8:18", "sys/block/sdb/sdb3/partition": "3", "sys/block/sdb/sdb3/dev": "8:19",
		"sys/block/sdb/sdb4/partition": "4", "sys/block/sdb/sdb4/dev": "8:20",
		"sys/block/sdc/dev": "8:32", "sys/block/sdc/sdc1/partition": "1", "sys/block/sdc/sdc1/dev": "8:33",
		"sys/block/loop0/dev": "7:0", "sys/block/loop0/loop/backing_file": "/srv/disk.img",
	})
	systems, err := writableOn(root, []string{"sda", "sdb"})
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, s := range systems {
		got = append(got, s.Path)
	}
	equal(t, "order", strings.Join(got, " "), "/img /srv/db /ro2 /srv /")
}

func TestWritesBelowTheFileSystemsAreNoticedAndSwapIsNot(t *testing.T) {
	files := map[string]string{
		"sys/block/sda/dev": "8:0", "sys/block/sda/stat": "1 0 8 0 5 0 100 0 0 0 0 0 0 0 0 0 0",
		"sys/block/sdb/dev": "8:16", "sys/block/sdb/stat": "1 0 8 0 5 0 100 0 0 0 0 0 0 0 0 0 0",
		"sys/block/sdb/sdb1/partition": "1", "sys/block/sdb/sdb1/dev": "8:17", "sys/block/sdb/sdb1/stat": "1 0 8 0 5 0 40 0 0 0 0 0 0 3",
		"sys/block/dm-0/dev": "253:0", "sys/block/dm-0/slaves/sdb1": "", "sys/block/dm-0/stat": "1 0 8 0 5 0 7 0 0 0 0",
		"proc/vmstat": "pswpin 9\npswpout 10\n",
	}
	root := tree(t, files)
	equal(t, "counted", counted(root, []string{"sda", "sdb"}), []string{"dm-0", "sda"})
	equal(t, "a partition", written(root, "sdb1"), int64(43*512))
	before := readCounters(root, []string{"sda"})
	files["sys/block/sda/stat"] = "1 0 8 0 6 0 108 0 0 0 0 0 0 0 0 0 0"
	if err := before.disturbed(readCounters(tree(t, files), []string{"sda"})); err == nil {
		t.Error("4096 bytes written below the file systems were not noticed")
	}
	files["proc/vmstat"] = "pswpout 11\n"
	if err := before.disturbed(readCounters(tree(t, files), []string{"sda"})); err != nil {
		t.Errorf("a page that was swapped out: %v", err)
	}
}
