//go:build linux

package agent

import (
	"net"
	"os"
	"testing"

	"github.com/musterdr/muster/internal/capture/wire"
	"github.com/musterdr/muster/internal/fileset"
)

func TestAFileOfWhichNotAllArrivesIsNotPutBack(t *testing.T) {
	top := t.TempDir()
	ours, theirs := net.Pipe()
	ended := make(chan error, 1)
	go func() { ended <- Agent{Top: top}.Serve(t.Context(), theirs, theirs) }()
	r, w := wire.NewReader(ours), wire.NewWriter(ours)
	if err := r.Greeting(); err != nil {
		t.Fatal(err)
	}
	if _, _, err := r.Next(nil); err != nil {
		t.Fatal(err)
	}
	uid, gid := uint32(os.Getuid()), uint32(os.Getgid())
	e := &fileset.Entry{Kind: fileset.File, Path: "/half", UID: uid, GID: gid, Mode: 0o600, Size: 10}
	for _, err := range []error{w.Message(wire.KindAskRestore, wire.RestorePlan{Suffix: ".restored-x"}), w.Put(e, false), w.Piece(false, []byte("half")), w.Flush()} {
		if err != nil {
			t.Fatal(err)
		}
	}
	ours.Close()
	theirs.Close()
	if err := <-ended; err == nil {
		t.Error("the agent took half a file for the whole")
	}
	if left, err := os.ReadDir(top); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}
