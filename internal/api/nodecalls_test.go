package api

import (
	"context"
	"errors"
	"net/http/httptest"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/musterdr/muster/internal/dr"
)

// answering is a silo that answers what a test says.
type answering struct {
	Silo
	pre  func(ctx context.Context, report dr.Progress) (dr.PreRecovery, error)
	reap []string
}

func (a answering) PreRecover(ctx context.Context, task PreRecoverTask, report dr.Progress) (dr.PreRecovery, error) {
	return a.pre(ctx, report)
}
func (a answering) Reap(context.Context, []string) ([]string, error) { return a.reap, nil }
func (a answering) Tend(context.Context, InvokeTask) (bool, error)   { return false, nil }
func (a answering) Discard(_ context.Context, id string) error {
	return Errorf(NotFound, "no %s here", id)
}
func (a answering) Diagnose(context.Context) []Finding { return []Finding{{Name: "kvm", State: "ok"}} }

func remote(t *testing.T, s Silo) Silo {
	t.Helper()
	server := httptest.NewUnstartedServer(SiloHandler(s))
	server.EnableHTTP2 = true
	server.StartTLS()
	t.Cleanup(server.Close)
	return RemoteSilo(server.Client(), server.URL)
}

func TestWhatASiloAnswersArrivesAsItIs(t *testing.T) {
	ctx := t.Context()
	want := dr.PreRecovery{ID: "pre-1", SnapshotID: "snap-1"}
	var seen []int64
	s := remote(t, answering{pre: func(_ context.Context, report dr.Progress) (dr.PreRecovery, error) {
		for i := range int64(1001) {
			report("look", i, 1000, "bytes")
		}
		return want, nil
	}})
	got, err := s.PreRecover(ctx, PreRecoverTask{}, func(_ string, done, _ int64, _ string) { seen = append(seen, done) })
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Fatalf("got %+v, %v", got, err)
	}
	if len(seen) < 2 || len(seen) > 20 || seen[0] != 0 || seen[len(seen)-1] != 1000 {
		t.Errorf("progress that arrived: %v; want the first, the last, and few between", seen)
	}
	for _, reap := range [][]string{nil, {}, {"a"}} {
		removed, err := remote(t, answering{reap: reap}).Reap(ctx, nil)
		if err != nil || len(removed) != len(reap) {
			t.Errorf("reap: %v, %v; want %v", removed, err, reap)
		}
	}
	if running, err := s.Tend(ctx, InvokeTask{}); running || err != nil {
		t.Errorf("tend: %v, %v", running, err)
	}
	if err := s.Discard(ctx, "snap-1"); KindOf(err) != NotFound || !strings.Contains(err.Error(), "no snap-1 here") {
		t.Errorf("discard: %v", err)
	}
	if found := s.Diagnose(ctx); len(found) != 1 || found[0].Name != "kvm" {
		t.Errorf("diagnose: %v", found)
	}
}

func TestAnErrorKeepsItsKindBetweenNodes(t *testing.T) {
	for _, c := range []struct {
		err  error
		kind Kind
	}{{errors.New("broken"), Internal}, {Errorf(Conflict, "busy"), Conflict}, {Errorf(Refused, "no: %w", errors.New("why")), Refused}} {
		_, err := remote(t, answering{pre: func(context.Context, dr.Progress) (dr.PreRecovery, error) { return dr.PreRecovery{}, c.err }}).
			PreRecover(t.Context(), PreRecoverTask{}, nil)
		if KindOf(err) != c.kind || err.Error() != c.err.Error() {
			t.Errorf("%v arrived as %v (%s)", c.err, err, KindOf(err))
		}
	}
	_, err := remote(t, answering{pre: func(context.Context, dr.Progress) (dr.PreRecovery, error) {
		return dr.PreRecovery{}, &Rejected{Code: "no-system", Reason: "nothing on it"}
	}}).PreRecover(t.Context(), PreRecoverTask{}, nil)
	var r *Rejected
	if !errors.As(err, &r) || r.Code != "no-system" || r.Reason != "nothing on it" {
		t.Errorf("a rejection arrived as %v", err)
	}
}

func TestWorkEndsWhenTheOneWhoAskedGoesAway(t *testing.T) {
	began, ended := make(chan bool), make(chan bool)
	s := remote(t, answering{pre: func(ctx context.Context, _ dr.Progress) (dr.PreRecovery, error) {
		close(began)
		<-ctx.Done()
		close(ended)
		return dr.PreRecovery{}, ctx.Err()
	}})
	ctx, cancel := context.WithCancelCause(t.Context())
	stopped := errors.New("somebody stopped it")
	go func() { <-began; cancel(stopped) }()
	if _, err := s.PreRecover(ctx, PreRecoverTask{}, nil); !errors.Is(err, stopped) {
		t.Errorf("the one who asked got %v", err)
	}
	select {
	case <-ended:
	case <-time.After(10 * time.Second):
		t.Error("the work goes on")
	}
}

func TestANodeThatIsAwayIsUnavailable(t *testing.T) {
	server := httptest.NewServer(nil)
	server.Close()
	if _, err := RemoteSilo(server.Client(), server.URL).Tend(t.Context(), InvokeTask{}); KindOf(err) != Unavailable {
		t.Errorf("got %v, of kind %s", err, KindOf(err))
	}
}
