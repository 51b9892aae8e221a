package master

import (
	"context"
	"errors"
	"fmt"

	"github.com/musterdr/muster/internal/api"
	"github.com/musterdr/muster/internal/catalog"
	"github.com/musterdr/muster/internal/dr"
	"github.com/musterdr/muster/internal/engine"
	"github.com/musterdr/muster/internal/fileset"
)

// Contact implements api.Operator.
func (m *Master) Contact(ctx context.Context, appliance string, source dr.Source) (api.Contact, error) {
	from, err := m.capturer(appliance)
	if err != nil {
		return api.Contact{}, err
	}
	return from.Contact(ctx, source)
}

// AddServer implements api.Operator.
func (m *Master) AddServer(ctx context.Context, server dr.Server) (dr.Server, error) {
	server.ID = dr.NewID("srv")
	server.Created = m.Now().UTC()
	if server.Schedule.Every == 0 {
		server.Schedule.Every = dr.DefaultEvery
	}
	if err := m.validate(ctx, &server); err != nil {
		return dr.Server{}, err
	}
	st, err := m.storeOf(ctx, server)
	if err != nil {
		return dr.Server{}, err
	}
	if err := st.PutRecord(ctx, dr.ServerRecord, server.ID, server); err != nil {
		return dr.Server{}, fmt.Errorf("keep definition of %s in the store: %w", server.Name, err)
	}
	if err := m.Catalog.AddServer(ctx, server); err != nil {
		if derr := st.DeleteRecord(ctx, dr.ServerRecord, server.ID); derr != nil {
			m.Log.ErrorContext(ctx, "take back record of server", "server", server.Name, "error", derr)
		}
		if errors.Is(err, catalog.ErrExists) {
			return dr.Server{}, api.Errorf(api.Conflict, "a server named %q exists: remove it first, or choose another name", server.Name)
		}
		return dr.Server{}, err
	}
	m.look(ctx, server.Appliance)
	return server, nil
}

// UpdateServer implements api.Operator.
func (m *Master) UpdateServer(ctx context.Context, name string, change api.ServerChange) (dr.Server, error) {
	server, err := m.server(ctx, name)
	if err != nil {
		return dr.Server{}, err
	}
	apply(&server, change)
	if err := m.validate(ctx, &server); err != nil {
		return dr.Server{}, err
	}
	st, err := m.storeOf(ctx, server)
	if err != nil {
		return dr.Server{}, err
	}
	if err := m.Catalog.UpdateServer(ctx, server); err != nil {
		return dr.Server{}, err
	}
	if err := st.PutRecord(ctx, dr.ServerRecord, server.ID, server); err != nil {
		return dr.Server{}, fmt.Errorf("keep definition of %s in the store: %w", server.Name, err)
	}
	m.look(ctx, server.Appliance)
	return server, nil
}

// validate says what is wrong with a server's definition, and names its standby by its identifier.
func (m *Master) validate(ctx context.Context, server *dr.Server) error {
	err := server.Validate()
	if err == nil && server.HasData() {
		err = fileset.Set{Roots: server.Data.Paths, Exclude: server.Data.Exclude}.Validate()
	}
	if err != nil {
		return api.Errorf(api.Invalid, "%w", err)
	}
	if err := m.checkCustomer(server); err != nil || server.Standby == "" {
		return err
	}
	standby, err := m.server(ctx, server.Standby)
	switch {
	case err != nil:
		return api.Errorf(api.Invalid, "standby of %s: %w", server.Name, err)
	case !standby.HasImage() || standby.ID == server.ID:
		return api.Errorf(api.Invalid, "standby of %s: %s has no image of its own", server.Name, standby.Name)
	case standby.Appliance != server.Appliance:
		return api.Errorf(api.Invalid, "standby of %s: %s is captured by another appliance", server.Name, standby.Name)
	}
	server.Standby = standby.ID
	return nil
}

