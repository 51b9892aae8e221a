package dr

import "time"

// An inconclusive test says nothing of the image, so that it is held again by itself: after a wait that is doubled each time, and
// only so often.
const (
	firstRetest = 10 * time.Minute
	RetestLimit = 4 // a snapshot, in a row
)

// Retest says when the test of a server's newest snapshot is to be held again, by its verdict that is recorded now; zero for not by
// itself. recent are the server's verdicts before it, newest first, RetestLimit of them or all.
func Retest(v Verdict, recent []Verdict, now time.Time) time.Time {
	if v.Outcome != Inconclusive {
		return time.Time{}
	}
	again := 0
	for _, r := range recent {
		if r.Outcome != Inconclusive || r.SnapshotID != v.SnapshotID {
			break
		}
		again++
	}
	if again >= RetestLimit {
		return time.Time{}
	}
	return now.Add(firstRetest << again)
}
