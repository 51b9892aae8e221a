package dr

import (
	"testing"
	"time"
)

func TestAnInconclusiveTestIsHeldAgainLaterAndLaterAndNotForEver(t *testing.T) {
	now := time.Date(2026, 3, 1, 2, 0, 0, 0, time.UTC)
	unsure := Verdict{SnapshotID: "snap-2", Outcome: Inconclusive}
	var recent []Verdict
	for n, want := range []time.Duration{10 * time.Minute, 20 * time.Minute, 40 * time.Minute, 80 * time.Minute} {
		if got := Retest(unsure, recent, now); !got.Equal(now.Add(want)) {
			t.Errorf("after inconclusive test %d: %v", n+1, got.Sub(now))
		}
		recent = append([]Verdict{unsure}, recent...)
	}
	if got := Retest(unsure, recent, now); !got.IsZero() {
		t.Errorf("it goes on for ever: %v", got)
	}
	for _, outcome := range []Outcome{Pass, Fail, Blocked} {
		if got := Retest(Verdict{SnapshotID: "snap-2", Outcome: outcome}, recent, now); !got.IsZero() {
			t.Errorf("after %s: %v", outcome, got)
		}
	}
	for _, before := range []Verdict{{SnapshotID: "snap-1", Outcome: Inconclusive}, {SnapshotID: "snap-2", Outcome: Pass}} { // the row begins anew
		if got := Retest(unsure, []Verdict{before, unsure, unsure, unsure}, now); !got.Equal(now.Add(10 * time.Minute)) {
			t.Errorf("after %+v: %v", before, got.Sub(now))
		}
	}
}
