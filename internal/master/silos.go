package master

import (
	"context"
	"errors"
	"slices"
	"time"

	"github.com/musterdr/muster/internal/api"
	"github.com/musterdr/muster/internal/catalog"
	"github.com/musterdr/muster/internal/dr"
)

// ListSilos implements api.Operator.
func (m *Master) ListSilos(ctx context.Context) ([]api.SiloStatus, error) {
	silos, err := m.Catalog.Silos(ctx)
	if err != nil {
		return nil, err
	}
	leases, err := m.Catalog.Leases(ctx)
	if err != nil {
		return nil, err
	}
	held, err := m.Catalog.Held(ctx)
	if err != nil {
		return nil, err
	}
	connected := m.Silos.Names()
	out := make([]api.SiloStatus, len(silos))
	for i, s := range silos {
		out[i] = api.SiloStatus{Silo: s, Connected: slices.Contains(connected, s.Name), Held: held[s.Name], Skew: m.skew(s.Name)}
		for _, l := range leases {
			if l.Silo == s.Name {
				out[i].Leases = append(out[i].Leases, l)
			}
		}
	}
	return out, nil
}

// skew is how far a silo's clock was ahead when this process last heard of it.
func (m *Master) skew(silo string) time.Duration {
	m.farm.mu.Lock()
	defer m.farm.mu.Unlock()
	return m.farm.pulses[silo].skew
}

// ShowSilo implements api.Operator.
func (m *Master) ShowSilo(ctx context.Context, name string) (api.SiloStatus, error) {
	all, err := m.ListSilos(ctx)
	if err != nil {
		return api.SiloStatus{}, err
	}
	for _, s := range all {
		if s.Silo.Name == name {
			return s, nil
		}
	}
	return api.SiloStatus{}, noSilo(name)
}

func noSilo(name string) error {
	return api.Errorf(api.NotFound, "there is no silo %q: see 'muster silo list'", name)
}

// DrainSilo implements api.Operator.
func (m *Master) DrainSilo(ctx context.Context, name string, request api.DrainRequest) (api.SiloStatus, error) {
	if len(request.Reason) > dr.MaxReason {
		return api.SiloStatus{}, api.Errorf(api.Invalid, "the reason has %d bytes: the most is %d", len(request.Reason), dr.MaxReason)
	}
	err := m.Catalog.Drain(ctx, name, request.Drain, request.Reason)
	switch {
	case errors.Is(err, catalog.ErrNotFound):
		return api.SiloStatus{}, noSilo(name)
	case errors.Is(err, catalog.ErrInUse):
		return api.SiloStatus{}, api.Errorf(api.Conflict, "silo %s is lost: it takes no work; when it is back it does again", name)
	case err != nil:
		return api.SiloStatus{}, err
	}
	go m.place(ctx)
	return m.ShowSilo(ctx, name)
}

// RemoveSilo implements api.Operator.
func (m *Master) RemoveSilo(ctx context.Context, name string) error {
	s, err := m.ShowSilo(ctx, name)
	if err != nil {
		return err
	}
	if s.Connected && name == m.Home {
		return api.Errorf(api.Refused, "silo %s is part of this master's process: drain it, if it is to do nothing", name)
	}
	if s.Connected && s.Silo.State == dr.SiloActive {
		return api.Errorf(api.Refused, "silo %s works: drain it first, with 'muster silo drain %s'", name, name)
	}
	if err := m.Catalog.RemoveSilo(ctx, name); err != nil {
		if errors.Is(err, catalog.ErrInUse) {
			return api.Errorf(api.Conflict, "%w: see 'muster silo show %s'", err, name)
		}
		return err
	}
	m.farm.mu.Lock()
	delete(m.farm.pulses, name)
	delete(m.farm.seen, name)
	m.farm.mu.Unlock()
	return nil
}

// Doctor implements api.Operator.
func (m *Master) Doctor(ctx context.Context) ([]api.Finding, error) {
	names := m.Silos.Names()
	var out []api.Finding
	for _, name := range names {
		silo, err := m.Silos.Silo(name)
		if err != nil {
			out = append(out, api.Finding{Name: "silo " + name, State: "fail", Detail: err.Error()})
			continue
		}
		for _, found := range silo.Diagnose(ctx) {
			if len(names) > 1 {
				found.Name = name + ": " + found.Name
			}
			out = append(out, found)
		}
	}
	if len(names) == 0 {
		out = append(out, api.Finding{Name: "silos", State: "fail", Detail: "no silo is connected: nothing can be tested or invoked", Fix: "start one with 'muster silo serve'"})
	}
	return out, nil
}

// siloOfRun says which silo works for an operation just now; "" none.
func (m *Master) siloOfRun(run string) string {
	m.farm.mu.Lock()
	defer m.farm.mu.Unlock()
	for _, c := range m.farm.calls {
		if c.run == run {
			return c.lease.Silo
		}
	}
	return ""
}

// holders lists the silos on which a rescue image would boot at once.
func (m *Master) holders(ctx context.Context, pre string) ([]string, error) {
	where, err := m.where(ctx, pre)
	return where[pre], err
}
