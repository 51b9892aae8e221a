package api

import (
	"context"
	"net/http"

	"github.com/musterdr/muster/internal/dr"
)

// The procedures of an appliance and of a silo, by their paths.
const (
	procSnapshot procedure[SnapshotTask, dr.Snapshot] = "/appliance/Snapshot"
	procContact  procedure[dr.Source, Contact]        = "/appliance/Contact"
	procForget   procedure[dr.Source, nothing]        = "/appliance/Forget"

	procPreRecover   procedure[PreRecoverTask, dr.PreRecovery] = "/silo/PreRecover"
	procBeat         procedure[Beat, Pulse]                    = "/silo/Beat"
	procKeepDeltas   procedure[DeltasTask, string]             = "/silo/KeepDeltas"
	procHoldDeltas   procedure[DeltasTask, string]             = "/silo/HoldDeltas"
	procTest         procedure[TestTask, dr.Verdict]           = "/silo/Test"
	procInvoke       procedure[InvokeTask, Invoked]            = "/silo/Invoke"
	procCheckInvoked procedure[InvokeTask, []dr.CheckResult]   = "/silo/CheckInvoked"
	procTend         procedure[InvokeTask, bool]               = "/silo/Tend"
	procLeave        procedure[InvokeTask, Left]               = "/silo/Leave"
	procEnd          procedure[endInvocation, string]          = "/silo/EndInvocation"
	procDiscard      procedure[string, nothing]                = "/silo/Discard"
	procReap         procedure[[]string, []string]             = "/silo/Reap"
	procDiagnose     procedure[nothing, []Finding]             = "/silo/Diagnose"
)

type endInvocation struct {
	Task InvokeTask `json:"task"`
	Keep bool       `json:"keep"`
}

// ApplianceHandler serves an appliance to the master that reaches it.
func ApplianceHandler(a Appliance) http.Handler {
	mux := http.NewServeMux()
	procSnapshot.serve(mux, a.Snapshot)
	procContact.serve(mux, func(ctx context.Context, in dr.Source, _ dr.Progress) (Contact, error) { return a.Contact(ctx, in) })
	procForget.serve(mux, func(ctx context.Context, in dr.Source, _ dr.Progress) (nothing, error) {
		return nothing{}, a.Forget(ctx, in)
	})
	return mux
}

// RemoteAppliance is the appliance that answers through an HTTP client under a base URL.
func RemoteAppliance(c *http.Client, base string) Appliance { return remoteAppliance{c, base} }

type remoteAppliance struct {
	c    *http.Client
	base string
}

func (r remoteAppliance) Snapshot(ctx context.Context, task SnapshotTask, report dr.Progress) (dr.Snapshot, error) {
	return procSnapshot.ask(ctx, r.c, r.base, task, report)
}

func (r remoteAppliance) Contact(ctx context.Context, source dr.Source) (Contact, error) {
	return procContact.ask(ctx, r.c, r.base, source, nil)
}

func (r remoteAppliance) Forget(ctx context.Context, source dr.Source) error {
	_, err := procForget.ask(ctx, r.c, r.base, source, nil)
	return err
}

// SiloHandler serves a silo to the master that reaches it.
func SiloHandler(s Silo) http.Handler {
	mux := http.NewServeMux()
	procPreRecover.serve(mux, s.PreRecover)
	procBeat.serve(mux, func(ctx context.Context, in Beat, _ dr.Progress) (Pulse, error) { return s.Beat(ctx, in) })
	procKeepDeltas.serve(mux, func(ctx context.Context, in DeltasTask, _ dr.Progress) (string, error) { return s.KeepDeltas(ctx, in) })
	procHoldDeltas.serve(mux, func(ctx context.Context, in DeltasTask, _ dr.Progress) (string, error) { return s.HoldDeltas(ctx, in) })
	procTest.serve(mux, s.Test)
	procInvoke.serve(mux, s.Invoke)
	procCheckInvoked.serve(mux, s.CheckInvoked)
	procTend.serve(mux, func(ctx context.Context, in InvokeTask, _ dr.Progress) (bool, error) { return s.Tend(ctx, in) })
	procLeave.serve(mux, s.Leave)
	procEnd.serve(mux, func(ctx context.Context, in endInvocation, _ dr.Progress) (string, error) {
		return s.EndInvocation(ctx, in.Task, in.Keep)
	})
	procDiscard.serve(mux, func(ctx context.Context, in string, _ dr.Progress) (nothing, error) {
		return nothing{}, s.Discard(ctx, in)
	})
	procReap.serve(mux, func(ctx context.Context, in []string, _ dr.Progress) ([]string, error) { return s.Reap(ctx, in) })
	procDiagnose.serve(mux, func(ctx context.Context, _ nothing, _ dr.Progress) ([]Finding, error) { return s.Diagnose(ctx), nil })
	return mux
}

// RemoteSilo is the silo that answers through an HTTP client under a base URL.
func RemoteSilo(c *http.Client, base string) Silo { return remoteSilo{c, base} }

type remoteSilo struct {
	c    *http.Client
	base string
}

func (r remoteSilo) PreRecover(ctx context.Context, task PreRecoverTask, report dr.Progress) (dr.PreRecovery, error) {
	return procPreRecover.ask(ctx, r.c, r.base, task, report)
}

func (r remoteSilo) Beat(ctx context.Context, beat Beat) (Pulse, error) {
	return procBeat.ask(ctx, r.c, r.base, beat, nil)
}

func (r remoteSilo) KeepDeltas(ctx context.Context, task DeltasTask) (string, error) {
	return procKeepDeltas.ask(ctx, r.c, r.base, task, nil)
}

func (r remoteSilo) HoldDeltas(ctx context.Context, task DeltasTask) (string, error) {
	return procHoldDeltas.ask(ctx, r.c, r.base, task, nil)
}

func (r remoteSilo) Test(ctx context.Context, task TestTask, report dr.Progress) (dr.Verdict, error) {
	return procTest.ask(ctx, r.c, r.base, task, report)
}

func (r remoteSilo) Invoke(ctx context.Context, task InvokeTask, report dr.Progress) (Invoked, error) {
	return procInvoke.ask(ctx, r.c, r.base, task, report)
}

func (r remoteSilo) CheckInvoked(ctx context.Context, task InvokeTask, report dr.Progress) ([]dr.CheckResult, error) {
	return procCheckInvoked.ask(ctx, r.c, r.base, task, report)
}

func (r remoteSilo) Tend(ctx context.Context, task InvokeTask) (bool, error) {
	return procTend.ask(ctx, r.c, r.base, task, nil)
}

func (r remoteSilo) Leave(ctx context.Context, task InvokeTask, report dr.Progress) (Left, error) {
	return procLeave.ask(ctx, r.c, r.base, task, report)
}

func (r remoteSilo) EndInvocation(ctx context.Context, task InvokeTask, keep bool) (string, error) {
	return procEnd.ask(ctx, r.c, r.base, endInvocation{task, keep}, nil)
}

func (r remoteSilo) Discard(ctx context.Context, snapshotID string) error {
	_, err := procDiscard.ask(ctx, r.c, r.base, snapshotID, nil)
	return err
}

func (r remoteSilo) Reap(ctx context.Context, alive []string) ([]string, error) {
	return procReap.ask(ctx, r.c, r.base, alive, nil)
}

func (r remoteSilo) Diagnose(ctx context.Context) []Finding {
	found, err := procDiagnose.ask(ctx, r.c, r.base, nothing{}, nil)
	if err != nil {
		return []Finding{{Name: "silo", State: "fail", Detail: err.Error()}}
	}
	return found
}
