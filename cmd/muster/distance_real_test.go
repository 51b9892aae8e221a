package main

import (
	"path/filepath"
	"testing"
	"time"

	"github.com/musterdr/muster/internal/dr"
	"github.com/musterdr/muster/internal/lab/cable"
)

// abroad makes a machine at the end of a long cable.
func (r *realm) abroad(name, host string, l cable.Line, command ...string) (*place, *cable.Cable) {
	r.t.Helper()
	p, far := r.place(name, host, command...), r.net+"f"+name
	long := p.move(r.hosts+host+"/24", far, l)
	return r.wire(p, far, command), long
}

// sent takes a snapshot of another day, on which so much was changed, checks that it is good, and says how long after that it had
// arrived, and how many bytes went over a line for it.
func (r *realm) sent(t *testing.T, line *cable.Cable, changed int) (took time.Duration, bytes int64) {
	t.Helper()
	r.day++
	fresh := filepath.Join(r.dir, "fresh")
	noise(t, fresh, changed, r.day)
	sh(t, "dd if=%s of=%s bs=1M conv=notrunc status=none", fresh, r.disk())
	in, out := line.Carried()
	op, err := r.api.Snapshot(t.Context(), "shop")
	if err != nil {
		t.Fatal(err)
	}
	r.passed(t, op, "a")
	after, before := line.Carried()
	rec, err := r.api.Record(t.Context(), op.Subject)
	arrived := r.events(t, "snapshot.replicated", op.Subject)
	if err != nil || len(arrived) != 1 {
		t.Fatalf("it has arrived %d times, %v", len(arrived), err)
	}
	return arrived[0].At.Sub(rec.Snapshot.Taken), after - in + before - out
}

// The appliance is 300 ms away from its master, there and back, and so is the silo. That opens
// the master's store over its line; its make-believe machines read next to nothing of it.
func TestWhatIsFarAwayOnlyTakesLonger(t *testing.T) {
	const delay = 150 * time.Millisecond
	r := newGround(t, "d", "10.213.83.")
	r.patience = 2 * time.Minute
	r.files()
	var lines [2]*cable.Cable
	r.hq = r.place("hq", "1", "serve")
	r.box, lines[0] = r.abroad("box", "2", cable.Line{Delay: delay}, "appliance", "serve")
	r.silos["a"], lines[1] = r.abroad("a", "3", cable.Line{Delay: delay}, "silo", "serve")
	over := func(l cable.Line) {
		for _, line := range lines {
			line.Set(l)
		}
	}
	r.master()
	r.joined("a")
	r.box.ok("appliance", "join", r.invite("--customer", "acme", "--appliance", "box"))
	r.box.serve()
	r.until(t, "the appliance is there", r.connected)
	r.write()
	r.hq.ok("server", "add", "shop", "--appliance", "box", "--disk", r.disk(), "--every", "9000h", "--signs", "off", "--check", r.checks())
	r.until(t, "the first snapshot is good", func() bool {
		all, err := r.api.Snapshots(t.Context(), "shop")
		return err == nil && len(all) == 1 && all[0].LKG
	})

	long, bytes := r.sent(t, lines[0], realmDisk)
	over(cable.Line{})
	short, same := r.sent(t, lines[0], realmDisk)
	t.Logf("%d MB took %.2f s over a round trip of %s, and %.2f s over none: %.0f round trips", bytes>>20, long.Seconds(), 2*delay, short.Seconds(), float64(long-short)/float64(2*delay))
	if bytes > same+same/20 {
		t.Errorf("%d bytes were sent over a long line, %d over a short one", bytes, same)
	}
	if most := farRounds * 2 * delay; long-short > most {
		t.Errorf("over a long line it took %s longer: somebody waits for one thing after another", (long - short).Round(time.Millisecond))
	}

	over(cable.Line{Delay: delay, Jitter: delay / 10, Loss: 0.002}) // on which TCP carries a megabit a second
	worst, _ := r.sent(t, lines[0], 1<<20)
	t.Logf("1 MB took %.2f s over one that loses, and where packets overtake each other", worst.Seconds())
	if s := r.state("a"); s != dr.SiloActive {
		t.Errorf("a silo far away is %s", s)
	}
	if lost := r.events(t, "silo.lost", ""); len(lost) > 0 {
		t.Errorf("silos were lost for being far away: %+v", lost)
	}
}

// farRounds is for how many round trips a replication may wait: some twenty for the questions before and after, and ten until TCP has
// found out how much a line carries.
const farRounds = 45
