package files

import (
	"context"
	"errors"
	"testing"

	"github.com/musterdr/muster/internal/api"
	"github.com/musterdr/muster/internal/dr"
)

// bare is an opener on a host that lacks something.
type bare struct{ t *testing.T }

func (bare) Ready() error {
	return errors.New("guestfish is not installed: apt-get install libguestfs-tools")
}

func (b bare) Open(context.Context, []Disk) (Guest, error) {
	b.t.Error("an image was opened all the same")
	return nil, errors.New("no")
}

// Who asks from elsewhere has to learn which host it is that lacks something, and what to do there.
func TestAHostThatCannotOpenImagesSaysWhichItIsAndWhatItLacks(t *testing.T) {
	for _, c := range []struct {
		host   string
		opener Opener
		want   string
	}{
		{"the appliance office", bare{t}, "look into the image snap-1: the appliance office cannot open images now: guestfish is not installed: apt-get install libguestfs-tools"},
		{"", nil, "look into the image snap-1: this installation opens no images"},
	} {
		b := New(nil, c.opener, t.TempDir())
		b.Host = c.host
		_, err := b.launch(t.Context(), dr.Snapshot{ID: "snap-1"})
		if err == nil || err.Error() != c.want || api.KindOf(err) != api.Unavailable {
			t.Errorf("got %v (%v), want %s", err, api.KindOf(err), c.want)
		}
	}
}
