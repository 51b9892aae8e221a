package dr

import (
	"reflect"
	"slices"
	"testing"
	"time"

	"pgregory.net/rapid"
)

var noon = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

func snap(id string, taken time.Time) Snapshot { return Snapshot{ID: id, Taken: taken} }

func TestOnlyAPassMovesLastKnownGood(t *testing.T) {
	tested := snap("b", noon)
	for _, o := range []Outcome{Fail, Blocked, Inconclusive, ""} {
		if Promotes(Verdict{SnapshotID: "b", Outcome: o}, tested, "", nil) {
			t.Errorf("outcome %q promoted", o)
		}
	}
	if !Promotes(Verdict{SnapshotID: "b", Outcome: Pass}, tested, "", nil) {
		t.Error("the first PASS did not promote")
	}
	if Promotes(Verdict{SnapshotID: "other", Outcome: Pass}, tested, "", nil) {
		t.Error("a verdict on another snapshot promoted this one")
	}
}

func TestLastKnownGoodMovesForwardOnly(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var present *Snapshot
		for range rapid.IntRange(1, 30).Draw(t, "tests") {
			s := snap(rapid.StringMatching(`[a-e]`).Draw(t, "id"), noon.Add(time.Duration(rapid.IntRange(-50, 50).Draw(t, "hours"))*time.Hour))
			v := Verdict{SnapshotID: s.ID, Outcome: rapid.SampledFrom([]Outcome{Pass, Fail, Inconclusive}).Draw(t, "outcome")}
			if !Promotes(v, s, "", present) {
				continue
			}
			if v.Outcome != Pass || (present != nil && !s.Taken.After(present.Taken)) {
				t.Fatalf("moved from %v to %v on %s", present, s, v.Outcome)
			}
			present = &s
		}
	})
}

func TestAVerdictThatAskedNothingFails(t *testing.T) {
	for name, results := range map[string][]CheckResult{
		"none":         nil,
		"only skipped": {{Name: "ports", State: CheckSkip}},
	} {
		if o, code, _ := Judge(results); o != Fail || code != CodeNothingChecked {
			t.Errorf("%s: %s (%s)", name, o, code)
		}
	}
	if o, _, _ := Judge([]CheckResult{{Name: "a", State: CheckPass}, {Name: "b", State: CheckWarn}}); o != Pass {
		t.Errorf("a warning failed the verdict: %s", o)
	}
	if o, code, _ := Judge([]CheckResult{{State: CheckPass}, {State: CheckFail, Code: CodeServiceFailed}}); o != Fail || code != CodeServiceFailed {
		t.Errorf("a failed check gave %s (%s)", o, code)
	}
}

func TestTheNewestLKGAndPinnedSnapshotsAreNeverExpired(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var records []Record
		pinned := map[string]bool{}
		n := rapid.IntRange(0, 20).Draw(t, "n")
		for i := range n {
			r := Record{Snapshot: snap(string(rune('a'+i)), noon.Add(time.Duration(i)*time.Hour)),
				State: rapid.SampledFrom([]State{Kept, PreRecovered, Verified, Rejected, Expired}).Draw(t, "state")}
			if rapid.Bool().Draw(t, "pin") {
				pinned[r.Snapshot.ID] = true
			}
			records = append(records, r)
		}
		lkg := rapid.SampledFrom([]string{"", "a", "c", "f"}).Draw(t, "lkg")
		keep := rapid.IntRange(0, 5).Draw(t, "keep")
		got := Expirable(records, Retention{KeepLast: keep}, lkg, pinned)
		newest := ""
		live := 0
		for _, r := range records {
			if r.State != Expired {
				newest = r.Snapshot.ID
				live++
			}
		}
		for _, id := range got {
			if id == lkg || id == newest || pinned[id] {
				t.Fatalf("%s would be expired (lkg %q, newest %q, pinned %v)", id, lkg, newest, pinned)
			}
		}
		if keep == 0 && len(got) > 0 {
			t.Fatal("a rule that keeps all expired something")
		}
		if keep > 0 && live-len(got) < min(live, keep) {
			t.Fatalf("%d live, keep %d, %d expired", live, keep, len(got))
		}
		if !slices.IsSorted(got) {
			t.Fatalf("not oldest first: %v", got)
		}
	})
}

