package dr

import (
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"
)

func TestBandwidthByTimeOfDay(t *testing.T) {
	ws, err := ParseWindows("mon-fri 08:00-18:00 2MB/s; sat,sun 22:00-06:00 none; 12:00-13:00 16Mbit/s; else 1GiB/s")
	if err != nil {
		t.Fatal(err)
	}
	for at, want := range map[string]int64{
		"2026-03-02T08:00": 2e6, "2026-03-02T17:59": 2e6, "2026-03-02T18:00": 1 << 30, "2026-03-02T12:30": 2e6, // Monday
		"2026-02-28T12:30": 2e6, "2026-02-28T22:00": -1, "2026-03-01T05:59": -1, "2026-03-01T06:00": 1 << 30, // Saturday, Sunday
		"2026-03-02T05:59": -1, "2026-02-28T05:00": 1 << 30, // the night after Sunday; the one after Friday
	} {
		when, err := time.Parse("2006-01-02T15:04", at)
		if err != nil {
			t.Fatal(err)
		}
		if got := ws.Rate(when); got != want {
			t.Errorf("%s %s: %d bytes a second, want %d", when.Weekday(), at, got, want)
		}
	}
	if ws, err := ParseWindows(" "); err != nil || ws.Rate(time.Now()) != 0 {
		t.Errorf("no windows: %v, %v", ws, err)
	}
}

// A window is wall-clock time on the days on which the clock is put forward and back as well.
func TestBandwidthWhenTheClocksChange(t *testing.T) {
	place, err := time.LoadLocation("Europe/Berlin")
	if err != nil {
		t.Skip(err)
	}
	ws, err := ParseWindows("01:30-03:30 none; else 1MB/s")
	if err != nil {
		t.Fatal(err)
	}
	for day, want := range map[string]time.Duration{"2026-03-28": 2 * time.Hour, "2026-03-29": time.Hour, "2026-10-25": 3 * time.Hour} {
		at, err := time.ParseInLocation("2006-01-02", day, place)
		if err != nil {
			t.Fatal(err)
		}
		var closed time.Duration
		for end := at.AddDate(0, 0, 1); at.Before(end); at = at.Add(time.Minute) {
			if ws.Rate(at) < 0 {
				closed += time.Minute
			}
		}
		if closed != want {
			t.Errorf("%s: nothing is sent for %s, want %s", day, closed, want)
		}
	}
}

func TestWindowsThatMeanNothingAreRefused(t *testing.T) {
	for _, text := range []string{"08:00-18:00", "8-18 2MB/s", "08:00-25:00 2MB/s", "mon 08:00 2MB/s", "someday 08:00-18:00 2MB/s", "08:00-18:00 2MB",
		"08:00-18:00 -1MB/s", "08:00-18:00 NaNMB/s", "24:00-06:00 none", "mon fri 08:00-18:00 none", strings.Repeat("else none;", 65)} {
		if ws, err := ParseWindows(text); err == nil {
			t.Errorf("%q was read as %v", text, ws)
		}
	}
}

func TestAnyTextIsReadOrRefused(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		ws, err := ParseWindows(rapid.StringMatching(`[a-z0-9:;,/ MBs-]{0,60}`).Draw(t, "text"))
		if err == nil {
			ws.Rate(time.Now())
		}
	})
}
