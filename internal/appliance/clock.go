package appliance

import (
	"context"
	"time"

	"github.com/musterdr/muster/internal/dr"
)

// What an appliance does is dated by its master's clock, which everything of an installation is compared by: how old last-known-good is,
// which snapshot is the newer one. The master says what time it is whenever it is asked. Until it has, and where its clock
// and this machine's hardly differ, this machine's counts.

// clock is how this machine's clock compared with the master's.
type clock struct {
	at    time.Time     // when, by ours
	ahead time.Duration // how far ours was ahead; 0 if it hardly was
}

// compare takes over the master's time, which it told between two instants of ours.
func (n *Node) compare(ctx context.Context, before, after, master time.Time) {
	if master.IsZero() {
		return
	}
	c := clock{at: after, ahead: before.Add(after.Sub(before) / 2).Sub(master)}
	if c.ahead.Abs() <= dr.ClockSlack {
		c.ahead = 0
	}
	was := n.clock.Swap(&c)
	if was == nil {
		was = &clock{}
	}
	if (c.ahead - was.ahead).Abs() > dr.ClockSlack {
		n.Log.WarnContext(ctx, "what is done here is dated by the master's clock: this machine's differs", "by", c.ahead.Round(time.Second), "master", master)
	}
}

// now is what time it is.
func (n *Node) now() time.Time { return n.date(n.Now()) }

// date says for an instant of a little while ago by this machine's clock when it was.
func (n *Node) date(at time.Time) time.Time {
	c := n.clock.Load()
	if c == nil || c.ahead == 0 {
		return at
	}
	now := n.Now()
	passed, shown := now.Sub(c.at), now.Round(0).Sub(c.at.Round(0)) // without the monotonic reading it is what the clock shows
	if (shown - passed).Abs() > dr.ClockSlack {
		return at // it was set since; the master is asked again soon
	}
	return at.Add(-c.ahead)
}
