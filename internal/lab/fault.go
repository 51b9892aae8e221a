package lab

import (
	"context"

	"github.com/musterdr/muster/internal/api"
	"github.com/musterdr/muster/internal/dr"
)

// Calls are the calls of an appliance and a silo on the road of every server, each of which can be made to fail before it begins or after it has
// done its work.
var Calls = []string{"snapshot", "pre-recover", "test", "keep deltas", "invoke", "check", "end"}

// around makes a call, and asks fault, if there is one, before it and after it.
func around[T any](ctx context.Context, fault func(context.Context, string) error, call string, do func() (T, error)) (T, error) {
	if fault == nil {
		return do()
	}
	var none T
	if err := fault(ctx, "before "+call); err != nil {
		return none, err
	}
	v, err := do()
	if err == nil {
		if err := fault(ctx, "after "+call); err != nil {
			return none, err
		}
	}
	return v, err
}

type faultyAppliance struct {
	api.Appliance
	lab *Lab
}

func (f faultyAppliance) Snapshot(ctx context.Context, task api.SnapshotTask, report dr.Progress) (dr.Snapshot, error) {
	return around(ctx, f.lab.Fault, "snapshot", func() (dr.Snapshot, error) { return f.Appliance.Snapshot(ctx, task, report) })
}

type faultySilo struct {
	api.Silo
	lab *Lab
}

func (f faultySilo) PreRecover(ctx context.Context, task api.PreRecoverTask, report dr.Progress) (dr.PreRecovery, error) {
	return around(ctx, f.lab.Fault, "pre-recover", func() (dr.PreRecovery, error) { return f.Silo.PreRecover(ctx, task, report) })
}

func (f faultySilo) Test(ctx context.Context, task api.TestTask, report dr.Progress) (dr.Verdict, error) {
	return around(ctx, f.lab.Fault, "test", func() (dr.Verdict, error) { return f.Silo.Test(ctx, task, report) })
}

func (f faultySilo) KeepDeltas(ctx context.Context, task api.DeltasTask) (string, error) {
	return around(ctx, f.lab.Fault, "keep deltas", func() (string, error) { return f.Silo.KeepDeltas(ctx, task) })
}

func (f faultySilo) HoldDeltas(ctx context.Context, task api.DeltasTask) (string, error) {
	return around(ctx, f.lab.Fault, "hold", func() (string, error) { return f.Silo.HoldDeltas(ctx, task) })
}

func (f faultySilo) Invoke(ctx context.Context, task api.InvokeTask, report dr.Progress) (api.Invoked, error) {
	return around(ctx, f.lab.Fault, "invoke", func() (api.Invoked, error) { return f.Silo.Invoke(ctx, task, report) })
}

func (f faultySilo) CheckInvoked(ctx context.Context, task api.InvokeTask, report dr.Progress) ([]dr.CheckResult, error) {
	return around(ctx, f.lab.Fault, "check", func() ([]dr.CheckResult, error) { return f.Silo.CheckInvoked(ctx, task, report) })
}

func (f faultySilo) Leave(ctx context.Context, task api.InvokeTask, report dr.Progress) (api.Left, error) {
	return around(ctx, f.lab.Fault, "leave", func() (api.Left, error) { return f.Silo.Leave(ctx, task, report) })
}

func (f faultySilo) EndInvocation(ctx context.Context, task api.InvokeTask, keep bool) (string, error) {
	return around(ctx, f.lab.Fault, "end", func() (string, error) { return f.Silo.EndInvocation(ctx, task, keep) })
}
