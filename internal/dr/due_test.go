package dr

import (
	"testing"
	"time"

	"pgregory.net/rapid"
)

// However the clock is stepped: a step delays a capture by no more than its time, and causes no more than one.
func TestAStepOfTheClockMakesNeitherNeverNorAlways(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		s := Server{Schedule: Schedule{Every: 24 * time.Hour}}
		clock := time.Date(2026, 3, 1, 0, 0, 0, 0, time.UTC)
		var kept []Snapshot
		captures, steps, stepsSince, sinceLast := 0, 0, 0, time.Duration(0)
		var attempt Attempt
		hours := 24 * 30
		for range hours {
			if rapid.IntRange(0, 99).Draw(t, "step") == 0 {
				clock = clock.Add(time.Duration(rapid.IntRange(-24*400, 24*400).Draw(t, "by")) * time.Hour)
				steps, stepsSince = steps+1, stepsSince+1
			}
			taken := TakenOf(kept)
			if !s.Dues(taken, clock).Next().After(clock) && !attempt.Again(s, clock).After(clock) {
				attempt = attempt.Begin(taken.Last, clock)
				kept = append(kept, Snapshot{Taken: clock})
				captures++
				sinceLast, stepsSince = 0, 0
			}
			clock, sinceLast = clock.Add(time.Hour), sinceLast+time.Hour
			if sinceLast > time.Duration(25*(1+stepsSince))*time.Hour {
				t.Fatalf("no capture for %s, in which the clock was stepped %d times", sinceLast, stepsSince)
			}
		}
		if most := hours/24 + 1 + steps; captures > most {
			t.Fatalf("%d captures in %d hours with %d steps of the clock", captures, hours, steps)
		}
	})
}

func TestFailuresAreTriedAgainLaterAndLater(t *testing.T) {
	s := Server{Schedule: Schedule{Every: 24 * time.Hour}}
	now := time.Date(2026, 3, 1, 0, 0, 0, 0, time.UTC)
	var a Attempt
	var waits []time.Duration
	for range 8 {
		a = a.Begin(time.Time{}, now)
		waits = append(waits, a.Again(s, now).Sub(now))
		now = a.Again(s, now)
	}
	if waits[0] != 5*time.Minute || waits[1] != 10*time.Minute || waits[7] != 2*time.Hour {
		t.Errorf("waits %v", waits)
	}
	if a = a.Begin(now, now); a.Failures != 1 {
		t.Errorf("after something was kept it counts %d failures", a.Failures)
	}
}