func apply(server *dr.Server, c api.ServerChange) {
	set(&server.Customer, c.Customer)
	set(&server.Schedule.Every, c.Every)
	set(&server.Objectives.RTO, c.RTO)
	set(&server.Objectives.RPO, c.RPO)
	set(&server.Checks, c.Checks)
	set(&server.Memory, c.Memory)
	set(&server.CPUs, c.CPUs)
	set(&server.Overlays, c.Overlays)
	set(&server.Retention.KeepLast, c.KeepLast)
	set(&server.Tier, c.Tier)
	set(&server.Data.Paths, c.DataPaths)
	set(&server.Data.Exclude, c.DataExclude)
	set(&server.Data.Every, c.DataEvery)
	set(&server.Standby, c.Standby)
	set(&server.Signs, c.Signs)
	if ssh := server.Source.SSH; ssh != nil {
		set(&ssh.KeyFile, c.KeyFile)
		set(&ssh.HostKey, c.HostKey)
		set(&ssh.FreezeLimit, c.FreezeTime)
		set(&ssh.ReadLimit, c.ReadLimit)
		set(&ssh.Resident, c.Resident)
		set(&ssh.Hooks.Off, c.HooksOff)
		set(&ssh.Hooks.Limit, c.HookLimit)
		set(&ssh.Hooks.Required, c.HooksRequired)
		set(&ssh.Snapshots, c.Snapshots)
	}
}

func set[T any](to *T, from *T) {
	if from != nil {
		*to = *from
	}
}

// server finds a server by name or identifier.
func (m *Master) server(ctx context.Context, name string) (dr.Server, error) {
	s, err := m.Catalog.Server(ctx, name)
	if err != nil {
		return dr.Server{}, noServer(name, err)
	}
	return s, nil
}

// noServer says in words that there is no such server, if that is what an error means.
func noServer(name string, err error) error {
	if errors.Is(err, catalog.ErrNotFound) {
		return api.Errorf(api.NotFound, "there is no server %q: see 'muster server list'", name)
	}
	return err
}

// Servers implements api.Operator.
func (m *Master) Servers(ctx context.Context, after string, limit int) ([]api.ServerStatus, error) {
	if limit <= 0 || limit > api.MaxServers {
		limit = api.MaxServers
	}
	standings, err := m.Catalog.Standings(ctx, after, limit)
	if err != nil {
		return nil, err
	}
	running, err := m.running(ctx)
	if err != nil {
		return nil, err
	}
	out := make([]api.ServerStatus, 0, len(standings))
	for _, s := range standings {
		out = append(out, m.status(s, running))
	}
	return out, nil
}

// Server implements api.Operator.
func (m *Master) Server(ctx context.Context, name string) (api.ServerStatus, error) {
	s, err := m.Catalog.Standing(ctx, name)
	if err != nil {
		return api.ServerStatus{}, noServer(name, err)
	}
	running, err := m.running(ctx)
	if err != nil {
		return api.ServerStatus{}, err
	}
	out := m.status(s, running)
	if out.LKG != nil && out.LKG.PreRecovery != nil {
		out.Holders, err = m.holders(ctx, out.LKG.PreRecovery.ID)
	}
	return out, err
}

// maxRunning bounds how many unfinished operations are looked at: more than there are servers.
const maxRunning = 100_000

// running gives each server's unfinished operation, by server name.
func (m *Master) running(ctx context.Context) (map[string]api.Operation, error) {
	all, err := m.Engine.List(ctx, engine.Filter{Unfinished: true, Limit: maxRunning})
	if err != nil {
		return nil, err
	}
	out := map[string]api.Operation{}
	for _, s := range all {
		op := m.view(s)
		if _, there := out[op.Server]; op.Server != "" && (!there || op.State == api.OperationRunning) {
			out[op.Server] = op
		}
	}
	return out, nil
}

func (m *Master) status(s catalog.Standing, running map[string]api.Operation) api.ServerStatus {
	due := s.Server.Dues(s.Taken, m.Now())
	out := api.ServerStatus{Server: s.Server, Newest: s.Newest, LKG: s.LKG, Due: due.Next(), DataDue: due.Data, Retest: s.Retest, Tickets: s.Tickets, Invocation: s.Invocation}
	if out.Near = m.near(s.Server); out.Near != nil {
		out.Due = out.Near.Due
	}
	if op, ok := running[s.Server.Name]; ok {
		out.Operation = &op
	}
	return out
}

