package remote

import (
	"context"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/kopia/kopia/repo/blob"
)

func TestTheIndexIsAskedForOnceAndNeverTakenForNewerThanItIs(t *testing.T) {
	var asked atomic.Int32
	list := func(context.Context, blob.ID) ([]blob.Metadata, error) {
		asked.Add(1)
		return []blob.Metadata{{BlobID: "xe1"}, {BlobID: "xn0_a"}, {BlobID: "xn1_b"}}, nil
	}
	l := &lists{}
	get := func(prefix blob.ID) int {
		all, err := l.get(t.Context(), prefix, list)
		if err != nil {
			t.Error(err)
		}
		return len(all)
	}
	refresh := func() {
		var together sync.WaitGroup
		for _, prefix := range []blob.ID{"xr", "xe", "xs", "xw"} {
			together.Go(func() { get(prefix) })
		}
		together.Wait()
	}
	now := func(what string, most int32) {
		t.Helper()
		if n := asked.Swap(0); n == 0 || n > most {
			t.Errorf("%s: asked %d times", what, n)
		}
	}
	refresh()
	now("four parts", 4) // a busy host may be slow to ask
	if n := get("xn0_"); n != 1 {
		t.Errorf("%d blobs", n)
	}
	asked.Store(0)
	refresh()
	now("four parts again", 4)
	l.changed()
	get("xn0_")
	now("after a change", 3)
	get("xn0_")
	now("the same again", 3)
	if n := get("p"); n == 0 {
		t.Error("other lists are not asked for")
	}
}