func TestOneProblemHasOneKeyHoweverManyNightsItLasts(t *testing.T) {
	fail := Verdict{Outcome: Fail, Code: CodePanic}
	if a, b := ProblemAfter(fail, nil), ProblemAfter(fail, []Verdict{fail, fail}); a == "" || a != b {
		t.Errorf("keys %q and %q", a, b)
	}
	shaky := Verdict{Outcome: Inconclusive}
	if p := ProblemAfter(shaky, []Verdict{{Outcome: Pass}}); p != "" {
		t.Errorf("one inconclusive test is no problem yet, got %q", p)
	}
	if p := ProblemAfter(shaky, []Verdict{shaky}); p == "" {
		t.Error("two inconclusive tests in a row are a problem")
	}
	missed := false
	if p := ProblemAfter(Verdict{Outcome: Pass, RTOMet: &missed}, nil); p != "rto-missed" {
		t.Errorf("a missed promise gave %q", p)
	}
	if !Problem("test-failed/kernel-panic").ClosedByPass() || ProblemStore.ClosedByPass() {
		t.Error("a passing test closes failures of tests and nothing else")
	}
}

func TestAClockSteppedBackMakesASnapshotDueAtOnce(t *testing.T) {
	s := Schedule{Every: 24 * time.Hour}
	if got := s.Due(noon.Add(time.Hour), noon); !got.Equal(noon) {
		t.Errorf("due %s, want now", got)
	}
	if got := s.Due(noon.Add(-time.Hour), noon); !got.Equal(noon.Add(23 * time.Hour)) {
		t.Errorf("due %s", got)
	}
	if got := s.Due(time.Time{}, noon); !got.Equal(noon) {
		t.Errorf("never captured: due %s, want now", got)
	}
}

func TestMeasuredTimesAreThoseOfTheDefinitions(t *testing.T) {
	// R125: down 14:00, up 17:00 is an RTO of 3 h. R126: backup 18:00, failure 17:00 the next day is an RPO of 23 h.
	v := Verdict{RTA: 3 * time.Hour, RPA: 23 * time.Hour}
	v.MeetObjectives(Objectives{RTO: 3 * time.Hour, RPO: 22 * time.Hour})
	if v.RTOMet == nil || !*v.RTOMet || v.RPOMet == nil || *v.RPOMet {
		t.Errorf("RTO met %v, RPO met %v", v.RTOMet, v.RPOMet)
	}
}

func TestNamesAndAddressesAreChecked(t *testing.T) {
	for _, bad := range []string{"", "-a", "a-", "A", "a_b", "a/b", "a b", "ä", string(make([]byte, 64)), "a.b"} {
		if ValidateName(bad) == nil {
			t.Errorf("name %q accepted", bad)
		}
	}
	for text, want := range map[string]SSHSource{
		"root@10.0.0.5":       {User: "root", Host: "10.0.0.5", Port: 22},
		"root@shop:2222":      {User: "root", Host: "shop", Port: 2222},
		"root@[fe80::1]:2222": {User: "root", Host: "fe80::1", Port: 2222},
		"root@[fe80::1]":      {User: "root", Host: "fe80::1", Port: 22},
		"root@fe80::1":        {User: "root", Host: "fe80::1", Port: 22},
	} {
		if got, err := ParseSSH(text); err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("%q: %+v, %v", text, got, err)
		}
	}
	for _, bad := range []string{"shop", "@shop", "root@", "root@shop:x", "root@shop:0", "root@-oProxyCommand=x", "root@a b"} {
		if got, err := ParseSSH(bad); err == nil {
			t.Errorf("%q accepted as %+v", bad, got)
		}
	}
}