// RemoveServer implements api.Operator.
func (m *Master) RemoveServer(ctx context.Context, name string) error {
	s, err := m.server(ctx, name)
	if err != nil {
		return err
	}
	running, err := m.running(ctx)
	if err != nil {
		return err
	}
	servers, err := m.Catalog.Servers(ctx)
	if err != nil {
		return err
	}
	for _, other := range servers {
		if other.Standby == s.ID {
			return api.Errorf(api.Conflict, "%s is the standby of %s: give that another one first", s.Name, other.Name)
		}
	}
	if op, ok := running[s.Name]; ok {
		return api.Errorf(api.Conflict, "%s is being worked on (%s): wait for it or cancel it first", s.Name, op.ID)
	}
	st, err := m.storeOf(ctx, s)
	if err != nil {
		return err
	}
	if err := m.Catalog.RemoveServer(ctx, s.ID); err != nil {
		if errors.Is(err, catalog.ErrInUse) {
			return api.Errorf(api.Conflict, "%s is invoked: end the invocation first", s.Name)
		}
		return err
	}
	if err := st.DeleteRecord(ctx, dr.ServerRecord, s.ID); err != nil {
		return fmt.Errorf("forget definition of %s in the store: %w", s.Name, err)
	}
	if err := st.DropPartial(ctx, s.ID); err != nil {
		return err
	}
	if s.Appliance != "" { // it cleans up when it learns of it
		m.look(ctx, s.Appliance)
		return nil
	}
	// The source may be gone for good: what is left there is a cache folder, and not reaching it is no reason to fail.
	if err := m.Appliance.Forget(ctx, s.Source); err != nil {
		m.event(ctx, "server.source-not-cleaned", s.Name, s.ID, "the agent's cache folder may be left on the source: "+err.Error())
	}
	return nil
}

// Snapshots implements api.Operator.
func (m *Master) Snapshots(ctx context.Context, name string) ([]dr.Record, error) {
	s, err := m.server(ctx, name)
	if err != nil {
		return nil, err
	}
	return m.Catalog.Snapshots(ctx, s.ID)
}

// Record implements api.Operator.
func (m *Master) Record(ctx context.Context, snapshot string) (dr.Record, error) {
	r, err := m.Catalog.Snapshot(ctx, snapshot)
	if errors.Is(err, catalog.ErrNotFound) {
		return dr.Record{}, api.Errorf(api.NotFound, "there is no snapshot %q: see 'muster snapshots SERVER'", snapshot)
	}
	return r, err
}

// Promotions implements api.Operator.
func (m *Master) Promotions(ctx context.Context, name string) ([]dr.Promotion, error) {
	s, err := m.server(ctx, name)
	if err != nil {
		return nil, err
	}
	return m.Catalog.Promotions(ctx, s.ID)
}

// Tickets implements api.Operator.
func (m *Master) Tickets(ctx context.Context, all bool) ([]dr.Ticket, error) {
	return m.Catalog.Tickets(ctx, catalog.TicketFilter{Closed: all})
}

// CloseTicket implements api.Operator.
func (m *Master) CloseTicket(ctx context.Context, id, reason string) error {
	err := m.Catalog.CloseTicket(ctx, id, reason, m.Now())
	if errors.Is(err, catalog.ErrNotFound) {
		return api.Errorf(api.NotFound, "there is no open ticket %q: see 'muster tickets'", id)
	}
	return err
}

// Events implements api.Operator.
func (m *Master) Events(ctx context.Context, after int64, limit int, server string) ([]dr.Event, error) {
	if limit <= 0 || limit > api.MaxEvents {
		limit = api.MaxEvents
	}
	return m.Catalog.Events(ctx, after, limit, server)
}

// FilesRestored implements api.Journal.
func (m *Master) FilesRestored(ctx context.Context, r dr.FileRestore) error {
	return m.Catalog.AddEventOnce(ctx, r.Event())
}
