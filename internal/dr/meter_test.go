package dr

import (
	"testing"
	"time"
)

func at(text string) time.Time {
	t, err := time.Parse("2006-01-02 15:04", text)
	if err != nil {
		panic(err)
	}
	return t
}

func TestAMonthIsMeteredPerCustomer(t *testing.T) {
	m, err := NewMeter("2026-11", at("2026-12-20 00:00"))
	if err != nil {
		t.Fatal(err)
	}
	m.Server("srv-a", "acme")
	m.Server("srv-b", "")
	m.Server("srv-c", "gone")
	books := map[string]*Books{"srv-a": {}, "srv-b": {}, "srv-c": {}}
	image := func(server, taken string, size, stored, sent int64) Snapshot {
		s := Snapshot{ServerID: server, Taken: at(taken), Disks: []SnapshotDisk{{Size: size}}, Stats: CaptureStats{Stored: stored, Sent: sent}}
		books[server].Snapshot(s)
		return s
	}
	none := func() (Newest, error) { return Newest{}, nil }
	image("srv-a", "2026-10-31 23:59", 100, 50, 60) // kept, of another month
	first := image("srv-a", "2026-11-01 00:00", 110, 5, 6)
	newest := image("srv-a", "2026-11-30 23:59", 120, 7, 8)
	if err := books["srv-a"].Expired(first, at("2026-11-30 23:59"), none); err != nil {
		t.Fatal(err)
	}
	if err := books["srv-a"].Expired(newest, at("2026-12-01 00:01"), none); err != nil { // it was kept at the end
		t.Fatal(err)
	}
	image("srv-a", "2026-12-01 00:00", 999, 999, 999) // after the end
	books["srv-a"].Snapshot(Snapshot{ServerID: "srv-a", Kind: SnapshotData, Taken: at("2026-11-02 00:00"), Files: &SnapshotFiles{Bytes: 30}})
	image("srv-b", "2026-11-05 00:00", 40, 4, 0)
	if err := books["srv-c"].Expired(image("srv-c", "2026-09-01 00:00", 40, 4, 0), at("2026-10-05 00:00"), none); err != nil {
		t.Fatal(err)
	}
	for taken, sent := range map[string]int64{"2026-10-31 23:59": 1000, "2026-11-01 00:00": 20, "2026-11-30 23:59": 3, "2026-12-01 00:00": 4000} {
		books["srv-a"].Arrival(at(taken), sent)
	}
	hw := Hardware{Memory: 1024, CPUs: 2}
	test := Verdict{Started: at("2026-11-05 01:00"), Phases: []Phase{{Duration: 40 * time.Second}, {Duration: 20 * time.Second}}}
	books["srv-a"].Test(test, hw)
	books["srv-a"].Test(Verdict{Started: test.Started}, hw) // no machine was started
	test.Started = at("2026-12-05 01:00")
	books["srv-a"].Test(test, hw)
	for server, b := range books {
		var stored int64
		var last Book
		for _, page := range *b {
			if page.Month <= m.Month() {
				stored, last = stored+page.Stored, page
			}
		}
		m.Book(server, last, stored)
	}
	ended := at("2026-11-01 01:00")
	m.Invocation(Invocation{ServerID: "srv-b", Requested: at("2026-10-31 00:00"), Ended: &ended}, hw) // an hour of it
	m.Invocation(Invocation{ServerID: "srv-b", Requested: at("2026-11-30 23:00")}, hw)                // runs on
	m.Invocation(Invocation{ServerID: "srv-b", Requested: at("2026-12-01 00:00")}, hw)

	want := []Metered{
		{Month: "2026-11", Servers: 1, Protected: 40, Stored: 4, Added: 4, Snapshots: 1,
			Invocations: Capacity{Machines: 2, Seconds: 7200, Memory: 7200 * 1024, CPUs: 14400}},
		{Month: "2026-11", Customer: "acme", Servers: 1, Protected: 150, Stored: 57, Added: 12, Sent: 14, Replicated: 23, Snapshots: 3,
			Tests: Capacity{Machines: 1, Seconds: 60, Memory: 60 * 1024, CPUs: 120}},
	}
	got := m.Result()
	if len(got) != len(want) {
		t.Fatalf("%+v", got)
	}
	for i := range want {
		if got[i] != want[i] {
			t.Errorf("metered %+v\nwant    %+v", got[i], want[i])
		}
	}
}

func TestWhatStillRunsIsMeteredUpToNow(t *testing.T) {
	m, err := NewMeter("2026-11", at("2026-11-10 12:00"))
	if err != nil {
		t.Fatal(err)
	}
	m.Invocation(Invocation{ServerID: "srv-a", Requested: at("2026-11-10 10:00")}, Hardware{Memory: 512, CPUs: 1})
	if got := m.Result(); len(got) != 1 || got[0].Invocations.Seconds != 7200 {
		t.Errorf("%+v", got)
	}
}

func TestAMonthThatHasNotBegunOrIsNoneIsRefused(t *testing.T) {
	for _, month := range []string{"2026-12", "2026-13", "11-2026", "", "2026-11-01"} {
		if _, err := NewMeter(month, at("2026-11-10 12:00")); err == nil {
			t.Errorf("%q was metered", month)
		}
	}
}
