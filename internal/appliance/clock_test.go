package appliance

import (
	"log/slog"
	"testing"
	"time"
)

func TestWhatIsDoneIsDatedByTheMastersClock(t *testing.T) {
	ahead := 40 * time.Minute
	n := &Node{NodeConfig: NodeConfig{Log: slog.New(slog.DiscardHandler), Now: func() time.Time { return time.Now().Add(ahead) }}}
	off := func() time.Duration { return time.Until(n.now()).Round(time.Minute) }
	if off() != ahead {
		t.Errorf("before the master was heard of it is %s off", off())
	}
	asked := n.Now()
	n.compare(t.Context(), asked, asked, time.Now())
	if off() != 0 {
		t.Errorf("after that it is %s off", off())
	}
	n.compare(t.Context(), n.Now(), n.Now(), time.Time{}) // an earlier release that does not say
	if off() != 0 {
		t.Errorf("a master that says nothing makes it %s off", off())
	}
	ahead = 0
	asked = n.Now()
	n.compare(t.Context(), asked, asked, time.Now())
	if off() != 0 {
		t.Errorf("a clock that is right is taken to be %s off", off())
	}
}
