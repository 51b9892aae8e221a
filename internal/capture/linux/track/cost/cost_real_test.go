package cost

import (
	"os"
	"testing"
	"time"
)

// Prints and asserts nothing but that it could be measured: how fast a shared machine is, is no promise.
func TestTheCostOfTrackingCanBeMeasured(t *testing.T) {
	if os.Getenv("MUSTER_REAL") == "" {
		t.Skip("set MUSTER_REAL=1 to load programs into this kernel and to run fio")
	}
	r, err := Measure(t.Context(), t.TempDir(), 2, time.Second)
	if err != nil {
		t.Fatal(err)
	}
	t.Log(r, r.Unproved)
	t.Log(r.Without, r.With)
}