func TestACheckThatCouldNotFailIsRefused(t *testing.T) {
	for name, c := range map[string]Check{
		"no name":            {Kind: CheckTCP, Address: "a:1"},
		"query, no value":    {Name: "q", Kind: CheckPostgres, Query: "select 1"},
		"bad expression":     {Name: "h", Kind: CheckHTTP, URL: "http://a/", Body: "("},
		"no such kind":       {Name: "x", Kind: "ping"},
		"file url":           {Name: "h", Kind: CheckHTTP, URL: "file:///etc/passwd"},
		"empty command":      {Name: "c", Kind: CheckCommand},
		"endless timeout":    {Name: "c", Kind: CheckTCP, Address: "a:1", Timeout: 48 * time.Hour},
		"tcp without adress": {Name: "t", Kind: CheckTCP},
	} {
		if c.Validate() == nil {
			t.Errorf("%s: accepted", name)
		}
	}
	good := Check{Name: "orders", Kind: CheckPostgres, Address: "/run/postgresql", Query: "select count(*) from orders", Expect: `^\d+$`}
	if err := good.Validate(); err != nil {
		t.Error(err)
	}
}

func TestIdentifiersAreFileNames(t *testing.T) {
	seen := map[string]bool{}
	for range 1000 {
		for _, id := range []string{NewID("srv"), NewSnapshotID(noon)} {
			if err := ValidateID(id); err != nil || seen[id] {
				t.Fatalf("identifier %q: %v, seen %v", id, err, seen[id])
			}
			seen[id] = true
		}
	}
	for _, bad := range []string{"", "..", "snap-", "snap-a/b", "snap-a.b", "Snap-a", "snap"} {
		if ValidateID(bad) == nil {
			t.Errorf("identifier %q accepted", bad)
		}
	}
}

func TestAnExpiredSnapshotStaysExpired(t *testing.T) {
	for _, to := range []State{Kept, PreRecovered, Verified, Rejected} {
		if Follow(Expired, to) == nil {
			t.Errorf("expired became %s", to)
		}
	}
	if err := Follow(Kept, PreRecovered); err != nil {
		t.Error(err)
	}
	if Follow(Kept, Verified) == nil {
		t.Error("a snapshot was verified without a rescue image")
	}
}

func TestAVirtualMachineIsReadOnItsOwnHostOnly(t *testing.T) {
	for uri, socket := range map[string]string{"": "", "qemu:///system": "", "qemu:///system?socket=/run/other/libvirt-sock": "/run/other/libvirt-sock"} {
		if got, err := (VMSource{URI: uri, Domain: "web"}).Socket(); err != nil || got != socket {
			t.Errorf("%q: %q, %v", uri, got, err)
		}
	}
	for _, uri := range []string{"qemu+ssh://root@far/system", "qemu:///session", "xen:///", "qemu:///system?socket=relative", "qemu:///system?socket=/a&mode=direct"} {
		if _, err := (VMSource{URI: uri, Domain: "web"}).Socket(); err == nil {
			t.Errorf("%q was taken", uri)
		}
	}
	s := Server{Name: "web", Schedule: Schedule{Every: DefaultEvery}, Source: Source{VM: &VMSource{Domain: "web"}}}
	if err := s.Validate(); err != nil || s.Source.Kind() != "vm" || s.Source.String() != "web on qemu:///system" {
		t.Errorf("%v, %s: %s", err, s.Source.Kind(), s.Source)
	}
	s.Source.Disks = []string{"/a"}
	if s.Validate() == nil {
		t.Error("two sources were taken")
	}
	s.Source = Source{VM: &VMSource{Domain: "../etc"}}
	if s.Validate() == nil {
		t.Error("a path was taken for a machine")
	}
}
